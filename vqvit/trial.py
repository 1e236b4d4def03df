"""A run of a model on one sample that leaves no trace: what a float model returns, and how it calls its parts.

The run has no gradient, but is not under inference mode: tensors that a model caches must serve later calls with
gradients. Modes of all modules and the states of random number generators come back, and users' forward hooks do not
fire.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from vqvit import evaluate
from vqvit.batches import Batch
from vqvit.nn.leading import CAPTURE, request_leading_tokens

RUN_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError, ArithmeticError)
"""What a model raises for a call that it cannot take."""

SEED = 0
TEXT_TOKENS = 8
IMAGE_SIZE = 224
"""Side of the sample for a model that names no size and has a convolution."""

TOKENS = 197
"""Tokens of the sample for a model that has none."""

MAX_IMAGES = 2
"""Of a user's batch; the states that a run keeps grow with them."""

MAX_CALLS = 3
"""Kept for a part that runs more often."""


class NoTrial(ValueError):  # noqa: N818  (an answer, not an error: the message says why)
    """The model cannot be run on a sample."""


@dataclass(frozen=True)
class Call:
    """One call of a part: its arguments as they came, and what it returned."""

    args: tuple
    kwargs: dict
    output: object


@dataclass(frozen=True)
class Trial:
    """Attributes: batch; outputs, the floating tensors of the result by name; calls of the watched parts by name; the
    seconds that it took.
    """

    batch: Batch
    outputs: dict[str, Tensor]
    calls: dict[str, list[Call]]
    seconds: float


