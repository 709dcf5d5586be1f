"""Our own sets: whole or absent, split without leaks, tidied without loss, and the same through ir_datasets as through `load`."""

import importlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import ir_datasets
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankmamba.candidates import BM25
from rankmamba.collection import load
from rankmamba.data import embedded, sources
from rankmamba.data.embedded import nq
from rankmamba.errors import InputError
from rankmamba.files import sha256


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """A cache of its own for each test."""
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "rankmamba"


WORDS = "amber brook cedar delta ember fjord grove harbor island jungle kettle lantern meadow nettle orchard".split()


def passage(number, revision=0):
    """A tokenised passage of 40 words that shares no word 8-gram with that of another number; revisions differ in one word."""
    rng = random.Random(number)
    text = [rng.choice(WORDS) + rng.choice(WORDS) for _ in range(40)]
    if revision:
        text[5] = f"revised{revision}"
    return f"Ann Lee{number} 's song ( {' '.join(text)} ) , `` it is n't '' ."


def example(query, text, answer):
    swapped = "Bob Ray"
    assert answer in text
    return {
        "input": f"\nQuestion: {query}?\nContext: {text.replace(answer, swapped)}",
        "target": swapped,
        "target_scores": {swapped: 1, answer: 0},
    }


EXAMPLES = [example(f"who sang number {i} do n't ask", passage(i), f"Ann Lee{i}") for i in range(40)]
EXAMPLES += [example(f"who revised {i} 's song", passage(i, 1), f"Ann Lee{i}") for i in range(0, 40, 4)]  # revisions of passages
EXAMPLES += [EXAMPLES[3], EXAMPLES[3]]  # the same query and passage again
EXAMPLES += [example("who sang everything", passage(i), f"Ann Lee{i}") for i in range(40)]  # one query text for all passages


@pytest.fixture
def archive(monkeypatch, tmp_path):
    """A miniature of the source archive in its true layout, taken for the real one; pip is a script that `serve` writes."""
    path = tmp_path / "source" / nq.SOURCE.file
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        members = {
            "bigbench-1.0.0/setup.py": b"raise SystemExit('never run')",
            nq.MEMBER: json.dumps({"examples": EXAMPLES}).encode(),
        }
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(nq, "SOURCE", nq.SOURCE._replace(sha256=sha256(path), size=path.stat().st_size))
    monkeypatch.setattr(nq, "HELD_OUT", {"test": 10, "dev": 5})
    monkeypatch.setattr(sources, "PIP", (sys.executable, str(tmp_path / "pip.py")))
    serve(tmp_path, path)
    return path


def serve(folder, source, status=0):
    """Write a stand-in for pip that logs its call, copies `source` to the download folder, and ends with `status`."""
    (folder / "pip.py").write_text(
        f"import os, shutil, sys, tempfile\nopen({str(folder / 'calls')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        f"target = tempfile.mkdtemp()\nif {str(source)!r} != 'None': shutil.copy({str(source)!r}, target)\n"
        f"print('ERROR: no route to the index')\nsys.exit({status})\n"
    )


def calls(folder):
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


# ------------------------------------------------------------------------------------------------------------------- tiny


def test_importing_registers_every_set_makes_none_and_may_be_repeated(home):
    importlib.reload(embedded)
    for name in ("tiny", "tiny/train", "tiny/dev", "tiny/test", "nq", "nq/train", "nq/dev", "nq/test"):
        assert f"rankmamba/{name}" in ir_datasets.registry
    assert not home.exists()


def test_the_tiny_set_comes_through_the_normal_interface_of_ir_datasets():
    dataset = ir_datasets.load("rankmamba/tiny/test")
    documents = list(dataset.docs_iter())
    assert dataset.docs_count() == len(documents) == 40
    assert [d.doc_id for d in dataset.docs_iter()[10:20:3]] == [d.doc_id for d in documents[10:20:3]]
    assert dataset.docs_store().get("t07") == documents[6] == dataset.docs.lookup("t07")
    assert dataset.docs_store().get_many(["t01", "none"]) == {"t01": documents[0]}
    queries = {q.query_id for q in dataset.queries_iter()}
    assert len(queries) == 12 == len(dataset.qrels.asdict())
    assert {row.query_id for row in dataset.scoreddocs_iter()} <= queries
    assert ir_datasets.docs_parent_id("rankmamba/tiny/test") == "rankmamba/tiny"


def test_the_tiny_splits_are_the_whole_and_share_no_query():
    whole = load("rankmamba/tiny")
    parts = [load(f"rankmamba/tiny/{split}") for split in embedded.SPLITS]
    assert [len(part.queries) for part in parts] == [8, 4, 12]
    assert {i: text for part in parts for i, text in part.queries.items()} == whole.queries
    assert sum(len(part.qrels) for part in parts) == len(whole.qrels)
    assert set(whole.qrels["relevance"]) == {0, 1, 2, 3} and set(whole.qrels["doc_id"]) <= set(whole.documents)
    assert all(30 <= len(text.split()) <= 120 for _, text in whole.documents.pairs())


