"""The nano backbones: one budget (3.1 to 3.3 M parameters outside the embeddings), one vocabulary, a different sequence mixer each.

Nothing else differs intentionally: no dropout (but before the reranker's head), the same width, 2048 positions where a family counts
them. The first weights are drawn as each family's own code does, those of the shared input layer, too: five times as large for a Mamba
as for BERT; drawn alike, pre-training ends where it did (LOG.md). The same functions make the tiny backbones of the tests.
"""

from collections.abc import Callable

from transformers import (
    BertConfig,
    GPTNeoXConfig,
    Mamba2Config,
    MambaConfig,
    NemotronHConfig,
    OPTConfig,
    PreTrainedConfig,
    T5Config,
)

VOCABULARY, POSITIONS = 30522, 2048  # MiniLM's WordPiece; [PAD] is 0, [CLS] 101, [SEP] 102
SPECIALS = {"pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102}


def nano_bert(width: int = 256, layers: int = 4) -> PreTrainedConfig:
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(intermediate_size=4 * width, **no_dropout, **_sizes(width, layers))


def nano_neox(width: int = 256, layers: int = 4) -> PreTrainedConfig:
    return GPTNeoXConfig(intermediate_size=4 * width, **_sizes(width, layers))


def nano_opt(width: int = 256, layers: int = 4) -> PreTrainedConfig:
    return OPTConfig(ffn_dim=4 * width, dropout=0.0, **SPECIALS, **_sizes(width, layers))


def nano_t5(width: int = 256, layers: int = 3) -> PreTrainedConfig:
    """T5 with one decoder layer: its decoder reads a single start token, so depth is worth more in the encoder."""
    return T5Config(
        vocab_size=VOCABULARY,
        d_model=width,
        num_layers=layers,
        num_decoder_layers=1,
        num_heads=_heads(width),
        d_kv=width // _heads(width),
        d_ff=7 * width // 2,  # 4 * width would exceed the common budget
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=102,
    )


def nano_mamba(width: int = 256, layers: int = 7) -> PreTrainedConfig:
    return MambaConfig(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, state_size=16, pad_token_id=0)


def nano_mamba2(width: int = 256, layers: int = 7) -> PreTrainedConfig:
    return Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        state_size=64,
        head_dim=min(64, width),
        num_heads=2 * width // min(64, width),
        n_groups=1,
        chunk_size=64,
        pad_token_id=0,
    )


def nano_hybrid(width: int = 256, layers: int = 7) -> PreTrainedConfig:
    """nano-mamba2 whose middle layer is attention without positions, as wide inside as the mixer that it replaces."""
    twin = nano_mamba2(width, layers)
    return NemotronHConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        layers_block_type=["full_attention" if layer == (layers - 1) // 2 else "linear_attention" for layer in range(layers)],
        mamba_num_heads=twin.num_heads,
        mamba_head_dim=twin.head_dim,
        ssm_state_size=twin.state_size,
        n_groups=twin.n_groups,
        chunk_size=twin.chunk_size,
        num_attention_heads=twin.num_heads,
        num_key_value_heads=twin.num_heads,
        head_dim=twin.head_dim,
        # where NemotronH's own values differ from Mamba-2's
        initializer_range=twin.initializer_range,
        rescale_prenorm_residual=twin.rescale_prenorm_residual,
        layer_norm_epsilon=twin.layer_norm_epsilon,
        max_position_embeddings=POSITIONS,
        **SPECIALS,
    )


def _sizes(width: int, layers: int) -> dict[str, int]:
    """The settings that BERT, GPT-NeoX and OPT call by the same names."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": _heads(width)}
    return sizes | {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}


def _heads(width: int) -> int:
    return max(1, width // 64)


# name: (family, configuration)
NANO: dict[str, tuple[str, Callable[..., PreTrainedConfig]]] = {
    "bert": ("bert", nano_bert),
    "neox": ("gpt_neox", nano_neox),
    "opt": ("opt", nano_opt),
    "t5": ("t5", nano_t5),
    "mamba": ("mamba", nano_mamba),
    "mamba2": ("mamba2", nano_mamba2),
    "hybrid": ("nemotron_h", nano_hybrid),
}
