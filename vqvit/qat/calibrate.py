"""Start values of learned scales from calibration data: one pass of the float model (numerics §2, §3, §7)."""

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vqvit import numerics as nm
from vqvit.batches import read_batch
from vqvit.calibration import CalibrationError, HeadObserver, make_observer
from vqvit.evaluate import eval_mode
from vqvit.factorize import input_factors
from vqvit.qat import straight_through as st
from vqvit.qat.attention import FakeAttention
from vqvit.qat.linear import FakeQuantLinear
from vqvit.reference import COMPENSATION_TERMS, quantize_residual

SAMPLE_ROWS = 512
"""Rows of a layer's input on which candidates of β are compared."""

BETA_CANDIDATES = tuple(step / 8 for step in range(-16, 9))
"""-2 to 1 in steps of 1/8 (numerics §2)."""


class LayerObserver:
    """Ranges of a layer's input, whole and by channel, and a uniform sample of at most `SAMPLE_ROWS` of its rows."""

    def __init__(self, name: str, observer: str):
        """`observer` is that of the layer's plan, for the static scale."""
        self.range = make_observer(name, observer)
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        self.rows: Tensor | None = None
        self.reach: Tensor | None = None  # (K,) max|X_k|
        self.keys = torch.empty(0)

    def update(self, x: Tensor) -> None:
        """Take in a batch (M, K): rows with the largest random keys stay."""
        self.range.update(x)
        reach = x.abs().amax(0)
        self.reach = reach if self.reach is None else torch.maximum(self.reach, reach)
        keys = torch.cat([self.keys, torch.rand(len(x), generator=self.generator)])
        chosen = keys.topk(min(SAMPLE_ROWS, len(keys))).indices
        rows = x if self.rows is None else torch.cat([self.rows, x])
        self.rows, self.keys = rows[chosen.to(x.device)], keys[chosen]


@torch.no_grad()
def calibrate(model: nn.Module, calibration: Iterable, progress: bool = False) -> None:
    """Run a prepared model in float on `calibration`; then start its static scales, and its weight scales by β search.

    Raises `CalibrationError` for unusable data, or where a layer does not run on them.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantLinear)}
    heads = {name: m for name, m in model.named_modules() if isinstance(m, FakeAttention) and m.is_static}
    blends = {layer: layer.blend for layer in layers.values()}
    try:
        for name, layer in layers.items():
            layer.blend, layer.observer = 0.0, LayerObserver(name, layer.base_plan.observer)
        for name, attention in heads.items():
            attention.observer = HeadObserver(name, attention.num_heads)
        _run(model, calibration, progress)
        _start(layers, heads, progress)
    finally:
        for layer, blend in blends.items():
            layer.blend, layer.observer = blend, None
        for attention in heads.values():
            attention.observer = None


def _run(model: nn.Module, calibration: Iterable, progress: bool) -> None:
    device, batches = next(model.parameters()).device, 0
    with eval_mode(model):
        for raw in tqdm(calibration, desc="calibrating", unit="batch", disable=not progress):
            try:
                batch = read_batch(raw).to(device)
            except (TypeError, ValueError) as error:
                raise CalibrationError(f"calibration: {error}") from error
            model(*batch.args, **batch.kwargs)
            batches += 1
    if batches == 0:
        raise CalibrationError("calibration: expected at least one batch; got none")


def _start(layers: dict[str, FakeQuantLinear], heads: dict[str, FakeAttention], progress: bool) -> None:
    for attention in heads.values():
        attention.calibrate_(*attention.observer.scales())
    for name, layer in tqdm(layers.items(), desc="weight scales", unit="layer", disable=not progress):
        observer = layer.observer
        if observer.rows is None:
            raise CalibrationError(f"calibration: expected {name} to run on the calibration data; it did not")
        if layer.log_input_alpha is not None:
            layer.calibrate_input_(observer.range.scale(layer.base_plan.delta, layer.weight.detach()))
        rows = observer.rows
        if layer.base_plan.factorized:
            factors = input_factors(observer.reach, layer.weight)
            layer.factorize_(factors)
            rows = rows / factors
        if layer.log_alpha is not None or layer.beta is not None:
            _start_weight_scale(layer, rows)


def _start_weight_scale(layer: FakeQuantLinear, rows: Tensor) -> None:
    """The β of least output error: of the layer, or of each output channel where each one's scale is learned."""
    errors = output_errors(layer, rows, BETA_CANDIDATES)
    if layer.beta is None and layer.base_plan.per_channel:
        scales = torch.stack([_scale(layer, beta) for beta in BETA_CANDIDATES])
        layer.log_alpha.copy_(st.log_scale(scales.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)))
        return
    best = BETA_CANDIDATES[int(errors.sum(1).argmin())]
    if layer.beta is not None:
        layer.beta.fill_(best)
    else:
        layer.log_alpha.copy_(st.log_scale(_scale(layer, best)[:1]))


def output_errors(layer: FakeQuantLinear, rows: Tensor, betas: Iterable[float]) -> Tensor:
    """fp32 (candidates, N): Σ over rows (R, K) of the squared error of each output channel, x̂ Ŵᵀ against x Wᵀ."""
    rows, weight = rows.float(), layer.weight.detach()
    activation_term, weight_term, _ = COMPENSATION_TERMS[layer.base_plan.compensation]
    seen = layer.quantize_input(rows)
    seen = _with_residual(rows, seen.codes, seen.scale) if activation_term else seen.values
    exact = rows @ weight.t()
    errors = []
    for beta in betas:
        scale = _scale(layer, beta)
        codes = nm.quantize_weight(weight, scale)
        quantized = _with_residual(weight, codes, scale) if weight_term else nm.dequantize(codes, scale)
        errors.append((seen @ quantized.t() - exact).square().sum(0))
    return torch.stack(errors)


def _with_residual(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """α (q + R / 254), what codes and residual codes stand for (numerics §6)."""
    return nm.dequantize(codes + quantize_residual(x, codes, scale) / nm.RESIDUAL_STEPS, scale)


def _scale(layer: FakeQuantLinear, beta: float) -> Tensor:
    return nm.weight_scale(layer.weight.detach(), beta, layer.base_plan.per_channel)
