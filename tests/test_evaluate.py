import math

import ir_measures
import numpy as np
import pandas as pd
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rankmamba.collection import load
from rankmamba.data.runs import sort_run
from rankmamba.errors import InputError
from rankmamba.evaluate import (
    BASELINE,
    MEASURES,
    PRIMARY,
    bootstrap_means,
    clustered,
    clusters,
    compare,
    detectable_difference,
    extremes,
    holm,
    mean_interval,
    paired_p,
    per_query,
    summarise,
)
from rankmamba.interpolation import FOLDS, WEIGHTS, best_weight, interpolate, interpolate_tuned, weight_values

IDS = [f"d{number}" for number in range(12)]


def make_run(scores: dict[str, dict[str, float]]) -> pd.DataFrame:
    rows = [(query_id, doc_id, score) for query_id, found in scores.items() for doc_id, score in found.items()]
    return sort_run(pd.DataFrame(rows, columns=["query_id", "doc_id", "score"]).astype({"score": float}))


def make_qrels(judged: dict[str, dict[str, int]]) -> pd.DataFrame:
    rows = [(query_id, doc_id, relevance) for query_id, found in judged.items() for doc_id, relevance in found.items()]
    return pd.DataFrame(rows, columns=["query_id", "doc_id", "relevance"])


def order(run: pd.DataFrame, query_id: str) -> list[str]:
    return run.loc[run["query_id"] == query_id, "doc_id"].tolist()


def by_hand(measure: str, ranking: list[str], judged: dict[str, int]) -> float:
    name, cutoff = measure.split("@")
    gains = [max(0, judged.get(doc_id, 0)) for doc_id in ranking[: int(cutoff)]]
    hits = [rank for rank, gain in enumerate(gains, 1) if gain]
    if name == "RR":
        return 1 / hits[0] if hits else 0.0
    if name == "AP":
        relevant = sum(relevance > 0 for relevance in judged.values())
        return sum(place / rank for place, rank in enumerate(hits, 1)) / relevant if relevant else 0.0
    ideal = sorted((max(0, relevance) for relevance in judged.values()), reverse=True)[: int(cutoff)]
    dcg, best = (sum(gain / math.log2(rank + 1) for rank, gain in enumerate(list_, 1)) for list_ in (gains, ideal))
    return dcg / best if best else 0.0


# few distinct scores, so that ties abound; scores that float32 cannot tell apart
some_scores = st.sampled_from([0.0, -1.5, 2.0, 2.0 + 1e-12, 1e30, 1e-30]) | st.floats(-1e6, 1e6)
some_runs = st.dictionaries(st.sampled_from("abcdz"), st.dictionaries(st.sampled_from(IDS), some_scores, min_size=1), min_size=1)
some_qrels = st.dictionaries(
    st.sampled_from("abcd"), st.dictionaries(st.sampled_from(IDS), st.integers(-1, 3), min_size=1), min_size=1
)


@settings(max_examples=150, deadline=None)
@given(some_runs, some_qrels)
def test_measures_equal_ir_measures_pytrec_eval_and_the_formulas(scores, judged):
    run, qrels = make_run(scores), make_qrels(judged)
    if not set(scores) & set(judged):
        with pytest.raises(InputError, match="judged queries"):
            per_query(run, qrels)
        return
    table = per_query(run, qrels)
    assert list(table.index) == sorted(judged) and list(table.columns) == list(MEASURES)
    for query_id, found in judged.items():
        for measure in MEASURES:
            assert table.loc[query_id, measure] == pytest.approx(by_hand(measure, order(run, query_id), found), abs=1e-9)
    strict = {query_id: {doc: -float(rank) for rank, doc in enumerate(order(run, query_id))} for query_id in scores}
    means = ir_measures.calc_aggregate([ir_measures.parse_measure(measure) for measure in MEASURES], judged, strict)
    for measure, value in means.items():
        assert table[str(measure)].mean() == pytest.approx(value, abs=1e-9)
    trec_names = {"ndcg_cut_10": "nDCG@10", "recip_rank": "RR@100", "map_cut_100": "AP@100"}
    evaluator = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut", "recip_rank", "map_cut"})
    for query_id, values in evaluator.evaluate(strict).items():
        for trec, measure in trec_names.items():
            assert table.loc[query_id, measure] == pytest.approx(values[trec], abs=1e-9)


