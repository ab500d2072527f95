"""Divergences between distributions over a vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def forward_kl(reference: Tensor, logits: Tensor) -> Tensor:
    """Return (n,) KL(softmax(reference) || softmax(logits)) of (n, vocabulary) logits."""
    wanted = torch.log_softmax(reference, -1)
    return (wanted.exp() * (wanted - torch.log_softmax(logits, -1))).sum(-1)
