"""The calls that `compile_gate.py` compiles: every shipped Triton kernel, config and option, on meta tensors."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch

from vqvit.kernels import attention_s8, gemm_s8, gemm_s8_compensated, layernorm_quantize, quantize, quantize_qkv, tuned
from vqvit.numerics import GROUP


@dataclass(frozen=True)
class Architecture:
    """row: of the config tables; sms: of its usual part; limits of a block's shared memory and an SM's warps."""

    row: int
    sms: int
    shared_bytes: int
    max_warps: int


KIB = 1024
ARCHITECTURES = {
    80: Architecture(row=80, sms=108, shared_bytes=163 * KIB, max_warps=64),  # A100
    86: Architecture(row=86, sms=84, shared_bytes=99 * KIB, max_warps=48),  # A40, RTX 3090
    89: Architecture(row=86, sms=142, shared_bytes=99 * KIB, max_warps=48),  # L40S, RTX 4090
    90: Architecture(row=90, sms=132, shared_bytes=227 * KIB, max_warps=64),  # H100, H200
}

WGMMA_S8 = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8"
MMA_S8 = r"mma\.sync\.aligned\.m16n8k\d+\.row\.col\.(?:satfinite\.)?s32\.s8\.s8\.s32"


@dataclass(frozen=True)
class Case:
    """A launcher call. The first kernel that it launches must contain the instruction `tensor_core`, unless that is
    None, and leave room for `ctas` blocks on a multiprocessor.
    """

    name: str
    run: Callable[[], object]
    tensor_core: str | None = None
    ctas: int = 1


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear(c: gemm_s8.GemmConfig, n: int, k: int, grouped: bool = False, m: int = 12608, **store: object) -> None:
    """A GEMM of 64 images of ViT-B with tiles `c`: GELU and an int8 store as `store` says, else residual and fp16."""
    half, int8 = torch.float16, torch.int8
    a_scale = meta(m, -(-k // GROUP)) if grouped else meta(m)
    operands = meta(m, k, dtype=int8), a_scale, meta(n, k, dtype=int8), meta(n)
    vector = meta(n, dtype=half)
    with mock.patch.object(gemm_s8, "choose", lambda *_: c):
        if store:
            gemm_s8.int8_linear_quantize(*operands, vector, "gelu", **store)
        else:
            residual = meta(m, n, dtype=half)
            gemm_s8.int8_linear(*operands, vector, "none", vector, residual, out_dtype=half)


def gemm_cases(row: int, tensor_core: str) -> Iterator[Case]:
    """Each config with the lightest and the heaviest epilogues, at ViT-B's fc1 and fc2 for 64 images."""
    m, k, n = 12608, 768, 3072
    half, int8 = torch.float16, torch.int8
    for c in gemm_s8.GEMM_CONFIGS[row]:
        tile = f"{c.block_m}x{c.block_n}x{c.block_k}"
        store = functools.partial(linear, c, n, k, out_scale=meta())
        yield Case(f"int8_linear_quantize gelu static {tile}", store, tensor_core, c.ctas)
        residual = functools.partial(linear, c, k, n)
        yield Case(f"int8_linear residual fp16 {tile}", residual, tensor_core, c.ctas)
        split = functools.partial(linear, dataclasses.replace(c, split_k=4), k, n, m=197)
        yield Case(f"int8_linear residual fp16 split K {tile}", split, tensor_core, c.ctas)

    for shares, m_, n_, k_ in ((2, 197, n, 600), (8, 197, k, n), (2, 1, 1, n)):
        c = dataclasses.replace(gemm_s8.GEMM_CONFIGS[row][-1], split_k=shares)
        store = functools.partial(linear, c, n_, k_, m=m_, out_scale=meta(), row_sum=True)
        yield Case(f"int8_linear_quantize gelu static {m_}x{n_} split K {shares}", store, tensor_core, c.ctas)

    def compensated(activation="none", **epilogue):
        a, b = meta(m, k, dtype=int8), meta(k, k, dtype=int8)
        gemm_s8_compensated.int8_linear_compensated(
            a, meta(m), a, b, meta(k), b, meta(k), (True, True, True), 1.0, activation, **epilogue, out_dtype=half
        )

    yield Case("int8_linear_compensated full", compensated, tensor_core)
    yield Case("int8_linear_compensated full gelu", functools.partial(compensated, "gelu"), tensor_core)
    residual = functools.partial(compensated, layer_scale=meta(k), residual=meta(m, k, dtype=half))
    yield Case("int8_linear_compensated full residual", residual, tensor_core)


