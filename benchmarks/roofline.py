"""Predicted time of every kernel of a ViT block on NVIDIA GPUs, from bytes, operations, instructions, tiles and waves.

    python benchmarks/roofline.py [--device h200,h100] [--arch vit-b16,vit-l16] [--batch 1,8,64,256] [--csv FILE]

A kernel takes the longest of its units' times, plus the gap between two kernels of a CUDA graph. The units of an int8
GEMM are the memory and those of the multiprocessor with most tiles: tensor cores, bytes from L2, instructions.
Datasheet rates are scaled by the fractions in `Fractions`. These are guesses, to be proved wrong: `benchmarks/gpu.py`
stores them beside what it measures.
"""

import argparse
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vqvit.provenance import append_csv, provenance_row  # noqa: E402  (the checkout need not be installed)
from vqvit.report import text_table  # noqa: E402


@dataclass(frozen=True)
class Gpu:
    """Multiprocessors; boost clock, GHz; dense tensor rates, tera-operations/s; DRAM copy, read and written, TB/s."""

    sms: int
    clock: float
    int8_tops: float
    bf16_tops: float
    copy: float

    @property
    def fp32_per_us(self) -> float:
        """fp32 or integer instructions of all lanes in a microsecond: 128 lanes a multiprocessor and cycle."""
        return self.sms * 128 * self.clock * 1e3


# Tensor rates: NVIDIA's datasheets, dense. Copy: 4.3 and 3.0 TB/s were measured on an H200 and an H100 with torch's
# device-to-device copy; the others are 85 % of the datasheet's bandwidth.
GPUS = {
    "h200": Gpu(132, 1.755, 1979, 989, 4.3),
    "h100": Gpu(132, 1.755, 1979, 989, 3.0),
    "a100": Gpu(108, 1.41, 624, 312, 1.73),
    "l4": Gpu(58, 2.04, 242, 121, 0.255),
}


def part(device: str) -> Gpu:
    """The GPU that a device's name says, or an H200."""
    return next((gpu for name, gpu in GPUS.items() if name.upper() in device.upper()), GPUS["h200"])


@dataclass(frozen=True)
class Fractions:
    """What a kernel reaches of a rate; `l2_bytes`: from L2 in a cycle of one multiprocessor; `gap_us`: between two
    kernels of a graph.
    """

    tensor_bf16: float = 0.80  # cuBLAS, measured: 788 of 989 on an H200
    instructions: float = 0.6
    issue: float = 0.85  # of the instructions of int8 GEMMs, where another warpgroup or block always has some: a guess
    bytes: float = 0.85
    l2_bytes: float = 38  # Hopper reaches 35 to 40; kernels/gemm_s8.py chooses tiles with 40. Not measured here
    gap_us: float = 1.0


FRACTIONS = Fractions()

COLUMNS = 128  # of every tile of a GEMM
STAGE = 128  # columns of K


@dataclass(frozen=True)
class Tile:
    """Tiles of so many rows are taken where each multiprocessor gets `least` of them.

    stage: instructions that one of the four schedulers issues for 128 columns of K, those for the sums of group scales
    included; tensor: share of the tensor rate.
    """

    rows: int
    least: float
    stage: int
    tensor: float


@dataclass(frozen=True)
class Kernels:
    """An int8 backend's kernels: tiles without and with group scales, the first that suits being taken; instructions an
    output of each epilogue; instructions a logit of attention, and the columns of heads that one of its blocks takes.
    """

    plain: tuple[Tile, ...]
    grouped: tuple[Tile, ...]
    epilogue: dict[str, float]
    logit: int
    block_columns: int


