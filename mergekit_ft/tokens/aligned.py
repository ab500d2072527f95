"""The sources of aligned models, and what changes around the donor's weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mergekit_ft.errors import SourceError
from mergekit_ft.plan import Reading
from mergekit_ft.plan.tokenizers import vocabulary_words
from mergekit_ft.sources import Source, TensorInfo
from mergekit_ft.sources.derived import derived
from mergekit_ft.sources.dtypes import SIZE
from mergekit_ft.tokens import specials
from mergekit_ft.tokens.alignment import Alignment
from mergekit_ft.tokens.choices import Model
from mergekit_ft.tokens.files import Sides, output_files, stale_files
from mergekit_ft.tokens.indexed import indexed, resized, stated_sizes
from mergekit_ft.tokens.rows import AlignedReader
from mergekit_ft.tokens.target import Target
from mergekit_ft.tokens.unaligned import named
from mergekit_ft.tokens.vocabulary import CONFIGS, GENERATION, settings

EFFECT = {  # of ordinary tokens that join, by the kind of tokenizer
    "BPE": "without merges, so they are read back but text becomes none of them",
    "Unigram": "less likely than all others, so text becomes them only where it could not be read",
    "WordPiece": "where text is cut by the longest match, so it may be cut otherwise than before",
}


class Aligned:
    """Makes the sources of one alignment."""

    def __init__(
        self,
        reading: Reading,
        models: Mapping[Any, Model],
        target: Target,
        alignment: Alignment,
    ) -> None:
        self.reading, self.models, self.target = reading, models, target
        self.alignment = alignment
        self.rows = len(alignment.parts[0].which)
        self.donor = next(iter(models))

    def sources(self) -> dict[Any, Source]:
        """Return every model as it stands in the output's vocabulary."""
        changes = [
            not part.identical(me, model.rows)
            for me, (part, model) in enumerate(
                zip(self.alignment.parts, self.models.values(), strict=True)
            )
        ]
        found = {}
        for me, (key, model) in enumerate(self.models.items()):
            found[key] = self._resized(me, model) if changes[me] else model.source
        found[self.donor] = self._surrounded(found[self.donor])
        return found

    def _resized(self, me: int, model: Model) -> Source:
        """Return a model with its rows in the output's order."""
        mine = indexed(model.source, model.rows)
        tensors = [
            self._info(info, model.rows) if info.name in mine else info
            for info in model.source.values()
        ]
        widths = {name: info.numel // model.rows for name, info in mine.items()}
        sources = [other.source for other in self.models.values()]
        reader = AlignedReader(me, sources, self.alignment, widths)
        notes = [self._note(me, model)]
        return derived(model.source, tensors, reader, edits=self._sizes(model), notes=notes)

    def _info(self, info: TensorInfo, rows: int) -> TensorInfo:
        """Return what is known of an aligned tensor: wider where rows are computed or converted."""
        shape = resized(info, rows, self.rows)
        dtypes = {info.dtype}
        for model in self.models.values():
            name = model.source.locate(info.name)
            dtypes |= {model.source[name].dtype} if name is not None else set()
        exact = len(dtypes) == 1 and all(part.exact for part in self.alignment.parts)
        dtype = info.dtype if exact else "F64" if "F64" in dtypes else "F32"
        size = SIZE[dtype]
        for length in shape:
            size *= length
        return replace(info, dtype=dtype, shape=shape, nbytes=size, stored=info.kept)

    def _surrounded(self, donor: Source) -> Source:
        """Return the donor with the output's config and tokenizer files."""
        model = self.models[self.donor]
        sides: Sides = output_files(self.target, model.vocabulary)
        edits: dict[str, Any] = {}
        notes = list(self._told())
        if self.target.core is not model.vocabulary:
            notes += self._move_ids(model, edits, sides)
        made = derived(donor, donor.values(), donor.reader, edits=edits, notes=notes)
        replaced = {**donor.around.replaced, **sides}
        made.around = replace(made.around, replaced=replaced, tokens=self._record())
        return made

    def _sizes(self, model: Model) -> dict[str, Any]:
        """Return the new `vocab_size` of the config, under each key that has it."""
        if self.rows == model.rows or not model.source.config:
            return {}
        keys = [key for key, size in stated_sizes(model.source.config) if size == model.rows]
        if not keys:
            raise SourceError(
                f"{model.source.reference}: its config.json states no `vocab_size` of "
                f"{model.rows}, the rows of its embedding, so {self.rows} cannot take its place; "
                "mend it"
            )
        return dict.fromkeys(keys, self.rows)

    def _move_ids(self, model: Model, edits: dict[str, Any], sides: Sides) -> Iterator[str]:
        """Give special ids their new numbers, in the config and for generation."""
        core, source = self.target.core, model.source
        old, new = model.vocabulary.tokens, self.target.ids
        own, own_generation = (settings(core.files, name) for name in CONFIGS)
        generation = settings(model.vocabulary.files, GENERATION)
        found = specials.moved(source.config, old, new, own)
        later = specials.moved(generation, old, new, own | own_generation)
        edits.update(found.edits)
        if later.edits:
            raw = json.dumps(generation | dict(later.edits), ensure_ascii=False, indent=2) + "\n"
            sides[GENERATION] = raw.encode()
        for name, ids in (("config.json", found), (GENERATION, later)):
            for unknown in ids.unknown:
                self._refuse(f"{name} of {source.reference}: {unknown}")
            yield from (f"{name}: {note}" for note in ids.notes)

    def _refuse(self, what: str) -> None:
        assert self.reading.plan is not None
        message = (
            f"{what} has no token in the vocabulary of {self.target.core.reference}, and that "
            "model's own config names none either; take `union`, or another model"
        )
        self.reading.add(vocabulary_words(self.reading.plan)[1], message, kind="source")

    def _told(self) -> Iterator[str]:
        """Say what the vocabulary is made of, and what that means for text."""
        core, ordinary, added = self.target.core, self.target.ordinary, self.target.added
        size = len(self.target.ids)
        joined = f", and {named(self.target.new)} that join" if self.target.new else ""
        yield (
            f"tokenizer: {len(core.ids):,} tokens of {core.reference}{joined}; "
            f"{size:,} in {self.rows:,} rows"
        )
        if ordinary:
            effect = EFFECT.get(core.kind, "and text may become them")
            number = f"{len(ordinary):,} ordinary " + ("tokens" if len(ordinary) > 1 else "token")
            yield f"tokenizer: {number} among them, in its {core.kind} model, {effect}"
        if added:
            yield f"tokenizer: {named(list(added))} among them, found in text as a whole"
        if stale := stale_files(self.target):
            yield f"tokenizer: {', '.join(stale)} stay behind: they hold the vocabulary as it was"

    def _note(self, me: int, model: Model) -> str:
        counts = self.alignment.parts[me].counts
        told = ", ".join(f"{number:,} {word}" for word, number in counts.items())
        return f"{model.source.reference}: rows {model.rows:,} -> {self.rows:,}: {told}"

    def _record(self) -> dict[str, Any]:
        """Return what the receipt keeps."""
        core = self.target.core
        models = {
            model.source.reference: {
                "tokenizer": model.vocabulary.digest,
                "rows": model.rows,
                **self.alignment.parts[me].counts,
            }
            for me, model in enumerate(self.models.values())
        }
        return {
            "source": {"reference": core.reference, "tokenizer": core.digest},
            "tokens": len(self.target.ids),
            "rows": self.rows,
            "joined": len(self.target.new),
            "models": models,
        }
