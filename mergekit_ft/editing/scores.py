"""How edits fare: what a model says of them before and after, and of all else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_ft.data.matching import normalised
from mergekit_ft.data.rows import Row
from mergekit_ft.editing.encoding import Encoder, Template
from mergekit_ft.editing.examining import ASKED, Examination, Heard, Watch
from mergekit_ft.editing.facts import Edit
from mergekit_ft.editing.judging import PROTOCOL, right
from mergekit_ft.errors import OperatorError
from mergekit_ft.evaluation.measures import Figure, mean, perplexity, ratio
from mergekit_ft.evaluation.scoring import Scored
from mergekit_ft.models.speaker import Speaker

MEASURES = {
    "reliability": "share of edits whose prompt is answered by the target",
    "generalization": "share of rephrases that are",
    "portability": "share of what follows from edits that is answered right",
    "locality": "share of prompts that are none of an edit's and are answered as before",
    "locality_tokens": "share of the tokens of those answers that are still the likeliest",
    "locality_right": "share of those prompts, of known answer, that are answered right",
    "reliability_forced": "teacher-forced: share of targets' tokens that are the likeliest",
    "reliability_forced_whole": "teacher-forced: share of targets of which every token is",
    "generalization_forced": "teacher-forced, of rephrases",
    "portability_forced": "teacher-forced, of what follows from edits",
    "perplexity": "of neutral text",
    "divergence": "KL(before || after) in neutral text, nats a token",
}
SHARES = tuple(name for name in MEASURES if name not in ("perplexity", "divergence"))


@dataclass(frozen=True)
class Scores:
    """What was found."""

    edits: int
    template: str
    asked: Mapping[str, int]  # questions of each measure
    before: Mapping[str, Figure]
    after: Mapping[str, Figure]
    answers: tuple[Mapping[str, Any], ...]  # each question, what was said, and the verdict
    unchanged: bool

    def report(self) -> dict[str, Any]:
        """Return it for JSON, answers apart."""
        told = {
            side: {name: figure.report() for name, figure in figures.items()}
            for side, figures in (("before", self.before), ("after", self.after))
        }
        meant = {name: MEASURES[name] for name in self.after}
        words = {"edits": self.edits, "template": self.template, "protocol": PROTOCOL}
        return {**words, "asked": dict(self.asked), **told, "measures": meant}


def scores(
    before: Speaker | Callable[[], Speaker],
    after: Speaker | Callable[[], Speaker],
    edits: Sequence[Edit],
    *,
    template: Template = "raw",
    neutral: Sequence[Row] | None = None,
    batch: int = 16,
    watch: Watch = lambda done: None,
) -> Scores:
    """Ask a model about its edits before and after; one given as what opens it is not kept.

    Texts are cut by the first one's tokenizer; `neutral` are rows of `text`, of ours by default.
    OperatorError where one is no edit of the other.
    """
    speaker = before() if callable(before) else before
    exam = Examination(edits, Encoder(speaker.tokenizer, template), neutral=neutral, batch=batch)
    first = exam.ask(speaker, watch=watch)
    del speaker
    return compared(exam, first, exam.ask(after() if callable(after) else after, first, watch))


def compared(exam: Examination, first: Heard, last: Heard) -> Scores:
    """Return the figures of what was heard before and after."""
    asked = {name: len(_places(exam, name)) for name in ASKED}
    return Scores(
        len(exam.edits),
        exam.encoder.template,
        {name: count for name, count in asked.items() if count},
        dict(_figures(exam, first, first)),
        dict(_figures(exam, first, last)),
        tuple(_verdicts(exam, first, last)),
        last.same,
    )


def require_changed(found: Scores) -> None:
    """Refuse an edit that changed nothing of what is said."""
    if found.unchanged:
        raise OperatorError(
            "the edit changed nothing: all answers and probabilities are what they were before"
        )


def _places(exam: Examination, measure: str) -> list[int]:
    return [i for i, question in enumerate(exam.questions) if question.measure == measure]


def _figures(exam: Examination, first: Heard, heard: Heard) -> Iterator[tuple[str, Figure]]:
    """Yield each measure that the questions allow."""
    for name in ASKED[:-1]:
        if places := _places(exam, name):
            yield name, _mean([_right(exam, heard, i) for i in places])
    if places := _places(exam, "locality"):
        yield "locality", _mean([_same(first, heard, i) for i in places])
        yield "locality_tokens", _share(heard.kept)
        if known := [i for i in places if exam.questions[i].answers]:
            yield "locality_right", _mean([_right(exam, heard, i) for i in known])
    for name in ASKED[:-1]:
        forced = [made for i in _places(exam, name) if (made := heard.forced[i]) is not None]
        if forced:
            yield f"{name}_forced", _share(forced)
        if name == "reliability":
            yield "reliability_forced_whole", _mean([s.right == s.tokens for s in forced])
    if heard.neutral:
        pairs = [(made.nats, made.tokens) for made in heard.neutral]
        yield "perplexity", perplexity(_ratio(pairs))
        yield "divergence", _ratio(heard.moved)


def _mean(hits: Sequence[bool]) -> Figure:
    return mean(map(float, hits), [1.0] * len(hits))


def _share(found: Sequence[Scored]) -> Figure:
    return _ratio([(made.right, made.tokens) for made in found])


def _ratio(pairs: Sequence[tuple[float, int]]) -> Figure:
    """Return the sum of what is counted over the sum of tokens."""
    above, below = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    return ratio(above, below, [1.0] * len(pairs))


def _right(exam: Examination, heard: Heard, place: int) -> bool:
    return right(heard.said[place].text, exam.questions[place].answers)


def _same(first: Heard, heard: Heard, place: int) -> bool:
    return normalised(first.said[place].text) == normalised(heard.said[place].text)


def _verdicts(exam: Examination, first: Heard, last: Heard) -> Iterator[dict[str, Any]]:
    for place, question in enumerate(exam.questions):
        kept = question.measure == "locality"
        hit = _same(first, last, place) if kept else _right(exam, last, place)
        yield {
            "where": question.where,
            "measure": question.measure,
            "prompt": question.prompt,
            "answers": list(question.answers),
            "before": first.said[place].text,
            "after": last.said[place].text,
            "right": hit,
        }