def try_out(model: nn.Module, given: Batch | None = None, watched: Mapping[str, nn.Module] | None = None) -> Trial:
    """Run a model on the first images of `given`, or on a sample made from its configuration.

    Args: model; given, a user's inputs; watched, the parts whose calls are kept, by name.

    Raises `NoTrial` if no sample can be made, or the model fails on all that can.
    """
    if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        raise NoTrial("some of its weights are on the meta device")
    problems = []
    for batch in _samples(model, given):
        start = time.perf_counter()
        try:
            outputs, calls = run(model, batch, watched or {})
        except RUN_ERRORS as error:
            problems.append(f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        return Trial(batch, outputs, calls, time.perf_counter() - start)
    if problems:
        raise NoTrial(f"it cannot be run on a sample ({problems[0]})")
    raise NoTrial("its configuration says not what its inputs are, and there is no sample")


def run(
    model: nn.Module, batch: Batch, watched: Mapping[str, nn.Module]
) -> tuple[dict[str, Tensor], dict[str, list[Call]]]:
    """The floating tensors of a model's result by name, and the first `MAX_CALLS` calls of each watched part."""
    calls: dict[str, list[Call]] = {name: [] for name in watched}
    with undisturbed(model), _recorded(watched, calls):
        output = evaluate.forward(model, batch)
    return dict(floating_tensors(output)), calls


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients, eval mode, a fixed seed and no user's hooks; afterwards all is as it was."""
    with evaluate.eval_mode(model), _without_hooks(model), kept_random_state(model) as devices, torch.no_grad():
        torch.default_generator.manual_seed(SEED)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(SEED)
        yield


@contextmanager
def kept_random_state(model: nn.Module) -> Iterator[list[int]]:
    """The random number generators of the CPU and of the model's GPUs, which it yields, come back as they were."""
    devices = sorted({t.device.index for t in chain(model.parameters(), model.buffers()) if t.is_cuda})
    with torch.random.fork_rng(devices):
        yield devices


def users_hook(module: nn.Module) -> bool:
    """Whether a forward hook or pre-hook on `module` is there for its owner: neither PyTorch's, which computes a weight
    before it is used, nor one of transformers that collects hidden states, nor ours.
    """
    return any(map(is_users, chain(module._forward_hooks.values(), module._forward_pre_hooks.values())))


def is_users(hook: Callable) -> bool:
    """Whether a hook is a user's: see `users_hook`."""
    if hook is request_leading_tokens or getattr(hook, "__module__", None) == CAPTURE:
        return False
    return not prepares_weight(hook)


def prepares_weight(hook: Callable) -> bool:
    """Whether a hook is of `torch.nn.utils`: weight_norm, spectral_norm, pruning."""
    return any(kind.__module__.startswith("torch.nn.utils") for kind in type(hook).__mro__)


def floating_tensors(output: object, name: str = "its output") -> Iterator[tuple[str, Tensor]]:
    """Every floating-point tensor in a model's output, with a name."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from floating_tensors(value, str(key))
    elif isinstance(output, tuple | list):
        for index, value in enumerate(output):
            yield from floating_tensors(value, f"{name}[{index}]")
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from floating_tensors(getattr(output, field.name), field.name)


@contextmanager
def _recorded(watched: Mapping[str, nn.Module], calls: dict[str, list[Call]]) -> Iterator[None]:
    """Arguments are copied: the model may go on to change them in place."""

    def hooks(name: str) -> tuple[Callable, Callable]:
        pending: list[tuple[tuple, dict]] = []

        def before(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            pending.append((tuple(map(_copy, args)), {key: _copy(value) for key, value in kwargs.items()}))

        def after(_module: nn.Module, _args: tuple, output: object) -> None:
            args, kwargs = pending.pop()
            if len(calls[name]) < MAX_CALLS:
                output = tuple(map(_copy, output)) if type(output) is tuple else _copy(output)
                calls[name].append(Call(args, kwargs, output))

        return before, after

    handles = []
    try:
        for name, module in watched.items():
            before, after = hooks(name)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Users' hooks are taken out of their dictionaries and put back, so that the handles that remove them stay good."""
    tables = [global_hooks._global_forward_hooks, global_hooks._global_forward_pre_hooks]
    for module in model.modules():
        tables += [module._forward_hooks, module._forward_pre_hooks]
    kept = [(table, list(table.items())) for table in tables if table]
    try:
        for table, hooks in kept:
            for key, hook in hooks:
                if is_users(hook):
                    del table[key]
        yield
    finally:
        for table, hooks in kept:
            table.clear()
            table.update(hooks)


def _samples(model: nn.Module, given: Batch | None) -> Iterator[Batch]:
    """The user's batch, and then what the model's configuration or its first layer says that it takes."""
    if given is not None:
        yield _first_images(given)
    parameters = inspect.signature(model.forward).parameters
    text = _text(model) if "input_ids" in parameters else {}
    for pixels in _images(model):
        if "pixel_values" not in parameters:
            yield Batch((pixels,), {})
            continue
        if text:
            yield Batch((), {**text, "pixel_values": pixels})
        yield Batch((), {"pixel_values": pixels})
    if text:
        yield Batch((), text)


def _first_images(batch: Batch) -> Batch:
    """The first `MAX_IMAGES` of a batch whose tensors all have an entry for each image, otherwise the batch."""
    values = (*batch.args, *batch.kwargs.values())
    count = len(batch.images)
    if not all(isinstance(value, Tensor) and value.dim() and len(value) == count for value in values):
        return batch
    kwargs = {name: value[:MAX_IMAGES] for name, value in batch.kwargs.items()}
    return Batch(tuple(value[:MAX_IMAGES] for value in batch.args), kwargs)


def _configurations(model: nn.Module) -> list[object]:
    """The model's configuration and those inside it, such as that of its vision tower."""
    config = getattr(model, "config", None)
    if config is None:
        return []
    return [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]


def _text(model: nn.Module) -> dict[str, Tensor]:
    """Random tokens of the smallest vocabulary: an image tower may have one of its own."""
    sizes = [getattr(config, "vocab_size", None) for config in _configurations(model)]
    sizes = [size for size in sizes if isinstance(size, int) and size > 1]
    if not sizes:
        return {}
    generator = torch.Generator().manual_seed(SEED)
    text = {"input_ids": torch.randint(1, min(sizes), (1, TEXT_TOKENS), generator=generator)}
    if "attention_mask" in inspect.signature(model.forward).parameters:  # as of padding: one of ones may be dropped
        text["attention_mask"] = (torch.arange(TEXT_TOKENS) < TEXT_TOKENS - 2).long()[None]
    return text


def _images(model: nn.Module) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    for shape in dict.fromkeys(_shapes(model)):
        yield torch.randn(shape, generator=generator)


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of inputs that the model may take, the likeliest first: as transformers, timm and torchvision name them,
    then by the first layer that reads the input.
    """
    for config in _configurations(model):
        if (size := _pair(getattr(config, "image_size", None))) is not None:
            image = (_count(config, "num_channels", 3), *size)
            if frames := _count(config, "num_frames", 0):
                yield (1, frames, *image)
            yield (1, *image)
    embedding = getattr(model, "patch_embed", None)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    channels = convolutions[0].in_channels if convolutions else 3
    for size in (getattr(embedding, "img_size", None), getattr(model, "image_size", None)):
        if (pair := _pair(size)) is not None:
            yield (1, channels, *pair)
    described = getattr(model, "default_cfg", None)
    size = described.get("input_size") if isinstance(described, Mapping) else None
    if isinstance(size, tuple | list) and len(size) == 3:
        yield (1, *size)
    if convolutions:
        yield (1, channels, IMAGE_SIZE, IMAGE_SIZE)
    elif getattr(model, "config", None) is None and (width := _first_width(model)) is not None:
        yield (1, TOKENS, width)


def _first_width(model: nn.Module) -> int | None:
    """Channels that the first layer reads, for a model of tokens."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            return module.normalized_shape[-1]
        if isinstance(module, nn.Linear):
            return module.in_features
    return None


def _pair(size: object) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return tuple(size)
    return None


def _count(config: object, name: str, default: int) -> int:
    value = getattr(config, name, default)
    return value if isinstance(value, int) else default
