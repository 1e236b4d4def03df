"""Linear layers: int8 weights with int8 activations, and half precision for the layers that a plan keeps there."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vqvit import backends, families, layouts, low_bit, native, ops
from vqvit import numerics as nm
from vqvit.nn.module import QuantModule, without_gradient
from vqvit.plan import LayerPlan


class UncalibratedError(RuntimeError):
    """A layer with a static activation scale was run before calibration."""


class Codes(NamedTuple):
    """A quantized activation: x ≈ scale (codes - zero_point)."""

    codes: Tensor  # (M, K) int8
    scale: Tensor  # (M,) fp32, or (M, ⌈K / 128⌉) per group
    zero_point: Tensor | None = None  # (M,) int32
    row_sum: Tensor | None = None  # (M,) int32, Σ_k codes


class QuantLinear(QuantModule):
    """y = x Wᵀ + b with W stored as int8 codes (N, K) and the product accumulated in int32.

    Buffers: codes int8 (N, K), or packed panels where the CPU kernels run; scale fp32 (N,); bias float (N,) or None;
    zero_point int32 (N,) in the `int8_asym` tier; code_sum int32 (N,), Σ_k codes, for asymmetric activations;
    input_scale fp32 scalar for static activations, None until calibrated; multipliers uint8 (N, ⌈K / 128⌉) of weights
    below 8 bits (`vqvit.low_bit`), whose codes a state dict holds packed.
    """

    def __init__(self, plan: LayerPlan, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None):
        """Quantize a float weight (N, K). Raises `ValueError` if it holds NaN or Inf, or if K is over the bound."""
        super().__init__(dtype or weight.dtype)
        self.plan = plan
        self.out_features, self.in_features = weight.shape
        asymmetric_weight, asymmetric_input = plan.tier == "int8_asym", plan.activation == "per_token_asym"
        _check_weight(plan.name, weight, bias, asymmetric_weight + asymmetric_input)
        zero_point = multipliers = None
        if plan.bits < 8:
            codes, scale, multipliers = low_bit.quantize_weight(weight, plan.bits)
        elif asymmetric_weight:
            codes, scale, zero_point = nm.quantize_weight_asymmetric(weight)
        else:
            scale = nm.weight_scale(weight, plan.beta, plan.per_channel)
            codes = nm.quantize_weight(weight, scale)
        code_sum = codes.sum(-1, dtype=torch.int32) if asymmetric_input else None
        self.hold(codes=codes, scale=scale, zero_point=zero_point, code_sum=code_sum, input_scale=None)
        self.hold(multipliers=multipliers, bias=None if bias is None else bias.detach().clone())
        if plan.activation == "static" and weight.is_meta:
            self.input_scale = torch.empty((), device="meta")  # a checkpoint will fill it
        self.observer = None
        self.input_range = None  # what calibration remembers of the input, `vqvit.calibration.LayerRange`

    @property
    def packed(self) -> bool:
        return self.codes.dim() > 2

    @property
    def fuses_input(self) -> bool:
        """Whether the producer of the input may hand over codes: not while an observer wants to see floats."""
        return self.observer is None

    def pack_(self, layout: str | None = None) -> None:
        """Lay the weights out for the CPU kernels, where those run: in `layout` (`ops.pack_weight`), or the fastest."""
        if self.codes.device.type != "cpu" or backends.unavailable("cpu") is not None:
            return
        wanted = layout or native.cpu_weight_layout()
        if layouts.of(self.codes) != wanted:
            self.unpack_()
            self.codes = ops.pack_weight(self.codes, wanted)

    def unpack_(self) -> None:
        if self.packed:
            self.codes = ops.unpack_weight(self.codes, self.out_features, self.in_features)

    def assign_(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None = None, multipliers: Tensor | None = None
    ) -> None:
        """Put other weights in place: codes int8 (N, K), scale fp32 (N,), and a bias (N,) if given. Zero points stay.

        Weights below 8 bits need their multipliers uint8 (N, ⌈K / 128⌉) too. Raises `ValueError` for other shapes, or
        for codes that are no multiples of them.
        """
        shape = (self.out_features, self.in_features)
        if codes.shape != shape or codes.dtype != torch.int8 or scale.shape != shape[:1]:
            received = f"codes {tuple(codes.shape)} {codes.dtype}, scale {tuple(scale.shape)}"
            raise ValueError(f"{self.plan.name}: expected codes {shape} int8, scale {shape[:1]}; got {received}")
        if (self.multipliers is None) != (multipliers is None):
            expected = "no multipliers" if self.multipliers is None else f"multipliers of its {self.plan.bits} bits"
            raise ValueError(f"{self.plan.name}: expected {expected}; got {'none' if multipliers is None else 'some'}")
        if multipliers is not None:
            low_bit.check_codes(self.plan.name, codes, multipliers, self.plan.bits)
            self.multipliers = multipliers.to(self.multipliers)
        repack = self.packed
        self.codes, self.scale = codes.to(self.scale.device), scale.to(self.scale)
        if self.code_sum is not None:
            self.code_sum = self.codes.sum(-1, dtype=torch.int32)
        if bias is not None:
            self.bias = bias.to(self.scale.device, self.dtype if self.bias is None else self.bias.dtype)
        if repack:
            self.pack_()

    def require_input_scale(self) -> Tensor | None:
        """The static input scale, None for dynamic activations. Raises `UncalibratedError`."""
        if self.plan.activation == "static" and self.input_scale is None:
            raise UncalibratedError(
                f"{self.plan.name}: expected a calibrated static activation scale; got none. "
                "Pass calibration=... to vqvit.quantize_, or choose activation='per_token'."
            )
        return self.input_scale

    def quantize_input(self, x: Tensor) -> Codes:
        """Codes of a float activation (M, K). A layer that is observed has no static scale yet."""
        if self.observer is not None:
            self.observer.update(x)
        return self._codes_of(x, self.plan.activation == "static" and self.observer is None)

    def seen_input(self, x: Tensor) -> Tensor:
        """fp32 (M, K): what the codes of a float activation (M, K) stand for."""
        codes, scale, zero_point, _ = self._codes_of(x, self.input_scale is not None)
        if scale.dim() == 1:
            return nm.dequantize(codes, scale, zero_point)
        return codes.float() * scale.repeat_interleave(nm.GROUP, -1)[:, : self.in_features]

    def _codes_of(self, x: Tensor, static: bool) -> Codes:
        row_sum = self.zero_point is not None
        if static:
            codes, scale, sums = ops.quantize_static(x, self.require_input_scale(), None, row_sum)
            return Codes(codes, scale, None, sums if row_sum else None)
        if self.plan.activation == "per_token_group":
            return Codes(*ops.quantize_per_group(x))
        symmetric = self.plan.activation != "per_token_asym"
        codes, scale, zero_point, sums = ops.quantize_per_token(x, self.plan.delta, None, symmetric, row_sum)
        return Codes(codes, scale, None if symmetric else zero_point, sums if row_sum else None)

    def forward(
        self,
        x: Tensor | Codes,
        activation: str = "none",
        layer_scale: Tensor | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Float (..., K) or its codes (M, K) to float (..., N) or (M, N), in `out_dtype` or the input's dtype."""
        if isinstance(x, Codes):
            return self._linear(x, activation, layer_scale, residual, out_dtype or self.dtype)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{self.plan.name}: expected input (..., {self.in_features}); got {tuple(x.shape)}")
        x = without_gradient(x, self.plan.name)
        codes = self.quantize_input(x.reshape(-1, self.in_features))
        y = self._linear(codes, activation, layer_scale, residual, out_dtype or x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _linear(self, x: Codes, activation, layer_scale, residual, out_dtype) -> Tensor:
        return ops.int8_linear(
            x.codes, x.scale, self.codes, self.scale, self.bias, activation, layer_scale, residual,
            x.zero_point, x.row_sum, self.zero_point, self.code_sum, out_dtype,
        )  # fmt: skip

    def forward_codes(self, x: Codes, activation: str, consumer: "QuantLinear") -> Codes:
        """The activation's result as codes for the next layer, quantized in this layer's epilogue."""
        per_group = consumer.plan.activation == "per_token_group"
        symmetric, row_sum = consumer.plan.activation != "per_token_asym", consumer.zero_point is not None
        codes, scale, zero_point, sums = ops.int8_linear_quantize(
            x.codes, x.scale, self.codes, self.scale, self.bias, activation, x.zero_point, x.row_sum,
            self.zero_point, self.code_sum, consumer.require_input_scale(), symmetric, row_sum, per_group,
        )  # fmt: skip
        return Codes(codes, scale, None if symmetric else zero_point, sums if row_sum else None)

    def forward_qkv(self, x: Codes, tokens: int, num_heads: int) -> tuple[Tensor, ...]:
        """Codes and scales of q, k and v for `ops.int8_attention`, quantized in this layer's epilogue."""
        return ops.int8_linear_qkv(
            x.codes, x.scale, self.codes, self.scale, self.bias, tokens, num_heads, x.zero_point, x.row_sum,
            self.zero_point, self.code_sum,
        )  # fmt: skip

    def plain_codes(self) -> Tensor:
        """int8 (N, K), whether or not the weights are laid out for a kernel."""
        return ops.unpack_weight(self.codes, self.out_features, self.in_features) if self.packed else self.codes

    def float_weight(self) -> Tensor:
        """fp32 (N, K): what the codes stand for."""
        return nm.dequantize(self.plain_codes(), self.scale, self.zero_point)

    def extra_repr(self) -> str:
        bits = f", bits={self.plan.bits}" if self.plan.bits < 8 else ""
        options = f"tier={self.plan.tier}{bits}, activation={self.plan.activation}"
        return f"{self.in_features}, {self.out_features}, {options}"

    def _apply(self, fn, recurse=True):
        repack = self.packed
        self.unpack_()
        super()._apply(fn, recurse)
        if repack:
            self.pack_()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        codes = self.plain_codes()  # checkpoints know one layout
        if self.multipliers is not None:
            codes = low_bit.pack(low_bit.contract(codes, self.multipliers), self.plan.bits)
        destination[prefix + "codes"] = codes

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        self.unpack_()
        codes, multipliers = (state_dict.get(prefix + name) for name in ("codes", "multipliers"))
        if self.multipliers is not None and codes is not None and multipliers is not None:
            q = low_bit.unpack(codes, self.plan.bits, self.in_features)
            state_dict[prefix + "codes"] = low_bit.expand(q, multipliers)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class HalfLinear(QuantModule):
    """The `fp16` tier: y = act(x Wᵀ + b) in bfloat16 or float16, results in the input's dtype."""

    fuses_input = False
    observer = None

    def __init__(self, plan: LayerPlan, weight: Tensor, bias: Tensor | None, half: torch.dtype):
        super().__init__(weight.dtype)
        self.plan = plan
        self.out_features, self.in_features = weight.shape
        _check_weight(plan.name, weight, bias, 0)
        self.hold(half_weight=weight.detach().to(half), bias=None if bias is None else bias.detach().to(half))

    def forward(self, x, activation="none", layer_scale=None, residual=None, out_dtype=None) -> Tensor:
        """Float (..., K) to float (..., N); the epilogue is `QuantLinear`'s."""
        y = F.linear(x.to(self.half_weight.dtype), self.half_weight, self.bias)
        y = y if activation == "none" else families.ACTIVATION_FUNCTIONS[activation](y)
        y = y if layer_scale is None else y * layer_scale
        y = y if residual is None else y + residual
        return y.to(out_dtype or x.dtype)

    def float_weight(self) -> Tensor:
        return self.half_weight.float()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.half_weight.dtype}"


def _check_weight(name: str, weight: Tensor, bias: Tensor | None, zero_points: int) -> None:
    limit = (nm.K_MAX_SYMMETRIC, nm.K_MAX_ONE_ZERO_POINT, nm.K_MAX_TWO_ZERO_POINTS)[zero_points]
    if weight.shape[1] > limit:
        raise ValueError(f"{name}: expected at most {limit} input features (int32 accumulator); got {weight.shape[1]}")
    for what, tensor in (("weights", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_meta and not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: expected finite {what}; got NaN or Inf")
