"""What do document states save? `python benchmarks/states.py [--check] [--precision bfloat16]`

Random weights at the shapes of Mamba-130m and Pythia-160m, a query of 12 tokens, 100 candidates, one thread. Variants take
turns in one run; medians of process CPU time, loading thread included (on CUDA: of wall-clock time). Full scoring is timed on a
few documents and scaled to 100. "in memory": 100 states, each in its own memory. "read": from the mapped store, cached.
--check: only what the promised numbers need, a few minutes; exits 1 where one is missed. The last line holds the figures as JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "passive"

import numpy as np
import torch
from transformers import GPTNeoXConfig, MambaConfig

from rankmamba import scan
from rankmamba.backbones import SYSTEMS, load_tokenizer
from rankmamba.model import RerankerConfig, RerankerModel
from rankmamba.network.nano import nano_mamba
from rankmamba.reranker import Reranker
from rankmamba.states import DocumentStates

QUERY = "who was the first man to walk here"  # 12 tokens with the template
QUERY_LIMIT = 16
CANDIDATES = 100
SHAPES = {
    "mamba-130m": lambda: MambaConfig(vocab_size=30522, hidden_size=768, num_hidden_layers=24, state_size=16, pad_token_id=0),
    "pythia-160m": lambda: GPTNeoXConfig(
        vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        max_position_embeddings=8192 + QUERY_LIMIT,
    ),
    "nano-mamba": nano_mamba,
}  # fmt: skip
RIVALS = ("mamba-130m", "pythia-160m")
# length: (documents that full scoring is timed on, documents in the store, candidates whose keys and values fit into 4 GB)
LENGTHS = {128: (32, 100, 100), 512: (12, 100, 100), 2048: (3, 3, 24), 8192: (1, 1, 6)}


def model_of(shape: str) -> RerankerModel:
    torch.manual_seed(0)
    model = RerankerModel(RerankerConfig(backbone_config=SHAPES[shape](), kind="causal", pad_token_id=0))
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.fill_(np.log(0.05))  # a state that hardly decays: an error in it must show in the score
    return model


def reranker_of(model: RerankerModel, length: int, precision: torch.dtype) -> Reranker:
    """A reranker whose documents are cut at exactly `length` tokens."""
    model.config.limits = {"max_length": length + QUERY_LIMIT, "max_query_length": QUERY_LIMIT}
    return Reranker(model, load_tokenizer(SYSTEMS["nano-mamba"]), dtype=precision)


def documents(length: int, count: int) -> dict[str, str]:
    words = "river bridge mountain snow book train city winter music garden science history".split()
    draw = np.random.default_rng(length)
    return {f"d{place}": " ".join(draw.choice(words, length)) for place in range(count)}


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def in_turns(variants: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each variant."""
    seconds = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            started = clock()
            run()
            seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def in_memory(states: DocumentStates, ids: list[str], repeats: int) -> dict[str, float]:
    held = states.hold(ids)
    held.rank(QUERY)
    return in_turns({"in memory": lambda: held.rank(QUERY)}, repeats)


def measure(reranker: Reranker, length: int, dtypes: list[str], repeats: int, folder: Path, full: bool = True) -> dict:
    """Time one system at one length; seconds are for 100 candidates or documents."""
    distinct, stored, fitting = LENGTHS[length]
    if not reranker.has_scan:
        stored = distinct
    count = CANDIDATES if reranker.has_scan else fitting
    texts = documents(length, stored)
    few = dict(list(texts.items())[:distinct])
    ids = (list(texts) * CANDIDATES)[:count]
    result, places = {"length": length, "candidates": count}, iter(range(100))

    states = DocumentStates.build(reranker, texts, folder / "states")
    states.batch_size, states.batch_bytes = CANDIDATES, 8 << 30
    result |= in_memory(states, ids, 2 * repeats + 1)
    if full:
        pairs = [(QUERY, text) for text in few.values()]
        variants = {
            "full": lambda: reranker.predict(pairs),
            "build": lambda: DocumentStates.build(reranker, few, folder / f"again{next(places)}"),
        }
        result |= {name: value / distinct * count for name, value in in_turns(variants, repeats).items()}
        expected = reranker.predict(pairs)
        found = {row["doc_id"]: row["score"] for row in states.rank(QUERY, list(few))}
        scores = np.array([found[doc_id] for doc_id in few])
        result["difference"] = float(np.abs(scores - expected).max())
        result["same order"] = bool((np.argsort(-scores) == np.argsort(-expected)).all())
        result["spread"] = float(np.ptp(expected))
    for dtype in dtypes:
        other = states if dtype == "float32" else states.convert(folder / dtype, dtype)
        other.batch_size, other.batch_bytes = 25, 1 << 30
        variants = {f"read {dtype}": lambda other=other: other.rank(QUERY, ids)}
        if dtype == "float32":
            other = DocumentStates.open(folder / "states", reranker)
            other.batch_size, other.batch_bytes = 25, 1 << 30
            result |= in_turns({f"first {dtype}": lambda other=other: other.rank(QUERY, ids)}, 1)
        result |= in_turns(variants, repeats) | {f"bytes {dtype}": other.nbytes / stored}
    return {name: value * CANDIDATES / count if name in SCALED or name.startswith(("read", "first")) else value
            for name, value in result.items()}  # fmt: skip


