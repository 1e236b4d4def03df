"""Where the int8 tensor-core instructions of NVIDIA GPUs keep matrix elements: facts to compare kernels with.

Source: the layouts of CuTe in CUTLASS 4.7.0 (commit 7107b05535f8), expanded once on the host, of
MMA_Traits<SM90_64x128x32_S32S8S8_SS_TN>, <SM80_16x8x32_S32S8S8S32_TN> and <SM75_8x8x16_S32S8S8S32_TN>,
Copy_Traits<SM75_U32x4_LDSM_N> and <SM75_U16x8_LDSM_T>, and GMMA::Layout_K_SW128_Atom<int8_t> tiled to 64 and 128 rows
of 128 bytes; descriptors by make_gmma_desc, steps by partition_fragment_A and _B. A layout is kept as CuTe writes it,
sizes and strides, beside the checksum of the numbers that CuTe printed.
"""

import itertools
import zlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Index of each value of each thread: the digits of both, lowest first in mixed radix, times their strides.

    checksum: CRC-32 of the indices as decimal numbers with commas between, thread by thread.
    """

    thread: tuple[tuple[int, ...], tuple[int, ...]]
    value: tuple[tuple[int, ...], tuple[int, ...]]
    checksum: int

    def expand(self) -> list[list[int]]:
        """[thread][value] -> index."""
        return [[t + v for v in _offsets(*self.value)] for t in _offsets(*self.thread)]


def _offsets(sizes: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    digits = itertools.product(*(range(size) for size in reversed(sizes)))
    return [sum(d * s for d, s in zip(reversed(number), strides, strict=True)) for number in digits]


def checksum(indices: list[int]) -> int:
    return zlib.crc32(",".join(map(str, indices)).encode())


# Values: bytes of a lane's operand registers, or its accumulator registers. Indices: row + rows · column of the matrix,
# column being k for operands; for B the rows are those of Bᵀ, as it is stored.
WGMMA_C = Layout(((4, 8, 4), (128, 1, 16)), ((2, 2, 16), (64, 8, 512)), 0xAD511CE6)  # m64n128k32: 64 rows
MMA_A = Layout(((4, 8), (64, 1)), ((4, 2, 2), (16, 8, 256)), 0xA2CCDC83)  # m16n8k32: 16 rows
MMA_B = Layout(((4, 8), (32, 1)), ((4, 2), (8, 128)), 0xDFC33394)  # 8 rows
MMA_C = Layout(((4, 8), (32, 1)), ((2, 2), (16, 8)), 0x425CCC02)  # 16 rows
SMALL_MMA_A = Layout(((4, 8), (32, 1)), ((4,), (8,)), 0x4C20486E)  # m8n8k16: 8 rows
SMALL_MMA_B = Layout(((4, 8), (32, 1)), ((4,), (8,)), 0x4C20486E)  # 8 rows
SMALL_MMA_C = Layout(((4, 8), (16, 1)), ((2,), (8,)), 0x07BBC9A6)  # 8 rows

# ldmatrix x4. Values: bits of a lane's four registers. Indices: 128 · lane + bit of the 16 bytes it points at.
LDMATRIX = Layout(((32,), (32,)), ((32, 4), (1, 1024)), 0x5A49B315)
LDMATRIX_TRANSPOSED = Layout(((4, 8), (256, 16)), ((16, 2, 4), (1, 128, 1024)), 0xE35CA6CE)

LAYOUTS = {name: layout for name, layout in list(globals().items()) if isinstance(layout, Layout)}


# ---- operands of wgmma in shared memory: K-major rows of 128 bytes, swizzled over 128 bytes -----------------------

DESCRIPTOR = 0x4000004000010000
"""Of a tile at shared address 0, of 64 and of 128 rows. From the lowest bit: start address / 16 in bits 0 to 13,
leading byte offset / 16 (of no meaning here, 1) in 16 to 29, stride byte offset / 16 (64: eight rows are 1024 bytes) in
32 to 45, base offset 0 in 49 to 51, layout type 1 (128-byte swizzle) in 62 and 63."""


K_STEP = 2  # of the start address, for the next 32 columns
ROWS_STEP = 512  # for the next 64 rows

SWIZZLE_CHECKSUMS = {64: 0x0A7E13BC, 128: 0x083732AD}
"""Rows -> checksum of `swizzled` over rows and columns."""


def swizzled(row: int, column: int) -> int:
    """Byte of a tile where element (row, column) lies: chunks of 16 bytes are crossed with the row."""
    return 128 * row + 16 * (column // 16 ^ row % 8) + column % 16
