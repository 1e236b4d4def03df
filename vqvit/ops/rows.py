"""Row-wise ops: quantization, LayerNorm, patch extraction."""

import torch
from torch import Tensor

from vqvit import validation as va
from vqvit.numerics import group_count
from vqvit.registry import empty_fp32, empty_int8, empty_sums, op


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


@op("quantize_per_group(Tensor x, Tensor? equalizer=None) -> (Tensor, Tensor)")
def _(x, equalizer=None):
    va.check_rows("quantize_per_group", x, equalizer)
    return lambda: (empty_int8(x, *x.shape), empty_fp32(x, *x.shape[:-1], group_count(x.shape[-1])))


def quantize_per_group(x: Tensor, equalizer: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Dynamic symmetric quantization of each group of 128 columns of a row (numerics §3).

    Args: x float (..., K); equalizer fp32 (K,), multiplied into x first.

    Returns: codes int8 (..., K); scale fp32 (..., ⌈K / 128⌉), NaN where the group holds NaN or
    Inf; its codes are then 0.
    """
    return torch.ops.vqvit.quantize_per_group(x, equalizer)


@op("quantize_static(Tensor x, Tensor scale, Tensor? equalizer=None, bool row_sum=False) -> (Tensor, Tensor, Tensor)")
def _(x, scale, equalizer=None, row_sum=False):
    va.check_rows("quantize_static", x, equalizer)
    va.check_tensor("quantize_static", "scale", scale, torch.float32, (), x)
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


@op("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, bool paper=False) -> Tensor")
def _(x, weight, bias, eps, paper=False):
    va.check_norm("layer_norm", x, weight, bias)
    return lambda: x.new_empty(x.shape)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, paper: bool = False) -> Tensor:
    """LayerNorm over the last dimension, for layers that see more than codes of it: the values that
    `layernorm_quantize` quantizes (numerics §4).

    Args: as in `layernorm_quantize`.

    Returns: (..., K) in x's dtype; a row with NaN or Inf is NaN.
    """
    return torch.ops.vqvit.layer_norm(x, weight, bias, eps, paper)


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
    va.check(divisible, name, f"height and width in multiples of ({patch_height}, {patch_width})", (height, width))
    va.check(channels >= 1, name, "at least one channel", tuple(pixels.shape))
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
