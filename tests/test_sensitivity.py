"""Sensitivity scores against dense formulas and autograd, and measured damage."""

import json

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import vqvit
from vqvit import numerics as nm
from vqvit.evaluate import pick_output
from vqvit.nn import QuantLinear
from vqvit.plan import TIERS, LayerPlan, Plan, PlanError, QuantConfig
from vqvit.rewriter import make_plan
from vqvit.sensitivity import LayerScore, MatrixScore, Sensitivity, concentration, measure, spearman
from vqvit.sensitivity.targets import find_targets, in_tier, replaced

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"image_size": 16, "patch_size": 8}
FLOAT_PATHS = {"qkv.q": "attention.q_proj", "qkv.k": "attention.k_proj", "qkv.v": "attention.v_proj"}
FLOAT_PATHS |= {"attn_out": "attention.o_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def perturbed(model: nn.Module) -> nn.Module:
    """Norms, biases and layer scales that are not the constants of initialisation."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "token" not in name:
                parameter.mul_(3).add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    return perturbed(transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, num_labels=5)))


def dinov2() -> nn.Module:
    torch.manual_seed(0)
    return perturbed(transformers.Dinov2Model(transformers.Dinov2Config(**{**SIZES, "mlp_ratio": 2})))


class FusedAttention(nn.Module):
    """One qkv projection, as timm's."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attn, self.mlp = FusedAttention(), Mlp()

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Plain(nn.Module):
    """A ViT that is not of transformers."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(32, 5)

    def forward(self, pixels):
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Plain().eval()


def labelled(count: int = 8, batch: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 5, (count,), generator=generator)
    return list(zip(images.split(batch), labels.split(batch), strict=True))


def unlabelled(count: int = 8, batch: int = 4) -> list[torch.Tensor]:
    return [images for images, _ in labelled(count, batch)]


@pytest.fixture(scope="module")
def scored() -> Sensitivity:
    return measure(vit(), labelled(), damage_tiers=TIERS)


def float_weight(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter behind the matrix `name` of a transformers ViT."""
    if ".layers." in f".{name}":
        block, _, role = name.partition(".qkv.")
        path = f"{block}.{FLOAT_PATHS[f'qkv.{role}']}" if role else None
        block, _, last = name.rpartition(".")
        return model.get_parameter(f"{path or f'{block}.{FLOAT_PATHS[last]}'}.weight")
    return model.get_parameter(f"{name}.weight")


def test_names_are_those_of_the_plan(scored):
    plan = make_plan(vit(), QuantConfig())[0]
    assert [layer.name for layer in scored.layers] == [layer.name for layer in plan.layers]
    first = [matrix.name.removeprefix("vit.layers.0.") for matrix in scored.matrices[:6]]
    assert first == ["qkv.q", "qkv.k", "qkv.v", "attn_out", "fc1", "fc2"]
    assert scored.matrices[0].shape == (32, 32) and scored.matrices[0].layer == "vit.layers.0.qkv"
    assert next(m for m in scored.matrices if "patch" in m.name).shape == (32, 3 * 8 * 8)


def test_score_is_the_dense_formula(scored):
    model = vit()
    norms: dict[str, list[float]] = {matrix.name: [] for matrix in scored.matrices}
    for images, labels in labelled():
        loss = F.cross_entropy(model(images).logits, labels)
        weights = [float_weight(model, name) for name in norms]
        for name, gradient in zip(norms, torch.autograd.grad(loss, weights), strict=True):
            norms[name].append(gradient.norm().item())
    for matrix in scored.matrices:
        weight = float_weight(model, matrix.name).detach().flatten(1).double()
        share = torch.linalg.svdvals(weight)[0] / weight.norm()
        assert matrix.concentration == pytest.approx(share.item(), rel=1e-9)
        assert matrix.gradient == pytest.approx(sum(norms[matrix.name]) / 2, rel=1e-4)
        assert matrix.score == matrix.concentration * matrix.gradient


def test_fisher_is_that_of_per_sample_autograd():
    model = vit()
    plan = make_plan(model, QuantConfig(equalize=False))[0]
    found = measure(model, labelled(), plan, damage_tiers=())
    squares = {matrix.name: 0.0 for matrix in found.matrices}
    for images, labels in labelled(batch=1):
        weights = [float_weight(model, name) for name in squares]
        gradients = torch.autograd.grad(F.cross_entropy(model(images).logits, labels), weights)
        for name, gradient in zip(squares, gradients, strict=True):
            squares[name] = squares[name] + gradient.flatten(1).double().square()
    for matrix in found.matrices:
        weight = float_weight(model, matrix.name).detach().flatten(1)
        scale = nm.weight_scale(weight)
        error = weight - nm.dequantize(nm.quantize_weight(weight, scale), scale)
        want = (squares[matrix.name] / 8 * error.double().square()).sum().item()
        assert matrix.fisher == pytest.approx(want, rel=1e-3)


def test_fisher_sees_the_equalised_weight(scored):
    """The integer layer rounds W · c, and its error in W is that over c."""
    plain_plan = make_plan(vit(), QuantConfig(equalize=False))[0]
    without = measure(vit(), labelled(), plain_plan, damage_tiers=())
    differing = {a.name for a, b in zip(scored.matrices, without.matrices, strict=True) if a.fisher != b.fisher}
    assert differing == {m.name for m in scored.matrices if ".qkv." in m.name or m.name.endswith(".fc1")}


def test_a_layer_has_the_largest_score_and_the_summed_fisher_of_its_parts(scored):
    parts = [m for m in scored.matrices if m.layer == "vit.layers.1.qkv"]
    layer = scored.layer("vit.layers.1.qkv")
    assert len(parts) == 3 and layer.score == max(m.score for m in parts)
    assert layer.fisher["int8"] == pytest.approx(sum(m.fisher for m in parts), rel=1e-9)
    assert layer.damage["fp16"] < layer.damage["int8"] and layer.fisher["fp16"] < layer.fisher["int8"]
    with pytest.raises(PlanError, match=r"expected a layer among vit\.layers\.0\.qkv, .*; got 'qkv'"):
        scored.layer("qkv")


def test_a_fused_projection_is_three_matrices():
    """Rows of one projection score as three projections do."""
    found = {m.name: m for m in measure(plain(), labelled()).matrices}
    split = plain()
    for block in split.blocks:
        for part, rows in zip("qkv", block.attn.qkv.weight.chunk(3), strict=True):
            share = torch.linalg.svdvals(rows.detach().double())[0] / rows.detach().double().norm()
            index = 0 if block is split.blocks[0] else 1
            assert found[f"blocks.{index}.qkv.{part}"].concentration == pytest.approx(share.item(), rel=1e-9)
    loss = F.cross_entropy(split(labelled()[0][0]), labelled()[0][1])
    gradient = torch.autograd.grad(loss, split.blocks[0].attn.qkv.weight)[0].chunk(3)
    one = {m.name: m for m in measure(split, labelled()[:1], damage_tiers=()).matrices}
    for part, rows in zip("qkv", gradient, strict=True):
        assert one[f"blocks.0.qkv.{part}"].gradient == pytest.approx(rows.norm().item(), rel=1e-4)
    assert len({found[f"blocks.0.qkv.{part}"].damage for part in "qkv"}) == 3


def test_damage_is_that_of_the_integer_layer_alone(scored):
    """A layer outside the blocks can also be quantized alone by its plan: the same codes, the same KL."""
    for name, role in (("classifier", "head"), ("vit.embeddings.patch_embeddings.projection", "patch_embed")):
        model, float_model = vit(), vit()
        vqvit.quantize_(model, Plan((), (LayerPlan(name, role),)))
        want = vqvit.evaluate(model, labelled(), float_model).kl
        assert scored.layer(name).damage["int8"] == pytest.approx(want, rel=1e-9)


def test_the_codes_are_those_of_the_replaced_block():
    """An isolated qkv layer holds what the whole block's holds, equalisation included."""
    model = vit()
    plan = make_plan(model, QuantConfig(tiers={"fc1": "int8_asym"}))[0]
    isolated = {t.plan.name: in_tier(t, t.plan.tier, torch.bfloat16) for t in find_targets(model, plan)}
    vqvit.quantize_(model, plan)
    for name, module in isolated.items():
        assert isinstance(module, QuantLinear)
        wanted = model.get_submodule(name).float_weight()
        assert torch.allclose(module.float_weight(), wanted, rtol=1e-5, atol=1e-6), name


def test_all_layers_replaced_at_once_are_close_to_the_quantized_model():
    """What the hooks compute together is the integer model with float attention."""
    from contextlib import ExitStack

    model, images = vit(), unlabelled()[0]
    plan = make_plan(model, QuantConfig(attention="float"))[0]
    with ExitStack() as stack, torch.inference_mode():
        for target in find_targets(model, plan):
            module = in_tier(target, "int8", torch.bfloat16)
            stack.enter_context(replaced(target, target.parts, module, target.folded("int8")))
        together = model(images).logits
    reference = model(images).logits.detach()
    quantized = vit()
    vqvit.quantize_(quantized, plan)
    with torch.inference_mode():
        want = quantized(images).logits
    assert (together - want).norm() < 0.2 * (want - reference).norm()


def test_a_layer_that_int8_destroys_is_ranked_first():
    """One huge weight in each row: all other weights of the layer round to zero."""
    model = vit()
    victim = model.vit.layers[1].mlp.fc2
    with torch.no_grad():
        victim.weight[:, 0] = 400 * victim.weight.abs().max()
        model.vit.layers[1].mlp.fc1.weight[0], model.vit.layers[1].mlp.fc1.bias[0] = 0, 0  # so that nothing reads it
    found = measure(model, labelled())
    for order in ("damage", "fisher"):
        ranked = sorted(found.matrices, key=lambda m: getattr(m, order), reverse=True)
        assert ranked[0].name == "vit.layers.1.fc2"
        assert getattr(ranked[0], order) > 20 * getattr(ranked[1], order)


@pytest.mark.parametrize("make", [vit, dinov2, plain])
def test_the_model_is_left_as_it_was(make):
    model = make().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure(model, unlabelled())
    assert model.training and all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_frozen_models_are_scored_alike():
    frozen = vit().requires_grad_(False)
    assert measure(frozen, labelled()) == measure(vit(), labelled())


OBJECTIVES = {
    "labels": (vit, labelled, "labels", "kl"),
    "no labels": (vit, unlabelled, "sampled", "kl"),
    "features": (dinov2, labelled, "features", "feature_error"),
}


@pytest.mark.parametrize("case", OBJECTIVES)
def test_objectives_and_determinism(case):
    make, data, objective, metric = OBJECTIVES[case]
    found = measure(make(), data(), seed=3)
    assert (found.objective, found.metric, found.images) == (objective, metric, 8)
    assert found == measure(make(), data(), seed=3)
    assert all(m.score > 0 and m.fisher > 0 and m.damage > 0 for m in found.matrices)
    if objective != "labels":
        assert found != measure(make(), data(), seed=4)


@pytest.mark.parametrize("make", [vit, dinov2])
def test_fisher_predicts_the_damage_of_rounding_a_weight(make):
    """curvature · S_F is the second order of KL or feature error, with activations left in float."""
    model, images = make(), torch.randn(64, 3, 16, 16)
    found = measure(model, [images] * 8, damage_tiers=())
    target = next(t for t in find_targets(model, make_plan(model, QuantConfig())[0]) if t.plan.role == "fc1")
    weight = target.parts[0].module.weight
    error = in_tier(target, "int8", torch.bfloat16).float_weight() / target.equalizer - weight.detach()

    def output() -> torch.Tensor:
        return pick_output(model(images))[0].double()

    with torch.no_grad():
        want = output()
        weight += 30 * error  # large enough for fp32 to resolve the damage
        got = output()
    if make is vit:
        log_p, log_q = want.log_softmax(-1), got.log_softmax(-1)
        measured = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    else:
        measured = (got - want).square().sum() / want.square().sum()
    predicted = 30**2 * found.curvature * found.layer(target.plan.name).fisher["int8"]
    assert 0.4 < predicted / measured.item() < 2.5


def test_json_round_trip(scored, tmp_path):
    assert Sensitivity.from_json(scored.to_json()) == scored
    scored.save(tmp_path / "scores.json")
    assert Sensitivity.load(tmp_path / "scores.json") == scored


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: "{", "expected JSON"),
        (lambda raw: json.dumps({**raw, "format": 9}), "expected format 1"),
        (lambda raw: "[]", "expected the document of vqvit sensitivity"),
        (lambda raw: json.dumps({**raw, "layers": [{"name": "x"}]}), "expected the document of vqvit sensitivity"),
        (
            lambda raw: json.dumps({**raw, "layers": [{**raw["layers"][0], "damage": {"int2": 1.0}}]}),
            r"sensitivity of .*qkv: expected tiers int8, int8_asym, fp16; got \['int2'\]",
        ),
    ],
)
def test_other_documents_are_refused(scored, change, message):
    with pytest.raises(PlanError, match=message):
        Sensitivity.from_json(change(json.loads(scored.to_json())))


