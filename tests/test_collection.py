"""Readers and writers: what they accept comes back unchanged, what they refuse is named with file and line."""

import pickle
import string

import ir_datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankmamba import collection
from rankmamba.collection import Collection, check_run, digest_of, load
from rankmamba.data.formats import JsonlDocuments, read_qrels, read_queries, write_documents, write_qrels, write_queries
from rankmamba.data.runs import read_run, sort_run, write_run
from rankmamba.errors import InputError

IDS = st.text(st.characters(categories=("L", "N", "P", "S"), codec="utf-8"), min_size=1, max_size=8)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)
QUERY_TEXTS = TEXTS.map(lambda text: " ".join(text.split())).filter(bool)
PAIRS = st.lists(st.tuples(IDS, IDS), max_size=20, unique=True)


def run_of(*rows):
    return pd.DataFrame(rows, columns=["query_id", "doc_id", "score"])


def qrels_of(*rows):
    return pd.DataFrame(rows, columns=collection.QRELS_COLUMNS)


@pytest.fixture
def folder(tmp_path):
    """A small collection of our own folder format."""
    write_documents(tmp_path / "documents.jsonl", [("d1", "the cat"), ("d2", "a dog"), ("empty", "")])
    write_queries(tmp_path / "queries.tsv", {"q1": "cat", "q2": "dog"})
    write_qrels(tmp_path / "qrels.txt", pd.DataFrame([("q1", "d1", 1)], columns=collection.QRELS_COLUMNS))
    return tmp_path


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(IDS, TEXTS, min_size=1, max_size=10))
def test_documents_come_back_as_written_in_order_whatever_their_text(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    for written in (texts, texts.items()):
        write_documents(path, written)
        documents = JsonlDocuments(path)
        assert list(documents.pairs()) == list(texts.items())
    assert documents.get_many([*texts, "no such id"]) == texts


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(IDS, QUERY_TEXTS, min_size=1, max_size=10))
def test_queries_come_back_as_written(tmp_path_factory, queries):
    path = tmp_path_factory.mktemp("queries") / "queries.tsv"
    write_queries(path, queries)
    assert read_queries(path) == queries


@settings(max_examples=50, deadline=None)
@given(PAIRS.filter(bool), st.data())
def test_qrels_come_back_as_written(tmp_path_factory, pairs, data):
    rows = [(*pair, data.draw(st.integers(-2, 4))) for pair in pairs]
    path = tmp_path_factory.mktemp("qrels") / "qrels.txt"
    write_qrels(path, pd.DataFrame(rows, columns=collection.QRELS_COLUMNS))
    assert [tuple(row) for row in read_qrels(path).itertuples(index=False)] == rows


@settings(max_examples=50, deadline=None)
@given(PAIRS, st.data())
def test_a_run_comes_back_with_all_digits_of_its_scores(tmp_path_factory, pairs, data):
    scores = st.floats(allow_nan=False, allow_infinity=False)
    run = sort_run(run_of(*[(*pair, data.draw(scores)) for pair in pairs]))
    path = tmp_path_factory.mktemp("run") / "bm25.run"
    write_run(path, run, "bm25")
    pd.testing.assert_frame_equal(read_run(path), run)


