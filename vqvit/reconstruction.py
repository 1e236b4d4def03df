"""Post-training quantization with calibration data: rounding and equalisation of a quantized model, layer by layer.

Two streams of hidden states run through the model: the float model's, and the integer model's with every earlier layer
in its final form. Where they reach a layer, the second moments of its two inputs (`vqvit.rounding.Moments`) say which
codes serve it best: they also make up for what earlier layers and the rounding of its input did.

Blocks that follow each other directly are walked on stored hidden states, (images, tokens, channels) for each batch and
stream, which lie in a temporary file; anything else is reached by running both models up to it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vqvit import families
from vqvit.batches import Batch, TensorFile
from vqvit.guard import float_skeleton
from vqvit.nn import EncoderBlock, QuantLinear, QuantPatchEmbed
from vqvit.nn.block import ROLES, equalizer, float_linears, norm_reach
from vqvit.nn.module import QuantModule
from vqvit.nn.patch_embed import cut_patches
from vqvit.rewriter import quantized_modules
from vqvit.rounding import Moments, Weights, solve

SHARES = (0.25, 0.5, 0.75)
"""Candidates of the share of a channel's range that an equaliser moves into the weight."""

ROWS_PER_CHANNEL = 8
"""Calibration tokens of a layer, in units of its input channels, beyond which no more are taken into its moments."""

SAMPLE_ROWS = 2048
"""Calibration tokens on which the candidates of an equaliser are compared."""


class NotReached(ValueError):  # noqa: N818  (the caller's data, not a fault: the message says which layer)
    """A layer that runs on some batches of the calibration data only."""


@dataclass(frozen=True)
class Pair:
    """Inputs of one module for one batch: of the float model, and of the integer model."""

    float: Tensor
    integer: Tensor


class Pairs:
    """The pairs of all batches, outside of memory: 1.2 MB an image of ViT-B."""

    def __init__(self, pairs: Iterable[Pair] = ()):
        self._file = TensorFile((pair.float, pair.integer) for pair in pairs)

    def __len__(self) -> int:
        return len(self._file)

    def __iter__(self) -> Iterator[Pair]:
        return (Pair(*row) for row in self._file)


class _Arrived(Exception):  # noqa: N818  (ends a forward pass where nobody needs its rest)
    def __init__(self, value: Tensor):
        self.value = value


class _Capture:
    """An observer (see `QuantLinear.observer`) that ends the forward pass with what the layer was about to quantize."""

    def update(self, x: Tensor) -> None:
        raise _Arrived(x)


@torch.no_grad()  # not inference_mode: what is assigned must serve as parameters again, for `restore`
def reconstruct_(model: nn.Module, batches: Iterable[Batch], progress: bool = False) -> None:
    """Choose equalisers and codes of all int8 layers of a quantized model, in place, by calibration data.

    Args:
        model: a quantized model that still holds its float modules (`vqvit.rewriter.apply_plan`).
        batches: model inputs, read anew for each module that is reached by running the model; some thousand tokens are
            enough, as long as they are several times a layer's width. Of two batches or more every other one is held
            out where the data could be overfitted.
        progress: show a progress bar on stderr.

    Layers in tier fp16, and layers that the model does not run, stay as they are. Raises `NotReached` for one that runs
    on some batches only; after an error some layers have changed.
    """
    device = next(model.buffers()).device
    reference = float_skeleton(model).eval()
    order, follows = _order(model, next(iter(batches)).to(device))
    pairs = Pairs()
    modules = dict(quantized_modules(model))
    for name in tqdm(order, desc="rounding", unit="module", disable=not progress):
        module = modules[name]
        if name not in follows:
            placed = (batch.to(device) for batch in batches)
            pairs = Pairs(
                Pair(_input_of(reference, module.original[0], batch, name), _input_of(model, module, batch, name))
                for batch in placed
            )
        if isinstance(module, EncoderBlock):
            pairs = _reconstruct_block(module, pairs)
        elif _is_rounded(module):
            _reconstruct_layer(module, pairs)


