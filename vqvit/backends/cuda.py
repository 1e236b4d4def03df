"""The `cuda` backend: the CUDA C++ kernels of csrc/cuda, on NVIDIA GPUs from compute capability 7.5 on.

Signatures and results are those of `vqvit.reference`, bit for bit. Work is queued on torch's current stream. With
VQVIT_CUDA_TWIN=1 the same kernels, compiled for the host, run on CPU tensors: slowly, for tests.
"""

import contextlib
import functools
import sys

import torch

from vqvit import native, reference
from vqvit import numerics as nm
from vqvit.backends.operands import DTYPES, TERM_BITS, contiguous, dtype_code, int32, native_gemm, pointer, row_major
from vqvit.kernels.devices import CUDA_MIN_CAPABILITY, too_old
from vqvit.native import run
from vqvit.reference import pack_weight, unpack_weight  # noqa: F401  (a layout for CPUs: one implementation)

PROJECTION_HEAD_DIMS = (32, 64, 128)
"""Heads whose codes the projection's epilogue makes; others take `int8_linear` and `quantize_qkv`."""

ATTENTION_CODE_KEYS = {64: nm.MAX_KEYS, 128: 208}
"""Most keys, by head dimension, for which attention stores codes itself; else `quantize_per_group` follows it."""


def unavailable() -> str | None:
    """Why this backend cannot run here, or None if it can."""
    if not native.emulating_cuda():
        if not torch.cuda.is_available():
            return "torch sees no CUDA device, and VQVIT_CUDA_TWIN=1 is not set"
        capability = torch.cuda.get_device_capability()
        if capability < CUDA_MIN_CAPABILITY:
            return too_old(capability, CUDA_MIN_CAPABILITY)
    return native.cuda_unavailable()


def device_types() -> tuple[str, ...]:
    """Devices whose tensors the kernels take."""
    return ("cpu",) if native.emulating_cuda() else ("cuda",)


def _on_stream(function):
    """Run `function` with its first tensor's device current, where the kernels are launched."""

    @functools.wraps(function)
    def launched(first, *args, **kwargs):
        other_device = first.is_cuda and first.device.index != torch.cuda.current_device()
        with torch.cuda.device(first.device) if other_device else contextlib.nullcontext():
            return function(first, *args, **kwargs)

    return launched


def _call(name: str, *args) -> None:
    """vqvit_cuda_<name>(args..., torch's current stream)."""
    stream = None if native.emulating_cuda() else torch.cuda.current_stream().cuda_stream
    run(getattr(native.cuda(), f"vqvit_cuda_{name}"), *args, stream)


@_on_stream
def quantize_per_token(x, delta=0.0, equalizer=None, symmetric=True, row_sum=False):
    return _quantize(x, None, delta, equalizer, symmetric, row_sum)


@_on_stream
def quantize_per_group(x, equalizer=None):
    rows = _rows(x)
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty((*x.shape[:-1], nm.group_count(x.shape[-1])), dtype=torch.float32)
    _call("quantize_per_group", *_matrix(rows), pointer(contiguous(equalizer)), pointer(codes), pointer(scale))
    return codes, scale


@_on_stream
def quantize_static(x, scale, equalizer=None, row_sum=False):
    codes, row_scale, _, sums = _quantize(x, scale, 0.0, equalizer, True, row_sum)
    return codes, row_scale, sums


@_on_stream
def quantize_residual(x, codes, scale):
    rows, codes, scale = _rows(x), codes.contiguous(), scale.contiguous()
    residual_codes = torch.empty_like(codes)
    _call("quantize_residual", *_matrix(rows), pointer(codes), pointer(scale), pointer(residual_codes))
    return residual_codes


@_on_stream
def layer_norm(x, weight, bias, eps, paper=False):
    rows, weight, bias = _rows(x), contiguous(weight), contiguous(bias)
    y = x.new_empty(x.shape)
    _call(
        "layer_norm", pointer(rows), dtype_code(rows), rows.stride(0), pointer(weight), dtype_code(weight),
        pointer(bias), dtype_code(bias), *rows.shape, eps, paper, pointer(y),
    )  # fmt: skip
    return y


@_on_stream
def layernorm_quantize(x, weight, bias, eps, delta=0.0, scale=None, row_sum=False, paper=False):
    return _layernorm_quantize(x, None, weight, bias, eps, None, delta, scale, row_sum, paper)[:3]


@_on_stream
def add_layernorm_quantize(
    x, residual, weight, bias, eps, layer_scale=None, delta=0.0, scale=None, row_sum=False, paper=False
):
    return _layernorm_quantize(x, residual, weight, bias, eps, layer_scale, delta, scale, row_sum, paper)


