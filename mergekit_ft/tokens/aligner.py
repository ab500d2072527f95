"""From the words of a plan to sources whose rows lie in the order of one vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mergekit_ft.errors import SourceError
from mergekit_ft.plan import ModelReference, Reading
from mergekit_ft.plan.marks import Keys
from mergekit_ft.plan.tokenizers import BASE, UNION, TokenizerWords
from mergekit_ft.sources import Source
from mergekit_ft.tokens.aligned import Aligned
from mergekit_ft.tokens.alignment import Alignment, Holder, align
from mergekit_ft.tokens.choices import Choices, Model
from mergekit_ft.tokens.indexed import rows_of
from mergekit_ft.tokens.target import Target, extended, union
from mergekit_ft.tokens.unaligned import named
from mergekit_ft.tokens.vocabulary import Vocabulary, files_in, files_of, read_vocabulary


class Aligner:
    """Finds every model's rows for the tokens of the output; faults go into the reading."""

    def __init__(
        self, reading: Reading, opened: Mapping[Any, Source], words: TokenizerWords, path: Keys
    ) -> None:
        assert reading.plan is not None
        self.reading, self.plan = reading, reading.plan
        self.opened, self.words, self.path = opened, words, path
        self.donor = next(iter(opened))

    def aligned(self) -> Mapping[Any, Source]:
        """Return the sources; those that were opened, where a fault stands in the way."""
        before = len(self.reading.faults)
        models = self._models()
        if len(models) < len(self.opened):
            return self.opened
        core = self._core(models)
        if core is None:
            return self.opened
        target = self._target(core, models)
        choices = Choices(self.reading, models, self.words)
        chosen = choices.read(target.ids)
        if len(self.reading.faults) > before:
            return self.opened
        vocabularies = [model.vocabulary for model in models.values()]
        target = extended(target, self.words.tokens, vocabularies)
        found = self._align(target, models, chosen)
        if found.orphans:
            self._tell_orphans(target, found.orphans)
            return self.opened
        try:
            return Aligned(self.reading, models, target, found).sources()
        except SourceError as error:
            self.reading.add(self.path, str(error), kind="source")
        return self.opened

    def _models(self) -> dict[Any, Model]:
        """Return every model with its vocabulary; one without a tokenizer has the donor's."""
        found: dict[Any, Model] = {}
        for key, source in self.opened.items():
            try:
                rows = rows_of(source)
                vocabulary = read_vocabulary(files_of(source), source.reference)
                if vocabulary is None:
                    vocabulary = self._assumed(source, rows, found.get(self.donor))
                found[key] = Model(source, vocabulary, rows)
            except SourceError as error:
                self.reading.add(self.path, str(error), kind="source")
        return found

    def _assumed(self, source: Source, rows: int, donor: Model | None) -> Vocabulary:
        if donor is not None and donor.rows == rows:
            return replace(donor.vocabulary, reference=source.reference, files=files_of(source))
        raise SourceError(
            f"{source.reference}: has no tokenizer, so its {rows} rows cannot be aligned by token; "
            "put the tokenizer's files beside its weights"
        )

    def _core(self, models: Mapping[Any, Model]) -> Vocabulary | None:
        """Return the vocabulary that the output's starts from."""
        source = self.words.source
        if source in (UNION, BASE):
            return models[self.donor].vocabulary
        assert isinstance(source, ModelReference)
        if source.key in models:
            return models[source.key].vocabulary
        try:
            found = read_vocabulary(files_in(source.local), str(source))
        except SourceError as error:
            self.reading.add(self.path, str(error), kind="source")
            return None
        if found is None:
            merged = ", ".join(model.source.reference for model in models.values())
            message = f"{source} is none of the models that are merged ({merged}), and no folder "
            self.reading.add(self.path, message + "with a tokenizer", kind="source")
        return found

    def _target(self, core: Vocabulary, models: Mapping[Any, Model]) -> Target:
        if self.words.source != UNION:
            return Target(core)
        return union(core, [(model.vocabulary, model.rows) for model in models.values()])

    def _align(
        self, target: Target, models: Mapping[Any, Model], choices: Mapping[str, Any]
    ) -> Alignment:
        base = self.plan.base_model
        order = list(models)
        return align(
            target.ids,
            self._rows(target, models),
            [Holder(model.vocabulary.ids, model.rows) for model in models.values()],
            order.index(base.key) if base is not None else None,
            choices,
            [token for token, said in self.words.tokens.items() if said.force],
        )

    def _rows(self, target: Target, models: Mapping[Any, Model]) -> int:
        """Return the rows of the output: the vocabulary's own, never fewer than it has."""
        size = max(target.ids.values(), default=-1) + 1
        if self.words.pad_to_multiple_of is not None:
            return -(-size // self.words.pad_to_multiple_of) * self.words.pad_to_multiple_of
        own = [m.rows for m in models.values() if m.vocabulary is target.core]
        return max(size, *own, 0)

    def _tell_orphans(self, target: Target, rows: Iterable[int]) -> None:
        tokens = {number: token for token, number in target.ids.items()}
        orphans = [tokens[row] for row in rows]
        one = orphans[0].replace("'", "''")
        self.reading.add(
            self.path,
            f"no model has a row for {named(orphans)} of {target.core.reference}; say where it "
            f"comes from: `tokens: {{'{one}': {{source: {{kind: zero}}}}}}`",
        )
