"""The network of a reranker: any Hugging Face backbone, one pooled token, dropout, one linear head.

It is a Hugging Face model of its own type: once `rankmamba.model` is imported,
`AutoModelForSequenceClassification.from_pretrained(folder)` loads what we save. Its inputs are those of `inputs.PairTokenizer`, with
template and marks; on a tokenizer's own encoding of a pair it ranks by chance.
"""

import hashlib
import inspect
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from . import scan
from .errors import InputError
from .network.embeddings import FixedWordEmbedding
from .network.last_layer import LastLayer
from .network.substitutes import use_kernels


class RerankerConfig(PreTrainedConfig):
    """What a saved reranker is.

    backbone_config: the backbone's own configuration. kind: `inputs.KINDS`; decides template and pooling. limits: max_length and
    max_query_length in tokens, see `inputs.PairTokenizer`. head_dropout: probability. word_embeddings: None (the backbone has
    its own) or a name in `embeddings.WORD_EMBEDDINGS`. system: the row of the results table it belongs to.
    """

    model_type = "rankmamba"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config=None,
        kind="causal",
        limits=None,
        head_dropout=0.1,
        word_embeddings=None,
        system="",
        **kwargs,
    ):
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = backbone_config
        self.kind, self.limits = kind, limits or {"max_length": 512, "max_query_length": 50}
        self.head_dropout, self.word_embeddings, self.system = head_dropout, word_embeddings, system
        kwargs.setdefault("num_labels", 1)
        super().__init__(**kwargs)


class Head(nn.Linear):
    """A linear layer that computes in float32, whatever the format of its weights."""

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(pooled, self.weight.float(), None if self.bias is None else self.bias.float())


