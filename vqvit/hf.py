"""Hugging Face models: what a checkpoint must know to build one again, and reading float models from local folders."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

MOST = {"_layers": 1000, "depth": 1000, "depths": 1000, "num_labels": 1_000_000}
"""Of what fields of these endings count, before any weight shows whether it is true: each takes time and memory."""

UNFIT = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError, RecursionError)
"""What transformers' configurations and models raise for fields that nobody foresaw."""


class ArchitectureError(ValueError):
    """A model class that transformers does not have."""


def is_transformers_model(model: nn.Module) -> bool:
    """Whether `model` is a transformers model; does not import transformers."""
    return any(c.__module__.split(".")[0] == "transformers" for c in type(model).__mro__) and hasattr(model, "config")


def build(class_name: str, config: dict) -> nn.Module:
    """An instance of transformers' `class_name` without weights: all parameters on the meta device.

    Raises `ArchitectureError` if this version of transformers has no such class or model type.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    if not isinstance(config, dict):
        raise ArchitectureError(f"expected the fields of a configuration; got {type(config).__name__}")
    for name, value in config.items():
        _require_sensible(name, value)
    model_class = getattr(transformers, class_name, None)
    if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
        raise ArchitectureError(
            f"expected a model class of transformers {transformers.__version__}; it has no {class_name!r}"
        )
    fields = dict(config)
    config_class = model_class.config_class
    model_type = fields.pop("model_type", config_class.model_type)
    if model_type != config_class.model_type:
        raise ArchitectureError(f"expected model_type {config_class.model_type!r} for {class_name}; got {model_type!r}")
    try:
        with torch.device("meta"):
            return model_class(config_class.from_dict(fields)).eval()
    except (*UNFIT, StrictDataclassError) as error:
        text = f"{type(error).__name__}: {error}"
        raise ArchitectureError(
            f"expected a configuration of {class_name}; its class fails with {text[:500]}"
        ) from error


def _require_sensible(name: str, value: object) -> None:
    for ending, most in MOST.items():
        for count in value if isinstance(value, list) else [value]:
            if name.endswith(ending) and isinstance(count, int | float) and count > most:
                raise ArchitectureError(f"{name}: expected at most {most}; got {count}")


def load_float(folder: str | Path, model_class: str | None = None) -> nn.Module:
    """A float model from a local folder with config.json and weights, in the class that the config names.

    Args: folder; model_class: transformers class name, if not the first of config.json's `architectures`.

    Raises `FileNotFoundError` for a folder without config.json, `ArchitectureError` for an unknown architecture,
    `ValueError` if weights are missing from the file.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"expected a Hugging Face model folder with config.json; got {folder}")
    import transformers

    try:
        raw = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'}: expected JSON; got text that fails to parse: {error}") from error
    names = [model_class] if model_class else raw.get("architectures") or ["AutoModel"]
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise ArchitectureError(
            f"{folder}: expected an architecture of transformers {transformers.__version__}; got {names[0]!r}"
        )
    try:
        model, info = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: expected readable weights for {names[0]}; got: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder}: expected weights for all of {names[0]}; missing: {', '.join(missing[:5])}")
    return model.eval()
