"""Random arguments of every op for `fuzz_ops.py`: odd and empty shapes, special values, strided views, wrong ones."""

import random

import torch
from op_arguments import (
    FLOATS,
    attention,
    block,
    codes,
    compensated,
    grouped,
    laid_out,
    linear,
    normal,
    zero_points,
)
from torch import Tensor

from vqvit import numerics as nm
from vqvit import reference
from vqvit.backends import cpu

ROWS = (0, 1, 2, 3, 5, 6, 7, 8, 13, 14, 16, 17, 28, 33, 48, 65, 130)
COLUMNS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 130, 200, 256, 257, 300)
OUTPUTS = (0, 1, 2, 3, 15, 16, 17, 33, 63, 64, 65, 66, 127, 128, 129, 130, 192, 200)
HEADS, WIDTHS = (1, 2, 3, 4), (1, 3, 8, 11, 16, 24, 32, 48, 64, 65, 80, 96, 128)
LAYOUTS = ("rows", "panels", "strips")
SPECIAL = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.17549435e-38, 3e38, -3e38, 0.5, -1.0)
MAGNITUDES = (1e-44, 1e-38, 1e-30, 1e-8, 1e-3, 10.0, 1e5, 1e20, 1e37)
NUMBERS = (0.0, -0.0, 1.0, -0.5, 1e-12, 1e-45, 1e30, -1e30)


class Drawing:
    """Arguments from one random stream; torch's own is seeded with it."""

    def __init__(self, seed: str):
        self.r = random.Random(seed)
        torch.manual_seed(self.r.getrandbits(62))

    def chance(self, p: float) -> bool:
        return self.r.random() < p

    def dtype(self) -> torch.dtype:
        return self.r.choice((torch.float32, torch.float32, *FLOATS.values()))

    def of(self, choices: tuple) -> int:
        return self.r.choice(choices)

    def rows(self) -> Tensor:
        shape = [self.of(ROWS) for _ in range(self.r.choice((0, 1, 1, 1, 2)))] if self.chance(0.3) else [self.of(ROWS)]
        return normal(*shape, self.of(COLUMNS), dtype=self.dtype())

    def maybe(self, draw, p: float = 0.5):
        return draw() if self.chance(p) else None

    def shape(self) -> tuple[int, int, int]:
        return self.of(ROWS), self.of(COLUMNS), self.of(OUTPUTS)

    def activation(self) -> str:
        return self.r.choice(nm.ACTIVATIONS)

    def delta(self) -> float:
        return self.r.choice((0.0, 0.0, 0.7, -0.4, 3.0))

    def vector(self, n: int) -> Tensor | None:
        return self.maybe(lambda: normal(n, dtype=self.dtype()))

    def epilogue(self, m: int, n: int) -> tuple:
        """layer_scale and residual."""
        return self.vector(n), self.maybe(lambda: normal(m, n, dtype=self.dtype()), 0.4)

    def operands(self, shape: tuple[int, int, int]) -> tuple[tuple, tuple]:
        """a, a_scale, b and b_scale; a_zero, a_sum, b_zero and b_sum."""
        layout = self.r.choice(LAYOUTS) if shape[2] else "rows"
        kind = self.r.randrange(4)
        if kind == 0:
            return grouped(shape, layout=layout), (None,) * 4
        if kind == 1:
            (a, a_scale, b, b_scale), zeros = zero_points(shape, self.chance(0.6), self.chance(0.6))
        else:
            (a, a_scale, b, b_scale), zeros = linear(shape), (None,) * 4
        return (a, a_scale, laid_out(b, layout), b_scale), zeros


def quantize_per_token(d: Drawing) -> tuple:
    x, symmetric = d.rows(), d.chance(0.7)
    equalizer = d.maybe(lambda: torch.rand(x.shape[-1]) + 0.5, 0.3)
    return x, d.delta() if symmetric else 0.0, equalizer, symmetric, d.chance(0.5)


def quantize_per_group(d: Drawing) -> tuple:
    x = d.rows()
    return x, d.maybe(lambda: torch.rand(x.shape[-1]) + 0.5, 0.3)


def quantize_static(d: Drawing) -> tuple:
    x = d.rows()
    return x, torch.rand([]) * 0.1, d.maybe(lambda: torch.rand(x.shape[-1]) + 0.5, 0.3), d.chance(0.5)


def quantize_residual(d: Drawing) -> tuple:
    x = d.rows()
    if d.chance(0.5):
        return x, codes(*x.shape), torch.rand(x.shape[:-1]) * 0.05 + 1e-3
    quantized, scale, _, _ = reference.quantize_per_token(x)
    return x, quantized, scale


