"""Gradients of the quantizers: LSQ by hand, and against differences of the function that they are the gradient of."""

import math

import pytest
import torch
from torch.nn import functional as F

from vqvit import numerics as nm
from vqvit import qat
from vqvit.plan import LayerPlan
from vqvit.qat import straight_through as st

pytestmark = pytest.mark.usefixtures("one_thread")


def test_lsq_by_hand():
    """α = 0.5: 0.6 / α = 1.2, code 1, slope 1 - 1.2; 100 / α = 200, code 127, outside: slope 127, none for x.
    63.6 / α = 127.2 is inside.
    """
    x = torch.tensor([0.6, -0.9, 100.0, -100.0, 63.6], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    values, codes = st.quantize(x, scale)
    assert codes.tolist() == [1, -2, 127, -127, 127]
    assert values.tolist() == [0.5, -1.0, 63.5, -63.5, 63.5]
    (values * torch.tensor([1.0, 10.0, 100.0, 1000.0, 1e4])).sum().backward()
    assert x.grad.tolist() == [1.0, 10.0, 0.0, 0.0, 1e4]
    want = (1 - 1.2) + 10 * (-2 + 1.8) + 100 * 127 - 1000 * 127 + 1e4 * (127 - 127.2)
    assert scale.grad.item() == pytest.approx(want, rel=1e-6)


def test_gradient_of_the_logarithm_is_scaled():
    """∂/∂log α = α ∂/∂α, times 1 / sqrt(n Q)."""
    log_alpha = st.log_scale(torch.tensor([0.5, 2.0])).requires_grad_()
    scale = st.learned_scale(log_alpha, 100)
    assert torch.equal(scale, torch.tensor([0.5, 2.0]))
    (scale * torch.tensor([3.0, 5.0])).sum().backward()
    want = torch.tensor([3.0 * 0.5, 5.0 * 2.0]) / math.sqrt(100 * nm.QMAX)
    assert torch.allclose(log_alpha.grad, want, rtol=1e-6)


def test_scales_have_a_floor():
    assert st.learned_scale(torch.tensor(-100.0), 1).item() == pytest.approx(nm.SCALE_MIN)


def test_code_products_are_exact_at_their_largest():
    a = torch.full((2, 5000), 127, dtype=torch.int8)
    a[1] = torch.randint(-127, 128, (5000,), dtype=torch.int8)
    b = torch.cat([a, -a])
    want = a.double() @ b.double().t()
    assert torch.equal(st.code_product(a, b).double(), want)
    assert want.max() == 127**2 * 5000 > 2**24


FORMS = {
    "per_token": ({}, "alpha"),
    "delta": ({"delta": -0.4}, "alpha"),
    "beta": ({"beta": -0.5}, "beta"),
    "static": ({"activation": "static"}, "alpha"),
    "per_tensor": ({"per_channel": False}, "alpha"),
    "per_tensor_beta": ({"per_channel": False, "beta": -0.5}, "beta"),
    "asymmetric": ({"tier": "int8_asym", "activation": "per_token_asym"}, "alpha"),
    "grouped": ({"activation": "per_token_group"}, "alpha"),
    "paper": ({"compensation": "paper", "mu": 0.8}, "alpha"),
}


def make_layer(form: str) -> qat.FakeQuantLinear:
    options, learn = FORMS[form]
    plan = LayerPlan("layer", "fc1", **options)
    layer = qat.FakeQuantLinear(plan, torch.randn(6, 150), torch.randn(6), torch.bfloat16, qat.QatOptions(learn))
    if layer.log_alpha is not None:
        with torch.no_grad():
            layer.log_alpha.sub_(0.5)  # clips the largest weights
    if layer.log_input_alpha is not None:
        layer.calibrate_input_(torch.tensor(0.012))
    return layer


class Surrogate:
    """The smooth function whose gradient the layer computes, in fp64: each x̂ is x + α c inside the range and ±Q α
    outside, with the rounding remainders c = q - x / α, the range masks and the statistics frozen at a point.
    """

    def __init__(self, layer: qat.FakeQuantLinear, x: torch.Tensor):
        with torch.no_grad():
            self.layer, self.a, self.b = layer, layer.quantize_input(x), layer.quantize_weight()
            second = layer._second_order(x, self.a, self.b) if layer.mu is not None else torch.zeros(())
        self.x, self.w, self.second = x.double(), layer.weight.detach().double(), second.double()
        symmetric = layer.activation in ("per_token", "static")
        self.fix_x = self.freeze(self.x, self.a.codes, self.a.scale) if symmetric else self.a.values - self.x
        plain = layer.base_plan.tier == "int8"
        self.fix_w = self.freeze(self.w, self.b.codes, self.b.scale) if plain else self.b.values - self.w

    @staticmethod
    def freeze(x, codes, scale):
        ratio = x / scale.double()[:, None]
        inside = ratio.abs() < nm.QMAX + 0.5
        return inside, torch.where(inside, codes - ratio, codes.double())

    def scale(self, name: str, start, deviation, shift: dict) -> torch.Tensor:
        if f"log_{name}" in shift:
            return start.double() * torch.exp(shift[f"log_{name}"])
        spread = {"alpha": "beta", "input_alpha": "delta"}[name]
        return start.double() + shift.get(spread, 0.0) * deviation / nm.QMAX

    def __call__(self, **shift) -> torch.Tensor:
        """The layer's result with parameters moved by `shift`."""
        x, w = self.x + shift.get("x", 0.0), self.w + shift.get("weight", 0.0)
        rows = self.w if self.layer.base_plan.per_channel else self.w.reshape(1, -1)
        deviation = rows.std(-1, correction=0).expand(len(self.w))
        sides = []
        for side, fix, start, name, sd in (
            (x, self.fix_x, self.a.scale, "input_alpha", self.x.std(-1, correction=0)),
            (w, self.fix_w, self.b.scale, "alpha", deviation),
        ):
            if isinstance(fix, tuple):
                alpha = self.scale(name, start, sd, shift)[:, None]
                sides.append(torch.where(fix[0], side, 0.0) + alpha * fix[1])
            else:
                sides.append(side + fix)
        y = sides[0] @ sides[1].t() + self.layer.bias.detach().double() + shift.get("bias", 0.0)
        mu = 0.0 if self.layer.mu is None else self.layer.mu.item()
        return y + (mu + shift.get("mu", 0.0)) * self.second


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_surrogate(form):
    layer, x = make_layer(form), torch.randn(4, 150)
    surrogate = Surrogate(layer, x)
    direction = torch.randn(4, 6)
    x.requires_grad_()
    y = layer(x)
    assert torch.allclose(y.double(), surrogate(), rtol=1e-4, atol=1e-4)
    (y * direction).sum().backward()
    step = 1e-6
    parameters = {"x": x, **dict(layer.named_parameters())}
    names = {"log_input_alpha": "log_input_alpha", "log_alpha": "log_alpha"}
    for name, parameter in parameters.items():
        flat = parameter.grad.flatten()
        factor = 1.0
        if name in names:
            elements = layer.weight.numel() // parameter.numel() if name == "log_alpha" else layer.in_features
            factor = math.sqrt(elements * nm.QMAX)
        for index in range(0, parameter.numel(), max(1, parameter.numel() // 12)):
            move = torch.zeros(parameter.numel(), dtype=torch.float64)
            move[index] = step
            move = move.view(parameter.shape)
            high, low = surrogate(**{name: move}), surrogate(**{name: -move})
            want = ((high - low) * direction).sum().item() / (2 * step)
            assert flat[index].item() * factor == pytest.approx(want, rel=2e-3, abs=2e-3), name


@pytest.mark.parametrize("form", [*FORMS, "activation", "weight", "full"])
def test_blend_is_continuous(form):
    """Close to 1 it gives what 1 gives from codes, residual terms included; the paper's term is of second order."""
    layer = make_layer(form) if form in FORMS else make_compensated(form)
    x = torch.randn(4, 150)
    with torch.no_grad():
        quantized = layer(x)
        layer.blend = 1 - 1e-6
        blended = layer(x)
        layer.blend = 0.0
        exact = layer(x)
    tolerance = 1e-3 if form == "paper" else 2e-5
    assert (blended - quantized).norm() < tolerance * quantized.norm()
    if form == "full":
        assert (quantized - exact).norm() < 1e-4 * exact.norm()


def make_compensated(mode: str) -> qat.FakeQuantLinear:
    plan = LayerPlan("layer", "fc1", compensation=mode)
    return qat.FakeQuantLinear(plan, torch.randn(6, 150), torch.randn(6), torch.bfloat16, qat.QatOptions())


def test_half_precision_gradients_are_straight_through():
    plan = LayerPlan("layer", "fc1", "fp16")
    layer = qat.FakeQuantLinear(plan, torch.randn(6, 20), torch.randn(6), torch.bfloat16, qat.QatOptions())
    x, direction = torch.randn(4, 20, requires_grad=True), torch.randn(4, 6)
    (layer(x) * direction).sum().backward()
    half = layer.weight.detach().bfloat16().float()
    assert torch.allclose(x.grad, direction @ half, rtol=1e-5, atol=1e-5)
    assert torch.allclose(layer.bias.grad, direction.sum(0))


@pytest.mark.parametrize("blend", [0.0, 0.25])
def test_blend_mixes_gradients(blend):
    layer, x, direction = make_layer("per_token"), torch.randn(4, 150), torch.randn(4, 6)
    layer.blend = blend
    (layer(x) * direction).sum().backward()
    seen, fake = torch.lerp(x, layer.quantize_input(x).values, blend).detach(), layer.quantize_weight()
    inside = (layer.weight / fake.scale[:, None]).abs() < nm.QMAX + 0.5
    assert not inside.all()
    want = (direction.t() @ seen) * torch.where(inside, 1.0, 1.0 - blend)
    assert torch.allclose(layer.weight.grad, want, rtol=1e-4, atol=1e-5)
    assert torch.allclose(F.linear(x, layer.weight, layer.bias), layer(x)) == (blend == 0.0)
