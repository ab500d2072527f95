"""What models make of rows: loss, exact match, choices, and what a chain of them forgets."""

from mergekit_ft.evaluation.chain import kept
from mergekit_ft.evaluation.findings import Evaluation
from mergekit_ft.evaluation.run import evaluate

__all__ = ["Evaluation", "evaluate", "kept"]
