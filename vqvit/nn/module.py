"""What all modules of a quantized model share: buffers that keep their dtype, and the dtype they work in."""

import sys
import warnings

import torch
from torch import Tensor, nn


def without_gradient(x: Tensor, name: str) -> Tensor:
    """What a quantized module reads: x, cut off from the graph. Rounding has no derivative, and a result that claims
    one would give None or zeros to whoever trains with it.

    Warns where there was a graph to cut; Python shows that once.
    """
    if not x.requires_grad or not torch.is_grad_enabled():
        return x
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"{name}: a quantized module has no gradient, and its result requires none: what lies before it does not "
            "train. For inference use torch.no_grad() or torch.inference_mode(); to train, vqvit.qat before quantize_.",
            stacklevel=3,
        )
    return x.detach()


class TransformersSaveError(RuntimeError):
    """transformers was asked to save a quantized model."""


def refuse_transformers_save() -> None:
    """Raise `TransformersSaveError` where transformers' `save_pretrained` collects tensors: its `from_pretrained` would
    fill the model with random weights, and say so in a warning at most.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "save_pretrained" and "transformers" in frame.f_code.co_filename:
            raise TransformersSaveError(
                "save_pretrained: expected a float model; got one that vqvit has quantized, and from_pretrained would "
                "fill it with random weights. Use vqvit.save(model, folder) and vqvit.load(folder)."
            )
        frame = frame.f_back


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

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        refuse_transformers_save()
        super()._save_to_state_dict(destination, prefix, keep_vars)
