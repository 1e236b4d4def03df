"""What each operation of `vqvit.serving.float_ops` takes and gives: its rule has the same parameters, and returns the
shape and dtype that NumPy will (`vqvit.serving.symbols`).
"""

from vqvit.serving import int8_checks
from vqvit.serving.int8_checks import optional, tensor
from vqvit.serving.program import expect
from vqvit.serving.symbols import (
    Array,
    Dimension,
    Size,
    array,
    axis,
    boolean,
    dimension,
    exact_quotient,
    finite,
    integer,
    minus,
    number,
    plus,
    product,
    quotient,
    times,
)

MOST_PARTS = 4096
"""Arrays that one step joins or gives."""

INTEGERS = ("int8", "int32", "int64")


def any_array(x: object, least: int = 1) -> Array:
    expect(isinstance(x, Array) and x.ndim >= least, f"an array of {least} or more dimensions", x)
    return x


def floats(x: object, least: int = 1) -> Array:
    expect(any_array(x, least).dtype == "float32", "float32", x)
    return x


def sizes(value: object) -> list[Dimension]:
    """A shape in which one size may be -1."""
    expect(isinstance(value, list), "a shape", value)
    return [dimension("a shape", part) for part in value]


def filled(x: Array, shape: list[Dimension]) -> Array:
    """x in another shape of as many elements."""
    total, free = product(x.shape), [i for i, part in enumerate(shape) if part == -1]
    expect(len(free) <= 1, "one size of -1 at most", shape)
    if free:
        shape = list(shape)
        shape[free[0]] = exact_quotient(total, product([part for part in shape if part != -1]))
    result = array(shape, x.dtype)
    expect(product(result.shape) == total, f"a shape of {total} elements", result)
    return result


def view(x, shape) -> Array:
    return filled(any_array(x, 0), sizes(shape))


def permute(x, axes) -> Array:
    any_array(x)
    expect(isinstance(axes, list), "a list of axes", axes)
    order = [axis(x, part) for part in axes]
    expect(sorted(order) == list(range(x.ndim)), f"each of {x.ndim} axes once", axes)
    return array([x.shape[i] for i in order], x.dtype)


def transpose(x, first, second) -> Array:
    any_array(x)
    shape, i, j = list(x.shape), axis(x, first), axis(x, second)
    shape[i], shape[j] = shape[j], shape[i]
    return array(shape, x.dtype)


def flatten(x, first, last) -> Array:
    any_array(x)
    i, j = axis(x, first), axis(x, last)
    expect(i <= j, "axes in order", (first, last))
    return array([*x.shape[:i], product(x.shape[i : j + 1]), *x.shape[j + 1 :]], x.dtype)


def unflatten(x, axis_, parts) -> Array:
    i = axis(any_array(x), axis_)
    part = filled(array((x.shape[i],), x.dtype), sizes(parts))
    return array([*x.shape[:i], *part.shape, *x.shape[i + 1 :]], x.dtype)


def expand(x, shape, _implicit) -> Array:
    any_array(x, 0)
    wanted = sizes(shape)
    lead = len(wanted) - x.ndim
    expect(lead >= 0, f"a shape of {x.ndim} or more dimensions", shape)
    for i, part in enumerate(wanted):
        old = x.shape[i - lead] if i >= lead else None
        if part == -1:
            expect(old is not None, "-1 for dimensions of the array", shape)
            wanted[i] = old
        expect(old in (None, 1, wanted[i]), "sizes of the array, or 1 in it", f"{x} and {shape}")
    return array(wanted, x.dtype)


def cat(arrays, axis_) -> Array:
    expect(isinstance(arrays, list) and 0 < len(arrays) <= MOST_PARTS, f"1 to {MOST_PARTS} arrays", arrays)
    first = any_array(arrays[0])
    i = axis(first, axis_)
    joined: Dimension = 0
    for part in arrays:
        same = isinstance(part, Array) and part.dtype == first.dtype and part.ndim == first.ndim
        others = same and part.shape[:i] + part.shape[i + 1 :] == first.shape[:i] + first.shape[i + 1 :]
        expect(others, f"arrays like {first} but for axis {i}", part)
        joined = plus(joined, part.shape[i])
    return array([*first.shape[:i], joined, *first.shape[i + 1 :]], first.dtype)


