"""What an experiment says of its runs."""

import pandas as pd
import pytest

from rankmamba.experiment import Experiment
from rankmamba.formats import write_run


@pytest.mark.parametrize("places, counted", [((1, 3, 2, None), (1, 1, 1, 1)), ((2, 2, 2, None), (0, 3, 0, 0))])
def test_a_query_has_moved_as_its_first_relevant_document_has(places, counted, tmp_path):
    experiment = Experiment(tmp_path, "rankmamba/tiny", "tiny", 0, 4, 12)
    test = experiment.split("test")
    relevant = test.qrels[test.qrels["relevance"] > 0].groupby("query_id")["doc_id"].first()

    def run(where):
        rows = []
        for (query_id, doc_id), place in zip(relevant.items(), where, strict=False):
            others = [other for other in test.documents if other not in set(test.qrels["doc_id"])][:2]
            documents = [*others[: place - 1], doc_id, *others[place - 1 :]] if place else others
            rows += [(query_id, document, 1.0 - rank, rank) for rank, document in enumerate(documents, 1)]
        return pd.DataFrame(rows, columns=["query_id", "doc_id", "score", "rank"])

    for system, where in (("bm25", (2, 2, 2, None)), ("tiny-mamba", places)):
        path = experiment.run_path(system, "test")
        path.parent.mkdir(exist_ok=True)
        write_run(path, run(where), system)
    moves = experiment.moves(["tiny-mamba"])
    assert tuple(moves.loc["tiny-mamba"]) == counted and tuple(moves.loc["bm25"]) == (0, 3, 0, 0)
