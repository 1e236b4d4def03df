"""Finds, builds if need be, and loads the native libraries (C ABI: csrc/vqvit.h).

The library inside the package (put there by setup.py), or in the folder that `$VQVIT_PREBUILT` names, is used if it was
built from the sources at hand; else csrc/ is compiled once into a cache: `$VQVIT_CACHE`, or ~/.cache/vqvit. Nothing
happens at import.
"""

import ctypes
import hashlib
import importlib.util
import logging
import os
import struct
import threading
import time
from ctypes import c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

from vqvit import _build, cpus, layouts
from vqvit._build import CPU, CUDA, CUDA_TWIN, Library
from vqvit.files import sha256, write_file

logger = logging.getLogger("vqvit")

_PACKAGE = Path(__file__).resolve().parent

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
"""enum vqvit_dtype."""

STATUS = {
    1: "unknown dtype",
    2: "unknown activation",
    3: "unknown instruction set",
    4: "unsupported instruction set",
    5: "unknown mode",
    6: "CUDA",
    7: "unknown layout",
    8: "out of memory",
}
"""enum vqvit_status, without VQVIT_OK."""


PEAK_RUNS = 5
"""Runs of `cpu_peak`: the clock rises with the first ones."""


class NativeUnavailableError(RuntimeError):
    """The native library cannot be loaded on this machine; the message says why."""


class Gemm(ctypes.Structure):
    """struct vqvit_gemm."""

    _fields_ = (
        *((name, c_void_p) for name in (
            "a", "b", "a_scale", "b_scale", "bias", "layer_scale", "residual", "a_zero", "a_sum", "b_zero", "b_sum",
        )),
        *((name, c_int64) for name in ("m", "n", "k", "a_stride", "residual_stride")),
        *((name, c_int32) for name in (
            "b_layout", "a_groups", "activation", "bias_dtype", "layer_scale_dtype", "residual_dtype",
        )),
    )  # fmt: skip


class EncoderBlock(ctypes.Structure):
    """struct vqvit_encoder_block."""

    _fields_ = (
        *((name, c_void_p) for name in (
            "norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias", "qkv", "qkv_scale", "qkv_bias", "attn_out",
            "attn_out_scale", "attn_out_bias", "layer_scale1", "fc1", "fc1_scale", "fc1_bias", "fc2", "fc2_scale",
            "fc2_bias", "layer_scale2",
        )),
        *((name, c_int64) for name in ("width", "heads", "head_dim", "hidden")),
        *((name, c_float) for name in ("eps1", "eps2", "logit_scale", "qkv_delta", "attn_out_delta", "fc1_delta")),
        *((name, c_int32) for name in (
            "activation", "qkv_layout", "attn_out_layout", "fc1_layout", "fc2_layout", "attn_out_groups", "fc2_groups",
        )),
    )  # fmt: skip


_POINTER, _STREAM, _SIZE, _GEMM = c_void_p, c_void_p, c_int64, ctypes.POINTER(Gemm)
_BLOCK = ctypes.POINTER(EncoderBlock)
_MATRIX = (_POINTER, c_int, _SIZE, _SIZE)  # data, dtype, rows, columns