@settings(max_examples=100, deadline=None)
@given(PAIRS, st.data())
def test_a_run_is_ordered_by_query_then_score_then_doc_id_whatever_the_order_it_came_in(pairs, data):
    rows = [(*pair, data.draw(st.sampled_from([0.0, -1.5, 2.0]))) for pair in pairs]
    run = sort_run(run_of(*data.draw(st.permutations(rows))))
    expected = sorted(rows, key=lambda row: (row[0], -row[2], row[1]))
    assert [tuple(row) for row in run[["query_id", "doc_id", "score"]].itertuples(index=False)] == expected
    first = {}
    for place, (query_id, _, _) in enumerate(expected):
        first.setdefault(query_id, place)
    assert run["rank"].tolist() == [place - first[row[0]] + 1 for place, row in enumerate(expected)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("q", "d", float("nan"))], "finite scores, got nan for query 'q', document 'd'"),
        ([("q", "d", float("inf"))], "finite scores"),
        ([("q", "d", 1.0), ("q", "d", 2.0)], "'d' again for query 'q'"),
        ([("q", 7, 1.0)], "strings as doc_id in a run, got 7"),
        ([(None, "d", 1.0)], "strings as query_id"),
    ],
)
def test_a_run_with_nan_repeated_documents_or_ids_that_are_no_strings_is_refused(rows, message):
    with pytest.raises(InputError, match=message):
        sort_run(run_of(*rows))
    with pytest.raises(InputError, match="none called score"):
        sort_run(run_of(*rows).drop(columns="score"))


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_queries, b"q1\tcat\nq2 dog\n", "query_id, one tab and the query text, got 1 columns"),
        (read_queries, b"q1\tcat\nq2\tdog\tfood\n", "got 3 columns"),
        (read_queries, b"q1\tcat\nq2\t \n", "a query text, got an empty one for query 'q2'"),
        (read_queries, b"q1\tcat\nq1\tdog\n", "each query_id once, got 'q1' again"),
        (read_queries, b"q1\tcat\nq 2\tdog\n", "without spaces, got 'q 2'"),
        (read_queries, b"q1\tcat\nq2\td\xf6g\n", "UTF-8 text, got byte 0xf6 at position 5"),
        (read_qrels, b"q1 0 d1 1\nq1 0 d2\n", "4 columns .* got 3"),
        (read_qrels, b"q1 0 d1 1\nq1 0 d2 1.5\n", "a whole number as relevance, got '1.5'"),
        (read_qrels, b"q1 0 d1 1\nq1 0 d1 0\n", "'d1' again for query 'q1'"),
        (read_qrels, b"q1 0 d1 1\nq1 0 d2 99999999999999999999\n", "a whole number"),
        (read_run, b"q1 Q0 d1 1 2.5 t\nq1 Q0 d2 2 1.5\n", "6 columns .* got 5"),
        (read_run, b"q1 Q0 d1 1 2.5 t\nq1 Q0 d2 2 nan t\n", "a finite number as score, got 'nan'"),
        (read_run, b"q1 Q0 d1 1 2.5 t\nq1 Q0 d2 2 1_5 t\n", "a finite number as score, got '1_5'"),
        (read_run, b"q1 Q0 d1 1 2.5 t\nq1 Q0 d2 second 1.5 t\n", "a whole number as rank, got 'second'"),
        (read_run, b"q1 Q0 d1 1 2.5 t\nq1 Q0 d1 2 1.5 t\n", "'d1' again for query 'q1'"),
        (JsonlDocuments, b'{"doc_id": "d1", "text": ""}\n{"doc_id": "d2", "text": "x"\n', "one JSON object in the line"),
        (JsonlDocuments, b'{"doc_id": "d1", "text": ""}\n["d2", "x"]\n', 'an object with "doc_id" and "text", got list'),
        (JsonlDocuments, b'{"doc_id": "d1", "text": ""}\n{"id": "d2", "text": "x"}\n', r"got \['id', 'text'\]"),
        (JsonlDocuments, b'{"doc_id": "d1", "text": ""}\n{"doc_id": 2, "text": "x"}\n', "a string as doc_id, got 2"),
        (JsonlDocuments, b'{"doc_id": "d1", "text": ""}\n{"doc_id": "d2", "text": null}\n', "a string as text, got None"),
        (JsonlDocuments, b'{"doc_id": "d1", "text": ""}\n{"doc_id": "d2", "text": "\\ud800"}\n', "half a surrogate pair"),
        (JsonlDocuments, b'{"doc_id": "d1", "text": ""}\n{"doc_id": "d1", "text": "x"}\n', "each doc_id once, got 'd1' again"),
        (JsonlDocuments, b'{"doc_id": "d1", "text": ""}\n{"doc_id": "d2", "text": "\xff"}\n', "UTF-8 text, got byte 0xff"),
    ],
)
def test_a_malformed_line_is_refused_with_its_file_and_line(tmp_path, read, content, message):
    path = tmp_path / "input"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read(path)
    assert f"{path}:2" in str(error.value)


@pytest.mark.parametrize("read", [read_queries, read_qrels, JsonlDocuments])
def test_an_empty_or_missing_file_is_refused(tmp_path, read):
    with pytest.raises(InputError, match="a readable file, got No such file"):
        read(tmp_path / "missing")
    (tmp_path / "empty").touch()
    with pytest.raises(InputError, match="at least one .* got an empty file"):
        read(tmp_path / "empty")


def test_an_empty_run_is_a_run_without_results(tmp_path):
    (tmp_path / "empty.run").touch()
    assert read_run(tmp_path / "empty.run").empty


