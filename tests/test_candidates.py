"""BM25 is the formula, exact at ties; groups are reproducible and hold no relevant document as a negative."""

import math
import re
import subprocess
import sys
from collections import Counter

import bm25s
import ir_measures
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankmamba.candidates import BM25, GRID, lce_groups, tune_bm25
from rankmamba.collection import load
from rankmamba.data.runs import sort_run
from rankmamba.errors import InputError


@pytest.fixture(scope="module")
def tiny():
    return load("rankmamba/tiny")


def words(text):
    return [word for word in re.findall(r"\w\w+", text.lower()) if word not in bm25s.stopwords.STOPWORDS_EN]


def bm25_from_the_formula(documents, queries, k1, b):
    """BM25 with Lucene's idf, one (query, document) pair after the other."""
    terms = {doc_id: Counter(words(text)) for doc_id, text in documents.items()}
    mean_length = sum(sum(counts.values()) for counts in terms.values()) / len(terms)
    in_documents = Counter(word for counts in terms.values() for word in counts)
    rows = []
    for query_id, text in queries.items():
        for doc_id, counts in terms.items():
            score = 0.0
            for word in words(text):
                idf = math.log(1 + (len(terms) - in_documents[word] + 0.5) / (in_documents[word] + 0.5))
                score += idf * counts[word] / (counts[word] + k1 * (1 - b + b * sum(counts.values()) / mean_length))
            if score > 0:
                rows.append((query_id, doc_id, score))
    return sort_run(pd.DataFrame(rows, columns=["query_id", "doc_id", "score"]))


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75), (0.5, 0.0), (2.0, 1.0)])
def test_bm25_equals_the_formula(tiny, k1, b):
    run = BM25.build(tiny.documents, k1, b).search(tiny.queries)
    expected = bm25_from_the_formula(dict(tiny.documents.pairs()), tiny.queries, k1, b)
    key = ["query_id", "doc_id"]
    both = run.merge(expected, on=key, how="outer", suffixes=("", "_formula"))
    assert len(both) == len(run) == len(expected)
    assert (both["score"] - both["score_formula"]).abs().max() < 1e-6 * expected["score"].max()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["cat", "cat dog", "dog", "cat cat", ""]), min_size=2, max_size=30), st.integers(1, 10))
def test_the_top_k_is_the_head_of_the_whole_ranking_also_where_it_cuts_a_tie(texts, top_k):
    documents = {f"d{(7 * i) % 31}": text for i, text in enumerate(texts)}
    if not any(documents.values()):
        with pytest.raises(InputError, match="words to index"):
            BM25.build(documents)
        return
    index = BM25.build(documents)
    whole = index.search({"q": "cat dog"}, len(documents))
    pd.testing.assert_frame_equal(index.search({"q": "cat dog"}, top_k), whole.head(top_k))


def test_documents_without_a_word_of_the_query_are_no_candidates():
    index = BM25.build({"a": "red cat", "b": "", "c": "blue dog"})
    run = index.search({"one": "a red, red fox", "stop words": "the", "unknown": "zebra"})
    assert list(zip(run["query_id"], run["doc_id"], strict=True)) == [("one", "a")]
    assert index.search({"unknown": "zebra"}).empty


def test_a_document_of_fifty_thousand_words_can_be_found():
    run = BM25.build({"long": "filler " * 50_000 + "needle", "short": "filler"}).search({"q": "needle"})
    assert run["doc_id"].tolist() == ["long"]


@pytest.mark.parametrize(("k1", "b"), [(-1, 0.4), (0.9, 1.5), (float("nan"), 0.4)])
def test_parameters_out_of_range_are_refused(k1, b):
    with pytest.raises(InputError, match="k1 >= 0 and b from 0 to 1"):
        BM25.build({"a": "cat"}, k1, b)
    assert len(BM25.build({"a": "cat", "b": "dog"}, k1=0, b=0).search({"q": "cat"})) == 1


def test_the_defaults_are_anserinis_and_a_hundred_results():
    documents = {f"d{n:03}": "cat " * (1 + 59 * n % 400) + "dog" for n in range(400)}
    whole = BM25.build(documents, 0.9, 0.4).search({"q": "cat"}, 400)
    pd.testing.assert_frame_equal(BM25.build(documents).search({"q": "cat"}), whole.head(100))
    assert set(GRID) == {(k1, b) for k1 in (0.6, 0.9, 1.2, 1.6, 2.0) for b in (0.2, 0.4, 0.6, 0.8)} and len(GRID) == 20


