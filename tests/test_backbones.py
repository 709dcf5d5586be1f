"""Backbones: checkpoints of every family in the Hub's own file layout, from loading to a measured run, without a Hub."""

import copy
import json
from contextlib import nullcontext
from pathlib import Path

import ir_datasets
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    ByT5Tokenizer,
    FNetConfig,
    Gemma2Config,
    Gemma2Model,
    Gemma3TextConfig,
    LlamaConfig,
    LongformerConfig,
    LongformerModel,
    Phi3Config,
    Phi3Model,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
    RwkvConfig,
    T5Config,
    T5Model,
    ViTConfig,
)

from rankmamba.backbones import find
from rankmamba.collection import load
from rankmamba.data.embedded import TINY
from rankmamba.errors import InputError
from rankmamba.evaluate import per_query
from rankmamba.inputs import KINDS
from rankmamba.network import native_attention
from rankmamba.network.attention import choose_attention
from rankmamba.network.last_layer import TOKENWISE
from rankmamba.network.mixers import has_scan
from rankmamba.network.nano import NANO
from rankmamba.reranker import Reranker
from rankmamba.systems import FAMILIES, SYSTEMS
from rankmamba.train import TrainConfig, train
from rankmamba.training.lora import add_lora

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXTS = ["short", "a longer text about rivers and bridges " * 3, "snow on the mountain", "a book " * 30]
PAIRS = [("which river", text) for text in TEXTS]


def texts():
    return [line.split('"text": ')[1] for line in (TINY / "documents.jsonl").read_text(encoding="utf-8").splitlines()]


def wordpiece(folder):
    """BERT, ELECTRA: vocab.txt."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(texts(), trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials))
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in vocabulary), encoding="utf-8")


def byte_level(folder, specials, pair=None, files="tokenizer.json"):
    """GPT-2's kind of vocabulary: vocab.json and merges.txt, or tokenizer.json alone, as the family's folders have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts(), trainer)
    if files == "vocab.json":
        tokenizer.model.save(str(folder))
    else:
        if pair:
            ids = [(token, tokenizer.token_to_id(token)) for token in specials]
            tokenizer.post_processor = processors.TemplateProcessing(single=pair[0], pair=pair[1], special_tokens=ids)
        tokenizer.save(str(folder / "tokenizer.json"))


