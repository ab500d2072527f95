"""What tuners share that put an adapter into a model: its layers, their names, peft's words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_ft.learning import Adaptation, Misfit, Subject


class Adapted(Adaptation):
    """An adapter in a model that peft has changed."""

    def __init__(self, model: Any, places: Places, words: dict[str, Any]) -> None:
        self.model, self.words = model, words
        self.modules, self.others, self.changes = places.chosen, places.others, places.changes
        held = model.named_parameters()
        self.parameters = {name: p for name, p in held if p.requires_grad}

    def without(self) -> AbstractContextManager[Any]:
        """Let the adapter be off, for a while."""
        found: AbstractContextManager[Any] = self.model.disable_adapter()
        return found

    def moved(self) -> bool:
        """Say whether some B is no longer zero."""
        held = self.parameters.items()
        return any(bool(p.any()) for name, p in held if ".lora_B." in name)

    def tensors(self) -> dict[str, Tensor]:
        """Return what trained, as peft names it in a file."""
        from peft import get_peft_model_state_dict

        found = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return {name: tensor.detach().cpu() for name, tensor in found.items()}


class Places:
    """Which linear layers of a model an adapter changes; heads are none of them.

    Misfit where a target matches no layer.
    """

    def __init__(self, subject: Subject, targets: Sequence[str] | None) -> None:
        layers = _layers(subject)
        self.chosen = tuple(layers if targets is None else _chosen(layers, targets))
        if not self.chosen:
            raise Misfit("names no layer; leave `targets` out for all of them", ("targets",))
        modules = subject.model.named_modules()
        self.others = tuple(name for name, _ in modules if name not in self.chosen)
        names = {id(parameter): name for name, parameter in subject.parameters.items()}
        self.layers = {name: layers[name] for name in self.chosen}
        self.changes = tuple(names[id(layer.weight)] for layer in self.layers.values())

    @property
    def transposed(self) -> bool:
        """Say whether weights are stored (in, out)."""
        return any(map(_transposed, self.layers.values()))


def _layers(subject: Subject) -> dict[str, nn.Module]:
    """Return the linear layers of a model by its own names, heads apart."""
    names = {id(parameter): name for name, parameter in subject.parameters.items()}
    head = getattr(subject.model, "get_output_embeddings", lambda: None)()
    found: dict[str, nn.Module] = {}
    for path, module in subject.model.named_modules():
        if module is head or not (isinstance(module, nn.Linear) or _transposed(module)):
            continue
        name = names.get(id(module.weight))
        if name is not None and subject.places[name].role != "head":
            found[path] = module
    return found


def _transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # of transformers


def _chosen(layers: Mapping[str, nn.Module], targets: Sequence[str]) -> list[str]:
    """Return the layers that are named, in the model's order."""
    found: set[str] = set()
    for at, pattern in enumerate(targets):
        hits = {name for name in layers if _matches(name, pattern)}
        if not hits:
            told = f"'{pattern}' is no linear layer besides heads"
            words = [*dict.fromkeys(name.rpartition(".")[2] for name in layers), *layers]
            raise Misfit(told, ("targets", at), pattern, words)
        found |= hits
    return [name for name in layers if name in found]


def _matches(name: str, pattern: str) -> bool:
    """Say whether a pattern is of a name, of its end, or of a module around it."""
    forms = (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
    return any(fnmatchcase(name, form) for form in forms)


@contextmanager
def drawn(seed: int) -> Iterator[None]:
    """Let peft draw from a stream that only the seed decides, and leave the global one alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
