"""Observers of a layer's input during calibration: each chooses the range of a static activation scale (numerics §3).

    ema           running max and sd, an exponential moving average over batches: the paper's running statistics
    max           the largest magnitude of all batches: nothing that was seen is clipped
    percentile    the magnitude below which that share of all elements lies
    mse           the clip r with the least Σ (x - x̂(r))² over all elements
    output_error  the clip r with the least Σ ‖(x̂(r) - x) Ŵᵀ‖², what the scale costs the output, estimated from a sample
                  of rows

The scale is α = max(1e-8, (r + δ · sd) / 127) in every case. Observers are streaming, their memory does not grow with
the data; all state is in tensors that `state` hands out and `load` takes back, after which they go on to the same bits.
"""

import hashlib
import json
import math
from dataclasses import asdict, astuple, dataclass

import torch
from torch import Tensor

from vqvit import numerics as nm
from vqvit.plan import read_observer

EMA_DECAY = 0.99
"""Memory of the running maximum and standard deviation: the paper's running statistics."""

BIN_SHIFT = 16
BINS = 0x7F80
"""Bins of the histogram of |x|: the upper half of the fp32 pattern, one bin for each finite bfloat16 number. Its
relative resolution, 1/128, is the same at every magnitude, so no range has to be known beforehand."""

CLIPS_PER_OCTAVE, CLIP_OCTAVES = 16, 8
"""Clips that `mse` tries: max · 2^(-i/16) down to max / 256. With n elements around sd and one outlier the best clip
falls as the outlier's square over n: an outlier of 100 sd in 10^8 elements is best clipped to its sixteenth."""

OUTPUT_CLIPS_PER_OCTAVE, OUTPUT_CLIP_OCTAVES = 8, 5
"""Clips that `output_error` tries; each costs a product with the weight."""

PEAK_ROWS, SAMPLE_ROWS = 128, 128
"""Rows that `output_error` keeps of a layer's input: those with the largest elements, which a clip hurts, and a uniform
sample of the others. A uniform sample alone misses rare outliers: with 256 rows of it W8A8 DINOv2-small lost 2 dB."""


class CalibrationError(ValueError):
    """Calibration data, or a calibration state, that cannot be used."""


@dataclass(frozen=True)
class LayerRange:
    """The calibrated input range of one layer.

    Attributes: observer, as in `LayerPlan`; maximum and deviation, max|x| and sd(x) of its input (running averages for
    ema); clip, the range r; scale, the static scale α.
    """

    observer: str
    maximum: float
    deviation: float
    clip: float
    scale: float


@dataclass(frozen=True)
class Ranges:
    """The calibrated ranges of a model: layer name -> `LayerRange`, in the plan's order."""

    layers: dict[str, LayerRange]

    def to_json(self) -> str:
        return json.dumps({name: asdict(layer) for name, layer in self.layers.items()}, indent=1)

    @staticmethod
    def from_json(text: str) -> "Ranges":
        """Parse `to_json`'s text. Raises `CalibrationError` for anything else."""
        try:
            ranges = Ranges({name: LayerRange(**fields) for name, fields in json.loads(text).items()})
            if infinite := [n for n, r in ranges.layers.items() if not all(map(math.isfinite, astuple(r)[1:]))]:
                raise CalibrationError(f"ranges: expected finite numbers; got others for {', '.join(infinite)}")
            return ranges
        except (json.JSONDecodeError, AttributeError, TypeError) as error:
            raise CalibrationError(f"ranges: expected a JSON object of layer ranges; got another: {error}") from error