def sentencepieces(folder, file, **ids):
    """T5 and DeBERTa-v3: a SentencePiece model, made by SentencePiece itself."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()), model_prefix=str(folder / "spm"), vocab_size=200, minloglevel=2, **ids
    )
    (folder / "spm.vocab").unlink()
    (folder / "spm.model").rename(folder / file)


SSM = {"hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GPT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ROBERTA = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
FAIRSEQ_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
END = ["<|endoftext|>"]

# family: the class whose weights the Hub has, its configuration, the tokenizer's files, tokenizer_config.json
HUB = {
    "bert": ("BertForPreTraining", {**SIZES}, wordpiece, {"tokenizer_class": "BertTokenizer"}),
    "electra": ("ElectraForPreTraining", {**SIZES, "embedding_size": 32}, wordpiece, {"tokenizer_class": "ElectraTokenizer"}),
    "roberta": (
        "RobertaForMaskedLM",
        {**SIZES, **ROBERTA, "max_position_embeddings": 514, "type_vocab_size": 1},
        lambda folder: byte_level(folder, FAIRSEQ_TOKENS, files="vocab.json"),
        {"tokenizer_class": "RobertaTokenizer"},
    ),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        {**SIZES, "relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True}
        | {"pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0, "position_biased_input": False, "max_relative_positions": -1},
        lambda folder: sentencepieces(
            folder,
            "spm.model",
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece="[PAD]",
            bos_piece="[CLS]",
            eos_piece="[SEP]",
            unk_piece="[UNK]",
            user_defined_symbols=["[MASK]"],
        ),
        {"tokenizer_class": "DebertaV2Tokenizer", "do_lower_case": False, "vocab_type": "spm"},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        {**SIZES, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
        lambda folder: byte_level(
            folder, ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"], ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]")
        ),
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
        | {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "mask_token": "[MASK]"},
    ),
    "opt": (
        "OPTForCausalLM",
        {**GPT, "ffn_dim": 64, "word_embed_proj_dim": 16, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
        lambda folder: byte_level(folder, FAIRSEQ_TOKENS, files="vocab.json"),
        {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False, "errors": "replace"}
        | {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"},
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {**SIZES, "bos_token_id": 0, "eos_token_id": 0},
        lambda folder: byte_level(folder, END),
        {"tokenizer_class": "GPTNeoXTokenizer", "bos_token": END[0], "eos_token": END[0], "unk_token": END[0]},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 1024, "bos_token_id": 0, "eos_token_id": 0},
        lambda folder: byte_level(folder, END, files="vocab.json"),
        {"tokenizer_class": "GPT2Tokenizer", "bos_token": END[0], "eos_token": END[0], "unk_token": END[0]},
    ),
    "llama": (
        "LlamaForCausalLM",
        {**SIZES, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True},
        lambda folder: byte_level(
            folder, ["<|begin_of_text|>", "<|end_of_text|>"], ("<|begin_of_text|> $A", "<|begin_of_text|> $A $B")
        ),
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 64, "decoder_start_token_id": 0},
        lambda folder: sentencepieces(folder, "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
        {"tokenizer_class": "T5Tokenizer", "extra_ids": 10},
    ),
    "bart": (
        "BartForConditionalGeneration",
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        | {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 2, **ROBERTA},
        lambda folder: byte_level(folder, FAIRSEQ_TOKENS, files="vocab.json"),
        {"tokenizer_class": "BartTokenizer"},
    ),
    "mamba": (
        "MambaForCausalLM",
        {**SSM, "state_size": 8},
        lambda folder: byte_level(folder, END),
        {"tokenizer_class": "GPTNeoXTokenizer", "bos_token": END[0], "eos_token": END[0], "unk_token": END[0]},
    ),
    "falcon_mamba": (
        "FalconMambaForCausalLM",
        {**SSM, "state_size": 8},
        lambda folder: byte_level(folder, END),
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END[0], "eos_token": END[0]},
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        {**SSM, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1} | {"chunk_size": 16},
        lambda folder: byte_level(folder, END),
        {"tokenizer_class": "GPTNeoXTokenizer", "bos_token": END[0], "eos_token": END[0], "unk_token": END[0]},
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {"hidden_size": 32, "hybrid_override_pattern": "M*-M", "intermediate_size": 64, "num_attention_heads": 2}
        | {"num_key_value_heads": 1, "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8}
        | {"n_groups": 1, "chunk_size": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
        lambda folder: byte_level(folder, END),
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END[0], "eos_token": END[0]},
    ),
}


def write_checkpoint(family, folder):
    """A tiny checkpoint as its authors publish it: config.json, model.safetensors in half precision, the tokenizer's files."""
    name, sizes, tokenizer, settings = HUB[family]
    network = getattr(transformers, name)
    torch.manual_seed(0)
    model = network(network.config_class(vocab_size=512, **sizes))
    for parameter in model.parameters():
        parameter.data.mul_(2)  # lively weights: with small ones every text scores the same
    model.half().save_pretrained(folder)
    tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture(scope="module", params=HUB)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(request.param, folder)
    return folder


@pytest.fixture(scope="module")
def reranker(checkpoint):
    torch.manual_seed(0)
    return Reranker.from_pretrained(checkpoint, dtype=torch.float32, max_length=512, max_query_length=64)


@torch.no_grad()
def hugging_face_scores(reranker, folder):
    """Every pair alone through transformers' own classes, from text to hidden state; only the head is ours."""
    backbone = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, kind, scores = AutoTokenizer.from_pretrained(folder), reranker.model.config.kind, []
    for query, document in PAIRS:
        if kind == "causal":
            first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in causal(query, document))
            start = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
            batch = {"input_ids": torch.tensor([[*start, *first, *second, tokenizer.eos_token_id]])}
        else:
            batch = tokenizer(query, document, return_tensors="pt")
            if kind == "encoder-decoder":
                batch["decoder_input_ids"] = torch.tensor([[backbone.config.decoder_start_token_id]])
        hidden = backbone(**batch).last_hidden_state
        scores.append(reranker.model.score(hidden[:, -1 if kind == "causal" else 0]).item())
    return np.array(scores)


def causal(query, document):
    return f"Document: {document}", f"\n\nQuery: {query}"