@_on_stream
def patchify_quantize(pixels, patch_height, patch_width, equalizer=None):
    batch, channels, height, width = pixels.shape
    rows = batch * (height // patch_height) * (width // patch_width)
    codes = pixels.new_empty((rows, channels * patch_height * patch_width), dtype=torch.int8)
    scale = pixels.new_empty(rows, dtype=torch.float32)
    strides = (native.c_int64 * 4)(*pixels.stride())
    _call(
        "patchify_quantize", pointer(pixels), dtype_code(pixels), batch, channels, height, width, strides,
        patch_height, patch_width, pointer(contiguous(equalizer)), pointer(codes), pointer(scale),
    )  # fmt: skip
    return codes, scale


@_on_stream
def quantize_qkv(qkv, num_heads):
    qkv = row_major(qkv)
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * num_heads)
    codes = [qkv.new_empty((batch, num_heads, tokens, head_dim), dtype=torch.int8) for _ in range(3)]
    scales = [qkv.new_empty((batch, num_heads, size), dtype=torch.float32) for size in (tokens, tokens, head_dim)]
    _call(
        "quantize_qkv", pointer(qkv), dtype_code(qkv), batch, tokens, num_heads, head_dim, qkv.stride(0),
        qkv.stride(1), *map(pointer, codes), *map(pointer, scales),
    )  # fmt: skip
    return *codes, *scales


@_on_stream
def int8_mm(a, b):
    acc = a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)
    gemm, operands = native_gemm(row_major(a), b.contiguous())
    _call("int8_mm", gemm, pointer(acc))
    del operands
    return acc


@_on_stream
def int8_linear(
    a, a_scale, b, b_scale, bias=None, activation="none", layer_scale=None, residual=None,
    a_zero=None, a_sum=None, b_zero=None, b_sum=None, out_dtype=torch.float32,
):  # fmt: skip
    zero_points = (a_zero, a_sum, b_zero, b_sum)
    gemm, operands = _gemm(a, a_scale, b, b_scale, bias, layer_scale, residual, zero_points, activation)
    out = a.new_empty((gemm.m, gemm.n), dtype=out_dtype)
    _call("int8_linear", gemm, pointer(out), DTYPES[out_dtype])
    del operands
    return out


@_on_stream
def int8_linear_quantize(
    a, a_scale, b, b_scale, bias=None, activation="none",
    a_zero=None, a_sum=None, b_zero=None, b_sum=None, out_scale=None, symmetric=True, row_sum=False,
    per_group=False,
):  # fmt: skip
    zero_points = (a_zero, a_sum, b_zero, b_sum)
    if out_scale is None and not per_group:  # a row's scale needs all of its tiles: fp32 through memory
        y = int8_linear(a, a_scale, b, b_scale, bias, activation, None, None, *zero_points)
        return _quantize(y, None, 0.0, None, symmetric, row_sum)
    gemm, operands = _gemm(a, a_scale, b, b_scale, bias, None, None, zero_points, activation)
    codes = a.new_empty((gemm.m, gemm.n), dtype=torch.int8)
    scale = a.new_empty((gemm.m, nm.group_count(gemm.n)) if per_group else gemm.m, dtype=torch.float32)
    sums = int32(a, (gemm.m,), row_sum)
    _call(
        "int8_linear_quantize", gemm, pointer(out_scale), pointer(codes), pointer(scale),
        pointer(sums) if row_sum else None,
    )  # fmt: skip
    del operands
    return codes, scale, int32(a, (), False), sums


@_on_stream
def int8_linear_qkv(a, a_scale, b, b_scale, bias, tokens, num_heads, a_zero=None, a_sum=None, b_zero=None, b_sum=None):
    zero_points = (a_zero, a_sum, b_zero, b_sum)
    m, head_dim = a.shape[0], b_scale.shape[0] // (3 * num_heads)
    images = m // tokens
    if head_dim not in PROJECTION_HEAD_DIMS:
        y = int8_linear(a, a_scale, b, b_scale, bias, "none", None, None, *zero_points)
        return quantize_qkv(y.view(images, tokens, y.shape[1]), num_heads)
    gemm, operands = _gemm(a, a_scale, b, b_scale, bias, None, None, zero_points, "none")
    codes = a.new_empty((3, images, num_heads, tokens, head_dim), dtype=torch.int8)
    scale = a.new_empty((2, images, num_heads, tokens), dtype=torch.float32)
    v = a.new_empty((images, tokens, num_heads, head_dim), dtype=torch.float32)
    v_scale = a.new_empty((images, num_heads, head_dim), dtype=torch.float32)
    _call("int8_linear_qkv", gemm, tokens, num_heads, pointer(codes), pointer(scale), pointer(v))
    _call("quantize_values", pointer(v), images, tokens, num_heads, head_dim, pointer(codes[2]), pointer(v_scale))
    del operands
    return *codes, *scale, v_scale


