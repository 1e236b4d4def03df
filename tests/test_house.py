"""The rules of the house: who imports whom, what `import vqvit` costs, and which paths the documents name."""

import ast
import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = (
    {
        "numerics",
        "plan",
        "families",
        "batches",
        "report",
        "timing",
        "data",
        "children",
        "runtime",
        "statistics",
        "files",
        "_build",
        "layouts",
        "cpus",
    },
    {"factorize", "reference", "evaluate", "validation", "native", "low_bit"},
    {"backends", "rounding", "serving", "probe"},
    {"registry"},
    {"provenance", "precompile"},
    {"ops"},
    {"nn"},
    {"trial"},
    {"alterations", "probing"},
    {"calibration", "rewriter"},
    {"guard", "shortcut", "verification"},
    {"reconstruction"},
    {"hf", "quantize", "sensitivity"},
    {"qat"},
    {"budget", "checkpoint", "export", "progressive"},
    {"_public"},
    {"engines"},
    {"memory", "tuning", "profiling", "device_checks"},
    {"demo"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
"""Lowest first: a module may import those of lower layers and, inside a sub-package, its siblings."""

NO_PROJECT_IMPORTS = LAYERS[0]

KERNELS_MAY_IMPORT = {"torch", "triton", "vqvit.numerics", "vqvit.kernels"}

MODULES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "vqvit").rglob("*.py"))
KERNELS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").glob("*.py"))
DOCUMENTS = sorted(
    p.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md")
    for p in ROOT.glob(pattern)
)
RESULTS = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("benchmarks/results/*.csv"))


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports; `from vqvit import a` counts as vqvit.a."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = node.module == "vqvit" or node.module in ("vqvit.commands", "vqvit.backends")
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {node.module}
    return found


def part(name: str) -> str | None:
    """The module or sub-package of the project that a dotted name belongs to."""
    pieces = name.split(".")
    return pieces[1] if pieces[0] == "vqvit" and len(pieces) > 1 else None


def layer(name: str) -> int | None:
    return next((index for index, names in enumerate(LAYERS) if name in names), None)


@pytest.mark.parametrize("module", [m for m in MODULES if m != "vqvit/__init__.py"])
def test_layers(module):
    own = module.removesuffix(".py").split("/")[1]
    assert layer(own) is not None, f"{module}: add it to LAYERS"
    for name in imports(ROOT / module):
        other = part(name)
        if other is None or other == own or other == "kernels" or layer(other) is None:
            continue
        assert layer(other) < layer(own), f"{module} imports {name}, which is not below it"
        assert own not in NO_PROJECT_IMPORTS, f"{module} imports {name}, and may import nothing of the project"


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_import_only_torch_and_triton(kernel):
    allowed = KERNELS_MAY_IMPORT | sys.stdlib_module_names
    for name in imports(ROOT / kernel):
        pieces = name.split(".")
        assert pieces[0] in allowed or ".".join(pieces[:2]) in allowed, f"{kernel} imports {name}"


def python(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, **kwargs)


def test_import_is_light():
    heavy = ("triton", "transformers", "matplotlib", "sklearn", "pyarrow", "PIL")
    done = python(f"import sys, vqvit; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_import_changes_no_global_state():
    code = (
        "import os, torch, warnings, logging\n"
        "def state(): return (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),"
        " torch.random.get_rng_state().sum().item(), dict(os.environ), len(warnings.filters), logging.root.level,"
        " list(logging.root.handlers))\n"
        "before = state()\nimport vqvit\nassert state() == before"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_kernels_name_is_not_shadowed():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    done = python(
        "import importlib.util\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "assert spec is None or spec.origin is None or 'site-packages' in spec.origin, spec\n"
        "import vqvit\n"
        "from transformers import ViTModel\n"
    )
    assert done.returncode == 0, done.stderr


NAMED_PATH = re.compile(r"(?<![\w/.-])((?:csrc|vqvit|kernels|tests|benchmarks|docs|\.ci)/[\w./-]*[\w/])")
NAMED_FILE = re.compile(r"`([A-Za-z.][\w.-]*\.(?:md|toml|py|json|csv)|Makefile|LICENSE)`")
NAMED_TARGET = re.compile(r"(?:^ *|`)make ([a-z]+)", re.MULTILINE)
WRITTEN_BY_THE_PRODUCT = {"model.safetensors", "vqvit.json", "config.json", "preprocessor_config.json", "results.json"}
WRITTEN_BY_THE_PRODUCT |= {"report.md", "report.html"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_existing_paths(document):
    text = (ROOT / document).read_text()
    missing = {path for path in NAMED_PATH.findall(text) if not (ROOT / path).exists()}
    beside = (ROOT / document).parent
    for name in set(NAMED_FILE.findall(text)) - WRITTEN_BY_THE_PRODUCT:
        if not (ROOT / name).exists() and not (beside / name).exists():
            missing.add(name)
    assert not missing, f"{document} names {sorted(missing)}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_existing_targets(document):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(NAMED_TARGET.findall((ROOT / document).read_text())) <= targets


@pytest.mark.parametrize("result", RESULTS)
def test_results_have_provenance(result):
    with open(ROOT / result, newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows, f"{result} is empty"
    for row in rows:
        assert row.get("commit") and row.get("command"), f"{result}: a row without commit or command"
        assert row.get("device") or row.get("arch"), f"{result}: a row without the device or architecture it is about"
        assert row.get("torch") or row.get("triton") or row.get("nvcc"), f"{result}: a row without versions"
        assert None not in row and None not in row.values(), f"{result}: a row of another width"
        assert not re.search(r"(^|\s)/\w", row["command"]), f"{result}: a path of some machine in {row['command']!r}"
    readme = (ROOT / "benchmarks" / "results" / "README.md").read_text()
    assert f"`{Path(result).name}`" in readme, f"{result} is not described in benchmarks/results/README.md"


def test_both_commands_come_first_in_the_readme():
    lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
    body = [line for line in lines if line and not line.startswith(("#", "`"))]
    assert body[0].startswith("make demo") and body[1].startswith("make test")