def in_turns_with_rival(folder: Path, length: int, precision: torch.dtype, repeats: int) -> dict[str, float]:
    """Seconds for 100 candidates from memory, of Mamba's states and of Pythia's keys and values, which take turns."""
    held = {}
    for shape in RIVALS:
        texts = documents(length, LENGTHS[length][0])
        states = DocumentStates.build(reranker_of(model_of(shape), length, precision), texts, folder / shape)
        states.batch_size, states.batch_bytes = CANDIDATES, 8 << 30
        held[shape] = states.hold((list(texts) * CANDIDATES)[:CANDIDATES])
        held[shape].rank(QUERY)
    return in_turns({shape: lambda one=one: one.rank(QUERY) for shape, one in held.items()}, repeats)


def peak_of_ranking(folder: Path, documents_stored: int) -> float:
    """The peak memory (MiB) of a process that ranks 100 documents out of a store of so many."""
    command = [sys.executable, __file__, "--rank-in", str(folder), "--stored", str(documents_stored)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def rank_in(folder: Path, stored: int) -> None:
    """What `peak_of_ranking` starts: build the store in a first process, rank in a second."""
    reranker = reranker_of(model_of("nano-mamba"), 8, torch.float32)
    if not folder.exists():
        texts = {f"d{place}": f"river {place}" for place in range(stored)}
        DocumentStates.build(reranker, texts, folder, "float16", batch_tokens=8192)
    else:
        DocumentStates.open(folder, reranker).rank(QUERY, [f"d{place}" for place in range(0, stored, stored // CANDIDATES)])
    # not getrusage: what it reports begins with the memory of the process that started this one
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


SCALED = ("full", "build", "in memory")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only what the promised numbers need; exit 1 where one is missed")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"], help="what matrix products run in")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--systems", nargs="+", default=RIVALS, choices=RIVALS)
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stored", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.rank_in is not None:
        rank_in(options.rank_in, options.stored)
        return 0
    precision = getattr(torch, options.precision)
    dtypes = ["float32", "float16", "int8", "int4"]
    print(f"{options.precision}, {options.threads} thread(s), scan kernel {scan.kernel('cpu').name}; seconds for 100 candidates")
    header = f"{'system':12}{'length':>7}{'full':>9}{'build':>9}{'in memory':>11}{'':>8}{'first read':>12}"
    print(header + "".join(f"{'read ' + dtype:>15}" for dtype in dtypes) + "   MB a document")
    results: dict[tuple[str, int], dict] = {}
    for system in ["mamba-130m"] if options.check else options.systems:
        model = model_of(system)
        for length in [512, 8192] if options.check else options.lengths:
            reranker = reranker_of(model, length, precision)
            with tempfile.TemporaryDirectory() as folder:
                repeats = options.repeats if length <= 512 else 1
                full = not options.check or length == 512
                row = measure(reranker, length, dtypes if full else [], repeats, Path(folder), full)
            results[system, length] = row
            print(line(system, row, dtypes), flush=True)
        del model, reranker
    if not options.check:
        print(json.dumps({f"{system} {length}": row for (system, length), row in results.items()}))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rivals = in_turns_with_rival(Path(folder), 512, precision, 2 * options.repeats + 1)
    with tempfile.TemporaryDirectory() as folder:
        peaks = []
        for stored in (200, 4000):
            peak_of_ranking(Path(folder) / str(stored), stored)
            peaks.append(peak_of_ranking(Path(folder) / str(stored), stored))
    return judge(results["mamba-130m", 512], results["mamba-130m", 8192], rivals, peaks)


def line(system: str, row: dict, dtypes: list[str]) -> str:
    def cell(name: str, width: int) -> str:
        return f"{row[name]:{width}.2f}" if name in row else " " * width

    text = f"{system:12}{row['length']:7,}{cell('full', 9)}{cell('build', 9)}{cell('in memory', 11)}"
    text += f"{row['full'] / row['in memory']:7.1f}x" if "full" in row else " " * 8
    text += cell("first float32", 12)
    for dtype in dtypes:
        name = f"read {dtype}"
        text += cell(name, 8) + (f"{row['full'] / row[name]:6.1f}x" if name in row and "full" in row else " " * 7)
    return text + "   " + " ".join(f"{row[f'bytes {dtype}'] / 1e6:.2f}" for dtype in dtypes if f"bytes {dtype}" in row)


def judge(mamba: dict, long: dict, rivals: dict[str, float], peaks: list[float]) -> int:
    """Compare with the promised numbers, print each, and the figures on the last line."""
    figures = {
        "difference of scores": (mamba["difference"], "<=", 1e-5),
        "same order": (mamba["same order"], ">=", 1),
        "full / in memory": (mamba["full"] / mamba["in memory"], ">=", 35),
        "full / read from the store, float32": (mamba["full"] / mamba["read float32"], ">=", 25),
        "Pythia's keys and values / Mamba's states, in memory": (rivals["pythia-160m"] / rivals["mamba-130m"], ">=", 1),
        "8192 tokens / 512 tokens, in memory": (long["in memory"] / mamba["in memory"], "<=", 1.1),
        "MB a document, int8": (mamba["bytes int8"] / 1e6, "<=", 0.75),
        "MB a document, int4": (mamba["bytes int4"] / 1e6, "<=", 0.4),
        "speed of building / of plain scoring": (mamba["full"] / mamba["build"], ">=", 0.9),
        "peak memory, store of 4000 / of 200": (peaks[1] / peaks[0], "<=", 1.1),
    }
    missed = 0
    for name, (value, relation, bound) in figures.items():
        good = value <= bound if relation == "<=" else value >= bound
        missed += not good
        print(f"{'ok    ' if good else 'MISSED'} {name}: {value:.3g} (promised {relation} {bound})")
    print(json.dumps({name: float(value) for name, (value, _, _) in figures.items()}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
