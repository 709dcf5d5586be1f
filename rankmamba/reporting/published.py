"""Figures published by others, each with its source and how reliable it is, beside ours on the same collection and measure."""

from pathlib import Path

import pandas as pd

from ..collection import UNIONS, load
from . import style
from .tables import tidy

PUBLISHED = Path(__file__).resolve().parents[2] / "data" / "published.csv"


def published() -> pd.DataFrame:
    """Read the table: system, collection, measure, value, candidates (what was reranked), sure, source.

    sure: "read" in the source, "second hand" (quoted by others) or "contradicted" (two that quote it differ).
    """
    return pd.read_csv(PUBLISHED, keep_default_na=False, dtype={"value": float})


def beside_ours(records: list[dict]) -> pd.DataFrame:
    """Return the published figures on MS MARCO documents and on what else `records` measure, `ours` beside them (mean over seeds).

    A system of ours that nobody published has a row without `value`; a published one that we did not measure has NaN as `ours`.
    A study on MS MARCO is split into what the papers report: RR@100 on dev, nDCG@10 on each TREC year.
    """
    keys = ["system", "collection", "measure"]
    ours = pd.concat([tidy(records)[[*keys, "value"]], _as_reported(records)], ignore_index=True)
    ours = ours.groupby(keys, as_index=False)["value"].mean().rename(columns={"value": "ours"})
    table = published()
    reported = set(table["collection"]) & set(ours["collection"])
    table = table[table["collection"].isin(reported) | table["collection"].str.startswith("msmarco-document/")]
    measured = ours[ours["collection"].isin(reported) & ours["measure"].isin(table["measure"])]
    table = table.merge(measured, on=keys, how="outer")
    table["best"] = table[["value", "ours"]].max(axis=1)
    table = table.sort_values(["collection", "measure", "best"], ascending=[True, True, False], ignore_index=True)
    return table[["collection", "measure", "system", "value", "ours", "candidates", "sure", "source"]]


def _as_reported(records: list[dict]) -> pd.DataFrame:
    """Our figures of a study on msmarco-document as the papers have them: system, collection, measure, value."""
    rows, parts = [], {}  # which queries are of which year: the report has the records, and maybe not the collection
    for record in records:
        parts |= record["result"].get("parts", {}) if record["kind"] == "queries" else {}
    for record in records:
        if record["kind"] != "evaluate" or record["collection"] not in UNIONS:
            continue
        base, result = record["collection"].rpartition("/")[0], record["result"]
        if "dev" in result:  # only the record of the mixture has it
            rows.append((style.base(record["system"]), f"{base}/dev", "RR@100", result["dev"]["alone"]["RR@100"]))
            continue
        values = result["per_query"]["nDCG@10"]
        for year in UNIONS[record["collection"]]:
            of_year = [values[query_id] for query_id in parts.get(year) or load(year).queries if query_id in values]
            if of_year:
                rows.append((record["system"], year, "nDCG@10", sum(of_year) / len(of_year)))
    return pd.DataFrame(rows, columns=["system", "collection", "measure", "value"])