def test_bytes_are_those_of_a_checkpoint(scored, tmp_path):
    sizes = {}
    for tier in TIERS:
        model = vit()
        vqvit.quantize_(model, QuantConfig(tier, cls_only="off"))
        state = model.state_dict()
        planned = [layer.name for layer in scored.layers]
        sizes[tier] = sum(t.nbytes for n, t in state.items() if n.rpartition(".")[0] in planned)
        assert sum(layer.bytes[tier] for layer in scored.layers) == sizes[tier]
    assert sizes["int8"] < sizes["int8_asym"] < sizes["fp16"]


def test_spearman():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2], [5, 6, 7]) == pytest.approx(0.8660254)  # ranks 0.5, 0.5, 2 against 0, 1, 2
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_correlations(scored):
    series = [[getattr(m, key) for m in scored.matrices] for key in ("score", "fisher", "damage")]
    assert scored.correlations["fisher_damage"] == spearman(series[1], series[2])
    assert scored.correlations["score_fisher"] == spearman(series[0], series[1])
    matrix = MatrixScore("a", "a", (1, 1), 1.0, 1.0, 1.0, None)
    unmeasured = Sensitivity("labels", "kl", 1, 0.5, (matrix,), (LayerScore("a", "head", 1.0, {}, {}, {}),))
    assert set(unmeasured.correlations.values()) == {None}


