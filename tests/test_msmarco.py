"""MS MARCO documents: the real ids and parsers on a miniature in the original files, tokens on the disk, passages, the plan."""

import copy
import gzip
import random
import shlex
from contextlib import nullcontext
from types import SimpleNamespace

import ir_datasets
import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from rankmamba import study
from rankmamba.batch import plan
from rankmamba.batch.plan import Run
from rankmamba.candidates import BM25
from rankmamba.collection import IrDocuments, load
from rankmamba.data import token_store
from rankmamba.data.embedded import TINY
from rankmamba.data.formats import Documents
from rankmamba.data.token_store import TokenStore, all_ids, document_tokens
from rankmamba.errors import InputError
from rankmamba.evaluate import per_query
from rankmamba.experiment import Experiment
from rankmamba.inputs import PairTokenizer
from rankmamba.reporting import published
from rankmamba.reporting.published import beside_ours
from rankmamba.reranker import Reranker
from rankmamba.reranking.passages import best_of, cut, spread, tokens_needed
from rankmamba.results import read_records
from rankmamba.systems import SYSTEMS
from rankmamba.train import TrainConfig, train

PARTS = {"train": 6, "dev": 4, "trec-dl-2019": 4, "trec-dl-2020": 4}  # queries of each
DOCUMENTS = 60
RUNS = plan.paper_runs()


@pytest.fixture(scope="module")
def msmarco():
    """Write a miniature as the original site has it, where ir_datasets keeps what it has fetched; queries are words of a document."""
    home, rng = ir_datasets.util.home_path() / "msmarco-document", random.Random(0)
    words = [line.split('"text": ')[1] for line in (TINY / "documents.jsonl").read_text(encoding="utf-8").splitlines()]
    words = " ".join(words).lower().split()
    bodies = {f"D{n}": [rng.choice(words) for _ in range(rng.choice([5, 40, 400]))] for n in range(1, DOCUMENTS + 1)}
    with _gz(home / "collection.tsv.gz") as docs:
        for doc_id, body in bodies.items():
            lines = f"https://example.org/{doc_id}\nTitle of {doc_id}\n{' '.join(body[:20])}\n{' '.join(body[20:])}"
            docs.write(f"<DOC>\n<DOCNO>{doc_id}</DOCNO>\n<TEXT>\n{lines}\n</TEXT>\n</DOC>\n")
    query_id = 100
    for part, count in PARTS.items():
        (home / part).mkdir(parents=True, exist_ok=True)
        trec = part.startswith("trec")
        opened = open(home / part / "qrels", "w") if trec else _gz(home / part / "qrels.gz")
        with _gz(home / part / "queries.tsv.gz") as queries, opened as qrels, _gz(home / part / "ms.run.gz") as run:
            for place in range(count + trec):  # TREC has queries that nobody judged
                query_id += 1
                relevant, *others = rng.sample(sorted(bodies), 12)
                queries.write(f"{query_id}\t{' '.join(rng.sample(bodies[relevant], 4))}\n")
                for rank, doc_id in enumerate([*others, relevant], 1):
                    run.write(f"{query_id} Q0 {doc_id} {rank} {-rank / 7} IndriQueryLikelihood\n")
                if trec and place < count:
                    qrels.writelines(f"{query_id} 0 {doc_id} {grade}\n" for grade, doc_id in enumerate([*others[:3], relevant]))
                elif not trec:
                    qrels.write(f"{query_id} 0 {relevant} 1\n")
    return bodies