class MaxObserver:
    """max|x| of everything, and sd(x) from fp64 sums; the base of the other observers."""

    FIELDS = ("maximum", "count", "total", "squares")

    def __init__(self, name: str, seed: int = 0):
        self.name, self.seed = name, seed
        self.tensors: dict[str, Tensor] = {}

    def update(self, x: Tensor) -> None:
        """Take in a batch (M, K). Raises `CalibrationError` for NaN or Inf."""
        maximum = x.abs().amax().float()
        if not torch.isfinite(maximum):
            raise CalibrationError(f"calibration: expected finite inputs of {self.name}; got NaN or Inf")
        self._take(x.float(), maximum)

    @property
    def started(self) -> bool:
        return bool(self.tensors)

    def state(self) -> dict[str, Tensor]:
        """Everything that was seen, on the CPU."""
        return {field: tensor.cpu() for field, tensor in self.tensors.items()}

    def load(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        """Go on from `state`'s tensors. Raises `CalibrationError` for those of another observer."""
        if tensors and set(tensors) != set(self.FIELDS):
            received = f"{', '.join(sorted(tensors))} for {self.name}"
            raise CalibrationError(f"calibration state: expected {', '.join(sorted(self.FIELDS))}; got {received}")
        self.tensors = {field: tensor.to(device) for field, tensor in tensors.items()}

    def deviation(self) -> Tensor:
        """sd(x) of everything, fp32 scalar."""
        mean = self.tensors["total"] / self.tensors["count"]
        return (self.tensors["squares"] / self.tensors["count"] - mean.square()).clamp(min=0).sqrt().float()

    def clip(self, weight: Tensor | None) -> Tensor:
        """The range r, fp32 scalar, for a layer of fp32 weight (N, K)."""
        return self.tensors["maximum"]

    def scale(self, delta: float, weight: Tensor | None = None) -> Tensor:
        """max(1e-8, (r + delta · sd) / 127), fp32 scalar."""
        return self._scale(self.clip(weight), delta)

    def range(self, kind: str, delta: float, weight: Tensor | None = None) -> tuple[LayerRange, Tensor]:
        """What is remembered of the layer, and its scale."""
        clip = self.clip(weight)
        scale = self._scale(clip, delta)
        figures = (self.tensors["maximum"], self.deviation(), clip, scale)
        return LayerRange(kind, *(figure.item() for figure in figures)), scale

    def _scale(self, clip: Tensor, delta: float) -> Tensor:
        return ((clip + delta * self.deviation()) / nm.QMAX).clamp(min=nm.SCALE_MIN)

    def _take(self, x: Tensor, maximum: Tensor) -> None:
        wide = x.double()
        self._put("maximum", maximum, torch.maximum)
        self._put("count", torch.tensor(x.numel(), device=x.device), torch.add)
        self._put("total", wide.sum(), torch.add)
        self._put("squares", wide.square().sum(), torch.add)

    def _put(self, field: str, value: Tensor, combine) -> None:
        before = self.tensors.get(field)
        self.tensors[field] = value.clone() if before is None else combine(before, value)


class EmaObserver(MaxObserver):
    """Running max|x| and sd(x): an exponential moving average over batches, started by the first."""

    FIELDS = ("maximum", "running_deviation")

    def deviation(self) -> Tensor:
        return self.tensors["running_deviation"]

    def _take(self, x: Tensor, maximum: Tensor) -> None:
        self._put("maximum", maximum, _average)
        self._put("running_deviation", x.std(correction=0), _average)


class HistogramObserver(MaxObserver):
    """Counts of |x| in the bins of the bfloat16 grid: exact, and the same in whatever order batches come."""

    FIELDS = (*MaxObserver.FIELDS, "counts")

    def _take(self, x: Tensor, maximum: Tensor) -> None:
        super()._take(x, maximum)
        index = x.abs().contiguous().view(torch.int32).flatten() >> BIN_SHIFT
        self._put("counts", torch.bincount(index, minlength=BINS), torch.add)

    def bins(self) -> tuple[Tensor, Tensor, Tensor]:
        """Counts int64, lower and upper edges fp64 of the bins that are not empty."""
        counts = self.tensors["counts"]
        filled = counts.nonzero().squeeze(-1)
        low, high = ((index.to(torch.int32) << BIN_SHIFT).view(torch.float32) for index in (filled, filled + 1))
        return counts[filled], low.double(), high.double().clamp(max=torch.finfo(torch.float32).max)


class PercentileObserver(HistogramObserver):
    """The magnitude below which a share of all elements lies, interpolated in its bin, at most the maximum."""

    def __init__(self, name: str, seed: int = 0, percentile: float = 100.0):
        super().__init__(name, seed)
        self.percentile = percentile

    def clip(self, weight: Tensor | None) -> Tensor:
        counts, low, high = self.bins()
        cumulative = counts.cumsum(0).double()
        rank = cumulative[-1] * (self.percentile / 100)
        at = torch.searchsorted(cumulative, rank).clamp(max=len(counts) - 1)
        inside = 1 - (cumulative[at] - rank) / counts[at]
        value = low[at] + inside * (high[at] - low[at])
        return torch.minimum(value.float(), self.tensors["maximum"])


class MseObserver(HistogramObserver):
    """The clip with the least squared quantization error of the histogram's elements."""

    def clip(self, weight: Tensor | None) -> Tensor:
        counts, low, high = self.bins()
        clips = candidates(self.tensors["maximum"], CLIPS_PER_OCTAVE, CLIP_OCTAVES)
        step = clips.double()[:, None] / nm.QMAX
        inside = (_error_integral(high / step) - _error_integral(low / step)) * step / (high - low)
        return clips[(counts * step.square() * inside).sum(-1).argmin()]


class OutputErrorObserver(MaxObserver):
    """The clip with the least squared error of the layer's output, estimated from a stratified sample of rows.

    The rows with the largest elements count once each, the sampled ones for all others. Every row gets a random number
    from a generator seeded by seed, layer and batch; the sample are the rows with the smallest.
    """

    FIELDS = (*MaxObserver.FIELDS, "rows", "priorities", "batches", "seen")

    def _take(self, x: Tensor, maximum: Tensor) -> None:
        super()._take(x, maximum)
        seen = self.tensors
        batch = int(seen["batches"]) if "batches" in seen else 0
        priorities = torch.rand(len(x), generator=_generator(self.seed, self.name, batch), dtype=torch.float64)
        rows, priorities = x, priorities.to(x.device)
        if batch:
            rows, priorities = torch.cat([seen["rows"], rows]), torch.cat([seen["priorities"], priorities])
        by_peak = torch.argsort(rows.abs().amax(-1), descending=True, stable=True)
        peaks, others = by_peak[:PEAK_ROWS], by_peak[PEAK_ROWS:]
        sampled = others[torch.argsort(priorities[others], stable=True)[:SAMPLE_ROWS]]
        kept = torch.cat([peaks, sampled])
        self.tensors["rows"], self.tensors["priorities"] = rows[kept], priorities[kept]
        self._put("batches", torch.tensor(1, device=x.device), torch.add)
        self._put("seen", torch.tensor(len(x), device=x.device), torch.add)

    def clip(self, weight: Tensor | None) -> Tensor:
        clips = candidates(self.tensors["maximum"], OUTPUT_CLIPS_PER_OCTAVE, OUTPUT_CLIP_OCTAVES)
        rows = self.tensors["rows"]
        weight = weight.to(rows)
        sampled = max(1, len(rows) - PEAK_ROWS)
        stands_for = (int(self.tensors["seen"]) - PEAK_ROWS) / sampled  # others of each sampled row, itself included
        errors = []
        for clip in clips:
            step = clip / nm.QMAX
            difference = torch.round(rows / step).clamp(-nm.QMAX, nm.QMAX) * step - rows
            squares = (difference @ weight.T).double().square().sum(-1)
            errors.append(squares[:PEAK_ROWS].sum() + stands_for * squares[PEAK_ROWS:].sum())
        return clips[torch.stack(errors).argmin()]


KINDS = {
    "ema": EmaObserver,
    "max": MaxObserver,
    "percentile": PercentileObserver,
    "mse": MseObserver,
    "output_error": OutputErrorObserver,
}
"""Observers by the name that a plan gives them."""


def make_observer(name: str, text: str = "ema", seed: int = 0) -> MaxObserver:
    """The observer that a plan calls `text`, for the layer `name`. Raises `PlanError` for an unknown one."""
    kind, percentile = read_observer(f"observer of {name}", text)
    options = {"percentile": percentile} if kind == "percentile" else {}
    return KINDS[kind](name, seed, **options)


def candidates(maximum: Tensor, per_octave: int, octaves: int) -> Tensor:
    """Clips from the largest down, fp32: maximum · 2^(-i / per_octave), and never below the smallest range."""
    steps = torch.arange(per_octave * octaves + 1, dtype=torch.float64, device=maximum.device)
    return (maximum.double() * torch.exp2(-steps / per_octave)).float().clamp(min=nm.SCALE_MIN * nm.QMAX)


def _error_integral(u: Tensor) -> Tensor:
    """∫₀ᵘ (v - code(v))² dv for u >= 0 in steps, code = min(rne(v), 127): n/12 + r³/3 with n the code and r = u - n."""
    code = torch.round(u).clamp(max=nm.QMAX)
    return code / 12 + (u - code) ** 3 / 3


def _average(before: Tensor, value: Tensor) -> Tensor:
    return torch.lerp(value, before, EMA_DECAY)


def _generator(seed: int, name: str, batch: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}:{batch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
