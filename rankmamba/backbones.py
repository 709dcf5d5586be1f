"""From a system's name to its network and tokenizer: a row of the table, or what a checkpoint's own configuration says."""

import difflib
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from .data.packages import package_folder, unpacked
from .data.sources import say
from .errors import InputError
from .inputs import KINDS
from .model import RerankerConfig, RerankerModel
from .reranking.saved import check_vocabulary, is_saved, load_saved
from .systems import FAMILIES, SCRATCH, SYSTEMS, Family, ModelSpec, Packed

# Their first position comes after the padding token's id, so they have fewer than their configuration says.
_SHIFTED_POSITIONS = (
    "roberta xlm-roberta xlm-roberta-xl camembert mpnet longformer data2vec-text xmod roberta-prelayernorm esm luke mluke ibert".split()
)
# Backbones whose scores would be wrong here, and why.
_READS_PADDING = "it reads padding, so the score of a pair would depend on its batch"
_REFUSED = dict.fromkeys(
    "fnet bert-generation mobilebert convbert xlnet yoso nystromformer funnel".split(), _READS_PADDING
) | {
    "rwkv": "it rescales its weights while it scores",
    "recurrent_gemma": "it keeps the state of a batch, and batches are scored side by side",
    "falcon_h1": "it does not load as it was saved",
    "squeezebert": "it has no hidden states without its pooler",
}
# What transformers' own classifiers call their head.
_HEADS = ("classifier", "classification_head", "score")


def find(name: str) -> ModelSpec:
    """Return the system called `name` or made from it, or one inferred from `name`: a checkpoint (a Hub id or a folder), or a saved
    reranker, which is trained further.

    Raises:
        InputError: there is no such system or checkpoint, or it is not a language model.
    """
    for spec in SYSTEMS.values():
        # state-spaces publishes its own layout, which is a pickle; the table has the same weights in transformers' format
        if name in (spec.name, spec.source, f"state-spaces/{spec.name}"):
            return spec
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        like = difflib.get_close_matches(name, SYSTEMS)
        no_id = Path(name).is_absolute() or len(Path(name).parts) > 2
        reason = "there is no such folder" if no_id else str(error).splitlines()[0]
        raise InputError(
            f"expected a system, a saved folder or a Hub id, got {name!r}: {reason}"
            f"{'; did you mean ' + ' or '.join(like) + '?' if like else ''}; the systems are {', '.join(SYSTEMS)}"
        ) from error
    source = name
    if isinstance(config, RerankerConfig):
        config, source = config.backbone_config, Path(name)
    family = family_of(config)
    say(f"{name}: of type {config.model_type!r}, so {family.kind}: {KINDS[family.kind]}")
    with torch.device("meta"):  # counts without allocating memory
        millions = AutoModel.from_config(config).num_parameters() / 1e6
    return ModelSpec(name, family, source, millions, positions(config))


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a backbone's configuration: a row of the table, or inferred; LoRA then adapts all its linear maps.

    Raises:
        InputError: it is not a masked, causal or encoder-decoder language model, or its scores would be wrong here.
    """
    family = FAMILIES.get(config.model_type) or Family(config.model_type, infer_kind(config), "all-linear")
    _refuse_what_scores_wrongly(config, family.kind)
    return family


def infer_kind(config: PreTrainedConfig) -> str:
    """Infer how a backbone reads, encoder, causal or encoder-decoder, from its configuration."""
    if config.is_encoder_decoder:
        return "encoder-decoder"
    # Some encoders (BERT, RoBERTa) also have a causal head; only a model without a masked one is causal.
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal"
    raise InputError(f"expected a masked, causal or encoder-decoder language model, got the type {config.model_type!r}")


def _refuse_what_scores_wrongly(config: PreTrainedConfig, kind: str) -> None:
    reason = _REFUSED.get(config.model_type)
    if kind == "causal" and not (getattr(config, "is_causal", True) and not getattr(config, "use_bidirectional_attention", False)):
        reason = "its configuration says that tokens see those after them, and its kind is read from left to right"
    if kind == "encoder" and getattr(config, "is_decoder", False):
        reason = "its configuration says is_decoder, so its first token, which is read, would see nothing but itself"
    if reason is not None:
        raise InputError(f"expected a backbone that can be scored here, got the type {config.model_type!r}: {reason}; choose another")


def positions(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a backbone has positions for; None if it counts none."""
    limit = getattr(config, "max_position_embeddings", None)
    return limit - (config.pad_token_id or 0) - 1 if config.model_type in _SHIFTED_POSITIONS else limit


