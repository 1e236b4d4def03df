"""Whether the kernels of a device compute the right bits at real shapes: the checks of `vqvit doctor --gpu`.

    python -m vqvit.device_checks '{"checks": ["int8_mm"], "backends": ["cuda", "triton"], "device": "cuda", "size":
    "vit-b16"}'

`int8_mm` is compared with `torch._int_mm`; every other op of the first backend with the same op of the second; the
logits of a model on one backend with those that an earlier process stored. Each check is a child process
(vqvit/children.py): one that hangs or loses the device takes nothing with it.
"""

import contextlib
import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import vqvit
from vqvit import backends, engines
from vqvit import numerics as nm
from vqvit.children import DEVICE_LOST, Child, Reporter, die_with_parent
from vqvit.quantize import quantize_

LOGITS = "logits"


@dataclass(frozen=True)
class Size:
    """Of a model's layers: images whose tokens make M, tokens of an image, width, MLP width, heads."""

    images: tuple[int, ...]
    tokens: int
    width: int
    hidden: int
    heads: int
    patch: int
    batch: int  # of whole models

    @property
    def pixels(self) -> int:
        """Side of an image with these tokens, one of which is CLS."""
        return self.patch * round((self.tokens - 1) ** 0.5)


SIZES = {
    "vit-b16": Size((1, 8, 64, 256), 197, 768, 3072, 12, 16, 64),  # M = 197, 1576, 12608, 50432
    "tiny": Size((1, 2), 17, 64, 130, 1, 8, 2),
}
"""The tiny one is for the backends of a CPU, to rehearse."""


class Draw:
    """Operands on a device, the same for the same seed."""

    def __init__(self, device: torch.device, seed: int = 0):
        self.device, self._generator = device, torch.Generator(device).manual_seed(seed)

    def codes(self, *shape: int) -> Tensor:
        return torch.randint(
            -nm.QMAX, nm.QMAX + 1, shape, dtype=torch.int8, device=self.device, generator=self._generator
        )

    def scales(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device, generator=self._generator) * 0.01 + 1e-3

    def floats(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self._generator).to(dtype)


Case = tuple[str, tuple, dict]
"""A name, and the arguments of an op."""


def _rows(draw: Draw, size: Size, images: int, *, op: str) -> Iterator[Case]:
    m, k = images * size.tokens, size.width
    x, wide = draw.floats(m, k), draw.floats(m, size.hidden)
    weight, bias = draw.floats(k), draw.floats(k)
    if op == "quantize_per_token":
        yield "symmetric", (wide,), {}
        yield "asymmetric", (x, 0.0, None, False, True), {}
    elif op == "quantize_per_group":
        yield "wide", (wide,), {}
    elif op == "quantize_static":
        yield "sums", (x, torch.tensor(0.02, device=draw.device), None, True), {}
    elif op == "quantize_residual":
        yield "codes", (x, draw.codes(m, k), draw.scales(m)), {}
    elif op == "layer_norm":
        yield "bf16", (x, weight, bias, 1e-6), {}
    elif op == "layernorm_quantize":
        yield "bf16", (x, weight, bias, 1e-6), {}
    elif op == "add_layernorm_quantize":
        yield "bf16", (x, draw.floats(m, k), weight, bias, 1e-6, draw.floats(k)), {}


def _patches(draw: Draw, size: Size, images: int) -> Iterator[Case]:
    yield "bf16", (draw.floats(images, 3, size.pixels, size.pixels), size.patch, size.patch), {}


def _mm(draw: Draw, size: Size, images: int) -> Iterator[Case]:
    m = images * size.tokens
    for n, k in ((3 * size.width, size.width), (size.width, size.hidden), (size.hidden, size.width)):
        k = k // 16 * 16  # torch._int_mm wants multiples of 8
        n = n // 8 * 8
        yield f"{n}x{k}", (draw.codes(m, k), draw.codes(n, k)), {}


def _linear_operands(draw: Draw, m: int, n: int, k: int, groups: bool = False) -> tuple:
    scale = draw.scales(m, nm.group_count(k)) if groups else draw.scales(m)
    return draw.codes(m, k), scale, draw.codes(n, k), draw.scales(n), draw.floats(n)


def _linear(draw: Draw, size: Size, images: int) -> Iterator[Case]:
    m, w, h = images * size.tokens, size.width, size.hidden
    half = {"out_dtype": torch.bfloat16}
    yield "qkv", _linear_operands(draw, m, 3 * w, w), half
    yield "fc2", (*_linear_operands(draw, m, w, h), "none", None, draw.floats(m, w)), half
    yield "attn_out groups", (*_linear_operands(draw, m, w, w, True), "none", None, draw.floats(m, w)), half
    yield "fc2 groups", (*_linear_operands(draw, m, w, h, True), "none", None, draw.floats(m, w)), half