class RerankerModel(PreTrainedModel):
    """backbone -> pooled token -> dropout -> Linear(D, 1); the head and its logits are float32 whatever the backbone runs in.

    The pooled token is the first (encoder), the last real token by the mask (causal), the only decoder step (encoder-decoder).
    """

    config_class = RerankerConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config: RerankerConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        self.loss_type = "ForSequenceClassification"  # transformers would infer it from the class's name
        backbone = AutoModel.from_config(config.backbone_config) if backbone is None else backbone
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None  # BERT's pooler belongs to its next-sentence task; the head reads the token itself
        if config.word_embeddings is not None:
            backbone.set_input_embeddings(FixedWordEmbedding(config.word_embeddings, config.backbone_config.hidden_size))
            _share_projection(backbone)
        self.backbone = use_kernels(backbone)
        self.last_layer = LastLayer(backbone)
        self._typed = (
            "token_type_ids" in inspect.signature(backbone.forward).parameters
            and getattr(backbone.config, "type_vocab_size", 2) > 1  # 1 where a RoBERTa comes with BERT's tokenizer
        )
        self._global = "global_attention_mask" in inspect.signature(backbone.forward).parameters  # Longformer, LED
        self.dropout = nn.Dropout(config.head_dropout)
        width = getattr(
            config.backbone_config, "word_embed_proj_dim", config.backbone_config.hidden_size
        )  # OPT-350m's is another
        self.score = Head(width, config.num_labels)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in Hugging Face; fixed word embeddings, which are not in the saved file, are fetched from their package."""
        model = super().from_pretrained(*args, **kwargs)
        for module in (model[0] if isinstance(model, tuple) else model).modules():
            if isinstance(module, FixedWordEmbedding):
                module.load_table()
        return model

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, dropout_mask=None, **kwargs):
        """Score B pairs.

        input_ids, attention_mask, token_type_ids: int64 (B, L). dropout_mask: float32 (B, D), 0 or 1 / (1 - p), the factors of
        the head's dropout; drawn here if not given. Returns logits float32 (B, num_labels).

        Raises:
            InputError: it is given another tensor, which it would not read.
        """
        ignored = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name != "num_items_in_batch"]
        if ignored:
            raise InputError(f"expected input_ids, attention_mask, token_type_ids and labels, got {ignored[0]}; leave it out")
        positions = pooled_positions(input_ids, attention_mask, self.config.kind)
        logits = self.score_hidden(lambda: self._hidden(input_ids, attention_mask, token_type_ids), positions, dropout_mask)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def score_hidden(
        self, run: Callable[[], torch.Tensor], positions: torch.Tensor, dropout_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the backbone for the pooled tokens and the head on them.

        run: returns the hidden states (B, L, D). positions: int64 (B,). dropout_mask: as in `forward`. Returns logits float32
        (B, num_labels).
        """
        with self.last_layer.only(positions):
            hidden = run()
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), positions]
        with torch.autocast(hidden.device.type, enabled=False):
            kept = self.dropout(pooled.float()) if dropout_mask is None else pooled.float() * dropout_mask
            return self.score(kept)

    def _hidden(self, input_ids, attention_mask, token_type_ids):
        kind, inputs = self.config.kind, {"input_ids": input_ids, "attention_mask": attention_mask}
        if kind == "causal":
            # A causal model cannot see padding to the right of the last real token, so it needs no mask, and without one the
            # attention runs its fast causal kernel.
            if attention_mask is not None and not scan.plain() and _ends_with_padding(attention_mask):
                del inputs["attention_mask"]
            inputs["use_cache"] = False
        elif kind == "encoder-decoder":
            start = getattr(self.config.backbone_config, "decoder_start_token_id", None) or 0
            inputs["decoder_input_ids"] = input_ids.new_full((len(input_ids), 1), start)
            inputs["use_cache"] = False
        if self._global:
            inputs["global_attention_mask"] = torch.zeros_like(input_ids).index_fill_(1, input_ids.new_zeros(1), 1)
        if token_type_ids is not None and self._typed:
            inputs["token_type_ids"] = token_type_ids
        return self.backbone(**inputs).last_hidden_state

    def parameters_outside_embeddings(self) -> int:
        """Count the parameters that are not in an embedding table (a projection of fixed word embeddings counts)."""
        tables = {id(p) for m in self.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        return sum(p.numel() for p in self.parameters() if id(p) not in tables)


def _share_projection(backbone: PreTrainedModel) -> None:
    """Where encoder and decoder share their word embeddings, save what is learnt beside the fixed ones only once."""
    tied = {name.removesuffix("weight"): of.removesuffix("weight") for name, of in (backbone._tied_weights_keys or {}).items()}
    learnt = ("projection.weight", "matches.weight")
    backbone._tied_weights_keys = {name + part: of + part for name, of in tied.items() for part in learnt}
    backbone.all_tied_weights_keys = backbone.get_expanded_tied_weights_keys(all_submodels=False)


def weights_digest(network: nn.Module) -> str:
    """The SHA-256 of a network's parameters and buffers, their names, formats and shapes, and of which adapters of PEFT are active."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*network.named_parameters(), *network.named_buffers()], key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for name, module in network.named_modules():
        if hasattr(module, "merged_adapters"):
            digest.update(f"{name} {module.active_adapters} {module.disable_adapters} {module.merged_adapters}".encode())
    return digest.hexdigest()


def _ends_with_padding(attention_mask: torch.Tensor) -> bool:
    """Whether all that a mask (B, L) hides stands behind the last real token of each sequence."""
    return bool(attention_mask[:, 0].all() and (attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def pooled_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, kind: str) -> torch.Tensor:
    """Return which token of each sequence the head reads: ids and mask (B, L) -> int64 (B,)."""
    batch, length = input_ids.shape
    if kind != "causal":
        return input_ids.new_zeros(batch)
    if attention_mask is None:
        return input_ids.new_full((batch,), length - 1)
    return (attention_mask * torch.arange(length, device=input_ids.device)).argmax(-1)


AutoConfig.register("rankmamba", RerankerConfig, exist_ok=True)
AutoModelForSequenceClassification.register(RerankerConfig, RerankerModel, exist_ok=True)
