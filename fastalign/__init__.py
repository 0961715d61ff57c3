"""fastalign: fused losses for every stage of language-model training. The functions are fastalign_kernels', handed on unchanged.

Importing this does not import transformers; `fastalign.causal_lm`, `fastalign.data` and `fastalign.stages` do.
"""

from fastalign_kernels import *  # noqa: F403
from fastalign_kernels import __all__ as _kernels

from ._version import __version__

__all__ = [*_kernels, "__version__"]