def _linear_quantize(draw: Draw, size: Size, images: int) -> Iterator[Case]:
    m, w, h = images * size.tokens, size.width, size.hidden
    yield "fc1 groups", (*_linear_operands(draw, m, h, w), "gelu"), {"per_group": True}
    yield "fc1 per token", (*_linear_operands(draw, m, h, w), "gelu"), {}
    static = {"out_scale": torch.tensor(0.02, device=draw.device), "row_sum": True}
    yield "fc1 static", (*_linear_operands(draw, m, h, w), "gelu"), static


def _linear_qkv(draw: Draw, size: Size, images: int) -> Iterator[Case]:
    m, w = images * size.tokens, size.width
    yield "heads", (*_linear_operands(draw, m, 3 * w, w), size.tokens, size.heads), {}


def _compensated(draw: Draw, size: Size, images: int) -> Iterator[Case]:
    m, w = images * size.tokens, size.width
    a, a_scale, b, b_scale, bias = _linear_operands(draw, m, w, w)
    yield "full", (a, a_scale, draw.codes(m, w), b, b_scale, draw.codes(w, w), bias, "full"), {}


def _quantize_qkv(draw: Draw, size: Size, images: int) -> Iterator[Case]:
    yield "bf16", (draw.floats(images, size.tokens, 3 * size.width), size.heads), {}


