"""The `triton` backend: the kernels of `kernels/`, on NVIDIA GPUs or, with TRITON_INTERPRET=1, interpreted on the CPU.

Signatures and results are those of `vqvit.reference`, bit for bit. Triton is imported on first use.
"""

import functools
import importlib
import importlib.util
import os
import sys
from types import ModuleType

import torch

from vqvit import native, reference
from vqvit.kernels.devices import MIN_CAPABILITY, too_old
from vqvit.reference import pack_weight, unpack_weight  # noqa: F401  (a layout for CPUs: one implementation)

TABLES = "tuned"
"""Folder of the cache that holds the tables of `vqvit tune`."""


def unavailable() -> str | None:
    """Why this backend cannot run here, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if _interpreting():
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device, and TRITON_INTERPRET=1 is not set"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return too_old(capability, MIN_CAPABILITY)
    return None


def device_types() -> tuple[str, ...]:
    """Devices whose tensors the kernels take."""
    return ("cuda", "cpu") if _interpreting() else ("cuda",)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _kernels(family: str) -> ModuleType:
    importlib.import_module("vqvit.kernels.tuned").search(native.cache_directory() / TABLES)
    return importlib.import_module(f"vqvit.kernels.{family}")


def _unpacked(b, b_scale, a):
    return unpack_weight(b, b_scale.shape[0], a.shape[1]) if b.dim() > 2 else b


def quantize_per_token(x, delta=0.0, equalizer=None, symmetric=True, row_sum=False):
    return _kernels("quantize").quantize_per_token(x, delta, equalizer, symmetric, row_sum)


def quantize_per_group(x, equalizer=None):
    return _kernels("quantize").quantize_per_group(x, equalizer)


def quantize_static(x, scale, equalizer=None, row_sum=False):
    return _kernels("quantize").quantize_static(x, scale, equalizer, row_sum)


def layer_norm(x, weight, bias, eps, paper=False):
    return _kernels("layernorm_quantize").layer_norm(x, weight, bias, eps, paper)


def layernorm_quantize(x, weight, bias, eps, delta=0.0, scale=None, row_sum=False, paper=False):
    return _kernels("layernorm_quantize").layernorm_quantize(x, weight, bias, eps, delta, scale, row_sum, paper)


def add_layernorm_quantize(
    x, residual, weight, bias, eps, layer_scale=None, delta=0.0, scale=None, row_sum=False, paper=False
):
    return _kernels("layernorm_quantize").add_layernorm_quantize(
        x, residual, weight, bias, eps, layer_scale, delta, scale, row_sum, paper
    )


def patchify_quantize(pixels, patch_height, patch_width, equalizer=None):
    return _kernels("quantize").patchify_quantize(pixels, patch_height, patch_width, equalizer)


def int8_mm(a, b):
    return _kernels("gemm_s8").int8_mm(a, b)


def int8_linear(
    a, a_scale, b, b_scale, bias=None, activation="none", layer_scale=None, residual=None,
    a_zero=None, a_sum=None, b_zero=None, b_sum=None, out_dtype=torch.float32,
):  # fmt: skip
    b = _unpacked(b, b_scale, a)
    return _kernels("gemm_s8").int8_linear(
        a, a_scale, b, b_scale, bias, activation, layer_scale, residual, a_zero, a_sum, b_zero, b_sum, out_dtype
    )


def int8_linear_quantize(
    a, a_scale, b, b_scale, bias=None, activation="none",
    a_zero=None, a_sum=None, b_zero=None, b_sum=None, out_scale=None, symmetric=True, row_sum=False,
    per_group=False,
):  # fmt: skip
    b = _unpacked(b, b_scale, a)
    return _kernels("gemm_s8").int8_linear_quantize(
        a,
        a_scale,
        b,
        b_scale,
        bias,
        activation,
        a_zero,
        a_sum,
        b_zero,
        b_sum,
        out_scale,
        symmetric,
        row_sum,
        per_group,
    )


def int8_linear_qkv(a, a_scale, b, b_scale, bias, tokens, num_heads, a_zero=None, a_sum=None, b_zero=None, b_sum=None):
    b = _unpacked(b, b_scale, a)
    return _kernels("gemm_s8").int8_linear_qkv(
        a, a_scale, b, b_scale, bias, tokens, num_heads, a_zero, a_sum, b_zero, b_sum
    )


def int8_attention_quantize(q, k, v, q_scale, k_scale, v_scale, sm_scale):
    return _kernels("attention_s8").int8_attention_quantize(q, k, v, q_scale, k_scale, v_scale, sm_scale)


def quantize_residual(x, codes, scale):
    return _kernels("quantize").quantize_residual(x, codes, scale)


def int8_linear_compensated(
    a, a_scale, a_residual, b, b_scale, b_residual, bias=None, mode="full", mu=1.0, activation="none",
    layer_scale=None, residual=None, out_dtype=torch.float32,
):  # fmt: skip
    terms = reference.COMPENSATION_TERMS[mode]
    b, b_residual = _unpacked(b, b_scale, a), None if b_residual is None else _unpacked(b_residual, b_scale, a)
    return _kernels("gemm_s8_compensated").int8_linear_compensated(
        a, a_scale, a_residual, b, b_scale, b_residual, bias, terms, mu, activation, layer_scale, residual, out_dtype
    )


def quantize_qkv(qkv, num_heads):
    return _kernels("quantize_qkv").quantize_qkv(qkv, num_heads)


def int8_attention(q, k, v, q_scale, k_scale, v_scale, sm_scale, out_dtype=torch.float32):
    return _kernels("attention_s8").int8_attention(q, k, v, q_scale, k_scale, v_scale, sm_scale, out_dtype)


int8_encoder_block = functools.partial(reference.compose_encoder_block, sys.modules[__name__])