_SIGNATURES = {
    "cpu": {
        "set_isa": (c_char_p,),
        "limit_threads": (c_int,),
        "peak": (_SIZE, ctypes.POINTER(c_double), c_int),
        "quantize": (*_MATRIX, _POINTER, _POINTER, c_float, c_int, *[_POINTER] * 4, c_int),
        "quantize_per_group": (*_MATRIX, *[_POINTER] * 3, c_int),
        "quantize_residual": (_POINTER, c_int, _POINTER, _POINTER, _SIZE, _SIZE, _POINTER, c_int),
        "layernorm_quantize": (
            _POINTER, c_int, _POINTER, c_int, *[_POINTER] * 3, _SIZE, _SIZE, c_float, c_int, c_float, *[_POINTER] * 5,
            c_int,
        ),
        "layer_norm": (_POINTER, c_int, _POINTER, _POINTER, _SIZE, _SIZE, c_float, c_int, _POINTER, c_int),
        "patchify_quantize": (_POINTER, c_int, *[_SIZE] * 6, *[_POINTER] * 3, c_int),
        "weight_layout": (),
        "reorder_weight": (_POINTER, c_int, _SIZE, _SIZE, _POINTER, c_int, c_int),
        "int8_mm": (_GEMM, _POINTER, c_int),
        "int8_linear": (_GEMM, _POINTER, c_int, c_int),
        "int8_linear_quantize": (_GEMM, _POINTER, c_int, c_int, *[_POINTER] * 4, c_int),
        "int8_linear_qkv": (_GEMM, _SIZE, _SIZE, *[_POINTER] * 6, c_int),
        "int8_linear_compensated": (_GEMM, _POINTER, _POINTER, c_int, c_float, c_float, _POINTER, c_int, c_int),
        "quantize_qkv": (_POINTER, c_int, *[_SIZE] * 4, *[_POINTER] * 6, c_int),
        "int8_attention": (*[_POINTER] * 6, c_float, *[_SIZE] * 5, _POINTER, c_int, c_int),
        "int8_encoder_block": (_BLOCK, _POINTER, c_int, *[_SIZE] * 3, _POINTER, c_int),
    },
    "cuda": {
        "quantize": (
            _POINTER, c_int, *[_SIZE] * 3, _POINTER, _POINTER, c_float, c_int, *[_POINTER] * 4, _STREAM,
        ),
        "quantize_per_group": (_POINTER, c_int, *[_SIZE] * 3, *[_POINTER] * 3, _STREAM),
        "quantize_residual": (_POINTER, c_int, *[_SIZE] * 3, *[_POINTER] * 3, _STREAM),
        "layernorm_quantize": (
            _POINTER, c_int, _SIZE, _POINTER, c_int, _SIZE, *[_POINTER, c_int] * 3, _SIZE, _SIZE, c_float, c_int,
            c_float, *[_POINTER] * 5, _STREAM,
        ),
        "layer_norm": (
            _POINTER, c_int, _SIZE, *[_POINTER, c_int] * 2, _SIZE, _SIZE, c_float, c_int, _POINTER, _STREAM,
        ),
        "patchify_quantize": (_POINTER, c_int, *[_SIZE] * 4, _POINTER, _SIZE, _SIZE, *[_POINTER] * 3, _STREAM),
        "quantize_qkv": (_POINTER, c_int, *[_SIZE] * 6, *[_POINTER] * 6, _STREAM),
        "quantize_values": (_POINTER, *[_SIZE] * 4, *[_POINTER] * 2, _STREAM),
        "int8_mm": (_GEMM, _POINTER, _STREAM),
        "int8_linear": (_GEMM, _POINTER, c_int, _STREAM),
        "int8_linear_quantize": (_GEMM, *[_POINTER] * 4, _STREAM),
        "int8_linear_qkv": (_GEMM, _SIZE, _SIZE, *[_POINTER] * 3, _STREAM),
        "int8_linear_compensated": (_GEMM, _POINTER, _POINTER, c_int, c_float, c_float, _POINTER, c_int, _STREAM),
        "int8_attention": (*[_POINTER] * 6, c_float, *[_SIZE] * 5, _POINTER, c_int, _STREAM),
        "int8_attention_quantize": (*[_POINTER] * 6, c_float, *[_SIZE] * 5, *[_POINTER] * 2, _STREAM),
    },
}  # fmt: skip

_loaded: dict[str, ctypes.CDLL | str] = {}
"""By the library's file: the library, or why it cannot be loaded."""

_locks: dict[str, threading.Lock] = {}


def _renew_locks() -> None:
    """A forked child has none of the threads that may hold its copy of a lock."""
    _locks.update((library.file, threading.Lock()) for library in (CPU, CUDA, CUDA_TWIN))


_renew_locks()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)

PREBUILT = "VQVIT_PREBUILT"
"""Environment variable: a folder of libraries built elsewhere, each used if its sources are those at hand."""


def cpu() -> ctypes.CDLL:
    """The CPU library, loaded on first use. Raises `NativeUnavailableError`."""
    return _library(CPU)


def cuda() -> ctypes.CDLL:
    """The CUDA library, or its twin on the CPU where `emulating_cuda`. Raises `NativeUnavailableError`."""
    return _library(CUDA_TWIN if emulating_cuda() else CUDA)


