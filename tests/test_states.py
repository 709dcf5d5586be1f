"""Document states: the scores of full scoring, stores that survive kills and notice damage."""

import io
import itertools
import math
import resource
import threading
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BloomConfig,
    FalconMambaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rankmamba import states as states_module
from rankmamba.backbones import SYSTEMS, load_tokenizer
from rankmamba.collection import load
from rankmamba.data import lookup
from rankmamba.data.formats import Documents
from rankmamba.errors import InputError
from rankmamba.model import RerankerConfig, RerankerModel
from rankmamba.reranker import Reranker
from rankmamba.states import DocumentStates, plots, trials
from rankmamba.states import build as state_build
from rankmamba.states import reader as state_reader
from rankmamba.states.encoding import ids_bytes, record_bytes

OTHERS = {
    "bloom": lambda: BloomConfig(vocab_size=30522, hidden_size=32, n_layer=2, n_head=2, pad_token_id=0),
    "gpt_neo": lambda: GPTNeoConfig(
        vocab_size=30522, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["local"], 2]]
    ),
    "gptj": lambda: GPTJConfig(vocab_size=30522, n_embd=32, n_layer=2, n_head=2, rotary_dim=8),
    "qwen2": lambda: Qwen2Config(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64
    ),
    "falcon": lambda: FalconMambaConfig(vocab_size=30522, hidden_size=32, num_hidden_layers=2, pad_token_id=0),
    "gpt2": lambda: GPT2Config(vocab_size=30522, n_embd=32, n_layer=2, n_head=2, n_positions=128),
    "llama": lambda: LlamaConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64
    ),
    "opt": lambda: OPTConfig(
        vocab_size=30522, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2
    ),
}
FAMILIES = ["mamba", "mamba2", "falcon", "neox", "gpt2", "llama", "opt", "qwen2", "bloom", "gptj"]
THINGS = ["rivers", "a mountain", "snow", "old books", "trains"]
DOCUMENTS = {
    "empty": "",
    "word": "river",
    "cut": "a very long text about bridges over the sea " * 20,
    **{f"d{n}": f"document {n} tells of " + " and ".join(THINGS[: 1 + n % 5]) * (1 + n) for n in range(9)},
}
QUERIES = {"q1": "which river", "q2": "a mountain in winter", "long": "who wrote the old books about trains and snow " * 9}


def make(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **limits) -> Reranker:
    """A tiny random reranker that is lively (scores differ widely) and remembers long (a Mamba's state hardly decays)."""
    torch.manual_seed(seed)
    limits = {"max_length": 80, "max_query_length": 24} | limits
    if family in OTHERS:
        tokenizer = load_tokenizer(SYSTEMS["tiny-mamba"])
        config = RerankerConfig(backbone_config=OTHERS[family](), kind="causal", limits=limits, pad_token_id=0)
        built = Reranker(RerankerModel(config), tokenizer, dtype=dtype)
    else:
        built = Reranker.from_pretrained(f"tiny-{family}", dtype=dtype, **limits)
    for name, parameter in built.model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.fill_(math.log(0.02))
        elif parameter.dim() > 1:
            parameter.data.mul_(3)
    return built


@pytest.fixture(scope="module", params=FAMILIES)
def reranker(request):
    return make(request.param)


@pytest.fixture
def mamba():
    return make("mamba")


def full(reranker: Reranker, query: str) -> np.ndarray:
    return reranker.predict([(query, text) for text in DOCUMENTS.values()])


def from_states(states, query: str) -> np.ndarray:
    found = {row["doc_id"]: row["score"] for row in states.rank(query, list(DOCUMENTS))}
    return np.array([found[doc_id] for doc_id in DOCUMENTS])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "build.lock"}


def test_an_attention_that_counts_places_in_the_cache_is_refused(tmp_path):
    longrope = make("llama")
    longrope.model.backbone.config.rope_parameters = {"rope_type": "longrope"}
    for reranker, said in ((make("gpt_neo"), "got 'gpt_neo'"), (longrope, "'llama' with longrope")):
        with pytest.raises(InputError, match=f"attention goes by positions alone .* {said}"):
            DocumentStates.build(reranker, DOCUMENTS, tmp_path / "s")


