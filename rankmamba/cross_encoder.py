"""A saved reranker inside sentence-transformers: `CrossEncoder(folder, trust_remote_code=True)` gives the scores of `Reranker` in float32.

`trust_remote_code` is needed because the pairs are read by a class that is not sentence-transformers' own: the installed one below, no
code from the folder. Without it a causal model would be given a template that it was not trained with.
"""

import json
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .backbones import positions
from .errors import InputError
from .files import write_text
from .inputs import PairTokenizer
from .reranker import Reranker

FILES = {
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "rankmamba.cross_encoder.CrossEncoderModule"}],
    # scores are raw logits there, too
    "config_sentence_transformers.json": {"model_type": "CrossEncoder", "activation_fn": "torch.nn.Identity"},
}
FLOAT32 = [None, "auto", "float32", torch.float32]  # the dtypes that may be asked for: the weights are saved in float32


def write_files(folder: str | Path) -> None:
    """Write the files with which sentence-transformers loads a saved reranker."""
    for name, content in FILES.items():
        write_text(Path(folder) / name, json.dumps(content, indent=1) + "\n")


def conversion(
    batch_size: int | None = None,
    num_workers: int | None = None,
    activation_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    apply_softmax: bool | None = None,
    convert_to_numpy: bool = True,
    convert_to_tensor: bool = False,
    **others,
) -> Callable[[np.ndarray], np.ndarray | torch.Tensor | list[torch.Tensor]]:
    """Return a function that converts `Reranker.predict`'s scores to what the keywords of `CrossEncoder.predict` ask for.

    Some have no effect: batches are cut by tokens, there are no worker processes, and one score per pair has no softmax.

    Raises:
        InputError: another keyword is given: a prompt, another device, or one that neither has.
    """
    asked = [f"{name}={value!r:.80}" for name, value in others.items() if value is not None]
    if asked:
        raise InputError(
            f"expected keywords of Reranker.predict, or {', '.join(list(signature(conversion).parameters)[:-1])}, got {', '.join(asked)}; "
            "a reranker has its template instead of prompts, and computes where it was loaded to"
        )

    def convert(scores: np.ndarray) -> np.ndarray | torch.Tensor | list[torch.Tensor]:
        tensor = torch.from_numpy(scores)
        tensor = tensor if activation_fn is None else activation_fn(tensor)
        if convert_to_tensor:
            return tensor
        return tensor.numpy() if convert_to_numpy else list(tensor)

    return convert


class NoModelCard:
    """Takes the numbers that sentence-transformers' evaluators leave on a model; a study keeps its numbers in records."""

    def set_evaluation_metrics(self, *args, **kwargs) -> None:
        pass


class CrossEncoderModule(nn.Module):
    """The only module of such a CrossEncoder, with the interface of sentence-transformers' modules: pairs in, "scores" out."""

    modalities = ["text"]
    save_in_root = True  # beside modules.json

    def __init__(self, reranker: Reranker):
        super().__init__()
        self._reranker, self.model, self.tokenizer = reranker, reranker.model, reranker.tokenizer
        self._max_query_length = reranker.inputs.max_query_length

    @classmethod
    def load(
        cls,
        folder: str,
        model_kwargs: dict | None = None,
        processor_kwargs: dict | None = None,
        config_kwargs: dict | None = None,
        backend: str = "torch",
        **kwargs,
    ) -> "CrossEncoderModule":
        """Load a folder; CrossEncoder's max_length arrives as model_max_length.

        Raises:
            InputError: anything other than the saved model in float32 is asked for.
        """
        asked = (model_kwargs or {}) | (processor_kwargs or {}) | (config_kwargs or {}) | {"backend": backend}
        max_length = asked.pop("model_max_length", None)
        served = {"dtype": FLOAT32, "torch_dtype": FLOAT32, "num_labels": [1], "backend": ["torch"]}
        wrong = [f"{name}={value!r:.80}" for name, value in asked.items() if value not in served.get(name, [])]
        if wrong:
            raise InputError(
                f"expected a saved reranker in float32 as it is, with no setting but max_length, got {', '.join(wrong)}; "
                "Reranker.from_pretrained(folder, dtype=...) computes in other formats"
            )
        module = cls(Reranker.from_pretrained(folder, device="cpu", dtype=torch.float32))
        if max_length is not None:
            module.max_seq_length = max_length
        return module

    @property
    def max_seq_length(self) -> int:
        """Tokens of a pair; a query has the reranker's limit, but at most half of them."""
        return self._reranker.inputs.max_length

    @max_seq_length.setter
    def max_seq_length(self, tokens: int) -> None:
        config = self.model.config
        most = positions(config.backbone_config)
        if type(tokens) is not int or most is not None and tokens > most:
            raise InputError(f"expected max_length in whole tokens{f', {most} at most' if most else ''}, got {tokens!r}")
        limits = {"max_length": tokens, "max_query_length": min(self._max_query_length, tokens // 2)}
        self._reranker.inputs = PairTokenizer(self.tokenizer, config.kind, **limits, marked=self._reranker.inputs.marked)
        config.limits = limits

    def preprocess(
        self, inputs: Sequence[tuple[str, str]], prompt: str | None = None, processing_kwargs: dict | None = None, **kwargs
    ) -> dict[str, torch.Tensor]:
        """Tokenise pairs (query, document), or single texts as documents, with the reranker's template and limits.

        Raises:
            InputError: a prompt or another processing is asked for.
        """
        if prompt or processing_kwargs:
            got = f"prompt={prompt!r:.80}, processing_kwargs={processing_kwargs!r:.80}"
            raise InputError(f"expected no prompt and no processing_kwargs, got {got}; a reranker has its template instead")
        # sentence-transformers counts the tokens of single texts, for a model's card
        queries, documents = zip(*(("", text) if isinstance(text, str) else text for text in inputs), strict=True)
        tokenizer = self._reranker.inputs
        halves = zip(tokenizer.queries(queries), tokenizer.documents(documents), strict=True)
        return tokenizer.collate([tokenizer.join(query, document) for query, document in halves])

    def forward(self, features: dict[str, torch.Tensor], **kwargs) -> dict[str, torch.Tensor]:
        """Add "scores", raw logits float32 (B, 1), to the features of `preprocess`."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        return features | {"scores": self.model(**{name: features[name] for name in names if name in features}).logits}

    def save(self, folder: str, **kwargs) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
