"""Every backend returns the reference's bits: codes, scales, accumulators and float results, for every case."""

import pytest
import torch
from bits import assert_same_bits
from op_cases import CASES

import vqvit
from vqvit import backends, reference

VARIANTS = ("cpu-scalar", "cpu-avx2", "cpu-avx_vnni", "cpu-avx512_vnni", "triton", "cuda")

PARAMETERS = [
    pytest.param(variant, op, case, id=f"{variant}-{op}-{case}")
    for variant in VARIANTS
    for op, cases in CASES.items()
    for case in cases
]


@pytest.fixture
def forced():
    """Force one backend variant, and say why if this machine cannot run it."""

    def force(variant: str) -> None:
        name, _, isa = variant.partition("-")
        if reason := backends.unavailable(name):
            pytest.skip(f"backend {name!r}: {reason}")
        if isa:
            from vqvit.backends import cpu

            if isa not in cpu.available_isas():
                pytest.skip(f"this CPU does not run {isa}")
            cpu.set_isa(isa)
        vqvit.backend(name)

    yield force
    if backends.unavailable("cpu") is None:
        from vqvit.backends import cpu

        cpu.set_isa(None)


def on(device: str, argument):
    return argument.to(device) if isinstance(argument, torch.Tensor) else argument


def as_tuple(result) -> tuple:
    return result if isinstance(result, tuple | list) else (result,)


@pytest.mark.parametrize(("variant", "op", "case"), PARAMETERS)
def test_backend_matches_reference(forced, variant, op, case):
    args = CASES[op][case]()
    expected = as_tuple(getattr(reference, op)(*args))
    forced(variant)
    devices = backends.device_types(variant.partition("-")[0])
    device = "cpu" if "cpu" in devices else devices[0]
    received = as_tuple(getattr(torch.ops.vqvit, op)(*(on(device, a) for a in args)))
    assert_same_bits(received, expected)


@pytest.mark.parametrize(("op", "case"), [pytest.param(o, c, id=f"{o}-{c}") for o, cs in CASES.items() for c in cs])
def test_fake_matches_reference(op, case):
    """Shapes, dtypes and contiguity that torch.compile and torch.export are told."""
    args = CASES[op][case]()
    vqvit.backend("reference")
    real = as_tuple(getattr(torch.ops.vqvit, op)(*args))
    fake = as_tuple(getattr(torch.ops.vqvit, op)(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args)))
    for got, want in zip(fake, real, strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert got.is_contiguous() and (want.numel() == 0 or got.stride() == want.contiguous().stride())


@pytest.mark.parametrize("op", CASES)
def test_opcheck(op):
    draw = next(iter(CASES[op].values()))
    vqvit.backend("reference")
    torch.library.opcheck(getattr(torch.ops.vqvit, op).default, draw())
