"""Architecture against architecture: every pair once, the better first, corrected for all, and only what is shown is claimed."""

import re
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from rankmamba.evaluate import compare, holm
from rankmamba.pairwise import across, claim, pairwise, trained_alike


def table(seed, gain=0.0, queries=200):
    rng = np.random.default_rng(seed)
    values = np.clip(rng.random(queries) * 0.5 + gain, 0, 1)
    return pd.DataFrame({"RR@100": values}, index=pd.Index([f"q{i:03d}" for i in range(queries)], name="query_id"))


VALUES = {
    "bm25": table(0),
    "nano-bert": table(1),
    "nano-mamba": [table(2, 0.3), table(3, 0.3)],
    "nano-neox": table(4),
    "nano-mamba + bm25": table(5),
    "minilm-l6": table(6),
}
PAIRS = [("nano-bert", "nano-mamba"), ("nano-bert", "nano-neox"), ("nano-mamba", "nano-neox")]


def two(first, second) -> pd.DataFrame:
    """Compare nano-bert with nano-mamba."""
    return pairwise({"nano-bert": first, "nano-mamba": second}, [("nano-bert", "nano-mamba")])


def trained(system, steps=10, parameters=3_000_000, note="", partial=False, scan=None, **config) -> dict:
    recipe = dict(batch_size=4, group_size=8, epochs=1.0, warmup=0.1, weight_decay=0.01, loss="lce", teacher=None)
    recipe |= dict(max_length=160, max_query_length=32)
    result = {"steps": steps, "partial": partial, "parameters_outside_embeddings": parameters}
    scans = re.search("mamba|hybrid", system) if scan is None else scan
    attends = "mamba" not in system if scan is None else not scan
    return {
        "kind": "train",
        "system": system,
        "collection": "rankmamba/nq/train",
        "note": note,
        "config": recipe | {"learning_rate": 1e-3} | config,
        "result": result,
        "environment": {
            "scan": "native" if scans else "none",
            "attention": "sdpa: here" if attends else "none: the backbone has no attention",
        },
    }


RECORDS = [trained(f"nano-{name}") for name in ("bert", "hybrid", "mamba", "mamba2", "neox")]


def test_only_systems_that_were_trained_alike_are_paired():
    records = [trained(system) for system in ("nano-neox", "nano-bert")] + [trained("nano-mamba", learning_rate=5e-4)]
    others = [
        trained("minilm-l6", note="trained on these queries by its authors"),
        trained("bert-large", parameters=303_000_000),
        trained("longer", steps=11),
        trained("distilled", loss="distil", teacher="minilm-l6"),
        trained("stopped", partial=True),
        trained("other groups", group_size=2),
    ]
    assert trained_alike([*others, *records, {"kind": "evaluate", "system": "bm25"}]) == PAIRS
    published = [trained("bert-base", parameters=86_000_000), trained("mamba-130m", parameters=91_000_000)]
    assert trained_alike([*others, *records, *published]) == [("bert-base", "mamba-130m"), *PAIRS]


def test_pairs_of_which_a_system_was_not_measured_are_left_out():
    assert pairwise(VALUES, [("nano-bert", "nano-opt")]).empty


def test_queries_of_one_cluster_count_as_one_draw():
    once, twice = (
        {name: table(seed, gain, 50) for name, seed, gain in (("nano-bert", 1, 0.0), ("nano-mamba", 2, 0.05))} for _ in "ab"
    )
    for name, values in once.items():
        twice[name] = pd.concat([values, values.rename(index=lambda query_id: query_id + "again")])
    shared = {query_id: int(query_id[1:4]) for query_id in twice["nano-bert"].index}
    alone, together = (pairwise(*given).iloc[0] for given in ((once, PAIRS[:1]), (twice, PAIRS[:1], "RR@100", shared)))
    for name in ("difference", "low", "high", "p_holm", "detectable"):
        assert together[name] == pytest.approx(alone[name], rel=1e-6, abs=1e-12), name
    assert pairwise(twice, PAIRS[:1]).iloc[0]["p_holm"] < alone["p_holm"]


def test_every_pair_comes_once_with_the_better_first_and_is_corrected_for_the_number_of_pairs():
    pairs = pairwise(VALUES, PAIRS)
    assert sorted(map(tuple, map(sorted, zip(pairs["system"], pairs["other"], strict=True)))) == [
        ("nano-bert", "nano-mamba"),
        ("nano-bert", "nano-neox"),
        ("nano-mamba", "nano-neox"),
    ]
    assert (pairs["difference"] >= 0).all() and (
        (pairs["low"] <= pairs["difference"]) & (pairs["difference"] <= pairs["high"])
    ).all()
    raw = [
        compare({row.system: VALUES[row.system], row.other: VALUES[row.other]}, row.other).loc[0] for row in pairs.itertuples()
    ]
    assert pairs["difference"].tolist() == pytest.approx([row["difference"] for row in raw])
    assert pairs["effect"].tolist() == pytest.approx([row["effect"] for row in raw])
    assert pairs["p_holm"].tolist() == pytest.approx(holm([row["p"] for row in raw]).tolist())


def test_a_pair_that_differs_by_less_than_is_detectable_is_seldom_found_and_one_that_differs_by_more_is():
    (pair,) = two(table(1), table(2)).to_dict("records")
    needed = pair["detectable"]
    found = {
        gain: np.mean([two(table(100 + n), table(300 + n, gain * needed))["p_holm"][0] < 0.05 for n in range(12)])
        for gain in (0.2, 2.0)
    }
    assert found[0.2] < 0.5 and found[2.0] > 0.9


