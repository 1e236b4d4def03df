"""docs/safety.md: every promise names a test that there is."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_promise_names_a_test_that_exists():
    text = (ROOT / "docs" / "safety.md").read_text()
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "tests").glob("*.py")}
    promises = [
        line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| Pro", "| wh"))
    ]
    assert len(promises) > 15
    for line in promises:
        cell = line.strip("| ").rpartition(" | ")[2]
        functions, files = (
            re.findall(r"`(test_\w+)`", cell),
            re.findall(r"`(tests/\w+\.py)[ `]|in `(tests/\w+\.py)`", cell),
        )
        assert functions or any(files), f"no test: {line}"
        for function in functions:
            assert any(f"def {function}(" in source for source in sources.values()), function
