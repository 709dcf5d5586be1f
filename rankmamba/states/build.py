"""Computing the states of documents, block by block, and what identifies the model that they are of."""

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ..data.formats import Documents
from ..files import json_sha256
from ..inputs import Pair, token_batches
from ..model import weights_digest
from ..reranker import Reranker
from ..reranking.threads import batch_cost
from .encoding import FLOATS, Parts, Profile, encode
from .kinds import Attention, Recurrent
from .store import Writer

_log = logging.getLogger(__name__)
BLOCK = 256, 1 << 16  # documents and tokens between two commits of a build
SAMPLE = 16  # documents that the profile of int8 and int4 is made from
Batches = Iterator[list[tuple[int, Parts]]]  # of a block's states: (place in the block, parts)
VOLATILE = {"transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "name_or_path", "output_hidden_states"}


def identity(reranker: Reranker) -> dict[str, str | int]:
    """What a document's state depends on: backbone, weights, template, tokenizer, truncation, precision."""
    backbone, inputs = reranker.model.backbone, reranker.inputs
    config = {name: value for name, value in backbone.config.to_dict().items() if name[0] != "_" and name not in VOLATILE}
    return {
        "backbone": backbone.config.model_type,
        "configuration": json_sha256(config),
        "weights": weights_digest(backbone),
        "template": json.dumps([inputs.before, inputs.document_prefix, inputs.query_prefix, inputs.after]),
        "tokenizer": inputs.vocabulary_digest,
        "marked": inputs.marked > 0,
        "truncation": f"{inputs.document_limit} tokens of a document",
        "precision": str(reranker.dtype).removeprefix("torch."),
    }


def blocks(
    reranker: Reranker, documents: Documents, writer: Writer, count: Callable[[int], None]
) -> Iterator[list[tuple[str, Pair, str]]]:
    """Yield what is stored between two commits: [(doc_id, document half, digest of all documents so far)]."""
    block, tokens, inputs, lacking = [], 0, reranker.inputs, _lacking(documents, writer, count)
    while waiting := list(itertools.islice(lacking, 64)):
        halves = inputs.documents([text for _, text, _ in waiting])
        for (doc_id, _, digest), half in zip(waiting, halves, strict=True):
            ids = np.concatenate([inputs.before, half]).astype(np.int32)
            block.append((doc_id, Pair(ids, np.zeros_like(ids)), digest))
            tokens += len(ids)
            if len(block) == BLOCK[0] or tokens >= BLOCK[1]:
                yield block
                block, tokens = [], 0
    if block:
        yield block


def _lacking(documents: Documents, writer: Writer, count: Callable[[int], None]) -> Iterator[tuple[str, str, str]]:
    """Yield the documents not stored yet: doc_id, text, digest of all documents up to this one."""
    for place, pair in enumerate(documents.pairs()):
        if writer.has(*pair, place):
            count(1)
        else:
            yield *pair, writer.digest.hexdigest()


@torch.no_grad()
def store_block(
    kind: Recurrent | Attention, reranker: Reranker, writer: Writer, block, batch_tokens: int, count: Callable[[int], None]
) -> None:
    """Compute and store the states of one block."""
    doc_ids, pairs, digests = zip(*block, strict=True)
    dtype, profile = writer.header["dtype"], None
    with reranker.scoring():
        batches = _states(kind, reranker, pairs, batch_tokens, count)
        if dtype not in FLOATS or kind.kept is not None:
            profile, batches = _profile(kind, writer, batches)
            profile = kind.keep(profile)
        ids = [pair.ids if reranker.inputs.marked else None for pair in pairs]
        records = ((place, encode(dtype, kind.keep(parts), profile, ids[place])) for batch in batches for place, parts in batch)
        tokens = [len(pair) for pair in pairs]
        writer.add(doc_ids, tokens, [kind.numbers(number) for number in tokens], records, digests[-1])


def _states(
    kind: Recurrent | Attention, reranker: Reranker, pairs: Sequence[Pair], batch_tokens: int, count: Callable[[int], None]
) -> Batches:
    """Compute the documents' states, batch by batch."""
    # a state of fixed size makes short documents as large as long ones
    lengths = np.maximum([len(pair) for pair in pairs], 16 if kind.fixed else 1)
    for batch in token_batches(lengths, batch_tokens, batch_cost(reranker.device)):
        features = reranker.inputs.collate([pairs[i] for i in batch])
        ids, mask = (features[name].to(reranker.device) for name in ("input_ids", "attention_mask"))
        states = kind.read(ids, mask)
        count(len(batch))
        yield list(zip(batch, states, strict=True))


def _profile(kind: Recurrent | Attention, writer: Writer, batches: Batches) -> tuple[Profile, Batches]:
    """Return the store's profile, made of the first batches where there is none yet, and all the batches."""
    if (profile := writer.profile(kind.whole_shapes)) is not None:
        return profile, batches
    first: list[tuple[int, Parts]] = []
    while len(first) < SAMPLE and (batch := next(batches, None)):
        first += batch
    if len(first) < SAMPLE:
        _log.warning("the states are relative to %d documents only: what is added later is stored less exactly", len(first))
    profile = writer.write_profile(kind.profile([parts for _, parts in first]))
    return profile, itertools.chain([first], batches)
