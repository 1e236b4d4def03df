"""CUDA attention on each path of csrc/cuda/attention_s8.cu, bit for bit against the reference."""

import pytest
import torch
from bits import assert_same_bits
from op_arguments import attention

from vqvit import backends, reference
from vqvit.backends import cuda

pytestmark = pytest.mark.skipif(backends.unavailable("cuda") is not None, reason=str(backends.unavailable("cuda")))

RESIDENT, LONG_RESIDENT, STREAMING = 197, 261, 290

SHAPES = {  # batch, heads, queries, keys, head_dim
    "resident": (1, 1, 70, RESIDENT, 64),
    "resident_one_step": (2, 1, 3, 16, 64),
    "resident_half_step": (1, 2, 17, 40, 64),
    "resident_full": (1, 1, 5, 208, 64),
    "resident_dim_32": (1, 1, 5, RESIDENT, 32),
    "resident_dim_72": (1, 2, 5, 50, 72),
    "resident_dim_128": (1, 1, 5, 100, 128),
    "resident_dim_256": (1, 1, 5, 64, 256),
    "long_resident": (1, 1, 18, LONG_RESIDENT, 64),
    "long_resident_full": (1, 1, 5, 272, 64),
    "streaming_dim_16": (1, 1, 5, STREAMING, 16),
    "streaming_dim_64": (1, 2, 66, STREAMING, 64),
    "streaming_dim_80": (1, 1, 5, STREAMING, 80),
    "streaming_dim_128": (1, 1, 5, STREAMING, 128),
    "streaming_whole_tiles": (1, 1, 5, 320, 64),
    "wide_dim_200": (1, 1, 5, STREAMING, 200),
    "wide_dim_512": (1, 1, 3, 40, 512),
    "wide_dim_1000": (1, 1, 3, 33, 1000),
    "bytes_dim_27": (1, 2, 5, RESIDENT, 27),
    "bytes_dim_65_streaming": (1, 2, 5, STREAMING, 65),
    "words_dim_20": (1, 2, 5, 30, 20),
}

GROUP_SHAPES = {
    "pair": (1, 2, 66, RESIDENT, 64),
    "pair_and_one": (2, 3, 5, RESIDENT, 64),
    "one": (1, 1, 17, 30, 64),
    "long_pair": (1, 2, 5, LONG_RESIDENT, 64),
    "streaming_pair_and_one": (1, 3, 5, STREAMING, 64),
    "resident_128": (1, 2, 17, 100, 128),
    "resident_128_few_keys": (1, 2, 17, 20, 128),
    "streaming_128": (1, 2, 17, STREAMING, 128),
}


def on_device(args):
    return [a.to(cuda.device_types()[0]) if isinstance(a, torch.Tensor) else a for a in args]


def check(*args, dtype=torch.float32):
    assert_same_bits(cuda.int8_attention(*on_device(args), dtype), reference.int8_attention(*args, dtype))


def check_codes(*args):
    received, expected = cuda.int8_attention_quantize(*on_device(args)), reference.int8_attention_quantize(*args)
    for got, want in zip(received, expected, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_floats(shape):
    check(*attention(*shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 27], ids=["vector", "scalar"])
def test_stored_dtypes(dtype, dim):
    check(*attention(1, 2, 5, 50, dim), dtype=dtype)


@pytest.mark.parametrize("shape", GROUP_SHAPES.values(), ids=GROUP_SHAPES)
def test_codes(shape):
    check_codes(*attention(*shape))


@pytest.mark.parametrize("offset", [1, 4])
def test_operands_that_are_not_aligned(offset):
    args = list(attention(1, 2, 5, 70, 64))
    for i in range(3):
        storage = torch.empty(args[i].numel() + offset, dtype=torch.int8)
        args[i] = storage[offset:].view(args[i].shape).copy_(args[i])
    check(*args)
    check_codes(*args)


@pytest.mark.parametrize("keys", [RESIDENT, STREAMING])
def test_peaked_rows(keys):
    """Logits far below -126, and equal largest ones."""
    args = list(attention(1, 2, 20, keys, 64))
    args[3][:] = 1.0
    args[4][0, 1] = 1e-30
    check(*args)
    check_codes(*args)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("operand", [3, 4, 5], ids=["q_scale", "k_scale", "v_scale"])
@pytest.mark.parametrize("keys", [RESIDENT, STREAMING])
def test_scales_that_are_not_finite(value, operand, keys):
    args = list(attention(1, 2, 20, keys, 64))
    args[operand][0, 1, 3] = value
    check(*args)
    check_codes(*args)


@pytest.mark.parametrize("keys", [50, STREAMING])
def test_overflowing_factors(keys):
    """A factor of Inf gives logits of -Inf, NaN where the product is 0, or a largest one of Inf."""
    args = list(attention(1, 1, 40, keys, 64))
    args[3][:] = 1e30
    args[4][0, 0, 7] = 1e30
    args[1][0, 0, 7] = 0
    args[1][0, 0, 7, 0] = 1
    args[0][0, 0, :, 0] = torch.randint(-1, 2, (40,), dtype=torch.int8)
    expected = reference.int8_attention(*args)
    assert expected.isnan().any() and not expected.isnan().all()
    check(*args)
    check_codes(*args)
