"""A pre-LayerNorm transformer block on integer kernels, with the call signature of the block it replaces."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vqvit import ops
from vqvit.families import BlockParts
from vqvit.nn.compensated import CompensatedLinear
from vqvit.nn.fused_block import ROLES, forget, run_in_one_call, runs_in_one_call
from vqvit.nn.leading import REQUEST
from vqvit.nn.linear import Codes, HalfLinear, QuantLinear
from vqvit.nn.module import QuantModule, without_gradient
from vqvit.nn.static_attention import quantize_heads
from vqvit.plan import BlockPlan, LayerPlan

NO_OPS = frozenset({"return_dict", "output_hidden_states", "use_cache", "interpolate_pos_encoding", REQUEST})
"""Arguments on their way through a model that change nothing about what a block computes, whatever their value."""


def unused_argument(args: tuple, kwargs: dict, before: int = 1) -> str | None:
    """The first argument of a block's call that asks for something `EncoderBlock` does not compute, or None.

    None and False ask for nothing, nor do `NO_OPS`. `args` are those that follow `before` others, such as the hidden
    states.
    """
    for position, value in enumerate(args, before + 1):
        if value is not None and value is not False:
            return f"argument {position} ({type(value).__name__})"
    for name, value in kwargs.items():
        if value is not None and value is not False and name not in NO_OPS:
            return f"{name}= ({type(value).__name__})"
    return None


class EncoderBlock(QuantModule):
    """h += ls1 ∘ Attention(LN1(h)) Wo; h += ls2 ∘ fc2(act(fc1(LN2(h)))).

    Between a LayerNorm and the residual stream an int8 layer sees only codes: LayerNorm quantizes, the epilogue of qkv
    for attention and that of fc1 for fc2, attention for attn_out if that takes group scales; residual and layer scale
    ride in the epilogues of attn_out and fc2.

    A block whose plan names `leading_tokens` computes everything after the keys and values for those tokens alone,
    where the caller asks for no more (`vqvit.nn.leading`); the rest of its output is NaN, so that whoever reads it by
    mistake sees it. A token's result never depends on which other tokens were computed, to the last bit.
    """

    def __init__(self, plan: BlockPlan, layers: dict[str, LayerPlan], parts: BlockParts, half: torch.dtype):
        """Quantize a probed block; `layers` maps each of `ROLES` to its plan."""
        super().__init__(parts.fc1.weight.dtype)
        self.plan = plan
        self.num_heads, self.softmax_scale, self.activation = parts.num_heads, parts.softmax_scale, parts.activation
        self.eps1, self.eps2 = parts.norm1.eps, parts.norm2.eps
        for role, (weight, bias) in float_linears(parts).items():
            norm = {"qkv": "norm1", "fc1": "norm2"}.get(role)
            if norm is not None:
                gamma, beta = getattr(parts, norm).weight.detach(), getattr(parts, norm).bias.detach()
                if layers[role].equalize and layers[role].tier != "fp16":
                    gamma, beta, weight = fold_equalizer(gamma, beta, weight)
                self.hold(**{f"{norm}_weight": gamma.clone(), f"{norm}_bias": beta.clone()})
            self.add_module(role, make_linear(layers[role], weight, bias, half))
        for role in ("layer_scale1", "layer_scale2"):
            parameter = getattr(parts, role)
            self.hold(**{role: None if parameter is None else parameter.detach().clone()})
        static = plan.attention_scales == "static" and parts.fc1.weight.is_meta
        scales = {f"{x}_scale": torch.empty(self.num_heads, device="meta") if static else None for x in "qkv"}
        self.hold(**scales)  # on the meta device a checkpoint will fill them
        self.head_observer = None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args, **kwargs):
        """(B, S, D) to (B, S, D), or a 1-tuple of it where the replaced block returned tuples.

        Further arguments are those of the replaced block, and `vqvit.nn.leading.REQUEST`. Raises `ValueError` for masks
        and for `output_attentions`, `TypeError` for any other argument that `unused_argument` names.
        """
        self._check_masks(attention_mask, kwargs.get("head_mask"))
        if kwargs.get("output_attentions"):
            raise ValueError(
                f"{self.plan.name}: expected output_attentions=False: int8 attention keeps no probabilities"
            )
        if (args or kwargs) and (name := unused_argument(args, kwargs, 2)) is not None:
            raise TypeError(
                f"{self.plan.name}: expected hidden states alone; got {name}, with which an int8 block does not compute"
            )
        hidden_states = without_gradient(hidden_states, self.plan.name)
        tokens = hidden_states.shape[1]
        queries = self._queries(tokens, kwargs.get(REQUEST, False))
        if runs_in_one_call(self):
            stream = run_in_one_call(self, hidden_states, queries if queries < tokens else None)
        else:
            stream = self._run_op_by_op(hidden_states, queries)
        if queries < tokens:
            stream = F.pad(stream, (0, 0, 0, tokens - queries), value=torch.nan)
        return (stream,) if self.plan.returns_tuple else stream

    def _run_op_by_op(self, hidden_states: Tensor, queries: int) -> Tensor:
        """The first `queries` tokens of the result, (B, queries, D)."""
        batch, tokens, width = hidden_states.shape
        stream = hidden_states.reshape(batch * tokens, width)
        dtype = stream.dtype
        normalized = self._normalize(stream, self.norm1_weight, self.norm1_bias, self.eps1, self.qkv)
        attended = self._attend(normalized, batch, tokens, queries, dtype)
        if queries < tokens:
            stream = hidden_states[:, :queries].reshape(batch * queries, width)
        stream = self.attn_out(attended, layer_scale=self.layer_scale1, residual=stream, out_dtype=dtype)
        normalized = self._normalize(stream, self.norm2_weight, self.norm2_bias, self.eps2, self.fc1)
        stream = self.fc2(
            self._expand(normalized, dtype), layer_scale=self.layer_scale2, residual=stream, out_dtype=dtype
        )
        return stream.view(batch, queries, width)

    def _queries(self, tokens: int, requested: bool) -> int:
        """Tokens whose result is computed; calibration observes all of them."""
        if self.plan.leading_tokens is None or not requested:
            return tokens
        observed = self.head_observer is not None or any(getattr(self, role).observer is not None for role in ROLES)
        return tokens if observed else min(self.plan.leading_tokens, tokens)

    def _check_masks(self, attention_mask: Tensor | None, head_mask: Tensor | None) -> None:
        """transformers makes a mask of ones when a model is exported: what it holds is checked at run time."""
        message = f"{self.plan.name}: expected no attention or head mask (not computed in int8); got one"
        if head_mask is None and attention_mask is not None and torch.compiler.is_exporting():
            boolean = attention_mask.dtype == torch.bool
            torch._assert_async((attention_mask if boolean else attention_mask == 0).all(), message)
        elif attention_mask is not None or head_mask is not None:
            raise ValueError(message)

    def _normalize(self, stream: Tensor, weight: Tensor, bias: Tensor, eps: float, consumer) -> Tensor | Codes:
        if isinstance(consumer, HalfLinear):
            return F.layer_norm(stream, stream.shape[-1:], weight.to(stream.dtype), bias.to(stream.dtype), eps)
        if not consumer.fuses_input or consumer.plan.activation in ("per_token_asym", "per_token_group"):
            return ops.layer_norm(stream, weight, bias, eps)
        row_sum = consumer.zero_point is not None
        codes, scale, sums = ops.layernorm_quantize(
            stream, weight, bias, eps, consumer.plan.delta, consumer.require_input_scale(), row_sum
        )
        return Codes(codes, scale, None, sums if row_sum else None)

    def _attend(
        self, normalized: Tensor | Codes, batch: int, tokens: int, queries: int, dtype: torch.dtype
    ) -> Tensor | Codes:
        """Attention of all heads for the first `queries` of S tokens, (B · queries, H · D) for attn_out: codes where it
        takes group scales. The projection is one GEMM for all of q, k and v.
        """
        if self.plan.attention == "float":
            return self._attend_float(self.qkv(normalized, out_dtype=dtype).view(batch, tokens, -1))
        q, k, v, q_scale, k_scale, v_scale = self._operands(normalized, batch, tokens, dtype)
        if queries < tokens:
            q, q_scale = q[:, :, :queries], q_scale[:, :, :queries]
        operands = (q, k, v, q_scale, k_scale, v_scale)
        if self.attn_out.fuses_input and self.attn_out.plan.activation == "per_token_group":
            return Codes(*ops.int8_attention_quantize(*operands, self.softmax_scale))
        return ops.int8_attention(*operands, self.softmax_scale, dtype).flatten(0, 1)

    def _operands(self, normalized: Tensor | Codes, batch: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Codes and scales of q, k and v: from the projection's epilogue where that can quantize them."""
        if self.plan.attention_scales == "static" or isinstance(self.qkv, HalfLinear | CompensatedLinear):
            precision = dtype if isinstance(self.qkv, HalfLinear) else torch.float32
            return quantize_heads(self, self.qkv(normalized, out_dtype=precision).view(batch, tokens, -1))
        codes = normalized if isinstance(normalized, Codes) else self.qkv.quantize_input(normalized)
        return self.qkv.forward_qkv(codes, tokens, self.num_heads)

    def _attend_float(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, scale=self.softmax_scale)
        return attended.transpose(1, 2).flatten(2).flatten(0, 1)

    def _expand(self, normalized: Tensor | Codes, dtype: torch.dtype) -> Tensor | Codes:
        """act(fc1(x)): codes where both fc1 and fc2 run on them."""
        if isinstance(normalized, Codes) and self.fc2.fuses_input and self.fc2.plan.delta == 0.0:
            return self.fc1.forward_codes(normalized, self.activation, self.fc2)
        return self.fc1(normalized, self.activation, out_dtype=dtype)

    def _apply(self, fn, recurse=True):
        forget(self)
        return super()._apply(fn, recurse)

    def float_state(self, names: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
        """The float parameters this block stands for, under the names of the block it replaced (`BlockParts.names`)."""
        state = {}
        for role in ("norm1", "norm2"):
            state[f"{names[role][0]}.weight"] = getattr(self, f"{role}_weight")
            state[f"{names[role][0]}.bias"] = getattr(self, f"{role}_bias")
        for role in ROLES:
            layer, paths = getattr(self, role), names[role]
            biases = [None] * len(paths) if layer.bias is None else layer.bias.float().chunk(len(paths))
            for path, weight, bias in zip(paths, layer.float_weight().chunk(len(paths)), biases, strict=True):
                state[f"{path}.weight"] = weight
                if bias is not None:
                    state[f"{path}.bias"] = bias
        for role in ("layer_scale1", "layer_scale2"):
            if role in names:
                state[names[role][0]] = getattr(self, role)
        return state


def make_linear(plan: LayerPlan, weight: Tensor, bias: Tensor | None, half: torch.dtype) -> QuantLinear | HalfLinear:
    """The module of `plan.tier` for a float weight (N, K)."""
    if plan.tier == "fp16":
        return HalfLinear(plan, weight, bias, half)
    kind = QuantLinear if plan.compensation == "none" else CompensatedLinear
    return kind(plan, weight, bias)


def equalizer(reach: Tensor, weight: Tensor, share: float = 0.5) -> Tensor:
    """c_k = reach_k^share / (max_n |W_nk|)^(1 - share), normalised to geometric mean 1; fp32 (K,).

    What is divided by c has its range `reach` evened out, and W · c (N, K) those of its columns: numerics §3.
    """
    reach, largest = reach.float().clamp(min=1e-5), weight.float().abs().amax(0).clamp(min=1e-5)
    c = reach**share / largest ** (1 - share)
    return c / c.log().mean().exp()


def norm_reach(gamma: Tensor, beta: Tensor) -> Tensor:
    """3 |γ_k| + |β_k|: three standard deviations of a LayerNorm's output channel, known without data."""
    return 3 * gamma.float().abs() + beta.float().abs()


def fold_equalizer(gamma: Tensor, beta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equalise the input channels of a Linear behind a LayerNorm without data (numerics §3): γ/c, β/c, W·c.

    c is `equalizer` of `norm_reach`. The float function does not change.
    """
    c = equalizer(norm_reach(gamma, beta), weight)
    return gamma.float() / c, beta.float() / c, weight.float() * c


def float_linears(parts: BlockParts) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Float weight (N, K) and bias (N,) or None of each of `ROLES`, detached; q, k and v as one projection."""
    linears = {role: getattr(parts, role) for role in ("attn_out", "fc1", "fc2")}
    weights = {
        role: (linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
        for role, linear in linears.items()
    }
    return {"qkv": _fused_projection(parts), **weights}


def _fused_projection(parts: BlockParts) -> tuple[Tensor, Tensor | None]:
    """Weight (3 H D, K) and bias of the q, k and v projections; a projection without bias counts as zero bias."""
    weight = torch.cat([p.weight.detach() for p in parts.qkv])
    if all(p.bias is None for p in parts.qkv):
        return weight, None
    biases = [p.weight.new_zeros(p.out_features) if p.bias is None else p.bias.detach() for p in parts.qkv]
    return weight, torch.cat(biases)