def test_the_defaults_are_what_the_study_reports():
    assert (MEASURES, PRIMARY, BASELINE) == (("nDCG@10", "RR@10", "RR@100", "AP@100"), "RR@100", "bm25")
    values = reciprocal_ranks(100, 22)
    means = bootstrap_means([values[:, None]], 10_000, seed=0)
    assert np.array_equal(bootstrap_means([values[:, None]]), means)
    assert mean_interval(values)[1:] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=1e-12)
    tables = systems(bm25=values, x=np.roll(values, 1))
    pd.testing.assert_frame_equal(compare(tables), compare(tables, "bm25", "RR@100"))
    assert list(weight_values(MODEL, FIRST, make_qrels({"a": {"d3": 1}}))) == [n / 10 for n in range(11)]


def test_rank_decides_whatever_the_scores_and_the_row_order():
    run = make_run({"a": {"d1": 3, "d2": 2, "d3": 1}})
    upside_down = run.assign(score=run["score"].to_numpy()[::-1]).sample(frac=1, random_state=0)
    assert per_query(upside_down, make_qrels({"a": {"d1": 1}})).loc["a", "RR@10"] == 1.0


def test_judged_queries_decide_the_mean():
    run = make_run({"a": {"d1": 1}, "unjudged": {"d1": 1}})
    qrels = make_qrels({"a": {"d1": 1}, "missing from the run": {"d1": 1}, "nothing relevant": {"d1": 0}})
    table = per_query(run, qrels, ["RR@100"])
    assert table["RR@100"].to_dict() == {"a": 1.0, "missing from the run": 0.0, "nothing relevant": 0.0}
    assert per_query(run.iloc[:0], qrels)["RR@10"].mean() == 0.0


def test_rows_of_one_query_need_not_be_neighbours():
    run = make_run({"a": {"d1": 3, "d2": 2}, "b": {"d1": 1, "d2": 0}})
    qrels = make_qrels({"a": {"d2": 1}, "b": {"d1": 1, "d2": 2}})
    pd.testing.assert_frame_equal(per_query(run.iloc[[0, 2, 1, 3]], qrels.iloc[[1, 0, 2]]), per_query(run, qrels))


@pytest.mark.parametrize("name", ["nDCG@ten", "MRP@10", "RR@", "nDCG@10; import os", "", "nDCG@'a'"])
def test_an_unknown_measure_is_named(name):
    with pytest.raises(InputError, match="expected a measure such as nDCG@10"):
        per_query(make_run({"a": {"d1": 1}}), make_qrels({"a": {"d1": 1}}), [name])


def test_a_negative_relevance_counts_as_none_and_grades_that_trec_eval_cannot_hold_are_refused():
    run = make_run({"q": {"d0": 3.0, "d1": 2.0, "d2": 1.0}})
    spam = per_query(run, make_qrels({"q": {"d0": -2, "d1": 1, "d3": -5}}))
    assert spam.equals(per_query(run, make_qrels({"q": {"d0": 0, "d1": 1, "d3": 0}})))
    with pytest.raises(InputError, match="a relevance of at most 1,000, got 2,147,483,648"):
        per_query(run, make_qrels({"q": {"d0": 2**31}}))


def test_a_repeated_rank_or_document_is_refused():
    run, qrels = make_run({"a": {"d1": 2, "d2": 1}}), make_qrels({"a": {"d1": 1}})
    with pytest.raises(InputError, match="rank once per query"):
        per_query(run.assign(rank=1), qrels)
    with pytest.raises(InputError, match="doc_id once per query"):
        per_query(run.assign(doc_id="d1"), qrels)
    with pytest.raises(InputError, match="empty qrels"):
        per_query(run, qrels.iloc[:0])


def reciprocal_ranks(shape, seed=0):
    """Like RR@100 of one relevant document: a third never found, many at rank 1."""
    generator = np.random.default_rng(seed)
    ranks = np.minimum(generator.geometric(0.15, shape), 100)
    return np.where(generator.random(shape) < 0.3, 0.0, 1 / ranks)


