"""Reranker: scores, rankings, saving and loading, for every family."""

import copy
import pickle
import threading
import time
from contextlib import contextmanager, nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification

from rankmamba import scan
from rankmamba.backbones import SYSTEMS, build
from rankmamba.collection import Collection, load
from rankmamba.errors import InputError
from rankmamba.inputs import PairTokenizer
from rankmamba.model import RerankerConfig
from rankmamba.network.last_layer import LastLayer
from rankmamba.network.mixers import has_scan
from rankmamba.network.nano import NANO
from rankmamba.reranker import Reranker, unique
from rankmamba.reranking.threads import even_batches
from rankmamba.scan import portable

FAMILIES = [f"tiny-{name}" for name in NANO]
TEXTS = ["short", "a longer text about rivers and bridges " * 3, "", "snow on the mountain", "a book " * 30]


@contextmanager
def threads(count: int):
    """Let torch compute on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module", params=FAMILIES)
def reranker(request):
    torch.manual_seed(0)
    built = Reranker.from_pretrained(request.param, dtype=torch.float32, max_length=64, max_query_length=20)
    # with small weights every text scores the same, with larger ones rounding is amplified
    for parameter in built.model.parameters():
        parameter.data.mul_(2)
    return built


def test_a_score_is_the_same_alone_and_in_mixed_company(reranker):
    pairs = [("which river", text) for text in TEXTS]
    alone = np.concatenate([reranker.predict([pair]) for pair in pairs])
    together = reranker.predict(pairs, batch_tokens=100_000)
    assert np.abs(alone - together).max() <= 1e-5
    assert np.ptp(together) > 1e-3


def test_a_model_in_training_mode_scores_without_dropout():
    torch.manual_seed(0)
    reranker = Reranker.from_pretrained("tiny-neox", dtype=torch.float32, max_length=64, max_query_length=20)
    pairs = [("which river", text) for text in TEXTS]
    expected = reranker.predict(pairs)
    reranker.model.train()
    assert np.array_equal(reranker.predict(pairs), expected)


def test_the_order_of_pairs_and_the_token_budget_change_nothing(reranker):
    pairs = [(query, text) for query in ("river", "a mountain in winter") for text in TEXTS]
    scores = reranker.predict(pairs)
    assert np.allclose(scores[::-1], reranker.predict(pairs[::-1], batch_tokens=70), atol=1e-5)


class Conversions(TorchDispatchMode):
    """Counts how often one of the parameters, or a part of one, is converted to another format."""

    def __init__(self, model):
        super().__init__()
        self.places, self.count = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, 0

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        if function is torch.ops.aten._to_copy.default:
            self.count += arguments[0].untyped_storage().data_ptr() in self.places
        return function(*arguments, **(settings or {}))


def conversions_of_weights(reranker: Reranker, batches: int, monkeypatch) -> int:
    """How often a weight is converted while so many batches are scored, on whatever threads."""
    modes, score_batch = [], reranker._score_batch

    def counted(*arguments, **settings):
        with Conversions(reranker.model) as mode:
            modes.append(mode)
            return score_batch(*arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(reranker, "_score_batch", counted)
        reranker.predict([("which river", f"text {copy}") for copy in range(batches)], batch_tokens=1)
    assert len(modes) == batches
    return sum(mode.count for mode in modes)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_scoring_converts_the_weights_once_whatever_the_number_of_batches(family, monkeypatch):
    reranker = Reranker.from_pretrained(family, dtype=torch.bfloat16, max_length=64, max_query_length=20)
    with threads(1):
        once = conversions_of_weights(reranker, 1, monkeypatch)
        # a part of one matrix, which autocast does not keep
        cut = has_scan(reranker.model.last_layer._layer or torch.nn.Identity())
        assert conversions_of_weights(reranker, 4, monkeypatch) == once + 3 * cut > 0
    with threads(2):  # two may convert one at the same time
        assert once + 11 * cut <= conversions_of_weights(reranker, 12, monkeypatch) <= 2 * once + 11 * cut


def test_batches_side_by_side_score_as_one_after_the_other_and_leave_torch_its_threads(reranker):
    pairs = [(query, text) for query in ("river", "a mountain in winter", "who") for text in TEXTS]
    with threads(1):
        expected = reranker.predict(pairs)
    for count in (2, 3, 6):
        with threads(count):
            assert np.abs(reranker.predict(pairs, batch_tokens=300) - expected).max() <= 1e-5
            assert reranker.cost.pairs == len(pairs) and torch.get_num_threads() == count and torch.is_grad_enabled()


def test_threads_that_begin_while_another_scores_have_all_of_torchs_threads(monkeypatch):
    reranker, seen = Reranker.from_pretrained("tiny-bert", dtype=torch.float32, max_length=64, max_query_length=20), []
    score_batch = reranker._score_batch

    def begin_another(pairs, alone):
        another = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        another.start()
        another.join()
        return score_batch(pairs, alone)

    monkeypatch.setattr(reranker, "_score_batch", begin_another)
    with threads(4):
        reranker.predict([("river", text) for text in TEXTS], batch_tokens=1)
    assert seen == [4] * len(TEXTS)


def test_an_error_in_one_of_the_batches_side_by_side_ends_the_call(monkeypatch):
    reranker, computed = Reranker.from_pretrained("tiny-bert", dtype=torch.float32, max_length=64, max_query_length=20), []

    def fail(pairs, alone):
        computed.append(pairs)
        time.sleep(0.01)
        raise ZeroDivisionError("of this batch")

    monkeypatch.setattr(reranker, "_score_batch", fail)
    with threads(2), pytest.raises(ZeroDivisionError, match="of this batch"):
        reranker.predict([("river", f"text {i}") for i in range(200)], batch_tokens=1)
    assert len(computed) < 100


def test_batches_that_do_not_fit_side_by_side_are_computed_alone_before_anything_is_refused(monkeypatch):
    reranker = Reranker.from_pretrained("tiny-mamba", dtype=torch.float32, max_length=64, max_query_length=20)
    pairs, forward, active = [("river", "stone " * (3 + i)) for i in range(12)], reranker.model.forward, []
    with threads(1):
        expected = reranker.predict(pairs)
    lock, refused = threading.Lock(), []

    def small_memory(**features):
        with lock:
            active.append(None)
            crowded = len(active) > 1
        try:
            time.sleep(0.01)
            if crowded:
                refused.append(features)
                raise MemoryError
            return forward(**features)
        finally:
            active.pop()

    monkeypatch.setattr(reranker.model, "forward", small_memory)
    with threads(2):
        assert np.abs(reranker.predict(pairs, batch_tokens=1) - expected).max() <= 1e-6
    assert refused


@given(st.lists(st.integers(1, 600), max_size=60), st.integers(1, 3000), st.integers(1, 5))
def test_batches_for_several_threads_hold_every_sequence_once_and_keep_within_the_budget(lengths, budget, count):
    lengths = np.array(lengths, dtype=int)
    batches = even_batches(lengths, budget, count, 64)
    assert sorted(np.concatenate([*batches, []])) == list(range(len(lengths)))
    sizes = [int(lengths[batch].max()) * len(batch) for batch in batches]
    assert all(size <= max(1, budget // count) or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_a_copy_of_a_model_scores_alike_and_computes_its_last_layer_by_itself(reranker, again):
    pairs = [("which river", text) for text in TEXTS]
    expected = reranker.predict(pairs)
    other = Reranker(again(reranker.model), reranker.tokenizer, dtype=torch.float32)
    assert np.array_equal(other.predict(pairs), expected)
    assert other.model.last_layer._batch is not reranker.model.last_layer._batch


def test_saving_and_loading_keeps_every_weight_and_score(reranker, tmp_path):
    pairs = [("which river", text) for text in TEXTS]
    reranker.save_pretrained(tmp_path / "saved")
    loaded = Reranker.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    before, after = reranker.model.state_dict(), loaded.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert np.allclose(loaded.predict(pairs), reranker.predict(pairs), rtol=0, atol=1e-6)
    assert not list((tmp_path / "saved").glob("*.bin"))


def test_a_folder_that_is_replaced_while_it_is_loaded_is_loaded_again(tmp_path, monkeypatch):
    old, new = (Reranker.from_pretrained("tiny-mamba", max_length=length, max_query_length=12) for length in (40, 60))
    with torch.no_grad():
        new.model.score.weight.add_(1)
    old.save_pretrained(tmp_path)
    read = RerankerConfig.from_pretrained.__func__

    def and_then_another_process_saves(cls, folder, **options):
        config = read(cls, folder, **options)
        if config.limits["max_length"] == 40:
            new.save_pretrained(tmp_path)
        return config

    monkeypatch.setattr(RerankerConfig, "from_pretrained", classmethod(and_then_another_process_saves))
    loaded = Reranker.from_pretrained(tmp_path)
    assert loaded.inputs.max_length == 60 and torch.equal(loaded.model.score.weight, new.model.score.weight)


@pytest.mark.parametrize("text", ["\0a", "a\0b"])
def test_a_text_with_a_zero_in_it_is_a_text_of_its_own(text):
    other = text.replace("a", "c")
    assert unique([text, other, text])[0] == [text, other] and unique([text, other, text])[1].tolist() == [0, 1, 0]


def test_saving_over_a_saved_reranker_keeps_what_is_not_part_of_one(reranker, tmp_path):
    reranker.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "NOTES.md").write_text("mine")
    (tmp_path / "m" / ".git").mkdir()
    (tmp_path / "m" / ".git" / "HEAD").write_text("ref")
    (tmp_path / "m" / "model-00001-of-00002.safetensors").write_bytes(b"a part of other weights")
    reranker.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "NOTES.md").read_text() == "mine" and (tmp_path / "m" / ".git" / "HEAD").read_text() == "ref"
    assert not (tmp_path / "m" / "model-00001-of-00002.safetensors").exists()


def test_a_saved_folder_is_loaded_by_transformers_itself(reranker, tmp_path):
    reranker.save_pretrained(tmp_path / "saved")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    batch = reranker.inputs.collate(
        [reranker.inputs.join(reranker.inputs.queries(["a"])[0], reranker.inputs.documents(["b"])[0])]
    )
    with torch.inference_mode():
        assert model(**batch).logits.item() == pytest.approx(float(reranker.predict([("a", "b")])[0]), abs=1e-6)


def test_transformers_loads_all_of_a_saved_folder_to_the_device_that_is_asked_for(reranker, tmp_path):
    reranker.save_pretrained(tmp_path / "saved")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", device_map="meta")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


def test_ranking_is_by_score_and_ties_keep_the_given_order(reranker):
    ranked = reranker.rank("which river", [*TEXTS, TEXTS[1]], top_k=4, return_documents=True)
    assert [row["score"] for row in ranked] == sorted((row["score"] for row in ranked), reverse=True)
    assert all(row["text"] == [*TEXTS, TEXTS[1]][row["corpus_id"]] for row in ranked)
    twins = reranker.rank("which river", ["same", "other"] * 20)  # NumPy sorts a few stably in any case
    places = [row["corpus_id"] for row in twins]
    assert places[:20] == sorted(places[:20]) and places[20:] == sorted(places[20:])
    assert len(reranker.rank("q", ["one"], top_k=10)) == 1
    assert reranker.rank("q", []) == []


def test_reranking_a_run_gives_the_scores_of_predict(reranker):
    collection = load("rankmamba/tiny/test")
    run = reranker.rerank(collection.candidates, collection, top_k=5)
    pairs = ["query_id", "doc_id"]
    best = collection.candidates[collection.candidates["rank"] <= 5]
    assert set(map(tuple, run[pairs].values)) == set(map(tuple, best[pairs].values)) and (best["rank"] == 5).any()
    texts = collection.documents.get_many(set(run["doc_id"]))
    scores = reranker.predict([(collection.queries[q], texts[d]) for q, d in zip(run["query_id"], run["doc_id"], strict=True)])
    assert np.allclose(scores, run["score"], atol=1e-5)
    assert (run.groupby("query_id")["rank"].diff().dropna() == 1).all()
    without_ranks = collection.candidates[["query_id", "doc_id", "score"]].sample(frac=1, random_state=0)
    assert reranker.rerank(without_ranks, collection, top_k=5).equals(run)


def test_the_pyterrier_interface_adds_score_and_rank_from_zero(reranker):
    frame = pd.DataFrame({"qid": ["1", "1", "2"], "query": ["river", "river", "snow"], "docno": list("abc"), "text": TEXTS[:3]})
    result = reranker.transform(frame)
    assert result.groupby("qid")["rank"].min().tolist() == [0, 0]
    assert result[result["qid"] == "1"]["score"].is_monotonic_decreasing


def test_a_pyterrier_frame_is_ranked_by_query_id_and_ties_keep_their_order():
    reranker = Reranker.from_pretrained("tiny-bert", dtype=torch.float32, max_length=64, max_query_length=20)
    frame = pd.DataFrame(
        {"qid": ["2", "1", "2", "1"], "query": "river", "docno": list("abcd"), "text": ["same", "x", "same", "y"]}
    )
    result = reranker.transform(frame)
    assert result["qid"].tolist() == ["1", "1", "2", "2"] and result["rank"].tolist() == [0, 1, 0, 1]
    assert result["docno"].tolist()[2:] == ["a", "c"]
    with pytest.raises(InputError, match="none called docno, text"):
        reranker.transform(frame[["qid", "query"]])


def test_the_cost_counts_each_pair_once_its_tokens_and_what_is_computed_with_padding(monkeypatch):
    reranker = Reranker.from_pretrained("tiny-bert", dtype=torch.float32, max_length=64, max_query_length=20)
    collate, padded = reranker.inputs.collate, []

    def counted(pairs):
        batch = collate(pairs)
        padded.append(batch["input_ids"].numel())
        return batch

    monkeypatch.setattr(reranker.inputs, "collate", counted)
    texts = ["stone " * (1 + count) for count in range(30)]
    reranker.predict([("river", text) for text in [*texts, *texts]], batch_tokens=300)
    (query,) = reranker.inputs.queries(["river"])
    tokens = sum(len(reranker.inputs.join(query, document)) for document in reranker.inputs.documents(texts))
    assert (reranker.cost.pairs, reranker.cost.tokens, reranker.cost.padded_tokens) == (30, tokens, sum(padded))
    assert len(padded) > 1 and sum(padded) > tokens


def test_what_was_scored_before_memory_ran_out_stays_and_only_the_rest_is_cut_again(monkeypatch):
    reranker = Reranker.from_pretrained("tiny-bert", dtype=torch.float32, max_length=64, max_query_length=20)
    forward, sizes = reranker.model.forward, []
    pairs = [("river", "stone " * (15 - i)) for i in range(12)]  # the longest are scored first, so the last ones are left
    expected = reranker.predict(pairs)

    def full_at_the_third(**features):
        sizes.append(len(features["input_ids"]))
        if len(sizes) == 3:
            raise MemoryError
        return forward(**features)

    monkeypatch.setattr(reranker.model, "forward", full_at_the_third)
    with threads(1):
        assert np.abs(reranker.predict(pairs, batch_tokens=50) - expected).max() <= 1e-5
    assert sizes[2] > 1 and sum(sizes) == len(pairs) + sizes[2]


@pytest.mark.parametrize("column, value", [("query_id", "no-such-query"), ("doc_id", "no-such-document")])
def test_a_run_that_names_something_unknown_is_refused_by_name(column, value):
    collection = load("rankmamba/tiny/test")
    reranker = Reranker.from_pretrained("tiny-bert", dtype=torch.float32)
    with pytest.raises(InputError, match=value):
        reranker.rerank(collection.candidates.assign(**{column: value}), collection)


def test_a_run_with_ranks_from_zero_or_pyterriers_columns_is_refused():
    collection = load("rankmamba/tiny/test")
    reranker, run = Reranker.from_pretrained("tiny-bert", dtype=torch.float32), collection.candidates
    for wrong, said in (
        (run.assign(rank=run["rank"] - 1), "expected ranks from 1, got 0"),
        (run.assign(rank=np.nan), "expected ranks from 1, got nan"),
        (run.assign(rank=run["rank"].astype("Int64").mask(run["rank"] == 2)), "expected ranks from 1, got <NA>"),
        (run.assign(rank=np.inf), "expected ranks from 1, got inf"),
        (pd.concat([run, run.head(1)]), "each document once per query in the candidates"),
        (run.rename(columns={"query_id": "qid", "doc_id": "docno"}), "got none called query_id, doc_id"),
    ):
        with pytest.raises(InputError, match=said):
            reranker.rerank(wrong, collection, top_k=2)
        assert reranker.cost.pairs == 0


@pytest.mark.parametrize("wrong", ["top_k", "max_passages"])
def test_nothing_to_rerank_is_refused(wrong):
    collection = load("rankmamba/tiny/test")
    reranker = Reranker.from_pretrained("tiny-bert", dtype=torch.float32)
    with pytest.raises(InputError, match="top_k and max_passages of at least 1, got"):
        reranker.rerank(collection.candidates, collection, **{wrong: 0})


@pytest.mark.parametrize("wrong", [torch.float64, torch.int8, "float31", "nn"])
def test_a_dtype_that_products_do_not_run_in_is_refused_and_one_may_be_named(wrong):
    assert Reranker.from_pretrained("tiny-bert", dtype="bfloat16").dtype is torch.bfloat16
    with pytest.raises(InputError, match="a dtype among torch.bfloat16, torch.float32, torch.float16, got"):
        Reranker.from_pretrained("tiny-bert", dtype=wrong)


def test_an_unknown_system_and_a_number_for_a_text_are_refused():
    with pytest.raises(InputError, match="no-such-system"):
        Reranker.from_pretrained("no-such-system")
    with pytest.raises(InputError, match="strings"):
        Reranker.from_pretrained("tiny-bert").predict([("query", 3)])


def test_pairs_and_texts_may_come_from_any_iterable_and_what_only_looks_like_them_is_refused():
    reranker = Reranker.from_pretrained("tiny-bert", dtype=torch.float32)
    pairs = [("a river", text) for text in TEXTS]
    expected = reranker.predict(pairs)
    for some in (
        zip(["a river"] * len(TEXTS), TEXTS, strict=True),
        np.array(pairs),
        pd.DataFrame(pairs).values,
        map(list, pairs),
    ):
        assert np.array_equal(reranker.predict(some), expected)
    for wrong in ([{"query": "a", "document": "b"}], [{"a", "b"}], ["ab", "cd"], pd.DataFrame({"ab": ["x"], "cd": ["y"]})):
        with pytest.raises(InputError, match="expected pairs"):
            reranker.predict(wrong)
    ranked = reranker.rank("a river", TEXTS, return_documents=True)
    assert reranker.rank("a river", pd.Series(TEXTS, index=range(5, 10)), return_documents=True) == ranked
    assert reranker.rank("a river", iter(TEXTS), return_documents=True) == ranked
    with pytest.raises(InputError, match="got a mapping"):
        reranker.rank("a river", dict(enumerate(TEXTS)))
    with pytest.raises(InputError, match="got a DataFrame; pass one of its columns"):
        reranker.rank("a river", pd.DataFrame({"text": TEXTS}))
    with pytest.raises(InputError, match="got the text 'abc'"):
        reranker.rank("a river", "abc")
    with pytest.raises(InputError, match="top_k >= 0, got -1"):
        reranker.rank("a river", TEXTS, top_k=-1)
    with pytest.raises(InputError, match="a whole number of tokens as max_length, got 'a'"):
        Reranker.from_pretrained("tiny-bert", max_length="a")


def test_nano_systems_have_equal_budgets_within_five_percent():
    sizes = {name: build(SYSTEMS[f"nano-{name}-scratch"])[0].parameters_outside_embeddings() for name in NANO}
    assert max(sizes.values()) / min(sizes.values()) <= 1.05, sizes
    assert all(2e6 <= size <= 6e6 for size in sizes.values()), sizes


def test_the_last_layer_skips_what_nobody_reads_and_no_score_or_gradient_changes(reranker, monkeypatch):
    model, pairs = reranker.model, [("which river", text) for text in TEXTS]
    joined = [reranker.inputs.join(reranker.inputs.queries([q])[0], reranker.inputs.documents([d])[0]) for q, d in pairs]
    batch = reranker.inputs.collate(joined)

    def scores_and_gradient():
        model.zero_grad()
        logits = model(**batch).logits
        logits.square().sum().backward()
        return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    skipping, gradient = scores_and_gradient()
    monkeypatch.setattr(LastLayer, "only", lambda self, positions: nullcontext())
    whole, expected = scores_and_gradient()
    assert torch.allclose(skipping, whole, atol=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("reranker", [name for name in FAMILIES if SYSTEMS[name].kind == "causal"], indirect=True)
def test_padding_on_the_left_changes_no_score(reranker):
    model = reranker.model
    short, long = torch.randint(200, 900, (6,)), torch.randint(200, 900, (9,))
    ids, mask = torch.stack([torch.cat([torch.zeros(3, dtype=torch.int64), short]), long]), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    with torch.no_grad():
        alone = torch.cat([model(input_ids=row[None], attention_mask=torch.ones_like(row[None])).logits for row in (short, long)])
        together = model(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(together, alone, atol=1e-5) and alone.isfinite().all()


def test_no_call_leaves_its_limit_in_the_tokenizer_that_threads_share(reranker):
    inputs = reranker.inputs
    tokenizer = copy.deepcopy(inputs.tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(3)  # as the files of some checkpoints have it
    inputs = PairTokenizer(tokenizer, inputs.kind, inputs.max_length, inputs.max_query_length)
    for tokenise, limit in ((inputs.queries, inputs.query_limit), (inputs.documents, inputs.document_limit)):
        assert len(tokenise(["river " * 999])[0]) == limit
        assert tokenizer.backend_tokenizer.truncation is None


def test_text_that_no_file_could_hold_is_named(reranker):
    with pytest.raises(InputError, match="half a surrogate pair in 'a .ud800'"):
        reranker.predict([("query", "a \ud800")])


def test_a_document_that_is_no_text_is_named():
    collection = load("rankmamba/tiny/test")
    documents = dict(collection.documents.pairs())
    missing = Collection("mine", documents | {collection.candidates["doc_id"][0]: np.nan}, collection.queries, collection.qrels)
    with pytest.raises(InputError, match="expected text, got nan"):
        Reranker.from_pretrained("tiny-bert").rerank(collection.candidates, missing)


PAIRS = [("who wrote hamlet", "Hamlet is a play by Shakespeare."), ("who wrote hamlet", "A small dog."), ("a dog", "A small dog.")]


def test_a_word_that_is_added_to_the_tokenizer_changes_no_score_of_a_text_without_it():
    reranker = Reranker.from_pretrained("nano-mamba", dtype=torch.float32)
    before = reranker.predict(PAIRS)
    reranker.tokenizer.add_special_tokens({"eos_token": "[EOS]"})
    assert np.array_equal(reranker.predict(PAIRS), before)


@pytest.mark.parametrize("system", ["nano-bert", "nano-mamba", "nano-mamba2", "nano-neox"])
def test_layers_that_torch_has_quantised_are_called_as_they_are(system):
    reranker = Reranker.from_pretrained(system, dtype=torch.float32)
    before = reranker.predict(PAIRS)
    reranker.model = torch.ao.quantization.quantize_dynamic(reranker.model, {torch.nn.Linear})
    after = reranker.predict(PAIRS)
    assert not np.array_equal(after, before) and np.abs(after - before).max() < 0.5 * np.ptp(before)


def test_the_loss_for_labels_is_that_of_sequence_classification():
    model = Reranker.from_pretrained("tiny-mamba", dtype=torch.float32).model
    output = model(input_ids=torch.randint(200, 900, (2, 8)), labels=torch.tensor([1.0, 0.0]))
    expected = torch.nn.functional.mse_loss(output.logits[:, 0], torch.tensor([1.0, 0.0]))
    assert torch.equal(output.loss, expected) and output.loss.requires_grad


def test_a_folder_with_other_things_is_not_replaced(tmp_path):
    reranker = Reranker.from_pretrained("tiny-bert")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    for folder in (tmp_path / "thesis", tmp_path / "thesis" / "chapter.tex"):
        with pytest.raises(InputError, match="or a saved reranker to replace"):
            reranker.save_pretrained(folder)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    for _ in range(2):  # a saved reranker may be
        reranker.save_pretrained(tmp_path / "model")


def test_a_format_that_is_neither_is_recorded_by_its_name():
    assert Reranker.from_pretrained("tiny-bert", device="cpu", dtype=torch.float16).precision == "fp16: asked for"


def test_a_kernel_that_is_asked_for_runs_on_every_thread():
    reranker = Reranker.from_pretrained("tiny-mamba", dtype=torch.float32)
    pairs = [("river", text) for text in TEXTS]
    called = []

    class Counted:
        def __getattr__(self, name):
            called.append(name)
            return getattr(portable, name)

    with threads(2), scan.forced(Counted()):
        reranker.predict(pairs, batch_tokens=64)
    assert "selective_scan" in called


def test_a_trace_sees_no_kernel_that_it_could_not_follow():
    model = Reranker.from_pretrained("tiny-bert", dtype=torch.float32).model.eval().requires_grad_(False)
    first, second = torch.randint(200, 900, (2, 2, 12))

    def logits(ids):
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    with torch.no_grad():
        traced = torch.jit.trace(logits, first, check_trace=False)
        assert torch.allclose(traced(second), logits(second), atol=1e-5)


def test_a_token_that_the_mask_hides_affects_no_score_wherever_it_stands(reranker):
    ids = torch.randint(200, 900, (2, 12))
    other, mask = ids.clone(), torch.ones_like(ids)
    other[:, 4:7] += 1
    with torch.no_grad():
        seen = reranker.model(input_ids=ids, attention_mask=mask).logits
        mask[:, 4:7] = 0
        hidden, same = (reranker.model(input_ids=given, attention_mask=mask).logits for given in (ids, other))
    assert torch.equal(hidden, same) and not torch.allclose(hidden, seen)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_what_acts_on_the_head_acts_on_the_score(weights):
    model = Reranker.from_pretrained("tiny-mamba", dtype=torch.float32).model.to(weights)
    ids = torch.randint(200, 900, (2, 12))
    plain, pooled = model(input_ids=ids).logits, []
    model.score.register_forward_pre_hook(lambda module, given: pooled.append(given[0]))
    model.score.register_forward_hook(lambda module, given, output: -output)
    assert torch.equal(model(input_ids=ids).logits, -plain) and plain.dtype == torch.float32
    assert pooled[0].shape == (2, model.score.in_features)


def test_a_tensor_that_the_network_would_not_read_is_refused():
    model = Reranker.from_pretrained("tiny-neox").model
    with pytest.raises(InputError, match="got position_ids"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), position_ids=torch.tensor([[2, 1, 0]]))


def test_torch_exports_a_network_with_its_mask(reranker):
    ids = torch.randint(200, 900, (2, 12))
    features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    features["attention_mask"][1, 7:] = 0
    model = reranker.model.eval()
    with torch.no_grad():
        exported = torch.export.export(model, (), features).module()
        assert torch.allclose(exported(**features).logits, model(**features).logits, atol=1e-5)


def test_the_head_reads_the_pooled_token_times_the_dropout_mask_that_it_is_given(reranker):
    model, ids = reranker.model.eval(), torch.arange(5, 17).view(2, 6)
    ones = torch.ones(2, model.score.in_features)
    plain, none, double = (model(ids, dropout_mask=factor * ones).logits for factor in (1, 0, 2))
    assert torch.equal(plain, model(ids).logits) and torch.equal(none, model.score.bias.expand(2, 1))
    torch.testing.assert_close(double - none, 2 * (plain - none))
    assert not torch.equal(plain, none)
