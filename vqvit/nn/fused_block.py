"""A block of the common configuration as one call: the same bits as its ops one by one, without what lies between.

Buffers and layers are read from `nn.Module`'s dictionaries, which names them by attribute only after a lookup that
fails: 40 of those cost a block more than its way through PyTorch's dispatcher.
"""

import operator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vqvit import backends, native, ops
from vqvit.backends import cpu
from vqvit.nn.linear import QuantLinear
from vqvit.numerics import MAX_KEYS
from vqvit.validation import FLOATS

ACTIVATIONS = {
    "qkv": ("per_token",),
    "attn_out": ("per_token", "per_token_group"),
    "fc1": ("per_token",),
    "fc2": ("per_token", "per_token_group"),
}
"""Of each layer: those that the one call knows. Behind a LayerNorm there is no store by group."""

ROLES = tuple(ACTIVATIONS)


def runs_in_one_call(block) -> bool:
    """Whether all linears of an `EncoderBlock` are int8, symmetric, per token (attn_out and fc2: or per group), without
    compensation and packed (for the CPU kernels) with no hook that watches them, and attention is int8 with dynamic
    scales.
    """
    plan, layers = block.plan, block._modules
    if plan.attention != "int8" or plan.attention_scales != "dynamic" or layers["fc2"].plan.delta != 0.0:
        return False
    for role, activations in ACTIVATIONS.items():
        if not _is_common(layers[role], activations):
            return False
    return True


def _is_common(layer, activations: tuple[str, ...]) -> bool:
    if not isinstance(layer, QuantLinear) or layer.observer is not None:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    plan = layer.plan
    plain = plan.activation in activations and plan.tier == "int8" and plan.compensation == "none"
    return plain and layer._buffers["codes"].dim() > 2  # packed


def run_in_one_call(block, x: Tensor, leading_tokens: int | None = None) -> Tensor:
    """The block's result (B, S, D) for x (B, S, D), if `runs_in_one_call`; (B, L, D) of the first L tokens alone.

    The first call goes through `ops.int8_encoder_block`, which checks the arguments. Later ones go to the kernel at
    once, as long as the block holds the same tensors and nobody watches what PyTorch does.
    """
    arguments = _arguments(block)
    if not _is_watched(x):
        known = _prepared.get(block)
        if known is None or not known.is_of(arguments):
            result = ops.int8_encoder_block(x, *arguments, leading_tokens)
            _prepared[block] = _prepare(arguments)
            return result
        if known.struct is not None and _fits(x, leading_tokens, known.struct):
            return cpu.run_encoder_block(known.struct, x, leading_tokens)
    return ops.int8_encoder_block(x, *arguments, leading_tokens)


def forget(block) -> None:
    """Let go of the tensors that the block's last call read."""
    _prepared.pop(block, None)


@dataclass(frozen=True)
class _Prepared:
    """Arguments of a call, and what the kernel reads for them: None if a tensor has to be converted at every call."""

    arguments: tuple
    tensors: tuple[Tensor, ...]
    addresses: list[int]
    struct: native.EncoderBlock | None

    def is_of(self, arguments: tuple) -> bool:
        """Whether these are the same objects, their memory where it was."""
        same = all(map(operator.is_, self.arguments, arguments))
        return same and [tensor.data_ptr() for tensor in self.tensors] == self.addresses


_prepared: WeakKeyDictionary = WeakKeyDictionary()
"""By block. Not in the block: a copy of it must not carry addresses."""


def _prepare(arguments: tuple) -> _Prepared:
    tensors = tuple(a for a in arguments if isinstance(a, Tensor))
    struct, operands = cpu.encoder_block(*arguments)
    in_place = {id(tensor) for tensor in tensors} == {id(operand) for operand in operands if operand is not None}
    return _Prepared(arguments, tensors, [t.data_ptr() for t in tensors], struct if in_place else None)


def _arguments(block) -> tuple:
    """Those of `ops.int8_encoder_block` between x and leading_tokens."""
    qkv, attn_out, fc1, fc2 = layers = [block._modules[role] for role in ROLES]
    own = block._buffers
    return (
        block.num_heads, block.softmax_scale, own["norm1_weight"], own["norm1_bias"], block.eps1,
        own["norm2_weight"], own["norm2_bias"], block.eps2,
        *[layer._buffers[part] for layer in layers for part in ("codes", "scale", "bias")],
        own["layer_scale1"], own["layer_scale2"], block.activation,
        qkv.plan.delta, attn_out.plan.delta, fc1.plan.delta,
        attn_out.plan.activation == "per_token_group", fc2.plan.activation == "per_token_group",
    )  # fmt: skip


def _is_watched(x: Tensor) -> bool:
    """Whether somebody would miss the op: a compiler, an exporter, a tracer, a mode, a transform, a profiler, autograd,
    or another backend than the CPU kernels.
    """
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or (x.requires_grad and torch.is_grad_enabled())
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
        or torch.jit.is_tracing()
        or backends.selected(x.device) != "cpu"
    )


def _fits(x: Tensor, leading_tokens: int | None, struct: native.EncoderBlock) -> bool:
    """What the op checks of x and of the leading tokens."""
    if x.dim() != 3 or x.dtype not in FLOATS:
        return False
    _, tokens, width = x.shape
    leading = tokens if leading_tokens is None else leading_tokens
    return width == struct.width and 1 <= leading <= tokens <= MAX_KEYS
