"""How fast is `Reranker.predict` beside sentence-transformers' `CrossEncoder.predict`? `python benchmarks/rerank.py`

Same weights, same precision, same threads, the same NQ pairs; variants alternate in one run; medians of process CPU time, or with
several threads of wall-clock time (on an idle machine).
CrossEncoder is tried with several batch sizes, its default among them; both sort by length before they batch.
"""

import argparse
import os
import statistics
import tempfile
from functools import partial

os.environ["OMP_WAIT_POLICY"] = "passive"

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from rankmamba.collection import load
from rankmamba.precision import autocast
from rankmamba.profiling import clock
from rankmamba.reranker import Reranker


def nq_pairs(queries: int, depth: int) -> list[tuple[str, str]]:
    """The first `depth` BM25 candidates of some test queries, as texts."""
    collection = load("rankmamba/nq/test").sample(queries)
    head = collection.candidates[collection.candidates["rank"] <= depth]
    texts = collection.documents.get_many(set(head["doc_id"]))
    return [(collection.queries[q], texts[d]) for q, d in zip(head["query_id"], head["doc_id"], strict=True)]


class FirstToken(nn.Module):
    """In place of BERT's pooler: our head reads the first token itself."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, 0]


def as_cross_encoder(reranker: Reranker) -> CrossEncoder:
    """Give a BERT reranker's weights to Hugging Face's classifier, loaded and run by sentence-transformers with nothing of ours."""
    config = BertConfig(**reranker.model.config.backbone_config.to_diff_dict() | {"num_labels": 1})
    with tempfile.TemporaryDirectory() as folder:
        BertForSequenceClassification(config).save_pretrained(folder)
        reranker.tokenizer.save_pretrained(folder)
        encoder = CrossEncoder(folder, device="cpu", max_length=reranker.inputs.max_length, activation_fn=nn.Identity())
    encoder.model.bert.load_state_dict(reranker.model.backbone.state_dict(), strict=False)
    encoder.model.bert.pooler = FirstToken()
    encoder.model.classifier.load_state_dict(reranker.model.score.state_dict())
    return encoder


def is_whole(reranker: Reranker, pair: tuple[str, str]) -> bool:
    """Say whether a pair fits uncut; longer ones the two cut at different places."""
    query, document = (len(reranker.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in pair)
    return document <= reranker.inputs.document_limit and query <= reranker.inputs.query_limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--depth", type=int, default=100, help="candidates of each query")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: both under autocast")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    unit = "CPU second" if options.threads == 1 else "second"
    pairs = nq_pairs(options.queries, options.depth)
    by_query = [pairs[start : start + options.depth] for start in range(0, len(pairs), options.depth)]

    dtype = getattr(torch, options.dtype)
    reranker = Reranker.from_pretrained("minilm-l6", dtype=dtype, device="cpu")
    encoder = as_cross_encoder(reranker)
    whole = np.array([is_whole(reranker, pair) for pair in pairs])

    def predict_theirs(call, size: int) -> np.ndarray:
        with autocast("cpu", dtype):
            return encoder.predict(call, batch_size=size)

    print(f"MiniLM-L6, {options.dtype}, CPU, {options.threads} thread(s), {len(pairs)} pairs, median of {options.repeats}")
    for title, calls in {"all pairs in one call": [pairs], "a call for each query": by_query}.items():
        variants = {
            f"CrossEncoder, batches of {size}{' (its default)' if size == 32 else ''}": partial(predict_theirs, size=size)
            for size in (8, 32, 128)
        }
        variants["rankmamba"] = reranker.predict
        seconds, scores, padded, real = {name: [] for name in variants}, {}, 0, 0
        for _ in range(options.repeats):
            for name, predict in variants.items():
                started = clock(reranker.device)
                parts = []
                for call in calls:
                    parts.append(predict(call))
                    padded, real = padded + reranker.cost.padded_tokens, real + reranker.cost.tokens
                seconds[name].append(clock(reranker.device) - started)
                scores[name] = np.concatenate(parts)
        rates = {name: len(pairs) / statistics.median(values) for name, values in seconds.items()}
        print(title)
        for name, rate in rates.items():
            print(f"  {name:40} {rate:6.1f} pairs per {unit}; rankmamba is {rates['rankmamba'] / rate:.2f} times as fast")
        worst = max(np.abs(scores[name] - scores["rankmamba"])[whole].max() for name in rates)
        print(
            f"  largest difference of scores {worst:.1e} where nothing is cut ({whole.sum()} pairs); padded/real {padded / real:.3f}"
        )


if __name__ == "__main__":
    main()
