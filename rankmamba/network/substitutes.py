"""Which of Hugging Face's modules get a forward pass of ours.

`use_kernels` swaps it in, module by module: parameters and their names stay the same, so weights load and save as before, and
transformers itself is not patched.
"""

from __future__ import annotations

import functools
import importlib

from torch import nn
from transformers.integrations.accelerate import force_accelerate_hooks

from .fused import FusedIntermediate, FusedMLP, FusedOutput
from .mixers import ScanFalconMamba, ScanMamba, ScanMamba2, ScanMixer, ScanRMSNorm
from .native_attention import RotaryAttention


def use_kernels(backbone: nn.Module) -> nn.Module:
    """Let our kernels compute the mixers and norms of Mamba, FalconMamba and Mamba-2 (also NemotronH's) in `backbone`, and what BERT
    (RoBERTa, ELECTRA) and GPT-NeoX compute between their products; return it.

    Other models come back unchanged. A Mamba's `attention_mask`, (B, L), or longer, of which the last L columns count, becomes exact:
    a token where it is 0 affects no other token and no state. Its `cache` may be a `MambaState`: any number of tokens then
    continue what the state has read.
    """
    for name, module in backbone.named_modules():
        ours = _OURS.get((type(module).__module__, type(module).__name__))
        if ours is not None:
            module.__class__ = _class(ours)  # the same object: hooks, sharing and the optimizer's parameters survive
            if isinstance(module, ScanRMSNorm):
                module.before_products = name.endswith(".norm")  # a block's norm, not the one after all blocks
            if isinstance(module, ScanMixer):  # its block may read a `MambaState` a second time: a pass never changes it
                backbone.get_submodule(name.rpartition(".")[0])._can_checkpoint_with_cache = True
    # what FSDP keeps together is looked up by the names of classes: Mamba's blocks, no longer their mixers
    names = {type(module).__name__ for module in backbone.modules()}
    backbone._no_split_modules = [name for name in getattr(backbone, "_no_split_modules", None) or () if name in names]
    return backbone


# transformers' folder: its class, our forward pass, the modules whose weights it reads directly
_BERT = {"Intermediate": (FusedIntermediate, ["dense"]), "SelfOutput": (FusedOutput, ["dense", "LayerNorm"])}
_BERT["Output"] = _BERT["SelfOutput"]
_FAMILIES = {
    "mamba": {"MambaMixer": (ScanMamba, ["in_proj", "conv1d", "dt_proj"]), "MambaRMSNorm": (ScanRMSNorm, [])},
    "falcon_mamba": {
        "FalconMambaMixer": (ScanFalconMamba, ["in_proj", "conv1d", "dt_proj"]),
        "FalconMambaRMSNorm": (ScanRMSNorm, []),
    },
    "mamba2": {"Mamba2Mixer": (ScanMamba2, ["in_proj", "conv1d"]), "Mamba2RMSNorm": (ScanRMSNorm, [])},
    "nemotron_h": {"NemotronHMamba2Mixer": (ScanMamba2, ["in_proj", "conv1d"]), "NemotronHRMSNorm": (ScanRMSNorm, [])},
    "gpt_neox": {"GPTNeoXMLP": (FusedMLP, ["dense_h_to_4h"]), "GPTNeoXAttention": (RotaryAttention, [])},
} | {name.lower(): {name + part: ours for part, ours in _BERT.items()} for name in ("Bert", "Roberta", "Electra")}
_SUBSTITUTES = {
    f"Our{name}": (f"transformers.models.{folder}.modeling_{folder}", name, mixin, read_directly)
    for folder, classes in _FAMILIES.items()
    for name, (mixin, read_directly) in classes.items()
}
_OURS = {(module, name): ours for ours, (module, name, *_) in _SUBSTITUTES.items()}


@functools.cache
def _class(ours: str) -> type:
    """A subclass of transformers' class: its modules and initialisation, our forward pass; offloaded weights are fetched first.

    Made only when a model needs it: importing transformers' file imports the CUDA packages wherever they are installed.
    """
    module, name, mixin, read_directly = _SUBSTITUTES[ours]
    theirs = getattr(importlib.import_module(module), name)
    forward = force_accelerate_hooks(read_directly)(mixin.forward)
    return type(ours, (mixin, theirs), {"forward": forward, "__module__": __name__, "__doc__": mixin.__doc__})


def __getattr__(name: str) -> type:
    """Let pickle and copy find the classes that `use_kernels` makes."""
    if name in _SUBSTITUTES:
        return _class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