def group_cases(row: int, tensor_core: str) -> Iterator[Case]:
    """Each config of group scales: fc1 that stores groups, fc2 that reads them, and both at once."""
    m, k, n = 12608, 768, 3072
    half, int8 = torch.float16, torch.int8
    for c in (*gemm_s8.GROUP_CONFIGS[row], gemm_s8.RAGGED_GROUP_CONFIG):
        tile = f"{c.block_m}x{c.block_n}x{c.block_k} stages {c.num_stages}"
        ragged = c is gemm_s8.RAGGED_GROUP_CONFIG
        for what, n_, k_, grouped, store in (
            ("store groups gelu", n, 588 if ragged else k, False, {"per_group": True}),
            ("group scales residual fp16", k, 588 if ragged else n, True, {}),
            ("group scales store groups", n, 588 if ragged else k, True, {"per_group": True}),
        ):
            call = functools.partial(linear, c, n_, k_, grouped, **store)
            yield Case(f"int8_linear {what} {tile}", call, f"{WGMMA_S8}|{MMA_S8}" if ragged else tensor_core, c.ctas)

        def projection(c, heads):
            operands = meta(m, k, dtype=int8), meta(m), meta(k * 3, k, dtype=int8), meta(k * 3), meta(k * 3, dtype=half)
            with mock.patch.object(gemm_s8, "choose", lambda *_: c):
                gemm_s8.int8_linear_qkv(*operands, 197, heads)

        for head_dim in gemm_s8.HEAD_DIMS:
            call = functools.partial(projection, c, k // head_dim)
            yield Case(f"int8_linear_qkv heads of {head_dim} {tile}", call, tensor_core, c.ctas)


def fused_attention(*operands: object) -> None:
    """`int8_attention_quantize` in one launch where it fits one, whatever a table says."""
    with tuned.forced("attention_quantize", attention_s8.LAUNCHES[0]):
        attention_s8.int8_attention_quantize(*operands)


def attention_cases() -> Iterator[Case]:
    """Each config: one pass (197 tokens of an image) and two (1568 tokens of a video clip), by head dimension."""
    for tokens, dim in ((197, 64), (197, 80), (197, 128), (1568, 64), (1568, 128), (1568, 256), (197, 512)):
        codes, scale = (meta(8, 12, tokens, dim, dtype=torch.int8),) * 3, meta(8, 12, tokens)
        call = functools.partial(
            attention_s8.int8_attention, *codes, scale, scale, meta(8, 12, dim), 0.125, torch.float16
        )
        yield Case(f"int8_attention S={tokens} D={dim}", call, f"{WGMMA_S8}|{MMA_S8}")
        if dim in attention_s8.GROUP_HEAD_DIMS:
            call = functools.partial(fused_attention, *codes, scale, scale, meta(8, 12, dim), 0.125)
            yield Case(f"int8_attention_quantize S={tokens} D={dim}", call, f"{WGMMA_S8}|{MMA_S8}")


def row_cases() -> Iterator[Case]:
    """Row-wise kernels in half precision at ViT-B's widths, for 64 images and for one."""
    half = torch.float16
    for m in (12608, 197):
        x, channels = meta(m, 768, dtype=half), meta(768, dtype=half)
        yield Case(
            f"add_layernorm_quantize {m}x768",
            functools.partial(layernorm_quantize.add_layernorm_quantize, x, x, channels, channels, 1e-6, channels),
        )
    x = meta(12608, 3072, dtype=half)
    channels = meta(1024, dtype=half)
    yield Case(
        "layernorm_quantize delta 12608x1024",
        functools.partial(
            layernorm_quantize.layernorm_quantize, meta(12608, 1024, dtype=half), channels, channels, 1e-6, 0.5
        ),
    )
    channels = meta(768, dtype=half)
    yield Case(
        "layer_norm 12608x768",
        functools.partial(layernorm_quantize.layer_norm, meta(12608, 768, dtype=half), channels, channels, 1e-6),
    )
    yield Case("quantize_per_token 12608x3072", functools.partial(quantize.quantize_per_token, x))
    yield Case("quantize_per_token asymmetric", functools.partial(quantize.quantize_per_token, x, symmetric=False))
    yield Case("quantize_per_token 197x20000", functools.partial(quantize.quantize_per_token, meta(197, 20000), 0.5))
    yield Case("quantize_static 12608x3072", functools.partial(quantize.quantize_static, x, meta()))
    codes = meta(12608, 3072, dtype=torch.int8)
    yield Case("quantize_residual", functools.partial(quantize.quantize_residual, x, codes, meta(12608)))
    pixels = meta(64, 3, 224, 224, dtype=half)
    yield Case("patchify_quantize", functools.partial(quantize.patchify_quantize, pixels, 16, 16, meta(768)))
    yield Case("quantize_qkv", functools.partial(quantize_qkv.quantize_qkv, meta(64, 197, 2304, dtype=half), 12))


def option_cases() -> Iterator[Case]:
    """Every option of every launcher, and sizes of 1, which Triton specialises: no interpreted test sees them fail."""
    half, bf16, int8, int32 = torch.float16, torch.bfloat16, torch.int8, torch.int32

    def case(function, *arguments, **options) -> Case:
        shown = [f"{k}={v}" if not isinstance(v, torch.Tensor) else k for k, v in options.items()]
        shape = "x".join(str(size) for size in arguments[0].shape)
        return Case(
            f"{function.__name__} {shape} {' '.join(shown)}".strip(), functools.partial(function, *arguments, **options)
        )

    for m, n, k in ((1576, 768, 588), (197, 384, 100), (1, 1, 1)):
        a, b, row, column = meta(m, k, dtype=int8), meta(n, k, dtype=int8), meta(m), meta(n)
        operands = (a, row, b, column)
        b_zero = {"b_zero": meta(n, dtype=int32), "a_sum": meta(m, dtype=int32)}
        zeros = {"a_zero": meta(m, dtype=int32), "b_sum": meta(n, dtype=int32)} | b_zero
        yield case(gemm_s8.int8_mm, a, b)
        yield case(
            gemm_s8.int8_linear, *operands, bias=column, residual=meta(m, n, dtype=bf16), out_dtype=bf16, **zeros
        )
        yield case(gemm_s8.int8_linear, *operands, layer_scale=column, activation="gelu_tanh", **b_zero)
        yield case(gemm_s8.int8_linear_quantize, *operands, symmetric=False, row_sum=True, activation="quick_gelu")
        yield case(gemm_s8.int8_linear_quantize, *operands, out_scale=meta(), row_sum=True, activation="silu", **zeros)
        for terms in ((False, False, False), (False, False, True), (True, False, False), (False, True, False)):
            yield case(
                gemm_s8_compensated.int8_linear_compensated,
                a,
                row,
                a,
                b,
                column,
                b,
                bias=None,
                terms=terms,
                out_dtype=bf16,
            )
    yield case(gemm_s8.int8_linear, *operands, activation="relu", out_dtype=half)

    for m, k in ((197, 588), (1, 1), (1, 16384)):
        x, channels = meta(m, k, dtype=bf16), meta(k)
        yield case(quantize.quantize_per_token, x, delta=0.5, equalizer=channels, row_sum=True)
        yield case(quantize.quantize_per_token, x, symmetric=False, row_sum=True)
        yield case(quantize.quantize_static, x, meta(), equalizer=channels, row_sum=True)
        yield case(quantize.quantize_residual, x, meta(m, k, dtype=int8), meta(m))
        yield case(
            layernorm_quantize.layernorm_quantize, x, channels, channels, 1e-6, delta=0.5, row_sum=True, paper=True
        )
        yield case(layernorm_quantize.layer_norm, x, channels, channels, 1e-6, paper=True)
        yield case(layernorm_quantize.add_layernorm_quantize, meta(m, k), x, channels, channels, 1e-6, scale=meta())
    long_rows = meta(2, 20000, dtype=half)
    yield case(quantize.quantize_per_token, long_rows, symmetric=False, row_sum=True)
    yield case(quantize.quantize_static, long_rows, meta(), equalizer=meta(20000))
    for patch, channels in ((14, 3), (1, 1)):
        yield case(quantize.patchify_quantize, meta(1, channels, 28, 28), patch, patch)
    for tokens, heads, dim in ((1, 1, 1), (1568, 12, 80)):
        codes, scale = (meta(1, heads, tokens, dim, dtype=int8),) * 3, meta(1, heads, tokens)
        yield case(quantize_qkv.quantize_qkv, meta(1, tokens, 3 * heads * dim), heads)
        yield case(attention_s8.int8_attention, *codes, scale, scale, meta(1, heads, dim), 0.1, out_dtype=bf16)


def cases(arch: int) -> list[Case]:
    row = ARCHITECTURES[arch].row
    options = option_cases() if arch == max(ARCHITECTURES) else ()  # the language front end is the same for all
    tensor_core = WGMMA_S8 if arch == 90 else MMA_S8
    return [
        *gemm_cases(row, tensor_core), *group_cases(row, tensor_core), *attention_cases(), *row_cases(), *options
    ]  # fmt: skip
