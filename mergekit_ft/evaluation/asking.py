"""One model asked about the rows of one task."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from mergekit_ft.data.rows import Encoder, Row, Sample
from mergekit_ft.errors import SourceError
from mergekit_ft.evaluation.answering import answered, most_tokens
from mergekit_ft.evaluation.choosing import choose
from mergekit_ft.evaluation.findings import Asked, Result
from mergekit_ft.evaluation.measures import Figure, mean, perplexity, ratio
from mergekit_ft.evaluation.scoring import Watch, scored
from mergekit_ft.evaluation.tasks import Task
from mergekit_ft.models.decoding import Stop
from mergekit_ft.models.speaker import Speaker

FORCED = ("loss", "perplexity", "token_accuracy")
SPOKEN = ("exact_match", "exact_match_normalised")
CHOSEN = ("choice_accuracy", "choice_accuracy_per_token")


class Asking:
    """Asks a model what the measures of a task need, each once."""

    def __init__(
        self,
        speaker: Speaker,
        model: str,
        task: Task,
        measures: Sequence[str],
        asked: Asked,
        watch: Watch,
    ) -> None:
        self.speaker, self.model, self.task, self.asked = speaker, model, task, asked
        self.measures, self.watch = measures, watch
        self.rows = task.rows
        self.weights = [row.weight for row in task.rows]
        self.records: list[dict[str, Any]] = []
        self.told: dict[str, Any] = {}  # facts of the result

    def result(self) -> Result:
        """Return the figures; what was answered is in `records`."""
        found: dict[str, Figure] = {}
        for names, measure in ((FORCED, self._forced), (SPOKEN, self._spoken)):
            if self._wants(names):
                found |= measure()
        if self._wants(CHOSEN):
            found |= self._chosen()
        figures = {name: found[name] for name in self.measures}
        return Result(self.model, self.task.name, self._rendered(), figures, **self.told)

    def _wants(self, names: Sequence[str]) -> bool:
        return bool(set(names) & set(self.measures))

    def _rendered(self) -> str:
        if self.task.shape == "messages":
            return "chat"
        return "chat" if self.task.shape != "text" and self._encoder(None).chat else "raw"

    def _encoder(self, most: int | None) -> Encoder:
        return Encoder(self.speaker.tokenizer, self.asked.rows, most or sys.maxsize)

    def _forced(self) -> dict[str, Figure]:
        encoder = self._encoder(self.asked.max_length)
        samples = encoder.samples(self.rows)
        self._require_fit(samples)
        found = scored(self.speaker, samples, self.asked.batch, self.watch)
        counts = [float(s.tokens) for s in found]
        loss = ratio([s.nats for s in found], counts, self.weights)
        self.told |= {"scored_tokens": sum(s.tokens for s in found), "cut": len(encoder.cut)}
        return {
            "loss": loss,
            "token_accuracy": ratio([float(s.right) for s in found], counts, self.weights),
            **({"perplexity": perplexity(loss)} if "perplexity" in self.measures else {}),
        }

    def _require_fit(self, samples: Sequence[Sample]) -> None:
        most = self.speaker.most
        for row, sample in zip(self.rows, samples, strict=True):
            if most is not None and len(sample.tokens) > most:
                raise SourceError(
                    f"{row.where}: {len(sample.tokens)} tokens do not fit into {self.model}, which "
                    f"takes {most}; leave the row out, or cut rows by max_length {most}"
                )

    def _spoken(self) -> dict[str, Figure]:
        samples = self._encoder(None).samples(self.rows)
        most = most_tokens(samples, self.asked.max_new_tokens, self.rows)
        stop = Stop(self.asked.stop, most)
        found = answered(self.speaker, self.rows, samples, stop, self.asked.batch, self.watch)
        self._keep(found)
        unended = sum(a.answer.ended == "length" for a in found)
        self.told |= {"max_new_tokens": most, "unended": unended}
        return {
            "exact_match": mean((float(a.exact) for a in found), self.weights),
            "exact_match_normalised": mean((float(a.normalised) for a in found), self.weights),
        }

    def _chosen(self) -> dict[str, Figure]:
        encoder = self._encoder(None)
        found = choose(self.speaker, self.rows, encoder, self.asked.batch, self.watch, self.model)
        self._keep(found)
        summed = (float(c.summed == c.right) for c in found)
        per_token = (float(c.per_token == c.right) for c in found)
        return {
            "choice_accuracy": mean(summed, self.weights),
            "choice_accuracy_per_token": mean(per_token, self.weights),
        }

    def _keep(self, found: Sequence[Any]) -> None:
        head = {"model": self.model, "task": self.task.name}
        self.records += [head | one.report() for one in found]


def rows_of(task: Task, measures: Sequence[str]) -> int:
    """Return how many rows a model is asked, each as often as it is."""
    kinds = sum(bool(set(names) & set(measures)) for names in (FORCED, SPOKEN))
    choices = sum(_choices(task.rows)) if set(CHOSEN) & set(measures) else 0
    return kinds * len(task.rows) + choices


def _choices(rows: Sequence[Row]) -> Iterator[int]:
    return (len(row.words.get("choices", ("chosen", "rejected"))) for row in rows)
