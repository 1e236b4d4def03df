"""What of a prepared model is learned."""

from dataclasses import dataclass

LEARNED = ("alpha", "beta")
"""The weight scale itself, each one by LSQ on its logarithm · the spread term β of the range, one for a layer."""


@dataclass(frozen=True)
class QatOptions:
    """Options of `prepare_`; a snapshot loads into a model that was prepared with the same ones.

    Attributes:
        learn: one of `LEARNED`, for symmetric int8 weights.
        delta_roles: roles whose per-token range has a learned δ, besides the layers whose plan has one. Not fc2 by
            default: with δ its input can no longer be quantized in fc1's epilogue. The patch embedding has none.
    """

    learn: str = "alpha"
    delta_roles: tuple[str, ...] = ("qkv", "attn_out", "fc1", "head", "linear")

    def __post_init__(self):
        if self.learn not in LEARNED:
            raise ValueError(f"learn: expected one of {', '.join(LEARNED)}; got {self.learn!r}")
