"""The float operations between the kernels, in NumPy: those of PyTorch's ATen that the models' own code uses.

Each takes the arguments of its ATen overload, defaults included. Results agree with PyTorch's to rounding.
"""

import math
import operator

import numpy as np

from vqvit.serving import int8_ops


def view(x, shape):
    return x.reshape(shape)


def permute(x, axes):
    return x.transpose(axes)


def transpose(x, first, second):
    return x.swapaxes(first, second)


def flatten(x, first, last):
    first, last = first % x.ndim, last % x.ndim
    return x.reshape(*x.shape[:first], -1, *x.shape[last + 1 :])


def unflatten(x, axis, sizes):
    axis = axis % x.ndim
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def expand(x, shape, _implicit):
    lead = len(shape) - x.ndim
    return np.broadcast_to(x, [x.shape[i - lead] if size == -1 else size for i, size in enumerate(shape)])


def cat(arrays, axis):
    return np.concatenate(arrays, axis)


def slice_(x, axis, start, end, step):
    index = [slice(None)] * x.ndim
    index[axis] = slice(start, end, step)
    return x[tuple(index)]


def select(x, axis, index):
    return x[(slice(None),) * (axis % x.ndim) + (index,)]


def pad(x, amounts, mode, value):
    """`amounts`: before and after, from the last axis on."""
    if mode != "constant":
        raise ValueError(f"pad: expected mode constant; got {mode!r}")
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))[::-1]
    widths = [(0, 0)] * (x.ndim - len(pairs)) + pairs
    return np.pad(x, widths, constant_values=0.0 if value is None else value)


def add(x, y, alpha):
    return x + y if alpha == 1 else x + alpha * y


def subtract(x, y, alpha):
    return x - y if alpha == 1 else x - alpha * y


def multiply(x, y):
    return x * y


def divide(x, y):
    return x / y


def mean(x, axes, keepdim, _dtype):
    return x.mean(None if axes is None else tuple(axes), keepdims=keepdim)


def total(x, axes, keepdim, dtype):
    """Integers are summed as int64, as PyTorch does."""
    chosen = dtype or ("int64" if np.issubdtype(x.dtype, np.integer) else x.dtype)
    return x.sum(tuple(axes), keepdims=keepdim, dtype=chosen)


def layer_norm(x, shape, weight, bias, eps, _cudnn):
    if len(shape) == 1 and weight is not None and bias is not None:
        # The kernel: half of NumPy's time for one row, a tenth for many. On one thread: heads mostly read a few tokens.
        return int8_ops.layer_norm(1, *map(np.ascontiguousarray, (x, weight, bias)), eps, False)
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    centered = x - x.mean(axes, keepdims=True)
    y = centered / np.sqrt(np.square(centered).mean(axes, keepdims=True) + np.float32(eps))
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def linear(x, weight, bias):
    y = x @ weight.T
    return y if bias is None else y + bias


def matmul(x, y):
    return x @ y


def tanh(x):
    return np.tanh(x)


def relu(x):
    return np.maximum(x, 0)


def softmax(x, axis, _dtype):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def attention(q, k, v, mask, _dropout, causal, scale, _grouped):
    if mask is not None or causal:
        raise ValueError("scaled_dot_product_attention: expected no mask; got one")
    logits = (q @ k.swapaxes(-1, -2)) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return softmax(logits.astype(np.float32, copy=False), -1, None) @ v


def unbind(x, axis):
    return list(np.moveaxis(x, axis, 0))


def to(x, dtype, *_):
    return x.astype(dtype, copy=False)


def unchanged(x, *_):
    return x


OPS = {
    "aten.add.Tensor": add,
    "aten.cat.default": cat,
    "aten.clone.default": unchanged,
    "aten.contiguous.default": unchanged,
    "aten.div.Tensor": divide,
    "aten.dropout.default": unchanged,
    "aten.expand.default": expand,
    "aten.flatten.using_ints": flatten,
    "aten.layer_norm.default": layer_norm,
    "aten.linear.default": linear,
    "aten.matmul.default": matmul,
    "aten.mean.dim": mean,
    "aten.mul.Tensor": multiply,
    "aten.pad.default": pad,
    "aten.permute.default": permute,
    "aten.relu.default": relu,
    "aten.reshape.default": view,
    "aten.scaled_dot_product_attention.default": attention,
    "aten.select.int": select,
    "aten.slice.Tensor": slice_,
    "aten.softmax.int": softmax,
    "aten.sub.Tensor": subtract,
    "aten.sym_size.int": lambda x, axis: x.shape[axis],
    "aten.sum.dim_IntList": total,
    "aten.tanh.default": tanh,
    "aten.to.dtype": to,
    "aten.transpose.int": transpose,
    "aten.unbind.int": unbind,
    "aten.unflatten.int": unflatten,
    "aten.unsqueeze.default": np.expand_dims,
    "aten.view.default": view,
    "add": operator.add,
    "floordiv": operator.floordiv,
    "mul": operator.mul,
    "sub": operator.sub,
}
"""By the name that `torch.export` gives them; the plain ones are Python's, on sizes."""
