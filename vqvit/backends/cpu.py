"""The `cpu` backend: each op of `vqvit.reference` on the C++ kernels of csrc/cpu, bit for bit the same results.

Kernels read contiguous rows; other layouts are copied first. Small per-channel operands are converted to fp32 here,
activations and residuals are read in their own dtype. The number of threads is torch's.

Threads of OpenMP, which PyTorch's own operations use, do not survive a fork: a child would wait for them for ever. One
that is forked once ops have run here starts with one thread (`torch.set_num_threads`).
"""

import logging
import os

import torch

from vqvit import layouts, native
from vqvit import numerics as nm
from vqvit.backends.operands import (
    ACTIVATION,
    DTYPES,
    TERM_BITS,
    contiguous,
    dtype_code,
    fp32,
    int32,
    native_gemm,
    pointer,
    row_major,
)

logger = logging.getLogger("vqvit")

_threads_before_fork: int | None = None
"""In a forked child, until it has been told: how many threads its parent had."""


def _begin_child() -> None:
    global _threads_before_fork
    if torch.get_num_threads() > 1:
        _threads_before_fork = torch.get_num_threads()
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_child)


def run(function, *args) -> None:
    """`native.run`, and a word, once, on the threads of a forked child."""
    global _threads_before_fork
    if _threads_before_fork is not None:
        logger.warning(
            "forked after use: PyTorch runs on 1 thread in this process, on %d in its parent, for OpenMP's threads do "
            "not survive a fork; processes that are spawned have their own",
            _threads_before_fork,
        )
        _threads_before_fork = None
    native.run(function, *args)


def unavailable() -> str | None:
    """Why the native library cannot be used, or None if it can."""
    return native.cpu_unavailable()


def device_types() -> tuple[str, ...]:
    return ("cpu",)


def available_isas() -> tuple[str, ...]:
    """Instruction sets that this machine runs, best last, out of scalar, avx2, avx_vnni and avx512_vnni."""
    return native.cpu_isa_available()


def isa() -> str:
    """Instruction set in use."""
    return native.cpu_isa()


def set_isa(name: str | None) -> None:
    """Force an instruction set for the whole process; None returns to the best available one."""
    encoded = None if name is None else name.encode()
    if native.cpu().vqvit_cpu_set_isa(encoded) != 0:
        raise ValueError(f"set_isa: expected {', '.join(available_isas())} or None; got {name!r}")


def quantize_per_token(x, delta=0.0, equalizer=None, symmetric=True, row_sum=False):
    return _quantize(x, None, delta, equalizer, symmetric, row_sum)


