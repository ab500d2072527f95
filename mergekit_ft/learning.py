"""What methods that train owe and are owed: tuners and objectives.

A tuner says which parameters train, and how their state is kept; an objective is a loss. Both are
pydantic models whose fields are the method's parameters. The training loop is `tuning/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.optim import Optimizer

from mergekit_ft.layers import Place

Batch = Mapping[str, Tensor]  # input_ids, attention_mask, labels (-100: not scored), weights


@dataclass(frozen=True)
class Pace:
    """How large the steps of an optimizer are."""

    rate: float  # the peak
    betas: tuple[float, float]
    epsilon: float


def _no_rows(file: str) -> Iterator[Batch]:
    raise ValueError(f"{file}: there is no tokenizer to read rows with")


@dataclass(frozen=True)
class Subject:
    """What a tuner sees: a model, and what is planned for it."""

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]  # each once (tied weights too), in the model's order
    places: Mapping[str, Place]
    steps: int  # of the optimizer, in each phase
    seed: int
    origin: Callable[[str], Tensor]  # a parameter as it was before tuning: host, float32
    batches: Callable[[int], Iterator[Batch]]  # of training data, in order, for calibration
    earlier: list[Selection] = field(default_factory=list)  # what trained in the phases before
    rows_of: Callable[[str], Iterator[Batch]] = _no_rows  # of a file, one by one

    def matrices(self) -> dict[str, tuple[nn.Module, nn.Parameter]]:
        """Return the weights of linear layers by name, heads apart."""
        found: dict[str, tuple[nn.Module, nn.Parameter]] = {}
        for path, module in self.model.named_modules():
            name = f"{path}.weight"
            if name not in self.parameters or self.places[name].role == "head":
                continue
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                found[name] = (module, self.parameters[name])
        return found


@dataclass(frozen=True)
class Selection:
    """Which parameters train: some whole, of others some entries, the rest not."""

    whole: tuple[str, ...] = ()
    entries: Mapping[str, Tensor] = field(default_factory=dict)  # name -> (k,) int32 or int64 flat
    # row-major indices, strictly increasing

    def count(self, parameters: Mapping[str, nn.Parameter]) -> int:
        """Return how many entries train."""
        whole = sum(parameters[name].numel() for name in self.whole)
        return whole + sum(len(indices) for indices in self.entries.values())


class Misfit(ValueError):
    """A parameter of a method that does not fit the model; `at` leads to it in the plan.

    `word` is what does not fit, where it should have been one of `words`.
    """

    def __init__(
        self, message: str, at: tuple[str | int, ...], word: str = "", words: Iterable[str] = ()
    ) -> None:
        super().__init__(message)
        self.at, self.word, self.words = at, word, tuple(words)


class Adaptation(Protocol):
    """An adapter in a model: its parameters train, and none of the model's own."""

    parameters: dict[str, nn.Parameter]  # by the names that they have in the model
    modules: tuple[str, ...]  # that it changes, as transformers names them
    others: tuple[str, ...]  # that it does not
    changes: tuple[str, ...]  # the weights of those modules, by the checkpoint's names
    words: dict[str, Any]  # of its scale and kind, as in an adapter_config.json

    def without(self) -> AbstractContextManager[Any]:
        """Let the model be what it was, for a while; no gradients meanwhile."""

    def moved(self) -> bool:
        """Say whether anything was learned."""

    def tensors(self) -> dict[str, Tensor]:
        """Return what trained, as peft names it in a file: host."""


class Learned(BaseModel):
    """A method that trains: fields are its parameters."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False
    )


class Tuner(Learned):
    """Which parameters train, and how their state is kept."""

    learning_rate: ClassVar[float]  # the peak, where a plan gives none
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    epsilon: ClassVar[float] = 1e-8
    sparse: ClassVar[bool] = False  # whether only entries train, in every phase
    adapts: ClassVar[bool] = False  # whether an adapter trains, and the model's own weights do not
    residual: ClassVar[bool] = False  # whether with its adapter off a model is no longer the base
    gives: ClassVar[tuple[str, ...]] = ("full", "delta")  # the outputs, the usual one first

    @property
    def phases(self) -> int:
        """Return how often the training runs."""
        return 1

    @property
    def files(self) -> tuple[str, ...]:
        """Return the files that it reads, apart from the plan's data."""
        return ()

    def rewinds(self, phase: int) -> int | None:
        """Return the phase to whose start the weights go back before this one, if they do."""
        return None

    def adapted(self, subject: Subject) -> Adaptation:
        """Put an adapter into the model; its parameters are then what is selected from."""
        raise TypeError(f"{type(self).__name__} does not adapt")

    def select(self, subject: Subject, phase: int) -> Selection:
        """Choose what trains in a phase, counted from 0, by the weights as they are."""
        raise TypeError(f"{type(self).__name__} does not select")

    def due(self, step: int, steps: int) -> bool:
        """Say whether the choice is made anew after a step, counted from 1."""
        return False

    def reselect(self, subject: Subject, phase: int, step: int, now: Selection) -> Selection:
        """Choose anew; entries that stay keep their optimizer state, new ones begin at 0."""
        return now

    def penalties(
        self, subject: Subject, phase: int, step: int, now: Selection
    ) -> Mapping[str, Tensor]:
        """Return gradients to add before a step: of whole parameters in their shape, else (k,)."""
        return {}

    def optimizer(self, groups: Iterable[dict[str, Any]], pace: Pace) -> Optimizer:
        """Return the optimizer of these groups of parameters; each states its weight decay."""
        return torch.optim.AdamW(groups, lr=pace.rate, betas=pace.betas, eps=pace.epsilon)


@dataclass(frozen=True)
class Said:
    """What a model said at the n scored places of a batch."""

    logits: Tensor  # (n, vocabulary) float32
    targets: Tensor  # (n,) the tokens that came
    weights: Tensor  # (n,) of their samples
    rows: Tensor  # (n,) the sample that each place is of, from 0
    reference: Tensor | None = None  # (n, vocabulary) of the model before tuning, no gradient

    def log_probabilities(self) -> Tensor:
        """Return (n,) log p of the tokens that came."""
        return -nn.functional.cross_entropy(self.logits, self.targets, reduction="none")


class Objective(Learned):
    """A loss: `total` over the scored places of a batch, divided by `count` of a whole step.

    So it does not depend on how a step's samples are split into micro-batches.
    """

    reference: ClassVar[bool] = False  # whether it needs the model before tuning
    pairs: ClassVar[bool] = False  # whether its data are pairs: rows 2i chosen, 2i + 1 rejected

    def fitted(self, vocabulary: int, used: Set[int]) -> Objective:
        """Return the objective for a model of so many token ids and data that use these."""
        return self

    def corrupted(self, batch: Batch, progress: float, dice: torch.Generator) -> Batch:
        """Return the inputs that the model is shown; `progress` is the share of steps done."""
        return batch

    def total(self, said: Said) -> Tensor:
        """Return the loss, summed over places (or pairs)."""
        raise TypeError(f"{type(self).__name__} has no loss")

    def count(self, batch: Batch) -> int:
        """Return by how much the sum is divided: the scored places of a batch."""
        return int((batch["labels"][:, 1:] != -100).sum())
