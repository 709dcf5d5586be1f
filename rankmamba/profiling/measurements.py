"""The measurements of notebook 05: each is made once and kept as a record; `profiling.tables` interprets them."""

import random
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from .. import scan
from ..collection import Collection, digest_of
from ..errors import InputError
from ..precision import autocast_dtype
from ..reranker import TOKENS_PER_THREAD
from ..results import environment, leave_record, read_records
from ..training.config import weights_in
from . import MODES, Subject, measure_together, timed
from .parts import TextPass, breakdown
from .shapes import depth_of

TOKENS = "random tokens"  # ends the collection of a record of speed
FIXED = 16  # pairs of a batch where batches are made in the given order
# where one differs, a measurement is made again; of a GPU only the first two: its host's processor hardly matters
MACHINE = ("device", "torch", "cpu", "threads", "glibc_tunables")


def speed(folder: str | Path, scale: str, systems: Sequence[str], cases: Sequence[tuple[int, int]], **settings) -> list[dict]:
    """Measure systems on random tokens, in turns; returns the record of each system and case, also of those measured before.

    cases: (pairs B, tokens L of a pair). settings: of `profiling.measure_together`. Published backbones fill the memory and are
    measured one after another.
    """
    records, longest = [], max(length for _, length in cases)
    for together in [list(group) for _, group in groupby(systems, key=lambda system: depth_of(system) and system)]:
        subjects: dict[str, Subject] = {}
        for batch, length in dict.fromkeys(cases):  # a further batch may be that of the length
            records += _speed(folder, scale, together, subjects, batch, length, longest, settings)
    return records


def _speed(folder, scale, systems, subjects, batch, length, longest, settings) -> list[dict]:
    """Measure one case; returns its records. A system is loaded, for the longest case, when it is first measured."""
    config, collection = {"batch": batch, "length": length, **settings}, f"{batch} x {length} {TOKENS}"
    configs = {system: config | weights_in([system]) for system in systems}
    done = {system: _found(folder, system, collection, configs[system]) for system in systems}
    lacking = [system for system in systems if done[system] is None]
    for system in lacking:
        if system not in subjects:
            subjects[system] = Subject(system, longest)
    measured = measure_together([subjects[system] for system in lacking], length, batch, **settings) if lacking else {}
    for system, timing in measured.items():
        result = {key: timing.pop(key) for key in ("parameters", "layers", "depths", "flops", "out_of_memory")}
        done[system] = _leave(folder, scale, system, collection, configs[system], result, timing, subjects[system].environment)
    return list(done.values())


def recorded(folders: Sequence[str | Path]) -> list[list[dict]]:
    """The records of speed in these folders: one list per folder and machine."""
    found: dict[tuple, list[dict]] = {}
    for folder in map(Path, folders):
        for record in read_records(folder, "profile") if (folder / "records").is_dir() else []:
            if record["collection"].endswith(TOKENS):
                found.setdefault((folder, *machine(record["environment"])), []).append(record)
    return list(found.values())


def texts(
    folder: str | Path,
    scale: str,
    systems: Sequence[str],
    collection: Collection,
    n_pairs: int,
    max_length: int,
    group_size: int = 8,
) -> list[dict]:
    """Measure where the time goes when systems read pairs of a collection's texts, and what batching by length saves.

    n_pairs: drawn queries and documents, whole groups of `group_size`. max_length: tokens of a pair. Returns the records.

    Raises:
        InputError: the pairs are not whole groups.
    """
    if n_pairs % group_size:
        raise InputError(f"expected whole groups of {group_size}, got {n_pairs} pairs; change n_pairs or group_size")
    draw = random.Random(0)
    queries, doc_ids = (
        draw.choices(list(collection.queries.values()), k=n_pairs),
        draw.sample(list(collection.documents), n_pairs),
    )
    documents = collection.documents.get_many(doc_ids)
    pairs = [(query, documents[doc_id]) for query, doc_id in zip(queries, doc_ids, strict=True)]
    config = {
        "n_pairs": n_pairs,
        "max_length": max_length,
        "batch_tokens": TOKENS_PER_THREAD,
        "group_size": group_size,
        "fixed": FIXED,
    } | digest_of([collection.name])
    records = []
    for system in systems:
        if record := _found(folder, system, collection.name, config):
            records.append(record)
            continue
        subject = Subject(system, max_length)
        given = {"reranker": subject.first, "pairs": pairs, "batch_tokens": TOKENS_PER_THREAD, "group_size": group_size}
        runs = {mode: TextPass(mode, **given) for mode in MODES}
        compared = {"by length": runs["inference"], f"{FIXED} at a time": TextPass("inference", fixed=FIXED, **given)}
        for run in (*runs.values(), *compared.values()):
            run()  # warms up
        turns = [{name: timed(run, subject.first.device) for name, run in compared.items()} for _ in range(3)]
        result = {
            "tokens": sum(runs["inference"].lengths),
            "padded_tokens": {name: run.padded_tokens() for name, run in compared.items()},
        }
        timing = {
            "parts": {mode: breakdown(run) for mode, run in runs.items()},
            "seconds": {name: float(np.median([turn[name] for turn in turns])) for name in compared},
        }
        records.append(_leave(folder, scale, system, collection.name, config, result, timing, subject.environment))
    return records


def machine(environment: dict) -> tuple:
    """What tells a record's machine from others."""
    return tuple(environment.get(key, "") for key in (MACHINE if environment["device"] == "cpu" else MACHINE[:2]))


def _found(folder, system: str, collection: str, config: dict) -> dict | None:
    """The record of the same measurement, made on the same machine with the same number format and kernel."""
    if not Path(folder).is_dir():
        return None
    here = machine(environment())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, kernel = str(autocast_dtype(device)[0]).removeprefix("torch."), scan.kernel(device).name
    for record in read_records(folder, "profile"):
        ran = record["environment"]
        same = machine(ran) == here and ran["dtype"] == dtype and ran["scan"] in ("none", kernel)
        if same and (record["system"], record["collection"], record["config"]) == (system, collection, config):
            return record
    return None


def _leave(folder, scale, system, collection, config, result, timing, ran) -> dict:
    return leave_record(folder, "profile", system, collection, scale, 0, config, result, timing, environment() | ran)
