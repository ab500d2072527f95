"""Heads and channels: which slices of which matrices they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_ft.learning import Subject

ENDINGS = {  # of a module's name, by projection
    "v": ("v_proj",),
    "o": ("o_proj", "attn.out_proj", "attn.c_proj"),
    "u": ("up_proj", "fc1", "c_fc", "w3"),
    "d": ("down_proj", "fc2", "mlp.c_proj", "w2"),
}
INPUTS = ("o", "d")  # whose units are inputs: columns of the weight; of the others outputs: rows


@dataclass(frozen=True)
class Units:
    """The units of one matrix."""

    name: str  # of the weight
    module: nn.Module
    weight: nn.Parameter
    axis: int  # along which they lie
    width: int  # elements of a unit along it: a head's, or 1
    inputs: bool  # whether they are the layer's inputs

    @property
    def count(self) -> int:
        """Return how many there are."""
        return self.weight.shape[self.axis] // self.width

    def per_unit(self, values: Tensor) -> Tensor:
        """Return (count,) sums over a unit of (extent,) values along the axis."""
        return values.reshape(self.count, self.width).sum(1)

    def entries(self, chosen: Tensor) -> Tensor:
        """Return the flat indices, increasing, of the entries of some units."""
        rows, columns = self.weight.shape
        along = (chosen[:, None] * self.width + torch.arange(self.width)).flatten().sort().values
        if self.axis == 0:
            return (along[:, None] * columns + torch.arange(columns)).flatten()
        return (torch.arange(rows)[:, None] * columns + along).flatten()


def found(subject: Subject, projection: str) -> list[Units]:
    """Return the units of a projection in every layer; ValueError where there are none."""
    config: Any = getattr(subject.model, "config", None)
    endings = ENDINGS[projection]
    units = []
    for name, (module, weight) in subject.matrices().items():
        path = name.removesuffix(".weight")
        if subject.places[name].layer is None or not path.endswith(endings):
            continue
        inputs = projection in INPUTS
        axis = (1 if inputs else 0) if isinstance(module, nn.Linear) else (0 if inputs else 1)
        width = _head(config) if projection in ("v", "o") else 1
        units.append(Units(name, module, weight, axis, width, inputs))
    if not units:
        raise ValueError(
            f"no layer of this model has {' or '.join(endings)}, of which {projection}_ratio takes "
            "units (fused projections cannot be cut so); set that ratio to 0"
        )
    return units


def _head(config: Any) -> int:
    """Return the width of a head."""
    stated = getattr(config, "head_dim", None)
    return int(stated or config.hidden_size // config.num_attention_heads)


def by_weight(units: list[Units]) -> Iterator[Tensor]:
    """Yield (count,) norms of the units' weights."""
    for one in units:
        squares = one.weight.detach().float().square().sum(1 - one.axis)
        yield one.per_unit(squares).sqrt().cpu()


def by_activation(units: list[Units], subject: Subject, rows: int) -> Iterator[Tensor]:
    """Yield (count,) mean squared activations of the units over some rows, as roots."""
    sums = {one.name: torch.zeros(one.weight.shape[one.axis]) for one in units}
    hooks = [one.module.register_forward_hook(_adding(sums[one.name], one.inputs)) for one in units]
    try:
        with torch.no_grad():
            for batch in _calibration(subject, rows):
                subject.model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    for one in units:
        yield one.per_unit(sums[one.name]).sqrt()


def _adding(total: Tensor, inputs: bool) -> Any:
    def add(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        seen = (given[0] if inputs else made).detach().float()
        total.add_(seen.flatten(0, -2).square().sum(0).cpu())

    return add


def by_gradient(units: list[Units], subject: Subject, rows: int) -> Iterator[Tensor]:
    """Yield (count,) norms of the loss's gradient over some rows, by unit."""
    before = {name: p.requires_grad for name, p in subject.parameters.items()}
    mine = {one.name for one in units}
    for name, parameter in subject.parameters.items():
        parameter.requires_grad_(name in mine)
    try:
        for batch in _calibration(subject, rows, labels=True):
            subject.model(**batch).loss.backward()
        for one in units:
            assert one.weight.grad is not None
            yield one.per_unit(one.weight.grad.float().square().sum(1 - one.axis)).sqrt().cpu()
    finally:
        for name, parameter in subject.parameters.items():
            parameter.grad = None
            parameter.requires_grad_(before[name])


def _calibration(
    subject: Subject, rows: int, *, labels: bool = False
) -> Iterator[Mapping[str, Tensor]]:
    """Yield batches of training data until so many rows were seen."""
    wanted = ["input_ids", "attention_mask", *(["labels"] if labels else [])]
    device = next(subject.model.parameters()).device
    seen = 0
    for batch in subject.batches(min(8, rows)):
        yield {key: batch[key].to(device) for key in wanted}
        seen += len(batch["input_ids"])
        if seen >= rows:
            return
