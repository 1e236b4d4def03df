"""Which GPUs the kernels serve, and with which row of their tables of tiles. Imports nothing, so that all can ask."""

MIN_CAPABILITY = (8, 0)
"""Triton's int8 products need the mma.sync of Ampere."""

CUDA_MIN_CAPABILITY = (7, 5)
"""The CUDA C++ kernels of csrc/cuda also run on the first int8 tensor cores, those of Turing."""

CONFIG_ROWS = {(8, 0): 80, (8, 6): 86, (8, 7): 80, (8, 9): 86, (9, 0): 90}
"""Row of the kernels' tables of tiles, by compute capability: every entry is compiled and checked for that row."""

NEWER_ROWS = {(10, 0): 80, (10, 3): 80}
"""Newer parts with as much shared memory as sm_80. Any other newer part takes row 86, which needs the least."""


def config_row(capability: tuple[int, int]) -> int:
    """The row of the kernels' tables of tiles that serves a device."""
    return (CONFIG_ROWS | NEWER_ROWS).get(capability, 86)


def part_name(capability: tuple[int, int]) -> str:
    return "sm_{}{}".format(*capability)


def too_old(capability: tuple[int, int], least: tuple[int, int]) -> str:
    """Why kernels that need compute capability `least` do not run on a part."""
    needed = "{}.{}".format(*least)
    return f"{part_name(capability)} is not supported: these int8 kernels need compute capability {needed} or later"


def support(capability: tuple[int, int]) -> str:
    """What a GPU of this compute capability can expect, in words."""
    name = part_name(capability)
    if capability < CUDA_MIN_CAPABILITY:
        return too_old(capability, CUDA_MIN_CAPABILITY)
    if capability < MIN_CAPABILITY:
        return f"{name}: the CUDA C++ kernels only, backend 'cuda'"
    if capability in CONFIG_ROWS:
        return f"{name}: tiles of row {config_row(capability)}"
    return (
        f"{name} is newer than these kernels and untested: the tiles are those of sm_{config_row(capability)}, without"
        " the part's own tensor-core instructions; measure against half precision"
    )