def library_file(library: Library) -> Path:
    """The file of a library, which is loaded, and built if need be. Raises `NativeUnavailableError`."""
    return Path(_library(library)._name)


def emulating_cuda() -> bool:
    """Whether VQVIT_CUDA_TWIN=1 asks for the CUDA kernels on the CPU: slow, and to the bit what a GPU computes."""
    return os.environ.get("VQVIT_CUDA_TWIN") == "1"


def cpu_unavailable() -> str | None:
    """Why the CPU library cannot be used, or None if it can."""
    try:
        cpu()
    except NativeUnavailableError as error:
        return str(error)
    return None


def open_cpu(path: Path) -> ctypes.CDLL:
    """The CPU library at `path`, as `_build.build` wrote it from these sources or others of the same interface."""
    return _declare(_open(path), CPU.device)


def use_cpu(library: ctypes.CDLL) -> None:
    """Every later call of a CPU kernel goes to `library`, from `open_cpu`: for comparing builds, and sanitizers."""
    with _locks[CPU.file]:
        _loaded[CPU.file] = library


def open_twin(path: Path) -> ctypes.CDLL:
    """The CUDA kernels' twin at `path`, as `_build.build` wrote it from sources of the same interface."""
    return _declare(_open(path), CUDA_TWIN.device)


def use_twin(library: ctypes.CDLL) -> None:
    """Every later call of the twin goes to `library`, from `open_twin`: for sanitizers, and planted mistakes."""
    with _locks[CUDA_TWIN.file]:
        _loaded[CUDA_TWIN.file] = library


def cuda_unavailable() -> str | None:
    """Why the CUDA library cannot be used, or None if it is there or can be built (which takes minutes: not now)."""
    library = CUDA_TWIN if emulating_cuda() else CUDA
    if library.file in _loaded:
        found = _loaded[library.file]
        return found if isinstance(found, str) else None
    if any(path.is_file() for path in _ready(library)):
        return None
    try:
        _build.compiler(library)
    except _build.BuildError as error:
        return str(error)
    return None if csrc_directory() else "no sources to build the CUDA library from"


def _library(library: Library) -> ctypes.CDLL:
    if library.file not in _loaded:
        with _locks[library.file]:  # whoever comes while it is built waits for it
            if library.file not in _loaded:
                try:
                    _loaded[library.file] = _declare(_load(library), library.device)
                except (_build.BuildError, OSError) as error:
                    _loaded[library.file] = str(error)
    found = _loaded[library.file]
    if isinstance(found, str):
        raise NativeUnavailableError(found)
    return found


def csrc_directory() -> Path | None:
    """The C++ sources: beside the package in a checkout, inside it in an installation."""
    for folder in (_PACKAGE.parent / "csrc", _PACKAGE / "_csrc"):
        if (folder / "vqvit.h").is_file():
            return folder
    return None


