"""Patch embedding: a convolution whose stride is its kernel is a GEMM over patches (numerics §8)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vqvit import ops
from vqvit.nn.linear import Codes, HalfLinear, QuantLinear
from vqvit.nn.module import without_gradient
from vqvit.plan import LayerPlan


def cut_patches(name: str, pixels: Tensor, channels: int, patch: tuple[int, int]) -> Tensor:
    """Patches (B, Ht/ph, Wd/pw, C · ph · pw) of images (B, C, Ht, Wd), elements in the order of Conv2d's weight.

    Raises `ValueError` for images of other channels, or that do not divide into patches.
    """
    (ph, pw), (height, width) = patch, pixels.shape[-2:]
    if pixels.dim() != 4 or pixels.shape[1] != channels or height % ph or width % pw:
        expected = f"images (B, {channels}, height, width) in multiples of ({ph}, {pw})"
        raise ValueError(f"{name}: expected {expected}; got {tuple(pixels.shape)}")
    grid = pixels.unflatten(2, (height // ph, ph)).unflatten(4, (width // pw, pw))
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3)


def hold_equalizer(layer: QuantLinear) -> None:
    """Register the buffer `equalizer` fp32 (K,), 1 / c_k, of a factorised patch embedding; ones before calibration."""
    like = {"dtype": torch.float32, "device": layer.scale.device}
    layer.hold(equalizer=torch.ones(layer.in_features, **like) if layer.plan.factorized else None)


def unfactorized(weight: Tensor, equalizer: Tensor | None) -> Tensor:
    """W of patches, from W · c of patches / c."""
    return weight if equalizer is None else weight * equalizer


class QuantPatchEmbed(QuantLinear):
    """Drop-in for the patch embedding's `nn.Conv2d`: (B, C, Ht, Wd) to (B, N, Ht/ph, Wd/pw), each patch one token.

    With a factorised plan, patches are multiplied by the buffer `equalizer` and the weight's columns divided by it.
    """

    def __init__(self, plan: LayerPlan, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None):
        """`weight` is the convolution's (N, C, ph, pw)."""
        super().__init__(plan, weight.flatten(1), bias, dtype)
        self.channels, self.patch = weight.shape[1], tuple(weight.shape[2:])
        hold_equalizer(self)

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.dim() != 4 or pixels.shape[1] != self.channels:
            raise ValueError(
                f"{self.plan.name}: expected images (B, {self.channels}, height, width); got {tuple(pixels.shape)}"
            )
        pixels = without_gradient(pixels, self.plan.name)
        codes, scale = ops.patchify_quantize(pixels, *self.patch, self.equalizer)
        row_sum = codes.sum(-1, dtype=torch.int32) if self.zero_point is not None else None
        tokens = super().forward(Codes(codes, scale, None, row_sum), out_dtype=pixels.dtype)
        grid = (pixels.shape[2] // self.patch[0], pixels.shape[3] // self.patch[1])
        return tokens.view(pixels.shape[0], *grid, self.out_features).permute(0, 3, 1, 2)

    def float_weight(self) -> Tensor:
        """fp32 (N, K): what the codes stand for, for patches as they are."""
        return unfactorized(super().float_weight(), self.equalizer)


class HalfPatchEmbed(HalfLinear):
    """The patch embedding's convolution in half precision."""

    def __init__(self, plan: LayerPlan, weight: Tensor, bias: Tensor | None, half: torch.dtype):
        super().__init__(plan, weight.flatten(1), bias, half)
        self.kernel = tuple(weight.shape[1:])

    def forward(self, pixels: Tensor) -> Tensor:
        kernel = self.half_weight.view(-1, *self.kernel)
        y = F.conv2d(pixels.to(kernel.dtype), kernel, self.bias, stride=self.kernel[1:])
        return y.to(pixels.dtype)
