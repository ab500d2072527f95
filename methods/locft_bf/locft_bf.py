"""LocFT-BF, localized fine-tuning breadth-first (arXiv:2509.22072).

Of n edits (x_i, y_i) and one tensor W (the matrix that ends the MLP of a late layer):

    epoch     the edits are shuffled, on from the last order, and cut into batches of B
    sample    l_i = mean over the tokens of y_i, its end included, of -log p(y_i | x_i)
    batch     l   = mean of l_i; a batch with l < `skip` is left alone
    step      W   <- Adam(W, dl/dW), one state for the whole run
    end       after `epochs`, or once an epoch's mean is below `stop`

Depth-first, the baseline, takes the edits one by one: each is trained, from a fresh state of Adam,
for up to `epochs` steps or until its loss is below `skip`, and is not seen again.
"""

from __future__ import annotations

import math
import random  # noqa: TID251  # one of its own, seeded: the order of the released code
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mergekit_ft.errors import OperatorError
from mergekit_ft.rewriting import Editor
from mergekit_ft.teaching import Pupil, Teacher

LENGTH = 0.375  # steps x learning rate of the paper's runs: 30 batches x 25 epochs x 5e-4
MOST, EPOCHS = 100, 25  # edits of a batch, and epochs, in the paper


class LocftBf(Teacher, Editor):
    """Facts trained into a few tensors, all of them again and again."""

    learning_rate: float = Field(5e-4, gt=0, description="of Adam, constant")
    batch: int | None = Field(
        None, ge=1, description="edits of a step; None: 100, fewer where edits are few"
    )
    epochs: int | None = Field(
        None,
        ge=1,
        description="at most; depth-first: steps of an edit; None: 25, more where edits are few",
    )
    skip: float = Field(1e-2, ge=0, description="a batch whose loss is below is left alone")
    stop: float = Field(1e-2, ge=0, description="the run ends once an epoch's mean is below")
    loss: Literal["sample", "token"] = Field("sample", description="what the mean is taken over")
    order: Literal["breadth-first", "depth-first"] = Field(
        "breadth-first", description="all edits in each epoch, or one after another"
    )
    divergence: float = Field(
        0.0, ge=0, description="weight of KL(before || now) at the prompts of `locality`"
    )
    cap: float | None = Field(
        None, gt=0, description="most that a tensor's change may be, by the tensor's own norm"
    )

    @property
    def anchored(self) -> bool:
        """Say whether it looks at what should stay."""
        return self.divergence > 0

    def batch_of(self, count: int) -> int:
        """Return the edits of a step: so few that steps x learning rate reach the paper's."""
        if self.order == "depth-first":
            return 1
        if self.batch is not None:
            return min(self.batch, count)
        few = math.floor(count * (self.epochs or EPOCHS) * self.learning_rate / LENGTH + 1e-9)
        return max(1, min(few, MOST, count))

    def epochs_of(self, count: int) -> int:
        """Return the epochs at most: so many that steps x learning rate reach the paper's."""
        if self.epochs is not None:
            return self.epochs
        if self.order == "depth-first":
            return EPOCHS
        steps = math.ceil(count / self.batch_of(count))  # of an epoch
        return max(EPOCHS, math.ceil(LENGTH / (steps * self.learning_rate) - 1e-9))

    def shortened(self, share: float, count: int) -> LocftBf:
        """Return the same for a share of the epochs, the batches as they were."""
        epochs = max(1, round(share * self.epochs_of(count)))
        return self.model_copy(update={"epochs": epochs, "batch": self.batch_of(count)})

    def teach(self, pupil: Pupil, seed: int) -> list[dict[str, Any]]:
        """Train, and return the curve."""
        run = _Run(self, pupil)
        if self.order == "depth-first":
            return run.depth_first()
        return run.breadth_first(random.Random(seed))


