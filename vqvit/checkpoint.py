"""Save and load quantized models: a folder with int8 weights (safetensors), the plan, and the model's configuration.

Folder layout: `vqvit.json`, the manifest: format, plan, calibrated ranges if there are any, model class, configuration
and image processor of a transformers model, and name and SHA-256 of the weights; `vqvit-<hash>.safetensors`, every
tensor, codes as plain (N, K) int8; `config.json` and `preprocessor_config.json`, the configuration and the processor
again, for other programs and to be edited. Format 1 has the weights in `model.safetensors` and no processor.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import vqvit
from vqvit import files, hf
from vqvit.calibration import CalibrationError, Ranges, ranges_of
from vqvit.data import PROCESSOR_FILE
from vqvit.plan import Plan, PlanError
from vqvit.rewriter import apply_plan, pack_weights, plan_of

FORMAT = 2
FORMATS = (1, 2)
MANIFEST, CONFIG = "vqvit.json", "config.json"
WEIGHTS = re.compile(r"vqvit-[0-9a-f]{16}\.safetensors")
"""Names of weights, with the first digits of their SHA-256: other weights have another name, so that a reader of the
old manifest does not meet them. transformers looks for other names, and loads no such folder as a float model."""
WEIGHTS_1 = "model.safetensors"
"""Their name in format 1."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, incomplete, corrupted, or made for another model."""


def save(model: nn.Module, directory: str | Path, processor: object = None) -> Path:
    """Write a quantized model to `directory`, all of it or nothing; a checkpoint that is there is replaced.

    Other files in `directory` stay. A reader finds the old or the new model whole at any moment, also where a save is
    killed; of saves at the same time the last one stays.

    Args:
        model: what `vqvit.quantize_` or `vqvit.load` returned.
        directory: new, empty, or an earlier checkpoint.
        processor: the image processor that belongs to the model: one of transformers, its configuration as a dict, or
            a file or folder that holds it (`preprocessor_config.json`). Default: that of the folder which the model
            came from, where there is one.

    Raises `PlanError` if the model is not quantized, `FileExistsError` if `directory` holds something else, `OSError`
    if it cannot be written, `ValueError` for a processor that is none.
    """
    directory = Path(directory)
    plan, ranges = plan_of(model), ranges_of(model)
    files.require_replaceable(directory, MANIFEST, "a vqvit checkpoint", WEIGHTS)
    manifest = {
        "format": FORMAT,
        "vqvit": vqvit.__version__,
        "class": type(model).__name__,
        "library": "transformers" if hf.is_transformers_model(model) else None,
        "plan": json.loads(plan.to_json()),
        "ranges": None if ranges is None else json.loads(ranges.to_json()),
        "config": _configuration(model) if hf.is_transformers_model(model) else None,
        "processor": _processor(model, processor),
    }
    outdated = _weights_of_format_1(directory)
    with files.updated_folder(directory, MANIFEST, WEIGHTS) as staging:
        _write_tensors(model, staging / "weights")
        manifest["sha256"] = files.sha256(staging / "weights")
        manifest["weights"] = f"vqvit-{manifest['sha256'][:16]}.safetensors"
        (staging / "weights").rename(staging / manifest["weights"])
        for field, name in (("config", CONFIG), ("processor", PROCESSOR_FILE)):
            if manifest[field] is not None:
                (staging / name).write_text(json.dumps(manifest[field], indent=2, sort_keys=True) + "\n")
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    if outdated is not None:
        outdated.unlink(missing_ok=True)
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
    manifest, config, tensors = _read(directory)
    if model is None:
        model = _build(directory, manifest, config)
    plan = Plan.from_json(json.dumps(manifest["plan"]))
    model.to("meta")
    try:
        apply_plan(model, plan)
    except PlanError:
        raise
    except ValueError as error:  # layers of a size that no kernel takes
        raise CheckpointError(f"{directory}: {error}") from error
    _fill(model, tensors, weights_of(directory, manifest))
    _remember_ranges(model, manifest.get("ranges"), directory)
    if hf.is_transformers_model(model):
        model.config._name_or_path = str(
            directory.absolute()
        )  # as from_pretrained does: `save` finds the processor there
    model.to(device)
    pack_weights(model)
    return model.eval().requires_grad_(False)