def test_the_claim_says_better_only_of_what_is_shown():
    said = claim(pairwise(VALUES, across(PAIRS, RECORDS)), RECORDS)
    assert "Of 2 pairs" in said and "the state-space model is better in 2: nano-mamba over" in said
    assert "the Transformer is better in 0." in said and "it is open in 0." in said
    assert "it is open in 1" in claim(two(table(1), table(2)), RECORDS)
    three = {"nano-bert": table(1, 0.3), "nano-neox": table(2), "nano-mamba": table(3)}
    against = claim(pairwise(three, across(list(combinations(three, 2)), RECORDS)), RECORDS)
    assert "Against the best Transformer here, nano-bert: nano-mamba is behind (-0." in against
    assert "nano-bert (+0.2" in said
    assert "of seeds)" not in claim(two(table(1), table(2, 0.3)), RECORDS)
    unsure = two([table(1), table(2)], [table(3, 0.3), table(4, 0.3), table(5, -0.2)])
    assert unsure["p_holm"][0] < 0.001 and unsure["low"][0] < 0  # its queries show it, its seeds do not
    assert "it is open in 1" in claim(unsure, RECORDS) and ", in 4 of 6 pairs of seeds)" in claim(unsure, RECORDS)
    unsure = two(table(1), table(2)).assign(difference=0.02, low=0.001, high=0.04)
    assert "it is open in 1" in claim(unsure.assign(p_holm=0.05), RECORDS)
    assert "is better in 1" in claim(unsure.assign(p_holm=0.04), RECORDS)
    assert two(table(1), table(1))["seeds"][0] == "0 of 1"
    assert "No state-space model and Transformer" in claim(pairwise(VALUES, across(PAIRS[1:2], RECORDS)), RECORDS)
    nearly = table(1) + np.resize([0.01, -0.009], (200, 1))
    assert "level (the interval within ±0.01) in 1: " in claim(two(table(1), nearly), RECORDS)


def test_the_claim_is_corrected_for_its_own_pairs_alone():
    systems = ["nano-bert", "nano-hybrid", "nano-mamba", "nano-mamba2", "nano-neox"]
    everything = list(combinations(systems, 2))
    pairs = across(everything, RECORDS)
    assert pairs == [
        ("nano-bert", "nano-mamba"),
        ("nano-bert", "nano-mamba2"),
        ("nano-mamba", "nano-neox"),
        ("nano-mamba2", "nano-neox"),
    ]
    values = {system: table(seed) for seed, system in enumerate(systems)}
    raw = [compare({name: values[name] for name in pair}, pair[1]).loc[0, "p"] for pair in pairs]
    assert sorted(pairwise(values, pairs)["p_holm"]) == pytest.approx(sorted(holm(raw)))


def test_what_a_system_is_says_its_record_and_never_its_name():
    records = [trained("/home/mamba-study/bert", scan=False), trained("/home/bert-study/checkpoint-500", scan=True)]
    (pair,) = across(trained_alike(records), records)
    values = {"/home/mamba-study/bert": table(1), "/home/bert-study/checkpoint-500": table(2, 0.3)}
    said = claim(pairwise(values, [pair]), records)
    assert "the best Transformer here, /home/mamba-study/bert: /home/bert-study/checkpoint-500 is ahead" in said
    assert "the state-space model is better in 1: /home/bert-study/checkpoint-500 over" in said


@pytest.mark.parametrize(
    "name, value",
    [
        *dict(batch_size=8, group_size=4, epochs=2.0, warmup=0.2, weight_decay=0.1, loss="distil", teacher="minilm-l6").items(),
        *dict(max_length=512, max_query_length=50).items(),
    ],
)
def test_one_number_of_the_recipe_apart_is_not_alike(name, value):
    assert trained_alike([trained("nano-bert"), trained("nano-mamba")]) == PAIRS[:1]
    assert trained_alike([trained("nano-bert"), trained("nano-mamba", **{name: value})]) == []


def test_systems_are_alike_in_their_collection_in_every_seed_and_in_how_they_rerank():
    bert, mamba, ranks = trained("nano-bert"), trained("nano-mamba"), {"first_stage": "bm25", "top_k": 100}
    assert trained_alike([bert, mamba | {"collection": "elsewhere/train"}]) == []
    assert trained_alike([bert, trained("nano-mamba", steps=11), mamba]) == []  # its other seed's training was longer

    def reranked(system, **config):
        return {"kind": "rerank", "system": system, "config": ranks | config}

    assert trained_alike([bert, mamba, reranked("nano-bert"), reranked("nano-mamba", max_passages=1)]) == PAIRS[:1]
    for other in ({"first_stage": "splade"}, {"top_k": 20}, {"max_passages": 4}):
        assert trained_alike([bert, mamba, reranked("nano-bert"), reranked("nano-mamba", **other)]) == [], other


@pytest.mark.parametrize(
    "difference, low, high, p, said",
    [
        (0.004, -0.005, 0.03, 0.5, "it is open in 1"),
        (0.001, -0.03, 0.005, 0.5, "it is open in 1"),
        (0.004, -0.005, 0.009, 0.5, "they are level (the interval within ±0.01) in 1"),
        (0.005, 0.001, 0.009, 0.01, "they are level (the interval within ±0.01) in 0"),
    ],
)
def test_level_is_an_interval_within_the_margin_at_both_ends_of_a_difference_that_is_not_shown(difference, low, high, p, said):
    pair = two(table(1), table(2)).assign(difference=difference, low=low, high=high, p_holm=p)
    assert said in claim(pair, RECORDS)