def test_false_positive_rate_is_the_nominal_one_for_shuffled_systems():
    for queries in (43, 500):
        first, second = reciprocal_ranks(queries, 1), reciprocal_ranks(queries, 2)
        swaps = np.random.default_rng(3).choice([-1.0, 1.0], (20_000, queries))
        assert 0.04 <= (paired_p(swaps * (first - second)) < 0.05).mean() <= 0.06


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.dictionaries(st.sampled_from(IDS), st.integers(0, 1), min_size=1)))
def test_queries_are_of_one_cluster_if_a_chain_of_shared_relevant_documents_joins_them(judged):
    relevant = {query_id: {doc_id for doc_id, grade in found.items() if grade} for query_id, found in judged.items()}
    relevant = {query_id: doc_ids for query_id, doc_ids in relevant.items() if doc_ids}
    sets = [({query_id}, doc_ids) for query_id, doc_ids in relevant.items()]
    joined = []
    for queries, doc_ids in sets:
        for other in [other for other in joined if other[1] & doc_ids]:
            joined.remove(other)
            queries, doc_ids = queries | other[0], doc_ids | other[1]
        joined.append((queries, doc_ids))
    found = clusters(make_qrels(judged))
    assert set(found) == set(relevant)
    assert {frozenset(q for q in found if found[q] == number) for number in found.values()} == {frozenset(q) for q, _ in joined}


@pytest.mark.parametrize("joined, alone", [(200, 30), (80, 20), (53, 0)])
def test_where_chains_join_most_queries_each_is_tested_alone_and_no_more_is_found_than_there_is(joined, alone):
    names = [f"q{n}" for n in range(joined + alone)]
    cluster = clustered(names, dict.fromkeys(names[:joined], 0))
    assert len(set(cluster)) == joined + alone
    differences = np.random.default_rng(3).normal(0, 1, (4_000, joined + alone))
    assert 0.04 <= (paired_p(differences, cluster) < 0.05).mean() <= 0.06
    many = dict.fromkeys(names[: joined // 10], 0)
    assert len(set(clustered(names, many))) == joined + alone - joined // 10 + 1


@pytest.mark.parametrize("sizes", [[20] * 5, [10] * 9, [33] + [1] * 67, [40, 30, 10] + [2] * 10, [1] * 10], ids=lambda sizes: len(sizes))
@pytest.mark.parametrize("together", [0.0, 0.3])
def test_few_clusters_are_tested_with_few_degrees_of_freedom_and_intervals_are_as_much_wider(sizes, together):
    generator, names = np.random.default_rng(4), [f"q{n}" for n in range(sum(sizes))]
    cluster = clustered(names, dict(zip(names, np.repeat(range(len(sizes)), sizes).tolist(), strict=True)))
    assert cluster.max() + 1 == len(sizes)
    shape = 600, len(sizes)
    same, own = generator.normal(0, 1, shape)[:, cluster], generator.normal(0, 1, (600, len(names)))
    differences = np.sqrt(together) * same + np.sqrt(1 - together) * own
    assert (paired_p(differences, cluster) < 0.05).mean() <= 0.1
    baseline = pd.DataFrame({"RR@100": np.zeros(len(names))}, index=names)
    values = {"none": baseline} | {str(k): baseline + row[:, None] for k, row in enumerate(differences[:300])}
    table = compare(values, "none", shared=dict(zip(names, cluster.tolist(), strict=True)))
    assert ((table["low"] <= 0) & (0 <= table["high"])).mean() >= 0.92


def test_false_positive_rate_is_the_nominal_one_where_queries_of_a_cluster_go_together():
    generator = np.random.default_rng(23)
    cluster = np.sort(generator.integers(0, 120, 200))
    cluster = np.unique(cluster, return_inverse=True)[1]
    together = generator.normal(0, 1, (20_000, cluster.max() + 1))[:, cluster] + generator.normal(0, 0.5, (20_000, 200))
    assert 0.04 <= (paired_p(together, cluster) < 0.05).mean() <= 0.065
    assert (paired_p(together) < 0.05).mean() > 0.1
    low, high = np.quantile(bootstrap_means([row[:, None] for row in together[:800]], 1_000, 8, cluster), [0.025, 0.975], axis=0)
    assert 0.92 <= ((low <= 0) & (0 <= high)).mean() <= 0.97


def test_holm_keeps_the_family_wise_error_of_five_systems():
    differences = reciprocal_ranks((2_000, 5, 200), 4) - reciprocal_ranks((2_000, 5, 200), 5)
    any_found = [holm(p).min() < 0.05 for p in paired_p(differences)]
    assert 0.03 <= np.mean(any_found) <= 0.065


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_interval_of_a_mean_covers_it_as_often_as_it_says(seeds):
    # 800 experiments of 50 queries, whose true means are over all queries and, with several seeds, over all seeds
    generator = np.random.default_rng(6)
    population = reciprocal_ranks(100_000, 7)
    experiments = generator.choice(population, (800, 50))
    samples = [
        np.column_stack([values + (seeds > 1) * generator.normal(0, 0.03) + generator.normal(0, 0.2, 50) for _ in range(seeds)])
        for values in experiments
    ]
    low, high = np.quantile(bootstrap_means(samples, 1_000, seed=8), [0.025, 0.975], axis=0)
    covered = ((low <= population.mean()) & (population.mean() <= high)).mean()
    assert 0.93 <= covered <= 0.97


def test_the_interval_over_queries_agrees_with_scipy():
    values = reciprocal_ranks(400, 9)
    mean, low, high = mean_interval(values)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.002)
    assert mean_interval(values) == (mean, low, high)


def test_resampled_means_have_the_unbiased_variance_even_of_three_values():
    three = np.array([0.1, 0.4, 0.9])
    for sample in (three[:, None], np.tile(three, (50, 1))):  # three queries; three seeds on queries that all agree
        assert bootstrap_means([sample], 20_000).var() == pytest.approx(three.var(ddof=1) / 3, rel=0.05)


def test_seeds_that_disagree_widen_the_interval():
    values = reciprocal_ranks(200, 10)
    agreeing, disagreeing = np.column_stack([values] * 3), np.column_stack([values, values + 0.1, values - 0.1])
    (_, low, high), (_, wide_low, wide_high) = mean_interval(agreeing), mean_interval(disagreeing)
    assert high - low == pytest.approx(np.ptp(mean_interval(values)[1:]), abs=0.005)
    assert wide_high - wide_low > 1.5 * (high - low)


@pytest.mark.parametrize("values", [[], [0.1, math.nan], [math.inf]])
def test_an_interval_of_nothing_or_nan_is_refused(values):
    with pytest.raises(InputError, match="finite"):
        mean_interval(values)


def systems(**columns) -> dict[str, pd.DataFrame]:
    return {name: pd.DataFrame({"RR@100": list(values)}).rename(index=lambda n: f"q{n}") for name, values in columns.items()}


def test_compare_agrees_with_scipy_and_counts_wins_ties_and_losses():
    base, better, worse = reciprocal_ranks(300, 11), reciprocal_ranks(300, 12), reciprocal_ranks(300, 13)
    better, worse = np.minimum(1, better + 0.05), worse * 0.5
    table = compare(systems(better=better, bm25=base, same=base, worse=worse)).set_index("system")
    for name, values in {"better": better, "worse": worse}.items():
        row, differences = table.loc[name], values - base
        assert row["p"] == pytest.approx(stats.ttest_rel(values, base).pvalue, rel=1e-9)
        assert row["difference"] == pytest.approx(differences.mean())
        assert row["effect"] == pytest.approx(differences.mean() / differences.std(ddof=1))
        assert row["low"] < row["difference"] < row["high"]
        assert list(row[["wins", "ties", "losses"]]) == [(np.sign(differences) == sign).sum() for sign in (1, 0, -1)]
    same = table.loc["same"]
    assert (same["difference"], same["low"], same["high"], same["effect"], same["p"], same["ties"]) == (0, 0, 0, 0, 1, 300)
    assert list(table["p_holm"]) == pytest.approx(list(holm(table["p"])))


def test_holm_on_a_known_case():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.6, 0.9, 0.7]) == pytest.approx([1.0, 1.0, 1.0])


