"""The trial of notebook 06: how exact, how fast and how large document states are, for systems that a study has trained."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from ..backbones import find
from ..collection import Collection
from ..evaluate import mean_interval, per_query
from ..experiment import Experiment
from ..files import alone, check_room
from ..reranker import Reranker
from ..results import environment, find_record, fingerprint, leave_record
from . import DocumentStates
from .encoding import ids_bytes, record_bytes
from .kinds import kind_of

FULL = "full scoring"
MEASURE = "nDCG@10"  # by which formats are compared
CORES, MEMORY_GB = 64, 512  # of a rented machine that builds states, and of one that holds them in memory
MACHINES, HOURS = f"machines of {MEMORY_GB} GB", f"hours to build on {CORES} cores"


def causal(systems: Sequence[str]) -> list[str]:
    """The systems whose documents have a state: they read the document before the query, and all their layers are of one kind."""
    return [system for system in systems if find(system).has_states]


def trial(
    experiment: Experiment,
    system: str,
    first_stage: str,
    top_k: int,
    n_queries: int,
    dtypes: Sequence[str],
    lengths: Sequence[int],
) -> dict:
    """Store the states of `n_queries` test queries' candidates in every format and rank from them; leaves and returns the record.

    For Mamba also in the last format with only the first half of the layers. Seconds are the median of three passes. lengths: tokens of
    documents (joined from the collection's own) at which the speed of full scoring and of scoring from states in memory is compared.

    Raises:
        InputError: the system was not trained here.
    """
    folder, collection = experiment.model_path(system), f"{experiment.collection}/test"
    trained = fingerprint(experiment.trained(system))
    config = {"first_stage": first_stage, "top_k": top_k, "n_queries": n_queries, "dtypes": list(dtypes)}
    config |= {"lengths": list(lengths), "measure": MEASURE, "trained": trained}
    config |= {"ranked": experiment.first_stage_fingerprint(first_stage)}
    found = find_record(experiment.folder, "states", system=system, collection=collection, seed=experiment.seed, config=config)
    if found:
        return found
    reranker = Reranker.from_pretrained(folder)
    test = experiment.split("test").sample(n_queries)
    candidates = experiment.run(first_stage, "test")
    candidates = candidates[candidates["query_id"].isin(test.queries) & (candidates["rank"] <= top_k)]
    texts = test.documents.get_many(sorted(set(candidates["doc_id"])))

    wanted = list(_formats(reranker, dtypes))
    with _workspace(experiment.folder) as place:
        _check_room(place, reranker, list(texts.values()), wanted)
        started = time.perf_counter()
        exact = DocumentStates.build(reranker, texts, place / "exact", show_progress_bar=True)
        build_seconds = time.perf_counter() - started
        stores = {
            name: exact if name == "float32" else exact.convert(place / name, dtype, layers)
            for name, dtype, layers in wanted
        }
        runs, seconds = _in_turns({FULL: reranker} | stores, lambda ranker: ranker.rerank(candidates, test, top_k))
        full, full_seconds = runs.pop(FULL), seconds.pop(FULL)
        formats = {
            name: _compare(full, run, test) | {"bytes_per_document": stores[name].nbytes / len(stores[name])}
            for name, run in runs.items()
        }
    cost = reranker.cost
    by_length = {str(length): _at_length(reranker, folder, list(texts.values()), length) for length in lengths}
    result = {
        "pairs": cost.pairs,
        "documents": len(texts),
        "tokens": cost.tokens,
        "formats": formats,
        "full": {MEASURE: float(per_query(full, test.qrels, [MEASURE])[MEASURE].mean())},
    }
    timing = {"full_seconds": full_seconds, "build_seconds": build_seconds, "seconds": seconds, "by_length": by_length}
    timing["pairs_per_s"] = cost.pairs / seconds[dtypes[0]]
    ran = environment() | reranker.setup
    scale, seed = experiment.scale, experiment.seed
    return leave_record(experiment.folder, "states", system, collection, scale, seed, config, result, timing, ran)


@contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """An empty folder in `folder` for one process at a time, without what one that was killed left there."""
    with alone(folder / ".states.lock", "another process measures states here; waiting for it"):
        for left_over in folder.glob("states-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="states-") as place:
            yield Path(place)


def _in_turns(rankers: Mapping[str, Reranker | DocumentStates], rank: Callable) -> tuple[dict[str, pd.DataFrame], dict[str, float]]:
    """The ranking of each ranker, and the median seconds of three passes: in turns, so that what slows the machine meets all alike.

    A first round warms up, and checks the bytes of every state that it reads.
    """
    runs, seconds = {}, {name: [] for name in rankers}
    for _ in range(4):
        for name, ranker in rankers.items():
            runs[name] = rank(ranker)
            seconds[name].append(ranker.cost.seconds)
    return runs, {name: float(np.median(passes[1:])) for name, passes in seconds.items()}


def _formats(reranker: Reranker, dtypes: Sequence[str]):
    yield from ((dtype, dtype, None) for dtype in dtypes)
    if reranker.has_scan:
        depth = reranker.model.backbone.config.num_hidden_layers
        kept = range((depth + 1) // 2)
        yield f"{dtypes[-1]}, {len(kept)} of {depth} layers", dtypes[-1], kept


def _check_room(place: Path, reranker: Reranker, texts: Sequence[str], formats: Sequence[tuple]) -> None:
    """Refuse to begin a trial whose stores, which exist at the same time, the disk has no room for."""
    before, marked = len(reranker.inputs.before), bool(reranker.inputs.marked)
    tokens = [before + len(half) for half in reranker.inputs.documents(texts)]
    stores = {("float32", None), *((dtype, layers) for _, dtype, layers in formats)}  # all are made from exact ones
    kinds = [(dtype, kind_of(reranker, layers)) for dtype, layers in stores]
    size = sum(record_bytes(dtype, kind.numbers(count)) + marked * ids_bytes(count) for dtype, kind in kinds for count in tokens)
    remedy = "free some space, or lower n_state_queries or top_k, or leave formats out of store_dtypes"
    check_room(place, size, f"for the states of {len(texts):,} documents in {len(formats)} formats", remedy)


def _compare(full: pd.DataFrame, run: pd.DataFrame, test: Collection) -> dict:
    """How far a run from states is from full scoring: scores, rankings, `MEASURE` with a 95% interval of the difference."""
    both = full.merge(run, on=["query_id", "doc_id"], suffixes=("", " states"))
    values, reference = (per_query(table, test.qrels, [MEASURE])[MEASURE] for table in (run, full))
    mean, low, high = mean_interval((values - reference).to_numpy())
    return {
        "largest_difference": float((both["score"] - both["score states"]).abs().max()),
        "rankings_kept": float(np.mean([_same_order(part) for _, part in both.groupby("query_id")])),
        MEASURE: float(values.mean()),
        "difference": mean,
        "low": low,
        "high": high,
    }


def _same_order(both: pd.DataFrame) -> bool:
    """Whether one query's documents are in the same order; scores closer than 1e-5 count as equal (identical texts have such)."""
    scores = both.sort_values("rank states")["score"].to_numpy()
    return bool((np.maximum.accumulate(scores[::-1])[::-1] <= scores + 1e-5).all())


def _at_length(reranker: Reranker, folder: Path, texts: list[str], length: int) -> dict:
    """Milliseconds per pair at one length of document: full scoring, best of three, and from states in memory, best of ten."""
    room = reranker.inputs.max_query_length
    longer = Reranker.from_pretrained(folder, dtype=reranker.dtype, max_length=length + room, max_query_length=room)
    long = " ".join(texts * (1 + length // 20))  # at least 20 tokens a text
    parts = {f"d{place}": long[place * 50 :][: 12 * length] for place in range(3)}
    query = "who was the first to cross the river"
    with tempfile.TemporaryDirectory() as place:
        held = DocumentStates.build(longer, parts, Path(place) / "states").hold(list(parts) * 6)
        from_states = _best(lambda: held.rank(query), 10) / len(held.doc_ids)
    full = _best(lambda: longer.predict([(query, text) for text in parts.values()]), 3) / len(parts)
    return {"full_ms": 1000 * full, "states_ms": 1000 * from_states}


def _best(run: Callable, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def format_table(records: list[dict]) -> pd.DataFrame:
    """One row per system and format: kB per document, ms per query, times as fast as full scoring, and what the format changes."""
    rows = []
    for record in records:
        result, timing = record["result"], record["timing"]
        nothing = dict.fromkeys(("bytes_per_document", "largest_difference", "difference", "low", "high"), 0.0)
        formats = {FULL: nothing | {"rankings_kept": 1.0, MEASURE: result["full"][MEASURE]}} | result["formats"]
        seconds = {FULL: timing["full_seconds"]} | timing["seconds"]
        for name, found in formats.items():
            rows.append(
                {
                    "system": record["system"],
                    "format": name,
                    "kB/document": found["bytes_per_document"] / 1000,
                    "ms/query": 1000 * seconds[name] / record["config"]["n_queries"],
                    "speed-up": seconds[FULL] / seconds[name],
                    "largest difference": found["largest_difference"],
                    "rankings kept": found["rankings_kept"],
                    MEASURE: found[MEASURE],
                    **{key: found[key] for key in ("difference", "low", "high")},
                }
            )
    columns = ["system", "format", "kB/document", "ms/query", "speed-up", "largest difference", "rankings kept", MEASURE]
    return pd.DataFrame(rows, columns=[*columns, "difference", "low", "high"])


def length_table(records: list[dict]) -> pd.DataFrame:
    """One row per system and length: tokens of the document, ms per pair by full scoring and from states, and their ratio."""
    rows = [
        {"system": record["system"], "tokens": int(length), **found, "speed-up": found["full_ms"] / found["states_ms"]}
        for record in records
        for length, found in record["timing"]["by_length"].items()
    ]
    return pd.DataFrame(rows, columns=["system", "tokens", "full_ms", "states_ms", "speed-up"])


def outlook(records: list[dict], documents: int) -> pd.DataFrame:
    """What the states of a large collection take: terabytes, hours of a rented machine to build, machines to hold them.

    A document there is assumed to cost what one costs here, and a core of the machine that builds to be as fast as a thread of this
    one. break-even: scorings of a document after which building its state has paid for itself.
    """
    rows = []
    for record in records:
        result, timing = record["result"], record["timing"]
        build, full = timing["build_seconds"] / result["documents"], timing["full_seconds"] / result["pairs"]
        speed = CORES / record["environment"]["threads"]
        for name, found in result["formats"].items():
            terabytes = found["bytes_per_document"] * documents / 1e12
            saved = full - timing["seconds"][name] / result["pairs"]
            rows.append(
                {
                    "system": record["system"],
                    "format": name,
                    "TB": terabytes,
                    MACHINES: int(np.ceil(terabytes * 1000 / MEMORY_GB)),
                    HOURS: build * documents / speed / 3600,
                    "break-even": build / saved if saved > 0 else np.inf,
                }
            )
    return pd.DataFrame(rows, columns=["system", "format", "TB", MACHINES, HOURS, "break-even"])
