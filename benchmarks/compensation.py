"""Measured error of the error-compensated INT8 linear, by mode (`vqvit.ops.int8_linear_compensated`).

    python benchmarks/compensation.py [--tokens 197] [--seed 0]

Relative error: ‖Y - A Bᵀ‖ / ‖A Bᵀ‖ with A Bᵀ in fp64, at the four linear layers of ViT-B, for inputs that are normal,
that have six channels thirty times larger (what LayerNorm outputs of trained models look like), and that are GELU of a
normal.
`int8 products` is the work in units of one INT8 GEMM. Appends to results/compensation.csv.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from vqvit import ops
from vqvit.numerics import quantize_weight, weight_scale
from vqvit.provenance import append_csv, provenance_row
from vqvit.reference import COMPENSATION_TERMS
from vqvit.report import text_table

RESULTS = Path(__file__).parent / "results" / "compensation.csv"

SHAPES = {"qkv": (2304, 768), "attn_out": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}
"""Role to (N, K) in ViT-B."""

OUTLIER_CHANNELS, OUTLIER_FACTOR = 6, 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(arguments.seed)
    facts = provenance_row("cpu")
    rows = []
    for role, (n, k) in SHAPES.items():
        weight = 0.02 * torch.randn(n, k, generator=generator)
        for kind, x in inputs(arguments.tokens, k, generator).items():
            for mode, error in errors(x, weight).items():
                rows.append(
                    {
                        "role": role,
                        "tokens": arguments.tokens,
                        "n": n,
                        "k": k,
                        "input": kind,
                        "mode": mode,
                        "relative_error": f"{error:.3e}",
                        "int8_products": 1 + sum(COMPENSATION_TERMS[mode]),
                        "seed": arguments.seed,
                    }
                )
    for row in rows:
        append_csv(RESULTS, {**row, **facts})
    print(text_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))


def inputs(tokens: int, k: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Activations (tokens, k) fp32."""
    normal = torch.randn(tokens, k, generator=generator)
    outliers = normal.clone()
    outliers[:, torch.randperm(k, generator=generator)[:OUTLIER_CHANNELS]] *= OUTLIER_FACTOR
    return {"normal": normal, "outliers": outliers, "gelu": torch.nn.functional.gelu(normal)}


def errors(x: Tensor, weight: Tensor) -> dict[str, float]:
    """Relative error of each mode against the fp64 product."""
    exact = x.double() @ weight.double().t()
    b_scale = weight_scale(weight)
    b = quantize_weight(weight, b_scale)
    b_residual = ops.quantize_residual(weight, b, b_scale)
    a, a_scale, _, _ = ops.quantize_per_token(x)
    a_residual = ops.quantize_residual(x, a, a_scale)
    measured = {}
    for mode in COMPENSATION_TERMS:
        y = ops.int8_linear_compensated(a, a_scale, a_residual, b, b_scale, b_residual, mode=mode)
        measured[mode] = float((y.double() - exact).norm() / exact.norm())
    return measured


if __name__ == "__main__":
    main()
