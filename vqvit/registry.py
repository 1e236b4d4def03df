"""How an op is registered: one schema, one description, and the selected backend's implementation on every device."""

import torch
from torch import Tensor

from vqvit import backends

_library = torch.library.Library("vqvit", "DEF")
_names: list[str] = []


def op(schema: str):
    """Register an op with the decorated function, which checks the arguments and returns a function of no arguments
    that makes empty outputs: all that torch.compile and torch.export need to know.
    """

    def register(describe):
        name = schema.split("(", 1)[0]
        _library.define(schema)
        _names.append(name)

        def implementation(*args, **kwargs):
            describe(*args, **kwargs)
            return backends.function(name, args[0].device)(*args, **kwargs)

        for key in ("CPU", "CUDA"):
            _library.impl(name, implementation, key)
        torch.library.register_fake(f"vqvit::{name}", lambda *a, **kw: describe(*a, **kw)(), lib=_library)
        return describe

    return register


def empty_int32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.int32)


def empty_int8(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.int8)


def empty_fp32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def empty_sums(like: Tensor, rows: tuple[int, ...], wanted: bool) -> Tensor:
    """An int32 output that is empty unless it was asked for."""
    return empty_int32(like, *rows) if wanted else empty_int32(like, 0)


def empty_qkv(like: Tensor, batch: int, heads: int, tokens: int, head_dim: int) -> tuple[Tensor, ...]:
    """q, k, v codes (B, H, S, D), scales of q and k (B, H, S) and of v (B, H, D)."""
    codes = (empty_int8(like, batch, heads, tokens, head_dim) for _ in range(3))
    token_scales = (empty_fp32(like, batch, heads, tokens) for _ in range(2))
    return *codes, *token_scales, empty_fp32(like, batch, heads, head_dim)


def registered() -> tuple[str, ...]:
    """Names of the ops, in order of registration."""
    return tuple(_names)