# Instructions are counted in the code compiled for sm_90a (columns of results/cuda_gate.csv) and, for Triton 3.6, sm_90
# (loop_instructions and epilogue_per_output of results/compile_gate.csv; two warps of eight share a scheduler).
# cuda: `store_loops` of whole tiles; those of heads of 64 channels, and of v as fp32, which is a third of the columns.
# Stages are `mma_loop`. On mma.sync a product has 64 columns of K, and every second one ends a group.
# Shares of the tensor rate are guesses: Triton waits for each int8 wgmma before the next loads, the CUDA kernels keep
# them in flight as cuBLAS does, and mma.sync is slower on Hopper.
BACKENDS = {
    "triton": Kernels(
        plain=(Tile(128, 1, 2 * 71, 0.65), Tile(64, 0, 84, 0.65)),
        grouped=(Tile(128, 1, 2 * 274, 0.65), Tile(64, 0, 287, 0.65)),
        epilogue={"none": 11.2, "residual": 9.2, "codes": 28.2, "gelu_codes": 31.6},
        logit=66,
        block_columns=64,
    ),
    "cuda": Kernels(
        plain=(Tile(128, 1, 139, 0.80), Tile(64, 0.5, 95, 0.80), Tile(64, 0, 2 * 347, 0.5)),
        grouped=(Tile(64, 0.5, 470 // 2, 0.80), Tile(64, 0, 347 + 538, 0.5)),
        epilogue={"none": 161 / 16, "residual": 120 / 16, "codes": (2 * 264 + 67) / 3 / 16, "gelu_codes": 398 / 16},
        logit=25,
        block_columns=128,
    ),
}

BF16_OUTPUT_INSTRUCTIONS = 9  # of a GEMM: an estimate
ROW_INSTRUCTIONS = {"layernorm": 30, "quantize": 12}  # an element; the LayerNorm's exact sums are an estimate
BF16_LOGIT_INSTRUCTIONS = 8


@dataclass(frozen=True)
class Shape:
    """Width, MLP width, heads, blocks, tokens of an image, patch elements."""

    width: int
    mlp: int
    heads: int
    blocks: int
    tokens: int = 197
    patch: int = 768

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of a block's four GEMMs."""
        w = self.width
        return {"qkv": (3 * w, w), "attn_out": (w, w), "fc1": (self.mlp, w), "fc2": (w, self.mlp)}


SHAPES = {
    "vit-b16": Shape(768, 3072, 12, 12),
    "vit-l16": Shape(1024, 4096, 16, 24),
    "vit-h14": Shape(1280, 5120, 16, 32, 257, 588),
    "dinov2-s": Shape(384, 1536, 6, 12, 257, 588),
}


def kernel_us(gpu: Gpu, tensor_us: float = 0.0, instructions: float = 0.0, traffic: float = 0.0) -> float:
    """Microseconds of one kernel: its busiest unit, and the gap to the next kernel."""
    instruction_us = instructions / (gpu.fp32_per_us * FRACTIONS.instructions)
    byte_us = traffic / (gpu.copy * 1e6 * FRACTIONS.bytes)
    return max(tensor_us, instruction_us, byte_us) + FRACTIONS.gap_us


def tensor_rate(gpu: Gpu, int8: Kernels | None) -> float:
    """Tera-operations/s that the kernels of a backend reach, or those of bf16."""
    return gpu.bf16_tops * FRACTIONS.tensor_bf16 if int8 is None else gpu.int8_tops * int8.plain[0].tensor


def tile_of(gpu: Gpu, m: int, n: int, tiles: tuple[Tile, ...]) -> Tile:
    """The first tile of which an output of (m, n) has enough."""
    return next(t for t in tiles if math.ceil(m / t.rows) * math.ceil(n / COLUMNS) >= t.least * gpu.sms)


def tiles_us(gpu: Gpu, m: int, n: int, k: int, tile: Tile, epilogue: float) -> float:
    """Microseconds of the multiprocessor with most tiles. A tile's main loop runs under the epilogue of the one before
    it; a lone tile's epilogue follows its main loop.
    """
    tiles = math.ceil(math.ceil(m / tile.rows) * math.ceil(n / COLUMNS) / gpu.sms)
    tensor_us = 2 * tile.rows * COLUMNS * k / (gpu.int8_tops * tile.tensor * 1e6 / gpu.sms)
    l2_us = (tile.rows + COLUMNS) * k / (FRACTIONS.l2_bytes * gpu.clock * 1e3)
    issued_us = gpu.clock * 1e3 * FRACTIONS.issue  # instructions of each scheduler in a microsecond
    main_us = math.ceil(k / STAGE) * tile.stage / issued_us
    epilogue_us = tile.rows * COLUMNS * epilogue / (128 * issued_us)
    together = max(tensor_us, l2_us, main_us + epilogue_us)
    return max(tiles * together, max(tensor_us, l2_us, main_us) + epilogue_us)


def gemm_us(
    gpu: Gpu,
    m: int,
    n: int,
    k: int,
    out_bytes: float,
    epilogue: str = "none",
    int8: Kernels | None = None,
    grouped: bool = False,
) -> float:
    """A GEMM (M, K) x (N, K)ᵀ, on int8 operands with a backend's kernels or on bf16, storing `out_bytes` an output."""
    traffic = (m + n) * k * (2 if int8 is None else 1) + m * n * out_bytes
    if int8 is not None:
        tile = tile_of(gpu, m, n, int8.grouped if grouped else int8.plain)
        return kernel_us(gpu, tiles_us(gpu, m, n, k, tile, int8.epilogue[epilogue]), traffic=traffic)
    waves = math.ceil(math.ceil(m / 128) * math.ceil(n / COLUMNS) / gpu.sms)
    tile_us = 2 * 128 * COLUMNS * k / (tensor_rate(gpu, None) * 1e6 / gpu.sms)
    return kernel_us(gpu, waves * tile_us, m * n * BF16_OUTPUT_INSTRUCTIONS, traffic)


def attention_us(gpu: Gpu, batch: int, shape: Shape, int8: Kernels | None = None) -> float:
    """Attention over whole sequences: the exponentials bound the int8 one, at small batches those of one block, which
    takes 64 queries and as many heads as fit its columns.
    """
    logits = batch * shape.heads * shape.tokens**2
    products = 2 if int8 is None else 3  # one for the logits; two digits, or one, for the values
    tensor_us = 2 * products * logits * shape.width / shape.heads / (tensor_rate(gpu, int8) * 1e6)
    traffic = batch * shape.tokens * shape.width * (8 if int8 is None else 5)
    if int8 is None:
        return kernel_us(gpu, tensor_us, logits * BF16_LOGIT_INSTRUCTIONS, traffic)
    heads = min(shape.heads, max(1, int8.block_columns * shape.heads // shape.width))
    of_a_block = heads * min(64, shape.tokens) * shape.tokens
    return kernel_us(gpu, tensor_us, max(logits, of_a_block * gpu.sms) * int8.logit, traffic)


def row_us(gpu: Gpu, rows: int, width: int, op: str, bytes_each: float) -> float:
    """A row-wise op that moves `bytes_each` bytes an element."""
    return kernel_us(gpu, 0.0, rows * width * ROW_INSTRUCTIONS[op], rows * width * bytes_each)


def int8_block(gpu: Gpu, shape: Shape, batch: int, int8: Kernels) -> dict[str, float]:
    """Microseconds of each launch of an int8 block with a bf16 stream and group scales (docs/numerics.md §3)."""
    m, w, mlp = batch * shape.tokens, shape.width, shape.mlp
    return {
        "norm1": row_us(gpu, m, w, "layernorm", 3),
        "qkv": gemm_us(gpu, m, 3 * w, w, 2, "codes", int8),  # int8 q and k, fp32 v
        "v_codes": row_us(gpu, m, w, "quantize", 5),
        "attention": attention_us(gpu, batch, shape, int8),
        "attn_out": gemm_us(gpu, m, w, w, 4, "residual", int8, grouped=True),
        "norm2": row_us(gpu, m, w, "layernorm", 3),
        "fc1": gemm_us(gpu, m, mlp, w, 1, "gelu_codes", int8),
        "fc2": gemm_us(gpu, m, w, mlp, 4, "residual", int8, grouped=True),
    }


def bf16_block(gpu: Gpu, shape: Shape, batch: int) -> dict[str, float]:
    """Microseconds of each kernel of a bf16 block as a compiler fuses it: GELU and residuals into row-wise kernels."""
    m, w, mlp = batch * shape.tokens, shape.width, shape.mlp
    return {
        "norm1": row_us(gpu, m, w, "layernorm", 4),
        "qkv": gemm_us(gpu, m, 3 * w, w, 2),
        "attention": attention_us(gpu, batch, shape),
        "attn_out": gemm_us(gpu, m, w, w, 2),
        "add_norm2": row_us(gpu, m, w, "layernorm", 8),
        "fc1": gemm_us(gpu, m, mlp, w, 2),
        "gelu": row_us(gpu, m, mlp, "quantize", 4),
        "fc2": gemm_us(gpu, m, w, mlp, 2),
        "add": row_us(gpu, m, w, "quantize", 6),
    }


def model_us(gpu: Gpu, shape: Shape, batch: int, int8: Kernels | None) -> float:
    """A model's blocks and its patch embedding."""
    block = bf16_block(gpu, shape, batch) if int8 is None else int8_block(gpu, shape, batch, int8)
    patches = gemm_us(gpu, batch * (shape.tokens - 1), shape.width, shape.patch, 2, int8=int8)
    return shape.blocks * sum(block.values()) + patches


def predictions(gpu_names: list[str], archs: list[str], batches: list[int]) -> list[dict]:
    """A row for each backend and launch of a block, and one for the model."""
    rows = []
    for name, arch, batch, backend in itertools.product(gpu_names, archs, batches, BACKENDS):
        gpu, shape, int8 = GPUS[name], SHAPES[arch], BACKENDS[backend]
        key = {"gpu": name, "arch": arch, "batch": batch, "kernels": backend}
        m = batch * shape.tokens
        for launch, us in int8_block(gpu, shape, batch, int8).items():
            row = {**key, "what": launch, "us": round(us, 2), "peak": "", "speedup": ""}
            if launch in shape.linears:
                n, k = shape.linears[launch]
                row["peak"] = round(2 * m * n * k / us / gpu.int8_tops / 1e6, 3)
            rows.append(row)
        int8_us, bf16_us = (model_us(gpu, shape, batch, kernels) for kernels in (int8, None))
        rows.append(
            {**key, "what": "model", "us": round(int8_us, 1), "peak": "", "speedup": round(bf16_us / int8_us, 2)}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="h200,h100", help=f"of {', '.join(GPUS)}")
    parser.add_argument("--arch", default="vit-b16,vit-l16", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--batch", default="1,8,64,256")
    parser.add_argument("--csv", type=Path, help="append the predictions to this file")
    arguments = parser.parse_args()
    batches = [int(b) for b in arguments.batch.split(",")]
    rows = predictions(arguments.device.split(","), arguments.arch.split(","), batches)
    print(text_table(list(rows[0]), [[str(v) for v in row.values()] for row in rows]))
    if arguments.csv:
        provenance = provenance_row("cpu")  # before the file that is appended to differs from its commit
        for row in rows:
            append_csv(arguments.csv, row | provenance)


if __name__ == "__main__":
    main()
