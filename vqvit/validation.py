"""Argument checks at the op boundary. Each error names the op, what was expected and what came."""

import torch
from torch import Tensor

from vqvit import layouts
from vqvit import numerics as nm

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check(condition: bool, op: str, expected: str, received: object) -> None:
    """Raise `ValueError("op: expected ...; got ...")` unless `condition`."""
    if not condition:
        raise ValueError(f"{op}: expected {expected}; got {received}")


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    dtypes: torch.dtype | tuple,
    shape: tuple | None = None,
    like: Tensor | None = None,
) -> None:
    """Check dtype (`TypeError`), shape and device. A None in `shape` matches any size; a leading ... any dimensions."""
    if tensor is None:  # schemas let it through
        raise TypeError(f"{op}: expected {name}, a tensor; got None")
    dtypes = dtypes if type(dtypes) is tuple else (dtypes,)
    if tensor.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: expected {name} of dtype {names}; got {str(tensor.dtype).removeprefix('torch.')}")
    if shape is not None and not (tensor.shape == shape if None not in shape else _fits(tensor.shape, shape)):
        wanted = ", ".join("*" if s is None else "..." if s is ... else str(s) for s in shape)
        raise ValueError(f"{op}: expected {name} of shape ({wanted}); got {tuple(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{op}: expected {name} on {like.device}; got {tensor.device}")


def _fits(actual: tuple, wanted: tuple) -> bool:
    if wanted and wanted[0] is ...:
        tail = wanted[1:]
        actual, wanted = actual[len(actual) - len(tail) :] if len(actual) >= len(tail) else (), tail
    if len(actual) != len(wanted):
        return False
    for size, expected in zip(actual, wanted, strict=True):  # a loop, not all(): every op pays for this
        if expected is not None and size != expected:
            return False
    return True


def check_optional(op: str, name: str, tensor: Tensor | None, dtypes, shape: tuple, like: Tensor) -> None:
    if tensor is not None:
        check_tensor(op, name, tensor, dtypes, shape, like)


def check_rows(op: str, x: Tensor, equalizer: Tensor | None = None, statistics: bool = False) -> None:
    """A float tensor (..., K) with K >= 1."""
    check_tensor(op, "x", x, FLOATS, (..., None))
    k = x.shape[-1]
    check(k >= 1, op, "rows of at least one element", f"shape {tuple(x.shape)}")
    if statistics:
        check(k <= nm.NORM_K_MAX, op, f"rows of at most {nm.NORM_K_MAX} elements (int64 row statistics)", k)
    check_optional(op, "equalizer", equalizer, torch.float32, (k,), x)


def check_out_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"{op}: expected out_dtype float32, float16 or bfloat16; got {dtype}")


def check_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None) -> None:
    check_rows(op, x, statistics=True)
    check_tensor(op, "weight", weight, FLOATS, (x.shape[-1],), x)
    check_tensor(op, "bias", bias, FLOATS, (x.shape[-1],), x)
    check_static_scale(op, "scale", scale, x)


def check_static_scale(op: str, name: str, scale: Tensor | None, like: Tensor) -> None:
    check_optional(op, name, scale, torch.float32, (), like)


