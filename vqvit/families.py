"""Where a transformer block keeps its parts: role -> candidate names, probed per block.

Nothing here knows a model's name. A block is recognised by having a candidate for every role, and `vqvit.rewriter` then
checks numerically that the parts, composed as a pre-LayerNorm block, compute what the block computes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

ATTENTION_PATHS = ("attention", "attn", "self_attn", "attention.attention", "self_attention")

ALIASES: dict[str, tuple[str, ...]] = {
    "norm1": ("layernorm_before", "norm1", "layer_norm1", "input_layernorm", "ln_1"),
    "norm2": ("layernorm_after", "norm2", "layer_norm2", "post_attention_layernorm", "ln_2"),
    "q": tuple(f"{a}.{n}" for a in ATTENTION_PATHS for n in ("q_proj", "query", "q")),
    "k": tuple(f"{a}.{n}" for a in ATTENTION_PATHS for n in ("k_proj", "key", "k")),
    "v": tuple(f"{a}.{n}" for a in ATTENTION_PATHS for n in ("v_proj", "value", "v")),
    "qkv": tuple(f"{a}.{n}" for a in ATTENTION_PATHS for n in ("qkv", "qkv_proj")),
    "attn_out": (
        *(f"{a}.{n}" for a in ATTENTION_PATHS for n in ("o_proj", "out_proj", "proj", "projection_layer")),
        "attention.output.dense",
    ),
    "fc1": ("mlp.fc1", "intermediate.dense", "fc1", "mlp.lin1"),
    "fc2": ("mlp.fc2", "output.dense", "fc2", "mlp.lin2"),
    "activation": (
        "mlp.activation_fn", "mlp.activation", "mlp.act", "intermediate.intermediate_act_fn", "activation_fn", "act",
    ),
    "layer_scale1": ("layer_scale1", "ls1", "lambda_1", "gamma_1"),
    "layer_scale2": ("layer_scale2", "ls2", "lambda_2", "gamma_2"),
}  # fmt: skip

UNSUPPORTED: dict[str, tuple[str, ...]] = {
    "query-key normalisation": tuple(f"{a}.{n}" for a in ATTENTION_PATHS for n in ("q_norm", "k_norm")),
    "rotary position embedding": tuple(f"{a}.{n}" for a in ATTENTION_PATHS for n in ("rope", "rotary_emb")),
    "relative position bias": tuple(f"{a}.relative_position_bias" for a in ATTENTION_PATHS),
    "normalisation inside attention or MLP": (*(f"{a}.norm" for a in ATTENTION_PATHS), "mlp.norm"),
}
"""Parts that a whole-block replacement does not compute; a block that has one keeps its structure."""

HEAD_NAMES = ("classifier", "head", "lm_head", "cls_classifier", "distillation_classifier", "head_dist")

ACTIVATION_FUNCTIONS = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": torch.nn.functional.silu,
    "relu": torch.nn.functional.relu,
}


@dataclass(frozen=True)
class BlockParts:
    """The parts of one pre-LayerNorm transformer block."""

    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    qkv: tuple[nn.Linear, ...]  # one fused projection, or q, k, v
    attn_out: nn.Linear
    fc1: nn.Linear
    fc2: nn.Linear
    activation: str
    num_heads: int
    softmax_scale: float
    layer_scale1: nn.Parameter | None
    layer_scale2: nn.Parameter | None
    names: dict[str, tuple[str, ...]]
    """Role -> paths of the parameters' owners inside the block, to write weights back."""


class NotABlock(ValueError):  # noqa: N818  (an answer, not an error: the message says what is missing)
    """The module lacks a part of a transformer block, or has one that is not supported."""


