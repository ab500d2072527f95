"""What a model says at the scored places of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_ft.data.rows import UNSCORED
from mergekit_ft.learning import Said


def said(
    model: nn.Module,
    shown: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    reference: nn.Module | None = None,
    as_before: AbstractContextManager[Any] | None = None,
) -> Said:
    """Run a model on inputs; the batch holds what is scored.

    The reference is another model, or this one `as_before` tuning.
    """
    scored = batch["labels"][:, 1:] != UNSCORED  # (rows, length - 1)
    if not bool(scored.any()):
        raise ValueError("a batch in which nothing is scored")
    other = None
    if reference is not None or as_before is not None:
        with torch.no_grad():
            if as_before is not None:
                with as_before:
                    other = _logits(model, batch, scored)
            else:
                assert reference is not None
                other = _logits(reference, batch, scored)
    logits = _logits(model, {**batch, **shown}, scored)
    rows = torch.arange(len(scored), device=scored.device)[:, None].expand_as(scored)[scored]
    return Said(logits, batch["labels"][:, 1:][scored], batch["weights"][rows], rows, other)


def _logits(model: nn.Module, batch: Mapping[str, Tensor], scored: Tensor) -> Tensor:
    """Return (n, vocabulary) float32 logits before each scored token.

    The head, a large share of a small model's work, runs where some row is scored.
    """
    columns = scored.any(0).nonzero().flatten()  # (c,)
    given: dict[str, Any] = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "use_cache": False,
    }
    if _keeps(model):
        logits = model(**given, logits_to_keep=columns).logits
    else:
        logits = model(**given).logits[:, columns]
    return logits[scored[:, columns]].float()  # type: ignore[no-any-return]


def _keeps(model: nn.Module) -> bool:
    """Say whether a model can be asked for the logits of some places."""
    inner: Any = getattr(model, "module", model)  # as it stands in a wrapper for several devices
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
