"""What editors owe: facts in, a few changed tensors out.

An editor is a pydantic model whose fields are the method's parameters. How it comes by its change
says its second class: one that trains (`teaching.Teacher`) is given a pupil, one that solves
(`recalling.Solver`) a model as memories.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Editor(BaseModel):
    """A method that writes facts into a few tensors: fields are its parameters."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False
    )

    @property
    def wants_statistics(self) -> bool:
        """Say whether it needs to know what a model's MLPs meet in text."""
        return False
