"""A reranked run mixed with its first stage: per query, standardised scores in a weighted sum, the weight chosen on other queries."""

import numpy as np
import pandas as pd

from .data.runs import sort_run
from .errors import InputError
from .evaluate import PRIMARY, per_query

WEIGHTS = tuple(step / 10 for step in range(11))  # of the model
FOLDS = 5


def interpolate(run: pd.DataFrame, candidates: pd.DataFrame, weight: float) -> pd.DataFrame:
    """Mix a reranked run with its first stage: weight * z(model) + (1 - weight) * z(first stage); returns a run.

    A reranker scores only the top of the candidates. The mix, and the mean and deviation of both z, are over the documents that
    the model scored, query by query (equal scores: z = 0). The other candidates follow in their first-stage order, as when a
    top-k is reranked; their scores count down from the lowest mixed one. Weight 1 gives exactly the model's order, 0 the first
    stage's (of the whole list, if the model scored a top-k), with places as scores.

    Raises:
        InputError: the weight is outside [0, 1], or a document is not a candidate of its query.
    """
    return _mix(_align(run, candidates), weight)


def weight_values(run: pd.DataFrame, candidates: pd.DataFrame, qrels: pd.DataFrame, measure: str = PRIMARY) -> pd.DataFrame:
    """A measure of `interpolate` for every weight: one row per judged query, one column per weight."""
    aligned = _align(run, candidates)
    return pd.DataFrame({weight: per_query(_mix(aligned, weight), qrels, [measure])[measure] for weight in WEIGHTS})


def best_weight(values: pd.DataFrame) -> float:
    """The weight with the best mean; of equally good ones the smallest, the one nearest the first stage."""
    means = values.mean()
    return float(means[means == means.max()].index.min())


def interpolate_tuned(
    run: pd.DataFrame, candidates: pd.DataFrame, qrels: pd.DataFrame, dev: pd.DataFrame, measure: str = PRIMARY
) -> tuple[pd.DataFrame, list[float]]:
    """Mix each fold of the queries with the weight that is best on the others and on the dev queries: (run, one weight per fold).

    dev: `weight_values` of the dev queries. Folds are contiguous in the order of the query ids; no query's judgements influence its
    own weight.
    """
    aligned, values = _align(run, candidates), weight_values(run, candidates, qrels, measure)
    query_ids, mixed, weights = np.sort(aligned["query_id"].unique()), [], []
    for fold in np.array_split(query_ids, min(FOLDS, len(query_ids))):
        weights.append(best_weight(pd.concat([dev, values[~values.index.isin(fold)]])))
        mixed.append(_mix(aligned[aligned["query_id"].isin(fold)], weights[-1]))
    return pd.concat(mixed, ignore_index=True), weights


def _align(run: pd.DataFrame, candidates: pd.DataFrame) -> pd.DataFrame:
    """The candidates in order; for `model` and `first` the z-scores and the place ("... order", best 0) over the scored ones."""
    scored = sort_run(run)[["query_id", "doc_id", "score"]].rename(columns={"score": "model"})
    both = sort_run(candidates).merge(scored, on=["query_id", "doc_id"], how="outer", indicator="found")
    alien = both[both["found"] == "right_only"]
    if len(alien):
        query_id, doc_id = alien.iloc[0][["query_id", "doc_id"]]
        raise InputError(f"expected only candidates of their query, got {doc_id!r} for {query_id!r} and {len(alien) - 1} more")
    both["first"] = both["score"].where(both["model"].notna())
    for column in ("model", "first"):
        values, groups = both[column], both.groupby("query_id")[column]
        both[f"{column} order"] = 1 - groups.rank(method="dense", ascending=False)
        equal = values.notna() & (groups.transform("max") == groups.transform("min"))
        both[column] = ((values - groups.transform("mean")) / groups.transform("std", ddof=0)).mask(equal, 0.0)
    return both.sort_values(["query_id", "rank"], ignore_index=True)


def _mix(aligned: pd.DataFrame, weight: float) -> pd.DataFrame:
    if not 0 <= weight <= 1:
        raise InputError(f"expected a weight from 0 (first stage) to 1 (model), got {weight}")
    if weight in (0, 1):  # exactly that order: a huge score among small ones would make small z-scores equal
        mixed = aligned["model order" if weight else "first order"]
    else:
        mixed = weight * aligned["model"] + (1 - weight) * aligned["first"]
    lowest = mixed.groupby(aligned["query_id"]).transform("min").fillna(0.0)
    place = mixed.isna().groupby(aligned["query_id"]).cumsum()
    return sort_run(aligned[["query_id", "doc_id"]].assign(score=mixed.fillna(lowest - place)))
