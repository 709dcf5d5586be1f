"""The scores of the teacher that a student imitates: computed once, kept on the disk while the training lasts."""

import hashlib
from pathlib import Path

import numpy as np
from accelerate import PartialState

from ..collection import Collection
from ..files import replacing
from ..reranker import Reranker
from .config import weights_in
from .groups import TrainingGroups


def teacher_scores(teacher: str, groups: TrainingGroups, collection: Collection, folder: Path) -> np.ndarray:
    """Score every group with the reranker in the folder `teacher`: raw logits, float32 (groups, G).

    A pair that is in several groups is scored once. The scores are kept in `folder`, where a resumed training reads them.
    """
    of = (weights_in([teacher]), groups.digest())
    path = folder / f"teacher-{hashlib.sha256(repr(of).encode()).hexdigest()[:16]}.npy"
    processes = PartialState()
    with processes.main_process_first():  # the others wait and then read
        if not path.is_file():
            pairs = [(group.query_id, doc_id) for group in groups.groups for doc_id in group.doc_ids]
            texts = collection.documents.get_many({doc_id for _, doc_id in pairs})
            scores = Reranker.from_pretrained(teacher, processes.device).predict(
                [(collection.queries[query_id], texts[doc_id]) for query_id, doc_id in pairs], show_progress_bar=True
            )
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.save(file, scores.reshape(len(groups), -1))
    return np.load(path)