def test_windows_line_ends_byte_order_mark_and_empty_lines_change_nothing(tmp_path):
    (tmp_path / "queries.tsv").write_bytes(b"\xef\xbb\xbfq1\tcat\r\n\r\nq2\tdog\r\n")
    assert read_queries(tmp_path / "queries.tsv") == {"q1": "cat", "q2": "dog"}
    (tmp_path / "documents.jsonl").write_bytes(b'\xef\xbb\xbf{"doc_id": "d1", "text": "x"}\r\n\r\n{"doc_id": "d2", "text": "y"}')
    assert dict(JsonlDocuments(tmp_path / "documents.jsonl").pairs()) == {"d1": "x", "d2": "y"}


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    for write, argument in [
        (write_queries, {"q1": "two\tcolumns"}),
        (write_queries, {"q1": " "}),
        (write_queries, {"q1": None}),
        (write_queries, {"q1": "half \ud800"}),
        (write_queries, {}),
        (write_documents, [("d 1", "text")]),
        (write_documents, ["d1", "d2"]),
        (write_documents, {"d1": "text", "d2": None}),
        (write_documents, {"d1": "half \ud800"}),
        (write_documents, [("d1", "text"), ("d1", "again")]),
        (write_documents, {}),
        (write_qrels, qrels_of(("q1", "d1", "1"))),
        (write_qrels, qrels_of(("q1", "d1", 0.5))),
        (write_qrels, qrels_of(("q1", "d1", float("nan")))),
        (write_qrels, qrels_of(("q1", "d1", 1), ("q1", "d1", 0))),
        (write_qrels, qrels_of()),
        (lambda path, run: write_run(path, run, "tag"), run_of(("q\n", "d", 1.0))),
        (lambda path, run: write_run(path, run, "two words"), run_of(("q", "d", 1.0))),
    ]:
        with pytest.raises(InputError, match="expected .* got"):
            write(tmp_path / "file", argument)
        assert not list(tmp_path.iterdir())


def test_a_title_goes_before_the_text(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"doc_id": "d", "title": "Cats", "text": "They purr.", "url": "ignored"}\n')
    assert JsonlDocuments(tmp_path / "d.jsonl")["d"] == "Cats They purr."


def test_a_folder_of_our_own_is_a_collection_and_an_empty_document_is_legal(folder):
    loaded = load(folder)
    assert loaded.documents["empty"] == "" and len(loaded.documents) == 3 and loaded.candidates is None
    assert loaded.queries == {"q1": "cat", "q2": "dog"} and loaded.qrels["relevance"].tolist() == [1]


def test_the_digest_of_a_folder_is_of_what_is_read_from_it_and_of_nothing_else(folder):
    def edited():
        seen.append(digest_of([str(folder), "rankmamba/tiny"])["files"])
        return seen[-1] not in seen[:-1]

    seen = []
    assert edited() and not edited() and digest_of(["rankmamba/tiny"]) == {}
    (folder / "notes.txt").write_text("by hand")
    assert not edited()
    write_run(folder / "candidates.run", run_of(("q1", "d1", 2.0)), "bm25")
    assert edited()
    for name in ("documents.jsonl", "queries.tsv", "qrels.txt", "candidates.run"):
        (folder / name).write_text((folder / name).read_text() + "\n")
        assert edited(), name
    (folder / "candidates.run").rename(folder / "candidates.run.old")  # without it BM25 ranks
    assert edited()


def test_a_query_without_candidates_stays_in_the_collection(folder):
    write_run(folder / "candidates.run", run_of(("q1", "d1", 2.0)), "bm25")
    loaded = load(str(folder))
    assert set(loaded.queries) == {"q1", "q2"} and set(loaded.candidates["query_id"]) == {"q1"}


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("candidates.run", "q1 Q0 d9 1 2.0 bm25", "every doc_id .* got 'd9'"),
        ("candidates.run", "q9 Q0 d1 1 2.0 bm25", "every query_id .* got 'q9'"),
        ("qrels.txt", "q9 0 d1 1", "every query_id .* got 'q9'"),
    ],
)
def test_a_folder_whose_files_name_unknown_queries_or_documents_is_refused(folder, file, line, message):
    (folder / file).write_text(f"{'q2 Q0 d2 1 1.0 bm25' if file == 'candidates.run' else 'q2 0 d2 1'}\n{line}\n")
    with pytest.raises(InputError, match=message) as error:
        load(folder)
    assert f"{folder / file}:2" in str(error.value)


def test_a_run_that_names_an_unknown_document_or_query_is_refused(folder):
    loaded = load(folder)
    check_run(run_of(("q1", "d2", 1.0)), loaded)
    with pytest.raises(InputError, match="every doc_id .* got 'd7' and 1 more"):
        check_run(run_of(("q1", "d7", 1.0), ("q1", "d8", 0.5)), loaded)
    with pytest.raises(InputError, match="every query_id .* got 'q7'"):
        check_run(run_of(("q7", "d1", 1.0)), loaded)


def test_a_document_of_fifty_thousand_words_is_read_whole(tmp_path):
    text = " ".join(np.random.default_rng(0).choice(list(string.ascii_lowercase), 50_000))
    write_documents(tmp_path / "documents.jsonl", [("long", text), ("short", "x")])
    assert JsonlDocuments(tmp_path / "documents.jsonl")["long"] == text


