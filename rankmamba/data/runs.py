"""Runs: who ranked which documents for which query, as a DataFrame query_id (str), doc_id (str), score (float64), rank (int, from 1).

Their one order and tie rule (`sort_run`), and their files in the TREC format.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import InputError
from ..files import replacing
from .lines import checked_id, numbers, read_lines, refuse_duplicates

RUN_COLUMNS = ["query_id", "doc_id", "score", "rank"]


def sort_run(run: pd.DataFrame, path: str | Path | None = None) -> pd.DataFrame:
    """Put a run into the order used everywhere: by query_id, then score descending, then doc_id ascending; ranks count from 1.

    Ids are compared as strings, character by character. Ties are broken here and nowhere else. `path` is the file that the run
    was read from, for messages.

    Raises:
        InputError: a column is missing, an id is not a string, a score is not finite, or a query has a document twice.
    """
    missing = [column for column in RUN_COLUMNS[:3] if column not in run.columns]
    if missing:
        raise InputError(f"expected a run with columns query_id, doc_id and score, got none called {', '.join(missing)}")
    codes, names = {}, {}
    for column in ("query_id", "doc_id"):
        codes[column], names[column] = pd.factorize(run[column].to_numpy(dtype=object), sort=False)
        wrong = [value for value in names[column] if not isinstance(value, str)]
        if wrong or (codes[column] < 0).any():
            raise InputError(f"expected strings as {column} in a run, got {wrong[0] if wrong else None!r}; convert the column")
        order = np.argsort(names[column], kind="stable")
        position = np.empty(len(order), dtype=np.int64)
        position[order] = np.arange(len(order))
        codes[column], names[column] = position[codes[column]], names[column][order]
    scores = pd.to_numeric(run["score"], errors="coerce").to_numpy(dtype=np.float64)
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise InputError(
            f"expected finite scores, got {run['score'].iloc[row]} for query {run['query_id'].iloc[row]!r}, "
            f"document {run['doc_id'].iloc[row]!r}"
        )
    order = np.lexsort((codes["doc_id"], -scores, codes["query_id"]))
    queries = codes["query_id"][order]
    first = np.searchsorted(queries, queries)
    result = pd.DataFrame(
        {
            "query_id": names["query_id"][queries],
            "doc_id": names["doc_id"][codes["doc_id"][order]],
            "score": scores[order],
            "rank": np.arange(len(order)) - first + 1,
        }
    )
    pairs = np.sort(codes["query_id"] * max(1, len(names["doc_id"])) + codes["doc_id"])
    if (pairs[1:] == pairs[:-1]).any():
        refuse_duplicates(run, "a run", path)
    return result


def head_of(run: pd.DataFrame, top_k: int) -> pd.DataFrame:
    """Return the rows of the `top_k` best documents of each query, by the run's ranks or, where it has none, by its scores.

    Raises:
        InputError: a column is missing, or ranks do not count from 1.
    """
    missing = [column for column in RUN_COLUMNS[:2] if column not in run.columns]
    if missing:
        raise InputError(
            f"expected a run with columns query_id and doc_id, got none called {', '.join(missing)}; rename the columns"
        )
    if "rank" not in run.columns:
        run = sort_run(run)
    ranks = pd.to_numeric(run["rank"], errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    counted = (ranks >= 1) & np.isfinite(ranks)
    if not counted.all():
        wrong = run["rank"][~counted].iloc[0]
        raise InputError(f"expected ranks from 1, got {wrong}; drop the column to rank by scores")
    return run[ranks <= top_k]


def read_run(path: str | Path) -> pd.DataFrame:
    """Read a TREC run (query_id, Q0, doc_id, rank, score, tag). Order and ranks follow the scores, by the tie rule of `sort_run`.

    An empty file is a run without results.

    Raises:
        InputError: a line does not have six columns, a rank or score is not a number, a score is not finite, or a document occurs twice.
    """
    query_ids, doc_ids, ranks, scores = [], [], [], []
    seen: dict[str, str] = {}  # one string object for each id and rank, however many lines name it
    for number, _, line in read_lines(Path(path)):
        try:
            query_id, _, doc_id, rank, score, _ = line.split()
        except ValueError:
            raise InputError(
                f"expected 6 columns (query_id, Q0, doc_id, rank, score, tag), got {len(line.split())} "
                f"({path}:{number}): {line[:80]!r}"
            ) from None
        query_ids.append(seen.setdefault(query_id, query_id))
        doc_ids.append(seen.setdefault(doc_id, doc_id))
        ranks.append(seen.setdefault(rank, rank))
        scores.append(score)
    numbers(ranks, int, "a whole number as rank", path)
    values = numbers(scores, float, "a finite number as score", path)
    return sort_run(pd.DataFrame({"query_id": query_ids, "doc_id": doc_ids, "score": values}), path)


def write_run(path: str | Path, run: pd.DataFrame, tag: str) -> None:
    """Write a run in the TREC format, scores with all their digits, so that `read_run` gives the same run back."""
    checked_id(tag, "tag", path)
    run = sort_run(run)
    for column in ("query_id", "doc_id"):
        for name in run[column].unique():
            checked_id(name, column, path)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as handle:
        columns = (run[column].tolist() for column in RUN_COLUMNS)
        handle.writelines(f"{query} Q0 {doc} {rank} {score!r} {tag}\n" for query, doc, score, rank in zip(*columns, strict=True))
