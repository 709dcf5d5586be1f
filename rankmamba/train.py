"""One recipe for every backbone: localised contrastive estimation (LCE) on the Hugging Face Trainer.

Each query comes as a group of 1 positive and G-1 BM25 negatives; the loss is the cross entropy of the positive among its group
(arXiv 2101.08751; the recipe of arXiv 2403.18276). `accelerate launch -m rankmamba.train` runs the same on many devices.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from .candidates import lce_groups
from .collection import Collection
from .errors import InputError
from .inputs import PairTokenizer, token_batches
from .precision import autocast_dtype
from .reranker import Reranker


@dataclass
class TrainConfig:
    """What a training run is made of; every field stands in its record.

    system: a name in the table of systems, a Hub id or a folder. learning_rate: AdamW's peak, reached after `warmup` (a share
    of all steps) and then decaying linearly to 0. batch_size: queries per step. group_size: documents per query, 1 positive.
    epochs: passes over the training queries (may be a fraction). max_steps: a cap on the steps, 0 for none.
    max_length, max_query_length: tokens. bf16: None decides by the device.
    """

    system: str
    learning_rate: float = 2e-5
    batch_size: int = 8
    group_size: int = 8
    epochs: float = 1.0
    max_steps: int = 0
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_length: int = 512
    max_query_length: int = 50
    seed: int = 0
    bf16: bool | None = None


@dataclass
class TrainResult:
    """A trained reranker and how it came about.

    curve: one row a step, {"step", "loss" (nats), "accuracy" (share of groups whose positive scores highest), "tokens" so far,
    "seconds" so far}. stopped: ended before its last step, because it was asked to. precision: what products ran in, and why.
    """

    reranker: Reranker
    curve: list[dict] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stopped: bool = False
    precision: str = ""


def lce_loss(scores: torch.Tensor) -> torch.Tensor:
    """LCE of scores (B, G), the positive in column 0: the mean of -log softmax(scores)[:, 0]."""
    return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device))


class GroupDataset(Dataset):
    """Tokenised LCE groups in training order, all epochs one after another; an item is a list of G `Pair`s, positive first."""

    def __init__(self, collection: Collection, candidates: pd.DataFrame, inputs: PairTokenizer, config: TrainConfig, steps: int):
        self.inputs, self.groups = inputs, []
        epoch = 0
        while len(self.groups) < steps * config.batch_size:
            groups = lce_groups(
                candidates, collection.qrels, config.group_size, config.seed, epoch, doc_ids=list(collection.documents)
            )
            self.groups += groups
            epoch += 1
        self.groups = self.groups[: steps * config.batch_size]
        query_ids = sorted({group.query_id for group in self.groups})
        doc_ids = sorted({doc_id for group in self.groups for doc_id in (group.positive, *group.negatives)})
        texts = collection.documents.get_many(doc_ids)
        self.queries = dict(zip(query_ids, inputs.queries([collection.queries[i] for i in query_ids]), strict=True))
        self.documents = dict(zip(doc_ids, inputs.documents([texts[i] for i in doc_ids]), strict=True))

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int):
        group = self.groups[index]
        query = self.queries[group.query_id]
        return [self.inputs.join(query, self.documents[doc_id]) for doc_id in (group.positive, *group.negatives)]


class LCETrainer(Trainer):
    """The Trainer with the LCE loss, groups in their given order, and no weight decay on a state-space model's own parameters."""

    # A step's pairs run in chunks of like length: mathematically one batch, but short documents are not padded to long ones.
    CHUNKS = 4

    def __init__(self, *args, inputs: PairTokenizer, **kwargs):
        self.pairs = inputs
        super().__init__(*args, data_collator=self._collate, **kwargs)
        self.remove_callback(PrinterCallback)
        self.tokens, self.loss, self.accuracy = 0, 0.0, 0.0

    def _collate(self, groups):
        pairs = [pair for group in groups for pair in group]
        lengths = [len(pair) for pair in pairs]
        chunks = list(token_batches(lengths, max(max(lengths), -(-sum(lengths) // self.CHUNKS))))
        return {
            "chunks": [self.pairs.collate([pairs[i] for i in chunk]) for chunk in chunks],
            "order": torch.from_numpy(np.argsort(np.concatenate(chunks))),
            "shape": (len(groups), len(groups[0])),
            "tokens": sum(lengths),
        }

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = torch.cat([model(**chunk).logits[:, 0] for chunk in inputs["chunks"]])
        scores = logits[inputs["order"]].view(inputs["shape"])
        self.tokens += inputs["tokens"]
        # a tie counts against the positive: half-precision scores tie often, and argmax would favour the first column
        self.accuracy = (scores[:, :1] > scores[:, 1:]).all(1).float().mean().item()
        loss = lce_loss(scores)
        self.loss = loss.item()
        return (loss, {"logits": scores}) if return_outputs else loss

    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(("A_log", ".D", "dt_bias"))]

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)


class _Curve(TrainerCallback):
    """Collects the curve, reports each step, and stops when asked to."""

    def __init__(self, result: TrainResult, on_step: Callable[[dict], None] | None, stop: threading.Event | None):
        self.result, self.on_step, self.stop = result, on_step, stop
        self.trainer: LCETrainer | None = None
        self.started = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        loss = self.trainer.loss
        if not np.isfinite(loss):
            raise FloatingPointError(f"expected a finite loss, got {loss} at step {state.global_step}; lower the learning rate")
        row = {
            "step": state.global_step,
            "loss": loss,
            "accuracy": self.trainer.accuracy,
            "tokens": self.trainer.tokens,
            "seconds": time.perf_counter() - self.started,
        }
        self.result.curve.append(row)
        if self.on_step is not None:
            self.on_step(row | {"of": state.max_steps})
        if self.stop is not None and self.stop.is_set():
            control.should_training_stop = self.result.stopped = True


def total_steps(config: TrainConfig, groups_per_epoch: int) -> int:
    """The optimizer steps of a run: epochs times groups over batch size, capped by `max_steps`."""
    steps = max(1, int(config.epochs * groups_per_epoch / config.batch_size))
    return min(steps, config.max_steps) if config.max_steps else steps


def train(
    config: TrainConfig,
    collection: Collection,
    folder: str | Path,
    candidates: pd.DataFrame | None = None,
    on_step: Callable[[dict], None] | None = None,
    stop: threading.Event | None = None,
) -> TrainResult:
    """Train one system on a collection and save it as `folder`.

    candidates: the first-stage run that negatives come from; default the collection's own. on_step: called after each step with
    its row of the curve and "of", the number of steps in all. stop: set it from another thread to end after the current step;
    what was learnt so far is kept.

    Raises:
        InputError: the collection has no candidates or no judged relevant document.
    """
    candidates = collection.candidates if candidates is None else candidates
    if candidates is None:
        raise InputError(f"expected candidates to draw negatives from, got none in {collection.name}; pass a first-stage run")
    set_seed(config.seed)
    reranker = Reranker.from_pretrained(config.system, max_length=config.max_length, max_query_length=config.max_query_length)
    asked = {None: None, True: torch.bfloat16, False: torch.float32}[config.bf16]
    dtype, reason = autocast_dtype(reranker.device, asked)
    positives = int((collection.qrels["relevance"] > 0).sum())
    if positives == 0:
        raise InputError(f"expected at least one relevant document in the qrels of {collection.name}, got none")
    steps = total_steps(config, positives)
    result = TrainResult(reranker, precision=reason)
    callback = _Curve(result, on_step, stop)
    trainer = LCETrainer(
        model=reranker.model,
        args=TrainingArguments(
            output_dir=str(Path(folder).parent / "checkpoints" / Path(folder).name),
            max_steps=steps,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=int(config.warmup * steps),
            weight_decay=config.weight_decay,
            bf16=dtype == torch.bfloat16,
            seed=config.seed,
            use_cpu=reranker.device.type == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=reranker.device.type == "cuda",
        ),
        train_dataset=GroupDataset(collection, candidates, reranker.inputs, config, steps),
        callbacks=[callback],
        inputs=reranker.inputs,
    )
    callback.trainer = trainer
    trainer.train()
    reranker.model.eval()
    result.steps, result.tokens = trainer.state.global_step, trainer.tokens
    result.seconds = time.perf_counter() - callback.started
    reranker.save_pretrained(folder)
    return result
