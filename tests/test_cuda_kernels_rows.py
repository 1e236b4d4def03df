"""Row-wise CUDA C++ kernels at the shapes that choose their code: rows in one warp, in several, in tiles that are read
again, vector and scalar loads, few rows and many. Bits are the reference's (test_ops_parity tests the ops themselves).
"""

import pytest
import torch
from bits import assert_same_bits

from vqvit import native, reference
from vqvit.backends import cuda as backend

pytestmark = pytest.mark.skipif(
    not native.emulating_cuda() or native.cuda_unavailable() is not None, reason="needs the CUDA kernels' twin"
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# kFewRows of csrc/cuda/rows.h: from here on a thread takes 3 or 4 octets.
MANY = 2048

ROWS = {
    "several_warps": (3, 1500),
    "several_warps_vector": (2, 1536),
    "most_warps": (2, 5000),
    "four_octets": (1, 8300),
    "four_octets_vector": (1, 12800),
    "tiles": (2, 20000),
    "ragged_tile": (1, 16385),
    "many_short": (MANY + 3, 40),
    "many_eighth_of_warp": (MANY + 1, 72),
    "many_scalar": (MANY, 101),
}


def rows(shape, dtype=torch.float32):
    x = (torch.randn(shape) * 3 + 1).to(dtype)
    x[0, shape[1] // 2] = 40.0
    if shape[0] > 1:
        x[-1, -1] = torch.nan
    return x


def compare(op, *args):
    assert_same_bits(getattr(backend, op)(*args), getattr(reference, op)(*args))


def layernorm_vectors(k, dtype=torch.float32):
    return torch.randn(k).to(dtype), torch.randn(k).to(dtype), 1e-6


@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS)
def test_per_token(shape):
    compare("quantize_per_token", rows(shape), 0.5, None, True, True)
    compare("quantize_per_token", rows(shape, torch.float16), 0.0, torch.rand(shape[1]) + 0.5, False, True)


@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS)
def test_layernorm(shape):
    compare("layernorm_quantize", rows(shape, torch.bfloat16), *layernorm_vectors(shape[1]), 0.3, None, True)
    compare("layer_norm", rows(shape, torch.float16), *layernorm_vectors(shape[1], torch.bfloat16))


@pytest.mark.parametrize("shape", [s for s in ROWS.values() if s[0] < MANY], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_add_layernorm(shape, dtype):
    layer_scale = torch.rand(shape[1]).to(torch.float16)
    args = rows(shape, torch.float16), rows(shape, dtype), *layernorm_vectors(shape[1], torch.bfloat16)
    compare("add_layernorm_quantize", *args, layer_scale, 0.0, torch.tensor(0.02), True)
    compare("add_layernorm_quantize", *args, None, 0.0, None, False, True)


@pytest.mark.parametrize("k", [768, 1000, 101], ids=["three_octets", "four_octets", "scalar"])
def test_layernorm_of_many_rows(k):
    x, residual = torch.randn(MANY, k), torch.randn(MANY, k).half()
    compare("add_layernorm_quantize", x, residual, *layernorm_vectors(k), torch.rand(k), 0.0, None, True)


@pytest.mark.parametrize("columns", [slice(8, 776), slice(1, 769), slice(3, 1000)], ids=["aligned", "shifted", "odd"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_rows(columns, dtype):
    x = rows((9, 1024), dtype)[:, columns]
    q, scale, _, _ = reference.quantize_per_token(x)
    vectors = layernorm_vectors(x.shape[1], dtype)
    compare("quantize_per_token", x)
    compare("quantize_static", x, torch.tensor(0.04), torch.rand(x.shape[1]), True)
    compare("quantize_per_group", x)
    compare("quantize_residual", x, q, scale)
    compare("layer_norm", x, *vectors)
    compare("layernorm_quantize", x, *vectors)
    compare("add_layernorm_quantize", x, x, *vectors)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 0.02, 2.0**101])
def test_static_scales_that_a_reciprocal_does_not_serve(scale):
    x = torch.cat([rows((4, 1000)), rows((4, 1000)) * scale])
    x[2, 5], x[3, 7] = torch.inf, -torch.inf
    compare("quantize_static", x, torch.tensor(scale), None, True)
    many = x.repeat(MANY // 8, 1)[:, :200].contiguous()
    compare("quantize_static", many, torch.tensor(scale), None, True)
    q, row_scale = reference.quantize_static(x, torch.tensor(scale))[:2]
    compare("quantize_residual", x, q, row_scale)


@pytest.mark.parametrize("shape", [(3, 100), (2, 129), (2, 5000), (MANY, 264), (MANY, 130)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_per_group(shape, dtype):
    compare("quantize_per_group", rows(shape, dtype), torch.rand(shape[1]) + 0.5)


@pytest.mark.parametrize("patch", [14, 16, 28], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_patches(patch, dtype):
    pixels = torch.randn(2, 3, 4 * patch, 3 * patch).to(dtype)
    compare("patchify_quantize", pixels, patch, patch)
    compare("patchify_quantize", pixels[:, :, :, patch:], patch, patch)
    compare("patchify_quantize", pixels.flip(0).transpose(2, 3), patch, patch)


@pytest.mark.parametrize("images", [1, 130], ids=["few_patches", "many_patches"])
def test_patches_of_rectangles_and_whole_images(images):
    compare("patchify_quantize", torch.randn(images, 1, 32, 32), 4, 8, torch.rand(32) + 0.5)
    compare("patchify_quantize", torch.randn(2, 3, 64, 72), 64, 72)


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim"),
    [(1, 300, 2, 64), (1, 1100, 1, 16), (2, 9, 1, 600), (1, 2, 1, 8200), (8, 260, 16, 64), (2, 5, 3, 7)],
    ids=["few_blocks", "tokens_read_again", "wide_head", "tiles_of_a_head", "many_blocks", "odd_head"],
)
def test_qkv(batch, tokens, heads, head_dim):
    for dtype in FLOATS if batch < 8 else FLOATS[-1:]:  # every thread of the twin takes time
        qkv = torch.randn(batch, tokens, 3 * heads * head_dim).to(dtype)
        qkv[-1, tokens // 2, -3] = torch.nan
        compare("quantize_qkv", qkv, heads)


@pytest.mark.parametrize(("batch", "tokens", "heads", "head_dim"), [(2, 17, 2, 64), (130, 40, 2, 32), (1, 3, 1, 5)])
def test_values(batch, tokens, heads, head_dim):
    v = torch.randn(batch, tokens, heads, head_dim)
    codes = torch.empty(batch, heads, tokens, head_dim, dtype=torch.int8)
    scale = torch.empty(batch, heads, head_dim)
    sizes = batch, tokens, heads, head_dim
    native.run(native.cuda().vqvit_cuda_quantize_values, v.data_ptr(), *sizes, codes.data_ptr(), scale.data_ptr(), None)
    expected = reference.quantize_qkv(torch.cat([v.flatten(2)] * 3, dim=-1), heads)
    assert_same_bits((codes, scale), (expected[2], expected[5]))


def test_unknown_dtypes_are_refused():
    x, codes, scale = torch.randn(2, 8), torch.empty(2, 8, dtype=torch.int8), torch.full((2,), -1.0)
    arguments = x.data_ptr(), 7, 2, 8, 8, None, None, 0.0, 1, codes.data_ptr(), scale.data_ptr(), None, None, None
    with pytest.raises(RuntimeError, match="unknown dtype"):
        native.run(native.cuda().vqvit_cuda_quantize, *arguments)
    assert (scale == -1.0).all()