def test_the_interval_of_a_difference_is_paired():
    base = reciprocal_ranks(300, 14)
    table = compare(systems(bm25=base, shifted=base + 0.01)).iloc[0]
    assert table["high"] - table["low"] < 1e-12 and table["p"] < 1e-12


def test_seeds_of_a_system_are_averaged_per_query():
    base, runs = systems(bm25=reciprocal_ranks(100, 15)), [reciprocal_ranks(100, seed) for seed in (16, 17, 18)]
    tables = [systems(x=values)["x"] for values in runs]
    row = compare({**base, "x": tables}).iloc[0]
    assert row["p"] == pytest.approx(stats.ttest_rel(np.mean(runs, axis=0), base["bm25"]["RR@100"]).pvalue)
    assert summarise(tables)["RR@100"]["mean"] == pytest.approx(np.mean(runs))


def test_systems_on_different_queries_are_not_compared():
    tables = systems(bm25=[0.1, 0.2, 0.3], x=[0.1, 0.2])
    with pytest.raises(InputError, match="same queries, got 'q2' in one only"):
        compare(tables)
    with pytest.raises(InputError, match="got 'another order' in one only"):
        compare({"bm25": tables["bm25"], "x": tables["bm25"].iloc[::-1]})
    with pytest.raises(InputError, match="baseline among the systems x"):
        compare({"x": tables["x"]})
    with pytest.raises(InputError, match="among RR@100, got 'AP@100'"):
        compare(systems(bm25=[0.1], x=[0.2]), measure="AP@100")
    assert compare({"bm25": tables["bm25"]}).empty


