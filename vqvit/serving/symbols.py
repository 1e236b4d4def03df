"""What is known of a value before any image comes: its dtype, and its shape in terms of the number of images B."""

import math
from dataclasses import dataclass

from vqvit.serving.program import INT64, MOST_DIMENSIONS, MOST_ELEMENTS, expect

MOST = 1 << 48
"""Of a size's coefficients, so that sums and products of a few sizes stay in int64."""


@dataclass(frozen=True, slots=True)
class Size:
    """images · B + rest, with images other than 0: sizes that are the same for every B are of type int."""

    images: int
    rest: int

    def __str__(self) -> str:
        factor = "" if self.images == 1 else f"{self.images} · "
        return f"{factor}batch" + (f" + {self.rest}" if self.rest > 0 else f" - {-self.rest}" if self.rest else "")

    def of(self, batch: int) -> int:
        return self.images * batch + self.rest


Dimension = int | Size


@dataclass(frozen=True, slots=True)
class Array:
    """dtype: NumPy's name."""

    shape: tuple[Dimension, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} ({', '.join(map(str, self.shape))})"

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclass(frozen=True, slots=True)
class Panels:
    """An int8 weight in the file, (count, groups, 64, 4), that a process may lay out anew: only GEMMs read it."""

    count: int
    groups: int

    def __str__(self) -> str:
        return f"int8 panels ({self.count}, {self.groups}, 64, 4)"


def size(images: int, rest: int) -> Dimension:
    if abs(images) > MOST or abs(rest) > MOST:
        expect(False, f"sizes up to {MOST}", f"{images} · batch + {rest}")
    return Size(images, rest) if images else rest


def _parts(value: Dimension) -> tuple[int, int]:
    return (value.images, value.rest) if isinstance(value, Size) else (0, value)


def plus(x: Dimension, y: Dimension) -> Dimension:
    (a, b), (c, d) = _parts(x), _parts(y)
    return size(a + c, b + d)


def minus(x: Dimension, y: Dimension) -> Dimension:
    (a, b), (c, d) = _parts(x), _parts(y)
    return size(a - c, b - d)


def times(x: Dimension, y: Dimension) -> Dimension:
    (a, b), (c, d) = _parts(x), _parts(y)
    if a and c:
        expect(False, "sizes proportional to the number of images", f"({x}) · ({y})")
    return size(a * d + b * c, b * d)


def product(shape: tuple | list) -> Dimension:
    total: Dimension = 1
    for factor in shape:
        total = times(total, factor)
    return total


def quotient(x: Dimension, y: Dimension) -> Dimension:
    """x // y, where that is a size. Raises `ProgramError` for others."""
    (a, b), (c, d) = _parts(x), _parts(y)
    if c == 0:
        expect(d >= 1 and a % d == 0, f"a multiple of {y}", x)
        return size(a // d, b // d)
    multiple = a // c
    expect(multiple >= 1 and (multiple * c, multiple * d) == (a, b), f"a multiple of {y}", x)
    return multiple


def exact_quotient(x: Dimension, y: Dimension) -> Dimension:
    """x / y, which is a size. Raises `ProgramError` for others."""
    result = quotient(x, y)
    expect(times(result, y) == x, f"a multiple of {y}", x)
    return result


def at_least(x: Dimension, least: int) -> bool:
    """For every number of images."""
    images, rest = _parts(x)
    return images >= 0 and images + rest >= least


def array(shape: tuple[Dimension, ...] | list, dtype: str) -> Array:
    """A result. Raises `ProgramError` if it is empty for some number of images, or too large."""
    shape = tuple(shape)
    expect(len(shape) <= MOST_DIMENSIONS, f"at most {MOST_DIMENSIONS} dimensions", len(shape))
    for dimension in shape:
        expect(at_least(dimension, 1), "sizes of at least 1", shape)
    bounded(product(shape), shape)
    return Array(shape, dtype)


def bounded(elements: Dimension, received: tuple[Dimension, ...]) -> None:
    """Raise `ProgramError` for more elements of an image than a value may have."""
    images, rest = _parts(elements)
    if images + abs(rest) > MOST_ELEMENTS:
        text = f"({', '.join(map(str, received))})"
        expect(False, f"at most {MOST_ELEMENTS} elements for an image", text)


def dimension(name: str, value: object) -> Dimension:
    expect(isinstance(value, Size) or type(value) is int, f"{name}: a size", value)
    return value


def integer(name: str, value: object, low: int = INT64.start, high: int = INT64.stop - 1) -> int:
    if type(value) is not int or not low <= value <= high:
        expect(False, f"{name}: an integer" + ("" if low == INT64.start else f" from {low} to {high}"), value)
    return value


def boolean(name: str, value: object) -> bool:
    expect(type(value) is bool, f"{name}: true or false", value)
    return value


def number(name: str, value: object) -> float:
    expect(type(value) in (int, float), f"{name}: a number", value)
    return value


def finite(name: str, value: object, low: float = -1e38) -> float:
    """A number that fp32 holds."""
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= 1e38:
        expect(False, f"{name}: a finite number" + (f" of at least {low:g}" if low > -1e38 else ""), value)
    return value


def axis(x: Array, value: object) -> int:
    return integer("an axis", value, -x.ndim, x.ndim - 1) % x.ndim
