"""Reranking that survives being killed: finished pieces are on the disk and are not computed again."""

import hashlib
import json
import os
import zlib
from dataclasses import astuple
from pathlib import Path

import pandas as pd
from tqdm.std import tqdm

from ..collection import Collection
from ..data.runs import head_of, sort_run
from ..files import alone, refusals
from ..reranker import Cost, Reranker

PAIRS = 1000  # (query, document) pairs of a piece: seconds of work, and enough to batch texts of similar length


class Journal:
    """The finished pieces of a long computation, in order: a line of JSON each, which is on the disk when `add` returns.

    of: what is computed, and from what; a file of something else is started over. A line that a kill left unfinished is cut
    off when the file is opened again.

    Raises:
        InputError: the disk is full or not writable.
    """

    def __init__(self, path: str | Path, of: dict):
        self.path, self.pieces = Path(path), []
        of = json.loads(json.dumps(of))  # as it will be read back
        with refusals(path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
            if lines and _decode(lines[0]) == of:
                kept = len(lines[0])
                for line in lines[1:]:
                    if (piece := _decode(line)) is None:
                        break
                    self.pieces.append(piece)
                    kept += len(line)
                os.truncate(self.path, kept)
            else:
                self.path.write_bytes(b"")
                self._append(of)

    def add(self, piece: dict) -> None:
        """Keep one more piece (JSON)."""
        with refusals(self.path):
            self._append(piece)
        self.pieces.append(piece)

    def _append(self, value: dict) -> None:
        text = json.dumps(value).encode()
        with open(self.path, "ab") as file:
            file.write(b"%08x %s\n" % (zlib.crc32(text), text))
            file.flush()
            os.fsync(file.fileno())


def _decode(line: bytes) -> dict | None:
    """Read one line of a journal; None if it is not as it was written."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    return json.loads(text) if line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(text) else None


def rerank(
    reranker: Reranker,
    candidates: pd.DataFrame,
    collection: Collection,
    top_k: int,
    path: str | Path,
    of: dict,
    show_progress_bar: bool = False,
    max_passages: int = 1,
) -> tuple[pd.DataFrame, Cost]:
    """As `Reranker.rerank`, a few queries at a time: (run, cost). What `path` already holds of this work is not done again.

    path: of the journal; the caller deletes it when the run is safe elsewhere. of: what else the scores depend on, such as the
    model. The pieces do not depend on where a run was stopped, so neither do the scores.

    Raises:
        InputError: as `Reranker.rerank`; or the disk is full or not writable.
    """
    head = head_of(candidates, top_k)
    digest = hashlib.sha256(pd.util.hash_pandas_object(head, index=False).to_numpy().tobytes()).hexdigest()
    of = of | {"top_k": top_k, "max_passages": max_passages, "pairs": PAIRS, "candidates": digest}
    of |= {"precision": reranker.precision, "device": reranker.device.type}
    with alone(Path(path).with_name(f".{Path(path).stem}.lock"), f"another process computes {path}; waiting for it"):
        return _rerank(reranker, collection, head, top_k, Journal(path, of), show_progress_bar, max_passages)


def _rerank(reranker, collection, head, top_k, journal, show_progress_bar, max_passages):
    query_ids, size = head["query_id"].unique(), max(1, PAIRS // max(1, top_k))
    with tqdm(total=len(head), unit="pair", desc="reranking", mininterval=1, disable=not show_progress_bar) as bar:
        for place, start in enumerate(range(0, len(query_ids), size)):
            if place >= len(journal.pieces):
                piece = head[head["query_id"].isin(query_ids[start : start + size])]
                run = reranker.rerank(piece, collection, top_k, max_passages=max_passages)
                columns = run[["query_id", "doc_id", "score"]].to_dict("list")
                journal.add({"run": columns, "cost": astuple(reranker.cost)})
            bar.update(len(journal.pieces[place]["run"]["score"]))
    runs = [pd.DataFrame(piece["run"]) for piece in journal.pieces]
    cost = sum((Cost(*piece["cost"]) for piece in journal.pieces), Cost())
    return sort_run(pd.concat(runs) if runs else head), cost
