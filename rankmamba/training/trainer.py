"""The recipe's Trainer: groups in their order, LCE or distillation, chunks of similar length, checkpoints that are whole."""

import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch.utils.checkpoint import checkpoint
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from ..errors import InputError
from ..memory import free_memory, out_of_memory
from ..reranker import Reranker
from .checkpoints import Checkpoints
from .groups import TrainingGroups
from .losses import accuracy, distil_loss, lce_loss
from .progress import Progress

_log = logging.getLogger(__name__)
NOT_DECAYED = "A_log", ".D", "dt_bias", "norm_f.weight"  # of Mamba; the Trainer knows the norms of others by their names


def like_length(lengths: Sequence[int], count: int) -> list[np.ndarray]:
    """Cut sequences, longest first, into `count` chunks that take the fewest tokens after padding: arrays of indices.

    The number is fixed because every process must call a sharded model equally often.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    longest = np.asarray(lengths)[order]
    ends = np.arange(len(order) + 1)
    # padded[i, j]: tokens of a chunk of the sequences i to j; fewest[j]: the least for all chunks up to j
    padded = np.where(ends > ends[:-1, None], longest[:, None] * (ends - ends[:-1, None]), np.inf)
    fewest, starts = padded[0], []
    for _ in range(min(count, len(order)) - 1):
        through = fewest[:-1, None] + padded
        starts.append(through.argmin(0))
        fewest = through.min(0)
    cuts = [len(order)]
    for start in reversed(starts):
        cuts.append(int(start[cuts[-1]]))
    return np.split(order, cuts[:0:-1])


class LCETrainer(Trainer):
    """The Trainer with our loss, groups in their given order, and no weight decay on a state-space model's own parameters and last norm.

    Its items are indices of groups; a step makes its batch from them, so that it can make smaller chunks if memory runs out.
    """

    # A step's pairs run in chunks of similar length: mathematically one batch, but short documents are not padded to long ones.
    CHUNKS = 4

    def __init__(
        self,
        reranker: Reranker,
        args: TrainingArguments,
        groups: TrainingGroups,
        batch_size: int,
        checkpoints: Checkpoints,
        progress: Progress,
        teacher: np.ndarray | None = None,
    ):
        """batch_size: queries of a step, on all processes. teacher: its scores, float32 (groups, G), if there is one to imitate."""
        super().__init__(
            model=reranker.model, args=args, data_collator=list, train_dataset=range(len(groups)), callbacks=[progress]
        )
        self.remove_callback(PrinterCallback)
        self.inputs, self.groups, self.batch_size, self.teacher = reranker.inputs, groups, batch_size, teacher
        self.checkpoints, self.progress, progress.trainer = checkpoints, progress, self
        self.chunks, self.recompute = self.CHUNKS, False
        self.measured = (math.nan, math.nan, 0)

    def batch(self, indices: list[int]) -> dict:
        """Make the model inputs of the groups `indices`, all of one step."""
        pairs = [pair for index in indices for pair in self.groups[index]]
        shape = (len(indices), len(pairs) // len(indices))
        chunks = like_length([len(pair) for pair in pairs], self.chunks)
        masks = self._dropout_masks(indices, shape[1])
        return {
            "chunks": [self.inputs.collate([pairs[i] for i in chunk]) | {"dropout_mask": masks[chunk]} for chunk in chunks],
            "order": torch.from_numpy(np.argsort(np.concatenate(chunks))),
            "shape": shape,
            "tokens": sum(len(pair) for pair in pairs),
            "teacher": None if self.teacher is None else torch.from_numpy(self.teacher[indices]),
        }

    def _dropout_masks(self, indices: list[int], group_size: int) -> torch.Tensor:
        """The head's dropout for these groups, float32 (pairs, D): drawn by step, so the same on any number of processes."""
        step, width, p = indices[0] // self.batch_size, self.model.score.in_features, self.model.config.head_dropout
        drawn = np.random.default_rng([self.args.seed, step]).random((self.batch_size, group_size, width), dtype=np.float32)
        ours = drawn[np.array(indices) - step * self.batch_size].reshape(-1, width)
        return torch.from_numpy((ours >= p) / np.float32(1 - p))

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._random = torch.get_rng_state()
        while True:
            try:
                return super().training_step(model, self.batch(inputs), num_items_in_batch)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                self._use_less_memory(error, pairs=sum(len(self.groups[index]) for index in inputs))
            model.zero_grad()
            free_memory()

    def _use_less_memory(self, error: Exception, pairs: int) -> None:
        """Halve the chunks, and keep the activations of only one at a time; the loss and its gradients stay the same."""
        error.with_traceback(None)  # its frames would keep the step's tensors alive, in a notebook for good
        if self.args.world_size > 1:
            # the other processes already wait for this one's gradients
            raise InputError(
                f"expected the {pairs} pairs of a process to fit into memory, got: {error}; use gradient_checkpointing, more "
                "processes or a smaller max_length"
            ) from error
        if self.recompute and self.chunks >= pairs:
            raise InputError(
                f"expected one pair at a time to fit into memory, got: {error}; use gradient_checkpointing, lora_r or a smaller "
                "max_length"
            ) from error
        self.chunks, self.recompute = 2 * self.chunks, True
        _log.warning(
            "a step does not fit into memory: from now on it runs in %d chunks, each computed twice; dropout draws other masks, otherwise "
            "the result is the same",
            min(self.chunks, pairs),
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        run = partial(checkpoint, model, use_reentrant=False) if self.recompute else model
        logits = []
        for chunk in inputs["chunks"]:
            self.progress.heed_stop(self.args)
            logits.append(run(**chunk).logits[:, 0])
        for chunk in logits:
            if chunk.requires_grad:  # runs Python between the chunks, so that Ctrl-C and `stop` are noticed
                chunk.register_hook(lambda gradient: self.progress.heed_stop(self.args))
        logits = torch.cat(logits)
        scores = logits[inputs["order"]].view(inputs["shape"])
        loss = lce_loss(scores) if inputs["teacher"] is None else distil_loss(scores, inputs["teacher"])
        ours = torch.stack([loss.detach().double(), accuracy(scores), loss.new_tensor(inputs["tokens"], dtype=torch.double)])
        loss_of_all, accuracy_of_all, tokens = self.accelerator.reduce(ours, "mean").tolist()
        self._check("loss", loss_of_all)
        self.measured = loss_of_all, accuracy_of_all, round(tokens * self.args.world_size)
        return (loss, {"logits": scores}) if return_outputs else loss

    def keep_last_step(self) -> None:
        """After `Stopped`: save a checkpoint as if the abandoned step had not begun."""
        self.model.zero_grad()
        torch.set_rng_state(self._random)
        if self.state.global_step > 0:
            self._save_checkpoint(self.model, trial=None)

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        self._check("gradient", float(norm))
        return norm

    def _check(self, what: str, value: float) -> None:
        """Stop before a value that is not finite gets into the weights."""
        if math.isfinite(value):
            return
        step = self.state.global_step
        query_ids = [group.query_id for group in self.groups.groups[step * self.batch_size : (step + 1) * self.batch_size]]
        raise FloatingPointError(
            f"expected a finite {what}, got {value} at step {step + 1}, queries {', '.join(query_ids)}; lower the learning rate or look "
            f"at these queries' texts (the last checkpoint: {self.checkpoints.last or 'none yet'})"
        )

    def agree(self, *flags: bool) -> list[bool]:
        """Return each flag as true if it is true on any process."""
        counts = torch.tensor([float(flag) for flag in flags], device=self.args.device)
        return [count > 0 for count in self.accelerator.reduce(counts, "sum").tolist()]

    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(NOT_DECAYED)]

    def floating_point_ops(self, inputs):
        return 0  # a step's inputs are indices of groups

    def _save_checkpoint(self, model, trial):
        started, step = time.perf_counter(), self.state.global_step
        try:
            if self.is_world_process_zero():
                self.checkpoints.clear()
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self.checkpoints.keep(step, {"seconds": self.progress.seconds, "curve": self.progress.curve})
            self.accelerator.wait_for_everyone()
        except Exception as error:  # a full disk is an OSError, a RuntimeError or a SafetensorError, depending on the writer
            raise InputError(
                f"expected to write a checkpoint to {self.checkpoints.folder}, got: {error}; make room there and start again: the "
                "training resumes from the checkpoint before"
            ) from error
        self.progress.saved(time.perf_counter() - started)

    def _save(self, output_dir=None, state_dict=None):
        """Write the weights alone, by their names in the model, shared ones once; the Trainer would add a pickle."""
        if self.args.should_save and not self.is_fsdp_enabled:  # the optimizer's part of FSDP writes them too
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_model(self.model, Path(output_dir) / SAFE_WEIGHTS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        weights = Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME
        if weights.is_file() == self.is_fsdp_enabled:
            with_it, without = ("with", "without") if self.is_fsdp_enabled else ("without", "with")
            raise InputError(
                f"expected a checkpoint of a training {with_it} FSDP, got one {without} it, {resume_from_checkpoint}; go on as it began, "
                "or delete it"
            )
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_model(self.model, weights)