class _Run:
    """One training."""

    def __init__(self, how: LocftBf, pupil: Pupil) -> None:
        self.how, self.pupil = how, pupil
        capped = how.cap is not None
        self.origins = [m.detach().clone() for m in pupil.masters] if capped else []
        self.steps = 0
        self.anchor = 0

    def adam(self) -> torch.optim.Adam:
        """Return a fresh optimizer."""
        return torch.optim.Adam(self.pupil.masters, lr=self.how.learning_rate)

    def breadth_first(self, dice: random.Random) -> list[dict[str, Any]]:
        """Train on all edits in each epoch."""
        how, count = self.how, self.pupil.count
        rows, size, adam = list(range(count)), how.batch_of(count), self.adam()
        curve: list[dict[str, Any]] = []
        epochs = how.epochs_of(count)
        self.say_what_was_scaled(size, epochs)
        for epoch in range(1, epochs + 1):
            dice.shuffle(rows)
            total, losses = 0.0, []
            for start in range(0, count, size):
                batch = rows[start : start + size]
                losses.append(self.step(batch, adam))
                total += losses[-1] * len(batch)
            mean = total / count
            curve.append({"epoch": epoch, "loss": mean, "steps": self.steps, "batches": losses})
            self.pupil.say(f"epoch {epoch} of {epochs}: loss {mean:.4f}, {self.steps} steps")
            if mean < how.stop:
                break
        return curve

    def say_what_was_scaled(self, size: int, epochs: int) -> None:
        """Tell of batches and epochs that the number of edits decided, not the plan."""
        how, own = self.how, []
        if how.batch is None and size < MOST:
            own.append(f"batches of {size}, not {MOST}")
        if how.epochs is None and epochs > EPOCHS:
            own.append(f"up to {epochs} epochs, not {EPOCHS}")
        if own:
            self.pupil.say(
                f"{' and '.join(own)}: few edits would get less of steps x learning rate than the "
                f"{LENGTH} of the paper's runs"
            )

    def depth_first(self) -> list[dict[str, Any]]:
        """Train on one edit after another."""
        how, curve = self.how, []
        for row in range(self.pupil.count):
            adam, losses = self.adam(), []
            for _ in range(how.epochs_of(self.pupil.count)):
                losses.append(self.step([row], adam))
                if losses[-1] < how.skip:
                    break
            told = {"edit": row + 1, "loss": losses[-1], "steps": self.steps, "batches": losses}
            curve.append(told)
            if (row + 1) % 10 == 0 or row + 1 == self.pupil.count:
                said = f"edit {row + 1} of {self.pupil.count}: loss {losses[-1]:.4f}"
                self.pupil.say(f"{said}, {self.steps} steps")
        return curve

    def step(self, rows: list[int], adam: torch.optim.Adam) -> float:
        """Take a step on some edits, unless they are known; return their loss before it."""
        loss = self.pupil.grade(rows).mean(by_token=self.how.loss == "token")
        found = float(loss.detach())
        if not math.isfinite(found):
            raise OperatorError(
                f"after {self.steps} steps the loss is {found}; lower learning_rate, or give a cap"
            )
        if found < self.how.skip:
            return found
        adam.zero_grad(set_to_none=True)
        (loss + self._anchored()).backward()  # type: ignore[no-untyped-call]
        adam.step()
        self.steps += 1
        for master, origin in zip(self.pupil.masters, self.origins, strict=False):
            self._cut(master, origin)
        return found

    def _anchored(self) -> Tensor | float:
        """Return what is added for having moved at the next few anchors, in turn."""
        if not self.how.divergence:
            return 0.0
        count = min(self.how.batch_of(self.pupil.count), self.pupil.anchors)
        rows = [(self.anchor + i) % self.pupil.anchors for i in range(count)]
        self.anchor = (self.anchor + count) % self.pupil.anchors
        return self.how.divergence * self.pupil.drift(rows)

    @torch.no_grad()
    def _cut(self, master: nn.Parameter, origin: Tensor) -> None:
        """Shorten a change that is too long."""
        assert self.how.cap is not None
        change = master - origin
        most, size = self.how.cap * origin.norm(), change.norm()
        if size > most:
            master.copy_(origin + change * (most / size))
