"""A saved reranker inside sentence-transformers: `CrossEncoder(folder, trust_remote_code=True)` gives the scores of `Reranker`.

`trust_remote_code`, because a class that is not sentence-transformers' own reads the pairs: the one below, as it is installed, and
no code out of the folder. Without it a causal model would be given another template than the one that it was trained with.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .errors import InputError
from .files import write_text
from .reranker import Reranker

FILES = {
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "rankmamba.cross_encoder.CrossEncoderModule"}],
    # scores are raw logits there, too
    "config_sentence_transformers.json": {"model_type": "CrossEncoder", "activation_fn": "torch.nn.Identity"},
}


def write_files(folder: str | Path) -> None:
    """Write what makes sentence-transformers load a saved reranker as it is."""
    for name, content in FILES.items():
        write_text(Path(folder) / name, json.dumps(content, indent=1) + "\n")


def check_arguments(batch_size: int | None = None, prompt_name: str | None = None, convert_to_numpy: bool = True) -> None:
    """Check the arguments that `CrossEncoder.predict` has beyond `Reranker.predict`; batch_size needs none: batches are cut by tokens.

    Raises:
        InputError: a prompt, or another type than a NumPy array, is asked for.
    """
    if prompt_name is not None or not convert_to_numpy:
        got = f"prompt_name={prompt_name!r}, convert_to_numpy={convert_to_numpy}"
        raise InputError(f"expected no prompt, and scores as a NumPy array, got {got}; a reranker has its template instead")


class NoModelCard:
    """Where sentence-transformers' evaluators leave their numbers; a study keeps its numbers in records."""

    def set_evaluation_metrics(self, *args, **kwargs) -> None:
        pass


class CrossEncoderModule(nn.Module):
    """The one module of such a CrossEncoder, with the interface of sentence-transformers' modules: pairs in, "scores" out."""

    modalities = ["text"]
    save_in_root = True  # beside modules.json

    def __init__(self, reranker: Reranker):
        super().__init__()
        self._reranker, self.model, self.tokenizer = reranker, reranker.model, reranker.tokenizer

    @classmethod
    def load(cls, folder: str, **kwargs) -> "CrossEncoderModule":
        return cls(Reranker.from_pretrained(folder, device="cpu", dtype=torch.float32))

    def preprocess(self, inputs: Sequence[tuple[str, str]], prompt: str | None = None, **kwargs) -> dict[str, torch.Tensor]:
        """Tokenise pairs (query, document) with the reranker's template and limits."""
        queries, documents = zip(*inputs, strict=True)
        tokenizer = self._reranker.inputs
        halves = zip(tokenizer.queries(queries), tokenizer.documents(documents), strict=True)
        return tokenizer.collate([tokenizer.join(query, document) for query, document in halves])

    def forward(self, features: dict[str, torch.Tensor], **kwargs) -> dict[str, torch.Tensor]:
        names = ("input_ids", "attention_mask", "token_type_ids")
        return features | {"scores": self.model(**{name: features[name] for name in names if name in features}).logits}

    def save(self, folder: str, **kwargs) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
