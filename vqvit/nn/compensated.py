"""Linear layers whose product adds terms of the residual codes (numerics §6)."""

import torch
from torch import Tensor

from vqvit import layouts, ops, reference
from vqvit import numerics as nm
from vqvit.nn.linear import Codes, QuantLinear
from vqvit.nn.module import without_gradient
from vqvit.nn.patch_embed import cut_patches, hold_equalizer, unfactorized
from vqvit.plan import LayerPlan
from vqvit.reference import COMPENSATION_TERMS


class CompensatedLinear(QuantLinear):
    """y = α_x α_W ∘ (x_q W_qᵀ + terms of R_x and R_W) + b; which terms, `plan.compensation` says.

    Buffer: residual int8 (N, K), R_W = rne(254 (W - α W_q) / α), where a term needs it; packed if the codes are.
    """

    def __init__(self, plan: LayerPlan, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None):
        super().__init__(plan, weight, bias, dtype)
        activation_term, weight_term, second_order = COMPENSATION_TERMS[plan.compensation]
        self.reads_input = activation_term or second_order
        needed = weight_term or second_order
        residual = reference.quantize_residual(weight, self.codes, self.scale) if needed else None
        self.hold(residual=residual)

    @property
    def fuses_input(self) -> bool:
        """Codes alone do not tell what they left over."""
        return super().fuses_input and not self.reads_input

    def pack_(self, layout: str | None = None) -> None:
        super().pack_(layout)
        if self.packed and self.residual is not None and self.residual.dim() == 2:
            self.residual = ops.pack_weight(self.residual, layouts.of(self.codes))

    def unpack_(self) -> None:
        super().unpack_()
        self.residual = self._plain_residual()

    def assign_(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, **others
    ) -> None:
        """As `QuantLinear.assign_`, with the residual codes int8 (N, K) of the new codes where the layer has some."""
        if (residual is None) != (self.residual is None):
            expected = "no residual codes" if self.residual is None else "the residual codes of the new codes"
            raise ValueError(f"{self.plan.name}: expected {expected} with {self.plan.compensation} compensation")
        repack = self.packed
        self.unpack_()
        super().assign_(codes, scale, bias, **others)
        self.residual = residual
        if repack:
            self.pack_()

    def forward(self, x: Tensor | Codes, activation="none", layer_scale=None, residual=None, out_dtype=None) -> Tensor:
        if isinstance(x, Codes):
            return self._compensated(x, None, activation, layer_scale, residual, out_dtype or self.dtype)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{self.plan.name}: expected input (..., {self.in_features}); got {tuple(x.shape)}")
        rows = without_gradient(x, self.plan.name).reshape(-1, self.in_features)
        y = self._from_rows(rows, activation, layer_scale, residual, out_dtype or x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def forward_codes(self, x: Codes, activation: str, consumer: QuantLinear) -> Codes:
        return consumer.quantize_input(self.forward(x, activation, out_dtype=torch.float32))

    def float_weight(self) -> Tensor:
        """fp32 (N, K): what the codes stand for, with their residual where the product's first order has it."""
        weight = super().float_weight()
        if not COMPENSATION_TERMS[self.plan.compensation][1]:
            return weight
        return weight + nm.dequantize(self._plain_residual(), self.scale) / nm.RESIDUAL_STEPS

    def _plain_residual(self) -> Tensor | None:
        if self.residual is None or self.residual.dim() == 2:
            return self.residual
        return ops.unpack_weight(self.residual, self.out_features, self.in_features)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.residual is not None:
            destination[prefix + "residual"] = self._plain_residual()

    def _from_rows(self, rows: Tensor, activation, layer_scale, residual, out_dtype) -> Tensor:
        x = self.quantize_input(rows)
        rest = ops.quantize_residual(rows, x.codes, x.scale) if self.reads_input else None
        return self._compensated(x, rest, activation, layer_scale, residual, out_dtype)

    def _compensated(self, x: Codes, rest: Tensor | None, activation, layer_scale, residual, out_dtype) -> Tensor:
        return ops.int8_linear_compensated(
            x.codes, x.scale, rest, self.codes, self.scale, self.residual, self.bias, self.plan.compensation,
            self.plan.mu, activation, layer_scale, residual, out_dtype,
        )  # fmt: skip


class CompensatedPatchEmbed(CompensatedLinear):
    """The patch embedding with compensation, (B, C, Ht, Wd) to (B, N, Ht/ph, Wd/pw), each patch one token."""

    def __init__(self, plan: LayerPlan, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None):
        """`weight` is the convolution's (N, C, ph, pw)."""
        super().__init__(plan, weight.flatten(1), bias, dtype)
        self.channels, self.patch = weight.shape[1], tuple(weight.shape[2:])
        hold_equalizer(self)

    def forward(self, pixels: Tensor) -> Tensor:
        rows = cut_patches(self.plan.name, pixels, self.channels, self.patch)
        rows = rows if self.equalizer is None else rows.float() * self.equalizer
        return super().forward(rows, out_dtype=pixels.dtype).permute(0, 3, 1, 2)

    def float_weight(self) -> Tensor:
        return unfactorized(super().float_weight(), self.equalizer)
