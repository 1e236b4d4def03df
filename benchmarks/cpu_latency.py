"""Latency of one Vision Transformer on this CPU: torch fp32 eager, torch bf16 eager, vqvit W8A8, interleaved medians.

    python benchmarks/cpu_latency.py [--arch vit-b16] [--batch 1,8] [--threads 2] [--seconds 30]

Weights are random (latency does not depend on them); the three engines hold the same ones, and the relative L2 error of
each engine's outputs to fp32 is the correctness check beside every row. Appends to results/cpu_latency.csv.
"""

import argparse
from pathlib import Path

import torch

from vqvit import engines
from vqvit.provenance import append_csv, provenance_row
from vqvit.report import text_table
from vqvit.timing import interleaved

RESULTS = Path(__file__).parent / "results" / "cpu_latency.csv"

MAX_RELATIVE_ERROR = {"fp32": 0.0, "bf16": 0.05, "w8a8": 0.1}
"""Beyond this an engine computes something else, and its latency means nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit-b16", choices=engines.ARCHITECTURES)
    parser.add_argument("--batch", default="1,8", help="batch sizes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=30.0, help="for each batch size")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = engines.variants(engines.random_model(arguments.arch))
    size = engines.ARCHITECTURES[arguments.arch].image_size
    facts = provenance_row("cpu")
    rows = []
    for batch in map(int, arguments.batch.split(",")):
        images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        errors = relative_errors(models, images)
        calls = {engine: engines.timed_call(model, images) for engine, model in models.items()}
        for engine, latency in (measured := interleaved(calls, arguments.seconds, progress=f"batch {batch}")).items():
            rows.append(
                {
                    "arch": arguments.arch,
                    "image_size": size,
                    "batch": batch,
                    "engine": engine,
                    "median_ms": round(latency.median_ms, 3),
                    "p20_ms": round(latency.p20_ms, 3),
                    "p80_ms": round(latency.p80_ms, 3),
                    "runs": latency.runs,
                    "speedup_over_fp32": round(measured["fp32"].median_ms / latency.median_ms, 3),
                    "relative_error": f"{errors[engine]:.2e}",
                }
            )
    for row in rows:
        append_csv(RESULTS, {**row, **facts})
    print(text_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))


@torch.inference_mode()
def relative_errors(models: dict, images: torch.Tensor) -> dict[str, float]:
    """‖out - fp32‖ / ‖fp32‖ of each engine's outputs. Raises `RuntimeError` for an engine beyond its limit."""
    outputs = {engine: engines.call(model, images).float() for engine, model in models.items()}
    errors = {engine: float((out - outputs["fp32"]).norm() / outputs["fp32"].norm()) for engine, out in outputs.items()}
    for engine, error in errors.items():
        if not error <= MAX_RELATIVE_ERROR[engine]:
            limit = MAX_RELATIVE_ERROR[engine]
            raise RuntimeError(f"{engine}: expected a relative error of at most {limit}; got {error:.3g}")
    return errors


if __name__ == "__main__":
    main()
