"""Measures which shipped config each launch of a model should take, and writes the table that the kernels then read.

A model runs once for each batch size while its GEMM and attention calls are kept with their operands. Each call is then
timed with every config that ships for the device, and its results are compared bit for bit. Without a device, `predict`
writes down what the model of tiles says. See kernels/tuned.py for what a table is.
"""

import copy
import dataclasses
import functools
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vqvit import backends, engines, ops, precompile, provenance, reference, timing
from vqvit.plan import QuantConfig
from vqvit.quantize import quantize_

ROUNDS = 15

MARGIN = 0.02
"""A config must be this much faster than the predicted one to replace it: less is noise, and would churn the tables."""

GROUPED = QuantConfig(activations={"attn_out": "per_token_group", "fc2": "per_token_group"})
CONFIGURATIONS = (QuantConfig(), GROUPED)
"""Between them, float models quantized like this launch every kind of GEMM, and attention that quantizes."""

Timer = Callable[[Mapping[str, Sequence[Callable[[], object]]], torch.device], Mapping[str, float]]
"""Candidates by name, each with calls that take turns, and their device -> median microseconds of a call by name."""


class TuningError(RuntimeError):
    """A config that fails or computes other bits than the others: no table may rest on it."""


@dataclass(frozen=True)
class Part:
    """A GPU that tables are predicted for."""

    capability: tuple[int, int]
    multiprocessors: int


PARTS = {
    "a100": Part((8, 0), 108),
    "a40": Part((8, 6), 84),
    "l40s": Part((8, 9), 142),
    "h100": Part((9, 0), 132),  # SXM, and H200
}


@dataclass(frozen=True)
class Call:
    """An op, its arguments, and the launch whose config it looks up."""

    op: Callable
    arguments: tuple
    options: dict
    launch: "tuned.Launch"  # noqa: F821  (kernels are imported on use: they import Triton)


@dataclass(frozen=True)
class Choice:
    """What was measured for a launch.

    us: median microseconds of each config, in the order of the config table; empty where nothing was measured.
    predicted, chosen: indices of the model's config and of the one for the table. problem: why there is none, or "".
    """

    launch: "tuned.Launch"  # noqa: F821
    configs: tuple
    us: tuple[float, ...]
    predicted: int
    chosen: int
    problem: str = ""


# ---- which launches -------------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Keeps the first call of each launch."""

    def __init__(self):
        super().__init__()
        self.calls: dict = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.vqvit.int8_encoder_block.default:  # what GPUs run is its parts
            with self:
                return reference.compose_encoder_block(ops, *args, **kwargs)
        if func.namespace == "vqvit" and (launch := launch_of(func, args, kwargs)) is not None:
            self.calls.setdefault(launch, Call(func, args, kwargs, launch))
        return func(*args, **kwargs)


def launch_of(op: Callable, arguments: tuple, options: dict):
    """The `tuned.Launch` that an op with contiguous operands looks up, or None for ops without a choice."""
    from vqvit.kernels import attention_s8, gemm_s8, tuned

    name = op._schema.name.removeprefix("vqvit::")
    if name not in ("int8_mm", "int8_linear", "int8_linear_quantize", "int8_linear_qkv", "int8_attention_quantize"):
        return None
    given = {argument.name: argument.default_value for argument in op._schema.arguments}
    given |= dict(zip(given, arguments, strict=False)) | options
    if name == "int8_attention_quantize":
        batch, heads, queries, dim = given["q"].shape
        keys = given["k"].shape[2]
        if not attention_s8.fits_one_launch(dim, keys):
            return None
        return tuned.Launch("attention_quantize", batch * queries, (heads, dim, queries, keys))
    m, k = given["a"].shape
    n = given["b"].shape[0] if name == "int8_mm" else given["b_scale"].shape[0]
    if k % 16:
        return None  # one config serves rows that 16-byte loads do not divide
    grouped = name != "int8_mm" and given["a_scale"].dim() == 2
    by_head = name == "int8_linear_qkv" and n // (3 * given["num_heads"]) in gemm_s8.HEAD_DIMS
    groups = grouped or by_head or bool(given.get("per_group"))
    return tuned.Launch("gemm_groups" if groups else "gemm", m, (n, k))


@torch.inference_mode()
def record(models: Iterable[nn.Module], batches: Sequence[Tensor]) -> Iterator[Call]:
    """The calls with a choice that quantized models make for each batch of inputs, each launch once."""
    models, seen = list(models), set()
    for pixels, model in itertools.product(batches, models):
        with _Recorder() as recorder:
            model(pixels)
        for launch, call in recorder.calls.items():
            if launch not in seen:
                seen.add(launch)
                yield call


def quantized(model: nn.Module, configurations: Iterable[QuantConfig] = CONFIGURATIONS) -> list[nn.Module]:
    """A float model quantized in each configuration."""
    models = []
    for config in configurations:
        models.append(copy.deepcopy(model))
        quantize_(models[-1], config)
    return models


def models_of(
    arch: str,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    configurations: Iterable[QuantConfig] = CONFIGURATIONS,
) -> list[nn.Module]:
    """Two blocks of an architecture of `engines`, quantized: all launch the same, but the last may skip tokens."""
    return quantized(engines.random_model(arch, blocks=2).to(device, dtype), configurations)


# ---- which config ---------------------------------------------------------------------------------------------------


def medians(candidates: Mapping[str, Sequence[Callable[[], object]]], device: torch.device) -> dict[str, float]:
    """The `Timer` that measures: replays of CUDA graphs, in turns."""
    with torch.cuda.device(device):
        timers = {name: timing.back_to_back(calls, device) for name, calls in candidates.items()}
        return {name: median for name, (median, _, _) in timing.take_turns(timers, ROUNDS).items()}


