"""The vqvit ops on NumPy arrays: the same kernels, and so the same bits, as `torch.ops.vqvit` on a CPU.

Each takes the arguments of its schema, defaults included, and a number of threads. Every array is contiguous when it
comes here; weights are packed.
"""

import ctypes
import math

import numpy as np

from vqvit import layouts, native

LOG2_E = math.log2(math.e)
GROUP = 128
"""Columns that share a scale where a layer's input has group scales."""

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu")
"""In the order of enum vqvit_activation."""

TERM_BITS = {"none": 0, "paper": 4, "activation": 1, "weight": 2, "full": 7}
"""The bit set `terms` of int8_linear_compensated."""

RESIDUAL_STEPS = 254.0

FP32 = native.DTYPES["float32"]


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def _gemm(a, a_scale, b, b_scale, bias, activation, layer_scale=None, residual=None, zeros=(None,) * 4) -> native.Gemm:
    (m, k), n = a.shape, b_scale.shape[0]
    operands = (a, b, a_scale, b_scale, bias, layer_scale, residual, *zeros)
    sizes = (m, n, k, k, 0 if residual is None else n)
    codes = (layouts.CODES[b.ndim], a_scale.ndim == 2, ACTIVATIONS.index(activation))
    return native.Gemm(*map(_address, operands), *sizes, *codes, *[FP32] * 3)


def reorder_weight(threads: int, weight: np.ndarray, n: int, k: int, target: np.ndarray) -> None:
    """Write the (n, k) codes of `weight` to `target`, each in the layout of its shape (`vqvit.layouts`)."""
    native.run(
        native.cpu().vqvit_cpu_reorder_weight,
        _address(weight), layouts.CODES[weight.ndim], n, k, _address(target), layouts.CODES[target.ndim], threads,
    )  # fmt: skip


def quantize_per_token(threads, x, delta, equalizer, symmetric, row_sum):
    rows, k = x.shape[:-1], x.shape[-1]
    codes, scale = np.empty(x.shape, np.int8), np.empty(rows, np.float32)
    zero_point = np.empty(0 if symmetric else rows, np.int32)
    sums = np.empty(rows if row_sum else 0, np.int32)
    native.run(
        native.cpu().vqvit_cpu_quantize,
        _address(x), FP32, scale.size, k, _address(equalizer), None, delta, symmetric, _address(codes), _address(scale),
        _address(zero_point), _address(sums) if row_sum else None, threads,
    )  # fmt: skip
    return codes, scale, zero_point, sums


