"""One recipe for every backbone: localised contrastive estimation (LCE) on the Hugging Face Trainer.

Each query comes as a group of 1 positive and G-1 BM25 negatives; the loss is the cross entropy of the positive among its group
(arXiv 2101.08751; the recipe of arXiv 2403.18276).

`python -m rankmamba.train --config FILE.yaml` trains one system; under `accelerate launch -m` or `torchrun -m` it runs on many
devices, with the same groups, steps and loss (where a backbone has dropout of its own, or LoRA's, each device draws its masks).
"""

import argparse
import dataclasses
import logging
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from . import backbones
from .collection import Collection, check_run, load
from .data.runs import read_run
from .errors import InputError
from .files import check_room
from .memory import out_of_memory
from .model import weights_digest
from .reranker import Reranker
from .reranking.saved import check_target
from .results import environment, new_record, write_record
from .training.checkpoints import Checkpoints
from .training.config import TrainConfig, read_config
from .training.distil import teacher_scores
from .training.groups import TrainingGroups
from .training.lora import add_lora
from .training.progress import Progress, Stopped
from .training.trainer import NOT_DECAYED, LCETrainer

OPTIMIZER = "adamw_torch_fused"  # one kernel for all weights, also on a CPU
_log = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """A trained reranker and how it was made.

    curve: one row per step, {"step", "loss" (nats), "accuracy" (share of groups whose positive scores highest), "tokens" so far,
    "seconds" so far}. seconds: restarts included. stopped: ended early because it was asked to. setup: what it was
    computed with, and why.
    """

    reranker: Reranker
    curve: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    stopped: bool = False
    setup: dict = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.curve)

    @property
    def tokens(self) -> int:
        return self.curve[-1]["tokens"] if self.curve else 0

    def result(self) -> dict:
        """The `result` of a record: the same for every run with the same configuration and data."""
        model = self.reranker.model
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "parameters": model.num_parameters(),
            "parameters_outside_embeddings": model.parameters_outside_embeddings(),
            "curve": [{name: row[name] for name in ("step", "loss", "accuracy", "tokens")} for row in self.curve],
            "partial": self.stopped,
        }

    def timing(self) -> dict:
        """The `timing` of a record."""
        return {"seconds": self.seconds, "tokens_per_s": self.tokens / self.seconds}


def scale_config(given: Mapping, system: str) -> TrainConfig:
    """The configuration that a scale's parameters (`parameters.settle`) give a system; LoRA above 700 M parameters, as in the paper."""
    rates, steps = given["learning_rates"], given["max_steps"]
    names = ("batch_size", "group_size", "epochs", "warmup", "seed", "max_length", "max_query_length")
    return TrainConfig(
        system,
        learning_rate=rates.get(system, rates["default"]),
        max_steps=steps.get(system, steps["default"]),
        lora_r=backbones.find(system).lora_r,
        **{name: given[name] for name in names},
    )


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
    checkpoint_seconds: float = 300,
    checkpoint_steps: int = 0,
    tensorboard: str | Path | None = None,
) -> TrainResult:
    """Train one system on a collection and save it as `folder`; a training that was interrupted resumes where it was.

    candidates: the first-stage run that negatives come from; default the collection's own. on_step: called after each step with
    its row of the curve and "of", the total number of steps. stop: set it from another thread to end within the current step, which
    is abandoned (on a GPU or with other processes: finished); what was learnt so far is saved, and the same call later resumes
    there. checkpoint_seconds: between two checkpoints. checkpoint_steps: also after this many steps, 0 for never. Checkpoints are
    kept in checkpoints/ beside `folder` until the training is done.
    tensorboard: a folder for what the Trainer logs of each step (loss, learning rate, norm of the gradient).

    Under torchrun or accelerate launch all processes call it alike; the first one writes.

    Raises:
        InputError: the collection has no judged relevant document, or no candidates for the queries that have one; the configuration
            is invalid, or the memory or the disk is too small.
        FloatingPointError: the loss or a gradient is NaN or infinite.
        Stopped: `stop` was set before the first step was done; nothing is kept.
        KeyboardInterrupt: after Ctrl-C, which is handled like `stop`; a checkpoint keeps what was learnt, the model is not saved.
    """
    processes = PartialState(cpu=not torch.cuda.is_available())
    candidates = collection.candidates if candidates is None else candidates
    if candidates is None:
        raise InputError(
            f"expected candidates to draw negatives from, got none in {collection.name}; "
            "put a candidates.run in its folder, or pass a first-stage run"
        )
    config.check(processes.num_processes)
    check_target(folder)
    relevant = collection.qrels[collection.qrels["relevance"] > 0]
    if relevant.empty:
        raise InputError(f"expected at least one relevant document in the qrels of {collection.name}, got none")
    if not relevant["query_id"].isin(candidates["query_id"].unique()).any():
        raise InputError(
            f"expected candidates to draw negatives from, got them for 0 of the {relevant['query_id'].nunique()} training queries of "
            f"{collection.name}; pass a first-stage run of these queries"
        )
    steps = total_steps(config, len(relevant))
    reranker, adapted = _student(config, processes.device)
    _check_room(Path(folder), reranker.model)
    groups = TrainingGroups(
        collection, candidates, reranker.inputs, config.group_size, config.seed, count=steps * config.batch_size, stop=stop
    )
    made_with = config.settings() | {"not decayed": NOT_DECAYED, "data": groups.digest(), "weights": weights_digest(reranker.model)}
    checkpoints = Checkpoints(Path(folder).parent / "checkpoints" / Path(folder).name, made_with)
    (resume,) = broadcast_object_list([checkpoints.newest() if processes.is_main_process else None])
    progress = Progress(on_step, stop, checkpoint_seconds, checkpoint_steps)
    if resume is not None:
        progress.load(resume)
        _log.warning("training %s resumes after step %d of %d", config.system, len(progress.curve), steps)
    trainer = LCETrainer(
        reranker,
        _arguments(config, reranker, steps, processes.num_processes, checkpoints, "no" if tensorboard is None else "steps"),
        groups,
        config.batch_size,
        checkpoints,
        progress,
        teacher_scores(config.teacher, groups, collection, checkpoints.folder) if config.loss == "distil" else None,
    )
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.activation_checkpointing:
        raise InputError("expected no activation checkpointing by FSDP, got it; set gradient_checkpointing, which does the same")
    torch.manual_seed(config.seed + processes.process_index)  # each device its own dropout
    if tensorboard is not None:
        callback = TensorBoardCallback()
        callback.logging_dir = str(tensorboard)
        trainer.add_callback(callback)
    with progress.heeding_interrupts():
        try:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        except Stopped:
            if progress.curve:
                trainer.keep_last_step()
        except Exception as error:
            if not out_of_memory(error):
                raise
            remedy = "use a smaller lora_r" if config.lora_r else "use lora_r"
            raise InputError(f"expected weights, gradients and AdamW's moments to fit into memory, got: {error}; {remedy}") from error
    if not progress.curve:
        raise Stopped
    setup = reranker.setup | {"optimizer": OPTIMIZER, "processes": processes.num_processes}
    sharded = trainer.is_fsdp_enabled
    if sharded:  # each process has a part of the weights: the first one assembles them
        weights = trainer.accelerator.get_state_dict(trainer.model)
        reranker, adapted = _student(config, torch.device("cpu"))
        if processes.is_main_process:
            reranker.model.load_state_dict(weights)
    if adapted is not None:
        adapted.merge_and_unload()
    reranker.model.eval()
    seconds = progress.seconds
    if processes.is_main_process:
        reranker.save_pretrained(folder)
        if not progress.stopped:
            checkpoints.remove()
    processes.wait_for_everyone()
    if sharded:
        reranker = Reranker.from_pretrained(folder, processes.device, reranker.dtype)
    return TrainResult(reranker, progress.curve, seconds, progress.stopped, setup)