def load_tokenizer(spec: ModelSpec):
    """Load the tokenizer of a system; it pads on the right.

    Raises:
        InputError: it cannot be found, or has no vocabulary.
    """
    place = _place(spec.tokenizer or spec.source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place, padding_side="right")
        if (folder := Path(place["pretrained_model_name_or_path"])).is_dir() and "gguf_file" not in place:
            check_vocabulary(folder, tokenizer)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"expected the tokenizer of {spec.name}, got: {reason}; save it beside the weights") from error
    return tokenizer


def load_backbone(spec: ModelSpec) -> PreTrainedModel:
    """Load the weights of a system's backbone as float32, whatever format they are stored in.

    Raises:
        InputError: they cannot be found as safetensors; pickles and code of a checkpoint's own are never loaded.
    """
    place = _place(spec.source)
    try:
        backbone, found = AutoModel.from_pretrained(
            **place,
            use_safetensors="gguf_file" not in place,
            dtype=torch.float32,
            output_loading_info=True,
            **spec.overrides,
        )
    except (OSError, SafetensorError) as error:
        raise InputError(f"expected weights of {spec.name} as safetensors, got: {str(error).splitlines()[0]}") from error
    missing = [name for name in found["missing_keys"] if "pooler" not in name]  # which is not used here
    if missing:
        raise InputError(f"expected all weights of {spec.name}, got none for {missing[0]} and {len(missing) - 1} more")
    if heads := [name for name in found["unexpected_keys"] if name.partition(".")[0] in _HEADS]:
        say(f"{spec.name}: its own head ({', '.join(sorted(heads))}) is not used")
    return backbone


def load(path_or_id: str | Path, **limits: int) -> tuple[RerankerModel, PreTrainedTokenizerBase]:
    """Load a reranker's network and tokenizer: a saved reranker's folder, a system's name, or a checkpoint that gets a new head.

    limits: max_length and max_query_length, where they differ from the folder's own or the defaults.

    Raises:
        InputError: there is no such folder, system or checkpoint, it is damaged, or max_length is beyond its positions.
    """
    for name, limit in limits.items():
        if type(limit) is not int:
            raise InputError(f"expected a whole number of tokens as {name}, got {limit!r}")
    folder, spec = Path(path_or_id), None
    if folder.is_file():
        raise InputError(f"expected a folder, a system or a Hub id, got the file {folder}; name the folder that it is in")
    if not is_saved(folder):
        spec = find(str(path_or_id))
        if isinstance(spec.source, Path):
            if not is_saved(spec.source):
                raise InputError(
                    f"expected the pre-trained {spec.name} in {spec.source}, found none; it comes with the repository, not with the "
                    "installed package: load it from a clone by its folder (data/checkpoints), or run `pip install --editable .` there; "
                    f"{spec.name}{SCRATCH} starts from random weights"
                )
            folder, spec = spec.source, None
    model, tokenizer = load_saved(folder, limits) if spec is None else build(spec, **limits)
    limit, max_length = positions(model.config.backbone_config), model.config.limits["max_length"]
    rope = getattr(model.config.backbone_config, "rope_parameters", None) or {}
    short = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    if short is not None and max_length > short:
        raise InputError(
            f"expected max_length <= {short} for {path_or_id}, got {max_length}: beyond, its rotary embedding (longrope) goes by the "
            "longest text of a batch, so scores would depend on it"
        )
    if limit is not None and max_length > limit:
        raise InputError(f"expected max_length <= {limit} (the positions {path_or_id} has), got {max_length}")
    return model, tokenizer


def build(spec: ModelSpec, max_length: int = 512, max_query_length: int = 50) -> tuple[RerankerModel, object]:
    """Load a system's backbone, put a new head on it, and load its tokenizer.

    Random weights use torch's global generator: seed it first.
    """
    tokenizer = load_tokenizer(spec)
    backbone = None if callable(spec.source) else load_backbone(spec)
    backbone_config = spec.source() if backbone is None else backbone.config
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


def _place(source) -> dict:
    """Tell transformers where something is, and not to run code that comes with it (it would ask the user otherwise)."""
    safely = {"trust_remote_code": False}
    if isinstance(source, Packed):
        file = unpacked(source.archive, source.member)
        return {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name} | safely
    if isinstance(source, tuple):
        source = package_folder(source[0]) / source[1]
    return {"pretrained_model_name_or_path": source} | safely
