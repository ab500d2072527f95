"""Questions about edits, put to a model before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ft.data.neutral import neutral_rows
from mergekit_ft.data.rows import UNSCORED, Row, Sample
from mergekit_ft.editing.encoding import Encoded, Encoder
from mergekit_ft.editing.facts import Edit
from mergekit_ft.editing.judging import STOP
from mergekit_ft.errors import OperatorError, SourceError
from mergekit_ft.evaluation.scoring import Scored, scored
from mergekit_ft.models.decoding import Answer, answers, padded
from mergekit_ft.models.speaker import Speaker

ASKED = ("reliability", "generalization", "portability", "locality")
Watch = Callable[[int], None]  # hears of questions done


@dataclass(frozen=True)
class Question:
    """A prompt, what it measures, and its right answers; of locality there may be none."""

    measure: str  # of ASKED
    where: str
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Heard:
    """What one model said, and how far that is from what the first one said."""

    said: list[Answer]  # of each question
    forced: list[Scored | None]  # its first right answer, where there is one
    kept: list[Scored]  # the first model's answers of locality
    neutral: list[Scored]  # texts
    moved: list[tuple[float, int]]  # KL(first || this) of each neutral text, summed; its tokens
    chances: list[Tensor]  # of the first: (n, vocabulary) log-probabilities there, on the host
    same: bool  # as the first, to the last bit of the neutral texts' log-probabilities


def questions(edits: Sequence[Edit]) -> list[Question]:
    """Return all that edits are asked by."""
    found: list[Question] = []
    for edit in edits:
        target = (edit.target,)
        found.append(Question("reliability", edit.where, edit.prompt, target))
        found += [Question("generalization", edit.where, text, target) for text in edit.rephrase]
        for measure, probes in (("portability", edit.portability), ("locality", edit.locality)):
            found += [Question(measure, edit.where, p.prompt, p.answers) for p in probes]
    return found


class Examination:
    """What models are asked about edits, the unedited one first.

    Log-probabilities of the neutral texts are kept: 4 bytes x tokens x vocabulary.
    """

    def __init__(
        self,
        edits: Sequence[Edit],
        encoder: Encoder,
        *,
        neutral: Sequence[Row] | None = None,
        batch: int = 16,
    ) -> None:
        if not edits:
            raise SourceError("there are no edits to ask of")
        self.edits, self.encoder, self.batch = edits, encoder, batch
        self.questions = questions(edits)
        self.prompts = [encoder.prompt(question.prompt) for question in self.questions]
        self._forced = [self._answer(question) for question in self.questions]
        self._neutral = [self._whole(r) for r in (neutral_rows() if neutral is None else neutral)]

    def _answer(self, question: Question) -> Encoded | None:
        if not question.answers:
            return None
        return self.encoder.answered(question.prompt, question.answers[0], question.where)

    def _whole(self, row: Row) -> Sample:
        tokens = tuple(self.encoder.tokenizer(row.words["text"])["input_ids"])
        if len(tokens) < 2:
            raise SourceError(f"{row.where}: too short to measure a perplexity of")
        return Sample(tokens, (UNSCORED, *tokens[1:]))

    def ask(
        self, speaker: Speaker, first: Heard | None = None, watch: Watch = lambda done: None
    ) -> Heard:
        """Return what a model says, beside what the first one said."""
        self._require_room(speaker)
        held: dict[int, Answer] = {}
        for place, answer in answers(speaker, self.prompts, STOP, batch=self.batch):
            held[place] = answer
            watch(1)
        said = [held[place] for place in range(len(self.prompts))]
        kept = self._kept(speaker, said if first is None else first.said)
        forced, neutral = self._scored(speaker), scored(speaker, self._neutral, self.batch)
        if first is None:
            chances = [_chances(speaker, sample) for sample in self._neutral]
            moved = [(0.0, len(part)) for part in chances]
            return Heard(said, forced, kept, neutral, moved, chances, same=True)
        moved, equal = self._moved(speaker, first)
        same = equal and said == first.said
        return Heard(said, forced, kept, neutral, moved, [], same)

    def _require_room(self, speaker: Speaker) -> None:
        for question, prompt in zip(self.questions, self.prompts, strict=True):
            if not prompt or (speaker.most and len(prompt) + STOP.most > speaker.most):
                raise SourceError(
                    f"{question.where}: {len(prompt)} tokens of a prompt for {question.measure} "
                    f"and an answer of {STOP.most} do not fit into the model's {speaker.most}"
                )
        longest = max((len(sample.tokens) for sample in self._neutral), default=0)
        if speaker.most and longest > speaker.most:
            raise SourceError(
                f"a neutral text has {longest} tokens, and the model takes {speaker.most}; cut it"
            )

    def _scored(self, speaker: Speaker) -> list[Scored | None]:
        samples = [made.sample for made in self._forced if made is not None]
        found = iter(scored(speaker, samples, self.batch))
        return [None if made is None else next(found) for made in self._forced]

    def _kept(self, speaker: Speaker, said: Sequence[Answer]) -> list[Scored]:
        samples = [
            Encoded(self.prompts[place], said[place].tokens).sample
            for place, question in enumerate(self.questions)
            if question.measure == "locality"
        ]
        return scored(speaker, samples, self.batch)

    def _moved(self, speaker: Speaker, first: Heard) -> tuple[list[tuple[float, int]], bool]:
        """Return the divergences from the first model, and whether there is no difference."""
        moved, equal = [], True
        for sample, old in zip(self._neutral, first.chances, strict=True):
            new = _chances(speaker, sample)
            if new.shape != old.shape:
                raise OperatorError(
                    f"vocabularies of {old.shape[1]} and {new.shape[1]}: one model is no edit of "
                    "the other"
                )
            equal = equal and torch.equal(old, new)
            terms = torch.where(old.isneginf(), 0.0, old.exp() * (old - new))
            moved.append((float(terms.double().sum()), len(old)))
        return moved, equal


@torch.no_grad()
def _chances(speaker: Speaker, sample: Sample) -> Tensor:
    logits = speaker.read(*padded([sample.tokens], 0, left=False))[0, :-1]
    return torch.log_softmax(logits, dim=-1).cpu()