def test_words_alone_do_not_solve_the_tiny_set():
    whole = load("rankmamba/tiny")
    best = whole.qrels[whole.qrels["relevance"] == 3]
    first = whole.candidates[whole.candidates["rank"] == 1].merge(best, on=["query_id", "doc_id"])
    assert 12 <= len(first) <= 18  # of 24 queries


def test_the_candidates_of_a_set_are_those_of_bm25():
    whole = load("rankmamba/tiny")
    pd.testing.assert_frame_equal(whole.candidates, BM25.build(whole.documents, 0.9, 0.4).search(whole.queries))


def test_a_missing_source_of_the_tiny_set_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "TINY", tmp_path)
    with pytest.raises(InputError, match="no documents.jsonl there; install rankmamba from its repository"):
        load("rankmamba/tiny")


def test_two_processes_may_prepare_a_set_at_once(home):
    program = "from rankmamba.collection import load; c = load('rankmamba/tiny/test'); print(len(c.documents), len(c.candidates))"
    environment = {**os.environ, "PYTHONPATH": str(Path(embedded.__file__).parent.parent)}
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert outputs[0] == outputs[1] != b""
    assert [path.name for path in home.iterdir() if path.is_dir()] == [embedded.prepared("tiny").name]


# ---------------------------------------------------------------------------------------------------------------- rankmamba/nq


def test_nq_is_restored_tidied_and_split_without_a_shared_passage_or_query(archive):
    parts = {split: load(f"rankmamba/nq/{split}") for split in embedded.SPLITS}
    documents = dict(parts["test"].documents.pairs())
    assert len(documents) == 50
    assert re.fullmatch(r'Ann Lee0\'s song \([a-z ]+\), "it isn\'t"\.', documents["d00000"])
    relevant = {split: set(part.qrels["doc_id"]) for split, part in parts.items()}
    assert relevant["test"] | relevant["dev"] | relevant["train"] == set(documents)
    assert sum(map(len, relevant.values())) == len(documents)  # no document is relevant in two splits
    assert 10 <= len(relevant["test"]) <= 11 and 5 <= len(relevant["dev"]) <= 6
    texts = [text for part in parts.values() for text in part.queries.values()]
    assert len(texts) == len(set(texts)) == 51
    assert "who sang number 7 don't ask" in texts
    assert "who sang everything" in parts["test"].queries.values()


def test_a_revision_of_a_passage_is_in_its_split_and_relevant_too(archive):
    for split in embedded.SPLITS:
        part = load(f"rankmamba/nq/{split}")
        for query_id, text in part.queries.items():
            number = re.search(r"\d+", text)
            if number:
                found = part.documents.get_many(part.qrels[part.qrels["query_id"] == query_id]["doc_id"])
                assert len(found) == (2 if int(number[0]) % 4 == 0 else 1)
                assert all(f"Ann Lee{number[0]}'s" in document for document in found.values())


def test_the_archive_is_fetched_once_with_its_hash_required_and_kept(archive, home, tmp_path):
    load("rankmamba/nq/test")
    (call,) = calls(tmp_path)
    assert call.startswith("download --no-deps --no-binary=:all:") and "--require-hashes" in call
    load("rankmamba/nq/dev")
    assert len(calls(tmp_path)) == 1
    assert sorted(path.name for path in home.iterdir()) == [".fetch.lock", ".nq.lock", nq.SOURCE.file, "nq-1"]


def test_a_damaged_archive_is_fetched_again(archive, home, tmp_path, capsys):
    home.mkdir(parents=True)
    (home / nq.SOURCE.file).write_bytes(archive.read_bytes()[:-1])
    assert len(load("rankmamba/nq/test").documents) == 50
    assert sha256(home / nq.SOURCE.file) == nq.SOURCE.sha256 and len(calls(tmp_path)) == 1
    assert "is damaged" in capsys.readouterr().err