def test_a_checkpoint_scores_as_its_hugging_face_implementation_does(reranker, checkpoint):
    expected = hugging_face_scores(reranker, checkpoint)
    assert np.ptp(expected) > 1e-3
    assert np.abs(reranker.predict(PAIRS, batch_tokens=100_000) - expected).max() <= 1e-5
    assert {p.dtype for p in reranker.model.parameters()} == {torch.float32}


def test_a_checkpoint_is_trained_saved_loaded_reranks_and_is_measured(checkpoint, tmp_path):
    config = TrainConfig(str(checkpoint), max_steps=3, batch_size=2, group_size=4, max_length=64, max_query_length=32, bf16=False)
    trained = train(config, load("rankmamba/tiny/train"), tmp_path / "model")
    assert np.isfinite([row["loss"] for row in trained.curve]).all() and trained.steps == 3
    loaded = Reranker.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert np.abs(loaded.predict(PAIRS) - trained.reranker.predict(PAIRS)).max() <= 1e-6
    test = load("rankmamba/tiny/test").sample(4)
    values = per_query(loaded.rerank(test.candidates, test, top_k=10), test.qrels)
    assert sorted(values.index) == sorted(test.queries) and values.notna().all().all()


def test_every_lora_target_receives_gradients(reranker):
    family = FAMILIES[reranker.model.config.backbone_config.model_type]
    model = copy.deepcopy(reranker.model)
    add_lora(model, 2, 4)
    batch = reranker.inputs.collate([reranker.inputs.join(*halves(reranker, *pair)) for pair in PAIRS])
    model(**batch).logits.square().sum().backward()
    gradients = {name.split(".lora_B")[0]: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert not [name for name, gradient in gradients.items() if gradient is None or gradient.abs().max() < 1e-12]
    adapted = {name.rpartition(".")[2] for name in gradients}
    assert set(family.lora_targets) - adapted <= {"wi_0", "wi_1"}  # of the gated T5s


def halves(reranker, query, document):
    return reranker.inputs.queries([query])[0], reranker.inputs.documents([document])[0]


def test_the_attention_implementations_that_a_backbone_has_agree(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    family = FAMILIES[config.model_type]
    loaded = AutoModel.from_pretrained(checkpoint)
    if config.model_type in ("mamba", "mamba2", "falcon_mamba"):
        assert choose_attention(loaded, torch.device("cpu"), torch.float32) == "none: the backbone has no attention"
        return
    ids = torch.arange(10, 40)[None]
    kinds = {"decoder_input_ids": ids[:, :1]} if family.kind == "encoder-decoder" else {}
    names = {"eager", "sdpa"} if loaded._supports_sdpa else {"eager"}  # what a CPU runs
    if native_attention.runs(config.model_type, torch.device("cpu"), torch.float32):
        names.add(native_attention.NATIVE)
    for mask in (torch.ones_like(ids), torch.ones_like(ids).index_fill(1, torch.arange(25, 30), 0)):
        outputs = []
        for name in names:
            backbone = AutoModel.from_pretrained(checkpoint, attn_implementation=name, dtype=torch.float32).eval()
            with torch.no_grad():
                outputs.append(backbone(input_ids=ids, attention_mask=mask, **kinds).last_hidden_state[:, :25])
        assert all(torch.allclose(outputs[0], other, atol=1e-5) for other in outputs)


def test_on_a_gpu_torch_attends_without_cudnn_which_plans_anew_for_every_shape():
    backbone, before = Reranker.from_pretrained("tiny-bert").model.backbone, torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        choose_attention(backbone, torch.device("cpu"), torch.float32)
        assert torch.backends.cuda.cudnn_sdp_enabled()
        choose_attention(backbone, torch.device("cuda"), torch.float32)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_the_last_layer_skips_in_every_family_that_it_knows(reranker):
    kept = reranker.model.last_layer._layer
    family = reranker.model.config.backbone_config.model_type
    assert (kept is None) == (family not in TOKENWISE)
    if kept is not None:
        hooked = {name for name, module in kept.named_modules() if module._forward_pre_hooks}
        assert hooked == {part if isinstance(part, str) else part[0] for part in TOKENWISE[family][2]}
    if kept is not None and has_scan(kept):
        hidden, positions = torch.randn(2, 6, kept.mixer.hidden_size), torch.tensor([5, 2])
        with torch.no_grad():
            whole = kept.mixer(hidden)
            with reranker.model.last_layer.only(positions):
                alone = kept.mixer(hidden)
        assert alone.any(-1).nonzero().tolist() == [[0, 5], [1, 2]]
        torch.testing.assert_close(alone[[0, 1], positions], whole[[0, 1], positions], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", native_attention.NATIVE])
@pytest.mark.parametrize("family", ["bert", "opt", "gpt_neox"])
def test_the_pooled_token_and_its_gradients_are_those_of_a_whole_last_layer_whichever_keys_are_hidden(
    family, implementation, tmp_path
):
    write_checkpoint(family, tmp_path)
    model = Reranker.from_pretrained(tmp_path, dtype=torch.float32).model
    model.backbone.set_attn_implementation(implementation)
    assert model.last_layer.pools_attention
    ids, rows = torch.randint(10, 40, (3, 12)), torch.arange(3)
    for hidden, positions in [((), [11, 3, 0]), ([9, 10, 11], [8, 8, 8]), ([0, 1], [11, 5, 2]), ([4, 5], [11, 8, 3])]:
        mask = torch.ones_like(ids).index_fill(1, torch.tensor(hidden, dtype=torch.long), 0)
        positions, found = torch.tensor(positions), []
        for context in (nullcontext(), model.last_layer.only(positions)):
            with context:
                states = model.backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            pooled = states[rows, positions]
            gradients = torch.autograd.grad(pooled.square().sum(), list(model.backbone.parameters()), materialize_grads=True)
            found.append((pooled, torch.cat([gradient.flatten() for gradient in gradients])))
        for whole, alone in zip(*found, strict=True):
            torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item())


def test_the_table_has_a_line_for_each_checkpoint_and_every_family_is_proven():
    assert set(HUB) == set(FAMILIES) == {spec.family.model_type for spec in SYSTEMS.values()}
    sources = [spec.source for spec in SYSTEMS.values() if isinstance(spec.source, str)]
    assert len(sources) == len(set(sources)) == 34
    assert find("state-spaces/mamba-130m-hf") is find("state-spaces/mamba-130m") is SYSTEMS["mamba-130m"]
    assert find("state-spaces/mamba2-1.3b") is SYSTEMS["mamba2-1.3b"]  # which has no folder in transformers' format of its own
    assert all(family.kind in KINDS and family.lora_targets for family in FAMILIES.values())


def test_a_family_that_the_table_lacks_is_inferred_from_the_configuration_and_said_aloud(tmp_path, capsys):
    Qwen3Model(Qwen3Config(vocab_size=320, head_dim=16, num_key_value_heads=1, **SIZES)).save_pretrained(tmp_path)
    byte_level(tmp_path, END)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END[0]}), encoding="utf-8")
    spec = find(str(tmp_path))
    assert "'qwen3', so causal: document, query, end of sequence" in capsys.readouterr().err
    assert spec.kind == "causal" and spec.family.lora_targets == "all-linear"
    reranker = Reranker.from_pretrained(tmp_path, dtype=torch.float32)
    assert reranker.attention.startswith("sdpa") and np.isfinite(reranker.predict(PAIRS)).all()


