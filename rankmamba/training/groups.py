"""What a training reads: its LCE groups in order, tokenised once."""

import hashlib
import threading

import numpy as np
import pandas as pd

from ..candidates import lce_groups
from ..collection import Collection
from ..data.token_store import all_ids, document_tokens
from ..inputs import Pair, PairTokenizer
from .progress import Stopped


class TrainingGroups:
    """The LCE groups of a whole training, all epochs one after another; item i is a list of G `Pair`s, positive first.

    count: how many, steps times queries per step. stop: set it from another thread to end before the next epoch.

    Raises:
        Stopped: `stop` was set.
    """

    def __init__(
        self,
        collection: Collection,
        candidates: pd.DataFrame,
        inputs: PairTokenizer,
        group_size: int,
        seed: int,
        count: int,
        stop: threading.Event | None = None,
    ):
        self.inputs, self.groups = inputs, []
        doc_ids, epoch = all_ids(collection.documents, inputs), 0
        while len(self.groups) < count:
            if stop is not None and stop.is_set():
                raise Stopped
            self.groups += lce_groups(candidates, collection.qrels, group_size, seed, epoch, doc_ids=doc_ids)
            epoch += 1
        del self.groups[count:]
        query_ids = sorted({group.query_id for group in self.groups})
        doc_ids = sorted({doc_id for group in self.groups for doc_id in group.doc_ids})
        self.queries = dict(zip(query_ids, inputs.queries([collection.queries[i] for i in query_ids]), strict=True))
        self.documents = document_tokens(collection.documents, doc_ids, inputs)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[Pair]:
        group = self.groups[index]
        query = self.queries[group.query_id]
        return [self.inputs.join(query, self.documents[doc_id]) for doc_id in group.doc_ids]

    def digest(self) -> str:
        """SHA-256 of the groups, their order and their tokens."""
        digest = hashlib.sha256()
        for group in self.groups:
            digest.update(repr(tuple(group)).encode())
        for tokens in (self.queries, self.documents):
            for ids in tokens.values():
                digest.update(np.int64(len(ids)).tobytes() + ids.tobytes())
        return digest.hexdigest()