def test_tuning_measures_what_ir_measures_measures_and_puts_the_best_first(tiny):
    table = tune_bm25(tiny.documents, tiny.queries, tiny.qrels, grid=[(0.2, 0.0), (0.9, 0.4), (5.0, 1.0)], top_k=10)
    assert table["RR@10"].is_monotonic_decreasing and len(table) == 3
    for row in table.itertuples(index=False):
        run = BM25.build(tiny.documents, row.k1, row.b).search(tiny.queries, 10)
        expected = ir_measures.calc_aggregate(
            [ir_measures.RR @ 10, ir_measures.R @ 10], tiny.qrels, run.assign(score=-run["rank"].astype(float))
        )
        assert row[2:] == pytest.approx([expected[ir_measures.RR @ 10], expected[ir_measures.R @ 10]])


def make_groups(tiny, **options):
    return lce_groups(tiny.candidates, tiny.qrels, doc_ids=list(tiny.documents), **options)


def test_each_relevant_pair_has_one_group_without_relevant_or_repeated_negatives(tiny):
    groups = make_groups(tiny)
    relevant = tiny.qrels[tiny.qrels["relevance"] > 0]
    assert sorted((g.query_id, g.positive) for g in groups) == sorted(zip(relevant["query_id"], relevant["doc_id"], strict=True))
    judged = set(zip(relevant["query_id"], relevant["doc_id"], strict=True))
    for group in groups:
        assert len(set(group.negatives)) == len(group.negatives) == 7
        assert not any((group.query_id, doc_id) in judged for doc_id in group.negatives)
    # two of the tiny queries do not find their answer with BM25; they train all the same
    assert judged - set(zip(tiny.candidates["query_id"], tiny.candidates["doc_id"], strict=True))


def test_negatives_come_from_the_first_candidates_before_random_documents_fill_up(tiny):
    for group in make_groups(tiny, depth=5):
        pool = tiny.candidates[(tiny.candidates["query_id"] == group.query_id) & (tiny.candidates["rank"] <= 5)]["doc_id"]
        relevant = tiny.qrels[(tiny.qrels["query_id"] == group.query_id) & (tiny.qrels["relevance"] > 0)]["doc_id"]
        hard = set(pool) - set(relevant)
        assert hard <= set(group.negatives)


def test_groups_are_the_same_for_a_seed_and_epoch_and_others_for_another(tiny):
    first = make_groups(tiny, seed=1, epoch=2)
    shuffled = tiny.candidates.sample(frac=1, random_state=0), tiny.qrels.sample(frac=1, random_state=0)
    assert first == lce_groups(*shuffled, seed=1, epoch=2, doc_ids=list(tiny.documents))
    for other in (make_groups(tiny, seed=1, epoch=3), make_groups(tiny, seed=2, epoch=2)):
        assert {g[:2] for g in other} == {g[:2] for g in first}
        assert [g[:2] for g in other] != [g[:2] for g in first]
        assert {g[:2]: g.negatives for g in other} != {g[:2]: g.negatives for g in first}


def test_a_groups_negatives_do_not_depend_on_the_other_queries(tiny):
    part = tiny.qrels[tiny.qrels["query_id"].str.startswith("train-")]
    whole = {g[:2]: g for g in make_groups(tiny)}
    for group in lce_groups(tiny.candidates, part, doc_ids=list(tiny.documents)):
        assert group == whole[group[:2]]


def test_by_default_seven_negatives_come_from_the_first_hundred_candidates(tiny):
    assert make_groups(tiny) == make_groups(tiny, group_size=8, seed=0, epoch=0, depth=100)
    run = sort_run(pd.DataFrame({"query_id": "q", "doc_id": [f"d{n:03}" for n in range(150)], "score": 1.0}))
    (group,) = lce_groups(run, pd.DataFrame({"query_id": ["q"], "doc_id": ["d000"], "relevance": [1]}), group_size=100)
    assert set(group.negatives) == {f"d{n:03}" for n in range(1, 100)}


def test_too_few_negatives_without_documents_to_fill_up_are_refused(tiny):
    with pytest.raises(InputError, match="more negatives for query .* got no doc_ids"):
        lce_groups(tiny.candidates, tiny.qrels)
    with pytest.raises(InputError, match="got 5 documents in all"):
        lce_groups(tiny.candidates, tiny.qrels, doc_ids=list(tiny.documents)[:5])


def test_jax_which_bm25s_imports_where_it_is_installed_takes_no_gpu_memory_for_itself(tmp_path):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text(
        "import os, sys\nprint('preallocate', os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'])\nraise ImportError"
    )
    code = f"import os, sys; os.environ.pop('XLA_PYTHON_CLIENT_PREALLOCATE', None); sys.path[:0] = {[str(tmp_path)] + sys.path!r}"
    run = f"{code}; import rankmamba.candidates"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
    assert done.stdout.splitlines()[:1] == ["preallocate false"], done.stderr
