"""Every line of code and shell in the README is run here, on a tiny model; a line that no test knows fails."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_cases import save_images

import vqvit
import vqvit.serving
from vqvit import cli
from vqvit.commands import bench

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(vqvit.__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SIZE = 224  # of the README's images


def fenced() -> list[str]:
    return re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def indented() -> list[str]:
    """Lines of code that are indented by four spaces, outside of fences."""
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def inline() -> list[str]:
    """`...` in the text that is code to type: what begins with a program, an option or a name of the package."""
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    return [
        span for span in spans if re.match(r"(vqvit[. ]|torch[. ]|python |make |pip |--|cls_only|activations=)", span)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with all that the README names: a model of its image size, and images."""
    folder = tmp_path_factory.mktemp("readme")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = transformers.ViTConfig(**sizes, image_size=SIZE, patch_size=16, num_labels=2, initializer_range=0.2)
    transformers.ViTForImageClassification(config).save_pretrained(folder / "MODEL")
    shutil.copytree(folder / "MODEL", folder / "path" / "to" / "model")
    save_images(folder / "IMAGES", count=12, classes=2, side=60)
    save_images(folder / "TUNE", count=40, classes=2, side=64)
    save_images(folder / "CHECK", count=12, classes=2, side=56)
    for name in ("OUT", "A", "B"):
        assert cli.main(["quantize", str(folder / "MODEL"), str(folder / name)]) == 0
    return folder


def test_python_blocks(folder, monkeypatch):
    """In their order and in one namespace, as a reader would type them."""
    monkeypatch.chdir(folder)
    blocks = [code for language, code in fenced() if language == "python"]
    assert len(blocks) == len(fenced()) == 3
    names = {"pixel_values": torch.ones(2, 3, SIZE, SIZE).numpy()}
    exec(blocks[0], names)
    assert names["logits"].shape == (1, 2) and names["report"].plan.layers
    logits = names["model"](torch.ones(2, 3, SIZE, SIZE)).logits
    exec(blocks[1], names)
    assert torch.allclose(torch.from_numpy(names["logits"]), logits, atol=1e-4)
    names["model"] = transformers.ViTForImageClassification.from_pretrained("path/to/model")
    names["batches"] = [torch.randn(4, 3, SIZE, SIZE) for _ in range(2)]
    exec(blocks[2], names)
    model = transformers.ViTForImageClassification.from_pretrained("path/to/model")
    assert {layer.bits for layer in vqvit.quantize_(model, names["smaller"], names["batches"]).plan.layers} == {4}


