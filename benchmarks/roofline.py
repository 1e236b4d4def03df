"""Predicted time of every kernel of a ViT block on NVIDIA GPUs, from bytes, operations, tiles and waves.

    python benchmarks/roofline.py [--device h200,h100] [--arch vit-b16,vit-l16] [--batch 1,8,64,256] [--csv FILE]

A kernel takes the longest of its tensor-core time (whole waves of tiles), its fp32 instructions and its bytes, plus the
gap between two kernels of a CUDA graph. Datasheet rates are scaled by the fractions in `Fractions`. These are guesses,
to be proved wrong: `benchmarks/gpu.py` stores them beside what it measures.
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
    """What a kernel reaches of a rate; `gap_us` between two kernels of a graph."""

    tensor_bf16: float = 0.80  # cuBLAS, measured: 788 of 989 on an H200
    instructions: float = 0.6
    bytes: float = 0.85
    gap_us: float = 1.0


FRACTIONS = Fractions()


@dataclass(frozen=True)
class Kernels:
    """Where the int8 backends differ: share of the tensor rate, instructions of attention for each logit."""

    tensor: float
    logit: int


# Instructions are counted in the code compiled for sm_90, masked keys included at 197 tokens; the shares are guesses:
# Triton waits for each int8 wgmma before the next loads, the CUDA kernels keep them in flight as cuBLAS does.
BACKENDS = {"triton": Kernels(tensor=0.65, logit=66), "cuda": Kernels(tensor=0.80, logit=25)}

TILE = 128  # rows and columns of a GEMM tile
EPILOGUE = {"none": 9, "gelu": 19, "residual": 11, "codes": 17, "gelu_codes": 27}
"""Instructions for each output of a GEMM: 3 to dequantize, 13 for GELU and 8 for codes are counted in the code of
the Triton kernels (kernels/gemm_s8.py); loads, stores and addresses are estimated.
"""

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
    return gpu.bf16_tops * FRACTIONS.tensor_bf16 if int8 is None else gpu.int8_tops * int8.tensor


def gemm_us(
    gpu: Gpu, m: int, n: int, k: int, out_bytes: float, epilogue: str = "none", int8: Kernels | None = None
) -> float:
    """A GEMM (M, K) x (N, K)ᵀ, on int8 operands with a backend's kernels or on bf16, storing `out_bytes` an output."""
    tiles = math.ceil(m / TILE) * math.ceil(n / TILE)
    waves = max(math.ceil(tiles / gpu.sms), tiles / gpu.sms)
    tile_us = 2 * TILE * TILE * k / (tensor_rate(gpu, int8) * 1e6 / gpu.sms)
    traffic = (m + n) * k * (2 if int8 is None else 1) + m * n * out_bytes
    return kernel_us(gpu, waves * tile_us, m * n * EPILOGUE[epilogue], traffic)


def attention_us(gpu: Gpu, batch: int, shape: Shape, int8: Kernels | None = None) -> float:
    """Attention over whole sequences: the exponentials bound the int8 one."""
    logits = batch * shape.heads * shape.tokens**2
    products = 2 if int8 is None else 3  # one for the logits; two digits, or one, for the values
    tensor_us = 2 * products * logits * shape.width / shape.heads / (tensor_rate(gpu, int8) * 1e6)
    traffic = batch * shape.tokens * shape.width * (8 if int8 is None else 5)
    return kernel_us(gpu, tensor_us, logits * (BF16_LOGIT_INSTRUCTIONS if int8 is None else int8.logit), traffic)


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
        "attn_out": gemm_us(gpu, m, w, w, 4, "residual", int8),
        "norm2": row_us(gpu, m, w, "layernorm", 3),
        "fc1": gemm_us(gpu, m, mlp, w, 1, "gelu_codes", int8),
        "fc2": gemm_us(gpu, m, w, mlp, 4, "residual", int8),
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
        for row in rows:
            append_csv(arguments.csv, {**row, **provenance_row("cpu")})


if __name__ == "__main__":
    main()
