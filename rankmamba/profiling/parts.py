"""Where the time goes when a system reads texts: events of torch's profiler, assigned to the parts of a reranker."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ..inputs import token_batches
from ..precision import autocast
from ..reranker import Reranker
from ..reranking.threads import batch_cost
from ..training.losses import lce_loss
from . import timed

# Part: strings that its events' names contain. The first match on the way down from the outermost call decides, so what a
# scan calls belongs to the scan. "rankmamba::" are our own labels; a backward pass is named after what it is the backward of.
PARTS = {
    "tokeniser": ("rankmamba::tokenise",),
    "scan": (
        "rankmamba::scan",
        "_SelectiveScanBackward",
        "_SsdScanBackward",
        "_Mamba2InnerBackward",
        "SelectiveScanFnBackward",  # mamba-ssm's
        "MambaChunkScanCombinedFnBackward",
    ),
    "convolution": ("rankmamba::convolution", "_CausalConv1dBackward", "CausalConv1dFnBackward"),
    "attention": (
        "rankmamba::attention",
        "_AttentionBackward",
        "aten::scaled_dot_product",
        "ScaledDotProduct",
        "FlashAttn",
        "aten::bmm",
        "aten::_softmax",
    ),
    "projections": ("aten::mm", "aten::addmm"),
    "optimizer": ("Optimizer.",),
}
OTHER = "norms and other"


class TextPass:
    """One scoring, or one training step, of pairs of texts, tokenisation included.

    mode: "inference" or "training" (all pairs are one step, in LCE groups of `group_size`). fixed: pairs of a batch in the given
    order; 0 batches by length, with a budget of `batch_tokens`. lengths: tokens of each pair, after a call.
    """

    def __init__(
        self, mode: str, reranker: Reranker, pairs: Sequence[tuple[str, str]], batch_tokens: int, group_size: int, fixed=0
    ):
        self.mode, self.reranker, self.pairs = mode, reranker, pairs
        self.batch_tokens, self.group_size, self.fixed = batch_tokens, group_size, fixed
        self.lengths: list[int] = []
        self._optimizer = torch.optim.AdamW(reranker.model.parameters(), lr=0.0, fused=True) if mode == "training" else None

    def __call__(self) -> None:
        training, model = self.mode == "training", self.reranker.model.train(self.mode == "training")
        with record_function("rankmamba::tokenise"):
            order, batches = self._batches()
        with torch.set_grad_enabled(training):
            with autocast(self.reranker.device, self.reranker.dtype):
                logits = torch.cat([model(**batch).logits[:, 0] for batch in batches])
            if training:
                lce_loss(logits[order].view(-1, self.group_size)).backward()
                self._optimizer.step()
                self._optimizer.zero_grad()

    def padded_tokens(self) -> int:
        """Count the tokens computed: each batch is padded to its longest sequence."""
        return sum(int(len(batch) * np.take(self.lengths, batch).max()) for batch in self._indices())

    def _indices(self) -> list[np.ndarray]:
        if self.fixed:
            return np.split(np.arange(len(self.lengths)), range(self.fixed, len(self.lengths), self.fixed))
        return token_batches(self.lengths, self.batch_tokens, batch_cost(self.reranker.device))

    def _batches(self):
        inputs = self.reranker.inputs
        texts = inputs.queries([query for query, _ in self.pairs]), inputs.documents([document for _, document in self.pairs])
        joined = [inputs.join(query, document) for query, document in zip(*texts, strict=True)]
        self.lengths = [len(pair) for pair in joined]
        batches = self._indices()
        order = torch.from_numpy(np.argsort(np.concatenate(batches)))
        features = [inputs.collate([joined[i] for i in batch]) for batch in batches]
        return order, [{name: t.to(self.reranker.device) for name, t in batch.items()} for batch in features]


def breakdown(run: TextPass) -> dict[str, float]:
    """Seconds of each part of a call that has run before; they add up to what the call takes without the profiler.

    What padded tokens cost is their share of all computed tokens in everything but tokeniser and optimizer, and is called "padding".
    """
    seconds = float(np.median([timed(run, run.reranker.device) for _ in range(3)]))
    # other work on the machine can only add time
    parts = min((_profiled(run) for _ in range(3)), key=lambda parts: sum(parts.values()))
    if run.reranker.attention.startswith("none"):
        parts["scan"] += parts.pop("attention")  # batched products of a scan in plain PyTorch
    total = sum(parts.values())
    parts = {part: seconds * time / total for part, time in parts.items()}
    wasted = 1 - sum(run.lengths) / run.padded_tokens()
    model = [part for part in parts if part not in ("tokeniser", "optimizer")]
    padding = wasted * sum(parts[part] for part in model)
    return {part: time * (1 - wasted) if part in model else time for part, time in parts.items()} | {"padding": padding}


def _profiled(run: TextPass) -> dict[str, float]:
    """Microseconds of each part of one call under the profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no lines about when it starts and stops
    gpu = run.reranker.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        with record_function("rankmamba::all"):
            run()
            if gpu:
                torch.cuda.synchronize(run.reranker.device)
    parts = dict.fromkeys([*PARTS, OTHER], 0.0)
    for event in profiler.events():
        if event.cpu_parent is None and event.device_type == DeviceType.CPU:  # kernels on a GPU are counted with their callers
            _claim(event, parts, "device_time_total" if gpu else "cpu_time_total")
    return parts


def _claim(event, parts: dict[str, float], time: str) -> float:
    """Add an event's microseconds to the part it belongs to, or, if to none, let its callees decide; return them.

    The tokeniser's are the CPU's, whatever the time of the others: on a GPU it takes none of theirs.
    """
    part = next((part for part, names in PARTS.items() if any(name in event.name for name in names)), None)
    spent = getattr(event, time)
    if part is None:
        part, rest = OTHER, spent - sum(_claim(child, parts, time) for child in event.cpu_children)
    else:
        rest = event.cpu_time_total if part == "tokeniser" else spent
    parts[part] += rest
    return spent
