"""Which layers of a float model quantization hurts (numerics §9): S(W), the diagonal Fisher, and measured damage.

    S(W)   = σ₁(W) / ‖W‖_F · E_batch ‖∂L/∂W‖_F
    S_F(W) = Σ mean(g²) ∘ (W - Ŵ)², g the gradient of one image's loss
    damage = KL of the logits, or relative squared error of the feature, with that layer alone on the integer kernels

The model is not changed: hooks on its layers watch inputs and gradients, and put an integer layer's output in place of
the float one's. Each layer is quantized as the plan says, behind an equalised LayerNorm too; static activation scales
count as per-token ones, for the scores are about weights. The attention's own codes are no part of any layer.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vqvit.batches import Batch, Batches
from vqvit.evaluate import checked_labels, eval_mode, forward, pick_output
from vqvit.plan import TIERS, Plan, PlanError, QuantConfig
from vqvit.rewriter import make_plan
from vqvit.sensitivity.scores import OBJECTIVES, LayerScore, MatrixScore, Sensitivity
from vqvit.sensitivity.targets import Part, Target, find_targets, in_tier, replaced


def measure(
    model: nn.Module,
    batches: Iterable,
    plan: Plan | None = None,
    objective: str | None = None,
    damage_tiers: tuple[str, ...] = ("int8",),
    seed: int = 0,
    progress: bool = False,
) -> Sensitivity:
    """Score every layer of `plan` on the float `model`, which is left as it was.

    Args:
        batches: as for `vqvit.quantize_`; labels are used if every batch has them and the model returns logits.
        plan: default: the one that `vqvit.quantize_` would follow.
        objective: one of `vqvit.sensitivity.OBJECTIVES`; default: labels, or without them sampled, or features.
        damage_tiers: tiers whose damage is measured, each a pass over the data for every layer; the first is also
            measured for q, k and v alone. Empty measures none.
        seed: of sampled labels and random signs.

    Raises `PlanError` for a quantized model, or a plan or option that does not fit; `ValueError` or `TypeError` for
    data or outputs that cannot be used.
    """
    if unknown := set(damage_tiers) - set(TIERS):
        raise PlanError(f"damage_tiers: expected tiers among {', '.join(TIERS)}; got {', '.join(sorted(unknown))}")
    plan = plan or make_plan(model, QuantConfig())[0]
    targets = find_targets(model, plan)
    read = Batches(batches)
    if not len(read):
        raise ValueError("sensitivity: expected at least one batch; got none")
    if not all(batch.images.is_floating_point() for batch in read):
        raise ValueError("sensitivity: expected floating-point images; got integers")
    half = getattr(torch, plan.half_dtype)
    with eval_mode(model):
        outputs, is_logits = _float_outputs(model, read)
        objective = _objective(objective, is_logits, read)
        gradients = _gradients(model, targets, read, objective, seed, progress)
        damages = _damages(model, targets, read, outputs, is_logits, damage_tiers, half, progress)
    matrices, layers = [], []
    for target in targets:
        scored, layer = _scores(target, gradients, damages, damage_tiers, half)
        matrices += scored
        layers.append(layer)
    images = read.images
    square = sum(output.square().sum().item() for output in outputs) / images
    metric, curvature = ("kl", 0.5) if is_logits else ("feature_error", 1 / square if square > 0 else 0.0)
    return Sensitivity(objective, metric, images, curvature, tuple(matrices), tuple(layers))


def _float_outputs(model: nn.Module, batches: Batches) -> tuple[list[Tensor], bool]:
    outputs = []
    with torch.inference_mode():
        for index, batch in enumerate(batches):
            output, is_logits = pick_output(forward(model, batch))
            if not torch.isfinite(output).all():
                raise ValueError(f"sensitivity: expected finite outputs for batch {index}; got NaN or Inf")
            outputs.append(output.double().cpu().flatten(1))
    return outputs, is_logits


def _objective(asked: str | None, is_logits: bool, batches: Batches) -> str:
    labelled = all(batch.labels is not None for batch in batches)
    possible = (("labels",) if labelled and is_logits else ()) + (("sampled",) if is_logits else ("features",))
    if asked is None:
        return possible[0]
    if asked not in OBJECTIVES:
        raise PlanError(f"objective: expected one of {', '.join(OBJECTIVES)}; got {asked!r}")
    if asked not in possible:
        raise PlanError(f"objective: expected one of {', '.join(possible)} for this model and data; got {asked!r}")
    return asked


class _Gradients:
    """Gradients of a layer's parts: Σ over images of g² (N, K) fp32, and the norm of each batch's mean gradient."""

    def __init__(self, target: Target):
        self.target = target
        self.squares = torch.zeros_like(target.weight, dtype=torch.float32)
        self.norms: dict[str, list[float]] = {part.name: [] for part in target.parts}
        self.images = self.batches = 0

    def watch(self, images: int, ran: set[str]) -> Iterator:
        """Register hooks for one batch; yields their handles."""
        self.images, self.batches = self.images + images, self.batches + 1
        for module in dict.fromkeys(part.module for part in self.target.parts):
            parts = tuple(part for part in self.target.parts if part.module is module)
            yield module.register_forward_hook(self._hook(parts, images, ran))

    def _hook(self, parts: tuple[Part, ...], images: int, ran: set[str]):
        calls = []

        def forward_hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if calls:
                raise ValueError(f"sensitivity: expected {parts[0].name} to run once for an image; it ran again")
            calls.append(None)
            ran.add(self.target.plan.name)
            x = _rows(args[0].detach(), module, images)
            output.register_hook(lambda gradient: self._take(parts, x, _columns(gradient, module, images)))

        return forward_hook

    def _take(self, parts: tuple[Part, ...], x: Tensor, gradient: Tensor) -> None:
        """x (B, T, K) and ∂(Σ losses)/∂y (B, T, N)."""
        total = torch.zeros(gradient.shape[-1], x.shape[-1], device=x.device)
        first = parts[0].rows.start
        rows = slice(first, first + len(total))
        for one_x, one_gradient in zip(x.float(), gradient.float(), strict=True):
            g = one_gradient.T @ one_x
            self.squares[rows] += g.square()
            total += g
        for part in parts:
            self.norms[part.name].append((total[part.outputs].norm() / len(x)).item())


def _gradients(
    model: nn.Module, targets: tuple[Target, ...], batches: Batches, objective: str, seed: int, progress: bool
) -> dict[str, _Gradients]:
    gradients = {target.plan.name: _Gradients(target) for target in targets}
    generator = torch.Generator().manual_seed(seed)
    for index, batch in enumerate(tqdm(batches, desc="gradients", unit="batch", disable=not progress)):
        count, ran = len(batch.images), set()
        with ExitStack() as hooks, torch.enable_grad():
            for entry in gradients.values():
                for handle in entry.watch(count, ran):
                    hooks.callback(handle.remove)
            images = batch.images.detach().clone().requires_grad_()
            output = pick_output(forward(model, _with_images(batch, images)))[0].flatten(1).float()
            loss = _loss(output, batch, index, objective, generator)
            torch.autograd.grad(loss, images)
        if idle := [name for name in gradients if name not in ran]:
            raise ValueError(f"sensitivity: expected every layer to run on the data; {', '.join(idle)} did not")
    return gradients


def _loss(output: Tensor, batch: Batch, index: int, objective: str, generator: torch.Generator) -> Tensor:
    """Σ over images of the loss, from logits or features (B, D)."""
    if objective == "features":
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        return (output * signs).sum()
    if objective == "labels":
        labels = checked_labels(index, batch.labels, output)
    else:
        labels = torch.multinomial(output.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(-1)
    return F.cross_entropy(output, labels.to(output.device), reduction="sum")


def _with_images(batch: Batch, images: Tensor) -> Batch:
    if batch.args:
        return dataclasses.replace(batch, args=(images, *batch.args[1:]))
    return dataclasses.replace(batch, kwargs={**batch.kwargs, next(iter(batch.kwargs)): images})


def _rows(x: Tensor, module: nn.Linear | nn.Conv2d, images: int) -> Tensor:
    """A layer's input as (B, T, K), a token a row; patches of an image for a convolution."""
    if isinstance(module, nn.Conv2d):
        return F.unfold(x, module.kernel_size, stride=module.stride).transpose(1, 2)
    return x.reshape(images, -1, x.shape[-1])