def check_operands(
    op: str, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, zero_points: int = 0, grouped: bool = False
) -> tuple:
    """int8 a (M, K) with scale (M,), or (M, ⌈K / 128⌉) if `grouped`; int8 b (N, K) or packed with scale (N,); returns
    (M, N, K).
    """
    check_tensor(op, "a", a, torch.int8, (None, None))
    m, k = a.shape
    limit = (nm.K_MAX_SYMMETRIC, nm.K_MAX_ONE_ZERO_POINT, nm.K_MAX_TWO_ZERO_POINTS)[zero_points]
    check(1 <= k <= limit, op, f"1 <= K <= {limit} (int32 accumulator, {zero_points} zero points)", f"K = {k}")
    check_tensor(op, "a_scale", a_scale, torch.float32, (m, -(-k // nm.GROUP)) if grouped else (m,), a)
    check_tensor(op, "b_scale", b_scale, torch.float32, (None,), a)
    n = b_scale.shape[0]
    check_codes(op, "b", b, n, k, a)
    return m, n, k


def check_codes(op: str, name: str, b: Tensor, n: int, k: int, like: Tensor) -> None:
    """int8 (N, K), or packed."""
    check_tensor(op, name, b, torch.int8)
    dimensions = b.dim()
    if dimensions == 4:
        check_tensor(op, f"packed {name}", b, torch.int8, layouts.shape_of("panels", n, k), like)
        if k % layouts.K_GROUP != 0:
            _check_padding(op, name, k, b, b[:, -2], 0)
    elif dimensions == 3:
        check_tensor(op, f"packed {name}", b, torch.int8, layouts.shape_of("strips", n, k), like)
        if k % layouts.CHUNK != 0:
            last = (-(-k // layouts.CHUNK) - 1) * layouts.CHUNK * layouts.STRIP
            groups = b[..., last : last + layouts.CHUNK * layouts.STRIP].unflatten(-1, (-1, layouts.STRIP, 4))
            _check_padding(op, name, k, b, groups.transpose(-2, -3).flatten(-2), -128)
    else:
        check_tensor(op, name, b, torch.int8, (n, k), like)


def _check_padding(op: str, name: str, k: int, packed: Tensor, columns: Tensor, zero: int) -> None:
    """The last columns (..., a power of two) of packed weights hold `zero` from column k on: K is not larger than k.

    Instruction sets differ in what they would do with more. Only tensors with values are looked at.
    """
    if type(packed) in (Tensor, torch.nn.Parameter) and packed.device.type != "meta":
        whole = bool((columns[..., k % columns.shape[-1] :] == zero).all())
        check(whole, op, f"packed {name} of at most {k} input channels, as many as a has columns", "more")


def check_weight(
    op: str, name: str, b: Tensor, scale: Tensor, bias: Tensor | None, n: int, k: int, like: Tensor
) -> None:
    """A symmetric weight (N, K), plain or packed, with its scale (N,) and float bias (N,) or None."""
    check(1 <= k <= nm.K_MAX_SYMMETRIC, op, f"1 <= K <= {nm.K_MAX_SYMMETRIC} for {name} (int32 accumulator)", k)
    check_codes(op, name, b, n, k, like)
    check_tensor(op, f"{name}_scale", scale, torch.float32, (n,), like)
    check_optional(op, f"{name}_bias", bias, FLOATS, (n,), like)


def check_linear(op, a, a_scale, b, b_scale, bias, activation, a_zero, a_sum, b_zero, b_sum) -> tuple:
    zero_points = (a_zero is not None) + (b_zero is not None)
    check_tensor(op, "a_scale", a_scale, torch.float32)
    grouped = a_scale.dim() == 2
    check(not grouped or zero_points == 0, op, "no zero points with group scales", "a_zero or b_zero")
    m, n, k = check_operands(op, a, a_scale, b, b_scale, zero_points, grouped)
    check_optional(op, "bias", bias, FLOATS, (n,), a)
    check_activation(op, activation)
    check((a_zero is None) or (b_sum is not None), op, "b_sum with a_zero (asymmetric activations)", "b_sum = None")
    check((b_zero is None) or (a_sum is not None), op, "a_sum with b_zero (asymmetric weights)", "a_sum = None")
    for name, vector, size in (("a_zero", a_zero, m), ("a_sum", a_sum, m), ("b_zero", b_zero, n), ("b_sum", b_sum, n)):
        check_optional(op, name, vector, torch.int32, (size,), a)
    return m, n, k


def check_activation(op, activation) -> None:
    check(activation in nm.ACTIVATIONS, op, f"activation in {nm.ACTIVATIONS}", repr(activation))


def check_epilogue(op, layer_scale, residual, out_dtype, shape: tuple, like) -> None:
    """What follows the activation of a product of `shape` (M, N)."""
    check_optional(op, "layer_scale", layer_scale, FLOATS, shape[1:], like)
    check_optional(op, "residual", residual, FLOATS, shape, like)
    check_out_dtype(op, out_dtype)


def check_attention(name, q, k, v, q_scale, k_scale, v_scale) -> tuple:
    """q int8 (B, H, Sq, D), k and v int8 (B, H, Sk, D) and their scales; returns q's shape."""
    check_tensor(name, "q", q, torch.int8, (None, None, None, None))
    batch, heads, queries, width = q.shape
    check_tensor(name, "k", k, torch.int8, (batch, heads, None, width), q)
    keys = k.shape[2]
    check(1 <= width <= 1024, name, "a head dimension between 1 and 1024 (exact fp32 logit accumulators)", width)
    check(1 <= keys <= nm.MAX_KEYS, name, f"between 1 and {nm.MAX_KEYS} keys (int32 sum of u16 codes)", keys)
    check_tensor(name, "v", v, torch.int8, (batch, heads, keys, width), q)
    check_tensor(name, "q_scale", q_scale, torch.float32, (batch, heads, queries), q)
    check_tensor(name, "k_scale", k_scale, torch.float32, (batch, heads, keys), q)
    check_tensor(name, "v_scale", v_scale, torch.float32, (batch, heads, width), q)
    return batch, heads, queries, width
