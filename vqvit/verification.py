"""Run a quantized model once beside what it returned in float, and put back what breaks: the net below all probes.

A replaced module can be right and still break its model: code elsewhere reads its weight or its kernel size, or holds
the float module whose weights are about to be released. So the model runs as it will be left, float weights gone.

    error    max over the floating tensors y of the result of |y - y_float| / |y_float|
    undone   an exception: each kind of module (names without their numbers) that raises when it alone is replaced
             error > bound: each module whose own result, or the model's with it alone replaced, is off by more
"""

import re
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vqvit import trial
from vqvit.nn import EncoderBlock, QuantLinear
from vqvit.plan import Plan, PlanError
from vqvit.rewriter import LayerReport, quantized_modules, revert
from vqvit.trial import Call, Trial

BOUND = 0.3
"""Largest relative L2 error of a healthy W8A8 model, with room. DINOv2 and CLIP of 12 blocks, width 192 and 65 tokens,
with random weights of 1, 3 and 6 times the usual size: 0.009 to 0.046, and 0.066 with one scale for each weight. The
two logits of ViT and DeiT, of which little is left after cancellation: 0.016 to 0.19, and once 0.57 with one scale for
each weight. So an error undoes nothing unless a part is that far from float by itself."""

LOW_BIT_BOUND = 0.9
"""Of models with weights below 8 bits: on the same DINOv2 and CLIP 4 bits gave 0.10 to 0.39 and 3 bits 0.17 to 0.88."""

SMALL = 1e-2
"""Root mean square beside which an output that is zero in float may be rounding."""


def verify_(
    model: nn.Module, plan: Plan, tried: Trial, keep_float: bool, failures_only: bool = False
) -> tuple[Plan, tuple[LayerReport, ...], str]:
    """Compare a quantized model with `tried`, its run in float, and put float modules back where it breaks.

    Args:
        model: quantized, and still holding its float modules. Static scales that are not calibrated yet count as
            dynamic ones.
        plan: its plan.
        tried: the run in float.
        keep_float: whether the float weights will stay in memory.
        failures_only: before calibration, undo what raises, however far the result is from float.

    Returns: the plan of what stays; what went back, and why; the error and the seconds, for the report.

    Warns if the result is off by more than the bound and no part can be blamed. Raises `PlanError` if nothing can stay.
    """
    start = time.perf_counter()
    check = _Check(model, tried, keep_float, _bound(plan, failures_only))
    try:
        with _dynamic_until_calibrated(model):
            reasons, error = check.find_broken()
    finally:
        check.hold_everything()
    if len(reasons) == len(check.modules):
        detail = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        raise PlanError(f"{type(model).__name__}: expected layers that can be replaced; got none ({detail})")
    roles = {name: "block" if isinstance(m, EncoderBlock) else m.plan.role for name, m in check.modules.items()}
    plan = revert(model, plan, list(reasons)) if reasons else plan
    undone = tuple(LayerReport(name, roles[name], "skipped", f"undone: {why}") for name, why in reasons.items())
    line = f"relative error {error:.2g} on a sample" if tried.outputs else "runs; no floating-point result to compare"
    if error > check.bound:
        line += f", more than {check.bound:g}, and no replaced part by itself is that far from float"
        warnings.warn(f"{type(model).__name__}: {line}", stacklevel=4)
    undoing = f", {len(undone)} undone" if undone else ""
    return plan, undone, f"{line}{undoing} ({tried.seconds + time.perf_counter() - start:.1f} s)"


def _bound(plan: Plan, failures_only: bool) -> float:
    if failures_only:
        return torch.inf
    return BOUND if all(layer.bits == 8 for layer in plan.layers) else LOW_BIT_BOUND


class _Blind:
    """An observer (see `QuantLinear.observer`) that looks away: while there is one, scales are dynamic."""

    def update(self, x: Tensor) -> None:
        pass


@contextmanager
def _dynamic_until_calibrated(model: nn.Module) -> Iterator[None]:
    watched: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.plan.activation == "static" and module.input_scale is None:
            watched.append((module, "observer"))
        if isinstance(module, EncoderBlock) and module.plan.attention_scales == "static" and module.q_scale is None:
            watched.append((module, "head_observer"))
    for module, observer in watched:
        setattr(module, observer, _Blind())
    try:
        yield
    finally:
        for module, observer in watched:
            setattr(module, observer, None)