def layer_norm(d: Drawing) -> tuple:
    x = d.rows()
    k = x.shape[-1]
    return x, normal(k, dtype=d.dtype()), normal(k, dtype=d.dtype()), d.r.choice((1e-6, 1e-12, 0.0, 1.0)), d.chance(0.3)


def layernorm_quantize(d: Drawing) -> tuple:
    *arguments, paper = layer_norm(d)
    return *arguments, d.delta(), d.maybe(lambda: torch.rand([]) * 0.1, 0.3), d.chance(0.5), paper


def add_layernorm_quantize(d: Drawing) -> tuple:
    x, weight, bias, eps, paper = layer_norm(d)
    residual = normal(*x.shape, dtype=d.dtype())
    scale = d.maybe(lambda: torch.rand([]) * 0.1, 0.3)
    return x, residual, weight, bias, eps, d.vector(x.shape[-1]), d.delta(), scale, d.chance(0.5), paper


def patchify_quantize(d: Drawing) -> tuple:
    ph, pw, channels = d.of((1, 2, 3, 4, 7, 16)), d.of((1, 2, 3, 5, 8)), d.of((1, 2, 3, 4))
    pixels = normal(d.of((0, 1, 2, 3)), channels, ph * d.of((0, 1, 2, 3)), pw * d.of((1, 2, 4)), dtype=d.dtype())
    return pixels, ph, pw, d.maybe(lambda: torch.rand(channels * ph * pw) + 0.5, 0.3)


def int8_mm(d: Drawing) -> tuple:
    m, k, n = d.shape()
    return codes(m, k), codes(n, k)


def int8_linear(d: Drawing) -> tuple:
    shape = m, _, n = d.shape()
    operands, zeros = d.operands(shape)
    return *operands, d.vector(n), d.activation(), *d.epilogue(m, n), *zeros, d.dtype()


def int8_linear_quantize(d: Drawing) -> tuple:
    shape = d.shape()
    operands, zeros = d.operands(shape)
    kind = d.r.randrange(4)
    out_scale = torch.rand([]) * 0.2 if kind == 0 else None
    options = (True, False, True) if kind == 1 else (kind != 2, d.chance(0.5), False)
    return *operands, d.vector(shape[2]), d.activation(), *zeros, out_scale, *options


def int8_linear_compensated(d: Drawing) -> tuple:
    m, _, n = shape = (d.of(ROWS[1:]), d.of(COLUMNS), d.of(OUTPUTS[1:]))
    mode, layout = d.r.choice(tuple(reference.COMPENSATION_TERMS)), d.r.choice(LAYOUTS)
    arguments = compensated(
        shape, mode, d.r.choice((1.0, 1.7, -1.0, 0.0)), d.chance(0.5), d.activation(), layout=layout
    )
    return *arguments, *d.epilogue(m, n), d.dtype()


def qkv_shape(d: Drawing) -> tuple[int, int, int, int]:
    return d.of((0, 1, 2, 3)), d.of((1, 2, 5, 9, 17, 33)), d.of(HEADS), d.of(WIDTHS)


def quantize_qkv(d: Drawing) -> tuple:
    images, tokens, heads, width = qkv_shape(d)
    return normal(images, tokens, 3 * heads * width, dtype=d.dtype()), heads


def int8_linear_qkv(d: Drawing) -> tuple:
    images, tokens, heads, width = qkv_shape(d)
    operands, zeros = d.operands((images * tokens, d.of(COLUMNS), 3 * heads * width))
    return *operands, d.vector(3 * heads * width), tokens, heads, *zeros


def int8_attention_quantize(d: Drawing) -> tuple:
    images, queries, heads, width = qkv_shape(d)
    return attention(images, heads, queries, d.of((1, 2, 7, 16, 33, 64, 65, 130)), width)


def int8_attention(d: Drawing) -> tuple:
    return *int8_attention_quantize(d), d.dtype()


def int8_encoder_block(d: Drawing) -> tuple:
    tokens = d.of((1, 2, 5, 9, 17))
    groups = d.chance(0.3), d.chance(0.3)
    deltas = d.delta(), 0.0 if groups[0] else d.delta(), d.delta()
    return block(
        d.of((0, 1, 2, 3)), tokens, d.of((1, 8, 33, 40, 64, 65)), d.of((1, 2, 3)), d.of((1, 8, 11, 24, 32, 64, 80)),
        d.of((1, 7, 64, 71, 130, 260)), d.dtype(), d.activation(), tuple(d.r.choice(LAYOUTS) for _ in range(4)),
        d.chance(0.7), d.chance(0.4), deltas, False, groups, d.maybe(lambda: d.r.randint(1, tokens), 0.4),
    )  # fmt: skip


