"""What all modules of a quantized model share: buffers that keep their dtype, and the dtype they work in."""

import torch
from torch import Tensor, nn


class QuantModule(nn.Module):
    """A module of buffers only. `.to(dtype)` and `.half()` change the dtype it computes in, never what it stores.

    Scales, norms and biases would lose the bits that make codes reproducible; they are a fraction of a percent of the
    memory.
    """

    def __init__(self, dtype: torch.dtype = torch.float32):
        nn.Module.__init__(self)  # not super(): a replaced class may follow in the MRO, and must not build its layers
        self.dtype = dtype

    @property
    def weight(self) -> Tensor:
        """An empty tensor with the dtype and device of the activations: model code reads `.weight.dtype` to cast
        inputs.
        """
        return torch.empty(0, dtype=self.dtype, device=next(self.buffers()).device)

    def hold(self, **tensors: Tensor | None) -> None:
        """Register each tensor (or None) as a persistent buffer."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype

        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)
