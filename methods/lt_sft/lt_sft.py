"""LT-SFT, the lottery-ticket composable sparse fine-tuning (Ansell et al. 2022, arXiv:2110.07560).

For i = 1..n (n = `iterations`), theta_0 the base and theta_prev the weights before iteration i:

    phase 1   theta_1 = full fine-tuning from theta_prev
    score     s_j     = |theta_1 - theta_0|_j of maskable entries that are not selected yet
    mask              += the K/n largest s_j, over all maskable tensors together
    rewind    theta   = theta_prev
    phase 2   theta_2 = fine-tuning of the selected entries (and the head) alone, anew

With `l1`, lambda/N sum |theta - theta_0| is added to the loss in both phases, once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mergekit_ft.algebra.topk import largest, narrow
from mergekit_ft.learning import Selection, Subject, Tuner


class LtSft(Tuner):
    """Sparse fine-tuning of the entries that full fine-tuning moves most."""

    learning_rate: ClassVar[float] = 5e-5  # the authors' for language modelling and tagging
    gives: ClassVar[tuple[str, ...]] = ("delta", "full")

    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="share of the maskable entries that is kept; 0.01 where k is not given"
    )
    k: Annotated[int, Field(ge=1)] | None = Field(
        None, description="entries that are kept, instead of a share"
    )
    iterations: int = Field(1, ge=1, description="in how many rounds they are chosen")
    l1: float = Field(0.0, ge=0, description="lambda of the L1 distance to the base")
    norms: bool = Field(False, description="whether norms train")

    @model_validator(mode="after")
    def _one_size(self) -> LtSft:
        if self.density is not None and self.k is not None:
            raise ValueError("density and k both say how many entries are kept; give one")
        return self

    @property
    def phases(self) -> int:
        """Return two for each iteration."""
        return 2 * self.iterations

    def rewinds(self, phase: int) -> int | None:
        """Return the dense phase before a sparse one."""
        return phase - 1 if phase % 2 else None

    def select(self, subject: Subject, phase: int) -> Selection:
        """Choose everything for a dense phase, the entries that it moved most for a sparse one."""
        roles = {name: subject.places[name].role for name in subject.parameters}
        norms = {name for name in roles if _is_norm(name, subject)}
        whole = tuple(name for name in roles if self.norms or name not in norms)
        if phase % 2 == 0:
            return Selection(whole=whole)
        heads = tuple(name for name in whole if roles[name] == "head")
        maskable = [name for name in whole if name not in heads and name not in norms]
        return Selection(heads, self._entries(subject, maskable, phase // 2))

    def _entries(self, subject: Subject, maskable: list[str], iteration: int) -> dict[str, Tensor]:
        before = subject.earlier[-2].entries if iteration else {}
        total = sum(subject.parameters[name].numel() for name in maskable)
        wanted = self.k if self.k is not None else int((self.density or 0.01) * total)
        if not 0 < wanted <= total:
            raise ValueError(f"{wanted} of {total} maskable entries cannot be kept")
        share = wanted // self.iterations
        scores = {name: _moved(subject, name, before.get(name)) for name in maskable}
        new = largest(scores, share)
        merged = {name: _union(before.get(name), new.get(name)) for name in maskable}
        sizes = {name: subject.parameters[name].numel() for name in maskable}
        return {name: narrow(found, sizes[name]) for name, found in merged.items() if len(found)}

    def penalties(
        self, subject: Subject, phase: int, step: int, now: Selection
    ) -> Mapping[str, Tensor]:
        """Return lambda/N sign(theta - theta_0)."""
        if not self.l1:
            return {}
        total = sum(parameter.numel() for parameter in subject.parameters.values())
        return dict(self._signs(subject, now, self.l1 / total))

    def _signs(
        self, subject: Subject, now: Selection, scale: float
    ) -> Iterator[tuple[str, Tensor]]:
        for name in (*now.whole, *now.entries):
            parameter = subject.parameters[name].detach()
            sign = (parameter.float() - subject.origin(name).to(parameter.device)).sign_()
            indices = now.entries.get(name)
            sign = sign if indices is None else sign.flatten()[indices.to(sign.device).long()]
            yield name, sign.mul_(scale)


def _is_norm(name: str, subject: Subject) -> bool:
    """Say whether a parameter is a norm's: of one axis, in a module that is called one."""
    owner = subject.model.get_submodule(name.rpartition(".")[0])
    return "norm" in type(owner).__name__.lower() and not isinstance(owner, nn.Linear)


def _moved(subject: Subject, name: str, taken: Tensor | None) -> Callable[[], Tensor]:
    """Return what gives |theta_1 - theta_0| of a tensor, 0 where an entry is selected already."""

    def score() -> Tensor:
        moved = (subject.parameters[name].detach().cpu().float() - subject.origin(name)).abs_()
        moved = moved.flatten()
        if taken is not None:
            moved[taken.long()] = 0
        return moved

    return score


def _union(one: Tensor | None, other: Tensor | None) -> Tensor:
    parts = [part.to(torch.int64) for part in (one, other) if part is not None]
    return torch.unique(torch.cat(parts)) if parts else torch.empty(0, dtype=torch.int64)