def test_an_archive_that_the_disk_has_no_room_for_is_not_fetched(archive, home, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": nq.SOURCE.size}))
    with pytest.raises(InputError, match=f"MB of free disk to fetch {nq.SOURCE.file}, got .* set IR_DATASETS_HOME"):
        load("rankmamba/nq/test")
    assert calls(tmp_path) == []


@pytest.mark.parametrize("case", ["no network", "another file of the same size"])
def test_an_archive_that_cannot_be_had_is_explained_and_leaves_nothing(archive, home, tmp_path, case):
    if case == "no network":
        serve(tmp_path, None, status=1)
    else:
        other = tmp_path / nq.SOURCE.file
        other.write_bytes(bytes(nq.SOURCE.size))
        serve(tmp_path, other)
    with pytest.raises(InputError) as error:
        load("rankmamba/nq/test")
    assert f"at {home / nq.SOURCE.file} by hand" in str(error.value)
    assert ("no route to the index" if case == "no network" else "with SHA-256") in str(error.value)
    assert sorted(path.name for path in home.iterdir()) == [".fetch.lock", ".nq.lock"]


def test_an_interrupted_preparation_leaves_nothing_and_the_next_start_mends_it(archive, home, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "write_run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load("rankmamba/nq/test")
    assert sorted(path.name for path in home.iterdir()) == [".fetch.lock", ".nq.lock", nq.SOURCE.file]
    (home / ".nq-1.killed").mkdir()  # what a killed process would leave
    (home / f".{nq.SOURCE.file}.killed").mkdir()
    assert len(load("rankmamba/nq/test").documents) == 50
    assert sorted(path.name for path in home.iterdir()) == [".fetch.lock", ".nq.lock", nq.SOURCE.file, "nq-1"]


def test_what_a_killed_process_left_beside_a_finished_set_is_removed(home):
    folder = embedded.prepared("tiny")
    left_over = folder.with_name(f".{folder.name}.a-machine-1-abc")
    left_over.mkdir()
    assert embedded.prepared("tiny") == folder and not left_over.exists()


def test_preparing_twice_gives_the_same_files(archive, home):
    folder = embedded.prepared("nq")
    first = {path.relative_to(folder): sha256(path) for path in folder.rglob("*") if path.is_file()}
    folder.rename(home / "first")
    embedded.prepared("nq")
    assert {path.relative_to(folder): sha256(path) for path in folder.rglob("*") if path.is_file()} == first


# ---------------------------------------------------------------------------------------------------------------------- tidy


@pytest.mark.parametrize(
    ("tokenised", "tidied"),
    [
        ("I do n't , ca n't and can not", "I don't, can't and cannot"),
        ("who sang do n 't cry / she 'd gon na", "who sang don't cry / she'd gonna"),
        ("`` I 'm Lovin ' It '' is 's", "\"I'm Lovin' It\" is's"),
        ("the girls ' room , Williams ' hat", "the girls' room, Williams' hat"),
        ("he sings ' Old Deuteronomy ' twice", "he sings 'Old Deuteronomy' twice"),
        ("in the movie ' jannat '", "in the movie 'jannat'"),
        ("rock ' n ' roll of the ' 60s", "rock 'n' roll of the '60s"),
        ("( 3 : 09 ) , season : 16 ; 12 % !", "(3:09), season: 16; 12%!"),
        (
            "a five - year - old , first - and second - place , face - to - face",
            "a five-year-old, first- and second-place, face-to-face",
        ),
        ("1980 -- 1989 , 40 -- 34 , ( 2007 -- present )", "1980–1989, 40–34, (2007–present)"),
        ("21 September 1842 -- 10 February 1918", "21 September 1842 – 10 February 1918"),
        ("June 9 , 1768 -- April 21 , 1835", "June 9, 1768 – April 21, 1835"),
        ("Carole King - `` Anyone '' - 3 : 31", 'Carole King - "Anyone" - 3:31'),
        ("Ann Lee - guitar", "Ann Lee - guitar"),
        ("and / or 24 km / h , Eddie Brock / Venom", "and/or 24 km/h, Eddie Brock / Venom"),
        ("# 63 , £ 22 million , 41 ° C , 150 + yards", "#63, £22 million, 41 °C, 150+ yards"),
        ("M * A * S * H and P ! nk", "M*A*S*H and P!nk"),
        ("aged 7004257880000000000 ♠ 70 years", "aged 70 years"),
        ("one   two </Dd> <Dt> three </Dl>", "one\ntwo\nthree"),
        ("( Urdu : سارے \u200e ; Anthem )", "(Urdu: سارے; Anthem)"),
    ],
)
def test_tidying_joins_what_the_tokeniser_took_apart(tokenised, tidied):
    assert nq.tidy(tokenised) == tidied
    assert nq.tidy(tidied) == tidied


TOKENS = st.sampled_from("the a Ann as is 1984 12 3 ' '' `` 's n't ( ) , . : ; ! ? - -- / * + # $ % ° in and to présent".split())


@settings(max_examples=300, deadline=None)
@given(st.lists(TOKENS, max_size=20))
def test_tidying_loses_no_letter_and_no_digit(tokens):
    text = " ".join(tokens)
    assert re.sub(r"\W", "", nq.tidy(text)) == re.sub(r"\W", "", text)
    assert nq.tidy(text) == " ".join(nq.tidy(text).split())
