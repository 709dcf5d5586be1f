"""Architecture against architecture: every pair once, the better first, corrected for all, and only what is shown is claimed."""

import numpy as np
import pandas as pd
import pytest

from rankmamba.evaluate import compare, holm
from rankmamba.pairwise import claim, pairwise, trained_alike


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


def test_only_systems_that_were_trained_alike_are_paired():
    assert list(trained_alike(VALUES)) == ["nano-bert", "nano-mamba", "nano-neox"]


def test_every_pair_comes_once_with_the_better_first_and_is_corrected_for_the_number_of_pairs():
    pairs = pairwise(trained_alike(VALUES))
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
    (pair,) = pairwise({"nano-bert": table(1), "nano-mamba": table(2)}).to_dict("records")
    needed = pair["detectable"]
    found = {
        gain: np.mean(
            [
                pairwise({"nano-bert": table(100 + n), "nano-mamba": table(300 + n, gain * needed)})["p_holm"][0] < 0.05
                for n in range(12)
            ]
        )
        for gain in (0.2, 2.0)
    }
    assert found[0.2] < 0.5 and found[2.0] > 0.9


def test_the_claim_says_better_only_of_what_is_shown():
    said = claim(pairwise(trained_alike(VALUES)))
    assert "Of 2 pairs" in said and "the state-space model is better in 2: nano-mamba over" in said
    assert "the Transformer is better in 0." in said and "no difference is shown in 0." in said
    assert "no difference is shown in 1" in claim(pairwise({"nano-bert": table(1), "nano-mamba": table(2)}))
    assert "nano-bert (+0.2" in said
    assert "of seeds)" not in claim(pairwise({"nano-bert": table(1), "nano-mamba": table(2, 0.3)}))
    several = {"nano-bert": [table(1), table(2)], "nano-mamba": [table(3, 0.3), table(4, 0.3), table(5, -0.2)]}
    unsure = pairwise(several)
    assert unsure["p_holm"][0] < 0.001 and unsure["low"][0] < 0  # its queries show it, its seeds do not
    assert "no difference is shown in 1" in claim(unsure) and ", in 4 of 6 pairs of seeds)" in claim(unsure)
    assert "No state-space model and Transformer" in claim(pairwise({"nano-bert": table(1), "nano-neox": table(4)}))