def test_a_new_head_is_said_and_so_is_one_that_a_classifier_brings(tmp_path, capsys):
    write_checkpoint("bert", tmp_path)
    Reranker.from_pretrained(tmp_path)
    assert "with a new head, whose scores mean nothing before it is trained" in (said := capsys.readouterr().err)
    assert "is not used" not in said
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    classifier.save_pretrained(tmp_path)
    reranker = Reranker.from_pretrained(tmp_path)
    assert "its own head (classifier.bias, classifier.weight) is not used" in capsys.readouterr().err
    reranker.save_pretrained(tmp_path / "saved")
    Reranker.from_pretrained(tmp_path / "saved")
    assert "head" not in capsys.readouterr().err


def test_a_checkpoint_without_safetensors_is_refused_and_so_is_one_that_is_no_language_model(tmp_path):
    write_checkpoint("bert", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        Reranker.from_pretrained(tmp_path)
    ViTConfig().save_pretrained(tmp_path / "vision")
    with pytest.raises(InputError, match="'vit'"):
        Reranker.from_pretrained(tmp_path / "vision")


def test_a_checkpoint_that_lacks_weights_or_words_and_one_that_reads_padding_is_refused(tmp_path):
    write_checkpoint("bert", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lacking = {name: weight for name, weight in weights.items() if "layer.1." not in name}
    assert len(lacking) < len(weights)
    save_file(lacking, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"expected all weights .* got none for .*layer\.1\."):
        Reranker.from_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="as safetensors, got"):
        Reranker.from_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(InputError, match="expected the tokenizer of"):
        Reranker.from_pretrained(tmp_path)
    FNetConfig().save_pretrained(tmp_path / "fnet")
    with pytest.raises(InputError, match="got the type 'fnet': it reads padding"):
        Reranker.from_pretrained(tmp_path / "fnet")
    for absent in (tmp_path / "absent", "results/absent/models/nano-mamba-seed0"):
        with pytest.raises(InputError, match="there is no such folder"):
            Reranker.from_pretrained(absent)
    with pytest.raises(InputError, match="got the file .*config.json; name the folder"):
        Reranker.from_pretrained(tmp_path / "config.json")
    with pytest.raises(InputError, match="did you mean nano-mamba"):
        Reranker.from_pretrained("nano-mambo")


@pytest.mark.parametrize(
    "config, said",
    [
        (LlamaConfig(is_causal=False), "tokens see those after them"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "tokens see those after them"),
        (BertConfig(is_decoder=True), "is_decoder"),
        (RwkvConfig(), "rescales its weights"),
    ],
)
def test_what_would_be_scored_wrongly_is_refused_with_the_reason(config, said, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"expected a backbone that can be scored here, got the type .*{said}"):
        find(str(tmp_path))


def test_longrope_is_read_only_as_far_as_its_short_factors_go(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    sizes = SIZES | {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
    config = Phi3Config(vocab_size=320, rope_parameters=rope, pad_token_id=0, eos_token_id=1, **sizes)
    Phi3Model(config).save_pretrained(tmp_path)
    byte_level(tmp_path, END)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END[0]}), encoding="utf-8")
    with pytest.raises(InputError, match="expected max_length <= 64 .*, got 128: beyond, its rotary"):
        Reranker.from_pretrained(tmp_path, max_length=128)
    assert np.isfinite(Reranker.from_pretrained(tmp_path, max_length=64).predict(PAIRS)).all()


