"""LoRA (Hu et al. 2021, arXiv:2106.09685): factors of low rank beside frozen matrices train.

Of a matrix W (m x n) of a linear layer only the product of two factors is learned (section 4.1):

    h = W x + s B A x,   A (r x n) random, B (m x r) zero,   s = alpha / r

so that training begins at the base. rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) takes
s = alpha / sqrt(r); DoRA (Liu et al. 2024, arXiv:2402.09353) also learns the length of each row of
the sum. The layers are peft's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mergekit_ft.learning import Adaptation, Misfit, Selection, Subject, Tuner

NAME = "default"  # peft's, of the adapter in the model


class Lora(Tuner):
    """Factors of low rank beside the matrices of linear layers train."""

    learning_rate: ClassVar[float] = 2e-4  # the paper's of GPT-2 and GPT-3 (appendix D)
    adapts: ClassVar[bool] = True
    gives: ClassVar[tuple[str, ...]] = ("adapter", "full", "delta")

    rank: int = Field(16, ge=1, description="r, columns of B and rows of A")
    alpha: float | None = Field(
        None, gt=0, description="the product counts alpha / rank; None: rank"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the product's inputs left out")
    targets: tuple[str, ...] | None = Field(
        None, description="layers, by name or pattern: q_proj, '*.mlp.*'; None: all but heads"
    )
    use_rslora: bool = Field(False, description="the product counts alpha / sqrt(rank)")
    use_dora: bool = Field(False, description="the length of each row trains too")
    init: Literal["kaiming", "gaussian"] = Field("kaiming", description="how A is drawn; B is 0")

    def adapted(self, subject: Subject) -> Adaptation:
        """Put the factors into the model."""
        from peft import LoraConfig, get_peft_model

        layers = _layers(subject)
        chosen = list(layers) if self.targets is None else self._chosen(layers)
        others = tuple(name for name, _ in subject.model.named_modules() if name not in chosen)
        names = {id(parameter): name for name, parameter in subject.parameters.items()}
        changes = tuple(names[id(layers[name].weight)] for name in chosen)
        words = self._words(any(_transposed(layers[name]) for name in chosen))
        start: Any = "gaussian" if self.init == "gaussian" else True
        config = LoraConfig(**words, target_modules=chosen, init_lora_weights=start)
        with _drawn(subject.seed):
            model: Any = get_peft_model(subject.model, config)
        return _Adaptation(model, tuple(chosen), others, changes, words)

    def select(self, subject: Subject, phase: int) -> Selection:
        """Choose every factor."""
        return Selection(whole=tuple(subject.parameters))

    def _words(self, transposed: bool) -> dict[str, Any]:
        """Return the scale and the kind of the product, in peft's words."""
        return {
            "r": self.rank,
            "lora_alpha": self.rank if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "fan_in_fan_out": transposed,
        }

    def _chosen(self, layers: Mapping[str, nn.Module]) -> list[str]:
        """Return the layers that are named, in the model's order."""
        found: set[str] = set()
        for at, pattern in enumerate(self.targets or ()):
            hits = {name for name in layers if _matches(name, pattern)}
            if not hits:
                told = f"'{pattern}' is no linear layer besides heads"
                words = [*dict.fromkeys(name.rpartition(".")[2] for name in layers), *layers]
                raise Misfit(told, ("targets", at), pattern, words)
            found |= hits
        if not found:
            raise Misfit("names no layer; leave `targets` out for all of them", ("targets",))
        return [name for name in layers if name in found]


class _Adaptation(Adaptation):
    """The factors in a model that peft has changed."""

    def __init__(
        self,
        model: Any,
        modules: tuple[str, ...],
        others: tuple[str, ...],
        changes: tuple[str, ...],
        words: dict[str, Any],
    ) -> None:
        self._model, self.words = model, words
        self.modules, self.others, self.changes = modules, others, changes
        held = model.named_parameters()
        self.parameters = {name: p for name, p in held if p.requires_grad}

    def without(self) -> AbstractContextManager[Any]:
        """Let the model be what it was, for a while."""
        found: AbstractContextManager[Any] = self._model.disable_adapter()
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Return what trained, as peft names it in a file."""
        from peft import get_peft_model_state_dict

        found = get_peft_model_state_dict(self._model, save_embedding_layers=False)
        return {name: tensor.detach().cpu() for name, tensor in found.items()}


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
    return type(module).__name__ == "Conv1D"  # of transformers: its weight is (in, out)


def _matches(name: str, pattern: str) -> bool:
    """Say whether a pattern is of a name, of its end, or of a module around it."""
    forms = (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
    return any(fnmatchcase(name, form) for form in forms)


@contextmanager
def _drawn(seed: int) -> Iterator[None]:
    """Let peft draw from a stream that only the seed decides, and leave the global one alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
