"""The proofs that have no module of their own, and the table of all of them (tests/README.md)."""

import ast
import re
from pathlib import Path

import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.losses import MultipleNegativesRankingLoss

from rankmamba.reranker import Reranker
from rankmamba.training.losses import lce_loss

TESTS = Path(__file__).parent


def test_lce_is_sentence_transformers_ranking_loss_over_the_documents_of_one_query(tmp_path):
    torch.manual_seed(0)
    reranker = Reranker.from_pretrained("minilm-l6", dtype=torch.float32)
    reranker.save_pretrained(tmp_path / "model")
    queries = ["who wrote hamlet", "which river flows through paris"]
    documents = [
        ["Hamlet is a play by William Shakespeare.", "A hamlet is a small village.", "The Seine is a river."],
        ["The Seine flows through Paris.", "Paris is a city.", "The Thames flows through London."],
    ]
    cross_encoder = CrossEncoder(str(tmp_path / "model"), device="cpu", trust_remote_code=True).eval()
    their_loss = MultipleNegativesRankingLoss(cross_encoder, num_negatives=None, scale=1, activation_fn=None)
    # one query at a time, so that no document of another query is a negative too
    theirs = [
        their_loss([[query], *([document] for document in group)], None).item()
        for query, group in zip(queries, documents, strict=True)
    ]
    scores = reranker.predict([(query, text) for query, group in zip(queries, documents, strict=True) for text in group])
    ours = lce_loss(torch.from_numpy(scores).view(2, 3)).item()
    assert ours == pytest.approx(sum(theirs) / 2, abs=1e-5)
    assert len({round(loss, 3) for loss in theirs}) == 2


def named_tests() -> list[tuple[str, str]]:
    return re.findall(r"`(test_\w+\.py)::(test_\w+)`", (TESTS / "README.md").read_text(encoding="utf-8"))


def test_every_test_that_the_table_names_exists():
    named = named_tests()
    assert len(named) >= 20
    for file, name in named:
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def test_every_row_of_the_table_has_a_test():
    lines = (TESTS / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and line != "| claim | test |"]
    assert len(rows) >= 20 and not [row for row in rows if "::test_" not in row]
