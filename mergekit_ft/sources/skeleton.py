"""What transformers makes of a checkpoint: which module each tensor belongs to, and of what kind.

The model is built on the meta device, from its config alone: no weight is made or read. Where
transformers does not know the architecture, names decide, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mergekit_ft.layers import role_of
from mergekit_ft.sources.adapted import CONV1D, CONV1D_MODULES, rules
from mergekit_ft.sources.source import Source

Kind = Literal["linear", "conv1d", "other"]
KINDS: Mapping[str, Kind] = {"Linear": "linear", "Conv1D": "conv1d"}


@dataclass(frozen=True)
class Skeleton:
    """The modules of a model, under the names that transformers gives them."""

    rename: Callable[[str], str]  # a tensor's name in the checkpoint -> in the model
    kinds: Mapping[str, str] | None  # class of each module; None where names must do
    tensors: frozenset[str]  # the model's own names, where it could be built
    transposed: bool = False  # by its type, such as GPT-2, its layers are Conv1D
    note: str = ""
    parameters: tuple[str, ...] = ()  # in the model's own order, tied ones once

    def kind(self, name: str, shape: tuple[int, ...]) -> Kind:
        """Return what the module is whose weight this is."""
        module, _, last = self.rename(name).rpartition(".")
        if last != "weight" or len(shape) != 2:
            return "other"
        if self.kinds is not None:
            return KINDS.get(self.kinds.get(module, ""), "other")
        if role_of(name) in ("embedding", "norm"):
            return "other"
        conv = self.transposed and module.rpartition(".")[2] in CONV1D_MODULES
        return "conv1d" if conv else "linear"

    def knows(self, name: str) -> bool:
        """Say whether the model has a tensor of this name; yes where it could not be built."""
        return self.kinds is None or self.rename(name) in self.tensors

    def holds_modules(self, module: str, names: Iterable[str]) -> bool:
        """Say whether a module has others within it."""
        inside = f"{module}."
        if self.kinds is not None:
            return any(name.startswith(inside) for name in self.kinds)
        return any("." in n.removeprefix(inside) for n in names if n.startswith(inside))


def skeleton(source: Source) -> Skeleton:
    """Return the skeleton of a checkpoint."""
    built, why = _built(source)
    if built is None:
        note = f"{source.reference}: which modules are linear was told by their names: {why}"
        conv = source.config.get("model_type") in CONV1D
        return Skeleton(_same, None, frozenset(), conv, note)
    kinds = {name: type(module).__name__ for name, module in built.named_modules()}
    tensors = frozenset(built.state_dict())
    parameters = tuple(name for name, _ in built.named_parameters())
    return Skeleton(_rule(source, tensors), kinds, tensors, parameters=parameters)


def _built(source: Source) -> tuple[Any, str]:
    """Return the model on the meta device, or None and why not."""
    if not source.config or source.folder is None:
        return None, "it has no config.json"
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        names = config.architectures or [""]
        kind = getattr(transformers, names[0], None)
        if kind is None:
            return None, f"transformers has no class {names[0] or '(architectures is not set)'}"
        with torch.device("meta"):
            return kind(config), ""
    except Exception as error:  # whatever a config of others leads its class to raise
        return None, f"transformers cannot build it ({' '.join(str(error).split())[:120]})"


def _rule(source: Source, tensors: frozenset[str]) -> Callable[[str], str]:
    """Return the rule by which most names of the checkpoint are the model's."""
    return max(rules(), key=lambda rule: sum(rule(name) in tensors for name in source))


def _same(name: str) -> str:
    return name
