"""Published backbones as configurations, run with random weights: what they cost does not depend on the weights.

The sizes are those of the checkpoints' own configurations. None has dropout.
"""

from collections.abc import Callable

from transformers import BertConfig, GPTNeoXConfig, Mamba2Config, MambaConfig, OPTConfig, PreTrainedConfig


def _bert(width: int, layers: int) -> PreTrainedConfig:
    return BertConfig(
        vocab_size=30522,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _opt(width: int, layers: int) -> PreTrainedConfig:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64, "ffn_dim": 4 * width}
    return OPTConfig(vocab_size=50272, word_embed_proj_dim=width, dropout=0.0, attention_dropout=0.0, **sizes)


def _pythia(width: int, layers: int) -> PreTrainedConfig:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    return GPTNeoXConfig(vocab_size=50304, intermediate_size=4 * width, rotary_pct=0.25, **sizes)


def _mamba(width: int, layers: int) -> PreTrainedConfig:
    return MambaConfig(vocab_size=50280, hidden_size=width, num_hidden_layers=layers, state_size=16)


def _mamba2(width: int, layers: int) -> PreTrainedConfig:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_heads": width // 32, "head_dim": 64}
    return Mamba2Config(vocab_size=50288, state_size=128, n_groups=1, **sizes)


# name in the table of systems: (configuration, D, layers), grouped by size: systems of one group are compared
SHAPES: dict[str, dict[str, tuple[Callable[[int, int], PreTrainedConfig], int, int]]] = {
    "130m": {
        "bert-base": (_bert, 768, 12),
        "opt-125m": (_opt, 768, 12),
        "pythia-160m": (_pythia, 768, 12),
        "mamba-130m": (_mamba, 768, 24),
        "mamba2-130m": (_mamba2, 768, 24),
    },
    "370m": {
        "bert-large": (_bert, 1024, 24),
        "pythia-410m": (_pythia, 1024, 24),
        "mamba-370m": (_mamba, 1024, 48),
        "mamba2-370m": (_mamba2, 1024, 48),
    },
}


def size_of(system: str) -> str:
    """Return the size class that a system is compared within: a key of `SHAPES`, else the first part of its name (nano, tiny), of a
    folder's last."""
    name = system.split(" ")[0].rpartition("/")[2]
    return next((size for size, names in SHAPES.items() if name in names), name.split("-")[0])


def depth_of(system: str) -> int | None:
    """The layers that a published backbone has; None for any other system."""
    shape = SHAPES.get(size_of(system), {}).get(system.split(" ")[0])
    return None if shape is None else shape[2]


def configuration(system: str, layers: int) -> PreTrainedConfig:
    """A published backbone's configuration with this many layers."""
    make, width, _ = SHAPES[size_of(system)][system.split(" ")[0]]
    return make(width, layers)
