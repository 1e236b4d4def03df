"""Tensors as arguments of the C ABI (csrc/vqvit.h), for the backends on native libraries."""

import torch
from torch import Tensor

from vqvit import layouts, native
from vqvit import numerics as nm
from vqvit.reference import COMPENSATION_TERMS

ACTIVATION = {name: i for i, name in enumerate(nm.ACTIVATIONS)}
"""enum vqvit_activation."""

DTYPES = {getattr(torch, name): code for name, code in native.DTYPES.items()}
"""enum vqvit_dtype."""

TERM_BITS = {mode: sum(bit << i for i, bit in enumerate(terms)) for mode, terms in COMPENSATION_TERMS.items()}
"""The bit set `terms` of int8_linear_compensated."""


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def dtype_code(tensor: Tensor | None) -> int:
    """enum vqvit_dtype; that of an absent tensor is not read."""
    return 0 if tensor is None else DTYPES[tensor.dtype]


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def fp32(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.float().contiguous()


def row_major(tensor: Tensor | None) -> Tensor | None:
    """`tensor` itself if the elements of a row are adjacent (rows may lie apart), else a contiguous copy."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def int32(like: Tensor, shape, wanted: bool) -> Tensor:
    """An int32 output, empty unless it was asked for."""
    return like.new_empty(shape if wanted else 0, dtype=torch.int32)


def native_gemm(
    a, b, a_scale=None, b_scale=None, bias=None, layer_scale=None, residual=None,
    a_zero=None, a_sum=None, b_zero=None, b_sum=None, activation="none",
):  # fmt: skip
    """struct vqvit_gemm of row-major a, b and residual, and the tensors that its pointers need alive."""
    m, k = a.shape
    vectors = (a_scale, b_scale, bias, layer_scale, a_zero, a_sum, b_zero, b_sum)
    a_scale, b_scale, bias, layer_scale, a_zero, a_sum, b_zero, b_sum = (contiguous(v) for v in vectors)
    operands = (a, b, a_scale, b_scale, bias, layer_scale, residual, a_zero, a_sum, b_zero, b_sum)
    n = b.shape[0] if b_scale is None else b_scale.shape[0]
    sizes = (m, n, k, a.stride(0), 0 if residual is None else residual.stride(0))
    grouped = a_scale is not None and a_scale.dim() == 2
    codes = (layouts.CODES[b.dim()], grouped, ACTIVATION[activation])
    dtypes = (dtype_code(t) for t in (bias, layer_scale, residual))
    return native.Gemm(*map(pointer, operands), *sizes, *codes, *dtypes), operands