def test_one_query_decides_nothing():
    assert compare(systems(bm25=[0.1], x=[0.9])).iloc[0]["p"] == 1.0


def test_rounding_is_neither_a_spread_nor_a_difference():
    tables = systems(bm25=[0.1, 0.2, 0.3], x=[0.3, 0.4, 0.5])
    assert tables["x"].sub(tables["bm25"]).iloc[:, 0].std() > 0 and compare(tables).iloc[0]["effect"] == 0.0
    cancelling = np.tile([0.1, 0.2, -0.3], 10)
    assert cancelling.mean() != 0 and paired_p(cancelling, np.arange(30) // 3) == 1.0


def test_a_detectable_difference_is_detected_as_often_as_it_says():
    pilot = reciprocal_ranks(5_000, 19) - reciprocal_ranks(5_000, 20)
    shift = detectable_difference(pilot)
    sample = np.random.default_rng(21).choice(pilot - pilot.mean(), (2_000, 5_000))
    assert 0.77 <= (paired_p(sample + shift) < 0.05).mean() <= 0.83
    with pytest.raises(InputError, match="at least 2 queries that share no"):
        detectable_difference([0.1])
    with pytest.raises(InputError, match="share no relevant document, got 1"):
        detectable_difference(pilot[:100], cluster=np.zeros(100, dtype=int))


FIRST = make_run({"a": {"d1": 9, "d2": 8, "d3": 7, "d5": 1, "d4": 1}, "b": {"d1": 2, "d2": 2}})
MODEL = make_run({"a": {"d1": -1, "d2": 0, "d3": 5}})


def test_interpolation_ends_are_the_first_stage_and_the_model_above_the_tail():
    columns = ["query_id", "doc_id", "rank"]
    pd.testing.assert_frame_equal(interpolate(MODEL, FIRST, 0)[columns], FIRST[columns])
    assert order(interpolate(MODEL, FIRST, 1), "a") == ["d3", "d2", "d1", "d4", "d5"]
    assert order(interpolate(MODEL, FIRST, 1), "b") == ["d1", "d2"]


@settings(max_examples=60, deadline=None)
@given(some_runs, st.data())
def test_the_ends_of_interpolation_are_exact_for_any_scores_and_any_top_k(scores, data):
    first = make_run(scores)
    top_k = data.draw(st.integers(0, 12))
    top = first[first["rank"] <= top_k]
    model = sort_run(
        top.assign(score=data.draw(st.lists(some_scores, min_size=len(top), max_size=len(top)))).astype({"score": float})
    )
    mixed = interpolate(model, first, 1)
    for query_id in scores:
        assert order(interpolate(model, first, 0), query_id) == order(first, query_id)
        assert order(mixed, query_id) == order(model, query_id) + order(first, query_id)[top_k:]


def test_interpolation_mixes_z_scores_of_the_scored_documents_only():
    run = interpolate(MODEL, FIRST, 0.25)
    model, first = stats.zscore([-1, 0, 5]), stats.zscore([9, 8, 7])
    expected = dict(zip(["d1", "d2", "d3"], 0.25 * model + 0.75 * first, strict=True))
    assert run.loc[run["query_id"] == "a"].set_index("doc_id")["score"].drop(["d4", "d5"]).to_dict() == pytest.approx(expected)
    pd.testing.assert_frame_equal(sort_run(run), run)


def test_interpolation_does_not_depend_on_the_units_of_the_model():
    scaled = make_run({"a": {"d1": 40 - 7, "d2": 40, "d3": 40 + 35}})
    assert order(interpolate(MODEL, FIRST, 0.4), "a") == order(interpolate(scaled, FIRST, 0.4), "a")
    constant = make_run({"a": {"d1": 0.1, "d2": 0.1, "d3": 0.1}})
    assert order(interpolate(constant, FIRST, 0.9), "a") == order(FIRST, "a")


def test_documents_below_the_scored_ones_keep_their_order_and_their_place():
    only_last = make_run({"a": {"d5": 0.0, "d3": 1.0}})
    assert order(interpolate(only_last, FIRST, 1), "a") == ["d3", "d5", "d1", "d2", "d4"]


def test_interpolation_refuses_what_it_cannot_mean():
    with pytest.raises(InputError, match="'d9' for 'a' and 0 more"):
        interpolate(make_run({"a": {"d9": 1}}), FIRST, 0.5)
    with pytest.raises(InputError, match="weight from 0"):
        interpolate(MODEL, FIRST, 1.1)
    with pytest.raises(InputError, match="finite scores"):
        interpolate(MODEL.assign(score=math.nan), FIRST, 0.5)


def test_the_best_weight_has_the_best_mean_and_is_the_smallest_of_equals():
    qrels = make_qrels({"a": {"d3": 1}})
    values = weight_values(MODEL, FIRST, qrels)
    best = values.mean().max()
    assert best == 1.0 and best_weight(values) == min(w for w in values if values[w].mean() == best) > 0
    for weight in values:
        assert values[weight].tolist() == per_query(interpolate(MODEL, FIRST, weight), qrels, ["RR@100"])["RR@100"].tolist()
    assert best_weight(weight_values(FIRST, FIRST, qrels)) == 0.0


def test_a_querys_judgement_has_no_say_in_the_weight_it_is_mixed_with():
    ids, generator = [f"q{n:02d}" for n in range(20)], np.random.default_rng(0)
    documents = [f"d{n}" for n in range(6)]
    first, model = (make_run({q: dict(zip(documents, generator.permutation(6), strict=True)) for q in ids}) for _ in range(2))
    dev = pd.DataFrame([[0.5] * 5 + [0.6] + [0.5] * 5], index=["dev query"], columns=WEIGHTS)
    judged = {q: {documents[generator.integers(6)]: 1} for q in ids}
    run, weights = interpolate_tuned(model, first, make_qrels(judged), dev)
    assert len(weights) == FOLDS and sorted(set(run["query_id"])) == ids
    values = weight_values(model, first, make_qrels(judged))
    for number, fold in enumerate(np.array_split(np.array(ids), FOLDS)):
        assert weights[number] == best_weight(pd.concat([dev, values.drop(fold)]))
        mixed = interpolate(model, first, weights[number])
        for query_id in fold:
            assert order(run, query_id) == order(mixed, query_id)
        changed = judged | {q: {d: 1 - judged[q].get(d, 0) for d in documents} for q in fold}
        assert interpolate_tuned(model, first, make_qrels(changed), dev)[1][number] == weights[number]
    assert len(set(weights)) > 1


def test_without_other_judgements_the_dev_queries_decide():
    dev = pd.DataFrame([[0.1] * 10 + [0.9]], index=["dev query"], columns=WEIGHTS)
    run, weights = interpolate_tuned(MODEL, FIRST, make_qrels({"a": {"d3": 1}}), dev)
    assert weights[0] == 1.0 and order(run, "a") == order(interpolate(MODEL, FIRST, 1.0), "a")


def test_an_identity_reranker_reproduces_the_first_stage_exactly():
    collection = load("rankmamba/tiny/test")
    candidates = collection.candidates
    reranked = sort_run(candidates[candidates["rank"] <= 10].sample(frac=1, random_state=0))
    again = interpolate(reranked, candidates, 1.0)
    assert per_query(again, collection.qrels).equals(per_query(candidates, collection.qrels))


def test_extremes_are_the_largest_wins_and_losses_with_their_queries_and_ties_are_neither():
    index = pd.Index(list("abcdef"), name="query_id")
    values = {
        "bm25": pd.DataFrame({"RR@100": [0.5, 0.5, 0.5, 0.5, 0.5, 0.0]}, index=index),
        "x": [pd.DataFrame({"RR@100": [1.0, 0.5, 0.1, 0.9, 0.2, row]}, index=index) for row in (0.0, 1.0)],
    }
    found = extremes(values, {name: name.upper() for name in index}, count=2)
    assert found["query"].tolist() == ["A", "F", "C", "E"]
    assert found["difference"].tolist() == pytest.approx([0.5, 0.5, -0.4, -0.3])
    assert found.iloc[1].tolist() == ["x", "F", 0.0, 0.5, 0.5]
