"""Linears and norms that are not what their class says stay float by name; users' hooks fire for users' calls alone."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import vqvit
from vqvit.nn import EncoderBlock

CONFIG = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}
FC1, HEAD, NORM = "vit.layers.0.mlp.fc1", "classifier", "vit.layers.0.layernorm_before"


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def call(model: nn.Module, *args, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(*args, **kwargs).logits


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


class LowRank(nn.Module):
    """An adapter as PEFT builds one: the layer that it wraps, and two low-rank layers beside it."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, base_layer.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def reparametrized(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Doubled())


def pruned(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", 0.5)


def patched(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


ALTERATIONS = {
    "forward_hook": (lambda m: m.register_forward_hook(lambda *a: 2 * a[-1]), "a forward hook sees or changes"),
    "pre_hook": (lambda m: m.register_forward_pre_hook(lambda *a: (2 * a[-1][0],)), "a forward hook sees or changes"),
    "weight_norm": (nn.utils.weight_norm, "WeightNorm of torch.nn.utils computes its weight"),
    "spectral_norm": (nn.utils.spectral_norm, "SpectralNorm of torch.nn.utils computes its weight"),
    "pruning": (pruned, "RandomUnstructured of torch.nn.utils computes its weight"),
    "parametrization": (reparametrized, "a parametrization computes its weight"),
    "new_weight_norm": (parametrizations.weight_norm, "a parametrization computes its weight"),
    "patched_forward": (patched, "its forward was replaced on the instance"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("place", [FC1, HEAD])
@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_altered_linear_stays_float_by_name(name, place):
    alter, why = ALTERATIONS[name]
    model, images = vit(), torch.randn(4, 3, 32, 32)
    alter(model.get_submodule(place))
    want = call(model, images)
    report = vqvit.quantize_(model)
    reasons = {r.name: r.reason for r in report.layers if r.status == "skipped"}
    assert why in reasons.pop(place)
    if place == FC1:
        assert "kept its structure: " in (reason := reasons.pop("vit.layers.0")) and "mlp.fc1" in reason
    assert reasons == {} and len(report.plan.blocks) == (1 if place == FC1 else 2)
    assert relative_error(call(model, images), want) < 0.1
    restored = {key: tensor for key, tensor in model.state_dict().items() if key.startswith(place)}
    assert restored and not any(tensor.is_meta for tensor in restored.values())


@pytest.mark.parametrize("place", ["vit.layers.0.attention.q_proj", HEAD])
def test_an_adapter_and_what_it_wraps_stay_float_by_name(place):
    model, images = vit(), torch.randn(4, 3, 32, 32)
    parent, _, child = place.rpartition(".")
    setattr(model.get_submodule(parent), child, LowRank(model.get_submodule(place)))
    want = call(model, images)
    report = vqvit.quantize_(model)
    reasons = {r.name: r.reason for r in report.layers if r.status == "skipped"}
    for part in ("base_layer", "lora_A.default", "lora_B.default"):
        assert reasons[f"{place}.{part}"] == f"{place} wraps it in an adapter: merge that first"
    assert relative_error(call(model, images), want) < 0.1
    assert report.plan.blocks[-1].name == "vit.layers.1"


@pytest.mark.parametrize("place", ["vit.layers.0", "vit.layers.0.attention", NORM, "vit.layers.0.mlp.activation_fn"])
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_a_block_with_a_users_hook_keeps_its_structure_and_the_hook_fires_for_users_calls_alone(place, kind):
    model, images, seen = vit(), torch.randn(4, 3, 32, 32), []
    register = getattr(model.get_submodule(place), f"register_{kind}")
    handle = register(lambda module, *rest: seen.append(rest[0]) or None)
    want = call(model, images)
    assert len(seen) == 1
    report = vqvit.quantize_(model, calibration=None)
    assert len(seen) == 1
    reason = {r.name: r.reason for r in report.layers}["vit.layers.0"]
    assert reason.startswith("kept its structure: ") and "a forward hook sees or changes what it computes" in reason
    assert relative_error(call(model, images), want) < 0.1 and len(seen) == 2
    assert [isinstance(block, EncoderBlock) for block in model.vit.layers] == [False, True]
    handle.remove()
    call(model, images)
    assert len(seen) == 2


def test_a_norm_whose_hook_changes_its_result():
    model, images = vit(), torch.randn(4, 3, 32, 32)
    model.get_submodule(NORM).register_forward_hook(lambda module, args, output: 3 * output.flip(-1))
    want = call(model, images)
    vqvit.quantize_(model)
    assert relative_error(call(model, images), want) < 0.1


def test_a_hook_on_every_module_does_not_fire():
    model, seen = vit(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *rest: seen.append(module))
    try:
        vqvit.quantize_(model)
        assert seen == []
        call(model, torch.randn(1, 3, 32, 32))
        assert seen
    finally:
        handle.remove()


def test_a_block_that_merges_tokens_keeps_its_structure():
    model, images = vit(), torch.randn(4, 3, 32, 32)
    kind = type(model.vit.layers[0])

    class Merging(kind):
        def forward(self, hidden_states, *args, **kwargs):
            y = super().forward(hidden_states, *args, **kwargs)
            count = y.shape[1] // 2
            return (y[:, :count] + y[:, -count:]) / 2 if y.shape[1] > 8 else y

    model.vit.layers[0].__class__ = Merging
    want = call(model, images)
    report = vqvit.quantize_(model)
    assert (
        "it turns hidden states (1, 17, 64) into (1, 8, 64)"
        in {r.name: r.reason for r in report.layers}["vit.layers.0"]
    )
    assert relative_error(call(model, images), want) < 0.1


def test_a_plan_for_an_altered_part_is_refused():
    plan = vqvit.quantize_(vit(), vqvit.QuantConfig(cls_only="off")).plan  # its proof would refuse hooks first
    model = vit()
    model.get_submodule(HEAD).register_forward_hook(lambda *_: None)
    with pytest.raises(vqvit.PlanError, match="plan: expected a plain layer classifier; a forward hook sees"):
        vqvit.quantize_(model, plan)
    model = vit()
    nn.utils.spectral_norm(model.get_submodule(FC1))
    with pytest.raises(vqvit.PlanError, match=r"plan: expected a plain block vit\.layers\.0; mlp\.fc1: SpectralNorm"):
        vqvit.quantize_(model, plan)