def quantize_per_group(threads, x, equalizer):
    rows, k = x.shape[:-1], x.shape[-1]
    codes, scale = np.empty(x.shape, np.int8), np.empty((*rows, -(-k // GROUP)), np.float32)
    native.run(
        native.cpu().vqvit_cpu_quantize_per_group,
        _address(x), FP32, math.prod(rows), k, _address(equalizer), _address(codes), _address(scale), threads,
    )  # fmt: skip
    return codes, scale


def quantize_static(threads, x, scale, equalizer, row_sum):
    rows, k = x.shape[:-1], x.shape[-1]
    codes, row_scale = np.empty(x.shape, np.int8), np.empty(rows, np.float32)
    sums = np.empty(rows if row_sum else 0, np.int32)
    native.run(
        native.cpu().vqvit_cpu_quantize,
        _address(x), FP32, row_scale.size, k, _address(equalizer), _address(scale), 0.0, True, _address(codes),
        _address(row_scale), None, _address(sums) if row_sum else None, threads,
    )  # fmt: skip
    return codes, row_scale, sums


def layer_norm(threads, x, weight, bias, eps, paper):
    y, k = np.empty(x.shape, np.float32), x.shape[-1]
    native.run(
        native.cpu().vqvit_cpu_layer_norm,
        _address(x), FP32, _address(weight), _address(bias), x.size // k, k, eps, paper, _address(y), threads,
    )  # fmt: skip
    return y


def layernorm_quantize(threads, x, weight, bias, eps, delta, scale, row_sum, paper):
    rows, k = x.shape[:-1], x.shape[-1]
    codes, row_scale = np.empty(x.shape, np.int8), np.empty(rows, np.float32)
    sums = np.empty(rows if row_sum else 0, np.int32)
    native.run(
        native.cpu().vqvit_cpu_layernorm_quantize,
        _address(x), FP32, None, FP32, None, _address(weight), _address(bias), row_scale.size, k, eps, paper, delta,
        _address(scale), _address(codes), _address(row_scale), _address(sums) if row_sum else None, None, threads,
    )  # fmt: skip
    return codes, row_scale, sums


def patchify_quantize(threads, pixels, patch_height, patch_width, equalizer):
    batch, channels, height, width = pixels.shape
    rows, k = batch * (height // patch_height) * (width // patch_width), channels * patch_height * patch_width
    codes, scale = np.empty((rows, k), np.int8), np.empty(rows, np.float32)
    native.run(
        native.cpu().vqvit_cpu_patchify_quantize,
        _address(pixels), FP32, batch, channels, height, width, patch_height, patch_width, _address(equalizer),
        _address(codes), _address(scale), threads,
    )  # fmt: skip
    return codes, scale


def int8_linear(
    threads, a, a_scale, b, b_scale, bias, activation, layer_scale, residual, a_zero, a_sum, b_zero, b_sum, _dtype
):
    zeros = (a_zero, a_sum, b_zero, b_sum)
    gemm = _gemm(a, a_scale, b, b_scale, bias, activation, layer_scale, residual, zeros)
    out = np.empty((gemm.m, gemm.n), np.float32)
    native.run(native.cpu().vqvit_cpu_int8_linear, gemm, _address(out), FP32, threads)
    return out


def quantize_residual(threads, x, codes, scale):
    out = np.empty(codes.shape, np.int8)
    function = native.cpu().vqvit_cpu_quantize_residual
    rows, k = scale.size, x.shape[-1]
    native.run(function, _address(x), FP32, _address(codes), _address(scale), rows, k, _address(out), threads)
    return out


def int8_linear_compensated(
    threads, a, a_scale, a_residual, b, b_scale, b_residual, bias, mode, mu, activation, layer_scale, residual, _dtype
):
    gemm = _gemm(a, a_scale, b, b_scale, bias, activation, layer_scale, residual)
    out = np.empty((gemm.m, gemm.n), np.float32)
    native.run(
        native.cpu().vqvit_cpu_int8_linear_compensated,
        gemm, _address(a_residual), _address(b_residual), TERM_BITS[mode], 1 / RESIDUAL_STEPS, mu / RESIDUAL_STEPS**2,
        _address(out), FP32, threads,
    )  # fmt: skip
    return out


def int8_linear_quantize(
    threads, a, a_scale, b, b_scale, bias, activation, a_zero, a_sum, b_zero, b_sum, out_scale, symmetric, row_sum,
    per_group,
):  # fmt: skip
    gemm = _gemm(a, a_scale, b, b_scale, bias, activation, zeros=(a_zero, a_sum, b_zero, b_sum))
    m, n = gemm.m, gemm.n
    codes = np.empty((m, n), np.int8)
    scale = np.empty((m, -(-n // GROUP)) if per_group else m, np.float32)
    zero_point, sums = np.empty(0 if symmetric else m, np.int32), np.empty(m if row_sum else 0, np.int32)
    native.run(
        native.cpu().vqvit_cpu_int8_linear_quantize,
        gemm, _address(out_scale), symmetric, per_group, _address(codes), _address(scale), _address(zero_point),
        _address(sums) if row_sum else None, threads,
    )  # fmt: skip
    return codes, scale, zero_point, sums


def int8_linear_qkv(threads, a, a_scale, b, b_scale, bias, tokens, num_heads, a_zero, a_sum, b_zero, b_sum):
    gemm = _gemm(a, a_scale, b, b_scale, bias, "none", zeros=(a_zero, a_sum, b_zero, b_sum))
    outputs = _empty_qkv(gemm.m // tokens, num_heads, tokens, gemm.n // (3 * num_heads))
    native.run(native.cpu().vqvit_cpu_int8_linear_qkv, gemm, tokens, num_heads, *map(_address, outputs), threads)
    return outputs


def int8_attention(threads, q, k, v, q_scale, k_scale, v_scale, sm_scale, _dtype):
    batch, heads, queries, width = q.shape
    out = np.empty((batch, queries, heads * width), np.float32)
    native.run(
        native.cpu().vqvit_cpu_int8_attention,
        *map(_address, (q, k, v, q_scale, k_scale, v_scale)), sm_scale * LOG2_E, batch, heads, queries, k.shape[2],
        width, _address(out), FP32, threads,
    )  # fmt: skip
    return out


def int8_attention_quantize(threads, q, k, v, q_scale, k_scale, v_scale, sm_scale):
    attended = int8_attention(threads, q, k, v, q_scale, k_scale, v_scale, sm_scale, None)
    return quantize_per_group(threads, attended.reshape(-1, attended.shape[-1]), None)


def quantize_qkv(threads, qkv, num_heads):
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * num_heads)
    outputs = _empty_qkv(batch, num_heads, tokens, head_dim)
    function = native.cpu().vqvit_cpu_quantize_qkv
    native.run(function, _address(qkv), FP32, batch, tokens, num_heads, head_dim, *map(_address, outputs), threads)
    return outputs


def _empty_qkv(batch: int, heads: int, tokens: int, head_dim: int) -> tuple[np.ndarray, ...]:
    codes = (np.empty((batch, heads, tokens, head_dim), np.int8) for _ in range(3))
    scales = (np.empty((batch, heads, size), np.float32) for size in (tokens, tokens, head_dim))
    return *codes, *scales


def encoder_block(
    num_heads, sm_scale, norm1_weight, norm1_bias, eps1, norm2_weight, norm2_bias, eps2, qkv, qkv_scale, qkv_bias,
    attn_out, attn_out_scale, attn_out_bias, fc1, fc1_scale, fc1_bias, fc2, fc2_scale, fc2_bias, layer_scale1,
    layer_scale2, activation, qkv_delta, attn_out_delta, fc1_delta, attn_out_groups, fc2_groups, leading_tokens=None,
) -> tuple[native.EncoderBlock, int | None]:  # fmt: skip
    """The arguments of `int8_encoder_block` but its input, as the kernel reads them; made once when a model is loaded.

    The caller keeps the arrays alive.
    """
    operands = (
        norm1_weight, norm1_bias, norm2_weight, norm2_bias, qkv, qkv_scale, qkv_bias, attn_out, attn_out_scale,
        attn_out_bias, layer_scale1, fc1, fc1_scale, fc1_bias, fc2, fc2_scale, fc2_bias, layer_scale2,
    )  # fmt: skip
    width, head_dim, hidden = norm1_weight.size, qkv_scale.size // (3 * num_heads), fc1_scale.size
    block = native.EncoderBlock(
        *map(_address, operands), width, num_heads, head_dim, hidden, eps1, eps2, sm_scale * LOG2_E, qkv_delta,
        attn_out_delta, fc1_delta, ACTIVATIONS.index(activation),
        *(layouts.CODES[b.ndim] for b in (qkv, attn_out, fc1, fc2)), attn_out_groups, fc2_groups,
    )  # fmt: skip
    return block, leading_tokens


def run_encoder_block(
    threads: int, block: native.EncoderBlock, leading_tokens: int | None, over_input: bool, x: np.ndarray
) -> np.ndarray:
    """The block's result: in x's memory where `over_input` says that nobody else reads it, and it fits."""
    batch, tokens, width = x.shape
    leading = tokens if leading_tokens is None else leading_tokens
    out = x if over_input and leading == tokens else np.empty((batch, leading, width), np.float32)
    function = native.cpu().vqvit_cpu_int8_encoder_block
    native.run(function, ctypes.byref(block), _address(x), FP32, batch, tokens, leading, _address(out), threads)
    return out


OPS = {
    f"vqvit.{function.__name__}.default": function
    for function in (
        quantize_per_token, quantize_per_group, quantize_static, quantize_residual, layer_norm, layernorm_quantize,
        patchify_quantize, int8_linear, int8_linear_quantize, int8_linear_qkv, int8_linear_compensated, int8_attention,
        int8_attention_quantize, quantize_qkv,
    )
}  # fmt: skip
"""By the name that `torch.export` gives them; all but the encoder block, which `Session` prepares."""

ENCODER_BLOCK = "vqvit.int8_encoder_block.default"
