"""What trains of a model: whole parameters, and vectors that stand for some entries of others.

A vector holds float32 values of the entries at its indices. The gradient of its parameter is
gathered as soon as it is there, and freed; after each step the values are written back, rounded
once. So gradients and optimizer state are as large as what trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mergekit_ft.errors import OperatorError
from mergekit_ft.learning import Selection


class Trained:
    """The trainable state of a model under a selection."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], selection: Selection) -> None:
        self.parameters = parameters
        self.selection = selection
        self.vectors: dict[str, nn.Parameter] = {}  # (k,) float32
        self.touched: set[str] = set()  # parameters that may differ from those before
        self.left: dict[str, Tensor] = {}  # entries that trained and do so no more
        self._hooks: list[Any] = []
        self._before: dict[str, Tensor] = {}  # (k,) what the entries were before tuning
        self._take(selection)

    def _take(self, selection: Selection) -> None:
        """Let a selection train, and nothing else."""
        self._release()
        self._before.clear()
        self.selection = selection = self._ordered(selection)
        self.touched |= {*selection.whole, *selection.entries}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in selection.whole or name in selection.entries)
        for name, indices in selection.entries.items():
            parameter = self.parameters[name]
            values = nn.Parameter(gathered(parameter.detach(), indices).float())
            old = self.vectors.get(name)
            if old is not None:
                old.data = values.data
                values = old
            self.vectors[name] = values
            hook = parameter.register_post_accumulate_grad_hook(self._gathering(name))  # type: ignore[no-untyped-call]
            self._hooks.append(hook)
        self.vectors = {name: self.vectors[name] for name in selection.entries}

    def _ordered(self, selection: Selection) -> Selection:
        """Return a selection in the model's order: an optimizer's saved state goes by it."""
        whole = tuple(name for name in self.parameters if name in selection.whole)
        held = selection.entries
        return Selection(whole, {name: held[name] for name in self.parameters if name in held})

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _gathering(self, name: str) -> Any:
        """Return what moves a gradient from a parameter to its vector."""

        def gather(parameter: Tensor) -> None:
            assert parameter.grad is not None
            vector = self.vectors[name]
            part = gathered(parameter.grad, self.selection.entries[name]).float()
            vector.grad = part if vector.grad is None else vector.grad.add_(part)
            parameter.grad = None

        return gather

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what an optimizer steps, by the parameter's name."""
        for name in self.selection.whole:
            yield name, self.parameters[name]
        yield from self.vectors.items()

    def groups(self, decay: float) -> list[dict[str, Any]]:
        """Return the optimizer's groups: weight decay on matrices, none on gains and biases."""
        found: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.named():
            found[self.parameters[name].dim() > 1].append(parameter)
        rates = {True: decay, False: 0.0}
        return [{"params": held, "weight_decay": rates[key]} for key, held in found.items()]

    def add(self, penalties: Mapping[str, Tensor]) -> None:
        """Add gradients, by parameter."""
        held = dict(self.named())
        for name, extra in penalties.items():
            parameter = held[name]
            extra = extra.to(parameter.device, parameter.dtype)
            parameter.grad = extra if parameter.grad is None else parameter.grad.add_(extra)

    def clip(self, most: float) -> float:
        """Scale the gradients so that their norm is at most this (0: as they are); return it."""
        held = [parameter for _, parameter in self.named() if parameter.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(held, most or float("inf")))
        if not torch.isfinite(torch.tensor(norm)):
            raise OperatorError(
                "the gradient is not finite: lower the learning rate, clip, or train in float32"
            )
        return norm

    @torch.no_grad()
    def write_back(self) -> None:
        """Put the vectors' values into the model, rounded to its dtype, and drop the gradients."""
        for name, vector in self.vectors.items():
            put(self.parameters[name], self.selection.entries[name], vector)
            vector.grad = None

    @torch.no_grad()
    def reselect(self, selection: Selection, optimizer: Optimizer) -> None:
        """Train another selection: entries that stay keep value and moments, new ones begin."""
        before = self.selection.entries
        for name, indices in before.items():
            self._leave(name, indices, selection.entries.get(name))
        values = {name: vector.detach().clone() for name, vector in self.vectors.items()}
        gone = [self.vectors[name] for name in before if name not in selection.entries]
        gone += [self.parameters[n] for n in self.selection.whole if n not in selection.whole]
        self._take(selection)
        for name, vector in self.vectors.items():
            if name not in before:
                continue
            old, new = places(before[name], selection.entries[name])
            vector.data[new] = values[name][old]  # float32, as they were before rounding
            for key, state in optimizer.state.get(vector, {}).items():
                if state.dim() and key != "step":
                    moved = torch.zeros_like(vector)
                    moved[new] = state[old]
                    optimizer.state[vector][key] = moved
        _regroup(optimizer, gone, self.groups(0.0))

    def _leave(self, name: str, old: Tensor, new: Tensor | None) -> None:
        """Keep in mind which entries stop training: they stay as they were learned."""
        gone = old if new is None else old[~torch.isin(old, new)]
        earlier = self.left.get(name, gone[:0])
        self.left[name] = torch.unique(torch.cat([earlier, gone]))

    @contextmanager
    def set_back(self, origin: Callable[[str], Tensor]) -> Iterator[None]:
        """Let every entry hold what it held before tuning, for a while; no gradients meanwhile."""
        with torch.no_grad():
            held: list[tuple[str, Tensor, Tensor]] = []
            for name in {**self.selection.entries, **self.left}:
                indices = self._ever(name)
                if name not in self._before:
                    self._before[name] = gathered(origin(name), indices)
                parameter = self.parameters[name]
                held.append((name, indices, gathered(parameter.detach(), indices).clone()))
                put(parameter, indices, self._before[name])
            try:
                yield
            finally:
                for name, indices, values in held:
                    put(self.parameters[name], indices, values)

    def _ever(self, name: str) -> Tensor:
        """Return the entries of a parameter that train, or did."""
        parts = [held[name].long() for held in (self.selection.entries, self.left) if name in held]
        ever: Tensor = torch.unique(torch.cat(parts))
        return ever

    def state(self) -> dict[str, Tensor]:
        """Return all that a resumed run needs, by a key for each tensor."""
        found = {f"weight:{name}": self.parameters[name].detach() for name in sorted(self.touched)}
        for name, indices in self.selection.entries.items():
            found[f"indices:{name}"] = indices
            found[f"values:{name}"] = self.vectors[name].detach()
        found |= {f"left:{name}": indices for name, indices in self.left.items()}
        found["whole"] = _text("\n".join(self.selection.whole))
        return {key: value.contiguous().cpu() for key, value in found.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take a state back, the selection with it."""
        kinds: dict[str, dict[str, Tensor]] = {
            "weight": {},
            "indices": {},
            "values": {},
            "left": {},
        }
        for key, tensor in state.items():
            kind, _, name = key.partition(":")
            if name:
                kinds[kind][name] = tensor
        for name, weight in kinds["weight"].items():
            self.parameters[name].copy_(weight)
        self.touched |= kinds["weight"].keys()
        self.left = kinds["left"]
        whole = bytes(state["whole"].tolist()).decode()
        self._take(Selection(tuple(whole.split("\n")) if whole else (), kinds["indices"]))
        for name, values in kinds["values"].items():
            self.vectors[name].copy_(values)


def _text(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def gathered(values: Tensor, indices: Tensor) -> Tensor:
    """Return (k,) the entries of a tensor at flat row-major indices."""
    flat = values.reshape(-1)
    return flat.index_select(0, indices.to(flat.device))


def put(parameter: Tensor, indices: Tensor, values: Tensor) -> None:
    """Set the entries of a parameter at flat row-major indices, rounded to its dtype."""
    flat = parameter.detach().view(-1)
    flat.index_copy_(0, indices.to(flat.device, torch.int64), values.to(flat.device, flat.dtype))


def places(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the indices that are in both stand, in the old and in the new."""
    at = torch.searchsorted(old, new).clamp_(max=max(0, len(old) - 1))
    same = old[at] == new if len(old) else torch.zeros(len(new), dtype=torch.bool)
    return at[same], same.nonzero().flatten()


def _regroup(
    optimizer: Optimizer,
    gone: list[nn.Parameter],
    groups: list[dict[str, Any]],
) -> None:
    """Give an optimizer the parameters that train now; the state of those gone is dropped."""
    for parameter in gone:
        optimizer.state.pop(parameter, None)
        parameter.grad = None
    for group, now in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = now["params"]