def _gz(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return gzip.open(path, "wt", encoding="utf-8")


@pytest.fixture
def reranker():
    torch.manual_seed(0)
    built = Reranker.from_pretrained("tiny-mamba", dtype=torch.float32, max_length=64, max_query_length=16)
    for parameter in built.model.parameters():
        parameter.data.mul_(3)
    return built


@pytest.fixture(autouse=True)
def large_from_ten_documents_in_shards_of_sixteen_and_batches_of_five(monkeypatch):
    monkeypatch.setattr(token_store, "LARGE", 10)
    monkeypatch.setattr(token_store, "SHARD", 16)
    monkeypatch.setattr(token_store, "BATCH", 5)
    monkeypatch.setattr(IrDocuments, "published", DOCUMENTS)


def test_the_original_files_are_read_through_the_real_ids(msmarco):
    for part, count in PARTS.items():
        collection = load(f"msmarco-document/{part}" + ("/judged" if part.startswith("trec") else ""))
        assert len(collection.queries) == count and collection.candidates.groupby("query_id").size().tolist() == [12] * count
        assert set(collection.qrels["relevance"]) == ({0, 1, 2, 3} if part.startswith("trec") else {1})
    text = collection.documents["D7"]
    assert text.startswith("Title of D7 ") and text.split()[3:] == msmarco["D7"]


def test_a_reranker_trained_on_train_is_measured_on_dev_and_both_years_of_graded_judgements(msmarco, tmp_path, monkeypatch):
    config = TrainConfig("tiny-mamba2", max_steps=3, batch_size=2, group_size=4, max_length=96, max_query_length=16, bf16=False)
    monkeypatch.delattr(IrDocuments, "get_many")  # nothing looks texts up: their store would take 14 GB more
    trained = train(config, load("msmarco-document/train"), tmp_path / "model")
    assert trained.steps == 3
    reranker = Reranker.from_pretrained(tmp_path / "model")
    for part, measure in {"dev": "RR@100", "trec-dl-2019/judged": "nDCG@10", "trec-dl-2020/judged": "nDCG@10"}.items():
        collection = load(f"msmarco-document/{part}")
        values = per_query(reranker.rerank(collection.candidates, collection), collection.qrels, [measure])
        assert (
            sorted(values.index) == sorted(collection.queries) and values[measure].between(0, 1).all() and values[measure].mean()
        )


def test_our_own_bm25_makes_candidates_too(msmarco):
    dev = load("msmarco-document/dev")
    run = BM25.build(dev.documents).search(dev.queries)
    assert per_query(run, dev.qrels, ["RR@100"])["RR@100"].mean() > 0.5


def test_scores_from_stored_tokens_are_those_of_the_texts(msmarco, reranker):
    dev = load("msmarco-document/dev")
    run = reranker.rerank(dev.candidates, dev)
    pairs = [(dev.queries[q], dev.documents[d]) for q, d in zip(run["query_id"], run["doc_id"], strict=True)]
    assert np.abs(reranker.predict(pairs) - run["score"]).max() <= 1e-5


@pytest.fixture
def store(msmarco, reranker, tmp_path):
    return TokenStore.build(load("msmarco-document/dev").documents, reranker.inputs, tmp_path / "tokens")


def test_a_store_gives_every_document_by_id_in_any_order_and_keeps_the_collections_order(store, msmarco, reranker):
    documents = load("msmarco-document/dev").documents
    for doc_id in random.Random(1).sample(sorted(msmarco), 20):
        assert store[doc_id].tolist() == reranker.inputs.documents([documents[doc_id]], 4096)[0].tolist()
        assert store[doc_id].dtype == np.uint16 and isinstance(store[doc_id].base, np.memmap)
    assert list(store) == list(msmarco) == list(store.doc_ids) and len(store) == DOCUMENTS
    assert "D0" not in store and "" not in store
    with pytest.raises(KeyError):
        store["D0"]


def test_a_build_that_was_killed_goes_on_behind_its_last_shard(msmarco, reranker, tmp_path, monkeypatch):
    documents, folder = load("msmarco-document/dev").documents, tmp_path / "tokens"
    written = []

    def killed_in_the_third(target, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(target.name)
        return write(target, *rest)

    write = token_store._write_shard
    monkeypatch.setattr(token_store, "_write_shard", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        TokenStore.build(documents, reranker.inputs, folder)
    with pytest.raises(InputError, match="manifest.json"):
        TokenStore(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("0*/*")}
    monkeypatch.setattr(token_store, "_write_shard", write)
    assert list(TokenStore.build(documents, reranker.inputs, folder)) == list(msmarco)
    assert len(before) == 8 and all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_byte_that_changed_on_the_disk_is_noticed_before_its_shard_is_read(store):
    path = store.folder / "00001" / "tokens.npy"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert len(TokenStore(store.folder)["D1"])  # of another shard
    with pytest.raises(InputError, match="00001/tokens.npy"):
        TokenStore(store.folder)["D20"]
    (store.folder / "lookup.npy").unlink()
    with pytest.raises(InputError, match="lookup.npy"):
        TokenStore(store.folder)


@pytest.mark.parametrize("ends", [[], [EOFError("ended before the end-of-stream marker")]], ids=["another file", "cut off"])
def test_a_wrong_or_cut_file_of_documents_is_named_and_leaves_no_store(ends, msmarco, reranker, tmp_path):
    def some():
        yield from (SimpleNamespace(doc_id=f"D{n}", default_text=lambda: "a text") for n in range(1, 20))
        for error in ends:
            raise error

    documents = IrDocuments(SimpleNamespace(docs_iter=some), "msmarco-document/dev")
    with pytest.raises(InputError, match=r"put https://.*/msmarco-docs\.trec\.gz \(8,501\.8 MB\) at "):
        TokenStore.build(documents, reranker.inputs, tmp_path / "tokens")
    assert not (tmp_path / "tokens" / "manifest.json").exists()


def test_collections_of_one_family_have_stores_of_their_own(reranker):
    names = "lotte/technology/dev/search", "lotte/science/test/search", "lotte/science/test/forum", "hc4/ru", "hc4/zh"
    places = {name: token_store.place(IrDocuments(ir_datasets.load(name), name).namespace, reranker.inputs) for name in names}
    assert len(set(places.values())) == 4 and places[names[1]] == places[names[2]]  # those two share their documents


def test_documents_that_are_judged_but_not_there_are_passed_over_and_candidates_that_are_not_are_refused_at_once(msmarco, tmp_path):
    home = ir_datasets.util.home_path() / "msmarco-document"
    judged, run = home / "trec-dl-2019" / "qrels", home / "dev" / "ms.run.gz"
    before = judged.read_text(), run.read_bytes()
    query_id = before[0].split()[0]
    try:
        judged.write_text(f"{before[0]}{query_id} 0 D99999 3\n")
        experiment = Experiment(tmp_path, "msmarco-document", "paper")
        assert query_id in experiment.describe_queries()["result"]["words"]
        lines = gzip.decompress(before[1]).decode().splitlines()
        lines[0] = lines[0].replace(lines[0].split()[2], "D99998")
        run.write_bytes(gzip.compress("\n".join(lines).encode()))
        with pytest.raises(InputError, match="every doc_id to be one of msmarco-document/dev, got 'D99998'"):
            Experiment(tmp_path, "msmarco-document", "paper").given_first_stage("bm25")
    finally:
        judged.write_text(before[0])
        run.write_bytes(before[1])


def test_shards_of_other_documents_are_not_continued(store, reranker):
    (store.folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="got others"):
        TokenStore.build(Documents({f"other {doc_id}": "text" for doc_id in store}), reranker.inputs, store.folder)


def test_documents_keep_their_beginning_whether_they_are_stored_or_so_few_that_they_are_not(msmarco, reranker, monkeypatch):
    documents, inputs = load("msmarco-document/dev").documents, reranker.inputs
    longest = max(msmarco, key=lambda doc_id: len(msmarco[doc_id]))
    (whole,) = inputs.documents([documents[longest]], 4096)
    for large in (DOCUMENTS, DOCUMENTS + 1):
        monkeypatch.setattr(token_store, "LARGE", large)
        assert (token_store.stored(documents, inputs) is None) == (large > DOCUMENTS)
        for limit, kept in ((None, inputs.document_limit), (20, 20)):
            assert document_tokens(documents, [longest], inputs, limit)[longest].tolist() == whole[:kept].tolist()


def test_every_vocabulary_and_every_template_has_a_store_of_its_own(reranker):
    causal = reranker.inputs
    others = copy.deepcopy(causal.tokenizer), PairTokenizer(causal.tokenizer, "encoder", 64, 16)
    others[0].add_tokens(["rivers"])
    assert len({token_store.place("x", each) for each in (causal, PairTokenizer(others[0], "causal", 64, 16), others[1])}) == 3
    assert token_store.place("x", causal) == token_store.place("x", PairTokenizer(causal.tokenizer, "causal", 128, 32))


def test_the_ids_of_a_large_vocabulary_are_kept_whole(tmp_path):
    words = {f"w{place}": place for place in range((1 << 16) + 9)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    inputs = PairTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1"), "causal", 64, 16)
    store = TokenStore.build(Documents({"d": "w65535 w65536 w65544"}), inputs, tmp_path / "tokens")
    assert store["d"].tolist()[-3:] == [65535, 65536, 65544]


def test_a_document_unknown_to_the_store_and_more_tokens_than_it_keeps_are_refused(msmarco, reranker):
    documents = load("msmarco-document/dev").documents
    with pytest.raises(InputError, match="D0"):
        document_tokens(documents, ["D1", "D0"], reranker.inputs)
    with pytest.raises(InputError, match="4096"):
        document_tokens(documents, ["D1"], reranker.inputs, 5000)
    assert list(all_ids(documents, reranker.inputs)) == list(msmarco)


@pytest.mark.parametrize("system", ["tiny-bert", "tiny-mamba"])
@pytest.mark.parametrize("length", [0, 1, 30, 47, 48, 49, 69, 72, 200])
def test_passages_cover_a_document_and_the_first_is_its_beginning(system, length):
    inputs = Reranker.from_pretrained(system, max_length=64, max_query_length=16).inputs
    document = inputs.documents([" ".join(map(str, range(length)))], 4096)[0]
    passages = cut(document, inputs, 100)
    assert passages[0].tolist() == document[: inputs.document_limit].tolist()
    head = len(inputs.document_head)
    room = inputs.document_limit - head
    for place, passage in enumerate(passages):
        begin = head + place * (room // 2)
        assert passage.tolist() == [*document[:head], *document[begin : begin + room]]
        assert (begin + room >= len(document)) == (place + 1 == len(passages))  # the last one, and no other, reaches the end
    for most in (1, 2, 3):
        reached = document[: tokens_needed(inputs, most)]
        assert [*map(list, cut(reached, inputs, most))] == [*map(list, passages[:most])]
    assert tokens_needed(inputs, 1) == inputs.document_limit


def test_maxp_is_the_best_of_a_documents_passages_and_firstp_its_beginning(msmarco, reranker):
    dev = load("msmarco-document/dev")
    first, best = reranker.rerank(dev.candidates, dev), reranker.rerank(dev.candidates, dev, max_passages=3)
    key = ["query_id", "doc_id"]
    both = first.merge(best, on=key, suffixes=("", "_best"))
    assert (both["score_best"] >= both["score"] - 1e-6).all() and (both["score_best"] > both["score"] + 1e-4).any()
    row = both.loc[(both["score_best"] - both["score"]).idxmax()]
    inputs, model = reranker.inputs, reranker.model
    query = inputs.queries([dev.queries[row["query_id"]]])[0]
    parts = cut(inputs.documents([dev.documents[row["doc_id"]]], 4096)[0], inputs, 3)
    with torch.no_grad():
        scores = model(**inputs.collate([inputs.join(query, part) for part in parts])).logits[:, 0]
    assert scores.max().item() == pytest.approx(row["score_best"], abs=1e-5)


def test_pairs_of_passages_lead_back_to_their_pairs_of_documents():
    documents = [["a1", "a2"], ["b1"], ["c1", "c2", "c3"]]
    query_of, passage_of, per_pair = spread(documents, np.array([0, 1, 0]), np.array([2, 0, 1]))
    assert (query_of.tolist(), passage_of.tolist(), per_pair.tolist()) == ([0, 0, 0, 1, 1, 0], [3, 4, 5, 0, 1, 2], [3, 2, 1])
    assert best_of(np.array([3.0, 9, 1, 4, 5, 2]), per_pair).tolist() == [9, 5, 2]


# --------------------------------------------------------------------------------------------------------------------- the plan


@pytest.fixture
def nothing_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr(ir_datasets.util, "home_path", lambda: tmp_path)
    monkeypatch.setattr(plan, "_measure", lambda name, *rest: plan.Rate(training=1e5, scoring=3e5))
    return tmp_path


def test_the_dry_run_names_every_run_of_the_papers_as_a_command_with_hours_and_gigabytes(nothing_fetched, capsys):
    assert study.main(["--scale", "paper", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "to fetch: 8.9 GB" in text and f"{nothing_fetched}/msmarco-document/collection.tsv.gz" in text
    assert "5,872,192 pairs to train on, 528,100 to score" in text  # 734,024 groups of 8; 5,281 queries of 100
    rows = [line.split(maxsplit=2) for line in text.splitlines() if "python -m" in line]
    assert [
        Run(row[2].split("systems=[")[1].split("]")[0], int(row[2].split("max_length=")[1].split()[0])) for row in rows
    ] == RUNS
    first = dict(zip(["hours", "gb", "command"], rows[RUNS.index(Run("mamba-130m", 512))], strict=True))
    assert "about 8.4 GB of tokens for each vocabulary" in text  # two bytes each
    others = {"roberta-base": "bert-base", "t5-base": "bert-base", "gpt2": "pythia-160m", "opt-350m": "opt-125m"}
    assert {name: plan.stand_in(name) for name in others} == others
    (total,) = [line.split()[0] for line in text.splitlines() if "hours in all" in line]
    assert float(total.replace(",", "")) == pytest.approx(sum(float(row[0].replace(",", "")) for row in rows), rel=1e-3)
    assert float(first["gb"]) == 5.2  # 129 M parameters, float32: the backbone, three checkpoints of weights and two moments
    assert float(rows[RUNS.index(Run("mamba-1.4b", 512))][1]) == 22.0  # LoRA: no moments
    measured, larger = (float(rows[RUNS.index(Run(name, 512))][0].replace(",", "")) for name in ("mamba-130m", "mamba-370m"))
    by_hand = 512 * (5_872_192 / 1e5 + 528_100 / 3e5) / 3600
    assert measured == pytest.approx(by_hand, abs=0.06) and larger == pytest.approx(by_hand * 372 / 129, abs=0.06)
    parser_sees = shlex.split(first["command"])[3:]
    settings = study.settle("paper", None, study.parse_parameters(parser_sees[3:6:2]))
    assert settings["systems"] == ["mamba-130m"] and settings["max_length"] == 512
    less = {"max_steps": {"default": 10}, "n_dev": 30, "n_test": 1000, "top_k": 20, "max_passages": 4}
    assert plan.pairs(settings | less) == (10 * settings["batch_size"] * settings["group_size"], (30 + 88) * 20 * 4)


def test_the_runs_of_the_papers_are_made_with_the_parameters_that_were_counted(nothing_fetched, capsys):
    given = ["-p", "epochs=0.5", "-p", "max_steps={default: 1000}"]
    assert study.main(["--scale", "paper", "--dry-run", *given]) == 0
    commands = [line[line.index("python") :] for line in capsys.readouterr().out.splitlines() if "python -m" in line]
    overrides = [study.parse_parameters(shlex.split(command)[6:14:2]) for command in commands]
    assert {(each["epochs"], each["max_steps"]["default"]) for each in overrides} == {(0.5, 1000)}
    assert [Run(*each["systems"], each["max_length"]) for each in overrides] == RUNS
    assert study.main(["--scale", "paper", "--dry-run", "-p", "max_length=256"]) == 1
    assert "expected no max_length for a list of the papers' runs" in capsys.readouterr().err


def test_the_hours_of_a_study_are_those_of_all_its_systems_each_with_its_own_steps(nothing_fetched, capsys):
    systems = {"systems": ["mamba-130m", "mamba-370m"], "max_steps": {"default": 0, "mamba-370m": 1000}}
    settings = study.settle("paper") | systems
    plan.announce(settings, yes=True)
    smaller, larger = 5_872_192, 1000 * settings["batch_size"] * settings["group_size"]  # pairs to train on
    hours = 512 * (smaller / 1e5 + 372 / 129 * larger / 1e5 + (1 + 372 / 129) * 528_100 / 3e5) / 3600
    assert f"about {hours:,.1f} hours on" in capsys.readouterr().err


def test_no_run_asks_for_more_positions_than_its_system_has():
    assert all(run.max_length <= (SYSTEMS[run.system].max_length or run.max_length) for run in RUNS)
    assert Run("opt-1.3b", 1536) in RUNS and Run("opt-1.3b", 4096) not in RUNS and Run("mamba2-780m", 1536) in RUNS


def test_gigabytes_are_not_fetched_without_a_yes(nothing_fetched, capsys):
    assert study.main(["--scale", "paper", "--results", str(nothing_fetched / "results")]) == 1
    said = capsys.readouterr().err
    assert "8,501.8 MB  https://" in said and "/msmarco-docs.trec.gz -> " in said and "hours on" in said and "--yes" in said
    assert not (nothing_fetched / "results").exists()
    plan.announce(study.settle("paper"), yes=True)
    plan.announce(study.settle("quick"), yes=False)
    assert "scale quick: about" in plan.dry_run("quick", study.settle("quick"), {})


@pytest.mark.parametrize("more", [{"max_length": 8192}, {"max_passages": 20}], ids=str)
def test_more_of_a_document_than_is_kept_is_refused_before_anything_is_fetched_or_trained(more, nothing_fetched):
    with pytest.raises(InputError, match="at most 4096 tokens of a document of a large collection"):
        plan.announce(study.settle("paper") | more, yes=True)
    plan.announce(study.settle("paper") | {"max_length": 4096, "max_passages": 1}, yes=True)


@pytest.mark.parametrize("answer", ["Y", "yes", "", "n"])
def test_at_a_terminal_nothing_but_a_yes_is_one(answer, nothing_fetched, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda question: answer)
    with nullcontext() if answer.startswith(("Y", "y")) else pytest.raises(InputError, match="got no yes"):
        plan.announce(study.settle("paper"), yes=False)


def test_what_is_there_is_not_asked_for(msmarco, monkeypatch, capsys):
    monkeypatch.setattr(plan, "_measure", lambda name, *rest: plan.Rate(1e5, 3e5))
    plan.announce(study.settle("paper"), yes=False)
    assert "nothing to fetch but the checkpoints" in capsys.readouterr().err


def test_a_rate_is_measured_on_a_backbone_of_the_real_width(monkeypatch):
    monkeypatch.setattr(plan, "MEASURED", 16)
    monkeypatch.setattr(plan, "MINUTE", 0.0)
    rate = plan.measure(["mamba-130m"], group_size=2)["mamba-130m"]
    assert 0 < rate.training < rate.scoring


# --------------------------------------------------------------------------------------------------------------- the whole study


def test_ours_beside_the_published_figures_is_the_mean_of_each_trec_year_and_of_dev_over_seeds(msmarco):
    years = {year: load(f"msmarco-document/{year}/judged").queries for year in ("trec-dl-2019", "trec-dl-2020")}
    draw, records, means = random.Random(0), [], {}
    for seed in range(2):
        values = {query_id: draw.random() for queries in years.values() for query_id in queries}
        for year, queries in years.items():
            means.setdefault((f"msmarco-document/{year}/judged", "nDCG@10"), []).append(
                np.mean([values[each] for each in queries])
            )
        means.setdefault(("msmarco-document/dev", "RR@100"), []).append(alone := draw.random())
        for system, more in (("mamba-130m", {}), ("mamba-130m + bm25", {"dev": {"alone": {"RR@100": alone}}})):
            result = {"measures": {"nDCG@10": {"mean": 0.5}}, "per_query": {"nDCG@10": values}} | more
            records.append(
                {"kind": "evaluate", "system": system, "seed": seed, "collection": "msmarco-document/test", "result": result}
            )
    table = beside_ours(records)
    ours = table[(table["system"] == "mamba-130m") & table["ours"].notna()].set_index(["collection", "measure"])["ours"]
    assert ours.to_dict() == pytest.approx({key: np.mean(found) for key, found in means.items()})
    assert not table[table["ours"].notna()]["system"].str.contains("bm25").any()


def test_published_figures_are_of_msmarcos_documents_and_of_what_else_was_measured_best_first():
    result = {"measures": {"nDCG@10": {"mean": 0.76}, "P@1": {"mean": 0.9}}, "per_query": {}}
    passages = {
        "kind": "evaluate",
        "system": "mine",
        "seed": 0,
        "collection": "msmarco-passage/trec-dl-2019/judged",
        "result": result,
    }
    nobodys, ours = beside_ours([]), beside_ours([passages])
    assert set(ours["collection"]) - set(nobodys["collection"]) == {passages["collection"]}
    assert nobodys["collection"].str.startswith("msmarco-document/").all() and not nobodys.empty
    measured = ours[ours["collection"] == passages["collection"]]
    assert set(measured["measure"]) == {"nDCG@10"} and measured["system"].iloc[0] == "mine" and len(measured) > 2
    for _, figures in ours.groupby(["collection", "measure"]):
        assert figures[["value", "ours"]].max(axis=1).is_monotonic_decreasing


def test_a_study_at_scale_paper_runs_its_notebooks_on_the_miniature_with_both_trec_years_as_its_test(
    msmarco, tmp_path, monkeypatch
):
    start = f"from rankmamba.collection import IrDocuments\n\nIrDocuments.published = {DOCUMENTS}\n"  # of each notebook's Python
    (tmp_path / "sitecustomize.py").write_text(start)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    small = {"systems": ["tiny-mamba"], "batch_size": 2, "group_size": 4, "max_length": 64, "max_query_length": 16}
    study.run("paper", "01,02,03,04,07", small, tmp_path)
    experiment = Experiment(tmp_path, "msmarco-document", "paper", 0, 5193, 88)
    assert experiment.trained("tiny-mamba")["result"]["steps"] == 6  # 6 queries twice
    records = {record["system"]: record for record in read_records(tmp_path, "evaluate")}
    assert set(records) == {"bm25", "tiny-mamba", "tiny-mamba + bm25"}
    assert len(records["tiny-mamba"]["result"]["per_query"]["nDCG@10"]) == 8
    assert "come with msmarco-document" in records["bm25"]["note"]
    mixed = records["tiny-mamba + bm25"]["result"]
    best = max(mixed["dev"]["value"])
    assert mixed["measure"] == "nDCG@10" and mixed["dev"]["alone"]["nDCG@10"] == pytest.approx(mixed["dev"]["value"][-1])
    assert all(mixed["dev"]["value"][round(10 * weight)] <= best for weight in mixed["weights"])
    table = beside_ours(read_records(tmp_path))
    ours = table[table["system"] == "tiny-mamba"]
    assert set(ours["collection"]) == {
        f"msmarco-document/{part}" for part in ("dev", "trec-dl-2019/judged", "trec-dl-2020/judged")
    }
    assert ours["value"].isna().all() and ours["ours"].between(0, 1).all()
    assert "mamba-130m" in set(table["system"])
    monkeypatch.setattr(published, "load", lambda name: pytest.fail(f"read {name}"))
    pd.testing.assert_frame_equal(beside_ours(read_records(tmp_path)), table)  # on a machine without the collection, too
    assert "mamba-130m" in (tmp_path / "report.html").read_text(encoding="utf-8")
