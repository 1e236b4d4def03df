"""What ops are tried on: functions that draw tensors, and the positional arguments of an op from them.

The shapes are the ones that break kernels: 197 tokens, odd K and N, one row, no row, ties, zero rows, saturation,
rows with NaN or Inf, strided views.
"""

from functools import partial

import torch
from torch import Tensor

from vqvit import numerics as nm
from vqvit import reference as ref

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape) * 3).to(dtype)


def codes(*shape: int) -> Tensor:
    return torch.randint(-nm.QMAX, nm.QMAX + 1, shape, dtype=torch.int8)


def scales(*shape: int) -> Tensor:
    return torch.rand(*shape) * 0.05 + 1e-3


def ties() -> Tensor:
    """Row maximum 127, so that α = 1 and every half-integer is a tie."""
    row = torch.arange(-127, 127, dtype=torch.float32) + 0.5
    return torch.cat([row, torch.tensor([127.0, -127.0])]).repeat(3, 1)


def zero_rows() -> Tensor:
    x = normal(5, 48)
    x[1], x[3] = 0.0, -0.0
    return x


def tiny_and_huge() -> Tensor:
    return normal(6, 40) * torch.tensor([1e-44, 1e-38, 1e-30, 1e-8, 1e20, 1e37])[:, None]


def poisoned() -> Tensor:
    x = normal(7, 50)
    x[0, 3], x[2, 0], x[4, 49], x[5, 10] = torch.nan, torch.inf, -torch.inf, torch.nan
    return x


def offset_rows() -> Tensor:
    """Mean far above the spread, and one outlier channel: what LayerNorm statistics lose digits on."""
    x = normal(9, 96) + 200.0
    x[::2, 17] = 4000.0
    return x


ROWS = {
    "197x768": lambda: normal(197, 768),
    "odd_k": lambda: normal(13, 77),
    "k1": lambda: normal(4, 1),
    "one_row": lambda: normal(1, 65),
    "empty": lambda: normal(0, 64),
    "batch": lambda: normal(2, 5, 33),
    "transposed": lambda: normal(40, 9).t(),
    "row_strided": lambda: normal(8, 128)[:, 3:70],
    "ties": ties,
    "zero_rows": zero_rows,
    "tiny_and_huge": tiny_and_huge,
    "poisoned": poisoned,
    "offset": offset_rows,
    "saturated_fp16": lambda: torch.full((3, 70), 65504.0, dtype=torch.float16),
    **{f"{name}_197": partial(normal, 197, 48, dtype=dtype) for name, dtype in FLOATS.items()},
}

GEMM_SHAPES = {
    "197x96x64": (197, 96, 64),
    "odd": (5, 33, 71),
    "one_row": (1, 64, 130),
    "k1": (3, 1, 5),
    "n1": (7, 40, 1),
    "empty": (0, 16, 8),
    "six_rows": (6, 128, 64),
    "panel_edge": (14, 66, 129),
}

GROUPED_SHAPES = {
    "197x300x64": (197, 300, 64),
    "one_group": (5, 33, 71),
    "exact_groups": (7, 256, 66),
    "one_row": (1, 129, 40),
}


def linear(shape: tuple[int, int, int], *rest) -> tuple:
    m, k, n = shape
    return codes(m, k), scales(m), codes(n, k), scales(n), *rest


def odd_scales(*shape: int) -> Tensor:
    """Zero of both signs, negative, denormal: what decides the sign of a zero."""
    kinds = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-42, -1e-42, 1e-38])
    return (torch.rand(*shape) + 0.5) * kinds[torch.randint(len(kinds), shape)]


def linear_odd_scales(shape: tuple[int, int, int], activation: str, layout: str = "rows", epilogue: bool = False):
    """Products of which some are zero, without bias; `epilogue`: with an odd layer scale and residual."""
    m, k, n = shape
    a, b = codes(m, k), codes(n, k)
    a[::3], b[::4] = 0, 0
    vectors = (odd_scales(n), odd_scales(m, n)) if epilogue else (None, None)
    return a, odd_scales(m), laid_out(b, layout), odd_scales(n), None, activation, *vectors