def cache_directory() -> Path:
    """Where libraries built on first use are kept."""
    chosen = os.environ.get("VQVIT_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "vqvit"


def cached_library(csrc: Path, library: Library) -> Path:
    """The library of these sources, flags and compiler in the cache, built if it is not there."""
    version = _build.compiler_version(library)
    key = hashlib.sha256(f"{_build.source_hash(csrc, library)} {version}".encode()).hexdigest()[:16]
    path = cache_directory() / key / library.file
    digest = cache_directory() / f"{key}.sha256"
    if not _is_whole(path, digest):
        level = logging.WARNING if library.compiler == "nvcc" else logging.INFO  # minutes, or seconds
        logger.log(level, "compiling %s into %s, once", csrc / library.device, path)
        start = time.perf_counter()
        _build.build(csrc, library, path)
        write_file(digest, sha256(path) + "\n")
        logger.info("compiled in %.1f s", time.perf_counter() - start)
    return path


def _is_whole(path: Path, digest: Path) -> bool:
    """Whether the cached library is what was compiled: opening one that was cut off would end the process."""
    return path.is_file() and digest.is_file() and digest.read_text().strip() == sha256(path)


def _ready(library: Library) -> list[Path]:
    """Where the library may lie without having been built here."""
    prebuilt = os.environ.get(PREBUILT)
    return [_PACKAGE / "_lib" / library.file, *([Path(prebuilt) / library.file] if prebuilt else [])]


def _load(library: Library) -> ctypes.CDLL:
    csrc = csrc_directory()
    for path in filter(Path.is_file, _ready(library)):
        if _is_cut_off(path):
            logger.info("%s is cut off", path)
            continue
        try:
            opened = _open(path)
        except OSError as error:
            if csrc is None:
                raise
            logger.info("%s cannot be loaded here: %s", path, error)
            continue
        if csrc is None or _text(opened, library.device, "source_hash") in _hashes(csrc, library):
            return opened
        logger.info("%s was built from other sources than %s", path, csrc)
    if csrc is None:
        raise _build.BuildError(f"neither {_PACKAGE / '_lib' / library.file} nor sources to build it from")
    if library is CUDA:
        library = _build.cuda_library((_cuda_arch(),))
    return _open(cached_library(csrc, library))


def _hashes(csrc: Path, library: Library) -> set[str]:
    """Of the sources at hand: a CUDA library may be for all parts, or for the one at hand alone."""
    wanted = [library] + ([_build.cuda_library((_cuda_arch(),))] if library is CUDA else [])
    return {_build.source_hash(csrc, each) for each in wanted}


def _is_cut_off(path: Path) -> bool:
    """Whether a 64-bit ELF file ends before its section headers, which come last; False for what is none."""
    with open(path, "rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return len(header) < 64
    offset, size, count = *struct.unpack_from("<Q", header, 40), *struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < offset + size * count


def _cuda_arch() -> str:
    """The entry of `_build.CUDA_ARCHS` that serves the current device."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return "90a" if (major, minor) == (9, 0) else "75" if (major, minor) < (8, 0) else "80"


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        if "omp" not in str(error).lower():
            raise
    # torch is not loaded, or made no OpenMP runtime visible: take its copy all the same (it may come later, and two
    # runtimes would be two pools of threads), else the system's.
    torch = importlib.util.find_spec("torch")
    bundled = sorted(Path(torch.origin).parent.glob("lib/libgomp*.so*")) if torch and torch.origin else []
    ctypes.CDLL(str(bundled[0]) if bundled else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def _declare(library: ctypes.CDLL, device: str) -> ctypes.CDLL:
    for name, argument_types in _SIGNATURES[device].items():
        function = getattr(library, f"vqvit_{device}_{name}")
        function.argtypes, function.restype = argument_types, c_int
    if device == CPU.device:
        library.vqvit_cpu_limit_threads(cpus.usable_cpus())
    return library


def cpu_isa() -> str:
    """Instruction set that the CPU library uses now."""
    return _text(cpu(), "cpu", "isa")


def cpu_isa_available() -> tuple[str, ...]:
    """Instruction sets this machine can run, best last."""
    return tuple(_text(cpu(), "cpu", "isa_available").split(","))


def cpu_weight_layout() -> str:
    """The layout, of `layouts.PACKED`, that the instruction set in use is fastest with."""
    return layouts.NAMES[cpu().vqvit_cpu_weight_layout()]


def cpu_peak(threads: int, rounds: int = 1 << 22) -> float:
    """Int8 operations a second, in 10^9, of `threads` threads that only multiply and add in registers: the best of
    several runs of `rounds` rounds.

    Raises `RuntimeError` for an instruction set that has no int8 products (scalar).
    """
    measured = []
    for _ in range(PEAK_RUNS):
        gigaops = c_double()
        run(cpu().vqvit_cpu_peak, rounds, ctypes.byref(gigaops), threads)
        measured.append(gigaops.value)
    return max(measured)


def run(function, *args) -> None:
    """Call a function of a library. Raises `RuntimeError` with the reason if its status is not VQVIT_OK; `MemoryError`
    if there is no room for its scratch.
    """
    status = function(*args)
    if status != 0:
        reason = STATUS.get(status, str(status))
        if reason == "out of memory":
            raise MemoryError(f"{function.__name__}: expected room for its scratch; there is not enough memory")
        if reason == "CUDA":
            reason = _text(cuda(), "cuda", "last_error")
        raise RuntimeError(f"{function.__name__}: {reason}")


def _text(library: ctypes.CDLL, device: str, name: str) -> str:
    function = getattr(library, f"vqvit_{device}_{name}")
    function.argtypes, function.restype = (), c_char_p
    return function().decode()
