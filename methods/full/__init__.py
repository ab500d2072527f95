"""Full fine-tuning: every parameter trains."""

from mergekit_ft.methods.full.full import Full

__all__ = ["Full"]