def test_states_take_the_place_of_nothing_but_states_and_ids_and_texts_are_strings(mamba, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("years of work")
    states = DocumentStates.build(mamba, DOCUMENTS, tmp_path / "s")
    for write in (lambda folder: states.convert(folder, "int8"), lambda folder: DocumentStates.build(mamba, DOCUMENTS, folder)):
        for folder in (tmp_path / "mine", tmp_path / "mine" / "thesis"):
            with pytest.raises(InputError, match="expected a new (or empty )?folder"):
                write(folder)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis"]
    (tmp_path / "repository" / ".git").mkdir(parents=True)
    for folder in (
        tmp_path / "s",
        tmp_path / "repository",
    ):  # a conversion takes not even the place of states, its own among them
        with pytest.raises(InputError, match="new or empty folder"):
            states.convert(folder, "int8")
    assert (tmp_path / "repository" / ".git").is_dir() and DocumentStates.open(tmp_path / "s", mamba).dtype == "float32"
    with pytest.raises(InputError, match="expected text that is UTF-8"):
        DocumentStates.build(mamba, {"d1": "\ud800"}, tmp_path / "typed")
    for asked in (states, states.hold(["d1"])):
        with pytest.raises(InputError, match="expected top_k >= 0, got -1"):
            asked.rank("q", **{"top_k": -1} | ({"doc_ids": ["d1"]} if asked is states else {}))
        with pytest.raises(InputError, match="expected a query as a string"):
            asked.rank(None, **({"doc_ids": ["d1"]} if asked is states else {}))
    for documents in ({1: "a"}, {"a": None}, ["a", "b"]):
        with pytest.raises(InputError, match="expected a (string as id and as text|collection or a mapping)"):
            DocumentStates.build(mamba, documents, tmp_path / "typed")
    with pytest.raises(InputError, match="got 1; building again in this folder, with it after the same documents"):
        states.rank("q", [1])
    with pytest.raises(InputError, match="expected a document with a state"):
        states.rank("q", ["\ud800"])
    for asked in (states.hold, lambda doc_id: states.rank("q", doc_id)):
        with pytest.raises(InputError, match=r"got the string 'd1'; pass \[doc_id\]"):
            asked("d1")
    assert states.rank("river", (doc_id for doc_id in DOCUMENTS)) == states.rank("river", list(DOCUMENTS))


def test_float32_states_give_the_scores_and_the_order_of_full_scoring(reranker, tmp_path):
    states = DocumentStates.build(reranker, DOCUMENTS, tmp_path / "s", batch_tokens=150)
    states.batch_size = 5  # several batches, so that one is loaded while another computes
    held = states.hold(list(DOCUMENTS))
    for query in QUERIES.values():
        expected = full(reranker, query)
        assert np.abs(from_states(states, query) - expected).max() <= 1e-5
        order = [list(DOCUMENTS)[i] for i in np.argsort(-expected, kind="stable")]
        assert [row["doc_id"] for row in states.rank(query, list(DOCUMENTS))] == order
        assert [row["doc_id"] for row in held.rank(query, top_k=3)] == order[:3]
        assert np.ptp(expected) > 0.01
    assert states.rank("which river", []) == []


@pytest.mark.parametrize("family", ["mamba", "mamba2", "neox"])
def test_bf16_states_give_the_scores_of_bf16_full_scoring_to_its_precision(family, tmp_path):
    exact, rounded = make(family), make(family, dtype=torch.bfloat16)
    states = DocumentStates.build(rounded, DOCUMENTS, tmp_path / "states")
    for query in QUERIES.values():
        of_full, of_states = (
            np.abs(scores - full(exact, query)) for scores in (full(rounded, query), from_states(states, query))
        )
        assert of_states.max() <= 2 * of_full.max() + 0.01


def test_a_model_in_training_mode_gives_states_and_their_scores_without_dropout(tmp_path):
    reranker = make("opt")
    expected = DocumentStates.build(reranker, DOCUMENTS, tmp_path / "s").rank("river", list(DOCUMENTS))
    reranker.model.train()
    states = DocumentStates.build(reranker, DOCUMENTS, tmp_path / "t")
    reranker.model.train()
    assert states.rank("river", list(DOCUMENTS)) == expected


def test_reranking_a_run_from_states_is_reranking_it(reranker, tmp_path):
    collection = load("rankmamba/tiny/test")
    states = DocumentStates.build(reranker, collection, tmp_path / "s")
    expected = reranker.rerank(collection.candidates, collection, top_k=6)
    run = states.rerank(collection.candidates, collection, top_k=6)
    assert run[["query_id", "doc_id", "rank"]].equals(expected[["query_id", "doc_id", "rank"]])
    assert np.allclose(run["score"], expected["score"], rtol=0, atol=1e-5)
    assert states.cost.pairs == len(run) and states.cost.tokens < reranker.cost.tokens / 2
    with pytest.raises(InputError, match="no-such-query"):
        states.rerank(collection.candidates.assign(query_id="no-such-query"), collection)


def states_bytes(states):
    """Without the documents' ids, which are small beside the states of all but these models."""
    return states.nbytes - sum(ids_bytes(int(tokens)) for tokens in states._reader.names.table["tokens"])


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_zeroed_and_a_swapped_state_are_noticed(family, tmp_path):
    reranker = make(family)
    states = DocumentStates.build(reranker, DOCUMENTS, tmp_path / "s")
    expected, load_states = full(reranker, "which river"), states._load

    def zeroed(rows):
        loaded, ids = load_states(rows)
        loaded.ssm = torch.zeros_like(loaded.ssm)
        return loaded, ids

    def swapped(rows):
        return load_states(np.roll(rows, 1))[0], load_states(rows)[1]

    for broken in (zeroed, swapped):
        states._load = broken
        scores = from_states(states, "which river")
        assert np.abs(scores - expected).max() > 0.05
        assert (np.argsort(scores) != np.argsort(expected)).any()


@pytest.mark.parametrize("family", ["mamba", "mamba2", "neox"])
def test_a_smaller_format_costs_more_of_the_score_and_less_room(family, tmp_path):
    reranker = make(family)
    expected, errors, sizes = full(reranker, "which river"), {}, {}
    exact = DocumentStates.build(reranker, DOCUMENTS, tmp_path / "exact")
    for dtype in ("float32", "float16", "bfloat16", "int8", "int4"):
        states = exact.convert(tmp_path / dtype, dtype)
        errors[dtype] = np.abs(from_states(states, "which river") - expected).max() / expected.std()
        sizes[dtype] = states_bytes(states)
    assert errors["float32"] < errors["float16"] < errors["int8"] < errors["int4"]
    assert errors["float16"] < 0.01 and errors["bfloat16"] < 0.05 and errors["int8"] < errors["int4"] / 4
    assert sizes["float16"] == sizes["bfloat16"] <= 0.51 * sizes["float32"]
    assert sizes["int8"] < 0.28 * sizes["float32"] and sizes["int4"] < 0.15 * sizes["float32"]


@pytest.mark.parametrize("computes_in", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["mamba", "mamba2", "neox"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_converting_stores_what_building_in_that_format_does(dtype, family, computes_in, tmp_path):
    reranker = make(family, dtype=computes_in)
    exact = DocumentStates.build(reranker, DOCUMENTS, tmp_path / "exact")
    built = DocumentStates.build(reranker, DOCUMENTS, tmp_path / "built", dtype)
    converted = exact.convert(tmp_path / "converted", dtype)
    assert len(converted) == len(built) and converted.nbytes == built.nbytes
    assert np.allclose(from_states(converted, "which river"), from_states(built, "which river"), rtol=0, atol=1e-6)


def test_a_document_at_the_130m_shape_takes_750_kb_in_int8_and_400_kb_in_int4():
    numbers = 24 * 1536 * (16 + 3)
    assert record_bytes("int8", numbers) <= 750_000 and record_bytes("int4", numbers) <= 400_000


def test_keeping_some_layers_is_smaller_and_keeping_all_is_exact(mamba, tmp_path):
    expected = full(mamba, "which river")
    everything = DocumentStates.build(mamba, DOCUMENTS, tmp_path / "all", layers=[1, 0])
    assert np.abs(from_states(everything, "which river") - expected).max() <= 1e-5
    last = DocumentStates.build(mamba, DOCUMENTS, tmp_path / "last", layers=[1])
    assert states_bytes(last) == states_bytes(everything) / 2
    converted = DocumentStates.build(mamba, DOCUMENTS, tmp_path / "exact").convert(tmp_path / "converted", "float32", layers=[1])
    assert converted.nbytes == last.nbytes
    assert np.allclose(from_states(converted, "which river"), from_states(last, "which river"), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="all layers"):
        last.convert(tmp_path / "again", "int8")
    assert 1e-3 < np.abs(from_states(last, "which river") - expected).max() < np.ptp(expected)
    with pytest.raises(InputError, match="from 0 to 1"):
        DocumentStates.build(mamba, DOCUMENTS, tmp_path / "none", layers=[2])


def test_documents_whose_ids_have_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(lookup, "hash_id", lambda doc_id: int(doc_id[1:]) // 3)
    ids = ["d4", "d0", "d5", "d1", "d3"]
    table = lookup.make([lookup.hash_id(doc_id) for doc_id in ids], ids.__getitem__)
    assert [lookup.find(table, doc_id, ids.__getitem__) for doc_id in ids] == [*range(5)]
    assert lookup.find(table, "d2", ids.__getitem__) is lookup.find(table, "d9", ids.__getitem__) is None


def test_a_build_that_stopped_says_how_far_it_came_and_goes_on_to_the_same_bytes(mamba, tmp_path, monkeypatch):
    monkeypatch.setattr(state_build, "BLOCK", (3, 1000))
    DocumentStates.build(mamba, DOCUMENTS, tmp_path / "whole", "int8")

    def store_two_blocks(*arguments, _store=states_module.store_block, left=[None, None]):  # noqa: B006
        if not left:
            raise KeyboardInterrupt
        left.pop()
        _store(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(states_module, "store_block", store_two_blocks)
        DocumentStates.build(mamba, DOCUMENTS, tmp_path / "stopped", "int8")
    with pytest.raises(InputError, match="6 documents of a build that is running or was stopped"):
        DocumentStates.open(tmp_path / "stopped", mamba)
    DocumentStates.build(mamba, DOCUMENTS, tmp_path / "stopped", "int8")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_documents_behind_those_of_a_finished_store_are_added_while_it_is_read(mamba, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(state_build, "BLOCK", (3, 1000))
    first = dict(itertools.islice(DOCUMENTS.items(), 6))
    before = DocumentStates.build(mamba, first, tmp_path / "s", dtype)
    ranked, bytes_before = before.rank("which river", list(first)), (tmp_path / "s" / "states.bin").read_bytes()
    computed = []
    states = DocumentStates.build(mamba, DOCUMENTS, tmp_path / "s", dtype, on_stored=computed.append)
    assert sum(computed) == len(DOCUMENTS)  # those that were there are counted, too
    assert (tmp_path / "s" / "states.bin").read_bytes().startswith(bytes_before)
    assert before.rank("which river", list(first)) == ranked == states.rank("which river", list(first))
    if dtype == "float32":
        assert np.abs(from_states(states, "which river") - full(mamba, "which river")).max() <= 1e-5
    assert len(states.rank("which river", list(DOCUMENTS))) == len(DOCUMENTS)  # every state is as it was written
    assert len(states) == len(DOCUMENTS) == len(DocumentStates.open(tmp_path / "s", mamba))


def test_an_addition_that_stops_goes_on_and_a_document_that_is_there_is_not_added(mamba, tmp_path, monkeypatch):
    monkeypatch.setattr(state_build, "BLOCK", (3, 1000))
    first = dict(itertools.islice(DOCUMENTS.items(), 4))
    DocumentStates.build(mamba, first, tmp_path / "s")

    class Twice(Documents):
        def pairs(self):
            return itertools.chain(self._texts.items(), [("cut", "again")])

    with pytest.raises(InputError, match="each doc_id once, got 'cut' again as document 5"):
        DocumentStates.build(mamba, Twice(first), tmp_path / "s")
    with pytest.raises(InputError, match="the 4 documents that .* got others"):  # more than there are, but one of those edited
        DocumentStates.build(mamba, DOCUMENTS | {"word": "bridge"}, tmp_path / "s")

    with pytest.raises(InputError, match="a string as id and as text of each document, got None .document 6"):
        DocumentStates.build(mamba, first | {"fine": "a text", "none": None}, tmp_path / "s")
    assert len(DocumentStates.open(tmp_path / "s", mamba)) == 4  # nothing was written yet

    for kept in (4, 7):  # those that were there; and a block of three

        def stop(count, kept=kept, done=[]):  # noqa: B006
            done.append(count)
            if sum(done) > kept:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            DocumentStates.build(mamba, DOCUMENTS, tmp_path / "s", on_stored=stop)
        with pytest.raises(InputError, match=f"got {kept} documents of a build that is running or was stopped"):
            DocumentStates.open(tmp_path / "s", mamba)
    states = DocumentStates.build(mamba, DOCUMENTS, tmp_path / "s")
    assert np.abs(from_states(states, "which river") - full(mamba, "which river")).max() <= 1e-5


@pytest.mark.parametrize("name", ["progress.json", "states.bin", "table.bin"])
def test_a_stopped_build_whose_files_are_damaged_is_refused(name, mamba, tmp_path, monkeypatch):
    monkeypatch.setattr(state_build, "BLOCK", (3, 1000))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(states_module.Writer, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        DocumentStates.build(mamba, DOCUMENTS, tmp_path / "s")
    path = tmp_path / "s" / name
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=f"{name}.*delete the folder"):
        DocumentStates.build(mamba, DOCUMENTS, tmp_path / "s")


def test_building_again_computes_nothing_and_other_documents_are_refused(mamba, tmp_path, monkeypatch):
    DocumentStates.build(mamba, DOCUMENTS, tmp_path / "s")
    before = contents(tmp_path / "s")
    monkeypatch.setattr(states_module, "store_block", None)
    assert len(DocumentStates.build(mamba, DOCUMENTS, tmp_path / "s")) == len(DOCUMENTS)
    moved = {"emp": "ty", **dict(itertools.islice(DOCUMENTS.items(), 1, None))}  # a part of the first one's id
    for documents in (DOCUMENTS | {"word": "bridge"}, {"empty": ""}, moved):
        with pytest.raises(InputError, match="documents"):
            DocumentStates.build(mamba, documents, tmp_path / "s")
    with pytest.raises(InputError, match="another dtype"):
        DocumentStates.build(mamba, DOCUMENTS, tmp_path / "s", "int8")
    assert contents(tmp_path / "s") == before


def test_opening_says_what_differs(mamba, tmp_path):
    DocumentStates.build(mamba, DOCUMENTS, tmp_path / "s")
    mamba.save_pretrained(tmp_path / "model")
    DocumentStates.open(tmp_path / "s", Reranker.from_pretrained(tmp_path / "model", dtype=torch.float32))
    with pytest.raises(InputError, match="another weights"):
        DocumentStates.open(tmp_path / "s", make("mamba", seed=1))
    with pytest.raises(InputError, match="another backbone.*another weights"):
        DocumentStates.open(tmp_path / "s", make("mamba2"))
    with pytest.raises(InputError, match="another truncation .*56 tokens.*96 tokens"):
        DocumentStates.open(tmp_path / "s", make("mamba", max_length=120))
    with pytest.raises(InputError, match="another precision"):
        DocumentStates.open(tmp_path / "s", Reranker.from_pretrained(tmp_path / "model", dtype=torch.bfloat16))
    other = Reranker.from_pretrained(tmp_path / "model", dtype=torch.float32)
    other.inputs.tokenizer.add_tokens(["rivers"])
    other.model.backbone.config.layer_norm_epsilon *= 2
    with pytest.raises(InputError, match="another configuration.*another tokenizer"):
        DocumentStates.open(tmp_path / "s", other)
    mamba.inputs.document_prefix = "Text: "
    with pytest.raises(InputError, match="another template"):
        DocumentStates.open(tmp_path / "s", mamba)
    with pytest.raises(InputError, match="without manifest.json"):
        DocumentStates.open(tmp_path, mamba)


@pytest.mark.parametrize("name", ["states.bin", "table.bin", "ids.bin", "lookup.bin", "profile.bin", "manifest.json"])
def test_a_truncated_and_an_altered_file_are_found(name, mamba, tmp_path):
    DocumentStates.build(mamba, DOCUMENTS, tmp_path / "s", "int8")
    path = tmp_path / "s" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-64])
    with pytest.raises(InputError, match=name):
        DocumentStates.open(tmp_path / "s", mamba)
    middle = whole.index(b"float32") if name == "manifest.json" else len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(InputError, match=f"{name}|as it was written"):
        DocumentStates.open(tmp_path / "s", mamba).rank("which river", list(DOCUMENTS))
    if name == "states.bin":  # only what is read is checked
        assert len(DocumentStates.open(tmp_path / "s", mamba).rank("which river", ["empty"])) == 1


def test_a_batch_of_keys_and_values_is_as_large_as_its_bytes_allow_and_no_larger(tmp_path, monkeypatch):
    states, batches = DocumentStates.build(make("neox"), DOCUMENTS, tmp_path / "states"), []
    room, a_token = states._kind.room, 4 * states._kind.numbers(1)
    states.batch_bytes = 100 * a_token
    monkeypatch.setattr(states._kind, "room", lambda lengths: batches.append([int(n) for n in lengths]) or room(lengths))
    states.rank("which river", list(DOCUMENTS))
    assert sum(map(len, batches)) == len(DOCUMENTS) > len(batches) > 1
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(batch) * a_token <= states.batch_bytes
    for batch, following in itertools.pairwise(batches):
        assert (len(batch) + 1) * following[0] * a_token > states.batch_bytes


def test_a_batch_of_states_of_fixed_size_is_as_large_as_its_bytes_and_its_number_allow(mamba, tmp_path, monkeypatch):
    states, batches = DocumentStates.build(mamba, DOCUMENTS, tmp_path / "states"), []
    room = states._kind.room
    monkeypatch.setattr(states._kind, "room", lambda lengths: batches.append(len(lengths)) or room(lengths))
    states.batch_bytes = 5 * 4 * states._kind.numbers(1)
    states.rank("which river", list(DOCUMENTS))
    states.batch_size = 4
    states.rank("which river", list(DOCUMENTS))
    assert batches == [5, 5, 2, 4, 4, 4]


def test_the_cost_of_scoring_counts_pairs_query_tokens_padding_and_seconds(mamba, tmp_path):
    states, test = DocumentStates.build(mamba, DOCUMENTS, tmp_path / "states"), load("rankmamba/tiny/test")
    started = time.perf_counter()
    states.rank("which river", list(DOCUMENTS))
    (query,) = mamba.inputs.queries(["which river"])
    tokens = len(DOCUMENTS) * (len(query) + 1)  # with the end of the sequence
    assert (states.cost.pairs, states.cost.tokens, states.cost.padded_tokens) == (len(DOCUMENTS), tokens, tokens)
    assert 0 < states.cost.seconds <= time.perf_counter() - started
    ours = DocumentStates.build(mamba, test, tmp_path / "ours")
    ours.batch_size = 1000
    ours.rerank(test.candidates, test, top_k=5)
    lengths = [
        len(query) + 1 for query in mamba.inputs.queries([test.queries[q] for q in test.candidates.query("rank <= 5").query_id])
    ]
    assert (ours.cost.tokens, ours.cost.padded_tokens) == (sum(lengths), len(lengths) * max(lengths))


@pytest.mark.parametrize("family", ["mamba", "neox"])
def test_room_for_all_states_of_fixed_size_is_asked_for_before_the_first(family, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(states_module.Writer, "need", lambda writer, size: asked.append(size))
    states = DocumentStates.build(make(family), DOCUMENTS, tmp_path / "states", "int8")
    assert asked == [len(DOCUMENTS) * record_bytes("int8", states._kind.numbers(1)) if family == "mamba" else 0]


def test_a_second_builder_is_refused(mamba, tmp_path):
    with filelock.FileLock(tmp_path / "build.lock"), pytest.raises(InputError, match="one builder"):
        DocumentStates.build(mamba, DOCUMENTS, tmp_path)


def test_a_full_disk_is_said_and_what_was_stored_is_kept(mamba, tmp_path, monkeypatch):
    monkeypatch.setattr(state_build, "BLOCK", (3, 1000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(InputError, match="too large.*kept"):
            DocumentStates.build(mamba, DOCUMENTS, tmp_path / "s")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 0 < (tmp_path / "s" / "table.bin").stat().st_size
    states = DocumentStates.build(mamba, DOCUMENTS, tmp_path / "s")
    assert np.abs(from_states(states, "which river") - full(mamba, "which river")).max() <= 1e-5
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="free disk for the states, got 0.0 MB"):
        DocumentStates.build(mamba, DOCUMENTS, tmp_path / "other")


def test_ranking_writes_nothing(mamba, tmp_path):
    DocumentStates.build(mamba, DOCUMENTS, tmp_path / "s", "int8")
    for path in [*(tmp_path / "s").iterdir(), tmp_path / "s"]:
        path.chmod(0o555)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}
    DocumentStates.open(tmp_path / "s", mamba).rank("which river", list(DOCUMENTS))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")} == before
    (tmp_path / "s").chmod(0o755)


def test_what_cannot_be_is_refused_by_name(mamba, tmp_path):
    states = DocumentStates.build(mamba, DOCUMENTS, tmp_path / "s")
    assert "word" in states and "no-such" not in states and "\ud800" not in states
    for unknown in ("no-such", "\ud800"):
        with pytest.raises(InputError, match=f"a state in .*, got {unknown!r}".replace("\\", r"\\")):
            states.rank("which river", ["word", unknown])
    with pytest.raises(InputError, match="top_k of at least 1, got 0"):
        states.rerank(load("rankmamba/tiny/test").candidates, load("rankmamba/tiny/test"), top_k=0)
    with pytest.raises(InputError, match="causal"):
        DocumentStates.build(Reranker.from_pretrained("tiny-bert"), DOCUMENTS, tmp_path / "bert")
    with pytest.raises(InputError, match="int4"):
        DocumentStates.build(mamba, DOCUMENTS, tmp_path / "t", "int2")
    with pytest.raises(InputError, match="at least one document"):
        DocumentStates.build(mamba, {}, tmp_path / "u")


def test_two_queries_on_the_same_held_states_are_answered_one_after_the_other(tmp_path, monkeypatch):
    states = DocumentStates.build(make("neox"), DOCUMENTS, tmp_path / "s")
    held, running, most, go_on = states.hold(list(DOCUMENTS)), [], [], states._continue

    def observed(*arguments):
        running.append(1)
        most.append(len(running))
        time.sleep(0.01)
        try:
            return go_on(*arguments)
        finally:
            running.pop()

    monkeypatch.setattr(states, "_continue", observed)
    asked = [threading.Thread(target=held.rank, args=(query,)) for query in QUERIES.values()]
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join()
    assert len(asked) > 1 and set(most) == {1}


def test_a_format_that_does_not_exist_is_refused_by_build_and_convert(tmp_path):
    reranker = make("mamba")
    states = DocumentStates.build(reranker, DOCUMENTS, tmp_path / "s")
    for write in (
        lambda: states.convert(tmp_path / "t", "int2"),
        lambda: DocumentStates.build(reranker, DOCUMENTS, tmp_path / "t", "int2"),
    ):
        with pytest.raises(InputError, match="expected a dtype among float32, .*, got 'int2'"):
            write()


def test_where_no_system_has_states_the_tables_are_empty_and_the_figures_can_be_drawn():
    formats = trials.format_table([])
    assert formats.empty and trials.length_table([]).empty and trials.outlook([], 1_000_000).empty
    for figure in (plots.frontier(formats[formats["format"] != trials.FULL]), plots.speed_up(trials.length_table([]))):
        figure.savefig(io.BytesIO())


def test_a_store_belongs_to_the_adapters_that_were_active(tmp_path, mamba):
    adapted = get_peft_model(mamba.model, LoraConfig(target_modules=["in_proj"], init_lora_weights=False))
    adapted.add_adapter("medical", LoraConfig(target_modules=["in_proj"], init_lora_weights=False))
    DocumentStates.build(mamba, DOCUMENTS, tmp_path / "states")
    states = DocumentStates.open(tmp_path / "states", mamba)
    np.testing.assert_allclose(from_states(states, QUERIES["q1"]), full(mamba, QUERIES["q1"]), rtol=0, atol=1e-5)
    adapted.set_adapter("medical")
    with pytest.raises(InputError, match="weights"):
        DocumentStates.open(tmp_path / "states", mamba)
    adapted.set_adapter("default")
    with adapted.disable_adapter(), pytest.raises(InputError, match="weights"):
        DocumentStates.open(tmp_path / "states", mamba)
    DocumentStates.open(tmp_path / "states", mamba)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float64])
def test_keys_and_values_are_held_in_the_weights_own_format(weights, tmp_path):
    neox = make("neox")
    neox.model.to(weights)
    states = DocumentStates.build(neox, DOCUMENTS, tmp_path / "states")
    tolerance = {torch.bfloat16: 0.05, torch.float64: 1e-5}[weights]
    np.testing.assert_allclose(from_states(states, QUERIES["q1"]), full(neox, QUERIES["q1"]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", ["mamba", "neox"])
def test_states_that_were_held_in_inference_mode_answer_outside_of_it(family, tmp_path):
    reranker = make(family)
    with torch.inference_mode():
        held = DocumentStates.build(reranker, DOCUMENTS, tmp_path / "states").hold(list(DOCUMENTS))
    found = {row["doc_id"]: row["score"] for row in held.rank(QUERIES["q1"])}
    np.testing.assert_allclose([found[doc_id] for doc_id in DOCUMENTS], full(reranker, QUERIES["q1"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["profile.bin", "table.bin", "ids.bin"])
def test_a_damaged_store_is_not_added_to(name, tmp_path, mamba):
    DocumentStates.build(mamba, DOCUMENTS, tmp_path / "states", "int8")
    damaged = bytearray((tmp_path / "states" / name).read_bytes())
    damaged[3] ^= 1
    (tmp_path / "states" / name).write_bytes(damaged)
    before = {path.name: path.read_bytes() for path in (tmp_path / "states").glob("*.*")}
    with pytest.raises(InputError, match="got an altered one"):
        DocumentStates.build(mamba, DOCUMENTS | {"more": "one more"}, tmp_path / "states", "int8")
    assert {path.name: path.read_bytes() for path in (tmp_path / "states").glob("*.*")} == before


def test_an_addition_that_the_disk_has_no_room_for_leaves_the_store_as_it_was(tmp_path, mamba, monkeypatch):
    states = DocumentStates.build(mamba, DOCUMENTS, tmp_path / "states")
    room = states.nbytes // 2
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": room}))
    with pytest.raises(InputError, match="MB of free disk for the states"):
        DocumentStates.build(mamba, DOCUMENTS | {f"more{n}": "one more" for n in range(len(DOCUMENTS))}, tmp_path / "states")
    assert len(DocumentStates.build(mamba, DOCUMENTS, tmp_path / "states")) == len(DOCUMENTS)


@pytest.mark.parametrize("family", ["mamba", "neox"])
def test_torchs_default_format_rounds_no_state(family, tmp_path):
    reranker = make(family)
    states, exact = DocumentStates.build(reranker, DOCUMENTS, tmp_path / "states"), full(reranker, QUERIES["q1"])
    torch.set_default_dtype(torch.float16)
    try:
        found = from_states(states, QUERIES["q1"])
        states.convert(tmp_path / "again", "float32")
        states.convert(tmp_path / "int8", "int8")
    finally:
        torch.set_default_dtype(torch.float32)
    for scores in (found, from_states(DocumentStates.open(tmp_path / "again", reranker), QUERIES["q1"])):
        np.testing.assert_allclose(scores, exact, rtol=0, atol=1e-5)


def test_a_store_that_is_added_to_while_it_is_opened_is_not_called_damaged(tmp_path, mamba, monkeypatch):
    folder = tmp_path / "states"
    DocumentStates.build(mamba, DOCUMENTS, folder)
    read = state_reader.read_manifest

    def and_then_another_process_adds(place):
        manifest = read(place)
        monkeypatch.setattr(state_reader, "read_manifest", read)
        with open(folder / "states.bin", "ab") as file:
            file.write(bytes(8))
        (folder / "manifest.json").rename(folder / "progress.json")
        return manifest

    monkeypatch.setattr(state_reader, "read_manifest", and_then_another_process_adds)
    with pytest.raises(InputError, match="running or was stopped") as error:
        DocumentStates.open(folder, mamba)
    assert "delete" not in str(error.value)


def test_states_are_made_with_an_attention_that_takes_no_float32_as_flash_attention_does(tmp_path):
    def picky(module, query, *rest, **kwargs):
        assert query.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")  # which transformers' own casts to
        return sdpa_attention_forward(module, query, *rest, **kwargs)

    AttentionInterface.register("picky", picky)
    AttentionMaskInterface.register("picky", sdpa_mask)
    reranker = Reranker.from_pretrained("tiny-neox", dtype=torch.bfloat16)
    reranker.model.backbone.set_attn_implementation("picky")
    states = DocumentStates.build(reranker, DOCUMENTS, tmp_path / "s")
    assert np.abs(from_states(states, "which river") - full(reranker, "which river")).max() <= 0.05
