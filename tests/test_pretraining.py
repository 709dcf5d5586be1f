"""The collections beside NQ (rankmamba/wiki, rankmamba/squad, rankmamba/squad-long) and the checkpoints made from the first."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest

from rankmamba import pretrained
from rankmamba.collection import load
from rankmamba.data import embedded, sources
from rankmamba.data.embedded import nq, squad, wiki
from rankmamba.errors import InputError
from rankmamba.experiment import Experiment
from rankmamba.files import sha256
from rankmamba.reranker import Reranker
from rankmamba.results import leave_record
from rankmamba.train import TrainConfig

WORDS = "river bridge mountain snow book train city winter music garden science history island coast".split()


def sentence(rng, count=12):
    return " ".join(rng.choice(WORDS, count)).capitalize() + "."


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Miniatures of the two archives in their true layout, where they would have been fetched to."""
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path))
    home, rng = tmp_path / "rankmamba", np.random.default_rng(0)
    home.mkdir()
    articles = {
        f"Thing {n}": {
            "title": f"Thing {n}",
            "description": f"{WORDS[n % 14]} of no {n}",
            "extract": sentence(rng) + " " + sentence(rng),
        }
        for n in range(60)
    } | {"Short": {"title": "Short", "description": None, "extract": "Too short."}}
    wheel = home / wiki.SOURCE.file
    with zipfile.ZipFile(wheel, "w") as zipped:
        zipped.writestr(wiki.MEMBER, json.dumps(articles))
    archive = home / nq.SOURCE.file
    with tarfile.open(archive, "w:gz") as tar:
        for name in squad.FILES:
            paragraphs = [
                {"context": f"{sentence(rng, 30)} {name} {n}", "qas": [{"question": f"what is {n}  of {name} ?"}] * (1 + n % 2)}
                for n in range(6)
            ]
            data = [{"title": "first", "paragraphs": paragraphs[:4]}, {"title": "second", "paragraphs": paragraphs[4:]}]
            content = json.dumps({"data": data}).encode()
            info = tarfile.TarInfo(squad.FOLDER + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for module, path in ((wiki, wheel), (nq, archive)):
        monkeypatch.setattr(module, "SOURCE", module.SOURCE._replace(sha256=sha256(path), size=path.stat().st_size))
    monkeypatch.setattr(sources, "PIP", ("false",))
    monkeypatch.setattr(wiki, "HELD_OUT", {"test": 10, "dev": 10})
    embedded._open.cache_clear()
    return home


def test_wiki_shares_no_article_between_splits_and_its_queries_are_mostly_not_copied(packages):
    parts = {split: load(f"rankmamba/wiki/{split}") for split in wiki.SPLITS}
    relevant = {split: set(part.qrels["doc_id"]) for split, part in parts.items()}
    assert {split: len(ids) for split, ids in relevant.items()} == {"train": 40, "dev": 10, "test": 10}
    assert not relevant["train"] & relevant["test"] | relevant["train"] & relevant["dev"] | relevant["dev"] & relevant["test"]
    train = parts["train"]
    assert len(train.queries) == 40 * wiki.QUERIES_PER_DOCUMENT and all(train.queries.values())
    texts = train.documents.get_many(relevant["train"])
    described = {row.query_id: row.doc_id for row in train.qrels.itertuples() if row.query_id.endswith("-0")}
    assert all(train.queries[query_id].split()[-3:][0] == "of" for query_id in described) and len(described) == 40
    assert "Too short." not in texts.values()


def test_wiki_is_the_same_every_time(packages):
    first = wiki.prepare(wiki.read_articles(packages / wiki.SOURCE.file))
    assert first == wiki.prepare(wiki.read_articles(packages / wiki.SOURCE.file))


def test_squad_paragraphs_become_documents_of_one_article_that_hold_what_their_questions_ask(packages):
    short, long = load("rankmamba/squad/test"), load("rankmamba/squad-long/600/test")
    assert len(short.documents) == 30 and len(short.queries) == 30  # a question that a paragraph has twice comes once
    assert {doc_id.split("-")[0] for doc_id in short.documents} == {"wiki", "nyt", "amazon", "reddit"}
    assert len(long.documents) == 4 * 2 and len(long.queries) == 4 * 6  # Reddit's cannot be joined
    starts = embedded.answer_starts("squad-long/600")
    for row in long.qrels.itertuples():
        words = long.documents[row.doc_id].split()
        number, name = long.queries[row.query_id].split()[2::2][:2]
        assert row.query_id.split("-")[0] == row.doc_id.split("-")[0] == squad.FILES[name]
        assert words[starts[row.query_id] :][30:32] == [name, number]


def test_no_document_of_several_paragraphs_is_longer_than_asked(packages):
    paragraphs = squad.read_paragraphs(packages / nq.SOURCE.file)
    for words in (10, 40, 64, 65, 1000):
        documents = squad.prepare(paragraphs, words).documents
        assert all(len(text.split()) <= words or "\n" not in text for text in documents.values())
        assert sum(len(text.split("\n")) for text in documents.values()) == 24


def test_a_trained_scratch_system_becomes_a_checkpoint_that_scores_alike_and_says_what_it_is(tmp_path, monkeypatch):
    from rankmamba import systems

    name = "tiny-mamba"
    spec = systems.SYSTEMS[name]
    monkeypatch.setitem(systems.SYSTEMS, name + systems.SCRATCH, spec.__class__(**vars(spec) | {"name": name + systems.SCRATCH}))
    experiment = Experiment(tmp_path / "results", "rankmamba/tiny", "tiny")
    config = TrainConfig(
        name + systems.SCRATCH, 1e-2, batch_size=2, group_size=4, max_steps=3, max_length=96, max_query_length=24
    )
    record = experiment.train(config)
    (folder,) = pretrained.publish(tmp_path / "results", tmp_path / "checkpoints")
    assert folder.name == name and (folder / "model.safetensors").stat().st_size < 300_000  # bfloat16, no word embeddings
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "rankmamba/tiny/train" in card and "3 steps of 2 queries" in card and "What it is not" in card
    for seed, system, value in [(0, name + systems.SCRATCH, 0.123), (0, "bm25", 0.4), (1, name + systems.SCRATCH, 0.987)]:
        result = {"measures": {"RR@100": dict.fromkeys(("mean", "low", "high"), value)}, "per_query": {}}
        leave_record(tmp_path / "results", "evaluate", system, "rankmamba/tiny/test", "tiny", seed, {}, result)
    pretrained.publish(tmp_path / "results", tmp_path / "checkpoints")  # the training has seed 0
    assert "| RR@100 | 0.123 on the collection's test queries" in (folder / "README.md").read_text(encoding="utf-8")
    monkeypatch.setitem(systems.SYSTEMS, name, spec.__class__(**vars(spec) | {"source": folder}))
    pairs = [("which river", "a river in the snow"), ("which river", "music")]
    trained = Reranker.from_pretrained(experiment.model_path(name + systems.SCRATCH)).predict(pairs)
    loaded = Reranker.from_pretrained(name)
    assert loaded.model.config.system == name and next(loaded.model.parameters()).dtype.itemsize == 4
    assert np.allclose(loaded.predict(pairs), trained, atol=0.02)
    with pytest.raises(InputError, match="found none"):
        monkeypatch.setitem(systems.SYSTEMS, name, spec.__class__(**vars(spec) | {"source": tmp_path / "absent"}))
        Reranker.from_pretrained(name)
    with pytest.raises(InputError, match="expected a results folder"):
        pretrained.publish(tmp_path / "absent", tmp_path)
    another = record["result"], record["timing"]
    leave_record(tmp_path / "results", "train", name + systems.SCRATCH, "rankmamba/tiny/train", "tiny", 1, {}, *another)
    with pytest.raises(InputError, match="one seed of tiny-mamba-scratch .* got 0 and 1"):
        pretrained.publish(tmp_path / "results", tmp_path / "checkpoints")
