"""The parts of scoring: batches side by side, long documents, rankings that survive being killed. `rankmamba.reranker` scores."""