def _order(model: nn.Module, batch: Batch) -> tuple[list[str], set[str]]:
    """Names of the replaced modules in the order in which they run, and those blocks that get exactly what the block
    before them returned.
    """
    names = {id(module): name for name, module in quantized_modules(model)}
    order: list[str] = []
    follows: set[str] = set()
    previous: list[Tensor | None] = [None]

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        name = names[id(module)]
        if name in order:
            return
        order.append(name)
        if isinstance(module, EncoderBlock) and _first(args, kwargs) is previous[0]:
            follows.add(name)

    def after(module: nn.Module, args: tuple, output: object) -> None:
        previous[0] = _hidden(output) if isinstance(module, EncoderBlock) else None

    hooks = []
    try:
        for _, module in quantized_modules(model):
            hooks += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after),
            ]
        model(*batch.args, **batch.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return order, follows


def _input_of(model: nn.Module, part: nn.Module, batch: Batch, name: str) -> Tensor:
    """What `part` of `model`, called `name`, gets in a run on one batch, which ends there. Raises `NotReached`."""

    def stop(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        raise _Arrived(_first(args, kwargs))

    hook = part.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(*batch.args, **batch.kwargs)
    except _Arrived as arrived:
        return arrived.value
    finally:
        hook.remove()
    raise NotReached(f"calibration: expected {name} to run on every batch; it did not")


def _first(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))


def _hidden(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _is_rounded(layer: QuantModule) -> bool:
    """Int8 layers; a compensated one keeps the nearest codes, of which its residual codes hold the rest."""
    return isinstance(layer, QuantLinear) and layer.plan.compensation == "none"


def _reconstruct_layer(layer: QuantLinear, pairs: Pairs) -> None:
    """A plain layer or a patch embedding."""
    original = layer.original[0]
    moments = _halves(layer)
    for i, pair in enumerate(pairs):
        x_hat, x = _thinned((_rows(layer, pair.integer), _rows(layer, pair.float)), len(pairs))
        moments[i % 2].add(layer.seen_input(x_hat), x.float())
    weight = original.weight.flatten(1)
    if _equalizer(layer) is not None:
        weight = weight / layer.equalizer
    _assign(layer, weight, original.bias, moments)


def _halves(layer: QuantLinear) -> tuple[Moments, Moments]:
    """Empty moments of the layer's input, for every other batch."""
    return tuple(Moments(layer.in_features, layer.scale.device) for _ in range(2))


def _thinned(inputs: tuple[Tensor, Tensor], batches: int) -> tuple[Tensor, Tensor]:
    """Rows of two inputs (T, K) at even steps, one batch's share of `ROWS_PER_CHANNEL`."""
    tokens, width = inputs[0].shape
    step = max(1, tokens * batches // (ROWS_PER_CHANNEL * width))
    return inputs[0][::step], inputs[1][::step]


def _rows(layer: QuantLinear, x: Tensor) -> Tensor:
    """A layer's input as rows (T, K); images become patches, factorised where the layer does so."""
    if isinstance(layer, QuantPatchEmbed):
        x = cut_patches(layer.plan.name, x, layer.channels, layer.patch)
    rows = x.reshape(-1, layer.in_features)
    return rows if _equalizer(layer) is None else rows * layer.equalizer


def _equalizer(layer: QuantLinear) -> Tensor | None:
    """1 / c_k (K,) of a factorised patch embedding."""
    return layer.equalizer if isinstance(layer, QuantPatchEmbed) else None


def _reconstruct_block(block: EncoderBlock, pairs: Pairs) -> Pairs:
    """All four linears in their order; returns what both blocks make of the inputs."""
    original = block.original[0]
    parts = families.probe(original)
    linears = float_linears(parts)
    for role in ROLES:
        layer = getattr(block, role)
        if not _is_rounded(layer):
            continue
        weight, bias = linears[role]
        c = _equalize(block, role, parts, weight, pairs)
        moments = _halves(layer)
        entrance = parts.qkv[0] if role == "qkv" else getattr(parts, role)
        for i, pair in enumerate(pairs):
            with _captured(layer):
                integer = _arriving(block, pair.integer)
            x = _input_of(original, entrance, Batch((pair.float,), {}), layer.plan.name)
            x_hat, x = _thinned((integer, x.reshape(integer.shape).float()), len(pairs))
            moments[i % 2].add(layer.seen_input(x_hat), x if c is None else x / c)
        _assign(layer, weight if c is None else weight.float() * c, bias, moments)
    return Pairs(Pair(_hidden(original(pair.float)), _hidden(block(pair.integer))) for pair in pairs)


def _assign(layer: QuantLinear, weight: Tensor, bias: Tensor | None, moments: tuple[Moments, Moments]) -> None:
    """Solve for the layer's weights; a single batch leaves nothing to hold out."""
    present = Weights(layer.plain_codes(), layer.scale, layer.zero_point, layer.multipliers)
    plan = layer.plan
    fit, held_out = moments
    held_out = held_out if held_out.count else None
    chosen, corrected = solve(weight, bias, fit, present, plan.bits, plan.per_channel, held_out=held_out)
    layer.assign_(chosen.codes, chosen.scale, corrected, chosen.multipliers)


def _equalize(block: EncoderBlock, role: str, parts: families.BlockParts, weight: Tensor, pairs: Pairs):
    """Fold the equaliser with the least measured output error into what precedes `role`; c (K,), or None for none.

    Candidates for qkv and fc1: none, from the LayerNorm alone, and from the calibration ranges; for attn_out none and
    from the ranges, folded into the rows of v. The layer holds nearest codes for it afterwards.
    """
    layer: QuantLinear = getattr(block, role)
    if role == "fc2" or not layer.plan.equalize:
        return None
    norm = {"qkv": "norm1", "fc1": "norm2"}.get(role)
    if norm is None and not _can_fold_into_v(block):
        return None
    rows = _sample(block, layer, pairs)
    if norm is None:
        candidates = [None]
    else:
        gamma, beta = (getattr(getattr(parts, norm), name).detach().float() for name in ("weight", "bias"))
        from_norm = equalizer(norm_reach(gamma, beta), weight)
        rows = rows * from_norm
        candidates = [from_norm] if layer.plan.activation == "static" else [None, from_norm]
    if layer.plan.activation != "static":  # a static scale is calibrated for the fold that the layer came with
        reach = rows.abs().amax(0)
        candidates += [equalizer(reach, weight, share) for share in SHARES]
    errors = [_equalized_error(layer, weight, rows, c) for c in candidates]
    c = candidates[errors.index(min(errors))]
    if norm is not None:
        gamma, beta = (gamma, beta) if c is None else (gamma / c, beta / c)
        setattr(block, f"{norm}_weight", gamma.clone())
        setattr(block, f"{norm}_bias", beta.clone())
    elif c is not None:
        _fold_into_v(block.qkv, c)
    _requantize(layer, weight if c is None else weight.float() * c)
    return c


def _can_fold_into_v(block: EncoderBlock) -> bool:
    """Whether the rows of v have scales that may change, and nothing behind them was calibrated for what they are."""
    free = _is_rounded(block.qkv) and block.qkv.multipliers is None and block.plan.attention_scales == "dynamic"
    return free and block.attn_out.plan.activation != "static"


def _fold_into_v(qkv: QuantLinear, c: Tensor) -> None:
    """Divide the rows of v by c (H D,): their scales, for the codes of a row do not depend on its size."""
    scale, bias = qkv.scale.clone(), None if qkv.bias is None else qkv.bias.clone()
    rows = slice(len(scale) - len(c), None)
    scale[rows] /= c
    if bias is not None:
        bias[rows] /= c.to(bias.dtype)
    qkv.assign_(qkv.plain_codes(), scale, bias)


def _sample(block: EncoderBlock, layer: QuantLinear, pairs: Pairs) -> Tensor:
    """Up to `SAMPLE_ROWS` inputs of the integer layer, at even steps through the calibration tokens; fp32 (T, K)."""
    rows = []
    for pair in pairs:
        with _captured(layer):
            x = _arriving(block, pair.integer).float()
        wanted = max(1, SAMPLE_ROWS // len(pairs))
        rows.append(x[:: max(1, len(x) // wanted)][:wanted])
    return torch.cat(rows)


def _equalized_error(layer: QuantLinear, weight: Tensor, rows: Tensor, c: Tensor | None) -> float:
    """Σ (X W'ᵀ - X̂ Ŵᵀ)² with the rows divided by c and the weight multiplied, both rounded to nearest."""
    exact = rows @ weight.float().t()
    if c is not None:
        rows, weight = rows / c, weight.float() * c
    rounded = QuantLinear(layer.plan, weight, None).float_weight()
    return float((layer.seen_input(rows) @ rounded.t() - exact).double().square().sum())


def _requantize(layer: QuantLinear, weight: Tensor) -> None:
    fresh = QuantLinear(layer.plan, weight, None)
    if fresh.zero_point is not None:
        layer.zero_point = fresh.zero_point
    layer.assign_(fresh.codes, fresh.scale, None, fresh.multipliers)


@contextmanager
def _captured(layer: QuantLinear) -> Iterator[None]:
    """While the context lasts, a forward pass ends at `layer`."""
    layer.observer = _Capture()
    try:
        yield
    finally:
        layer.observer = None


def _arriving(block: EncoderBlock, hidden: Tensor) -> Tensor:
    """The float input (T, K) of the captured layer of `block`."""
    try:
        block(hidden)
    except _Arrived as arrived:
        return arrived.value
    raise NotReached(f"{block.plan.name}: expected its captured layer to run; it did not")
