"""Fine-tuning of chosen modules, by name.

What trains is named by patterns or by a file that lists them, one a line: the `sensitivity` probe
writes such a list. With the modules that differ most between tasks it is FPF (2023,
arXiv:2304.04158): after any training, tune those again on a few samples.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from mergekit_ft.learning import Selection, Subject, Tuner


class Modules(Tuner):
    """The parameters that are named train."""

    learning_rate: ClassVar[float] = 2e-5  # ours, as for full fine-tuning

    train: tuple[str, ...] | None = Field(
        None, description="patterns of the names that train: '*.mlp.*'"
    )
    freeze: tuple[str, ...] | None = Field(
        None, description="patterns of the names that do not, instead"
    )
    file: str | None = Field(None, description="a file with a pattern a line, that train, instead")

    @model_validator(mode="after")
    def _one_way(self) -> Modules:
        given = [word for word in ("train", "freeze", "file") if getattr(self, word) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of train, freeze and file, not {len(given)}")
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """Return the file of patterns, if there is one."""
        return () if self.file is None else (self.file,)

    def select(self, subject: Subject, phase: int) -> Selection:
        """Choose by name; a pattern that matches nothing is an error."""
        patterns = self._patterns()
        hits = {
            pattern: {name for name in subject.parameters if _matches(name, pattern)}
            for pattern in patterns
        }
        idle = [pattern for pattern, names in hits.items() if not names]
        if idle:
            raise ValueError(f"matches no parameter of the model: {', '.join(idle)}")
        named = set().union(*hits.values())
        wanted = self.freeze is None
        return Selection(
            whole=tuple(name for name in subject.parameters if (name in named) == wanted)
        )

    def _patterns(self) -> list[str]:
        if self.file is None:
            return list(self.train or self.freeze or ())
        text = Path(self.file).expanduser().read_text(encoding="utf-8")
        lines = [line.partition("#")[0].strip() for line in text.splitlines()]
        return [line for line in lines if line]


def _matches(name: str, pattern: str) -> bool:
    """Say whether a pattern is of this name, or of a module that it is in."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
