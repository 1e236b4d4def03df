"""Integer products: GEMM with epilogues, error compensation, packed weights."""

import torch
from torch import Tensor

from vqvit import layouts
from vqvit import validation as va
from vqvit.numerics import group_count
from vqvit.reference import COMPENSATION_TERMS
from vqvit.registry import empty_fp32, empty_int8, empty_int32, empty_sums, op


@op("int8_mm(Tensor a, Tensor b) -> Tensor")
def _(a, b):
    va.check_tensor("int8_mm", "a", a, torch.int8, (None, None))
    limit = va.nm.K_MAX_SYMMETRIC
    va.check(1 <= a.shape[1] <= limit, "int8_mm", f"1 <= K <= {limit} (int32 accumulator)", f"K = {a.shape[1]}")
    va.check_tensor("int8_mm", "b", b, torch.int8, (None, a.shape[1]), a)
    return lambda: empty_int32(a, a.shape[0], b.shape[0])


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """int32 (M, N) = a (M, K) int8 times b (N, K) int8 transposed, exact for K <= 133,144."""
    return torch.ops.vqvit.int8_mm(a, b)


@op(
    "int8_linear(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor? bias=None, str activation='none',"
    " Tensor? layer_scale=None, Tensor? residual=None, Tensor? a_zero=None, Tensor? a_sum=None, Tensor? b_zero=None,"
    " Tensor? b_sum=None, ScalarType out_dtype=float32) -> Tensor"
)
def _(
    a, a_scale, b, b_scale, bias=None, activation="none", layer_scale=None, residual=None,
    a_zero=None, a_sum=None, b_zero=None, b_sum=None, out_dtype=torch.float32,
):  # fmt: skip
    name = "int8_linear"
    m, n, _ = va.check_linear(name, a, a_scale, b, b_scale, bias, activation, a_zero, a_sum, b_zero, b_sum)
    va.check_epilogue(name, layer_scale, residual, out_dtype, (m, n), a)
    return lambda: a.new_empty((m, n), dtype=out_dtype)


