"""Equality to the bit: the sign of a zero counts, and NaN equals NaN."""

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(got: Tensor, want: Tensor) -> Tensor:
    """Element by element, of two tensors of one shape and dtype."""
    if not want.is_floating_point():
        return got == want
    integers = _INTEGERS[want.element_size()]
    return (got.contiguous().view(integers) == want.contiguous().view(integers)) | (got.isnan() & want.isnan())


def assert_same_bits(received: Tensor | tuple, expected: Tensor | tuple, note: object = "") -> None:
    """Of tensors, or of tuples of them; `note` begins the message."""
    received, expected = (r if isinstance(r, tuple | list) else (r,) for r in (received, expected))
    assert len(received) == len(expected), note
    for index, (got, want) in enumerate(zip(received, expected, strict=True)):
        kinds = [(tuple(t.shape), t.dtype) for t in (got, want)]
        assert kinds[0] == kinds[1], f"{note} output {index}: {kinds[0]} for {kinds[1]}"
        differ = ~same_bits(got.cpu(), want.cpu())
        assert not differ.any(), f"{note} output {index}: {int(differ.sum())} of {differ.numel()} values differ"
