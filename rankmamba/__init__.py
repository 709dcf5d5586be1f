"""rankmamba: does Mamba rank documents as well as a Transformer, and what does it cost?

>>> import rankmamba
>>> reranker = rankmamba.Reranker.from_pretrained("nano-mamba")

The main path: `study` runs the notebooks, whose steps are in `experiment` (what they have made is in a `study_folder`). `collection`
loads documents, queries and judgements (`data`), `candidates` ranks them with BM25, `systems` lists what is compared and `backbones`
loads it (`network`, `scan`), `train` trains it (`training`), `reranker` scores with it (`inputs`, `model`, `reranking`, `states`),
`evaluate` and `pairwise` measure and test, `profiling` says what it costs. Each step leaves a record (`results`), from which tables,
sentences and figures come (`reporting`, `plots`).
"""

import gc
import importlib
import os

# libgomp's spinning threads slow a shared machine up to 25-fold; it reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
__all__ = ["Reranker", "load"]
_HOMES = {"Reranker": "reranker", "load": "collection"}


def __getattr__(name: str):
    """Import what the package offers when it is asked for: torch takes seconds, and a command line should answer at once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    collects = gc.isenabled()
    gc.disable()  # a seventh of the time that torch and transformers take to import is the collector's, which finds nothing
    try:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    finally:
        if collects:
            gc.enable()