def test_a_longformer_sees_everything_from_the_token_that_is_pooled_and_no_padding(tmp_path):
    sizes = SIZES | {"max_position_embeddings": 514}
    config = LongformerConfig(vocab_size=320, attention_window=[16, 16], type_vocab_size=1, **ROBERTA, **sizes)
    LongformerModel(config).save_pretrained(tmp_path)
    byte_level(tmp_path, FAIRSEQ_TOKENS, files="vocab.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LongformerTokenizer"}), encoding="utf-8")
    reranker = Reranker.from_pretrained(tmp_path, dtype=torch.float32, max_length=300)
    pairs = [("which river", "a river in the snow " * count) for count in (1, 5, 12)]
    together, alone = reranker.predict(pairs), np.concatenate([reranker.predict([pair]) for pair in pairs])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    query, document = reranker.inputs.queries([pairs[2][0]])[0], reranker.inputs.documents([pairs[2][1]])[0]
    inputs = reranker.inputs.collate([reranker.inputs.join(query, document)])
    backbone = LongformerModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    everywhere = torch.zeros_like(inputs["input_ids"])
    everywhere[:, 0] = 1
    with torch.no_grad():
        hidden = backbone(**inputs, global_attention_mask=everywhere).last_hidden_state[:, 0]
        assert reranker.model.score(hidden).item() == pytest.approx(alone[2], abs=1e-5)


