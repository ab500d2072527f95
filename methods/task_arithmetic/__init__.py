"""Task arithmetic: the base plus a weighted sum of task vectors."""

from mergekit_ft.methods.task_arithmetic.task_arithmetic import TaskArithmetic

__all__ = ["TaskArithmetic"]