@_on_stream
def int8_linear_compensated(
    a, a_scale, a_residual, b, b_scale, b_residual, bias=None, mode="full", mu=1.0, activation="none",
    layer_scale=None, residual=None, out_dtype=torch.float32,
):  # fmt: skip
    a, a_residual = a.contiguous(), contiguous(a_residual)
    b, b_residual = _plain(b, b_scale, a), None if b_residual is None else _plain(b_residual, b_scale, a)
    gemm, operands = native_gemm(a, b, a_scale, b_scale, bias, layer_scale, contiguous(residual), activation=activation)
    out = a.new_empty((gemm.m, gemm.n), dtype=out_dtype)
    _call(
        "int8_linear_compensated", gemm, pointer(a_residual), pointer(b_residual), TERM_BITS[mode],
        1 / nm.RESIDUAL_STEPS, mu / nm.RESIDUAL_STEPS**2, pointer(out), DTYPES[out_dtype],
    )  # fmt: skip
    del operands
    return out


@_on_stream
def int8_attention(q, k, v, q_scale, k_scale, v_scale, sm_scale, out_dtype=torch.float32):
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1] * q.shape[3]), dtype=out_dtype)
    operands, sizes = _attention(q, k, v, q_scale, k_scale, v_scale, sm_scale)
    _call("int8_attention", *map(pointer, operands), *sizes, pointer(out), DTYPES[out_dtype])
    return out


@_on_stream
def int8_attention_quantize(q, k, v, q_scale, k_scale, v_scale, sm_scale):
    batch, heads, queries, head_dim = q.shape
    if k.shape[2] > ATTENTION_CODE_KEYS.get(head_dim, 0):
        return quantize_per_group(int8_attention(q, k, v, q_scale, k_scale, v_scale, sm_scale).flatten(0, 1))
    codes = q.new_empty((batch * queries, heads * head_dim), dtype=torch.int8)
    scale = q.new_empty((batch * queries, nm.group_count(heads * head_dim)), dtype=torch.float32)
    operands, sizes = _attention(q, k, v, q_scale, k_scale, v_scale, sm_scale)
    _call("int8_attention_quantize", *map(pointer, operands), *sizes, pointer(codes), pointer(scale))
    return codes, scale


int8_encoder_block = functools.partial(reference.compose_encoder_block, sys.modules[__name__])


def _rows(x):
    """x (..., K) as a matrix whose rows have adjacent elements."""
    return row_major(x.reshape(-1, x.shape[-1]))


def _matrix(rows):
    """Data, dtype, rows, columns and row stride, as the C ABI takes them."""
    return pointer(rows), dtype_code(rows), *rows.shape, rows.stride(0)


def _quantize(x, static_scale, delta, equalizer, symmetric, row_sum):
    rows, equalizer, shape = _rows(x), contiguous(equalizer), x.shape[:-1]
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(shape, dtype=torch.float32)
    zero_point, sums = int32(x, shape, not symmetric), int32(x, shape, row_sum)
    _call(
        "quantize", *_matrix(rows), pointer(equalizer), pointer(static_scale), delta, symmetric, pointer(codes),
        pointer(scale), pointer(zero_point), pointer(sums) if row_sum else None,
    )  # fmt: skip
    return codes, scale, zero_point, sums


def _layernorm_quantize(x, residual, weight, bias, eps, layer_scale, delta, static_scale, row_sum, paper):
    rows, shape, k = _rows(x), x.shape[:-1], x.shape[-1]
    weight, bias, layer_scale = contiguous(weight), contiguous(bias), contiguous(layer_scale)
    residual_rows, stream = None, None
    if residual is not None:
        residual_rows = _rows(residual)
        stream = torch.empty_like(residual, memory_format=torch.contiguous_format)
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(shape, dtype=torch.float32)
    sums = int32(x, shape, row_sum)
    vectors = (part for vector in (layer_scale, weight, bias) for part in (pointer(vector), dtype_code(vector)))
    _call(
        "layernorm_quantize", pointer(rows), dtype_code(rows), rows.stride(0), pointer(residual_rows),
        dtype_code(residual_rows), 0 if residual is None else residual_rows.stride(0), *vectors, rows.shape[0], k, eps,
        paper, delta, pointer(static_scale), pointer(codes), pointer(scale), pointer(sums) if row_sum else None,
        pointer(stream),
    )  # fmt: skip
    return codes, scale, sums, stream


def _gemm(a, a_scale, b, b_scale, bias, layer_scale, residual, zero_points, activation):
    vectors = (bias, layer_scale, row_major(residual))
    return native_gemm(row_major(a), _plain(b, b_scale, a), a_scale, b_scale, *vectors, *zero_points, activation)


def _plain(b, b_scale, a):
    """Weights (N, K), contiguous, from plain or packed ones."""
    return unpack_weight(b, b_scale.shape[0], a.shape[1]) if b.dim() > 2 else b.contiguous()


def _attention(q, k, v, q_scale, k_scale, v_scale, sm_scale):
    """The operands, contiguous, and the factor of the logits and the sizes that follow them in the C ABI."""
    batch, heads, queries, head_dim = q.shape
    operands = [t.contiguous() for t in (q, k, v, q_scale, k_scale, v_scale)]
    return operands, (sm_scale * nm.LOG2_E, batch, heads, queries, k.shape[2], head_dim)