def _columns(gradient: Tensor, module: nn.Linear | nn.Conv2d, images: int) -> Tensor:
    """The gradient of a layer's output as (B, T, N)."""
    if isinstance(module, nn.Conv2d):
        return gradient.flatten(2).transpose(1, 2)
    return gradient.reshape(images, -1, gradient.shape[-1])


def _damages(
    model: nn.Module,
    targets: tuple[Target, ...],
    batches: Batches,
    outputs: list[Tensor],
    is_logits: bool,
    tiers: tuple[str, ...],
    half: torch.dtype,
    progress: bool,
) -> dict[tuple[str, str], float]:
    """(layer or matrix, tier) -> damage with it alone quantized."""
    damages = {}
    bar = tqdm(targets, desc="damage of each layer", unit="layer", disable=not progress or not tiers)
    for target in bar if tiers else ():
        for tier in tiers:
            if (quantized := in_tier(target, tier, half)) is None:
                continue
            chosen = {target.plan.name: target.parts}
            if tier == tiers[0] and len(target.parts) > 1:
                chosen |= {part.name: (part,) for part in target.parts}
            for name, parts in chosen.items():
                with replaced(target, parts, quantized, target.folded(tier)):
                    damages[name, tier] = _damage(model, batches, outputs, is_logits)
    return damages


