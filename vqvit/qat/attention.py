"""Attention that trains on the codes of `ops.int8_attention`: quantizers of q, k and v (numerics §7)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvit import numerics as nm
from vqvit.nn.linear import UncalibratedError
from vqvit.plan import BlockPlan
from vqvit.qat import straight_through as st


class FakeAttention(nn.Module):
    """softmax(s q̂ k̂ᵀ) v̂ of packed projections. Q_q, Q_k and Q_v are separate; Q_o is the input quantizer of attn_out.

    Parameters with static scales: log_q_alpha, log_k_alpha and log_v_alpha (H,), else None: then the scale of q and k
    is each token's, that of v each channel's, as the dynamic kernels compute them. The softmax stays float: its codes
    have 16 bits.
    """

    def __init__(self, plan: BlockPlan, num_heads: int, head_width: int, softmax_scale: float):
        super().__init__()
        self.plan, self.num_heads, self.head_width, self.softmax_scale = plan, num_heads, head_width, softmax_scale
        static = plan.attention == "int8" and plan.attention_scales == "static"
        for name in ("q", "k", "v"):
            parameter = nn.Parameter(torch.zeros(num_heads)) if static else None
            self.register_parameter(f"log_{name}_alpha", parameter)
        self.calibrated = not static
        self.observer = None  # while calibration runs

    @property
    def is_static(self) -> bool:
        return self.log_q_alpha is not None

    def scale_parameters(self) -> list[nn.Parameter]:
        return [p for p in (self.log_q_alpha, self.log_k_alpha, self.log_v_alpha) if p is not None]

    def calibrate_(self, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor) -> None:
        """Start the static scales (H,) from calibration."""
        with torch.no_grad():
            for parameter, scale in zip(self.scale_parameters(), (q_scale, k_scale, v_scale), strict=True):
                parameter.copy_(st.log_scale(scale))
        self.calibrated = True

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, H, S, D) of packed projections (B, S, 3 H D)."""
        return tuple(qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0))

    def quantize(self, qkv: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Values (B, H, S, D) that the codes of q, k and v stand for, and the codes int8."""
        parts = zip("qkv", self.split(qkv), strict=True)
        return [st.quantize(x, self.scale(name, x)) for name, x in parts]

    def scale(self, name: str, x: Tensor) -> Tensor:
        """The scale of `x` (B, H, S, D), one of q, k and v: broadcasts against it. Raises `UncalibratedError`."""
        if not self.is_static:
            x = x.detach()
            return nm.row_scale(x.transpose(-1, -2)).unsqueeze(-2) if name == "v" else nm.row_scale(x).unsqueeze(-1)
        return dict(zip("qkv", self.static_scales(), strict=True))[name][:, None, None]

    def static_scales(self) -> list[Tensor]:
        """fp32 (H,) of q, k and v, with gradients; each serves the D channels of every token of its head. Raises
        `UncalibratedError`.
        """
        if not self.calibrated:
            raise UncalibratedError(
                f"{self.plan.name}: expected calibrated static scales of q, k and v; got none. Pass calibration=... to "
                "prepare_, or load a state dict."
            )
        return [st.learned_scale(parameter, self.head_width) for parameter in self.scale_parameters()]

    def forward(self, qkv: Tensor, blend: float) -> Tensor:
        """fp32 (B, S, 3 H D) to (B, S, H D); `blend` is λ of numerics §10 for q, k and v."""
        operands = self.split(qkv)
        if self.observer is not None:
            self.observer.update(qkv)
        if self.plan.attention == "int8" and blend > 0.0:
            fakes = [values for values, _ in self.quantize(qkv)]
            pairs = zip(operands, fakes, strict=True)
            operands = fakes if blend == 1.0 else [torch.lerp(x, fake, blend) for x, fake in pairs]
        attended = F.scaled_dot_product_attention(*operands, scale=self.softmax_scale)
        return attended.transpose(1, 2).flatten(2)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.calibrated = self.calibrated or prefix + "log_q_alpha" in state_dict
