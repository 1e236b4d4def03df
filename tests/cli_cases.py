"""What tests of the commands share: running one, and images on disk for it."""

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from vqvit import cli


def run(capsys, *argv) -> tuple[int, dict | None, str]:
    """Status, the parsed JSON of stdout, and stderr."""
    capsys.readouterr()
    status = cli.main([*map(str, argv), "--json"])
    captured = capsys.readouterr()
    return status, json.loads(captured.out) if captured.out else None, captured.err


def save_images(folder: Path, count: int, classes: int, side: int) -> None:
    """Noise as PNG files, in turn in a folder for each class."""
    rng = np.random.default_rng(0)
    for index in range(count):
        path = folder / f"class{index % classes}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(path)


def check_error(err: str, message: str) -> None:
    """The last line of stderr is the error of that pattern, and there is no traceback."""
    last = err.strip().splitlines()[-1]
    assert last.startswith("vqvit: error: ") and re.search(message, last), err
    assert "Traceback" not in err
