"""The trainable copy of a model that a run works on: blends, tiers, snapshots, and the integer model it stands for."""

import copy
import dataclasses

import torch
from torch import nn

from vqvit import qat, shortcut
from vqvit.plan import Plan
from vqvit.progressive.samples import Samples
from vqvit.progressive.workdir import Snapshot
from vqvit.rewriter import release_float


class Student:
    """A float model's copy with the planned layers made trainable (`vqvit.qat`), all of them float at first."""

    def __init__(self, model: nn.Module, plan: Plan, samples: Samples | None, batch_size: int):
        """Scales start from `samples`, or await a snapshot. Raises what `vqvit.qat.prepare_` raises."""
        self.model = copy.deepcopy(model).eval()
        calibration = None
        if samples is not None:
            calibration = [batch.args[0] if batch.args else batch.kwargs for batch in samples.batches(batch_size)]
        qat.prepare_(self.model, plan, calibration)
        self.blend({name: 0.0 for name in self.layers})

    @property
    def plan(self) -> Plan:
        return qat.plan_of(self.model)

    @property
    def layers(self) -> dict[str, qat.FakeQuantLinear]:
        return qat.fake_layers(self.model)

    @property
    def has_scales(self) -> bool:
        """Whether there is a scale for R_quant: not where everything is in half precision or asymmetric."""
        learned = ("log_alpha", "beta", "log_input_alpha")
        static = any(attention.is_static for attention in qat.fake_attentions(self.model).values())
        return static or any(getattr(layer, name) is not None for layer in self.layers.values() for name in learned)

    def scale_parameters(self, layers: tuple[str, ...]) -> list[nn.Parameter]:
        """What the quantizers of some layers learn; attention's learn with the QKV layer of their block."""
        found, attentions = [], qat.fake_attentions(self.model)
        for name, layer in self.layers.items():
            block, _, role = name.rpartition(".")
            if name in layers:
                found += layer.scale_parameters()
                found += attentions[block].scale_parameters() if role == "qkv" and block in attentions else []
        return found

    def blend(self, blends: dict[str, float]) -> None:
        """λ of each layer: 0 is float, 1 quantized. Attention's quantizers follow the QKV layer."""
        layers = self.layers
        for name, blend in blends.items():
            layers[name].blend = blend

    def retier(self, layer: str, tier: str) -> None:
        qat.retier_(self.model, layer, tier)

    def snapshot(self) -> Snapshot:
        """Copies of all tensors, on the CPU."""
        return Snapshot(self.plan, {name: t.detach().cpu().clone() for name, t in self.model.state_dict().items()})

    def load(self, snapshot: Snapshot) -> None:
        """Become the model of a snapshot, tiers and all that a promotion drops included."""
        qat.load_snapshot_(self.model, snapshot.plan, snapshot.tensors)

    def frozen_copy(self) -> nn.Module:
        """The integer model with exactly these codes."""
        frozen = copy.deepcopy(self.model)
        qat.freeze_(frozen)
        return frozen


def become_integer(model: nn.Module, snapshot: Snapshot, samples: Samples, cls_only: str) -> tuple[Plan, str]:
    """Replace the layers of the float `model`, in place, by integer ones with a snapshot's codes.

    Returns the plan, with the CLS shortcut where `cls_only` allows it and it is proved, and a line about that. After an
    error the model is as it was.
    """
    plan, line = shortcut.plan_shortcut(model, snapshot.plan, cls_only, samples.take(torch.arange(1)))
    qat.prepare_(model, plan)
    try:
        model.load_state_dict(snapshot.tensors)
        qat.freeze_(model)
    except (ValueError, RuntimeError):
        qat.unprepare_(model)
        raise
    release_float(model)
    return plan, line


def without_shortcut(plan: Plan) -> Plan:
    """The plan without leading tokens: training computes every token, and a promotion may forbid them."""
    return dataclasses.replace(plan, blocks=tuple(dataclasses.replace(b, leading_tokens=None) for b in plan.blocks))