def _attention(draw: Draw, size: Size, images: int) -> Iterator[Case]:
    shape = (images, size.heads, size.tokens, size.width // size.heads)
    codes = (draw.codes(*shape) for _ in range(3))
    yield "heads", (*codes, *(draw.scales(*shape[:3]) for _ in "qk"), draw.scales(*shape[:2], shape[3]), 0.125), {}


ROW_OPS = (
    "quantize_per_token", "quantize_per_group", "quantize_static", "quantize_residual", "layer_norm",
    "layernorm_quantize", "add_layernorm_quantize",
)  # fmt: skip

CHECKS: dict[str, Callable[[Draw, Size, int], Iterator[Case]]] = {
    "int8_mm": _mm,
    "int8_linear": _linear,
    "int8_linear_quantize": _linear_quantize,
    "int8_linear_qkv": _linear_qkv,
    "int8_attention": _attention,
    "int8_attention_quantize": _attention,
    **{op: functools.partial(_rows, op=op) for op in ROW_OPS},
    "quantize_qkv": _quantize_qkv,
    "patchify_quantize": _patches,
    "int8_linear_compensated": _compensated,
}
"""Every op that launches a kernel, those of a block first; an encoder block is these ops."""


# ---- comparing ------------------------------------------------------------------------------------------------------


def differing(got: Tensor, want: Tensor) -> int:
    """Values that differ, NaN being equal to NaN; all of them if shape or dtype do."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return max(1, want.numel())
    equal = (got == want) | ((got != got) & (want != want))
    return int((~equal).sum())


def as_tuple(result: object) -> tuple:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def call(op: str, backend: str, arguments: tuple, options: dict) -> tuple[Tensor, ...]:
    """What an op returns on a backend, by way of torch's dispatcher as a model calls it."""
    with vqvit.backend(backend), torch.inference_mode():
        return as_tuple(getattr(torch.ops.vqvit, op)(*arguments, **options))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_lost(device: torch.device) -> bool:
    """Whether the device answers no call any more, as after an illegal access."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"


def compared(op: str, backend: str, against: str, arguments: tuple, options: dict) -> dict:
    """A row: how many values of `backend` differ from those of `against`, or how it failed."""
    device = arguments[0].device
    try:
        if against == "torch._int_mm":
            want: tuple = (torch._int_mm(arguments[0], arguments[1].t()),)
        else:
            want = call(op, against, arguments, options)
        got = call(op, backend, arguments, options)
        wrong = sum(differing(g, w) for g, w in zip(got, want, strict=True))
        synchronize(device)
    except Exception as error:  # a kernel may fail in any way: the row says how
        return {"values": "", "wrong": 1, "note": short(error)}
    return {"values": sum(w.numel() for w in want), "wrong": wrong, "note": ""}


def check_op(op: str, names: Sequence[str], device: torch.device, size: Size, reporter: Reporter) -> bool:
    """Rows for an op at every M. False if the device is lost."""
    if op == "int8_mm":
        pairs = [(backend, "torch._int_mm") for backend in names]
    else:
        pairs = [(names[0], names[1] if len(names) > 1 else "reference")]
    for images in size.images:
        for case, arguments, options in CHECKS[op](Draw(device), size, images):
            for backend, against in pairs:
                if not reporter.begin(f"{op} {case} on {backend}, M = {images * size.tokens}"):
                    continue
                found = compared(op, backend, against, arguments, options)
                reporter.row(
                    {"op": op, "case": case, "m": images * size.tokens, "backend": backend, "against": against} | found
                )
                if found["note"] and device_lost(device):
                    return False
    return True


def check_logits(backend: str, device: torch.device, size: Size, folder: Path, reporter: Reporter) -> bool:
    """Logits of a quantized model: stored for the next backend, and compared with what others stored."""
    reporter.doing(f"logits on {backend}")
    try:
        model = _model(size).to(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize_(model)
        pixels = torch.randn(size.batch, 3, size.pixels, size.pixels, generator=torch.Generator().manual_seed(0))
        with vqvit.backend(backend), torch.inference_mode():
            logits = model(pixels.to(device)).logits.cpu()
        row = {"values": logits.numel(), "wrong": int((~logits.isfinite()).sum()), "note": ""}
        torch.save(logits, folder / f"{LOGITS}-{backend}.pt")
    except Exception as error:  # as above
        row, logits = {"values": "", "wrong": 1, "note": short(error)}, None
    others = [p for p in sorted(folder.glob(f"{LOGITS}-*.pt")) if p.stem != f"{LOGITS}-{backend}"]
    base = {"op": LOGITS, "case": f"{size.batch} images", "m": size.batch * size.tokens, "backend": backend}
    if logits is None or not others:
        reporter.row({**base, "against": "", **row})
    else:
        for path in others:
            wrong = row["wrong"] + differing(logits, torch.load(path, weights_only=True))
            reporter.row({**base, "against": path.stem.removeprefix(f"{LOGITS}-"), **row, "wrong": wrong})
    return not (row["note"] and device_lost(device))


def _model(size: Size) -> torch.nn.Module:
    """ViT-B/16 with random weights, or a model of two blocks of another size."""
    if size is SIZES["vit-b16"]:
        return engines.random_model("vit-b16")
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=size.width, num_hidden_layers=2, num_attention_heads=size.heads, intermediate_size=size.hidden,
        image_size=size.pixels, patch_size=size.patch, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


# ---- children -------------------------------------------------------------------------------------------------------


def children(
    names: Sequence[str],
    device: str,
    size: str,
    folder: Path,
    after: tuple[str, ...] = (),
    weight: int = 1,
    together: bool = False,
) -> list[Child]:
    """A child for each op, or one for all ops `together`; and one for the logits of each backend, which wait for each
    other. `folder` keeps the logits.
    """
    spec, checks = {"device": device, "size": size, "folder": str(folder)}, list(CHECKS)
    restarts = len(SIZES[size].images) * 2 * len(names)  # a case that kills its process costs that case alone
    found = []
    for name, share in [("all", checks)] if together else [(check, [check]) for check in checks]:
        command = _command(spec | {"checks": share, "backends": list(names)})
        found.append(Child(f"bits/{name}", command, 35.0, 120.0, 45.0, after, weight, restarts))
    earlier = after
    for backend in names:
        command = _command(spec | {"checks": [LOGITS], "backends": [backend]})
        found.append(Child(f"{LOGITS}/{backend}", command, 45.0, 120.0, None, earlier, weight))
        earlier = (*earlier, found[-1].name)
    return found


def _command(spec: dict) -> tuple[str, ...]:
    return sys.executable, "-m", "vqvit.device_checks", json.dumps(spec)


def native_backends(device_type: str) -> tuple[str, ...]:
    """Backends of kernels that take tensors of this type here, `cuda` first: what is compared, and what with."""
    names = ("cuda", "triton") if device_type == "cuda" else ("cuda", "triton", "cpu")
    return tuple(
        name
        for name in names
        if backends.unavailable(name) is None and device_type in (backends.device_types(name) or (device_type,))
    )


def main() -> int:
    die_with_parent()
    spec, reporter = json.loads(sys.argv[1]), Reporter()
    reporter.doing("imports and the device's first call")
    device, size = torch.device(spec["device"]), SIZES[spec["size"]]
    with contextlib.suppress(RuntimeError):  # a lost device shows at the first item
        synchronize(device)
    for check in spec["checks"]:
        if check == LOGITS:
            alive = check_logits(spec["backends"][0], device, size, Path(spec["folder"]), reporter)
        else:
            alive = check_op(check, spec["backends"], device, size, reporter)
        if not alive:
            return DEVICE_LOST
    reporter.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
