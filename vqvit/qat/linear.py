"""Linear layers that train on the codes which `vqvit.nn.QuantLinear` will compute with."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvit import numerics as nm
from vqvit.nn.linear import UncalibratedError
from vqvit.nn.patch_embed import cut_patches
from vqvit.plan import LayerPlan, PlanError
from vqvit.qat import straight_through as st
from vqvit.qat.options import QatOptions
from vqvit.reference import COMPENSATION_TERMS, quantize_residual


class Fake(NamedTuple):
    """A matrix and its codes: values ≈ scale (codes - zero_point), with gradients to what the values depend on."""

    values: Tensor  # (R, K) fp32
    codes: Tensor  # (R, K) int8, or values in half precision
    scale: Tensor | None = None  # (R,) fp32, or (R, ⌈K / 128⌉) per group; None in half precision
    zero_point: Tensor | None = None  # (R,) int32


class FakeQuantLinear(nn.Module):
    """y = x Wᵀ + b on x + λ (x̂ - x) and W + λ (Ŵ - W), λ = `blend` (numerics §10).

    With λ = 1 the product is that of the codes, exact, before the scales and the bias, and the `fp16` tier rounds
    operands and result to half precision; with λ = 0 the layer is float.
    Parameters: weight fp32 (N, K); bias (N,) or None; log_alpha (N,), or (1,) per tensor, the logarithm of the
    symmetric weight scale, or beta (), the spread term that gives it; delta () for per-token inputs; log_input_alpha
    () for static ones; mu () where the compensation has its term. What a tier does not use is None.
    """

    def __init__(self, plan: LayerPlan, weight: Tensor, bias: Tensor | None, half: torch.dtype, options: QatOptions):
        """Raises `PlanError` for a plan that has no training form."""
        nn.Module.__init__(self)
        self.half_dtype, self.options = half, options
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        self.blend = 1.0
        self.calibrated = False
        self.observer = None  # while calibration runs
        self.adopt_(plan)

    def adopt_(self, plan: LayerPlan) -> None:
        """Follow another plan with the current weight: the learned scalars start from the plan's, the weight scale from
        its β.
        """
        if plan.bits != 8:
            raise PlanError(f"{plan.name}: expected 8 bits for training; got {plan.bits}")
        self.base_plan = plan
        quantized, symmetric = plan.tier != "fp16", plan.tier == "int8"
        like = {"dtype": torch.float32, "device": self.weight.device}
        by_beta = self.options.learn == "beta"
        self.beta = nn.Parameter(torch.tensor(plan.beta, **like)) if symmetric and by_beta else None
        self.log_alpha = None
        if symmetric and not by_beta:
            scale = nm.weight_scale(self.weight.detach(), plan.beta, plan.per_channel)
            self.log_alpha = nn.Parameter(st.log_scale(scale if plan.per_channel else scale[:1]))
        spread = plan.delta != 0.0 or plan.role in self.options.delta_roles
        per_token = quantized and self.activation == "per_token" and plan.role != "patch_embed"  # whose op has no δ
        self.delta = nn.Parameter(torch.tensor(plan.delta, **like)) if per_token and spread else None
        static = quantized and self.activation == "static"
        kept = static and getattr(self, "log_input_alpha", None) is not None
        if not kept:
            self.log_input_alpha = nn.Parameter(torch.zeros((), **like)) if static else None
            self.calibrated = not static
        second_order = quantized and COMPENSATION_TERMS[plan.compensation][2]
        self.mu = nn.Parameter(torch.tensor(plan.mu, **like)) if second_order else None

    @property
    def activation(self) -> str:
        return self.base_plan.activation

    @property
    def plan(self) -> LayerPlan:
        """The layer's plan with what was learned of beta, delta and mu."""
        learned = {name: getattr(self, name) for name in ("beta", "delta", "mu")}
        return dataclasses.replace(
            self.base_plan, **{name: value.item() for name, value in learned.items() if value is not None}
        )

    def scale_parameters(self) -> list[nn.Parameter]:
        """What the quantizers learn, without the weights."""
        names = ("log_alpha", "beta", "delta", "log_input_alpha", "mu")
        return [parameter for name in names if (parameter := getattr(self, name)) is not None]

    def weight_parameters(self) -> list[nn.Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def weight_scale(self) -> Tensor:
        """fp32 (N,) of the symmetric weight, with gradients to `log_alpha` or `beta`."""
        if self.beta is not None:
            return st.spread_scale(self.weight, self.beta, self.base_plan.per_channel)
        return st.learned_scale(self.log_alpha, self.weight.numel() // self.log_alpha.numel()).expand(self.out_features)

    def input_scale(self) -> Tensor | None:
        """fp32 scalar of a static input, with gradients; None for dynamic ones. Raises `UncalibratedError`."""
        if self.log_input_alpha is None:
            return None
        if not self.calibrated:
            raise UncalibratedError(
                f"{self.base_plan.name}: expected a calibrated static activation scale; got none. Pass calibration=... "
                "to prepare_, or load a state dict."
            )
        return st.learned_scale(self.log_input_alpha, self.in_features)

    def calibrate_input_(self, scale: Tensor) -> None:
        """Start the static input scale (scalar) from calibration."""
        with torch.no_grad():
            self.log_input_alpha.copy_(st.log_scale(scale))
        self.calibrated = True

    def quantize_weight(self) -> Fake:
        """The weight as the integer layer stores it."""
        if self.base_plan.tier == "fp16":
            return self._in_half(self.weight)
        if self.base_plan.tier == "int8_asym":
            codes, scale, zero_point = nm.quantize_weight_asymmetric(self.weight.detach())
            return Fake(
                st.straight_through(self.weight, nm.dequantize(codes, scale, zero_point)), codes, scale, zero_point
            )
        scale = self.weight_scale()
        return Fake(*st.quantize(self.weight, scale.unsqueeze(-1)), scale)

    def quantize_input(self, x: Tensor) -> Fake:
        """An input (M, K) as the integer layer sees it."""
        if self.base_plan.tier == "fp16":
            return self._in_half(x)
        plain = x.detach()
        if self.activation == "per_token_asym":
            scale, zero_point = nm.row_scale_asymmetric(plain)
            codes = nm.to_codes_asymmetric(plain, scale[:, None], zero_point[:, None])
            return Fake(st.straight_through(x, nm.dequantize(codes, scale, zero_point)), codes, scale, zero_point)
        if self.activation == "per_token_group":
            scale = nm.row_scale(nm.groups(plain))
            columns = scale.repeat_interleave(nm.GROUP, -1)[:, : self.in_features]
            codes = nm.to_codes(plain, columns)
            return Fake(st.straight_through(x, codes * columns), codes, scale)
        if self.activation == "static":
            scale = self.input_scale()
            values, codes = st.quantize(x, scale)
            return Fake(values, codes, scale.expand(x.shape[0]))
        scale = st.token_scale(x, self.delta)
        return Fake(*st.quantize(x, scale.unsqueeze(-1)), scale)

    def forward(self, x: Tensor) -> Tensor:
        """Float (..., K) to fp32 (..., N)."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{self.base_plan.name}: expected input (..., {self.in_features}); got {tuple(x.shape)}")
        rows = x.reshape(-1, self.in_features).float()
        if self.observer is not None:
            self.observer.update(rows)
        if self.blend == 0.0:
            return F.linear(rows, self.weight, self.bias).view(*x.shape[:-1], self.out_features)
        fake_x, fake_w = self.quantize_input(rows), self.quantize_weight()
        if self.blend == 1.0:
            y = self._quantized_product(rows, fake_x, fake_w)
        else:
            activation_term, weight_term, _ = COMPENSATION_TERMS[self.base_plan.compensation]
            x_hat, w_hat = _values(rows, fake_x, activation_term), _values(self.weight, fake_w, weight_term)
            y = F.linear(torch.lerp(rows, x_hat, self.blend), torch.lerp(self.weight, w_hat, self.blend))
        if self.bias is not None:
            y = y + self.bias
        if self.base_plan.tier == "fp16" and self.blend == 1.0:
            y = st.straight_through(y, y.detach().to(self.half_dtype).float())
        return y.view(*x.shape[:-1], self.out_features)

    def _in_half(self, x: Tensor) -> Fake:
        half = x.detach().to(self.half_dtype)
        return Fake(st.straight_through(x, half.float()), half)

    def _quantized_product(self, x: Tensor, a: Fake, b: Fake) -> Tensor:
        if b.scale is None:
            return a.values @ b.values.t()
        with torch.no_grad():
            value = self._accumulated(x, a, b)
        y = st.product(a.values, b.values, value)
        if self.mu is not None:
            y = y + self.mu * self._second_order(x, a, b)
        return y

    @torch.no_grad()
    def _accumulated(self, x: Tensor, a: Fake, b: Fake) -> Tensor:
        """α_a α_bᵀ ∘ acc, with the first-order terms of the compensation; no gradients."""
        if a.scale.dim() == 2:
            parts = zip(a.codes.split(nm.GROUP, -1), b.codes.split(nm.GROUP, -1), a.scale.unbind(-1), strict=True)
            return sum(st.code_product(p, q).float() * s[:, None] for p, q, s in parts) * b.scale
        acc = st.code_product(a.codes, b.codes)
        if a.zero_point is not None:
            acc = acc - a.zero_point[:, None] * b.codes.sum(-1, dtype=torch.int32)
        if b.zero_point is not None:
            acc = acc - a.codes.sum(-1, dtype=torch.int32)[:, None] * b.zero_point
        if a.zero_point is not None and b.zero_point is not None:
            acc = acc + self.in_features * a.zero_point[:, None] * b.zero_point
        acc = acc.float()
        activation_term, weight_term, _ = COMPENSATION_TERMS[self.base_plan.compensation]
        if activation_term:
            acc = acc + st.code_product(quantize_residual(x, a.codes, a.scale), b.codes) / nm.RESIDUAL_STEPS
        if weight_term:
            acc = acc + st.code_product(a.codes, self.weight_residual(b)) / nm.RESIDUAL_STEPS
        return acc * (a.scale[:, None] * b.scale)

    @torch.no_grad()
    def _second_order(self, x: Tensor, a: Fake, b: Fake) -> Tensor:
        """R_A R_Bᵀ / 254² in the units of the result."""
        acc = st.code_product(quantize_residual(x, a.codes, a.scale), self.weight_residual(b))
        return acc.float() / nm.RESIDUAL_STEPS**2 * (a.scale[:, None] * b.scale)

    def weight_residual(self, weight: Fake) -> Tensor:
        """int8 (N, K): what the symmetric codes of the weight leave over, in units of α / 254 (numerics §6)."""
        return quantize_residual(self.weight.detach(), weight.codes, weight.scale.detach())

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.calibrated = self.calibrated or prefix + "log_input_alpha" in state_dict

    def extra_repr(self) -> str:
        plan = self.base_plan
        options = f"tier={plan.tier}, activation={plan.activation}, blend={self.blend:g}"
        return f"{self.in_features}, {self.out_features}, {options}"


def _values(x: Tensor, fake: Fake, residual: bool) -> Tensor:
    """What the codes of x (R, K) stand for, with their residual codes if those take part in the product."""
    if not residual:
        return fake.values
    with torch.no_grad():
        rest = quantize_residual(x, fake.codes, fake.scale) * fake.scale[:, None] / nm.RESIDUAL_STEPS
    return fake.values + rest


class FakePatchEmbed(FakeQuantLinear):
    """The patch embedding, (B, C, Ht, Wd) to (B, N, Ht/ph, Wd/pw): a linear layer on patches with a scale each.

    With a factorised plan, the buffer `equalizer` fp32 (K,) is multiplied into the patches.
    """

    def __init__(self, plan: LayerPlan, weight: Tensor, bias: Tensor | None, half: torch.dtype, options: QatOptions):
        """`weight` is the convolution's (N, C, ph, pw)."""
        super().__init__(plan, weight.flatten(1), bias, half, options)
        self.channels, self.patch = weight.shape[1], tuple(weight.shape[2:])

    @torch.no_grad()
    def adopt_(self, plan: LayerPlan) -> None:
        """As for every layer; a plan that is not factorised gives the weight back what `factorize_` moved into it."""
        equalizer = getattr(self, "equalizer", None)
        if equalizer is not None and not plan.factorized:
            self.weight.mul_(equalizer)
        if equalizer is None or not plan.factorized:
            equalizer = torch.ones_like(self.weight[0]) if plan.factorized else None
        self.register_buffer("equalizer", equalizer)
        super().adopt_(plan)

    @property
    def activation(self) -> str:
        return "per_token"

    def forward(self, pixels: Tensor) -> Tensor:
        rows = cut_patches(self.base_plan.name, pixels, self.channels, self.patch)
        rows = rows if self.equalizer is None else rows.float() * self.equalizer
        return super().forward(rows).permute(0, 3, 1, 2)

    @torch.no_grad()
    def factorize_(self, factors: Tensor) -> None:
        """Divide the patches by c_k (K,) and multiply the weight's columns by it (numerics §8)."""
        self.weight.mul_(factors)
        self.equalizer = self.equalizer / factors
