"""What others use fits: PyTerrier, sentence-transformers, ir_measures' command line and TensorBoard."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.evaluation import CrossEncoderClassificationEvaluator, CrossEncoderRerankingEvaluator

from rankmamba.collection import load
from rankmamba.data.formats import write_qrels
from rankmamba.data.runs import write_run
from rankmamba.errors import InputError
from rankmamba.evaluate import per_query
from rankmamba.reranker import Reranker
from rankmamba.train import TrainConfig, train

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [("which river", text) for text in ("short", "a longer text about rivers and bridges " * 3, "", "a book " * 90)]


def lively(system):
    """A reranker with random weights that are large enough for texts to score differently."""
    torch.manual_seed(0)
    reranker = Reranker.from_pretrained(system, dtype=torch.float32, max_length=64, max_query_length=20)
    for parameter in reranker.model.parameters():
        parameter.data.mul_(3)
    return reranker


@pytest.fixture(scope="module")
def test_set():
    return load("rankmamba/tiny/test")


def test_a_pyterrier_pipeline_reranks_a_first_stage(test_set):
    pt = pytest.importorskip("pyterrier")
    reranker = lively("tiny-mamba")
    candidates = test_set.candidates
    frame = pd.DataFrame({"qid": candidates["query_id"], "docno": candidates["doc_id"], "score": candidates["score"]})
    bm25 = pt.Transformer.from_df(frame.assign(rank=candidates["rank"] - 1))
    texts = pt.apply.text(lambda row: test_set.documents[row["docno"]])
    pipeline = (bm25 % 5) >> texts >> pt.apply.generic(reranker.transform)
    topics = pd.DataFrame(test_set.queries.items(), columns=["qid", "query"])
    expected = reranker.rerank(candidates, test_set, top_k=5).set_index(["query_id", "doc_id"])["score"]
    found = pipeline(topics).set_index(["qid", "docno"])["score"].reindex(expected.index)
    assert np.allclose(found, expected, atol=1e-5)
    qrels = test_set.qrels.rename(columns={"query_id": "qid", "doc_id": "docno", "relevance": "label"})
    table = pt.Experiment([bm25 % 5, pipeline], topics, qrels, ["ndcg_cut_10"], names=["bm25", "ours"])
    run = reranker.rerank(candidates, test_set, top_k=5)
    assert table["ndcg_cut_10"].iloc[1] == pytest.approx(per_query(run, test_set.qrels)["nDCG@10"].mean(), abs=1e-6)


@pytest.mark.parametrize("system", ["tiny-bert", "tiny-neox", "tiny-t5", "tiny-mamba2"])
def test_sentence_transformers_loads_our_folder_and_gives_the_same_scores(system, tmp_path):
    reranker = lively(system)
    reranker.save_pretrained(tmp_path / "saved")
    encoder = CrossEncoder(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    assert np.allclose(encoder.predict(PAIRS), reranker.predict(PAIRS), atol=1e-5)
    ours, theirs = (model.rank("which river", [text for _, text in PAIRS]) for model in (reranker, encoder))
    assert [row["corpus_id"] for row in ours] == [row["corpus_id"] for row in theirs]
    encoder.save_pretrained(str(tmp_path / "again"))
    again = CrossEncoder(str(tmp_path / "again"), device="cpu", trust_remote_code=True)
    assert np.array_equal(again.predict(PAIRS), encoder.predict(PAIRS))


def test_sentence_transformers_never_reads_our_folder_with_another_template(tmp_path):
    lively("tiny-mamba").save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        CrossEncoder(str(tmp_path / "saved"), device="cpu")


def test_sentence_transformers_max_length_holds_and_what_our_folder_has_not_is_refused(tmp_path):
    reranker, folder = lively("tiny-neox"), str(tmp_path / "saved")
    reranker.save_pretrained(folder)
    load_it = partial(CrossEncoder, folder, device="cpu", trust_remote_code=True)
    short = load_it(max_length=30)
    ours = Reranker.from_pretrained(folder, dtype=torch.float32, max_length=30, max_query_length=15)
    assert short.max_seq_length == 30 and np.allclose(short.predict(PAIRS), ours.predict(PAIRS), atol=1e-5)
    short.save_pretrained(str(tmp_path / "short"))
    assert np.allclose(
        Reranker.from_pretrained(tmp_path / "short", dtype=torch.float32).predict(PAIRS), ours.predict(PAIRS), atol=1e-5
    )
    short.max_seq_length = 64
    assert np.allclose(short.predict(PAIRS), reranker.predict(PAIRS), atol=1e-5)
    assert np.array_equal(load_it(model_kwargs={"dtype": torch.float32}).predict(PAIRS), short.predict(PAIRS))
    for refused in (
        lambda: load_it(max_length="30"),
        lambda: load_it(model_kwargs={"torch_dtype": torch.bfloat16}),
        lambda: load_it(num_labels=2),
        lambda: short.predict(PAIRS, prompt="query: "),
    ):
        with pytest.raises(InputError, match="expected .* got .*"):
            refused()


def test_a_single_text_is_a_document_for_the_trainer_that_counts_its_tokens(tmp_path):
    lively("tiny-mamba").save_pretrained(tmp_path / "saved")
    encoder = CrossEncoder(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    texts = ["ab", "the river and its bridges"]
    single, pairs = (encoder.preprocess(given)["input_ids"] for given in (texts, [("", text) for text in texts]))
    assert torch.equal(single, pairs)


def test_the_keywords_of_cross_encoder_mean_the_same_here():
    reranker, documents = lively("tiny-mamba"), [text for _, text in PAIRS]
    raw = reranker.predict(PAIRS)
    given = {"batch_size": 2, "num_workers": 0, "show_progress_bar": None, "activation_fn": torch.nn.Sigmoid()}
    scores = reranker.predict(PAIRS, convert_to_tensor=True, **given)
    assert isinstance(scores, torch.Tensor) and np.allclose(scores, 1 / (1 + np.exp(-raw)), atol=1e-5)
    assert np.allclose(torch.stack(reranker.predict(PAIRS, convert_to_numpy=False)), raw)
    ranked = reranker.rank("which river", documents, convert_to_tensor=True, **given)
    assert [row["corpus_id"] for row in ranked] == [row["corpus_id"] for row in reranker.rank("which river", documents)]
    assert ranked[0]["score"] == pytest.approx(float(scores.max()))
    for wrong in ({"prompt": "query: "}, {"device": "cuda"}, {"batch_sise": 3}):
        with pytest.raises(InputError, match=f"expected keywords .* got {next(iter(wrong))}="):
            reranker.rank("which river", documents, **wrong)


def test_the_classification_evaluator_of_sentence_transformers_accepts_a_reranker():
    reranker = lively("tiny-mamba")
    labels = (reranker.predict(PAIRS) > np.median(reranker.predict(PAIRS))).astype(int).tolist()
    measures = CrossEncoderClassificationEvaluator(PAIRS, labels, name="ours", write_csv=False)(reranker)
    assert measures["ours_accuracy"] == 1


def test_the_reranking_evaluator_of_sentence_transformers_accepts_a_reranker():
    reranker = lively("tiny-mamba")
    samples = [
        {"query": query, "positive": [PAIRS[1][1]], "negative": [PAIRS[0][1], PAIRS[3][1]]} for query in ("river", "bridge")
    ]
    measures = CrossEncoderRerankingEvaluator(samples, name="ours", write_csv=False)(reranker)
    ranks = [[row["corpus_id"] for row in reranker.rank(s["query"], s["positive"] + s["negative"])].index(0) for s in samples]
    assert measures["ours_mrr@10"] == pytest.approx(np.mean([1 / (rank + 1) for rank in ranks]))
    with pytest.raises(InputError, match="template"):
        reranker.predict(PAIRS, prompt_name="query")


def test_the_command_line_of_ir_measures_reads_our_files_and_gives_our_numbers(test_set, tmp_path):
    # scores without ties: others break ties by the document's id, and not as the file has them
    run = test_set.candidates.assign(score=-test_set.candidates["rank"].astype(float))
    write_run(tmp_path / "bm25.run", run, "bm25")
    write_qrels(tmp_path / "test.qrels", test_set.qrels)
    command = [sys.executable, "-m", "ir_measures", "test.qrels", "bm25.run", "nDCG@10", "RR@100", "AP@100", "--places", "6"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    theirs = {measure: float(value) for measure, value in (line.split("\t") for line in said.splitlines())}
    ours = per_query(run, test_set.qrels).mean()
    assert theirs == pytest.approx({measure: ours[measure] for measure in theirs}, abs=1e-6)


def test_the_trainer_logs_every_step_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrainConfig("tiny-mamba", batch_size=2, group_size=4, max_steps=3, max_length=64, max_query_length=20)
    trained = train(config, load("rankmamba/tiny/train"), tmp_path / "model", tensorboard=tmp_path / "log")
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"], abs=1e-4)) for row in trained.curve] and len(losses) == 3
    assert {"train/learning_rate", "train/grad_norm"} <= set(events.Tags()["scalars"])
