"""How a weight's int8 codes (N, K) lie in memory; its number of dimensions tells which layout an array has.

    rows     (N, K)
    panels   (⌈N/64⌉, ⌈K/4⌉ + 1, 64, 4): what products of four channels read, on instruction sets with VNNI and without
    strips   (⌈N/64⌉, 4, bytes): what AVX2 reads, whose products sum 16 channels as int16

`vqvit.reference.pack_weight` defines the packed ones; their shapes tell K to 4 channels and to 16, and the zeros behind
the last channel tell the rest: `vqvit.validation` refuses a K that would cut weights off. Checkpoints hold
rows and exported models panels; a process packs what it loads for the instruction set it has
(`vqvit.native.cpu_weight_layout`), as oneDNN and llama.cpp do.
"""

NAMES = ("rows", "panels", "strips")
"""In the order of enum vqvit_layout."""

PACKED = ("panels", "strips")

CODES = {2: 0, 4: 1, 3: 2}
"""enum vqvit_layout of a weight, by its number of dimensions."""

PANEL = 64
"""Output channels in a panel, or in the strips of one."""

K_GROUP = 4
"""Consecutive input channels that one VNNI lane multiplies and sums."""

STRIP = 16
"""Output channels in a strip."""

CHUNK = 16
"""Input channels whose products a strip's kernel sums as int16."""

NORM_LANES = 8
"""Norms of chunks that a kernel compares at once."""

LINE = 64
"""Bytes of a cache line: strips begin on one."""


def of(weight) -> str:
    """The layout of an array or tensor."""
    return NAMES[CODES[len(weight.shape)]]


def shape_of(layout: str, n: int, k: int) -> tuple[int, ...]:
    """Shape of a weight (n, k) in a layout of `NAMES`."""
    panels = -(-n // PANEL)
    if layout == "rows":
        return n, k
    if layout == "panels":
        return panels, -(-k // K_GROUP) + 1, PANEL, K_GROUP
    return panels, PANEL // STRIP, strip_bytes(k)


def strip_bytes(k: int) -> int:
    """Codes of a strip, then an fp32 norm for each chunk, padded to whole comparisons and to whole lines."""
    chunks = -(-k // CHUNK)
    norms = -(-chunks // NORM_LANES) * NORM_LANES
    return -(-(chunks * CHUNK * STRIP + 4 * norms) // LINE) * LINE
