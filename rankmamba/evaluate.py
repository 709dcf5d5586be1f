"""Measures, intervals and paired tests.

A run is measured by its `rank` column, which `runs.sort_run` made with the one tie rule: tools that see only scores break
ties in their own ways (trec_eval by larger doc_id, MS MARCO by smaller). Every mean is over the judged queries.
"""

import subprocess
from collections.abc import Mapping, Sequence

import ir_measures
import numpy as np
import pandas as pd
from scipy import sparse, stats

from .errors import InputError

MEASURES = ("nDCG@10", "RR@10", "RR@100", "AP@100")
PRIMARY = "RR@100"
BASELINE = "bm25"
RESAMPLES = 10_000
FEW_CLUSTERS, MANY_CLUSTERS = 3, 100  # fewer allow no test by clusters; from so many on t's quantiles are the normal ones to 1%
POWER = 0.8  # of a difference that counts as detectable
ROUNDING = 1e-12  # smaller differences count as none
MAX_RELEVANCE = 1_000  # trec_eval allocates an array of this length
BOUNDS = (0.025, 0.975)  # of every interval
Tables = pd.DataFrame | Sequence[pd.DataFrame]  # what `per_query` returns, or one such table per seed of a system


def parse_measure(name: str) -> ir_measures.Measure:
    """Parse a measure as people write it: nDCG@10, RR@100, AP(rel=2)@100, P@5 ... (ir_measures' names).

    Raises:
        InputError: there is no such measure.
    """
    try:
        measure = ir_measures.parse_measure(name)
        measure.validate_params()
        return measure
    except (ValueError, NameError, TypeError, KeyError, AssertionError, RecursionError, MemoryError) as error:
        raise InputError(f"expected a measure such as {', '.join(MEASURES)}, got {name!r:.80} (ir_measures: {error})") from error


def per_query(run: pd.DataFrame, qrels: pd.DataFrame, measures: Sequence[str] = MEASURES) -> pd.DataFrame:
    """Measure a run: a table with one row per judged query (index query_id, sorted) and one column per measure, in [0, 1].

    As in ir_measures and `trec_eval -c`: a judged query that the run lacks counts 0, and so does one whose judgements name no
    relevant document; queries without judgements are left out. Only the order by `rank` counts, never the scores. A negative
    relevance counts as 0.

    Raises:
        InputError: an unknown measure, no judgements, a relevance above 1,000, a rank or document twice in one query, or none of
            the judged queries.
    """
    parsed = {name: parse_measure(name) for name in measures}
    if qrels.empty:
        raise InputError("expected at least one judgement, got empty qrels")
    if (highest := qrels["relevance"].max()) > MAX_RELEVANCE:
        raise InputError(f"expected a relevance of at most {MAX_RELEVANCE:,}, got {highest:,}; grade on a smaller scale")
    for column in ("rank", "doc_id"):
        twice = run.duplicated(["query_id", column])
        if twice.any():
            query_id, value = run.loc[twice, ["query_id", column]].iloc[0]
            raise InputError(f"expected each {column} once per query, got {value!r} again for {query_id!r}; use sort_run first")
    judged = _nested(qrels, qrels["relevance"].astype(int).clip(lower=0))  # trec_eval counts by grade, in an array
    # whole numbers: trec_eval keeps scores in float32, where close ones would become ties
    ranked = {query_id: found for query_id, found in _nested(run, -run["rank"].astype(float)).items() if query_id in judged}
    if not ranked and len(run):
        found = f"{run['query_id'].iloc[0]!r} and others, none of them judged"
        raise InputError(f"expected judged queries such as {next(iter(judged))!r} in the run, got {found}")
    table = pd.DataFrame(0.0, index=pd.Index(sorted(judged), name="query_id"), columns=list(measures))
    for name, measure in parsed.items():
        try:
            values = {value.query_id: value.value for value in ir_measures.iter_calc([measure], judged, ranked)}
        except (ValueError, subprocess.CalledProcessError) as error:
            raise InputError(f"expected a measure that ir_measures can compute here, got {name!r}: {error}") from error
        table[name] = pd.Series(values, dtype=float).reindex(table.index).fillna(0.0)
    return table


def _nested(table: pd.DataFrame, values: pd.Series) -> dict[str, dict[str, float]]:
    """{query_id: {doc_id: value}}."""
    nested: dict[str, dict[str, float]] = {}
    for query_id, doc_id, value in zip(table["query_id"].tolist(), table["doc_id"].tolist(), values.tolist(), strict=True):
        nested.setdefault(query_id, {})[doc_id] = value
    return nested


