"""A model without weights: they are put into a part of it from the checkpoint, and taken away.

What no checkpoint holds (buffers, such as the frequencies of rotary positions) is there from the
start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_ft.errors import SourceError
from mergekit_ft.layers import places, role_of, stacks
from mergekit_ft.sources import Source
from mergekit_ft.sources.adapted import rules

FUSED = {  # what transformers stacks experts into: the tensors of each, one after the other
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


class Hollow:
    """A causal language model on the meta device, whose parts can be given their weights."""

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        self.model = _built(source)
        self.model.eval().requires_grad_(False)
        self.model.config.use_cache = False
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        self._homes = dict(self.model.named_parameters(remove_duplicate=False))
        self._rule = max(rules(), key=lambda rule: sum(rule(n) in self._homes for n in source))
        self._stored = {self._rule(name): name for name in source}  # by the model's names
        self.stack, self.layers = self._found_layers()
        self.head = self.model.get_output_embeddings()
        self.embedding = self.model.get_input_embeddings()
        if self.head is None:
            raise SourceError(f"{source.reference}: has no head, so it says nothing")
        self._names: dict[str, tuple[str, ...]] = {}
        self._held: dict[str, nn.Parameter] = {}  # by the checkpoint's names

    def _found_layers(self) -> tuple[str, list[nn.Module]]:
        """Return the path of the longest stack of layers, and its layers."""
        found = stacks(places(self._homes))
        if not found:
            raise SourceError(f"{self.source.reference}: its names show no stack of layers")
        stack = max(found, key=lambda name: found[name])
        return stack, [self.model.get_submodule(f"{stack}.{i}") for i in range(found[stack])]

    def path(self, module: nn.Module) -> str:
        """Return where a module stands in the model."""
        named: Iterator[tuple[str, nn.Module]] = self.model.named_modules()
        return next(name for name, found in named if found is module)

    def within(self, module: nn.Module) -> list[str]:
        """Return the model's names of a module's parameters."""
        path = self.path(module)
        return [name for name in self._homes if name.startswith(f"{path}.")]

    def outside(self) -> list[str]:
        """Return the model's names of what is in no layer."""
        return [name for name in self._homes if not name.startswith(f"{self.stack}.")]

    def origins(self, name: str) -> tuple[str, ...]:
        """Return the checkpoint's tensors that a parameter of the model is made of."""
        if name not in self._names:
            self._names[name] = self._origins(name)
        return self._names[name]

    def _origins(self, name: str) -> tuple[str, ...]:
        source, wanted = self.source, tuple(self._homes[name].shape)
        stored = self._stored.get(name)
        tied = next((t for s, t in source.ties.items() if name in (s, self._rule(s))), None)
        for known in (tied, stored, *self._heads(name)):
            if known is not None and known in source and source[known].shape == wanted:
                return (known,)
        found = self._experts(name)
        if found:
            return found
        raise SourceError(
            f"{source.reference}: transformers calls {name} {list(wanted)} what the checkpoint "
            "does not have under that name or in that shape"
        )

    def _heads(self, name: str) -> list[str]:
        """Return what a checkpoint may call the head, where it is this parameter."""
        if role_of(name) != "head":
            return []
        found = [known for known in self.source if role_of(known) == "head"]
        return found if len(found) == 1 else []

    def _experts(self, name: str) -> tuple[str, ...]:
        """Return the tensors of each expert, where a parameter stacks experts."""
        before, _, last = name.rpartition(".")
        for parts in FUSED.get(last, ()):
            shape = self._homes[name].shape
            experts = range(shape[0] if len(shape) == 3 else 0)
            wanted = [f"{before}.{e}.{part}.weight" for e in experts for part in parts]
            if wanted and all(known in self._stored for known in wanted):
                return tuple(self._stored[known] for known in wanted)
        return ()

    def fill(self, names: list[str]) -> None:
        """Give parameters their weights, those of tied ones once."""
        for name in names:
            self._put(name, self._made(name))

    def _made(self, name: str) -> nn.Parameter:
        key = "+".join(self.origins(name)[:1]) + f" {tuple(self._homes[name].shape)}"
        if key not in self._held:
            made = self._read(name).to(self.device, self.dtype)
            self._held[key] = nn.Parameter(made, requires_grad=False)
        return self._held[key]

    def _read(self, name: str) -> Tensor:
        """Return a parameter as the checkpoint has it, experts stacked."""
        origins, shape = self.origins(name), self._homes[name].shape
        if len(origins) == 1:
            return self.source.tensor(origins[0])
        each = len(origins) // shape[0]
        whole: Tensor | None = None
        for expert in range(shape[0]):
            parts = [self.source.tensor(n) for n in origins[expert * each : (expert + 1) * each]]
            one = torch.cat(parts).to(self.dtype)
            whole = one.new_empty(tuple(shape)) if whole is None else whole
            whole[expert] = one
        assert whole is not None
        return whole

    def empty(self, names: list[str]) -> None:
        """Take the weights of parameters away."""
        gone = {id(self._at(name)) for name in names}
        for name in names:
            self._put(name, self._homes[name])
        still = {id(p) for p in self.model.parameters()} & gone
        self._held = {k: p for k, p in self._held.items() if id(p) not in gone or id(p) in still}

    def _at(self, name: str) -> Tensor:
        path, _, last = name.rpartition(".")
        found: Tensor = self.model.get_submodule(path)._parameters[last]
        return found

    def _put(self, name: str, parameter: nn.Parameter | Tensor) -> None:
        path, _, last = name.rpartition(".")
        self.model.get_submodule(path)._parameters[last] = parameter

    def resident(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what has its weights, by the model's names."""
        for name, parameter in self.model.named_parameters():
            if parameter.device.type != "meta":
                yield name, parameter


def _built(source: Source) -> Any:
    """Return the model that config.json names, its parameters on the meta device."""
    import transformers
    from accelerate import init_empty_weights

    if not source.config or source.folder is None:
        raise SourceError(f"{source.reference}: has no config.json, so there is no model to run")
    try:
        config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(
            f"{source.reference}: transformers cannot read its config.json ({error})"
        ) from error
    named = (config.architectures or [""])[0]
    kind = getattr(transformers, named, None)
    if kind is None:
        raise SourceError(
            f"{source.reference}: its config.json names no model class that transformers has "
            f"({named!r})"
        )
    with init_empty_weights(include_buffers=False):
        return kind(config)
