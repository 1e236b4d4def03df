"""Shared fixtures. Without a GPU, Triton's interpreter and the twin of CUDA run the kernels: chosen before imports.

Tests that run side by side (pytest-xdist) have one thread each; what depends on their number sets it.
"""

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("VQVIT_CUDA_TWIN", "1")

import vqvit

LONG_FILES = ("test_triton_compile.py", "test_cuda_compile.py", "test_accuracy_benchmarks.py", "test_tuned.py")
"""Begun first: one that is begun last keeps one process busy while the others have nothing left."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _automatic_backend():
    yield
    vqvit.backend(None)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder with `cifar10/plain_text/*.parquet`, named by $VQVIT_TEST_DATA."""
    folder = os.environ.get("VQVIT_TEST_DATA")
    if not folder:
        pytest.skip("VQVIT_TEST_DATA does not name a folder with cifar10/plain_text")
    return Path(folder)


@pytest.fixture(scope="module")
def one_thread():
    """Tiny models gain nothing from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def float_folder(tmp_path_factory):
    """A tiny ViT classifier of three classes as a Hugging Face folder."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        num_labels=3,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("models") / "float"
    ViTForImageClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def quantized_folder(float_folder, tmp_path_factory):
    """It in W8A8, from the command."""
    from vqvit import cli

    folder = tmp_path_factory.mktemp("models") / "w8a8"
    assert cli.main(["quantize", float_folder, str(folder)]) == 0
    return str(folder)
