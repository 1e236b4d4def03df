"""A transformer block that trains on the codes of `vqvit.nn.EncoderBlock`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvit import families
from vqvit.families import BlockParts
from vqvit.nn.block import float_linears, fold_equalizer
from vqvit.plan import BlockPlan, LayerPlan
from vqvit.qat.attention import FakeAttention
from vqvit.qat.linear import FakeQuantLinear
from vqvit.qat.options import QatOptions


class FakeEncoderBlock(nn.Module):
    """h += ls1 ∘ Attention(LN1(h)) Wo; h += ls2 ∘ fc2(act(fc1(LN2(h)))), with float LayerNorm, softmax and activation.

    Children qkv, attn_out, fc1 and fc2 are `FakeQuantLinear`, attention holds the quantizers of q, k and v. Norms and
    layer scales are parameters, equalised as `EncoderBlock` does it.
    """

    def __init__(
        self, plan: BlockPlan, layers: dict[str, LayerPlan], parts: BlockParts, half: torch.dtype, options: QatOptions
    ):
        nn.Module.__init__(self)  # not super(): a replaced class may follow in the MRO, and must not build its layers
        self.plan = plan
        self.activation, self.eps1, self.eps2 = parts.activation, parts.norm1.eps, parts.norm2.eps
        for role, (weight, bias) in float_linears(parts).items():
            norm = {"qkv": "norm1", "fc1": "norm2"}.get(role)
            if norm is not None:
                gamma, beta = getattr(parts, norm).weight.detach(), getattr(parts, norm).bias.detach()
                if layers[role].equalize and layers[role].tier != "fp16":
                    gamma, beta, weight = fold_equalizer(gamma, beta, weight)
                self.register_parameter(f"{norm}_weight", nn.Parameter(gamma.clone()))
                self.register_parameter(f"{norm}_bias", nn.Parameter(beta.clone()))
            self.add_module(role, FakeQuantLinear(layers[role], weight, bias, half, options))
        for role in ("layer_scale1", "layer_scale2"):
            scale = getattr(parts, role)
            self.register_parameter(role, None if scale is None else nn.Parameter(scale.detach().clone()))
        head_width = parts.attn_out.in_features // parts.num_heads
        attention = FakeAttention(plan, parts.num_heads, head_width, parts.softmax_scale)
        self.attention = attention.to(parts.fc1.weight.device)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        """(B, S, D) to (B, S, D), or a 1-tuple of it where the replaced block returned tuples."""
        if attention_mask is not None or kwargs.get("head_mask") is not None:
            raise ValueError(f"{self.plan.name}: expected no attention or head mask (not computed in int8); got one")
        if kwargs.get("output_attentions"):
            raise ValueError(f"{self.plan.name}: expected output_attentions=False: no probabilities are kept")
        h, width = hidden_states, hidden_states.shape[-1:]
        normalized = F.layer_norm(h, width, self.norm1_weight, self.norm1_bias, self.eps1)
        attended = self.attention(self.qkv(normalized), self.qkv.blend)
        h = h + _scaled(self.attn_out(attended), self.layer_scale1)
        normalized = F.layer_norm(h, width, self.norm2_weight, self.norm2_bias, self.eps2)
        hidden = families.ACTIVATION_FUNCTIONS[self.activation](self.fc1(normalized))
        h = h + _scaled(self.fc2(hidden), self.layer_scale2)
        return (h,) if self.plan.returns_tuple else h


def _scaled(y: Tensor, layer_scale: Tensor | None) -> Tensor:
    return y if layer_scale is None else y * layer_scale
