"""Attention's operands with scales that were learned or calibrated, one for each head of q, k and v (numerics §7)."""

import torch
from torch import Tensor

from vqvit import ops
from vqvit.nn.linear import UncalibratedError


def quantize_heads(block, qkv: Tensor) -> tuple[Tensor, ...]:
    """Operands of `ops.int8_attention` for an `EncoderBlock` and its packed projections (B, S, 3 H D), with the block's
    static scales if its plan has them.

    While an observer watches, it sees q, k and v, and the scales are dynamic. Raises `UncalibratedError`.
    """
    if block.plan.attention_scales == "dynamic":
        return ops.quantize_qkv(qkv, block.num_heads)
    if block.head_observer is not None:
        block.head_observer.update(qkv)
        return ops.quantize_qkv(qkv, block.num_heads)
    if block.q_scale is None:
        raise UncalibratedError(
            f"{block.plan.name}: expected calibrated static scales of q, k and v; got none. "
            "Pass calibration=... to vqvit.quantize_, or choose attention_scales='dynamic'."
        )
    return quantize_qkv_static(qkv, block.q_scale, block.k_scale, block.v_scale)


def quantize_qkv_static(qkv: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor) -> tuple[Tensor, ...]:
    """`ops.quantize_qkv` with given scales, fp32 (H,) each: the same shapes, and NaN for what holds NaN or Inf.

    x / α is rounded once, so that quantizing it with scale 1 gives the codes clamp(rne(x / α)).
    """
    batch, tokens, width = qkv.shape
    heads = len(q_scale)
    q, k, v = qkv.float().view(batch, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    one = torch.ones((), device=qkv.device)

    def quantize(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        codes, poison, _ = ops.quantize_static((x / scale[:, None, None]).contiguous(), one)
        return codes, scale[:, None] * poison

    (q, q_rows), (k, k_rows) = quantize(q, q_scale), quantize(k, k_scale)
    v, v_channels = quantize(v.transpose(-1, -2), v_scale)
    return q, k, v.transpose(-1, -2).contiguous(), q_rows, k_rows, v_channels