def test_a_byt5_whose_words_are_bytes_is_loaded_and_saved(tmp_path):
    T5Model(T5Config(vocab_size=384, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    reranker = Reranker.from_pretrained(tmp_path, dtype=torch.float32)
    reranker.save_pretrained(tmp_path / "saved")
    again = Reranker.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    np.testing.assert_allclose(again.predict(PAIRS), reranker.predict(PAIRS), rtol=0, atol=1e-6)


def test_a_padding_token_that_the_embedding_lacks_is_not_looked_up(tmp_path):
    write_checkpoint("gpt2", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    reranker = Reranker.from_pretrained(tmp_path, dtype=torch.float32)
    alone = np.concatenate([reranker.predict([pair]) for pair in PAIRS])
    np.testing.assert_allclose(reranker.predict(PAIRS), alone, rtol=0, atol=1e-5)


def test_a_roberta_with_berts_tokenizer_has_no_second_segment(tmp_path):
    RobertaModel(RobertaConfig(vocab_size=320, type_vocab_size=1, **SIZES)).save_pretrained(tmp_path)
    wordpiece(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}), encoding="utf-8")
    reranker = Reranker.from_pretrained(tmp_path, dtype=torch.float32, max_length=500)
    assert reranker.inputs.typed and np.isfinite(reranker.predict(PAIRS)).all()


def test_an_attention_without_sdpa_is_computed_eagerly(tmp_path):
    config = Gemma2Config(vocab_size=320, head_dim=16, num_key_value_heads=1, **SIZES)
    Gemma2Model(config).save_pretrained(tmp_path)
    byte_level(tmp_path, END)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": END[0], "tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8"
    )
    reranker = Reranker.from_pretrained(tmp_path, dtype=torch.float32)
    assert reranker.setup["attention"].startswith("eager") and np.isfinite(reranker.predict(PAIRS)).all()


def test_more_tokens_than_positions_are_refused(tmp_path):
    write_checkpoint("roberta", tmp_path)
    assert find(str(tmp_path)).max_length == 512  # 514 in its configuration
    with pytest.raises(InputError, match="max_length <= 512"):
        Reranker.from_pretrained(tmp_path, max_length=513)


@pytest.mark.parametrize("name", NANO)
@torch.no_grad()
def test_a_nano_backbone_is_transformers_own_network(name):
    torch.manual_seed(0)
    reranker = Reranker.from_pretrained(f"tiny-{name}", dtype=torch.float32, max_length=64, max_query_length=20)
    model = reranker.model
    for parameter in model.parameters():
        parameter.data.mul_(3)
    theirs = AutoModel.from_config(model.config.backbone_config).eval()
    theirs.load_state_dict(model.backbone.state_dict(), strict=False)
    embed, kind, scores = model.backbone.get_input_embeddings(), model.config.kind, []
    for query, document in PAIRS:
        ids = torch.from_numpy(reranker.inputs.join(*halves(reranker, query, document)).ids).long()[None]
        inputs = {"inputs_embeds": embed(ids)}
        if kind == "encoder":
            types = reranker.inputs.join(*halves(reranker, query, document)).types
            inputs["token_type_ids"] = torch.from_numpy(types).long()[None]
        if kind == "encoder-decoder":
            inputs["decoder_inputs_embeds"] = embed(torch.zeros(1, 1, dtype=torch.long))
        hidden = theirs(**inputs).last_hidden_state
        scores.append(model.score(hidden[:, -1 if kind == "causal" else 0]).item())
    assert np.abs(reranker.predict(PAIRS) - np.array(scores)).max() <= 1e-5


@torch.no_grad()
def test_smollm2_comes_out_of_its_package_and_scores(monkeypatch):
    # 98 MB: kept where a study keeps it, not fetched for every run of the tests
    monkeypatch.setattr(ir_datasets.util, "home_path", lambda: Path.home() / ".ir_datasets")
    reranker = Reranker.from_pretrained("smollm2-135m", dtype=torch.float32, max_length=128)
    backbone, tokenizer = reranker.model.backbone, reranker.tokenizer
    assert 134e6 < reranker.model.num_parameters() < 135e6
    assert (backbone.config.num_attention_heads, backbone.config.num_key_value_heads) == (9, 3)
    hidden = backbone(**tokenizer("The capital of France is", return_tensors="pt"), use_cache=False).last_hidden_state
    assert tokenizer.decode((hidden[0, -1] @ backbone.get_input_embeddings().weight.T).argmax()) == " Paris"
    scores = reranker.predict(PAIRS[:3])
    assert np.abs(scores - np.concatenate([reranker.predict([pair]) for pair in PAIRS[:3]])).max() <= 1e-4
