"""Calibration's memory does not grow with the number of images, whatever the loader."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vqvit

pytestmark = pytest.mark.long

ROOT = Path(vqvit.__file__).resolve().parents[1]

CHILD = """
import resource, sys, torch, vqvit
from transformers import ViTConfig, ViTForImageClassification

torch.set_num_threads(1)
images, kind = int(sys.argv[1]), sys.argv[2]
sizes = dict(hidden_size=256, num_hidden_layers=1, num_attention_heads=4, intermediate_size=512, num_labels=10)
model = ViTForImageClassification(ViTConfig(**sizes, image_size=192, patch_size=16)).eval()


class Loader:
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return torch.randn(3, 192, 192, generator=torch.Generator().manual_seed(index))


loader = torch.utils.data.DataLoader(Loader(images), batch_size=8)
batches = (batch for batch in loader) if kind == "generator" else loader
config = vqvit.QuantConfig(
    activation="static", observer="output_error", attention_scales="static", factorize_patches=True,
    rounding="error_aware",
)
vqvit.quantize_(model, config, batches)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""What is freed goes back to the system at once, so that the peak is that of what is alive: else it varies by 5 %."""


def peak(images: int, kind: str) -> float:
    """MiB of a process that calibrates with so many images."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(images), kind], cwd=ROOT, env={**os.environ, **ENVIRONMENT},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_peak_does_not_grow_with_the_number_of_images():
    """Kept batches would be 27 MB more at 80 images, and hidden states 39 MB. A generator has nothing to go back to."""
    few = peak(16, "generator")
    for kind in ("generator", "loader"):
        many = peak(80, kind)
        assert many < 1.02 * few, f"{few:.0f} MiB with 16 images, {many:.0f} with 80 of a {kind}"