class _Check:
    """Runs of a model with some of its replaced modules in place, and float modules elsewhere."""

    def __init__(self, model: nn.Module, tried: Trial, keep_float: bool, bound: float):
        self.model, self.tried, self.keep_float, self.bound = model, tried, keep_float, bound
        self.modules = dict(quantized_modules(model))
        self.tensors = {
            name: [(part, dict(part._parameters), dict(part._buffers)) for part in module.original[0].modules()]
            for name, module in self.modules.items()
        }

    def find_broken(self) -> tuple[dict[str, str], float]:
        """Why each broken module has to go back, by name, and the relative error of what stays."""
        reasons: dict[str, str] = {}
        outcome = self.run_with(self.modules)
        if isinstance(outcome, str):
            for names in _kinds(self.modules):
                alone = self.run_with(names)
                if isinstance(alone, str):
                    reasons |= dict.fromkeys(names, f"the model fails with it: {alone}")
            outcome = self.run_with(self.modules.keys() - reasons.keys())
            if isinstance(outcome, str):
                why = f"the model fails with what is replaced: {outcome}"
                return {name: reasons.get(name, why) for name in self.modules}, 0.0
        if outcome > self.bound:
            reasons |= self.find_different([name for name in self.modules if name not in reasons])
            outcome = self.run_with(self.modules.keys() - reasons.keys())
            if isinstance(outcome, str):
                return dict.fromkeys(self.modules, f"the model fails: {outcome}"), 0.0
        return reasons, outcome

    def find_different(self, names: Iterable[str]) -> dict[str, str]:
        """Why each of these modules is far from what it replaced, by itself or in its effect on the model."""
        self.put(())
        originals = {name: self.modules[name].original[0] for name in names}
        calls = trial.run(self.model, self.tried.batch, originals)[1]
        reasons = {}
        for name in names:
            local = max((self.own_error(name, call) for call in calls[name]), default=0.0)
            if not local <= self.bound:
                reasons[name] = f"its result differs from float by {local:.2g}, more than {self.bound:g}"
                continue
            alone = self.run_with([name])
            if isinstance(alone, str):
                reasons[name] = f"the model fails with it: {alone}"
            elif alone > self.bound:
                reasons[name] = f"the model's result differs from float by {alone:.2g}, more than {self.bound:g}"
        return reasons

    def own_error(self, name: str, call: Call) -> float:
        """Relative error of a replaced module on what it gets in float; of a block, of what it adds to the stream."""
        module = self.modules[name]
        try:
            with trial.undisturbed(module):
                got = dict(trial.floating_tensors(module(*call.args, **call.kwargs)))
        except trial.RUN_ERRORS:
            return torch.inf
        want = dict(trial.floating_tensors(call.output))
        stream = call.args[0] if call.args else None
        if isinstance(module, EncoderBlock) and isinstance(stream, Tensor):
            got = {key: y - stream for key, y in got.items()}
            want = {key: y - stream for key, y in want.items()}
        return relative_error(got, want)

    def run_with(self, names: Iterable[str]) -> float | str:
        """The relative error with these modules replaced and the others float, or what it raises, in words: the
        exception would keep float weights alive.
        """
        self.put(names)
        try:
            outputs, _ = trial.run(self.model, self.tried.batch, {})
        except trial.RUN_ERRORS as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return relative_error(outputs, self.tried.outputs)

    def put(self, names: Iterable[str]) -> None:
        names = set(names)
        for name, module in self.modules.items():
            self._hold(name)
            replaced = name in names
            if replaced and not self.keep_float:
                module.original[0].to("meta")  # as `release_float` will
            self._place(name, module if replaced else module.original[0])

    def hold_everything(self) -> None:
        """All replaced modules in place, with their float modules' weights beside them."""
        for name, module in self.modules.items():
            self._hold(name)
            self._place(name, module)

    def _hold(self, name: str) -> None:
        for part, parameters, buffers in self.tensors[name]:
            part._parameters.update(parameters)
            part._buffers.update(buffers)

    def _place(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        self.model.get_submodule(parent)._modules[child] = module


def relative_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """max over tensors of |got - want| / |want|; infinite for what is missing, has another shape, or is no number where
    `want` is one.
    """
    errors = [0.0]
    for name, expected in want.items():
        y = got.get(name)
        if y is None or y.shape != expected.shape:
            return torch.inf
        known = expected.isfinite()
        expected, y = expected[known].double(), y[known].double()
        if not y.isfinite().all():
            return torch.inf
        difference, size = (y - expected).norm().item(), expected.norm().item()
        if size or difference > SMALL * len(y) ** 0.5:
            errors.append(difference / size if size else torch.inf)
    return max(errors)


def _kinds(names: Iterable[str]) -> list[list[str]]:
    """Names that differ in their numbers alone: parts of one class that the same code calls."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return list(kinds.values())