def grouped_odd_scales(shape: tuple[int, int, int], activation: str) -> tuple:
    a, _, *rest = linear_odd_scales(shape, activation)
    return a, odd_scales(shape[0], -(-shape[1] // nm.GROUP)), *rest


def compensated_odd_scales(shape: tuple[int, int, int], mode: str, activation: str) -> tuple:
    a, a_scale, b, b_scale, *_ = linear_odd_scales(shape, activation)
    residuals = codes(*a.shape), codes(*b.shape)
    return a, a_scale, residuals[0], b, b_scale, residuals[1], None, mode, 1.0, activation


def laid_out(b: Tensor, layout: str) -> Tensor:
    return b if layout == "rows" else ref.pack_weight(b, layout)


def linear_full(shape: tuple[int, int, int], activation: str, dtype: torch.dtype, layout: str = "rows") -> tuple:
    m, _, n = shape
    a, a_scale, b, b_scale = linear(shape)
    b = laid_out(b, layout)
    floats = (normal(n, dtype=dtype), activation, normal(n, dtype=dtype), normal(m, n, dtype=dtype))
    return a, a_scale, b, b_scale, *floats, None, None, None, None, dtype


def zero_points(shape: tuple[int, int, int], a_side: bool, b_side: bool) -> tuple:
    """a_zero, a_sum, b_zero, b_sum for codes whose sums must match: returns the operands too."""
    m, _, n = shape
    a, a_scale, b, b_scale = linear(shape)
    a_zero, b_sum = (codes(m).int(), b.sum(-1, dtype=torch.int32)) if a_side else (None, None)
    b_zero, a_sum = (codes(n).int(), a.sum(-1, dtype=torch.int32)) if b_side else (None, None)
    return (a, a_scale, b, b_scale), (a_zero, a_sum, b_zero, b_sum)


def linear_asymmetric(shape, a_side, b_side) -> tuple:
    operands, zeros = zero_points(shape, a_side, b_side)
    return *operands, normal(shape[2]), "gelu", None, None, *zeros, torch.float32


def linear_saturated() -> tuple:
    """Every product 127 · 127 or its negative: the largest accumulators for this K."""
    a, b = torch.full((4, 512), 127, dtype=torch.int8), torch.full((3, 512), 127, dtype=torch.int8)
    b[1] = -127
    return a, scales(4), b, scales(3)


def linear_poisoned() -> tuple:
    a, a_scale, b, b_scale = linear((5, 32, 40))
    a_scale[2] = torch.nan
    return a, a_scale, b, b_scale, normal(40), "gelu"


def strided_residual() -> tuple:
    a, a_scale, b, b_scale = linear((9, 24, 20))
    return a.t().contiguous().t(), a_scale, b, b_scale, None, "none", None, normal(20, 9).t()


def linear_quantize(shape, activation="gelu", static=False, symmetric=True, row_sum=False, layout="rows") -> tuple:
    a, a_scale, b, b_scale = linear(shape)
    b = laid_out(b, layout)
    out_scale = torch.tensor(0.2) if static else None
    return a, a_scale, b, b_scale, normal(shape[2]), activation, *[None] * 4, out_scale, symmetric, row_sum


def grouped(shape: tuple[int, int, int], *rest, layout: str = "rows") -> tuple:
    """Operands with a scale for each 128 columns of a."""
    m, k, _ = shape
    a, _, b, b_scale = linear(shape)
    return a, scales(m, -(-k // nm.GROUP)), laid_out(b, layout), b_scale, *rest


def grouped_full(shape: tuple[int, int, int], activation: str, dtype: torch.dtype, layout: str = "rows") -> tuple:
    m, _, n = shape
    floats = (normal(n, dtype=dtype), activation, normal(n, dtype=dtype), normal(m, n, dtype=dtype))
    return *grouped(shape, *floats, layout=layout), None, None, None, None, dtype


def grouped_poisoned() -> tuple:
    a, a_scale, b, b_scale = grouped((5, 300, 40))
    a_scale[2, 1] = torch.nan
    return a, a_scale, b, b_scale, normal(40), "gelu"


def per_group(shape, activation="gelu", grouped_input=False, layout="rows") -> tuple:
    """`int8_linear_quantize` with a scale for each 128 columns of the result."""
    a, a_scale, b, b_scale = grouped(shape) if grouped_input else linear(shape)
    operands = a, a_scale, laid_out(b, layout), b_scale
    return *operands, normal(shape[2]), activation, *[None] * 4, None, True, False, True


def qkv(tokens, images, k, heads, width, layout="rows", zero=False, bias=True) -> tuple:
    shape = (images * tokens, k, 3 * heads * width)
    (a, a_scale, b, b_scale), zeros = zero_points(shape, zero, zero)
    b = laid_out(b, layout)
    return a, a_scale, b, b_scale, normal(shape[2]) if bias else None, tokens, heads, *zeros


def qkv_poisoned() -> tuple:
    args = list(qkv(7, 2, 40, 2, 32))
    args[1][3] = torch.nan
    return tuple(args)


def linear_quantize_poisoned(static: bool) -> tuple:
    a, a_scale, b, b_scale = linear((6, 20, 150))
    a_scale[4] = torch.nan
    bias = normal(150)
    bias[140] = 3e38
    return a, a_scale * 1e3, b, b_scale, bias, "none", *[None] * 4, torch.tensor(0.5) if static else None


def compensated(
    shape, mode: str, mu: float = 1.0, bias: bool = True, activation: str = "none", epilogue: bool = False,
    layout: str = "rows", weight_residual: bool = True, **options,
) -> tuple:  # fmt: skip
    m, k, n = shape
    x, w = normal(m, k), normal(n, k)
    (a, a_scale, _, _), (b, b_scale, _, _) = ref.quantize_per_token(x), ref.quantize_per_token(w)
    a_residual, b_residual = ref.quantize_residual(x, a, a_scale), ref.quantize_residual(w, b, b_scale)
    b, b_residual = laid_out(b, layout), laid_out(b_residual, layout) if weight_residual else None
    operands = a, a_scale, a_residual, b, b_scale, b_residual, normal(n) if bias else None, mode, mu, activation
    return *operands, *((normal(n), normal(m, n, **options)) if epilogue else ())


def attention(batch, heads, queries, keys, width, poison: str | None = None) -> tuple:
    q, k, v = codes(batch, heads, queries, width), codes(batch, heads, keys, width), codes(batch, heads, keys, width)
    args = [q, k, v, scales(batch, heads, queries), scales(batch, heads, keys), scales(batch, heads, width)]
    if poison:
        args["q k v".split().index(poison) + 3][0, 0, 0] = torch.nan
    return *args, width**-0.5


def block(
    batch, tokens, width, heads, head_dim, hidden, dtype=torch.float32, activation="gelu",
    layouts=("panels",) * 4, biases=True, layer_scales=False, deltas=(0.0, 0.0, 0.0), poison=False,
    groups=(False, False), leading=None,
) -> tuple:  # fmt: skip
    """Operands of `int8_encoder_block` with weights of the size that keeps the stream near 1."""

    def weight(n, k, layout):
        b = codes(n, k)
        scale = (torch.rand(n) + 0.5) / (73 * k**0.5)
        return laid_out(b, layout), scale, (torch.randn(n) * 0.1).to(dtype) if biases else None

    def norm():
        return (1 + torch.randn(width) * 0.1).to(dtype), (torch.randn(width) * 0.1).to(dtype), 1e-6

    x = normal(batch, tokens, width, dtype=dtype)
    if poison:
        x[0, tokens // 2, 0], x[-1, -1, -1] = torch.nan, torch.inf
    shapes = (3 * heads * head_dim, width), (width, heads * head_dim), (hidden, width), (width, hidden)
    weights = [weight(*shape, layout) for shape, layout in zip(shapes, layouts, strict=True)]
    scale = [torch.rand(width) + 0.5 if layer_scales else None for _ in range(2)]
    operands = [operand for weight in weights for operand in weight]
    return x, heads, head_dim**-0.5, *norm(), *norm(), *operands, *scale, activation, *deltas, *groups, leading


def norm_args(x: Tensor) -> tuple:
    k = x.shape[-1]
    return x, torch.randn(k), torch.randn(k), 1e-6


def add_norm_args(x: Tensor, residual_dtype=torch.float32, layer_scale=True) -> tuple:
    k = x.shape[-1]
    return x, (torch.randn_like(x.float()) * 2).to(residual_dtype), torch.randn(k), torch.randn(k), 1e-6, (
        torch.rand(k) if layer_scale else None
    )  # fmt: skip


def residual_args(x: Tensor) -> tuple:
    q, scale, _, _ = ref.quantize_per_token(x)
    return x, q, scale