def test_an_unknown_name_is_refused_with_names_like_it():
    with pytest.raises(InputError, match="got 'rankmamba/tini'; did you mean rankmamba/tiny"):
        load("rankmamba/tini")
    with pytest.raises(InputError, match=r"without \['queries', 'qrels'\]; try one of rankmamba/nq/dev"):
        load("rankmamba/nq")


def test_candidates_that_no_score_orders_are_refused():
    home = ir_datasets.util.home_path() / "msmarco-passage" / "trec-dl-2019"
    home.mkdir(parents=True)
    (home / "queries.tsv").write_text("1\tbees\n")
    (home / "qrels").write_text("1 0 77 1\n")
    (home / "ms.run").write_text("1 0 77 0 0 x\n1 0 5 0 0 x\n")  # as ir_datasets writes what it made of top1000.dev.tar.gz
    with pytest.raises(InputError, match="expected candidates with scores, got 0.0 for all 2 of msmarco-passage"):
        _ = load("msmarco-passage/trec-dl-2019").candidates


def test_a_failed_download_is_one_error_that_says_what_to_fetch_and_where_to_put_it(monkeypatch, tmp_path):
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path))
    dataset = ir_datasets.load("msmarco-document/dev")

    def fail(*args, **kwargs):
        raise RuntimeError("All download sources failed", [ConnectionError("no route")])

    monkeypatch.setattr(type(dataset.queries_handler()), "queries_iter", fail)
    with pytest.raises(InputError) as error:
        load("msmarco-document/dev")
    for part in ("queries of msmarco-document/dev", "All download sources failed", "msmarco-docdev-queries.tsv.gz", "0.1 MB"):
        assert part in str(error.value)
    assert str(tmp_path / "msmarco-document" / "dev" / "queries.tsv.gz") in str(error.value)


def test_any_ir_datasets_id_is_a_collection_whose_documents_stay_in_its_store(monkeypatch, tmp_path):
    (tmp_path / "docs.tsv").write_text("d1\tthe cat\nd2\ta dog\n")
    (tmp_path / "queries.tsv").write_text("q1\tcat\n")
    (tmp_path / "qrels.txt").write_text("q1 0 d1 1\nq1 0 d1 1\n")
    files = {"docs_tsv": "docs.tsv", "queries_tsv": "queries.tsv", "qrels_trec": "qrels.txt"}
    dataset = ir_datasets.create_dataset(**{kind: str(tmp_path / name) for kind, name in files.items()})
    monkeypatch.setitem(ir_datasets.registry._registered, "foreign", dataset)
    loaded = load("foreign")
    assert list(loaded.documents.pairs()) == [("d1", "the cat"), ("d2", "a dog")] and len(loaded.documents) == 2
    assert loaded.documents.get_many(["d2", "d3"]) == {"d2": "a dog"} and "d3" not in loaded.documents
    assert len(loaded.qrels) == 1 and loaded.candidates is None
    with pytest.raises(KeyError):
        loaded.documents["d3"]


def test_documents_on_disk_can_be_sent_to_another_process(folder):
    documents = load(folder).documents
    assert list(pickle.loads(pickle.dumps(documents)).pairs()) == list(documents.pairs())


def test_a_sample_is_repeatable_and_keeps_the_judgements_and_candidates_of_its_queries():
    whole = load("rankmamba/tiny")
    part = whole.sample(5, seed=1)
    assert list(part.queries) == list(whole.sample(5, seed=1).queries) != list(whole.sample(5, seed=2).queries)
    for table, of_part in ((whole.qrels, part.qrels), (whole.candidates, part.candidates)):
        pd.testing.assert_frame_equal(of_part, table[table["query_id"].isin(list(part.queries))].reset_index(drop=True))


def test_examples_are_pairs_that_were_judged_relevant():
    tiny = load("rankmamba/tiny")
    relevant = tiny.qrels[tiny.qrels["relevance"] > 0]
    pairs = {(tiny.queries[row.query_id], tiny.documents[row.doc_id]) for row in relevant.itertuples()}
    assert set(tiny.examples(1000).itertuples(index=False, name=None)) == pairs and len(relevant) < len(tiny.qrels)
    assert len(tiny.examples(3)) == 3


def test_candidates_are_read_at_the_first_use_and_once():
    calls = []
    loaded = Collection("x", {"d": "text"}, {"q": "text"}, run_of(), lambda: calls.append(1) or run_of(("q", "d", 1.0)))
    assert not calls
    assert len(loaded.candidates) == len(loaded.candidates) == 1 and len(calls) == 1