def pack_weight(d: Drawing) -> tuple:
    return codes(d.of(OUTPUTS), d.of(COLUMNS)), d.r.choice(LAYOUTS[1:])


def unpack_weight(d: Drawing) -> tuple:
    n, k = d.of(OUTPUTS[1:]), d.of(COLUMNS)
    return reference.pack_weight(codes(n, k), d.r.choice(LAYOUTS[1:])), n, k


DRAWS = {
    draw.__name__: draw
    for draw in (
        quantize_per_token, quantize_per_group, quantize_static, quantize_residual, layer_norm, layernorm_quantize,
        add_layernorm_quantize, patchify_quantize, int8_mm, int8_linear, int8_linear_quantize, int8_linear_compensated,
        quantize_qkv, int8_linear_qkv, int8_attention, int8_attention_quantize, int8_encoder_block, pack_weight,
        unpack_weight,
    )
}  # fmt: skip


def spoiled(d: Drawing, x: Tensor) -> Tensor:
    """x with values that break kernels, in a few places or in all."""
    if x.numel() == 0:
        return x
    x = x.clone()
    if d.chance(0.4):
        x *= d.of(MAGNITUDES)
    if d.chance(0.5):
        flat = x.view(-1)
        for _ in range(d.r.choice((1, 1, 2, 8))):
            flat[d.r.randrange(flat.numel())] = d.of(SPECIAL)
    if d.chance(0.15):
        x *= -1
    if d.chance(0.1) and x.dim() and x.shape[0]:
        x[d.r.randrange(x.shape[0])] = d.of(SPECIAL)
    return x


def restrided(d: Drawing, x: Tensor) -> Tensor:
    """The same values, or the first ones again, in a view of other strides."""
    kind = d.r.randrange(5)
    if x.dim() == 0 or x.numel() == 0:
        return x
    if kind == 0 and x.dim() >= 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == 1:
        room = x.new_zeros((*x.shape[:-1], x.shape[-1] + d.r.randint(1, 9)))
        begin = d.r.randint(0, room.shape[-1] - x.shape[-1])
        room[..., begin : begin + x.shape[-1]] = x
        return room[..., begin : begin + x.shape[-1]]
    if kind == 2:
        return x.repeat_interleave(2, -1)[..., ::2]
    if kind == 3 and x.is_floating_point():
        return x[:1].expand_as(x)
    return torch.cat([x.flatten(), x.flatten()[:1]]).as_strided(x.shape, x.stride()) if x.is_contiguous() else x


def wrong(d: Drawing, value: object) -> object:
    """Something else in the place of an argument."""
    if isinstance(value, Tensor):
        kind = d.r.randrange(6)
        if kind == 0:
            return value.to(d.r.choice((torch.int8, torch.int32, torch.float32, torch.float64, torch.bool)))
        if kind == 1 and value.dim():
            return value[..., : value.shape[-1] // 2]
        if kind == 2 and value.dim():
            return torch.cat([value, value])
        if kind == 3:
            return value.flatten()
        if kind == 4:
            return value.unsqueeze(0)
        return None
    if isinstance(value, bool) or value is None:
        return d.r.choice((True, False, None))
    if isinstance(value, int):
        return d.r.choice((0, -1, 1, value + 1, 65, 2**31 - 1, 2**31, 2**62))
    if isinstance(value, float):
        return d.r.choice((*NUMBERS, float("nan"), float("inf")))
    return d.r.choice(("", "gelu", "full", "panels", torch.int8, torch.float64, 3))


def arguments_of(seed: int, index: int) -> tuple[str, tuple, str, int, bool]:
    """The op of a case, its arguments, the instruction set and number of threads, and whether an argument is wrong."""
    d = Drawing(f"{seed} {index}")
    op = d.r.choice(sorted(DRAWS))
    arguments = list(DRAWS[op](d))
    wild = d.chance(0.4)
    for i, value in enumerate(arguments):
        if isinstance(value, Tensor):
            if value.is_floating_point() and wild and d.chance(0.5):
                value = spoiled(d, value)
            arguments[i] = restrided(d, value) if d.chance(0.25) else value
    is_wrong = d.chance(0.1)
    if is_wrong:
        place = d.r.randrange(len(arguments))
        arguments[place] = wrong(d, arguments[place])
    return op, tuple(arguments), d.r.choice(cpu.available_isas()), d.r.choice((1, 1, 2, 5)), is_wrong