def _read(directory: Path) -> tuple[dict, object, dict[str, Tensor]]:
    """Manifest, configuration (None without one) and tensors that belong together, also while others save."""
    for _ in range(files.ATTEMPTS):
        manifest = read_manifest(directory)
        try:
            config = _read_config(directory, manifest)
            if read_manifest(directory) == manifest:
                return manifest, config, _read_tensors(weights_of(directory, manifest), manifest["sha256"])
        except FileNotFoundError:
            if read_manifest(directory) == manifest:
                raise
    raise CheckpointError(f"{directory}: expected a checkpoint to read; it is replaced too often")


def _read_config(directory: Path, manifest: dict) -> object:
    """The fields of `config.json`; of the manifest where that is missing, or may be of another save."""
    path = directory / CONFIG
    if manifest["library"] != "transformers":
        return None
    if manifest.get("config") is not None and (files.is_unsettled(directory) or not path.is_file()):
        return manifest["config"]
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: expected {CONFIG}; it is missing")
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON; got text that fails to parse: {error}") from error


def weights_of(directory: str | Path, manifest: dict) -> Path:
    """The file with the weights. Raises `CheckpointError` if the manifest names no file of that kind."""
    name = manifest.get("weights", WEIGHTS_1)
    if manifest["format"] == 1 or (isinstance(name, str) and WEIGHTS.fullmatch(name)):
        return Path(directory) / (WEIGHTS_1 if manifest["format"] == 1 else name)
    raise CheckpointError(f"{Path(directory) / MANIFEST}: expected weights vqvit-<hash>.safetensors; got {name!r}")


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
    if manifest["format"] not in FORMATS:
        raise CheckpointError(f"{path}: expected format {' or '.join(map(str, FORMATS))}; got {manifest['format']!r}")
    return manifest


def stored_bytes(directory: str | Path) -> int:
    """Size of a checkpoint's own files. Raises as `read_manifest` does."""
    directory = Path(directory)
    own = {MANIFEST, CONFIG, PROCESSOR_FILE, weights_of(directory, read_manifest(directory)).name}
    return sum((directory / name).stat().st_size for name in own if (directory / name).is_file())


def _build(directory: Path, manifest: dict, config: object) -> nn.Module:
    if manifest["library"] != "transformers":
        raise CheckpointError(
            f"{directory}: expected load(..., model=...) for the class {manifest['class']}, "
            "which is not of transformers"
        )
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


def _read_tensors(path: Path, expected: str) -> dict[str, Tensor]:
    """Every tensor of the file, in memory of its own: a view would keep the whole file mapped."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: expected {path.name}; it is missing")
    if (digest := files.sha256(path)) != expected:
        raise CheckpointError(
            f"{path}: expected SHA-256 {expected[:16]}...; got {digest[:16]}...: truncated or corrupted"
        )
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


def _configuration(model: nn.Module) -> dict:
    """The configuration's fields, without the folder of this machine that the model came from."""
    fields = json.loads(model.config.to_json_string(use_diff=False))
    return {name: value for name, value in fields.items() if name != "_name_or_path"}


def _processor(model: nn.Module, given: object) -> dict | None:
    """The fields of an image processor's configuration: `given`, or that of the model's own folder."""
    if given is None:
        path = _source_file(model)
        return None if path is None else _read_processor(path)
    if isinstance(given, str | Path):
        path = Path(given)
        return _read_processor(path / PROCESSOR_FILE if path.is_dir() else path)
    if isinstance(given, Mapping):
        return dict(given)
    if callable(getattr(given, "to_json_string", None)):
        return json.loads(given.to_json_string())
    raise ValueError(f"processor: expected an image processor, its fields, or their file; got {type(given).__name__}")


def _source_file(model: nn.Module) -> Path | None:
    """The processor's file beside the weights that were read: in a folder, or in the cache of the Hub."""
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not source:
        return None
    if (path := Path(source) / PROCESSOR_FILE).is_file():
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(str(source), PROCESSOR_FILE)
    except HFValidationError:  # a folder that is gone, or a name that is none of the Hub
        return None
    return Path(cached) if isinstance(cached, str) else None


def _read_processor(path: Path) -> dict:
    try:
        fields = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected an image processor's configuration; got no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: expected an image processor's configuration; got {type(fields).__name__}")
    return fields


def _write_tensors(model: nn.Module, path: Path) -> None:
    try:
        save_file(_tensors(model), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path.parent.parent}: expected room for the weights; {error}") from error


def _weights_of_format_1(directory: Path) -> Path | None:
    """The weights that a checkpoint in `directory` will leave behind when it is replaced by one of this format."""
    try:
        manifest = read_manifest(directory)
    except (FileNotFoundError, CheckpointError):
        return None
    return directory / WEIGHTS_1 if manifest["format"] == 1 else None
