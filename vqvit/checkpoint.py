"""Save and load quantized models: a folder with int8 weights (safetensors), the plan, and the model's configuration.

Folder layout: `model.safetensors`, every tensor, codes as plain (N, K) int8; `vqvit.json`, format, plan, calibrated
ranges if there are any, model class and SHA-256 of the weights; `config.json`, the Hugging Face configuration if there
is one.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import vqvit
from vqvit import files, hf
from vqvit.calibration import CalibrationError, Ranges, ranges_of
from vqvit.plan import Plan
from vqvit.rewriter import apply_plan, pack_weights, plan_of

FORMAT = 1
WEIGHTS, MANIFEST, CONFIG = "model.safetensors", "vqvit.json", "config.json"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, incomplete, corrupted, or made for another model."""


def save(model: nn.Module, directory: str | Path) -> Path:
    """Write a quantized model to `directory`, all of it or nothing; a checkpoint that is there is replaced.

    Raises `PlanError` if the model is not quantized, `FileExistsError` if `directory` holds something else, `OSError`
    if it cannot be written.
    """
    directory = Path(directory)
    plan, ranges = plan_of(model), ranges_of(model)
    files.require_replaceable(directory, MANIFEST, "a vqvit checkpoint")
    with files.staged_folder(directory) as staging:
        save_file(_tensors(model), staging / WEIGHTS, metadata={"format": "pt"})
        manifest = {
            "format": FORMAT,
            "vqvit": vqvit.__version__,
            "class": type(model).__name__,
            "library": "transformers" if hf.is_transformers_model(model) else None,
            "plan": json.loads(plan.to_json()),
            "ranges": None if ranges is None else json.loads(ranges.to_json()),
            "sha256": files.sha256(staging / WEIGHTS),
        }
        if manifest["library"] == "transformers":
            (staging / CONFIG).write_text(model.config.to_json_string(use_diff=False))
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return directory


def load(directory: str | Path, model: nn.Module | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """A quantized model, in eval mode, ready on `device`. Float weights are never materialised.

    Args:
        directory: what `save` wrote.
        model: for models that are not of transformers: a float instance with the same structure, best built under
            `torch.device("meta")`; it is quantized in place and returned.

    Raises `FileNotFoundError` if a file is missing; `CheckpointError` for corrupted, truncated or foreign files;
    `ArchitectureError` for an unknown transformers class; `PlanError` if the plan does not fit `model`.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if model is None:
        model = _build(directory, manifest)
    plan = Plan.from_json(json.dumps(manifest["plan"]))
    weights = directory / WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"{directory}: expected {WEIGHTS}; it is missing")
    if (digest := files.sha256(weights)) != manifest["sha256"]:
        raise CheckpointError(
            f"{weights}: expected SHA-256 {manifest['sha256'][:16]}...; got {digest[:16]}...: truncated or corrupted"
        )
    model.to("meta")
    apply_plan(model, plan)
    _fill(model, _read_tensors(weights), weights)
    _remember_ranges(model, manifest.get("ranges"), directory)
    model.to(device)
    pack_weights(model)
    return model.eval().requires_grad_(False)


def read_manifest(directory: str | Path) -> dict:
    """The checked content of `vqvit.json`. Raises `FileNotFoundError` or `CheckpointError`."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: expected a vqvit checkpoint with {MANIFEST}; got none")
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON; got text that fails to parse: {error}") from error
    fields = {"format", "class", "library", "plan", "sha256"}
    if not isinstance(manifest, dict) or not fields <= manifest.keys():
        raise CheckpointError(f"{path}: expected the fields {sorted(fields)}; got another document")
    if not isinstance(manifest["class"], str) or not isinstance(manifest["sha256"], str):
        raise CheckpointError(f"{path}: expected the names of a class and of a hash; got other values")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT}; got {manifest['format']!r}")
    return manifest


def _build(directory: Path, manifest: dict) -> nn.Module:
    if manifest["library"] != "transformers":
        raise CheckpointError(
            f"{directory}: expected load(..., model=...) for the class {manifest['class']}, "
            "which is not of transformers"
        )
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: expected {CONFIG}; it is missing")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON; got text that fails to parse: {error}") from error
    return hf.build(manifest["class"], config)


def _remember_ranges(model: nn.Module, raw: object, directory: Path) -> None:
    """Give each layer the range that it was calibrated to, where the manifest holds any."""
    if raw is None:
        return
    try:
        ranges = Ranges.from_json(json.dumps(raw))
    except CalibrationError as error:
        raise CheckpointError(f"{directory / MANIFEST}: {error}") from error
    static = {name: m for name, m in model.named_modules() if getattr(m, "input_scale", None) is not None}
    if unknown := ranges.layers.keys() - static.keys():
        raise CheckpointError(f"{directory / MANIFEST}: expected ranges of static layers; got {sorted(unknown)}")
    for name, layer in ranges.layers.items():
        static[name].input_range = layer


def _transient_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Non-persistent buffers (position ids and the like): a model laid out on the meta device cannot compute them."""
    persistent = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in persistent}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    everything = {**model.state_dict(), **_transient_buffers(model)}
    return {name: tensor.detach().contiguous().clone() for name, tensor in everything.items()}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file, in memory of its own: a view would keep the whole file mapped."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: expected a safetensors file; got one that cannot be read: {error}") from error


def _same_kind(received: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether one may stand for the other: floats for floats, and each other dtype for itself."""
    return received == wanted or (received.is_floating_point and wanted.is_floating_point)


def _fill(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    expected = {**model.state_dict(), **_transient_buffers(model)}
    problems = [f"{name} missing" for name in expected.keys() - tensors.keys()]
    problems += [f"{name} unknown" for name in tensors.keys() - expected.keys()]
    problems += [
        f"{name} is {tuple(tensors[name].shape)} {tensors[name].dtype}, not {tuple(want.shape)} {want.dtype}"
        for name, want in expected.items()
        if name in tensors and (tensors[name].shape != want.shape or not _same_kind(tensors[name].dtype, want.dtype))
    ]
    if problems:
        raise CheckpointError(f"{path}: expected the tensors of its plan; {'; '.join(sorted(problems)[:5])}")
    transient = _transient_buffers(model)
    model.load_state_dict({n: t for n, t in tensors.items() if n not in transient}, assign=True)
    for name in transient:
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = tensors[name]
