"""The scores of the teacher that a student imitates: computed once, kept on the disk while the training lasts."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce

from ..collection import Collection
from ..files import replacing
from ..reranker import Reranker
from .config import weights_in
from .groups import TrainingGroups


def teacher_scores(teacher: str, groups: TrainingGroups, collection: Collection, folder: Path) -> np.ndarray:
    """Score every group with the reranker in the folder `teacher`: raw logits, float32 (groups, G).

    All processes share the work. The scores are kept in `folder`, where a resumed training reads them.
    """
    of = (weights_in([teacher]), groups.digest())
    path = folder / f"teacher-{hashlib.sha256(repr(of).encode()).hexdigest()[:16]}.npy"
    processes = PartialState()
    (known,) = broadcast_object_list([path.is_file()])
    if known:
        return np.load(path)
    pairs = [(group.query_id, doc_id) for group in groups.groups for doc_id in group.doc_ids]
    ours = np.array_split(np.arange(len(pairs)), processes.num_processes)[processes.process_index]
    texts = collection.documents.get_many({pairs[place][1] for place in ours})
    scores = torch.zeros(len(pairs), device=processes.device)
    found = Reranker.from_pretrained(teacher, processes.device).predict(
        [(collection.queries[query_id], texts[doc_id]) for query_id, doc_id in (pairs[place] for place in ours)],
        show_progress_bar=processes.is_main_process,
    )
    scores[ours] = torch.from_numpy(found).to(scores.device)
    scores = reduce(scores, "sum").view(len(groups), -1).cpu().numpy()
    if processes.is_main_process:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.save(file, scores)
    return scores