def quantize_per_group(x, equalizer=None):
    x, equalizer = x.contiguous(), contiguous(equalizer)
    rows, k = x.shape[:-1], x.shape[-1]
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty((*rows, nm.group_count(k)), dtype=torch.float32)
    run(
        native.cpu().vqvit_cpu_quantize_per_group,
        x.data_ptr(), DTYPES[x.dtype], rows.numel(), k, pointer(equalizer), codes.data_ptr(), scale.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return codes, scale


def quantize_static(x, scale, equalizer=None, row_sum=False):
    codes, row_scale, _, sums = _quantize(x, scale, 0.0, equalizer, True, row_sum)
    return codes, row_scale, sums


def layer_norm(x, weight, bias, eps, paper=False):
    x, weight, bias = x.contiguous(), fp32(weight), fp32(bias)
    y, k = torch.empty_like(x), x.shape[-1]
    run(
        native.cpu().vqvit_cpu_layer_norm,
        x.data_ptr(), DTYPES[x.dtype], weight.data_ptr(), bias.data_ptr(), x.numel() // k, k, eps, paper, y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def layernorm_quantize(x, weight, bias, eps, delta=0.0, scale=None, row_sum=False, paper=False):
    return _layernorm_quantize(x, None, weight, bias, eps, None, delta, scale, row_sum, paper)[:3]


def add_layernorm_quantize(
    x, residual, weight, bias, eps, layer_scale=None, delta=0.0, scale=None, row_sum=False, paper=False
):
    return _layernorm_quantize(x, residual, weight, bias, eps, layer_scale, delta, scale, row_sum, paper)


def patchify_quantize(pixels, patch_height, patch_width, equalizer=None):
    pixels, equalizer = pixels.contiguous(), contiguous(equalizer)
    batch, channels, height, width = pixels.shape
    rows = batch * (height // patch_height) * (width // patch_width)
    codes = pixels.new_empty((rows, channels * patch_height * patch_width), dtype=torch.int8)
    scale = pixels.new_empty(rows, dtype=torch.float32)
    run(
        native.cpu().vqvit_cpu_patchify_quantize,
        pixels.data_ptr(), DTYPES[pixels.dtype], batch, channels, height, width, patch_height, patch_width,
        pointer(equalizer), codes.data_ptr(), scale.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return codes, scale


def int8_mm(a, b):
    acc = a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)
    gemm, operands = native_gemm(row_major(a), b.contiguous())
    run(native.cpu().vqvit_cpu_int8_mm, gemm, acc.data_ptr(), torch.get_num_threads())
    del operands
    return acc


def int8_linear(
    a, a_scale, b, b_scale, bias=None, activation="none", layer_scale=None, residual=None,
    a_zero=None, a_sum=None, b_zero=None, b_sum=None, out_dtype=torch.float32,
):  # fmt: skip
    gemm, operands = _gemm(
        a, a_scale, b, b_scale, bias, activation, layer_scale, residual, a_zero, a_sum, b_zero, b_sum
    )
    out = a.new_empty((gemm.m, gemm.n), dtype=out_dtype)
    threads = torch.get_num_threads()
    run(native.cpu().vqvit_cpu_int8_linear, gemm, out.data_ptr(), DTYPES[out_dtype], threads)
    del operands
    return out


def int8_linear_quantize(
    a, a_scale, b, b_scale, bias=None, activation="none",
    a_zero=None, a_sum=None, b_zero=None, b_sum=None, out_scale=None, symmetric=True, row_sum=False,
    per_group=False,
):  # fmt: skip
    gemm, operands = _gemm(a, a_scale, b, b_scale, bias, activation, None, None, a_zero, a_sum, b_zero, b_sum)
    m = gemm.m
    codes = a.new_empty((m, gemm.n), dtype=torch.int8)
    scale = a_scale.new_empty((m, nm.group_count(gemm.n)) if per_group else m)
    zero_point, sums = int32(a, (m,), not symmetric), int32(a, (m,), row_sum)
    run(
        native.cpu().vqvit_cpu_int8_linear_quantize,
        gemm, pointer(out_scale), symmetric, per_group, codes.data_ptr(), scale.data_ptr(), zero_point.data_ptr(),
        sums.data_ptr() if row_sum else None, torch.get_num_threads(),
    )  # fmt: skip
    del operands
    return codes, scale, zero_point, sums


def int8_linear_qkv(a, a_scale, b, b_scale, bias, tokens, num_heads, a_zero=None, a_sum=None, b_zero=None, b_sum=None):
    gemm, operands = _gemm(a, a_scale, b, b_scale, bias, "none", None, None, a_zero, a_sum, b_zero, b_sum)
    outputs = _empty_qkv(a, gemm.m // tokens, num_heads, tokens, gemm.n // (3 * num_heads))
    run(
        native.cpu().vqvit_cpu_int8_linear_qkv,
        gemm, tokens, num_heads, *(t.data_ptr() for t in outputs), torch.get_num_threads(),
    )  # fmt: skip
    del operands
    return outputs


def int8_attention_quantize(q, k, v, q_scale, k_scale, v_scale, sm_scale):
    return quantize_per_group(int8_attention(q, k, v, q_scale, k_scale, v_scale, sm_scale).flatten(0, 1))


def quantize_residual(x, codes, scale):
    x, codes, scale = x.contiguous(), codes.contiguous(), scale.contiguous()
    out = torch.empty_like(codes)
    rows, k = scale.numel(), x.shape[-1]
    run(
        native.cpu().vqvit_cpu_quantize_residual,
        x.data_ptr(), DTYPES[x.dtype], codes.data_ptr(), scale.data_ptr(), rows, k, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def int8_linear_compensated(
    a, a_scale, a_residual, b, b_scale, b_residual, bias=None, mode="full", mu=1.0, activation="none",
    layer_scale=None, residual=None, out_dtype=torch.float32,
):  # fmt: skip
    a = a.contiguous()
    gemm, operands = _gemm(a, a_scale, b, b_scale, bias, activation, layer_scale, residual, None, None, None, None)
    a_residual, b_residual = contiguous(a_residual), contiguous(b_residual)
    out = a.new_empty((gemm.m, gemm.n), dtype=out_dtype)
    run(
        native.cpu().vqvit_cpu_int8_linear_compensated,
        gemm, pointer(a_residual), pointer(b_residual), TERM_BITS[mode], 1 / nm.RESIDUAL_STEPS,
        mu / nm.RESIDUAL_STEPS**2, out.data_ptr(), DTYPES[out_dtype], torch.get_num_threads(),
    )  # fmt: skip
    del operands
    return out


def quantize_qkv(qkv, num_heads):
    qkv = qkv.contiguous()
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * num_heads)
    outputs = _empty_qkv(qkv, batch, num_heads, tokens, head_dim)
    run(
        native.cpu().vqvit_cpu_quantize_qkv,
        qkv.data_ptr(), DTYPES[qkv.dtype], batch, tokens, num_heads, head_dim,
        *(t.data_ptr() for t in outputs), torch.get_num_threads(),
    )  # fmt: skip
    return outputs


def int8_attention(q, k, v, q_scale, k_scale, v_scale, sm_scale, out_dtype=torch.float32):
    batch, heads, queries, width = q.shape
    operands = [t.contiguous() for t in (q, k, v, q_scale, k_scale, v_scale)]
    out = q.new_empty((batch, queries, heads * width), dtype=out_dtype)
    run(
        native.cpu().vqvit_cpu_int8_attention,
        *(t.data_ptr() for t in operands), sm_scale * nm.LOG2_E, batch, heads, queries, k.shape[2], width,
        out.data_ptr(), DTYPES[out_dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def int8_encoder_block(
    x, num_heads, sm_scale, norm1_weight, norm1_bias, eps1, norm2_weight, norm2_bias, eps2,
    qkv, qkv_scale, qkv_bias, attn_out, attn_out_scale, attn_out_bias, fc1, fc1_scale, fc1_bias,
    fc2, fc2_scale, fc2_bias, layer_scale1=None, layer_scale2=None, activation="gelu",
    qkv_delta=0.0, attn_out_delta=0.0, fc1_delta=0.0, attn_out_groups=False, fc2_groups=False, leading_tokens=None,
):  # fmt: skip
    block, operands = encoder_block(
        num_heads, sm_scale, norm1_weight, norm1_bias, eps1, norm2_weight, norm2_bias, eps2, qkv, qkv_scale, qkv_bias,
        attn_out, attn_out_scale, attn_out_bias, fc1, fc1_scale, fc1_bias, fc2, fc2_scale, fc2_bias, layer_scale1,
        layer_scale2, activation, qkv_delta, attn_out_delta, fc1_delta, attn_out_groups, fc2_groups,
    )  # fmt: skip
    out = run_encoder_block(block, x, leading_tokens)
    del operands
    return out


def encoder_block(
    num_heads, sm_scale, norm1_weight, norm1_bias, eps1, norm2_weight, norm2_bias, eps2,
    qkv, qkv_scale, qkv_bias, attn_out, attn_out_scale, attn_out_bias, fc1, fc1_scale, fc1_bias,
    fc2, fc2_scale, fc2_bias, layer_scale1=None, layer_scale2=None, activation="gelu",
    qkv_delta=0.0, attn_out_delta=0.0, fc1_delta=0.0, attn_out_groups=False, fc2_groups=False,
):  # fmt: skip
    """struct vqvit_encoder_block, and the tensors that its pointers need alive."""
    width, head_dim, hidden = norm1_weight.shape[0], qkv_scale.shape[0] // (3 * num_heads), fc1_scale.shape[0]
    codes = [b.contiguous() for b in (qkv, attn_out, fc1, fc2)]
    floats = (
        norm1_weight, norm1_bias, norm2_weight, norm2_bias, qkv_scale, qkv_bias, attn_out_scale, attn_out_bias,
        layer_scale1, fc1_scale, fc1_bias, fc2_scale, fc2_bias, layer_scale2,
    )  # fmt: skip
    floats = [fp32(t) for t in floats]
    operands = [
        *floats[:4], codes[0], *floats[4:6], codes[1], *floats[6:9], codes[2], *floats[9:11], codes[3], *floats[11:],
    ]  # fmt: skip
    block = native.EncoderBlock(
        *map(pointer, operands), width, num_heads, head_dim, hidden, eps1, eps2, sm_scale * nm.LOG2_E, qkv_delta,
        attn_out_delta, fc1_delta, ACTIVATION[activation], *(layouts.CODES[b.dim()] for b in codes), attn_out_groups,
        fc2_groups,
    )  # fmt: skip
    return block, operands


def run_encoder_block(block, x, leading_tokens=None):
    """`int8_encoder_block` of x (B, S, D) for a struct of `encoder_block`, whose tensors live."""
    x = x.contiguous()
    batch, tokens, width = x.shape
    leading = tokens if leading_tokens is None else leading_tokens
    out = x.new_empty((batch, leading, width))
    run(
        native.cpu().vqvit_cpu_int8_encoder_block,
        block, x.data_ptr(), DTYPES[x.dtype], batch, tokens, leading, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def pack_weight(b, layout="panels"):
    return _reordered(b, *b.shape, layout)


def unpack_weight(packed, n, k):
    return _reordered(packed, n, k, "rows")


def _reordered(b, n, k, layout):
    b = b.contiguous()
    result = b.new_empty(layouts.shape_of(layout, n, k))
    run(
        native.cpu().vqvit_cpu_reorder_weight,
        b.data_ptr(), layouts.CODES[b.dim()], n, k, result.data_ptr(), layouts.CODES[result.dim()],
        torch.get_num_threads(),
    )  # fmt: skip
    return result


def _empty_qkv(like, batch, heads, tokens, head_dim):
    codes = (like.new_empty((batch, heads, tokens, head_dim), dtype=torch.int8) for _ in range(3))
    scales = (like.new_empty((batch, heads, size), dtype=torch.float32) for size in (tokens, tokens, head_dim))
    return *codes, *scales


def _quantize(x, static_scale, delta, equalizer, symmetric, row_sum):
    x, equalizer = x.contiguous(), contiguous(equalizer)
    rows, k = x.shape[:-1], x.shape[-1]
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(rows, dtype=torch.float32)
    zero_point, sums = int32(x, rows, not symmetric), int32(x, rows, row_sum)
    run(
        native.cpu().vqvit_cpu_quantize,
        x.data_ptr(), DTYPES[x.dtype], scale.numel(), k, pointer(equalizer), pointer(static_scale), delta,
        symmetric, codes.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), sums.data_ptr() if row_sum else None,
        torch.get_num_threads(),
    )  # fmt: skip
    return codes, scale, zero_point, sums


def _layernorm_quantize(x, residual, weight, bias, eps, layer_scale, delta, static_scale, row_sum, paper):
    x, weight, bias, layer_scale = x.contiguous(), fp32(weight), fp32(bias), fp32(layer_scale)
    residual, stream = contiguous(residual), None
    if residual is not None:
        stream = torch.empty_like(residual)
    rows = x.shape[:-1]
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(rows, dtype=torch.float32)
    sums = int32(x, rows, row_sum)
    run(
        native.cpu().vqvit_cpu_layernorm_quantize,
        x.data_ptr(), DTYPES[x.dtype], pointer(residual), dtype_code(residual), pointer(layer_scale),
        weight.data_ptr(), bias.data_ptr(), scale.numel(), x.shape[-1], eps, paper, delta, pointer(static_scale),
        codes.data_ptr(), scale.data_ptr(), sums.data_ptr() if row_sum else None, pointer(stream),
        torch.get_num_threads(),
    )  # fmt: skip
    return codes, scale, sums, stream


def _gemm(a, a_scale, b, b_scale, bias, activation, layer_scale, residual, a_zero, a_sum, b_zero, b_sum):
    """struct vqvit_gemm, and the tensors its pointers need alive."""
    return native_gemm(
        row_major(a), b.contiguous(), a_scale, b_scale, fp32(bias), fp32(layer_scale), contiguous(residual),
        a_zero, a_sum, b_zero, b_sum, activation,
    )  # fmt: skip
