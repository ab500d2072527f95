"""What is wrong with edits, or odd, before there is any training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_ft.editing.encoding import Encoder
from mergekit_ft.editing.facts import Edit
from mergekit_ft.editing.judging import STOP, reached, right
from mergekit_ft.evaluation.scoring import scored
from mergekit_ft.models.speaker import Speaker

KINDS = {
    "conflict": "the prompt of another edit, with another target: one of them must fail",
    "duplicate": "the prompt and target of another edit",
    "empty target": "nothing to say",
    "unreachable target": "greedy decoding ends before the target does, so it cannot be matched",
    "kept and changed": "a locality prompt that an edit changes",
    "asked as it is": "a rephrase that is the prompt itself, so it measures nothing more",
    "double blank": "the prompt ends in a blank, so that two stand before the target",
    "odd blank": "the target begins with blanks that are not one space, or ends in one",
    "subject not in prompt": "editors that look for the subject cannot find it",
    "seam": "tokens of the prompt alone do not begin those of prompt and target",
    "no end": "the tokenizer has no token that ends a text",
    "padding ends texts": "one token pads and ends texts: what masks padding by it loses the end",
    "too long": "more tokens than the model takes",
    "known": "the model says the target already",
}


@dataclass(frozen=True)
class Finding:
    """Something to know of one edit, or of the tokenizer."""

    kind: str  # a key of KINDS
    where: str
    more: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.kind}{f': {self.more}' if self.more else ''}"


@dataclass(frozen=True)
class Lint:
    """All that was found."""

    edits: int
    findings: tuple[Finding, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Return how often each kind was found, in the order of KINDS."""
        found = Counter(finding.kind for finding in self.findings)
        return {kind: found[kind] for kind in KINDS if found[kind]}

    def report(self) -> dict[str, Any]:
        """Return it for JSON."""
        told = [{"kind": f.kind, "where": f.where, "more": f.more} for f in self.findings]
        return {"edits": self.edits, "counts": self.counts, "findings": told}


def lint(
    edits: Sequence[Edit],
    encoder: Encoder | None = None,
    *,
    most: int | None = None,
    speaker: Speaker | None = None,
    batch: int = 16,
) -> Lint:
    """Look through edits; at their tokens with an encoder, at what is known with a speaker.

    `most` is how many tokens the model takes.
    """
    found = [*_said_again(edits), *(f for edit in edits for f in _of(edit))]
    if encoder is not None:
        found += [*_ends(encoder), *(f for edit in edits for f in _cut(edit, encoder, most))]
        if speaker is not None:
            found += _known(edits, encoder, speaker, batch)
    order = {edit.where: place for place, edit in enumerate(edits)}
    found.sort(key=lambda finding: order.get(finding.where, -1))
    return Lint(len(edits), tuple(found))


def _said_again(edits: Sequence[Edit]) -> Iterator[Finding]:
    first: dict[str, Edit] = {}
    for edit in edits:
        before = first.setdefault(_plain(edit.prompt), edit)
        if before is edit:
            continue
        same = _plain(before.target) == _plain(edit.target)
        more = (
            f"as {before.where}" if same else f"{edit.target!r}; {before.where}: {before.target!r}"
        )
        yield Finding("duplicate" if same else "conflict", edit.where, more)
    for edit in edits:
        for probe in edit.locality:
            changing = first.get(_plain(probe.prompt))
            if changing is not None:
                yield Finding("kept and changed", edit.where, f"{changing.where} changes it")


def _plain(text: str) -> str:
    return " ".join(text.split())


def _of(edit: Edit) -> Iterator[Finding]:
    if not edit.target.strip():
        yield Finding("empty target", edit.where)
        return
    if not right(reached(edit.target), [edit.target]):
        more = f"of {edit.target!r} at most {reached(edit.target)!r} is said"
        yield Finding("unreachable target", edit.where, more)
    if edit.prompt != edit.prompt.rstrip():
        yield Finding("double blank", edit.where)
    if edit.target.removeprefix(" ") != edit.target.strip():
        yield Finding("odd blank", edit.where, repr(edit.target))
    if edit.subject is not None and edit.subject not in edit.prompt:
        yield Finding("subject not in prompt", edit.where, repr(edit.subject))
    if any(_plain(text) == _plain(edit.prompt) for text in edit.rephrase):
        yield Finding("asked as it is", edit.where)


def _ends(encoder: Encoder) -> Iterator[Finding]:
    padding = encoder.tokenizer.pad_token_id
    if encoder.end is None:
        yield Finding("no end", "tokenizer")
    elif encoder.end == padding:
        more = "mergekit-ft masks by lengths, so it keeps the end; other tools may not"
        yield Finding("padding ends texts", "tokenizer", more)


def _cut(edit: Edit, encoder: Encoder, most: int | None) -> Iterator[Finding]:
    """Yield what is odd about an edit's tokens."""
    if not edit.target.strip():
        return
    made = encoder.edit(edit)
    if not made.whole:
        more = "the target is cut apart from the prompt"
        yield Finding("seam", edit.where, more)
    said = len(made.target) - (made.target[-1:] == (encoder.end,))
    if said > STOP.most:
        more = f"{said} tokens, of which {STOP.most} are decoded"
        yield Finding("unreachable target", edit.where, more)
    if most is not None and len(made.prompt) + max(len(made.target), STOP.most) > most:
        more = f"{len(made.prompt)} tokens and an answer, of {most}"
        yield Finding("too long", edit.where, more)


def _known(
    edits: Sequence[Edit], encoder: Encoder, speaker: Speaker, batch: int
) -> Iterator[Finding]:
    """Yield edits of whose target every token, its end apart, is the likeliest already."""
    asked = [edit for edit in edits if edit.target.strip()]
    bare = Encoder(encoder.tokenizer, encoder.template, eos=encoder.template == "chat")
    samples = [bare.edit(edit).sample for edit in asked]
    for edit, found in zip(asked, scored(speaker, samples, batch), strict=True):
        if found.right == found.tokens:
            yield Finding("known", edit.where, repr(edit.target))
