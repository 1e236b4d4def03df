"""The targets of the project read off the rows of gpu.py: one verdict a target and backend."""

from collections.abc import Iterator

from gpu_models import CONTENDERS, TARGETS

ARCH, BATCH = "vit-b16", 256
GEMM_SHARES = {"fc2": 0.60, "qkv": 0.45, "attn_out": 0.45, "fc1": 0.45}
"""Least share of the measured int8 peak at ViT-B batch 256: fc2 has K = 3072, the others K = 768."""

ROW_SHARE = 0.80
"""Least share of the measured copy bandwidth of a row-wise op, there."""

ROW_OPS = (
    "layer_norm", "layernorm_quantize", "add_layernorm_quantize", "quantize_per_token", "quantize_per_group",
    "quantize_qkv",
)  # fmt: skip


def verdicts(kernels: list[dict], models: list[dict], backends: tuple[str, ...]) -> Iterator[dict]:
    """A row for each target: what is wanted, what was reached, and whether that is enough."""
    for backend in backends:
        for launch, least in GEMM_SHARES.items():
            what = f"{launch} at {ARCH} batch {BATCH}, share of int8 peak"
            yield verdict(what, backend, least, _share(kernels, launch, backend))
        for op in ROW_OPS:
            what = f"{op} at {ARCH} batch {BATCH}, share of copy bandwidth"
            yield verdict(what, backend, ROW_SHARE, _share(kernels, op, backend))
        for (arch, batch), least in TARGETS.items():
            reached = [
                float(row["over_best_bf16"])
                for row in models
                if (row["arch"], int(row["batch"]), row["backend"]) == (arch, batch, backend)
                and row["engine"] in CONTENDERS
                and row["over_best_bf16"]
            ]
            yield verdict(
                f"{arch} batch {batch}, speed-up over the best bf16", backend, least, max(reached, default=None)
            )


def target_lines(kernels: list[dict], models: list[dict], backends: tuple[str, ...]) -> Iterator[str]:
    """A line for each target that was measured, and one that counts the others."""
    found = list(verdicts(kernels, models, backends))
    for row in found:
        if row["reached"]:
            yield f"{row['verdict']}: {row['target']} on {row['backend']}: {row['reached']}, wanted {row['wanted']}"
    missing = sum(not row["reached"] for row in found)
    yield f"{missing} of {len(found)} targets not measured"


def verdict(target: str, backend: str, least: float, reached: float | None) -> dict:
    outcome = "not measured" if reached is None else "reached" if reached >= least else "missed"
    shown = "" if reached is None else f"{reached:.2f}"
    return {"target": target, "backend": backend, "wanted": f"{least:.2f}", "reached": shown, "verdict": outcome}


def _share(kernels: list[dict], what: str, backend: str) -> float | None:
    """The best of the engines that do the same work on a backend."""
    shares = [
        float(row["share_of_peak"])
        for row in kernels
        if (row["arch"], str(row["batch"]), row["what"], row["backend"]) == (ARCH, str(BATCH), what, backend)
        and row["engine"].startswith("vqvit")
        and row["share_of_peak"]
    ]
    return max(shares, default=None)
