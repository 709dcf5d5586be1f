"""What training minimises, and the share of groups that come out right."""

import torch
from torch.nn import functional as F


def lce_loss(scores: torch.Tensor) -> torch.Tensor:
    """LCE of scores (B, G), the positive in column 0: the mean of -log softmax(scores)[:, 0]."""
    return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device))


def distil_loss(scores: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over B of KL(softmax of the teacher's scores || softmax of ours), both (B, G), in nats."""
    return F.kl_div(scores.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")


def accuracy(scores: torch.Tensor) -> torch.Tensor:
    """Share of the groups (B, G) whose positive, in column 0, scores highest; float64.

    A tie counts against the positive: half-precision scores tie often, and argmax would favour the first column.
    """
    return (scores[:, :1] > scores[:, 1:]).all(1).double().mean()