def probe(block: nn.Module) -> BlockParts:
    """Find the parts of `block`. Raises `NotABlock`, saying what is missing or not supported."""
    for feature, paths in UNSUPPORTED.items():
        if found := find(block, paths, ignore=nn.Identity):
            raise NotABlock(f"{feature} ({found[0]})")
    norm1, norm2 = (_require(block, role, nn.LayerNorm) for role in ("norm1", "norm2"))
    fused = find(block, ALIASES["qkv"])
    qkv = [_require(block, "qkv", nn.Linear)] if fused else [_require(block, r, nn.Linear) for r in "qkv"]
    attn_out, fc1, fc2 = (_require(block, role, nn.Linear) for role in ("attn_out", "fc1", "fc2"))
    if fc1[1].out_features != fc2[1].in_features:
        raise NotABlock(f"gated MLP: fc1 has {fc1[1].out_features} outputs, fc2 {fc2[1].in_features} inputs")
    for role, norm in (("norm1", norm1[1]), ("norm2", norm2[1])):
        if norm.weight is None or norm.bias is None or len(norm.normalized_shape) != 1:
            raise NotABlock(f"{role} without weight and bias over the last dimension")
    scales = {role: _layer_scale(block, role) for role in ("layer_scale1", "layer_scale2")}
    heads, softmax_scale = _attention_shape(block, qkv[0][0], attn_out[1].in_features)
    parts = {
        "norm1": (norm1,),
        "norm2": (norm2,),
        "qkv": tuple(qkv),
        "attn_out": (attn_out,),
        "fc1": (fc1,),
        "fc2": (fc2,),
    }
    return BlockParts(
        norm1=norm1[1],
        norm2=norm2[1],
        qkv=tuple(module for _, module in qkv),
        attn_out=attn_out[1],
        fc1=fc1[1],
        fc2=fc2[1],
        activation=_activation(block),
        num_heads=heads,
        softmax_scale=softmax_scale,
        layer_scale1=scales["layer_scale1"][1],
        layer_scale2=scales["layer_scale2"][1],
        names={
            **{role: tuple(path for path, _ in found) for role, found in parts.items()},
            **{role: (path,) for role, (path, parameter) in scales.items() if parameter is not None},
        },
    )


def identify_activation(function) -> str:
    """Name of the activation that `function` computes, found by its values on [-8, 8]. Raises `NotABlock`."""
    x = torch.linspace(-8, 8, 257)
    y = (function.forward if isinstance(function, nn.Module) else function)(x)  # past hooks on every module
    for name, candidate in ACTIVATION_FUNCTIONS.items():
        if torch.allclose(y, candidate(x), rtol=0, atol=2e-6):
            return name
    raise NotABlock(f"activation {type(function).__name__} (known: {', '.join(ACTIVATION_FUNCTIONS)})")


def _get(module: nn.Module, path: str):
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


def find(block: nn.Module, paths: tuple[str, ...], ignore: type | tuple = ()) -> tuple[str, object] | None:
    """The first of `paths` that `block` has, with what is there; parts of a type to `ignore` count as absent."""
    for path in paths:
        found = _get(block, path)
        if found is not None and not (ignore and isinstance(found, ignore)):
            return path, found
    return None


def _require(block: nn.Module, role: str, kind: type) -> tuple[str, nn.Module]:
    for path in ALIASES[role]:
        found = _get(block, path)
        if type(found) is kind:
            return path, found
    raise NotABlock(f"no {kind.__name__} for role {role}")


def _layer_scale(block: nn.Module, role: str) -> tuple[str, nn.Parameter | None]:
    """A per-channel factor: a parameter, or a module with exactly one; absent and Identity mean none."""
    found = find(block, ALIASES[role], ignore=nn.Identity)
    if found is None:
        return "", None
    path, part = found
    if isinstance(part, nn.Parameter):
        return path, part
    parameters = list(part.named_parameters()) if isinstance(part, nn.Module) else []
    if len(parameters) != 1 or parameters[0][1].dim() != 1:
        raise NotABlock(f"{role} at {path} is not one vector")
    return f"{path}.{parameters[0][0]}", parameters[0][1]


def _attention_shape(block: nn.Module, projection_path: str, width: int) -> tuple[int, float]:
    attention: nn.Module | Tensor = _get(block, projection_path.rsplit(".", 1)[0])
    for name in ("num_attention_heads", "num_heads"):
        heads = getattr(attention, name, None)
        if isinstance(heads, int) and heads > 0 and width % heads == 0:
            scale = getattr(attention, "scaling", None) or getattr(attention, "scale", None)
            return heads, float(scale) if isinstance(scale, float) else (width // heads) ** -0.5
    raise NotABlock("no number of attention heads")


def _activation(block: nn.Module) -> str:
    found = find(block, ALIASES["activation"])
    if found is None:
        raise NotABlock("no activation function")
    return identify_activation(found[1])