def measure(calls: Iterable[Call], gpu, device: torch.device, timer: Timer = medians) -> Iterator[Choice]:
    """Time every config of every call.

    Args: gpu: the `kernels.launch.Device` whose configs are tried; device: of the operands.

    A config that fails or differs from the first in a bit makes its launch a choice with a `problem`.
    """
    with backends.backend("triton"):
        for call in calls:
            yield _measured(call, gpu, device, timer)


def compilations(calls: Iterable[Call], gpu) -> Iterator[precompile.Job]:
    """Every config of every call, for `precompile.warm`: a GPU waits while a launch's 20 configs compile one by one.

    Operands may be on the meta device.
    """
    from vqvit.kernels import tuned

    for call in calls:
        name = call.op._schema.name.removeprefix("vqvit::")
        for config in tuned.configs(call.launch.kind, gpu.arch):
            yield precompile.Job.of(name, call.arguments, call.options, call.launch.kind, config)


def predict(calls: Iterable[Call], gpu) -> Iterator[Choice]:
    """What the model of tiles says for every call; operands may be on the meta device."""
    for call in calls:
        choice = _unmeasured(call, gpu)
        yield dataclasses.replace(choice, chosen=choice.predicted)


def _unmeasured(call: Call, gpu) -> Choice:
    from vqvit.kernels import tuned

    configs = tuned.configs(call.launch.kind, gpu.arch)
    predicted = configs.index(tuned.predict(gpu, call.launch))
    return Choice(call.launch, configs, (), predicted, predicted)


def _measured(call: Call, gpu, device: torch.device, timer: Timer) -> Choice:
    from vqvit.kernels import tuned

    choice = _unmeasured(call, gpu)
    sets = [call.arguments]
    while len(sets) < timing.operand_sets(_bytes(call.arguments)):
        sets.append(tuple(a.clone() if isinstance(a, Tensor) else a for a in call.arguments))

    def run(config: object, arguments: tuple) -> tuple[Tensor, ...]:
        with torch.inference_mode(), tuned.forced(call.launch.kind, config):
            result = call.op(*arguments, **call.options)
        return result if isinstance(result, tuple) else (result,)

    expected: tuple[Tensor, ...] | None = None
    for config in choice.configs:
        try:
            received = run(config, call.arguments)
        except Exception as error:  # a kernel may fail in any way, and the other launches can still be measured
            problem = f"{config}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return dataclasses.replace(choice, problem=problem)
        expected = expected or received
        if not all(map(_same_bits, received, expected)):
            problem = f"{config}: other results than {choice.configs[0]}"
            return dataclasses.replace(choice, problem=problem)
    candidates = {
        str(index): [functools.partial(run, config, arguments) for arguments in sets]
        for index, config in enumerate(choice.configs)
    }
    times = timer(candidates, device)
    us = tuple(times[name] for name in candidates)
    fastest = min(range(len(us)), key=us.__getitem__)
    keep = us[fastest] > (1 - MARGIN) * us[choice.predicted]
    return dataclasses.replace(choice, us=us, chosen=choice.predicted if keep else fastest)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _bytes(arguments: tuple) -> int:
    return sum(a.nbytes for a in arguments if isinstance(a, Tensor))


# ---- tables ---------------------------------------------------------------------------------------------------------


def row(choice: Choice) -> dict:
    """A choice, JSON-ready."""
    return {
        "kind": choice.launch.kind,
        "m": choice.launch.m,
        "shape": list(choice.launch.shape),
        "predicted": choice.predicted,
        "chosen": choice.chosen,
        "us": list(choice.us),
        "problem": choice.problem,
    }


def table(choices: Iterable[Choice], gpu, source: str, facts: dict) -> dict:
    """The JSON document of kernels/tuned.py, without launches that had a problem."""
    from vqvit.kernels import tuned

    choices = [choice for choice in choices if not choice.problem]
    configs = {kind: [dataclasses.asdict(c) for c in tuned.configs(kind, gpu.arch)] for kind in tuned.KINDS}
    entries = [
        {"kind": c.launch.kind, "m": c.launch.m, "shape": list(c.launch.shape), "config": c.chosen} for c in choices
    ]
    entries.sort(key=lambda entry: (entry["kind"], entry["shape"], entry["m"]))
    device = {"row": gpu.arch, "multiprocessors": gpu.sms}
    return {
        "format": tuned.FORMAT,
        "source": source,
        **device,
        "provenance": facts,
        "configs": configs,
        "entries": entries,
    }


def facts(device: str, capability: tuple[int, int]) -> dict:
    """Where a table comes from."""
    found = provenance.environment("cpu")
    kept = {name: found[name] for name in ("date", "vqvit", "torch", "triton", "commit", "command")}
    return {"device": device, "capability": "{}.{}".format(*capability), **kept}


def write(path: str | Path, document: dict) -> None:
    """Write a table, whole or not at all. Raises `OSError`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".vqvit-", dir=path.parent) as folder:
        whole = Path(folder) / path.name
        whole.write_text(to_json(document))
        os.replace(whole, path)


def to_json(document: dict) -> str:
    """JSON with a line for each config and entry, so that tables can be compared by line."""
    configs = ",\n".join(
        f'  "{kind}": [\n' + ",\n".join(f"   {json.dumps(c)}" for c in found) + "\n  ]"
        for kind, found in document["configs"].items()
    )
    entries = ",\n".join(f"  {json.dumps(entry)}" for entry in document["entries"])
    plain = {key: value for key, value in document.items() if key not in ("configs", "entries")}
    head = json.dumps(plain, indent=1).removesuffix("\n}")
    return f'{head},\n "configs": {{\n{configs}\n }},\n "entries": [\n{entries}\n ]\n}}\n'
