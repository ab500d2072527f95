"""A model with an adapter on it, as a source: each tensor of the adapter finds its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mergekit_ft.errors import SourceError
from mergekit_ft.registry import nearest
from mergekit_ft.sources.adapter import BESIDE, Adapter, Factors
from mergekit_ft.sources.derived import derived
from mergekit_ft.sources.dtypes import FLOATING, SIZE
from mergekit_ft.sources.header import TensorInfo
from mergekit_ft.sources.layout import listed
from mergekit_ft.sources.low_rank import LowRank, Product, Saved, Shifted, Stored
from mergekit_ft.sources.source import Source
from mergekit_ft.sources.tiles import ComputedReader, Recent, Recipe

STEMS = (  # what a model with a head may put before the names of the model without one
    [
        "model",
        "bert",
        "roberta",
        "distilbert",
        "albert",
        "electra",
        "deberta",
        "camembert",
        "mpnet",
        "transformer",
        "gpt_neox",
        "backbone",
    ]
)
SIGHTED = (  # where transformers keeps the parts of a model that sees, and where its files do
    (("model.language_model.", "model."), ("model.visual.", "visual.")),
    (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ),
)
CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}  # model types
CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")  # in them, stored (in, out)
COMPARED = 1 << 20  # bytes at a time


def adapted(base: Source, adapter: Adapter) -> Source:
    """Return base + adapter; every tensor of the adapter is used, or this raises."""
    return _Landing(base, adapter).source()


class _Landing:
    """Where the tensors of one adapter go in one model."""

    def __init__(self, base: Source, adapter: Adapter) -> None:
        self.base, self.adapter = base, adapter
        self.reference = f"{base.reference}+{adapter.reference}"
        self.infos: dict[str, TensorInfo] = {}  # of the tensors that change, as they are stated
        self.recipes: dict[str, Recipe] = {}
        self.recent = Recent()

    def source(self) -> Source:
        """Return the model with the adapter on it."""
        self.name = self._names()
        self._require_untied()
        for name, info in self.adapter.saved.items():
            self._replace(self._own(self.name(name)), info)
        layouts = self._layouts()
        for module, factors in self.adapter.factors.items():
            self._add(factors, layouts[module])
        tensors = [self.infos.get(name, info) for name, info in self.base.items()]
        made = derived(
            self.base,
            tensors,
            ComputedReader(self.base.reader, self.recipes),
            reference=self.reference,
            inputs=self.adapter.inputs,
            notes=self._notes(),
        )
        made.adapter = (self.adapter.reference, self.adapter.revision)
        return made

    def _names(self) -> Callable[[str], str]:
        """Return what makes an adapter's names the model's: as they are, or by one stem."""
        wanted = [*self.adapter.saved, *(f"{module}.weight" for module in self.adapter.factors)]
        best: list[str] = wanted
        for rule in rules():
            missing = [name for name in wanted if self._locate(rule(name)) is None]
            if not missing and len(set(map(rule, wanted))) == len(set(wanted)):
                return rule
            best = min(best, missing or best, key=len)
        first = best[0]
        near = nearest(first, self.base)
        hint = f" (nearest: {', '.join(near)})" if near else ""
        raise SourceError(
            f"{self.reference}: {len(best)} of the {len(wanted)} modules and tensors that the "
            f"adapter changes are not in {self.base.reference}: {listed(best)}; for {first}{hint}; "
            f"is it the model that the adapter was trained on{self._trained_on()}?"
        )

    def _trained_on(self) -> str:
        trained = self.adapter.config.base
        return f", {trained}" if trained else ""

    def _locate(self, name: str) -> str | None:
        """Return a name that the model has, or has tied to another."""
        return name if name in self.base or name in self.base.ties else None

    def _own(self, name: str) -> str:
        """Return the tensor that stands for a name."""
        return name if name in self.base else self.base.ties[name]

    def _require_untied(self) -> None:
        """Refuse to change a tensor under one of its names and not under the others."""
        saved = {self.name(name): info for name, info in self.adapter.saved.items()}
        changed = {self.name(f"{module}.weight") for module in self.adapter.factors}
        changed |= {self.name(f"{f.module}.bias") for f in self._biased()}
        for tied, to in self.base.ties.items():
            touched = sorted(({tied, to} & changed) | ({tied, to} & saved.keys()))
            if not touched or to not in self.base:
                continue
            alike = tied in saved and to in saved and self._alike(saved[tied], saved[to])
            if not alike or changed & {tied, to}:
                other = to if touched[0] == tied else tied
                raise SourceError(
                    f"{self.reference}: the adapter changes {touched[0]}, which is tied to {other} "
                    f"in {self.base.reference}: on one tensor it would change both, and the model "
                    "that was trained has two. Save the base with tie_word_embeddings false and "
                    "both tensors, and name that"
                )

    def _biased(self) -> Iterable[Factors]:
        return (factors for factors in self.adapter.factors.values() if factors.bias is not None)

    def _alike(self, one: TensorInfo, other: TensorInfo) -> bool:
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return all(
            self._bytes(one, start) == self._bytes(other, start)
            for start in range(0, one.nbytes, COMPARED)
        )

    def _bytes(self, info: TensorInfo, start: int) -> bytearray:
        data = bytearray(min(COMPARED, info.nbytes - start))
        self.adapter.reader.read_into(info, start, memoryview(data))
        return data

    def _replace(self, name: str, info: TensorInfo) -> None:
        """Put a tensor of the adapter in the place of the model's."""
        old = self.base[name]
        if old.shape != info.shape:
            raise SourceError(
                f"{self.reference}: the adapter holds {name} of shape {list(info.shape)}, where "
                f"{self.base.reference} has {list(old.shape)}: resize the base as it was in "
                "training, save it, and name that"
            )
        self._require_floating(info)
        self.infos[name] = replace(old, dtype=info.dtype, nbytes=info.nbytes, stored=old.kept)
        self.recipes[name] = Saved(self._of_adapter(info))

    def _require_floating(self, info: TensorInfo) -> None:
        if info.dtype not in FLOATING:
            raise SourceError(f"{self.reference}: {info.name} is {info.dtype}, which is no weight")

    def _of_adapter(self, info: TensorInfo) -> Stored:
        self._require_floating(info)
        return Stored(self.adapter.reader, info)

    def _current(self, name: str) -> Stored:
        """Return a tensor of the model, or the one that the adapter holds in its place."""
        recipe = self.recipes.get(name)
        if recipe is not None:
            return Stored(recipe.reader, recipe.stored)
        self._require_floating(self.base[name])
        return Stored(self.base.reader, self.base[name])

    def _layouts(self) -> dict[str, bool]:
        """Say of each module whether its weight is stored transposed, (in, out)."""
        found = {module: self._layout(factors) for module, factors in self.adapter.factors.items()}
        sure = {layout for layout in found.values() if layout is not None}
        kinds = [module for module, layout in found.items() if layout is None]
        typed = self.base.config.get("model_type")
        for module in kinds:
            if typed in CONV1D:
                found[module] = module.rpartition(".")[2] in CONV1D_MODULES
            elif typed is not None and not self.adapter.config.transposed:
                found[module] = False
            elif len(sure) == 1:
                found[module] = next(iter(sure))
            elif not self.adapter.config.transposed:
                found[module] = False
            else:
                raise SourceError(
                    f"{self.reference}: {module} is square, so nothing tells whether "
                    "fan_in_fan_out, which the adapter's config sets, is true of it: merge it "
                    "into its base first (peft: merge_and_unload, save_pretrained)"
                )
        return {module: bool(layout) for module, layout in found.items()}

    def _layout(self, factors: Factors) -> bool | None:
        """Say whether a weight is stored (in, out); None where both ways have one shape."""
        assert factors.a is not None and factors.b is not None
        name = self._own(self.name(f"{factors.module}.weight"))
        shape = self.base[name].shape
        straight = (factors.b.shape[0], factors.a.shape[1])
        if shape not in (straight, straight[::-1]) or (factors.table and shape != straight[::-1]):
            raise SourceError(
                f"{self.reference}: the adapter's {factors.module} goes from {straight[1]} to "
                f"{straight[0]}, and does not fit {name} {list(shape)} of {self.base.reference}"
            )
        if factors.table:
            return True
        return None if straight[0] == straight[1] else shape != straight

    def _add(self, factors: Factors, transposed: bool) -> None:
        """Add a module's product, and its bias."""
        assert factors.a is not None and factors.b is not None
        name, scale = (
            self._own(self.name(f"{factors.module}.weight")),
            self.adapter.config.scale_of(factors.module),
        )
        base, parts = self._current(name), [factors.a, factors.b]
        magnitude = None
        if factors.magnitude is not None:
            if factors.magnitude.numel != factors.b.shape[0]:
                raise SourceError(
                    f"{self.reference}: {factors.magnitude.name} has {factors.magnitude.numel} "
                    f"elements, and {factors.module} has {factors.b.shape[0]} outputs"
                )
            parts.append(factors.magnitude)
            magnitude = self._of_adapter(factors.magnitude)
        product = Product(
            f"{self.reference}: {factors.module}",
            self._of_adapter(factors.a),
            self._of_adapter(factors.b),
            scale,
            transposed,
            magnitude,
        )
        dtype = self._state(name, [base.info, *parts])
        self.recipes[name] = LowRank(base, product, dtype, self.recent)
        if factors.bias is not None:
            self._shift(factors, factors.bias, scale)

    def _shift(self, factors: Factors, bias: TensorInfo, scale: float) -> None:
        name = self.name(f"{factors.module}.bias")
        if name not in self.base or self.base[name].shape != bias.shape:
            raise SourceError(
                f"{self.reference}: the adapter adds a bias to {factors.module} (lora_bias), and "
                f"{self.base.reference} has no {name} of {bias.numel} elements: a bias cannot be "
                "added to a layer without one"
            )
        base = self._current(name)
        dtype = self._state(name, [base.info, bias])
        self.recipes[name] = Shifted(base, self._of_adapter(bias), scale, dtype)

    def _state(self, name: str, parts: Iterable[TensorInfo]) -> str:
        """State a computed tensor in the dtype of the arithmetic: nothing is rounded before it."""
        old = self.base[name]
        dtype = "F64" if any(part.dtype == "F64" for part in parts) else "F32"
        nbytes = old.numel * SIZE[dtype]
        self.infos[name] = replace(old, dtype=dtype, nbytes=nbytes, stored=old.kept)
        return dtype

    def _notes(self) -> Iterator[str]:
        """Say what the adapter changes, and what of it is not used."""
        adapter, held = self.adapter, self.adapter.factors.values()
        ranks = sorted({factors.a.shape[0] for factors in held if factors.a is not None})
        span = f"{ranks[0]}..{ranks[-1]}" if len(ranks) > 1 else "".join(map(str, ranks))
        kind = "DoRA" if adapter.config.dora else "LoRA"
        parts = [f"{kind} of rank {span} on {len(held)}"] if held else []
        parts += [f"{len(adapter.saved)} held whole"] if adapter.saved else []
        yield (
            f"{self.reference}: the adapter changes {len(self.infos)} of {len(self.base)} tensors "
            f"({', '.join(parts)})"
        )
        trained = adapter.config.base
        if trained and not _same_place(trained, self.base.reference):
            yield (
                f"{self.reference}: by its adapter_config.json the adapter was trained on {trained}"
            )
        left = [name for name in _around(adapter.folder) if not self._has(name)]
        if left:
            yield (
                f"{self.reference}: {listed(left)} of the adapter's folder differ from the base's "
                "and are not used: only weights are taken from an adapter"
            )

    def _has(self, name: str) -> bool:
        """Say whether the base's folder has the same file."""
        mine = self.base.folder / name if self.base.folder is not None else None
        if mine is None or not mine.is_file():
            return False
        return mine.read_bytes() == (self.adapter.folder / name).read_bytes()


def rules() -> Iterator[Callable[[str], str]]:
    """Yield the ways in which the names of an adapter may differ from a checkpoint's."""
    stems = [((f"{stem}.", ""), ("", f"{stem}.")) for stem in STEMS]
    ways: list[Sequence[tuple[str, str]]] = [(), *([way] for both in stems for way in both)]
    for pairs in SIGHTED:
        ways += [pairs, [pair[::-1] for pair in pairs]]
    for way in ways:
        yield partial(_moved, pairs=way)


def _moved(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Return a name with the first of these beginnings that it has put for the other."""
    for one, other in pairs:
        if name.startswith(one):
            return other + name.removeprefix(one)
    return name


def _same_place(one: str, other: str) -> bool:
    return one == other or os.path.realpath(one) == os.path.realpath(os.path.expanduser(other))


def _around(folder: Path) -> list[str]:
    """Return the files of a tokenizer beside an adapter."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix in BESIDE
        and path.is_file()
        and ("token" in path.name or "vocab" in path.name or "template" in path.name)
    )
