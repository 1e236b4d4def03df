"""Serving on a CPU without PyTorch: what `vqvit.export` wrote, run by NumPy and the native kernels.

    VQVIT_TORCH=0 python -c "from vqvit.serving import Session; print(Session('exported')(pixels)['logits'])"

Nothing in this package imports torch. `import vqvit` does, unless torch is not installed or VQVIT_TORCH=0 is set: the
package then holds `vqvit.serving` alone.
"""

from vqvit.serving.program import ProgramError
from vqvit.serving.session import Session

__all__ = ["ProgramError", "Session"]
