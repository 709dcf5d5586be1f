"""The proofs that have no module of their own, and the tables of all of them (tests/README.md, data/README.md)."""

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


def claims() -> list[str]:
    """The rows of both tables that name a test for each claim: tests/README.md, and what data/README.md says we do differently."""
    ours, data = ((folder / "README.md").read_text(encoding="utf-8") for folder in (TESTS, TESTS.parent / "data"))
    differently = data.partition("## What we do differently")[2].partition("\n## ")[0]
    lines = [*ours.splitlines(), *differently.splitlines()]
    return [line for line in lines if line.startswith("| ") and not line.endswith("| test |")]


def test_every_claim_names_tests_that_exist():
    assert len(claims()) >= 50
    for row in claims():
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for file, name in named:
            tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
