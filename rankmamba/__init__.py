"""rankmamba: does Mamba rank documents as well as a Transformer, and what does it cost?

>>> import rankmamba
>>> reranker = rankmamba.Reranker.from_pretrained("minilm-l6")
"""

import os

# libgomp's spinning threads slow a shared machine up to 25-fold; it reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"

from .collection import load  # noqa: E402
from .reranker import Reranker  # noqa: E402  also lets transformers' Auto classes load what we save

__all__ = ["Reranker", "load"]