def clusters(qrels: pd.DataFrame) -> dict[str, int]:
    """{query_id: its cluster}: queries that share a relevant document, directly or through others, form one cluster.

    How well a system handles a document shows in all of its queries, so these are not independent draws; clusters are. A query
    without a relevant document is left out: it is a cluster of its own.
    """
    relevant = qrels[qrels["relevance"] > 0]
    query, query_ids = pd.factorize(relevant["query_id"])
    document, doc_ids = pd.factorize(relevant["doc_id"])
    nodes = len(query_ids) + len(doc_ids)
    links = sparse.coo_array((np.ones(len(relevant)), (query, len(query_ids) + document)), shape=(nodes, nodes))
    _, found = sparse.csgraph.connected_components(links, directed=False)
    return dict(zip(query_ids, found[: len(query_ids)].tolist(), strict=True))


def clustered(query_ids: Sequence[str], given: Mapping[str, int] | None) -> np.ndarray:
    """The clusters of these queries, int (n,), numbered from 0; a query without a given cluster is one of its own.

    Where chains of graded judgements join nearly all queries, so that fewer than `FEW_CLUSTERS` are left (`effective`), there is no test
    by clusters: each query is one of its own, and what is found holds for other queries about these documents only.
    """
    found = pd.factorize(np.array([(given or {}).get(query_id, query_id) for query_id in query_ids], dtype=object))[0]
    return found if effective(found, len(found)) >= FEW_CLUSTERS else np.arange(len(found))


def effective(cluster: np.ndarray | None, queries: int) -> float:
    """How many clusters of one size would make a mean vary as these do: n squared over the sum of the squared sizes; without any, n."""
    return queries if cluster is None else queries**2 / (np.bincount(cluster) ** 2).sum()