def _student(config: TrainConfig, device: torch.device):
    """Load the model to be trained; returns the reranker, and with LoRA what `add_lora` returned, else None."""
    set_seed(config.seed)
    dtype = {None: None, True: torch.bfloat16, False: torch.float32}[config.bf16]
    limits = {"max_length": config.max_length, "max_query_length": config.max_query_length}
    reranker = Reranker(*backbones.load(config.system, **limits), device, dtype)
    adapted = add_lora(reranker.model, config.lora_r, config.lora_alpha) if config.lora_r else None
    # neither loss depends on the head's bias; AdamW would turn rounding in its zero gradient into steps
    reranker.model.score.bias.requires_grad_(False)
    return reranker, adapted


def _check_room(folder: Path, model: torch.nn.Module) -> None:
    """Refuse to begin a training if the disk has no room for its model, to be saved as `folder`, and one checkpoint of it."""
    weights = sum(weight.nbytes for weight in model.parameters())
    moments = 2 * sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)  # AdamW's
    remedy = "free some space, or choose a folder on a larger disk"
    check_room(folder, 2 * weights + moments, "for the model and a checkpoint of it", remedy)


def _arguments(
    config: TrainConfig, reranker: Reranker, steps: int, processes: int, checkpoints: Checkpoints, logged: str
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(checkpoints.partial),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size // processes,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=int(config.warmup * steps),
        weight_decay=config.weight_decay,
        optim=OPTIMIZER,
        bf16=reranker.dtype == torch.bfloat16,
        gradient_checkpointing=config.gradient_checkpointing or None,  # a name that every transformers 5 knows
        torch_compile=config.compile,
        seed=config.seed,
        use_cpu=reranker.device.type == "cpu",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # ours are constants
        logging_strategy=logged,
        logging_steps=1,
        save_strategy="no",  # `Progress` decides
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,  # its items are numbers
    )
    arguments.mixed_precision = "bf16" if arguments.bf16 else "no"  # whatever accelerate's launcher was told
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one GPU: no DataParallel, which would multiply the batch
    return arguments


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rankmamba.train", description="Train one system, on one or many devices.")
    parser.add_argument(
        "--config", required=True, metavar="FILE.yaml", help="fields of TrainConfig, collection, folder, candidates"
    )
    parser.add_argument("--tensorboard", metavar="FOLDER", help="also log every step for TensorBoard (pip install tensorboard)")
    options = parser.parse_args(arguments)
    try:
        config, where = read_config(options.config)
        collection = load(where["collection"])
        candidates = None
        if where["candidates"] is not None:
            candidates = read_run(where["candidates"])
            # documents are checked when drawn: checking all here would look up those of a large collection
            check_run(candidates, collection, where["candidates"], columns=["query_id"])
        first = PartialState(cpu=not torch.cuda.is_available()).is_main_process
        trained = train(config, collection, where["folder"], candidates, on_step=print_step, tensorboard=options.tensorboard)
        if first:
            made = "train", config.system, where["collection"], "own", config.seed, dataclasses.asdict(config)
            ran = environment() | trained.setup
            print(write_record(where["folder"], new_record(*made, trained.result(), trained.timing(), ran)))
    except (InputError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; start the same command again to resume", file=sys.stderr)
        return 130
    return 0


def print_step(row: dict) -> None:
    """Print a row of the curve."""
    print(
        f"step {row['step']} of {row['of']}: loss {row['loss']:.4f}, accuracy {row['accuracy']:.2f}, {row['tokens']:,} tokens",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
