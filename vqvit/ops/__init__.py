"""The ops: `torch.ops.vqvit.*` and the same functions with signatures and documentation.

Each op is a schema, an argument check, a fake (shapes and dtypes for torch.compile and torch.export) and whatever the
selected backend does. No autograd formula is registered: these ops are for inference.

Symbols: M tokens, N output channels, K input channels, α fp32 scales, int8 codes in [-127, 127]. "numerics §n" is a
section of docs/numerics.md.
All floats in may be float32, float16 or bfloat16 and are converted to fp32 exactly. Every function raises `TypeError`
for a wrong dtype and `ValueError` for a wrong shape, device or option, naming what was expected and what came.
"""

from vqvit.ops.attention import int8_attention, int8_attention_quantize, int8_linear_qkv, quantize_qkv
from vqvit.ops.block import int8_encoder_block
from vqvit.ops.linear import (
    int8_linear,
    int8_linear_compensated,
    int8_linear_quantize,
    int8_mm,
    pack_weight,
    unpack_weight,
)
from vqvit.ops.rows import (
    add_layernorm_quantize,
    layer_norm,
    layernorm_quantize,
    patchify_quantize,
    quantize_per_group,
    quantize_per_token,
    quantize_residual,
    quantize_static,
)
from vqvit.registry import registered

NAMES = registered()
"""Every op, by name."""

__all__ = [
    "NAMES",
    "add_layernorm_quantize",
    "int8_attention",
    "int8_attention_quantize",
    "int8_encoder_block",
    "int8_linear",
    "int8_linear_compensated",
    "int8_linear_qkv",
    "int8_linear_quantize",
    "int8_mm",
    "layer_norm",
    "layernorm_quantize",
    "pack_weight",
    "patchify_quantize",
    "quantize_per_group",
    "quantize_per_token",
    "quantize_qkv",
    "quantize_residual",
    "quantize_static",
    "unpack_weight",
]