def bootstrap_means(
    samples: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0, cluster: np.ndarray | None = None
) -> np.ndarray:
    """Return (resamples, K): means of K samples (n queries, seeds), the same queries drawn for all, seeds drawn for each.

    cluster: int (n,), numbered from 0; whole clusters are drawn (default: each query alone). n-1 of n are drawn with replacement,
    which makes the variance of the resampled mean unbiased (Rao & Wu 1988); with n of n it is too small by (n-1)/n, which matters for
    3 seeds. Queries and seeds are drawn separately and their deviations from the mean added, so what varies with both counts twice,
    which is a little conservative. A single seed says nothing about the spread over seeds.
    """
    generators = np.random.default_rng(seed).spawn(len(samples) + 1)
    cluster = np.arange(len(samples[0])) if cluster is None else cluster
    sizes = np.bincount(cluster)
    totals = np.column_stack([np.bincount(cluster, sample.mean(axis=1)) for sample in samples])
    means = np.empty((resamples, len(samples)))
    block = max(1, 100_000 // len(sizes))  # a block that fits the processor's cache is five times as fast
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        shares = _draw(generators[0], stop - start, len(sizes))
        means[start:stop] = shares @ totals / (shares @ sizes)[:, None]
    for k, sample in enumerate(samples):
        if sample.shape[1] > 1:
            by_seed = sample.mean(axis=0)
            means[:, k] += _draw(generators[k + 1], resamples, len(by_seed)) @ (by_seed - by_seed.mean())
    return means


def _draw(generator: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """(rows, size): the share of each of `size` things in size-1 draws with replacement, row by row."""
    draws = max(1, size - 1)
    picked = generator.integers(0, size, (rows, draws), dtype=np.int32)
    cells = picked + np.arange(rows, dtype=np.int64)[:, None] * size
    return np.bincount(cells.ravel(), minlength=rows * size).reshape(rows, size) / draws


def mean_interval(values) -> tuple[float, float, float]:
    """(mean, low, high: 95%) of values (n queries,) or (n queries, seeds): bootstrap over queries and, if several, seeds.

    Each query counts as independent.

    Raises:
        InputError: there are no values, or one is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    return _mean_intervals([sample[:, None] if sample.ndim == 1 else sample], None)[0]


def summarise(tables: Tables, shared: Mapping[str, int] | None = None) -> dict[str, dict[str, float]]:
    """{measure: {"mean", "low", "high"}} of one `per_query` table, or of several, one for each seed of a system.

    shared: the `clusters` of the queries.
    """
    tables = seeds_of(tables)
    _same_queries({f"seed {k}": table for k, table in enumerate(tables)})
    measures = list(tables[0].columns)
    samples = [by_seed(tables, measure) for measure in measures]
    intervals = _mean_intervals(samples, clustered(tables[0].index, shared))
    return {measure: dict(zip(("mean", "low", "high"), intervals[k], strict=True)) for k, measure in enumerate(measures)}


def _mean_intervals(samples: list[np.ndarray], cluster: np.ndarray | None) -> list[tuple[float, float, float]]:
    for sample in samples:
        if sample.size == 0 or not np.isfinite(sample).all():
            raise InputError(f"expected finite values, got {sample.size}, of them {(~np.isfinite(sample)).sum()} not finite")
    means = np.array([sample.mean() for sample in samples])
    low, high = _bounds(bootstrap_means(samples, cluster=cluster), means, len(samples[0]), cluster)
    least, most = np.array([(sample.min(), sample.max()) for sample in samples]).T  # percentiles never are beyond
    return list(zip(means.tolist(), low.clip(least).tolist(), high.clip(max=most).tolist(), strict=True))


def _bounds(resampled: np.ndarray, mean: np.ndarray, queries: int, cluster: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The interval from resampled means (resamples, K) around the means (K,): their percentiles, as much further out as t's are than the
    normal distribution's where clusters are few and percentiles too narrow."""
    low, high = np.quantile(resampled, BOUNDS, axis=0)
    groups = effective(cluster, queries)
    wider = stats.t.ppf(BOUNDS[1], groups - 1) / stats.norm.ppf(BOUNDS[1]) if 1 < groups < MANY_CLUSTERS else 1.0
    return mean - wider * (mean - low), mean + wider * (high - mean)


def standard_error(differences: np.ndarray, cluster: np.ndarray | None = None) -> np.ndarray:
    """Standard error of the mean of differences (..., n queries); cluster: int (n,), numbered from 0, default each query alone.

    Deviations from the mean are summed within a cluster first, so queries of one cluster may be correlated (the CR1 estimator for a mean).
    """
    cluster = np.arange(differences.shape[-1]) if cluster is None else cluster
    order, sizes = np.argsort(cluster, kind="stable"), np.bincount(cluster)
    deviations = (differences - differences.mean(axis=-1, keepdims=True))[..., order]
    totals = np.add.reduceat(deviations, np.cumsum(sizes) - sizes, axis=-1)
    return np.sqrt((totals**2).sum(axis=-1) * len(sizes) / (len(sizes) - 1)) / len(cluster)


def paired_p(differences: np.ndarray, cluster: np.ndarray | None = None) -> np.ndarray:
    """Two-sided p of the paired t-test of differences (..., n queries); 1 where all are 0 or there is only one query.

    cluster: as in `standard_error`; t then has as many degrees of freedom as there are `effective` clusters, less one.
    """
    differences = np.asarray(differences, dtype=np.float64)
    groups = effective(cluster, differences.shape[-1])
    if groups <= 1:
        return np.ones(differences.shape[:-1])
    mean, error = differences.mean(axis=-1), standard_error(differences, cluster)
    mean, error = (np.where(np.abs(found) < ROUNDING, 0.0, found) for found in (mean, error))
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stats.t.sf(np.abs(mean / error), groups - 1)
    return np.where((mean == 0) & (error == 0), 1.0, p)


def holm(p: Sequence[float]) -> np.ndarray:
    """p values adjusted for their number by Holm's step-down procedure (1979), in the given order."""
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def compare(
    values: Mapping[str, Tables],
    baseline: str = BASELINE,
    measure: str = PRIMARY,
    shared: Mapping[str, int] | None = None,
) -> pd.DataFrame:
    """Compare systems with a baseline; one row per system: system, difference, low, high, effect, p, p_holm, wins, ties, losses.

    values: {system: its `per_query` table, or a list of them, one per seed}, all on the same queries. difference: system minus
    baseline, with a paired bootstrap interval over queries and seeds. effect: the mean difference over its standard deviation
    across queries. p: paired t-test over queries, on means over seeds. p_holm: adjusted for the number of systems. wins: queries
    that the system ranks better. shared: the `clusters` of the queries, for intervals and p; default: each query is independent.

    Why the t-test: on measures like these its errors are those of the randomisation test or smaller (Smucker et al., CIKM 2007;
    Urbano et al., SIGIR 2019), it needs no random numbers and has no smallest p. It is about new queries for these trained
    models; what other seeds would give is in the interval only.

    Raises:
        InputError: the baseline or the measure is missing, or two systems were measured on different queries.
    """
    if baseline not in values:
        raise InputError(f"expected the baseline among the systems {', '.join(values)}, got {baseline!r}")
    tables = {system: seeds_of(given) for system, given in values.items()}
    _same_queries({f"{system} ({k})": table for system, given in tables.items() for k, table in enumerate(given)})
    samples = {system: by_seed(given, measure) for system, given in tables.items()}
    reference = samples.pop(baseline)
    cluster = clustered(tables[baseline][0].index, shared)
    means = bootstrap_means([reference, *samples.values()], cluster=cluster)
    differences = np.array([sample.mean(axis=1) - reference.mean(axis=1) for sample in samples.values()])
    differences = differences.reshape(len(samples), len(reference))  # holds if there is only the baseline, too
    differences[np.abs(differences) < ROUNDING] = 0.0  # rounding in the mean over seeds is not a win
    mean = differences.mean(axis=1)
    low, high = _bounds(means[:, 1:] - means[:, :1], mean, len(reference), cluster)
    spread = differences.std(axis=1, ddof=1) if len(reference) > 1 else np.zeros_like(mean)
    p = paired_p(differences, cluster)
    return pd.DataFrame(
        {
            "system": list(samples),
            "difference": mean,
            "low": low,
            "high": high,
            "effect": np.divide(mean, spread, out=np.zeros_like(mean), where=spread > ROUNDING),
            "p": p,
            "p_holm": holm(p),
            "wins": (differences > 0).sum(axis=1),
            "ties": (differences == 0).sum(axis=1),
            "losses": (differences < 0).sum(axis=1),
        }
    )


def by_seed(given: Tables, measure: str) -> np.ndarray:
    """(n queries, seeds) of one measure.

    Raises:
        InputError: the measure is missing.
    """
    tables = seeds_of(given)
    for table in tables:
        if measure not in table.columns:
            raise InputError(f"expected a measure among {', '.join(map(str, table.columns))}, got {measure!r}")
    return np.column_stack([table[measure].to_numpy(dtype=np.float64) for table in tables])


def extremes(
    values: Mapping[str, Tables], queries: Mapping[str, str], baseline: str = BASELINE, measure: str = PRIMARY, count: int = 3
) -> pd.DataFrame:
    """The queries that each system wins and loses by most against the baseline, at most `count` of each.

    values: as in `compare`, means over seeds are compared. queries: {query_id: text}. One row per query: system, query, the baseline's
    and the system's value, difference; of equal differences the smaller query_id comes first.
    """
    query_ids = seeds_of(values[baseline])[0].index
    means = pd.DataFrame({system: by_seed(given, measure).mean(axis=1) for system, given in values.items()}, index=query_ids)
    rows = []
    for system in means.columns.drop(baseline):
        difference = (means[system] - means[baseline]).round(12)  # rounding in the mean over seeds is not a win
        won, lost = difference[difference > 0].nlargest(count), difference[difference < 0].nsmallest(count)
        for query_id in [*won.index, *lost.index]:
            row = means.loc[query_id]
            rows.append((system, queries[query_id], row[baseline], row[system], difference[query_id]))
    return pd.DataFrame(rows, columns=["system", "query", f"{baseline}'s {measure}", f"own {measure}", "difference"])


def seeds_of(given: Tables) -> list[pd.DataFrame]:
    """The tables of a system, one for each seed."""
    return [given] if isinstance(given, pd.DataFrame) else list(given)


def _same_queries(tables: dict[str, pd.DataFrame]) -> None:
    """Check that all tables have the same queries in the same order."""
    (first, reference), *others = tables.items()
    for name, table in others:
        if not table.index.equals(reference.index):
            alone = sorted(set(reference.index) ^ set(table.index)) or ["another order"]
            raise InputError(f"expected {first} and {name} to be measured on the same queries, got {alone[0]!r} in one only")


def detectable_difference(differences, alpha: float = 0.05, cluster: np.ndarray | None = None) -> float:
    """The smallest true mean difference that a paired t-test on as many queries detects with 80% power (by the shift of t).

    differences: per query, between two systems like those in question; only their spread counts. cluster: as in `standard_error`.
    For Holm over k systems pass alpha / k.

    Raises:
        InputError: fewer than two queries, or clusters.
    """
    differences = np.asarray(differences, dtype=np.float64)
    groups = effective(cluster, len(differences))
    if groups <= 1:
        raise InputError(f"expected at least 2 queries that share no relevant document, got {groups:.0f}")
    return float(stats.t.ppf([1 - alpha / 2, POWER], groups - 1).sum() * standard_error(differences, cluster))