def test_serving_without_pytorch(folder, monkeypatch):
    """The second block's comment: VQVIT_TORCH=0 keeps PyTorch out of the process."""
    monkeypatch.chdir(folder)
    assert cli.main(["export", "OUT", "served-alone"]) == 0
    code = (
        "import sys, numpy\nfrom vqvit.serving import Session\n"
        f"logits = Session('served-alone')(numpy.ones((2, 3, {SIZE}, {SIZE}), 'float32'))['logits']\n"
        "assert logits.shape == (2, 2) and 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"VQVIT_TORCH": "0", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def options_of(command: str) -> set[str]:
    parser = argparse.ArgumentParser()
    cli.COMMANDS[command].add_arguments(parser)
    return {"--json", *(option for action in parser._actions for option in action.option_strings)}


QUICK = {
    "--progressive": ["--steps", "1", "--batch-size", "8", "--kl-limit", "100", "--tolerance", "0.99"],
    "bench": ["--image-size", str(SIZE)],
}
"""What is added so that a line takes seconds: by a word of it."""

SHELL = [line for line in indented() if line.startswith("vqvit ")]


@pytest.mark.parametrize("line", SHELL)
def test_shell_lines(folder, monkeypatch, capsys, line):
    """As they stand, in a folder where MODEL, IMAGES and the like are; every option in the comment is one."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    command, _, comment = line.partition("#")
    _, *argv = shlex.split(command)
    unknown = set(re.findall(r"--[\w-]+", line)) - options_of(argv[0])
    assert not unknown, f"vqvit {argv[0]} has no {unknown}"
    argv += [part for word, parts in QUICK.items() if word in argv for part in parts]
    status = cli.main(argv)
    err = capsys.readouterr().err
    if argv[0] in ("tune", "doctor") and not torch.cuda.is_available():
        assert status == 2 and "expected a CUDA device" in err
    else:
        assert status == 0, err
    for also in re.findall(r"; (plan check) PLAN MODEL", comment):
        assert cli.main([*also.split(), "A", "MODEL"]) == 0
    for kind in re.findall(r"or (sensitivity), (kl), (top1)", comment):
        scored = ["quantize", "MODEL", "OUT", "--calibration", "IMAGES", "--batch-size", "4", "--tiers-by"]
        assert [cli.main([*scored, request]) for request in (kind[0], f"{kind[1]}=9", f"{kind[2]}=99")] == [0, 0, 0]


def test_make_and_pip_lines():
    """`make` targets that exist, extras that exist."""
    others = [line.partition("#")[0].strip() for line in indented() if not line.startswith("vqvit ")]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(re.findall(r"^(\w+) = \[", project_text("project.optional-dependencies"), re.MULTILINE))
    for line in others:
        program, *arguments = shlex.split(line)
        if program == "make":
            assert set(arguments) <= targets
        else:
            assert [program, *arguments[:1]] == ["pip", "install"], f"no test knows the line {line!r}"
            assert set(re.findall(r"\[(\w+)\]", arguments[1])) <= extras
    assert "demo" in extras and len(others) == 4


def project_text(section: str) -> str:
    return (ROOT / "pyproject.toml").read_text().split(f"[{section}]\n", 1)[1].split("\n[", 1)[0]


PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "huggingface_hub": "transformers"}
"""By the name that is imported, where another is installed (or installs it)."""


def test_what_pip_installs_is_what_the_package_imports():
    """Every package that some module imports is a dependency, or in the extra that the README names."""
    imported = set()
    for path in (ROOT / "vqvit").rglob("*.py"):
        imported |= set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
    needed = {PACKAGES.get(name, name) for name in imported - set(sys.stdlib_module_names) - {"vqvit"}}
    required = set(re.findall(r'^    "([\w-]+)', project_text("project"), re.MULTILINE))
    extra = set(re.findall(r'"([\w-]+)"', re.search(r"^demo = .*$", (ROOT / "pyproject.toml").read_text(), re.M)[0]))
    text = {name for name in needed if re.fullmatch(r"[a-z][\w-]*", name)}
    assert {"torch", "transformers", "pillow"} <= required and extra == {"scikit-learn", "matplotlib", "pyarrow"}
    missing = {name for name in text if name not in required | extra and _is_package(name)}
    assert not missing
    for name in extra:
        assert name in README


def _is_package(name: str) -> bool:
    """Not a word of a docstring that begins a line with "from"."""
    import importlib.util

    return importlib.util.find_spec(name) is not None


def run_inline(span: str, folder: Path) -> None:
    """One `...` of the text. Raises `KeyError` for one that nobody has thought of."""
    if span.startswith("--") and span != "--json":
        option = re.match(r"--[\w-]+", span)[0]
        assert any(option in options_of(command) for command in cli.COMMANDS), option
        return
    if span.startswith("python "):
        program = shlex.split(span)[1]
        assert program == "-m" or (ROOT / program).is_file(), span
        return
    if re.fullmatch(r"(vqvit|torch)(\.\w+)+(\.\*)?(\(.*)?", span):
        exec_inline(span, folder)
        return
    KNOWN[span](folder)


def exec_inline(span: str, folder: Path) -> None:
    """A name that exists; a call is made with a tiny model, and may only fail for want of a GPU."""
    model = transformers.ViTForImageClassification.from_pretrained(folder / "MODEL")
    names = {"vqvit": vqvit, "torch": torch, "model": model, "images": torch.randn(1, 3, SIZE, SIZE)}
    if "graphed(" in span and not torch.cuda.is_available():
        with pytest.raises(vqvit.runtime.CaptureError, match="expected a model on a CUDA device"):
            eval(span, names)
    elif "torch.compile(" in span:
        vqvit.quantize_(model)
        assert callable(eval(span, names))
    else:
        assert eval(span.removesuffix(".*"), names) is not None


KNOWN = {
    "vqvit": lambda folder: None,
    "--json": lambda folder: None,
    "vqvit env": lambda folder: cli.main(["env"]),
    "vqvit doctor --gpu": lambda folder: options_of("doctor") >= {"--gpu"},
    "vqvit quantize --min-speedup 1.0": lambda folder: options_of("quantize") >= {"--min-speedup"},
    'cls_only="off"': lambda folder: vqvit.QuantConfig(cls_only="off"),
    'activations={"fc2": "per_token_group"}': lambda folder: vqvit.QuantConfig(activations={"fc2": "per_token_group"}),
}


@pytest.mark.parametrize("span", sorted(set(inline())))
def test_code_in_the_text(folder, span, capsys):
    run_inline(span, folder)


def test_nothing_of_the_readme_is_left_out():
    """The tests above see every fence, every indented line, and the spans that can be typed."""
    assert {language for language, _ in fenced()} == {"python"}
    assert len(SHELL) == 13 and len(inline()) > 15
    with pytest.raises(KeyError):
        run_inline("vqvit quantise", Path())
