"""The value that would make a model say an edit's target: found by descent on one vector.

Of an edit, with texts that its prompt stands in, and t* the subject's last token in each:

    delta     in R^h, 0 at first, added at t* to what leaves a layer
    loss      mean over the texts of the target's mean negative log-likelihood
              + divergence * KL(p || p_0) after t* in "{subject} is a"  + decay * |delta| / |v_0|^2
    step      Adam, then |delta| is cut to clamp * |v_0|;  ends below `ENOUGH`
    value     z = v_0 + delta,  v_0 the value that the prompt alone has

Only layers above are computed, for below nothing changes; edits side by side do not touch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ft.recalling import Descent

ENOUGH = 0.05  # loss
BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's

Above = Callable[[Tensor, Tensor, Tensor], Tensor]
# (b, n, h) what leaves the layer, (q,) rows, (q,) places -> (q, vocabulary) float32 logits there


@dataclass(frozen=True)
class Text:
    """A text that an edit is seen in."""

    edit: int  # which, of those side by side
    at: int  # t*
    scored: tuple[tuple[int, int], ...] = ()  # (place of the logits, token); none: the KL's text


@dataclass(frozen=True)
class Found:
    """The changes of value found for edits side by side."""

    delta: Tensor  # (edits, h)
    losses: list[float]  # the last
    likely: list[float]  # exp of the target's mean log-likelihood, by the same


class Search:
    """A descent for edits side by side; `hidden` (texts, n, h) is what leaves the layer."""

    def __init__(
        self, above: Above, hidden: Tensor, texts: Sequence[Text], sizes: Tensor, how: Descent
    ) -> None:
        self.above, self.hidden, self.how = above, hidden.float(), how
        self.sizes = sizes.float()  # (edits,) |v_0|
        device = hidden.device
        self.rows = torch.arange(len(texts), device=device)
        self.edit = torch.tensor([text.edit for text in texts], device=device)
        self.at = torch.tensor([text.at for text in texts], device=device)
        asked = [
            (row, place, token)
            for row, text in enumerate(texts)
            for place, token in (text.scored or ((text.at, -1),))
        ]
        self.row, self.place, self.token = (
            torch.tensor(column, device=device) for column in zip(*asked, strict=True)
        )
        self.targets = self.token >= 0  # the rest are after t* in the KL's texts
        self.weights = self._weights()
        self.before: Tensor | None = None  # (edits, vocabulary) log p_0

    def run(self) -> Found:
        """Descend until every edit's loss is small, or the steps are over."""
        count, width = len(self.sizes), self.hidden.shape[-1]
        delta = torch.zeros(count, width, device=self.hidden.device, requires_grad=True)
        means = torch.zeros_like(delta), torch.zeros_like(delta)
        going = torch.ones(count, dtype=torch.bool, device=delta.device)
        loss = likely = torch.zeros(count)
        for step in range(1, self.how.steps + 1):
            now, said = self._loss(delta)
            loss = torch.where(going, now.detach(), loss.to(now))
            likely = torch.where(going, said.detach(), likely.to(now))
            going = going & (loss >= ENOUGH)
            if step == self.how.steps or not bool(going.any()):
                break
            (gradient,) = torch.autograd.grad(now[going].sum(), delta)
            self._step(delta, gradient, means, step, going)
        return Found(delta.detach(), loss.tolist(), likely.exp().tolist())

    def _loss(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return (edits,) losses, and the targets' mean log-likelihoods."""
        moved = self.hidden.index_put((self.rows, self.at), delta[self.edit], accumulate=True)
        logs = torch.log_softmax(self.above(moved, self.row, self.place).float(), dim=-1)
        said = logs[self.targets].gather(1, self.token[self.targets][:, None])[:, 0]
        owner = self.edit[self.row]
        likely = torch.zeros_like(self.sizes).index_add(0, owner[self.targets], self.weights * said)
        after = logs[~self.targets]
        if self.before is None:
            self.before = after.detach()
        apart = (after.exp() * (after - self.before)).sum(dim=-1)
        kl = torch.zeros_like(self.sizes).index_add(0, owner[~self.targets], apart)
        size = delta.norm(dim=1) / self.sizes.square()
        return self.how.divergence * kl - likely + self.how.decay * size, likely

    def _weights(self) -> Tensor:
        """Return the share of each scored token: 1 / (its text's tokens * its edit's texts)."""
        row = self.row[self.targets]
        tokens = torch.bincount(row, minlength=len(self.rows))
        texts = torch.bincount(self.edit[torch.unique(row)], minlength=len(self.sizes))
        return 1.0 / (tokens[row] * texts[self.edit[row]])

    @torch.no_grad()
    def _step(
        self,
        delta: Tensor,
        gradient: Tensor,
        means: tuple[Tensor, Tensor],
        step: int,
        going: Tensor,
    ) -> None:
        """Take a step of Adam where an edit goes on, and cut what is too long."""
        (b1, b2), (mean, square) = BETAS, means
        mean.lerp_(gradient, 1 - b1)
        square.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        root = (square / (1 - b2**step)).sqrt_().add_(EPSILON)
        moved = delta - self.how.rate / (1 - b1**step) * mean / root
        most = self.how.clamp * self.sizes[:, None]
        moved *= (most / moved.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp(max=1.0)
        delta.copy_(torch.where(going[:, None], moved, delta))