def int8_linear(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    a_zero: Tensor | None = None,
    a_sum: Tensor | None = None,
    b_zero: Tensor | None = None,
    b_sum: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """act(α_a α_bᵀ ∘ Σ_k (a - z_a)(b - z_b) + bias) · layer_scale + residual (numerics §5).

    Args:
        a: int8 (M, K), with a_scale fp32 (M,), or (M, ⌈K / 128⌉) from `quantize_per_group`: then without zero points.
            b: int8 (N, K) or `pack_weight` of it, with b_scale fp32 (N,).
        bias, layer_scale: float (N,). residual: float (M, N). activation: one of `numerics.ACTIVATIONS`.
        a_zero int32 (M,) needs b_sum = Σ_k b, int32 (N,); b_zero int32 (N,) needs a_sum = Σ_k a, int32 (M,).
        out_dtype: float32, float16 or bfloat16.

    K is at most 133,144 (66,572 with one zero point, 33,286 with two): beyond it int32 could overflow.
    """
    return torch.ops.vqvit.int8_linear(
        a, a_scale, b, b_scale, bias, activation, layer_scale, residual, a_zero, a_sum, b_zero, b_sum, out_dtype
    )


@op(
    "int8_linear_quantize(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor? bias=None,"
    " str activation='none', Tensor? a_zero=None, Tensor? a_sum=None, Tensor? b_zero=None, Tensor? b_sum=None,"
    " Tensor? out_scale=None, bool symmetric=True, bool row_sum=False, bool per_group=False)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _(
    a, a_scale, b, b_scale, bias=None, activation="none", a_zero=None, a_sum=None, b_zero=None, b_sum=None,
    out_scale=None, symmetric=True, row_sum=False, per_group=False,
):  # fmt: skip
    name = "int8_linear_quantize"
    m, n, _ = va.check_linear(name, a, a_scale, b, b_scale, bias, activation, a_zero, a_sum, b_zero, b_sum)
    va.check(n >= 1, name, "rows of at least one element", f"N = {n}")
    va.check_static_scale(name, "out_scale", out_scale, a)
    va.check(symmetric or out_scale is None, name, "symmetric codes with a static out_scale", "symmetric = False")
    plain = out_scale is None and symmetric and not row_sum
    received = f"out_scale = {out_scale}, symmetric = {symmetric}, row_sum = {row_sum}"
    va.check(plain or not per_group, name, "no out_scale, symmetric codes and no row sums per group", received)
    return lambda: (
        empty_int8(a, m, n),
        empty_fp32(a, m, group_count(n)) if per_group else empty_fp32(a, m),
        empty_sums(a, (m,), not symmetric),
        empty_sums(a, (m,), row_sum),
    )


def int8_linear_quantize(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    a_zero: Tensor | None = None,
    a_sum: Tensor | None = None,
    b_zero: Tensor | None = None,
    b_sum: Tensor | None = None,
    out_scale: Tensor | None = None,
    symmetric: bool = True,
    row_sum: bool = False,
    per_group: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`int8_linear` whose fp32 result is stored as int8 for the next GEMM: the same codes as quantizing it afterwards.

    Args: as `int8_linear`; out_scale fp32 scalar tensor selects static codes, else each row gets its own scale
    (symmetric or asymmetric), or with `per_group` each group of 128 columns of a row.

    Returns: codes int8 (M, N), scale fp32 (M,) or (M, ⌈N / 128⌉), zero point int32 (M,) or empty, row sums int32 (M,)
    or empty.
    """
    return torch.ops.vqvit.int8_linear_quantize(
        a, a_scale, b, b_scale, bias, activation, a_zero, a_sum, b_zero, b_sum, out_scale, symmetric, row_sum, per_group
    )


@op(
    "int8_linear_compensated(Tensor a, Tensor a_scale, Tensor? a_residual, Tensor b, Tensor b_scale,"
    " Tensor? b_residual, Tensor? bias=None, str mode='full', float mu=1.0, str activation='none',"
    " Tensor? layer_scale=None, Tensor? residual=None, ScalarType out_dtype=float32) -> Tensor"
)
def _(
    a, a_scale, a_residual, b, b_scale, b_residual, bias=None, mode="full", mu=1.0, activation="none",
    layer_scale=None, residual=None, out_dtype=torch.float32,
):  # fmt: skip
    name = "int8_linear_compensated"
    m, n, k = va.check_operands(name, a, a_scale, b, b_scale, zero_points=1)  # two products share an accumulator
    va.check(mode in COMPENSATION_TERMS, name, f"mode in {tuple(COMPENSATION_TERMS)}", repr(mode))
    activation_term, weight_term, second_order = COMPENSATION_TERMS[mode]
    for operand, codes, needed in (
        ("a_residual", a_residual, activation_term or second_order),
        ("b_residual", b_residual, weight_term or second_order),
    ):
        va.check(codes is not None or not needed, name, f"{operand} for mode {mode!r}", "None")
    va.check_optional(name, "a_residual", a_residual, torch.int8, (m, k), a)
    if b_residual is not None:
        dimensions = b_residual.dim(), b.dim()
        va.check(dimensions[0] == dimensions[1], name, "b_residual in the layout of b", f"{dimensions} dimensions")
        va.check_codes(name, "b_residual", b_residual, n, k, a)
    va.check_optional(name, "bias", bias, va.FLOATS, (n,), a)
    va.check_activation(name, activation)
    va.check_epilogue(name, layer_scale, residual, out_dtype, (m, n), a)
    return lambda: a.new_empty((m, n), dtype=out_dtype)


def int8_linear_compensated(
    a: Tensor,
    a_scale: Tensor,
    a_residual: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_residual: Tensor | None,
    bias: Tensor | None = None,
    mode: str = "full",
    mu: float = 1.0,
    activation: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Error-compensated INT8 linear: α_a α_bᵀ ∘ (Aq Bqᵀ + [R_A Bqᵀ + Aq R_Bᵀ]/254 + μ R_A R_Bᵀ/254²) + bias, with the
    epilogue of `int8_linear`.

    Args:
        a, a_residual: int8 (M, K), a_scale fp32 (M,). b, b_residual: int8 (N, K), or both from `pack_weight`; b_scale
            fp32 (N,).
        mode: which terms: "none"; "paper": only μ R_A R_Bᵀ (the paper's E_comp); "activation": R_A Bqᵀ;
            "weight": Aq R_Bᵀ; "full": all three (numerics §6). Residual codes that the mode does not use may be None.
        activation, layer_scale, residual: as `int8_linear`.

    Returns: (M, N) in out_dtype.
    """
    return torch.ops.vqvit.int8_linear_compensated(
        a, a_scale, a_residual, b, b_scale, b_residual, bias, mode, mu, activation, layer_scale, residual, out_dtype
    )


@op("pack_weight(Tensor b, str layout='panels') -> Tensor")
def _(b, layout="panels"):
    va.check_tensor("pack_weight", "b", b, torch.int8, (None, None))
    va.check(b.numel() > 0, "pack_weight", "at least one weight", tuple(b.shape))
    va.check(layout in layouts.PACKED, "pack_weight", f"layout in {layouts.PACKED}", repr(layout))
    return lambda: empty_int8(b, *layouts.shape_of(layout, *b.shape))


def pack_weight(b: Tensor, layout: str = "panels") -> Tensor:
    """Weights (N, K) int8 as CPU kernels read them.

    Args: layout: "panels" or "strips" (`vqvit.layouts`). Ops take either; `vqvit.native.cpu_weight_layout()` is the
    faster one here.
    """
    return torch.ops.vqvit.pack_weight(b, layout)


@op("unpack_weight(Tensor packed, int n, int k) -> Tensor")
def _(packed, n, k):
    va.check_tensor("unpack_weight", "packed", packed, torch.int8)
    va.check(n >= 1 and k >= 1, "unpack_weight", "at least one weight", (n, k))
    va.check(packed.dim() in (3, 4), "unpack_weight", "packed of 3 (strips) or 4 dimensions (panels)", packed.dim())
    va.check_codes("unpack_weight", "weight", packed, n, k, packed)
    return lambda: empty_int8(packed, n, k)


def unpack_weight(packed: Tensor, n: int, k: int) -> Tensor:
    """The (n, k) int8 weights inside `pack_weight`'s result."""
    return torch.ops.vqvit.unpack_weight(packed, n, k)
