"""Check on this machine's GPU that the kernels compute the right bits, and say what the GPU can do.

`vqvit doctor --gpu` compiles and runs a probe of the CUDA kernels, compares `int8_mm` with `torch._int_mm`, every other
op of the CUDA kernels with that of the Triton kernels, at the shapes of ViT-B/16, and the logits of a whole model.
Nothing is compared with a tolerance. Each check is a process of its own, so that one that hangs is killed and the
others go on: two to five minutes. Exit status: 0 if all is right, 1 if a result is wrong or a check died, 2 without a
GPU.
"""

import argparse
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

SECONDS = 600.0
TWIN = {"VQVIT_CUDA_TWIN": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from vqvit.commands import common

    parser.add_argument("--gpu", action="store_true", help="check the GPU; there is no other check yet")
    parser.add_argument("--seconds", type=common.positive_int, default=int(SECONDS), help="end after so long")
    parser.add_argument(
        "--twin", action="store_true", help="in miniature, on kernels emulated by the CPU: shows what a run is like"
    )


def run(arguments: argparse.Namespace) -> dict:
    if not arguments.gpu:
        raise ValueError("doctor: expected --gpu, which says what to check")
    deadline = time.monotonic() + arguments.seconds
    facts = _twin_facts() if arguments.twin else _gpu_facts()
    with tempfile.TemporaryDirectory(prefix="vqvit-doctor-") as folder:
        outcomes = _checked(facts, Path(folder), deadline, arguments.twin)
    return facts | {"backends": _by_backend(outcomes, facts["names"]), "checks": outcomes}


def exit_status(result: dict) -> int:
    """1 if a backend was wrong, or a check died or did not run."""
    return int(any(map(_faulty, result["checks"])))


def _gpu_facts() -> dict:
    """What the GPU is. Raises `ValueError` without one."""
    import torch

    from vqvit import backends, device_checks
    from vqvit.kernels import devices

    if not torch.cuda.is_available():
        build = f"torch {torch.__version__} {'' if torch.version.cuda else 'is built without CUDA and '}sees none"
        raise ValueError(f"doctor: expected a CUDA device; {build}. `--twin` emulates one, in miniature")
    capability = torch.cuda.get_device_capability()
    names = device_checks.native_backends("cuda")
    return {
        "device": torch.cuda.get_device_name(),
        "capability": "{}.{}".format(*capability),
        "support": devices.support(capability),
        "names": list(names),
        "unavailable": {n: reason for n in ("cuda", "triton") if (reason := backends.unavailable(n))},
    }


def _twin_facts() -> dict:
    names = ["cuda", "triton", "cpu"]
    return {"device": "the CPU, emulating a GPU", "capability": "", "support": "", "names": names, "unavailable": {}}


def _checked(facts: dict, folder: Path, deadline: float, twin: bool) -> list[dict]:
    """Every check in a process of its own, summed up."""
    from vqvit import children, device_checks, probe

    cases, size = (probe.TWIN, "tiny") if twin else (probe.REAL, "vit-b16")
    cores = os.cpu_count() or 1
    shared = max(1, cores // 4)
    planned = []
    if "cuda" in facts["names"]:
        planned.append(probe.build_child(folder / "built", twin, cores))
        planned += [
            probe.child(
                family, sizes, folder / "built", ("build",), None, probe.TWIN_ENVIRONMENT if twin else {}, shared
            )
            for family, sizes in cases.items()
        ]
    after = tuple(child.name for child in planned[:1])
    device = "cpu" if twin else "cuda"
    planned += device_checks.children(facts["names"], device, size, folder, after, shared, together=twin)
    environment = TWIN if twin else {}
    planned = [children.with_environment(child, environment) for child in planned]
    return [_summed(outcome) for outcome in children.run(planned, folder, cores, deadline)]


def _summed(outcome) -> dict:
    """A child as JSON: what it checked on which backends, and what was wrong first."""
    rows = [row for row in outcome.rows if "checked" in row or "values" in row]
    bad = [row for row in outcome.rows if row.get("wrong")]
    first = next((f"{row.get('case') or row.get('what')}: {row.get('note') or 'other bits'}" for row in bad), "")
    results = Counter(name for row in rows for name in _backends_of(row))
    return {
        "check": outcome.name,
        "results": dict(results),
        "values": sum(int(row.get("checked") or row.get("values") or 0) for row in rows),
        "wrong": len(bad),
        "died_at": outcome.deaths,
        "problem": outcome.problem,
        "first": first or outcome.said,
        "failing": sorted({name for row in bad for name in _backends_of(row)}),
        "seconds": round(outcome.seconds, 1),
    }


def _backends_of(row: dict) -> set[str]:
    """Whose bits a row is about: two backends that differ are both under suspicion."""
    from vqvit import backends

    if "backend" not in row:  # the probe's
        return {"cuda"}
    return {row["backend"], row["against"]} & set(backends.NAMES) - {"reference"}


def _faulty(check: dict) -> bool:
    return bool(check["problem"] or check["wrong"] or check["died_at"])


def _by_backend(checks: list[dict], names: list[str]) -> dict[str, str]:
    """For each backend, in words, whether its bits are right."""
    found = {}
    for name in names:
        wrong = [check["check"] for check in checks if name in check["failing"]]
        died = [check["check"] for check in checks if _faulty(check) and not check["wrong"]]
        results = sum(check["results"].get(name, 0) for check in checks)
        if wrong:
            found[name] = f"other bits or an error in {', '.join(wrong)}"
        elif results:
            found[name] = f"right to the bit in {results} results" + (
                f"; not all checked, for {', '.join(died)} died" if died else ""
            )
        else:
            found[name] = "not checked"
    return found


def to_text(result: dict) -> str:
    lines = [f"{result['device']}" + (f", compute capability {result['capability']}" if result["capability"] else "")]
    lines += [result["support"]] if result["support"] else []
    lines += [f"backend {name}: {said}" for name, said in result["backends"].items()]
    lines += [f"backend {name}: cannot run here: {reason}" for name, reason in result["unavailable"].items()]
    for check in result["checks"]:
        if _faulty(check):
            lines.append(
                f"! {check['check']}: {'; '.join(dict.fromkeys(filter(None, [check['problem'], check['first']])))}"
            )
    values = sum(check["values"] for check in result["checks"])
    bad = sum(map(_faulty, result["checks"]))
    lines.append(
        f"{values} values compared, bit by bit, in {len(result['checks'])} processes: "
        + (f"{bad} with a fault" if bad else "all right")
    )
    return "\n".join(lines)
