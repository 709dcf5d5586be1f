"""How fast is `Reranker.predict` beside sentence-transformers' `CrossEncoder.predict`? `python benchmarks/rerank.py`

Same weights, same precision, same threads, the same NQ pairs; variants alternate in one run; medians of process CPU time.
CrossEncoder is given the best of several batch sizes.
"""

import argparse
import os
import statistics
import tempfile
import time

os.environ["OMP_WAIT_POLICY"] = "passive"

import numpy as np
import torch
from sentence_transformers import CrossEncoder

from rankmamba.collection import load
from rankmamba.reranker import Reranker


def nq_pairs(queries: int, depth: int) -> list[tuple[str, str]]:
    """The first `depth` BM25 candidates of some test queries, as texts."""
    collection = load("rankmamba/nq/test").sample(queries)
    head = collection.candidates[collection.candidates["rank"] <= depth]
    texts = collection.documents.get_many(set(head["doc_id"]))
    return [(collection.queries[q], texts[d]) for q, d in zip(head["query_id"], head["doc_id"], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--depth", type=int, default=100, help="candidates of each query")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pairs = nq_pairs(options.queries, options.depth)

    reranker = Reranker.from_pretrained("minilm-l6", dtype=torch.float32, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        reranker.save_pretrained(folder)
        encoder = CrossEncoder(folder, device="cpu", max_length=512, activation_fn=torch.nn.Identity())
    variants = {f"CrossEncoder, batches of {size}": lambda size=size: encoder.predict(pairs, batch_size=size) for size in (8, 32, 128)}
    variants["rankmamba, batches of 4,096 tokens"] = lambda: reranker.predict(pairs)
    seconds, scores = {name: [] for name in variants}, {}
    for _ in range(options.repeats):
        for name, run in variants.items():
            started = time.process_time()
            scores[name] = run()
            seconds[name].append(time.process_time() - started)

    rates = {name: len(pairs) / statistics.median(values) for name, values in seconds.items()}
    *theirs, ours = rates
    difference = max(np.abs(scores[name] - scores[ours]).max() for name in theirs)
    print(f"{len(pairs)} pairs, MiniLM-L6, float32, CPU, {options.threads} thread(s), median of {options.repeats}")
    for name, rate in rates.items():
        print(f"  {name:40} {rate:7.1f} pairs per CPU second, {rates[ours] / rate:5.2f} times as slow as ours")
    print(f"largest difference of scores {difference:.1e}; padded/real tokens {reranker.cost.padded_tokens / reranker.cost.tokens:.3f}")


if __name__ == "__main__":
    main()