def test_concentration_is_one_over_the_root_of_the_stable_rank():
    assert concentration(torch.outer(torch.randn(7), torch.randn(5))) == pytest.approx(1.0)
    assert concentration(torch.eye(9)) == pytest.approx(1 / 3)
    assert concentration(torch.zeros(3, 4)) == 0.0


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.fc(x))


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


BAD = {
    "empty": (vit, [], {}, "sensitivity: expected at least one batch; got none"),
    "nan": (vit, [torch.full((1, 3, 16, 16), torch.nan)], {}, "expected finite images"),
    "integers": (vit, [torch.zeros(1, 3, 16, 16, dtype=torch.int64)], {}, "expected floating-point images"),
    "size": (vit, [torch.randn(1, 3, 24, 24)], {}, "Input image size"),
    "labels": (vit, [(torch.randn(1, 3, 16, 16), torch.tensor([5]))], {}, "expected classes 0 to 4"),
    "objective": (vit, unlabelled(), {"objective": "labels"}, "expected one of sampled for this model.*; got 'labels'"),
    "unknown": (vit, unlabelled(), {"objective": "loss"}, "objective: expected one of labels, sampled, features"),
    "tier": (vit, unlabelled(), {"damage_tiers": ("int2",)}, "damage_tiers: expected tiers among .*; got int2"),
    "layer": (vit, unlabelled(), {"plan": Plan((), (LayerPlan("x", "head"),))}, "a layer of this float model; got 'x'"),
    "twice": (Twice, [torch.randn(2, 4)], {}, "expected fc to run once for an image; it ran again"),
    "idle": (Idle, [torch.randn(2, 4)], {}, "expected every layer to run on the data; idle did not"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, batches, options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        measure(make(), batches, **options)


def test_quantized_models_are_refused():
    model = vit()
    vqvit.quantize_(model)
    with pytest.raises(PlanError, match="expected a float model"):
        measure(model, unlabelled())
