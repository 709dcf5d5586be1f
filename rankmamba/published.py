"""Figures that others published, each with its source and how sure it is, beside our own on the same collection and measure."""

from pathlib import Path

import pandas as pd

from .tables import tidy

PUBLISHED = Path(__file__).resolve().parent.parent / "data" / "published.csv"
SURE = {
    "read": "read in the source named",
    "second hand": "quoted by others; the source itself was not seen",
    "contradicted": "second hand, and two who quote it differ",
}


def published() -> pd.DataFrame:
    """Read the table: system, collection, measure, value, candidates (what was reranked), sure (a key of `SURE`), source."""
    return pd.read_csv(PUBLISHED, keep_default_na=False, dtype={"value": float})


def beside_ours(records: list[dict]) -> pd.DataFrame:
    """Return the published figures on MS MARCO documents and on what else `records` measure, best first, with `ours` beside them.

    Ours, a mean over seeds, stands where a system of ours has the same name and is measured alike; elsewhere it is NaN.
    """
    keys = ["system", "collection", "measure"]
    ours = tidy(records).groupby(keys, as_index=False)["value"].mean().rename(columns={"value": "ours"})
    table = published().merge(ours, on=keys, how="left")
    table = table[table["collection"].isin(ours["collection"]) | table["collection"].str.startswith("msmarco-document/")]
    table = table.sort_values(["collection", "measure", "value"], ascending=[True, True, False], ignore_index=True)
    return table[["collection", "measure", "system", "value", "ours", "candidates", "sure", "source"]]
