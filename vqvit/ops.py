"""The ops: `torch.ops.vqvit.*` and the same functions with signatures and documentation.

Each op is a schema, an argument check, a fake (shapes and dtypes for torch.compile and torch.export) and whatever the
selected backend does. No autograd formula is registered: these ops are for inference.

Symbols: M tokens, N output channels, K input channels, α fp32 scales, int8 codes in [-127, 127]. "numerics §n" is a
section of docs/numerics.md.
All floats in may be float32, float16 or bfloat16 and are converted to fp32 exactly. Every function raises `TypeError`
for a wrong dtype and `ValueError` for a wrong shape, device or option, naming what was expected and what came.
"""

import torch
from torch import Tensor

from vqvit import validation as va
from vqvit.reference import COMPENSATION_TERMS, K_GROUP, PANEL
from vqvit.registry import empty_fp32, empty_int8, empty_int32, empty_sums, op, registered


@op(
    "quantize_per_token(Tensor x, float delta=0.0, Tensor? equalizer=None, bool symmetric=True, bool row_sum=False)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _(x, delta=0.0, equalizer=None, symmetric=True, row_sum=False):
    va.check_rows("quantize_per_token", x, equalizer, statistics=delta != 0.0)
    va.check(symmetric or delta == 0.0, "quantize_per_token", "delta = 0 for asymmetric codes", f"delta = {delta}")
    rows = x.shape[:-1]
    return lambda: (
        empty_int8(x, *x.shape),
        empty_fp32(x, *rows),
        empty_sums(x, rows, not symmetric),
        empty_sums(x, rows, row_sum),
    )


def quantize_per_token(
    x: Tensor, delta: float = 0.0, equalizer: Tensor | None = None, symmetric: bool = True, row_sum: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dynamic quantization of each row: α = max(1e-8, (max|x| + delta · sd(x)) / 127), q = clamp(rne(x / α)).

    Args:
        x: float (..., K).
        delta: weight of the row's standard deviation in the range (numerics §3, the paper's LayerNorm-aware scale).
        equalizer: fp32 (K,), multiplied into x first (SmoothQuant's 1 / c_k).
        symmetric: if False, α = (max - min) / 254 with a zero point: x ≈ α (q - z).
        row_sum: also return Σ_k q, which asymmetric weights need.

    Returns:
        codes int8 (..., K); scale fp32 (...); zero point int32 (...), empty if symmetric; row sums int32 (...), empty
        if not asked for. A row with NaN or Inf gets scale NaN and codes 0.
    """
    return torch.ops.vqvit.quantize_per_token(x, delta, equalizer, symmetric, row_sum)


@op("quantize_static(Tensor x, Tensor scale, Tensor? equalizer=None, bool row_sum=False) -> (Tensor, Tensor, Tensor)")
def _(x, scale, equalizer=None, row_sum=False):
    va.check_rows("quantize_static", x, equalizer)
    va.check_static_scale("quantize_static", "scale", scale, x)
    rows = x.shape[:-1]
    return lambda: (empty_int8(x, *x.shape), empty_fp32(x, *rows), empty_sums(x, rows, row_sum))


def quantize_static(
    x: Tensor, scale: Tensor, equalizer: Tensor | None = None, row_sum: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantization with one calibrated scale: q = clamp(rne(x · equalizer / scale)).

    Args: x float (..., K); scale fp32 scalar tensor; equalizer fp32 (K,).

    Returns:
        codes int8 (..., K); row scales fp32 (...): `scale`, or NaN for a row with NaN or Inf; row sums as in
        `quantize_per_token`.
    """
    return torch.ops.vqvit.quantize_static(x, scale, equalizer, row_sum)


@op(
    "layernorm_quantize(Tensor x, Tensor weight, Tensor bias, float eps, float delta=0.0, Tensor? scale=None,"
    " bool row_sum=False, bool paper=False) -> (Tensor, Tensor, Tensor)"
)
def _(x, weight, bias, eps, delta=0.0, scale=None, row_sum=False, paper=False):
    va.check_norm("layernorm_quantize", x, weight, bias, scale)
    rows = x.shape[:-1]
    return lambda: (empty_int8(x, *x.shape), empty_fp32(x, *rows), empty_sums(x, rows, row_sum))


def layernorm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    delta: float = 0.0,
    scale: Tensor | None = None,
    row_sum: bool = False,
    paper: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last dimension and quantization of the result in one pass (numerics §4).

    Args:
        x: float (..., K), K <= 65536. weight, bias: float (K,).
        eps: added to the variance; with `paper` to the standard deviation, as the paper writes it.
        delta: as in `quantize_per_token`; unused with `scale`.
        scale: fp32 scalar tensor; if given, quantization is static.

    Returns: codes int8 (..., K), row scales fp32 (...), row sums int32 (...) or empty.
    """
    return torch.ops.vqvit.layernorm_quantize(x, weight, bias, eps, delta, scale, row_sum, paper)


@op(
    "add_layernorm_quantize(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, Tensor? layer_scale=None,"
    " float delta=0.0, Tensor? scale=None, bool row_sum=False, bool paper=False) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _(x, residual, weight, bias, eps, layer_scale=None, delta=0.0, scale=None, row_sum=False, paper=False):
    name = "add_layernorm_quantize"
    va.check_norm(name, x, weight, bias, scale)
    va.check_tensor(name, "residual", residual, va.FLOATS, tuple(x.shape), x)
    va.check_optional(name, "layer_scale", layer_scale, va.FLOATS, (x.shape[-1],), x)
    rows = x.shape[:-1]
    return lambda: (
        empty_int8(x, *x.shape),
        empty_fp32(x, *rows),
        empty_sums(x, rows, row_sum),
        torch.empty_like(residual, memory_format=torch.contiguous_format),
    )


def add_layernorm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    layer_scale: Tensor | None = None,
    delta: float = 0.0,
    scale: Tensor | None = None,
    row_sum: bool = False,
    paper: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """stream = residual + layer_scale ∘ x, rounded to residual's dtype; then `layernorm_quantize(stream, ...)`.

    Args: x, residual float (..., K); layer_scale float (K,); the others as in `layernorm_quantize`.

    Returns: codes, row scales, row sums, and the new residual stream (..., K) in residual's dtype.
    """
    return torch.ops.vqvit.add_layernorm_quantize(
        x, residual, weight, bias, eps, layer_scale, delta, scale, row_sum, paper
    )


@op("patchify_quantize(Tensor pixels, int patch_height, int patch_width, Tensor? equalizer=None) -> (Tensor, Tensor)")
def _(pixels, patch_height, patch_width, equalizer=None):
    name = "patchify_quantize"
    va.check_tensor(name, "pixels", pixels, va.FLOATS, (None, None, None, None))
    batch, channels, height, width = pixels.shape
    divisible = patch_height > 0 and patch_width > 0 and height % patch_height == 0 and width % patch_width == 0
    va.check(divisible, op, f"height and width in multiples of ({patch_height}, {patch_width})", (height, width))
    rows, k = batch * (height // patch_height) * (width // patch_width), channels * patch_height * patch_width
    va.check_optional(name, "equalizer", equalizer, torch.float32, (k,), pixels)
    return lambda: (empty_int8(pixels, rows, k), empty_fp32(pixels, rows))


def patchify_quantize(
    pixels: Tensor, patch_height: int, patch_width: int, equalizer: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cut images into patches and quantize each patch as a token (numerics §8, input side).

    Args: pixels float (B, C, Ht, Wd), Ht and Wd multiples of the patch size; equalizer fp32 (C · ph · pw,).

    Returns:
        codes int8 (B · Ht/ph · Wd/pw, C · ph · pw), patches in raster order, elements in Conv2d weight order;
        scale fp32 (B · Ht/ph · Wd/pw,).
    """
    return torch.ops.vqvit.patchify_quantize(pixels, patch_height, patch_width, equalizer)


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
    va.check_optional(name, "layer_scale", layer_scale, va.FLOATS, (n,), a)
    va.check_optional(name, "residual", residual, va.FLOATS, (m, n), a)
    va.check_out_dtype(name, out_dtype)
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
        a: int8 (M, K), with a_scale fp32 (M,). b: int8 (N, K) or `pack_weight` of it, with b_scale fp32 (N,).
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
    " Tensor? out_scale=None, bool symmetric=True, bool row_sum=False) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _(
    a, a_scale, b, b_scale, bias=None, activation="none", a_zero=None, a_sum=None, b_zero=None, b_sum=None,
    out_scale=None, symmetric=True, row_sum=False,
):  # fmt: skip
    name = "int8_linear_quantize"
    m, n, _ = va.check_linear(name, a, a_scale, b, b_scale, bias, activation, a_zero, a_sum, b_zero, b_sum)
    va.check_static_scale(name, "out_scale", out_scale, a)
    va.check(symmetric or out_scale is None, op, "symmetric codes with a static out_scale", "symmetric = False")
    return lambda: (
        empty_int8(a, m, n),
        empty_fp32(a, m),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`int8_linear` whose fp32 result is stored as int8 for the next GEMM: the same codes as quantizing it afterwards.

    Args: as `int8_linear`; out_scale fp32 scalar tensor selects static codes, else each row gets its own scale
    (symmetric or asymmetric).

    Returns: codes int8 (M, N), scale fp32 (M,), zero point int32 (M,) or empty, row sums int32 (M,) or empty.
    """
    return torch.ops.vqvit.int8_linear_quantize(
        a, a_scale, b, b_scale, bias, activation, a_zero, a_sum, b_zero, b_sum, out_scale, symmetric, row_sum
    )


@op("quantize_residual(Tensor x, Tensor codes, Tensor scale) -> Tensor")
def _(x, codes, scale):
    va.check_rows("quantize_residual", x)
    va.check_tensor("quantize_residual", "codes", codes, torch.int8, tuple(x.shape), x)
    va.check_tensor("quantize_residual", "scale", scale, torch.float32, tuple(x.shape[:-1]), x)
    return lambda: empty_int8(x, *x.shape)


def quantize_residual(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Residual codes R = rne(254 (x - α q) / α), so that x ≈ α (q + R / 254): 16 bits in two int8 (numerics §6).

    Args: x float (..., K) without zero point, its codes int8 (..., K) and scale fp32 (...). Returns int8 (..., K).
    """
    return torch.ops.vqvit.quantize_residual(x, codes, scale)


@op(
    "int8_linear_compensated(Tensor a, Tensor a_scale, Tensor? a_residual, Tensor b, Tensor b_scale,"
    " Tensor? b_residual, Tensor? bias=None, str mode='full', float mu=1.0, ScalarType out_dtype=float32) -> Tensor"
)
def _(
    a, a_scale, a_residual, b, b_scale, b_residual, bias=None, mode="full", mu=1.0, out_dtype=torch.float32
):  # fmt: skip
    name = "int8_linear_compensated"
    va.check_tensor(name, "b", b, torch.int8, (None, None))
    m, n, k = va.check_operands(name, a, a_scale, b, b_scale, zero_points=1)  # two products share an accumulator
    va.check(mode in COMPENSATION_TERMS, op, f"mode in {tuple(COMPENSATION_TERMS)}", repr(mode))
    activation_term, weight_term, second_order = COMPENSATION_TERMS[mode]
    for operand, residual, shape, needed in (
        ("a_residual", a_residual, (m, k), activation_term or second_order),
        ("b_residual", b_residual, (n, k), weight_term or second_order),
    ):
        va.check(residual is not None or not needed, op, f"{operand} for mode {mode!r}", "None")
        va.check_optional(name, operand, residual, torch.int8, shape, a)
    va.check_optional(name, "bias", bias, va.FLOATS, (n,), a)
    va.check_out_dtype(name, out_dtype)
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
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Error-compensated INT8 linear: α_a α_bᵀ ∘ (Aq Bqᵀ + [R_A Bqᵀ + Aq R_Bᵀ]/254 + μ R_A R_Bᵀ/254²) + bias.

    Args:
        a, a_residual: int8 (M, K), a_scale fp32 (M,). b, b_residual: int8 (N, K), b_scale fp32 (N,).
        mode: which terms: "none"; "paper": only μ R_A R_Bᵀ (the paper's E_comp); "activation": R_A Bqᵀ;
            "weight": Aq R_Bᵀ; "full": all three (numerics §6). A residual that the mode does not use may be None.

    Returns: (M, N) in out_dtype.
    """
    return torch.ops.vqvit.int8_linear_compensated(
        a, a_scale, a_residual, b, b_scale, b_residual, bias, mode, mu, out_dtype
    )


@op("quantize_qkv(Tensor qkv, int num_heads) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
def _(qkv, num_heads):
    va.check_tensor("quantize_qkv", "qkv", qkv, va.FLOATS, (None, None, None))
    batch, tokens, width = qkv.shape
    divisible = num_heads > 0 and width > 0 and width % (3 * num_heads) == 0
    va.check(divisible, "quantize_qkv", f"a last dimension divisible by 3 · {num_heads} heads", width)
    va.check(tokens >= 1, "quantize_qkv", "at least one token", tuple(qkv.shape))
    head_dim = width // (3 * num_heads)
    codes, scales = (batch, num_heads, tokens, head_dim), (batch, num_heads, tokens)
    return lambda: (
        *(empty_int8(qkv, *codes) for _ in range(3)),
        empty_fp32(qkv, *scales),
        empty_fp32(qkv, *scales),
        empty_fp32(qkv, batch, num_heads, head_dim),
    )


def quantize_qkv(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Split and quantize attention inputs (numerics §7).

    Args: qkv float (B, S, 3 · H · D), the q, k and v projections side by side.

    Returns: q, k, v int8 (B, H, S, D); scales of q and k fp32 (B, H, S), per token and head; scale of v fp32 (B, H, D),
    per channel over the S tokens.
    """
    return torch.ops.vqvit.quantize_qkv(qkv, num_heads)


@op(
    "int8_attention(Tensor q, Tensor k, Tensor v, Tensor q_scale, Tensor k_scale, Tensor v_scale, float sm_scale,"
    " ScalarType out_dtype=float32) -> Tensor"
)
def _(q, k, v, q_scale, k_scale, v_scale, sm_scale, out_dtype=torch.float32):
    name = "int8_attention"
    va.check_tensor(name, "q", q, torch.int8, (None, None, None, None))
    batch, heads, queries, width = q.shape
    va.check_tensor(name, "k", k, torch.int8, (batch, heads, None, width), q)
    keys = k.shape[2]
    va.check(1 <= width <= 1024, op, "a head dimension between 1 and 1024 (exact fp32 logit accumulators)", width)
    va.check(1 <= keys <= va.nm.MAX_KEYS, op, f"between 1 and {va.nm.MAX_KEYS} keys (int32 sum of u16 codes)", keys)
    va.check_tensor(name, "v", v, torch.int8, (batch, heads, keys, width), q)
    va.check_tensor(name, "q_scale", q_scale, torch.float32, (batch, heads, queries), q)
    va.check_tensor(name, "k_scale", k_scale, torch.float32, (batch, heads, keys), q)
    va.check_tensor(name, "v_scale", v_scale, torch.float32, (batch, heads, width), q)
    va.check_out_dtype(name, out_dtype)
    return lambda: q.new_empty((batch, queries, heads * width), dtype=out_dtype)


def int8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    sm_scale: float,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """softmax(sm_scale · α_q α_kᵀ ∘ q kᵀ) v with both products in int8 and the softmax in fp32 (numerics §7).

    The softmax numerators are u16 codes rne(65535 · exp(l - max l)), two u8 digits, not normalised before the second
    product.

    Args: q int8 (B, H, Sq, D), k and v int8 (B, H, Sk, D); scales as `quantize_qkv` returns them.

    Returns: (B, Sq, H · D) in out_dtype.
    """
    return torch.ops.vqvit.int8_attention(q, k, v, q_scale, k_scale, v_scale, sm_scale, out_dtype)


@op("pack_weight(Tensor b) -> Tensor")
def _(b):
    va.check_tensor("pack_weight", "b", b, torch.int8, (None, None))
    va.check(b.numel() > 0, "pack_weight", "at least one weight", tuple(b.shape))
    return lambda: empty_int8(b, -(-b.shape[0] // PANEL), -(-b.shape[1] // K_GROUP) + 1, PANEL, K_GROUP)


def pack_weight(b: Tensor) -> Tensor:
    """Weights (N, K) int8 in the panel layout that CPU kernels read (see `vqvit.reference.pack_weight`)."""
    return torch.ops.vqvit.pack_weight(b)


@op("unpack_weight(Tensor packed, int n, int k) -> Tensor")
def _(packed, n, k):
    shape = (-(-n // PANEL), -(-k // K_GROUP) + 1, PANEL, K_GROUP)
    va.check_tensor("unpack_weight", "packed", packed, torch.int8, shape)
    return lambda: empty_int8(packed, n, k)


def unpack_weight(packed: Tensor, n: int, k: int) -> Tensor:
    """The (n, k) int8 weights inside `pack_weight`'s result."""
    return torch.ops.vqvit.unpack_weight(packed, n, k)


NAMES = registered()
"""Every op, in the order of this file."""
