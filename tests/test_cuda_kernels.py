"""CUDA C++ GEMMs on every path of their own: tiles, architectures, ragged shapes. test_ops_parity has the ops.

Without a GPU everything runs in the host's twin (see conftest), which takes its architecture from the environment.
"""

import pytest
import torch
from bits import assert_same_bits

from vqvit import native, ops, reference
from vqvit.backends import cuda

if reason := cuda.unavailable():
    pytest.skip(f"cuda backend: {reason}", allow_module_level=True)

DEVICE = cuda.device_types()[0]


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def on_device(argument):
    return argument.to(DEVICE) if isinstance(argument, torch.Tensor) else argument


def check(op: str, *args) -> None:
    """`op` of the CUDA backend returns the reference's bits."""
    assert_same_bits(getattr(cuda, op)(*map(on_device, args)), getattr(reference, op)(*args))


# The twin's architecture and multiprocessors: few of them make large tiles and several tiles a block, many small ones.
MACHINES = {"sm_80_large": (80, 1), "sm_80_wide": (80, 5), "sm_80_small": (80, 100), "sm_90_large": (90, 1),
            "sm_90_turns": (90, 3), "sm_90_wide": (90, 5)}  # fmt: skip


@pytest.fixture(params=MACHINES.values(), ids=MACHINES)
def machine(request, monkeypatch):
    if not native.emulating_cuda():
        pytest.skip("a real GPU is what it is")
    arch, multiprocessors = request.param
    monkeypatch.setenv("VQVIT_TWIN_ARCH", str(arch))
    monkeypatch.setenv("VQVIT_TWIN_MULTIPROCESSORS", str(multiprocessors))


M, N, K = 131, 260, 400  # ragged in every dimension, several tiles and more stages than the ring holds


def operands(k: int = K, groups: bool = False) -> tuple[torch.Tensor, ...]:
    a_scale = torch.rand(M, -(-k // 128)) * 1e-3 if groups else torch.rand(M) * 1e-3
    a_scale[3] = torch.nan
    return codes(M, k), a_scale, codes(N, k), torch.rand(N), torch.randn(N)


def test_accumulators(machine):
    check("int8_mm", codes(M, K), codes(N, K))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_gelu_layer_scale_and_residual(machine, dtype):
    layer_scale, residual = torch.randn(N).half(), torch.randn(M, N).bfloat16()
    check("int8_linear", *operands(), "gelu", layer_scale, residual, None, None, None, None, dtype)


def test_static_codes(machine):
    check("int8_linear_quantize", *operands(), "gelu", *[None] * 4, torch.tensor(0.1), True, True)


@pytest.mark.parametrize("groups", [False, True], ids=["a_scale", "group_scales"])
def test_codes_by_group(machine, groups):
    check("int8_linear_quantize", *operands(groups=groups), "none", *[None] * 4, None, True, False, True)


@pytest.mark.parametrize("k", [128, 256, 384, 400], ids=["one_group", "two", "three", "four_short"])
def test_group_scales(machine, k):
    check("int8_linear", *operands(k, groups=True))


@pytest.mark.parametrize("head_dim", cuda.PROJECTION_HEAD_DIMS)
def test_projection(machine, head_dim):
    tokens, heads = 33, 2
    n = 3 * heads * head_dim
    a_scale = torch.rand(2 * tokens) * 1e-3
    a_scale[4] = torch.nan
    check(
        "int8_linear_qkv", codes(2 * tokens, 144), a_scale, codes(n, 144), torch.rand(n), torch.randn(n), tokens, heads
    )


def test_rows_that_16_byte_copies_do_not_fit(machine):
    a, b = codes(M, 600)[:, 5:593], codes(N, 588)
    assert a.shape[1] == b.shape[1]
    check("int8_mm", a, b)


def test_kernels_are_launched_with_their_device_current():
    own = {name: getattr(cuda, name) for name in ops.NAMES}
    own = {name: f for name, f in own.items() if getattr(f, "__module__", None) == cuda.__name__}
    assert len(own) > 10
    assert [name for name, function in own.items() if not hasattr(function, "__wrapped__")] == []
