"""The CLS shortcut: which tokens of its last block a model's result depends on, found by running the model.

Where a head reads the first token only, the last block needs attention output and MLP for that token alone. `quantize_`
uses this only on a proof. All blocks stand in as the identity, so that the code around them runs as it is; the last
one's other tokens are replaced by NaN, and then by other numbers. Every tensor of the result must keep its bits.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vqvit.batches import Batch
from vqvit.nn.leading import REQUEST, watched_part
from vqvit.plan import BlockPlan, Plan, PlanError
from vqvit.trial import undisturbed

CANDIDATES = (1, 2)
"""Leading tokens that heads read: CLS; CLS and DeiT's distillation token."""

Poison = Callable[[Tensor], Tensor]

POISONS: tuple[Poison, ...] = (
    lambda x: torch.full_like(x, torch.nan),
    lambda x: 3 - 7 * x,  # for code in which NaN vanishes, such as a comparison
)


class NotProven(ValueError):  # noqa: N818  (an answer, not an error: the message says why)
    """The result may depend on every token of the last block."""


def plan_shortcut(model: nn.Module, plan: Plan, cls_only: str, sample: Batch | None) -> tuple[Plan, str]:
    """Add the shortcut to the plan of a float model where `cls_only`, one of `vqvit.plan.CLS_ONLY`, says so.

    Args: sample: model inputs for the proof, where the model's configuration does not say what an image is.

    Returns: the plan, and a line for the report. Raises `PlanError` if it was asked for and cannot be.
    """
    if cls_only == "off":
        return plan, "not used: off on request"
    try:
        block, tokens = prove(model, plan, sample, CANDIDATES)
    except NotProven as reason:
        if cls_only == "on":
            raise PlanError(f"cls_only: expected a model whose result needs leading tokens alone; {reason}") from reason
        return plan, f"not used: {reason}"
    shortened = dataclasses.replace(block, leading_tokens=tokens)
    blocks = tuple(shortened if b is block else b for b in plan.blocks)
    return dataclasses.replace(plan, blocks=blocks), describe(shortened)


def check_shortcut(model: nn.Module, plan: Plan, sample: Batch | None) -> str:
    """A line for the report on a plan that comes with or without the shortcut. Raises `PlanError` for one that the
    model does not allow.
    """
    if plan.shortened is None:
        return "not used: the plan has none"
    try:
        block, _ = prove(model, plan, sample, (plan.shortened.leading_tokens,))
    except NotProven as reason:
        raise PlanError(f"plan: expected leading_tokens that the model allows; {reason}") from reason
    if block is not plan.shortened:
        raise PlanError(f"plan: expected leading_tokens in the last block, {block.name}; got {plan.shortened.name}")
    return describe(block)


def describe(block: BlockPlan | None) -> str:
    """What the report says about a block with `leading_tokens`, or about none."""
    if block is None:
        return "not used: the last block stays float"
    tokens = "token 0" if block.leading_tokens == 1 else f"tokens 0 to {block.leading_tokens - 1}"
    return f"{block.name} computes {tokens} alone behind its keys and values"


def prove(model: nn.Module, plan: Plan, sample: Batch | None, candidates: tuple[int, ...]) -> tuple[BlockPlan, int]:
    """The last block, and the least of `candidates` such that nothing depends on more of its tokens.

    The model is float, and is left as it was. Raises `NotProven`.
    """
    if not plan.blocks:
        raise NotProven("no block is replaced as a whole")
    if (watched := watched_part(model)) is not None:
        raise NotProven(f"a forward hook on {watched} sees what the model computes")
    parameters = inspect.signature(model.forward).parameters.values()
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        raise NotProven(f"{type(model).__name__} takes no keyword arguments that it could pass on to its blocks")
    inputs = _inputs(model, sample)
    calls: list[tuple[BlockPlan, dict]] = []
    plain = _results(model, plan.blocks, inputs, lambda block, x, kwargs: (calls.append((block, kwargs)), x)[1])
    if not calls:
        raise NotProven("no replaced block runs")
    last, received = calls[-1]
    if sum(block is last for block, _ in calls) > 1:
        raise NotProven(f"{last.name} runs more than once")
    if REQUEST not in received:
        raise NotProven(f"{type(model).__name__} passes no keyword arguments on to {last.name}")
    if reason := plan.inexact(last):
        raise NotProven(f"{last.name}: {reason}")
    for tokens in candidates:
        changed = _dependent(model, plan.blocks, last, inputs, plain, tokens)
        if changed is None:
            return last, tokens
    count = f"the first {tokens} tokens" if tokens > 1 else "the first token"
    raise NotProven(f"{changed} depends on more than {count} of {last.name}")