def slice_(x, axis_, start, end, step) -> Array:
    i = axis(any_array(x), axis_)
    old = x.shape[i]
    integer("step", step, 1)
    for bound in (start, end):
        expect(bound is None or type(bound) is int or bound == old, "bounds that are numbers or the whole", bound)
    if isinstance(old, Size):
        whole = start in (None, 0) and step == 1 and (end is None or end == old or end == (1 << 63) - 1)
        expect(whole, "all images", f"{start}:{end}:{step}")
        return array(x.shape, x.dtype)
    chosen = len(range(*slice(start, end, step).indices(old)))
    return array([*x.shape[:i], chosen, *x.shape[i + 1 :]], x.dtype)


def select(x, axis_, index) -> Array:
    i = axis(any_array(x, 2), axis_)
    least = x.shape[i].of(1) if isinstance(x.shape[i], Size) else x.shape[i]
    integer("index", index, -least, least - 1)
    return array([*x.shape[:i], *x.shape[i + 1 :]], x.dtype)


def pad(x, amounts, mode, value) -> Array:
    floats(x)
    even = isinstance(amounts, list) and len(amounts) % 2 == 0 and len(amounts) <= 2 * x.ndim
    expect(even, f"before and after for at most {x.ndim} axes", amounts)
    expect(mode == "constant", "mode constant", mode)
    if value is not None:
        number("value", value)
    shape = list(x.shape)
    for i in range(len(amounts) // 2):
        before, after = (integer("an amount", amount, 0, 1 << 31) for amount in amounts[2 * i : 2 * i + 2])
        shape[-1 - i] = plus(shape[-1 - i], before + after)
    return array(shape, x.dtype)


def broadcast(x: tuple, y: tuple) -> list[Dimension]:
    length = max(len(x), len(y))
    pairs = zip((1,) * (length - len(x)) + x, (1,) * (length - len(y)) + y, strict=True)
    result = []
    for a, b in pairs:
        expect(1 in (a, b) or a == b, "shapes that broadcast", f"{x} and {y}")
        result.append(b if a == 1 else a)
    return result


def binary(x, y, alpha) -> Array:
    """Of two arrays of one dtype, or of an fp32 array and a number."""
    number("alpha", alpha)
    if isinstance(x, Array) and isinstance(y, Array):
        expect(x.dtype == y.dtype, "arrays of one dtype", f"{x} and {y}")
        expect(x.dtype == "float32" or (type(alpha) is int and alpha == 1), "alpha = 1 for integers", alpha)
        expect(x.ndim > 0 or y.ndim > 0, "an array of 1 or more dimensions", f"{x} and {y}")
        return array(broadcast(x.shape, y.shape), x.dtype)
    found, other = (x, y) if isinstance(x, Array) else (y, x)
    number("an operand", other)
    return array(floats(found).shape, "float32")


def multiply(x, y) -> Array:
    return binary(x, y, 1)


def divide(x, y) -> Array:
    result = binary(x, y, 1)
    expect(result.dtype == "float32", "float32", result)
    return result


def reduced(x: Array, axes: object, keepdim: object, dtype: str) -> Array:
    boolean("keepdim", keepdim)
    expect(isinstance(axes, list) and len(axes) > 0, "a list of axes", axes)
    chosen = [axis(x, part) for part in axes]
    expect(len(set(chosen)) == len(chosen) and (keepdim or len(chosen) < x.ndim), "some axes, each once", axes)
    shape = [1 if i in chosen else part for i, part in enumerate(x.shape) if keepdim or i not in chosen]
    return array(shape, dtype)


def mean(x, axes, keepdim, _dtype) -> Array:
    floats(x)
    expect(_dtype in (None, "float32"), "a mean in float32", _dtype)
    return reduced(x, list(range(x.ndim)) if axes is None else axes, keepdim, "float32")


def total(x, axes, keepdim, dtype) -> Array:
    any_array(x)
    expect(dtype in (None, "float32", "int32", "int64"), "a sum in float32, int32 or int64", dtype)
    expect(dtype in (None, "float32") or x.dtype in INTEGERS, "an integer sum of integers", x)
    return reduced(x, axes, keepdim, dtype or ("int64" if x.dtype in INTEGERS else "float32"))


def layer_norm(x, shape, weight, bias, eps, _cudnn) -> Array:
    floats(x)
    expect(isinstance(shape, list) and 0 < len(shape) <= x.ndim, f"a shape of at most {x.ndim} axes", shape)
    expect(tuple(shape) == x.shape[x.ndim - len(shape) :], "the last axes of the array", f"{shape} of {x}")
    if len(shape) == 1 and weight is not None and bias is not None:
        return int8_checks.layer_norm(x, weight, bias, eps, False)
    optional("weight", weight, "float32", tuple(shape))
    optional("bias", bias, "float32", tuple(shape))
    finite("eps", eps, 0.0)
    return array(x.shape, "float32")


def linear(x, weight, bias) -> Array:
    floats(x)
    tensor("weight", weight, "float32", (None, x.shape[-1]))
    n = weight.shape[0]
    optional("bias", bias, "float32", (n,))
    return array([*x.shape[:-1], n], "float32")


def matmul(x, y) -> Array:
    floats(x), floats(y)
    expect(x.ndim > 1 or y.ndim > 1, "a product that is an array", f"{x} and {y}")
    k = y.shape[0] if y.ndim == 1 else y.shape[-2]
    expect(x.shape[-1] == k, "rows as long as columns", f"{x} and {y}")
    lead = broadcast(x.shape[:-2], y.shape[:-2])
    return array([*lead, *x.shape[-2:-1], *(y.shape[-1:] if y.ndim > 1 else ())], "float32")


def elementwise(x) -> Array:
    return array(floats(x).shape, "float32")


def softmax(x, axis_, _dtype) -> Array:
    axis(floats(x), axis_)
    expect(_dtype in (None, "float32"), "a softmax in float32", _dtype)
    return array(x.shape, "float32")


def attention(q, k, v, mask, _dropout, causal, scale, _grouped) -> Array:
    floats(q, 2), floats(k, 2), floats(v, 2)
    expect(mask is None and causal is False, "no mask", "one")
    if scale is not None:
        finite("scale", scale)
    logits = matmul(q, array([*k.shape[:-2], k.shape[-1], k.shape[-2]], "float32"))
    return matmul(logits, v)


def unbind(x, axis_) -> list[Array]:
    i = axis(any_array(x, 2), axis_)
    count = integer("parts", x.shape[i], 1, MOST_PARTS)
    return [array([*x.shape[:i], *x.shape[i + 1 :]], x.dtype)] * count


def to(x, dtype, *_) -> Array:
    expect(dtype in ("float32", *INTEGERS), "a dtype", dtype)
    return array(any_array(x).shape, dtype)


def unchanged(x, *_) -> Array:
    return any_array(x)


def unsqueeze(x, axis_) -> Array:
    any_array(x, 0)
    i = integer("an axis", axis_, -x.ndim - 1, x.ndim) % (x.ndim + 1)
    return array([*x.shape[:i], 1, *x.shape[i:]], x.dtype)


def sym_size(x, axis_) -> Dimension:
    return x.shape[axis(any_array(x), axis_)]


def of_sizes(rule):
    return lambda x, y: rule(dimension("an operand", x), dimension("an operand", y))


RULES = {
    "aten.add.Tensor": binary,
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
    "aten.relu.default": elementwise,
    "aten.reshape.default": view,
    "aten.scaled_dot_product_attention.default": attention,
    "aten.select.int": select,
    "aten.slice.Tensor": slice_,
    "aten.softmax.int": softmax,
    "aten.sub.Tensor": binary,
    "aten.sym_size.int": sym_size,
    "aten.sum.dim_IntList": total,
    "aten.tanh.default": elementwise,
    "aten.to.dtype": to,
    "aten.transpose.int": transpose,
    "aten.unbind.int": unbind,
    "aten.unflatten.int": unflatten,
    "aten.unsqueeze.default": unsqueeze,
    "aten.view.default": view,
    "add": of_sizes(plus),
    "floordiv": of_sizes(quotient),
    "mul": of_sizes(times),
    "sub": of_sizes(minus),
}
"""By the names of `float_ops.OPS`."""
