"""Masked Thought: some tokens of the answer are hidden from the model's input, not its loss."""

from mergekit_ft.methods.masked_thought.masked_thought import MaskedThought

__all__ = ["MaskedThought"]