def _dependent(
    model: nn.Module, blocks: tuple, last: BlockPlan, inputs: Batch, plain: dict[str, Tensor], tokens: int
) -> str | None:
    """The first result that changes when tokens of `last` beyond the first ones do, or None."""
    for poison in POISONS:

        def spoil(block: BlockPlan, x: Tensor, _, poison: Poison = poison) -> Tensor:
            return x if block is not last else torch.cat([x[:, :tokens], poison(x[:, tokens:])], dim=1)

        spoiled = _results(model, blocks, inputs, spoil)
        for name, want in plain.items():
            if name not in spoiled or not torch.equal(spoiled[name], want):
                return name
    return None


def _inputs(model: nn.Module, sample: Batch | None) -> Batch:
    """One random image as the configuration describes it, or else the sample, in the model's dtype on its device."""
    anchor = next(model.parameters())
    if anchor.is_meta:
        raise NotProven("its weights are on the meta device")
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    height, width = (size, size) if isinstance(size, int) else size if isinstance(size, list | tuple) else (None, None)
    if getattr(model, "main_input_name", None) == "pixel_values" and height is not None:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(1, getattr(config, "num_channels", 3), height, width, generator=generator)
        return Batch((pixels.to(anchor),), {})
    if sample is None:
        raise NotProven("its configuration names no image size, and there is no sample to run it on")
    placed = sample.to(anchor.device)
    return Batch(
        tuple(_cast(a, anchor) for a in placed.args), {name: _cast(a, anchor) for name, a in placed.kwargs.items()}
    )


def _cast(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype) if value.is_floating_point() else value


def _results(
    model: nn.Module, blocks: tuple[BlockPlan, ...], inputs: Batch, change: Callable[[BlockPlan, Tensor, dict], Tensor]
) -> dict[str, Tensor]:
    """The model's tensors by name, with each block the identity and then `change(block, hidden states, kwargs)`."""
    with undisturbed(model), _standing_in(model, blocks, change):
        try:
            output = model.forward(*inputs.args, **inputs.kwargs, **{REQUEST: True})
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
            raise NotProven(f"it cannot be run on a random image ({type(error).__name__}: {error})") from error
        return dict(_tensors(output, "its output"))


@contextmanager
def _standing_in(model: nn.Module, blocks: tuple[BlockPlan, ...], change: Callable) -> Iterator[None]:
    """Instances' `forward` in front of their class's: attributes, type and place of the blocks stay."""
    modules = [model.get_submodule(block.name) for block in blocks]
    for block, module in zip(blocks, modules, strict=True):

        def forward(hidden_states: Tensor, *_, block: BlockPlan = block, **kwargs):
            y = change(block, hidden_states, kwargs)
            return (y,) if block.returns_tuple else y

        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _tensors(output: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model's output with its name. Raises `NotProven` for an output that may hide some."""
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _tensors(value, str(key))
    elif isinstance(output, tuple | list):
        for index, value in enumerate(output):
            yield from _tensors(value, f"{name}[{index}]")
    elif output is not None and not isinstance(output, int | float | str):
        raise NotProven(f"{name} is a {type(output).__name__}")