@torch.inference_mode()
def _damage(model: nn.Module, batches: Batches, outputs: list[Tensor], is_logits: bool) -> float:
    total = scale = 0.0
    for batch, want in zip(batches, outputs, strict=True):
        got = pick_output(forward(model, batch))[0].double().cpu().flatten(1)
        if is_logits:
            log_p, log_q = want.log_softmax(-1), got.log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
            scale += len(want)
        else:
            total += float((got - want).square().sum())
            scale += float(want.square().sum())
    return total / scale


def _scores(
    target: Target,
    gradients: dict[str, _Gradients],
    damages: dict[tuple[str, str], float],
    tiers: tuple[str, ...],
    half: torch.dtype,
) -> tuple[list[MatrixScore], LayerScore]:
    name, seen = target.plan.name, gradients[target.plan.name]
    weight = target.weight.float()
    fisher, size = {}, {}
    for tier in TIERS:
        if (quantized := in_tier(target, tier, half)) is not None:
            equalizer = target.folded(tier)
            stored = quantized.float_weight() if equalizer is None else quantized.float_weight() / equalizer
            fisher[tier] = (seen.squares / seen.images * (weight - stored).square()).double().sum(-1)
            size[tier] = sum(tensor.nbytes for tensor in quantized.state_dict().values())
    matrices = [
        MatrixScore(
            part.name,
            name,
            tuple(weight[part.rows].shape),
            concentration(weight[part.rows]),
            sum(seen.norms[part.name]) / seen.batches,
            fisher["int8"][part.rows].sum().item(),
            damages.get((part.name, tiers[0])) if tiers else None,
        )
        for part in target.parts
    ]
    measured = {tier: damages[name, tier] for tier in tiers if (name, tier) in damages}
    summed = {tier: rows.sum().item() for tier, rows in fisher.items()}
    return matrices, LayerScore(name, target.plan.role, max(m.score for m in matrices), summed, measured, size)


def concentration(weight: Tensor) -> float:
    """σ₁(W) / ‖W‖_F = 1 / √(stable rank) of a matrix (N, K), from the eigenvalues of its smaller Gram matrix, fp64."""
    weight = weight.double()
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    norm = weight.norm().item()
    return torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt().item() / norm if norm > 0 else 0.0
