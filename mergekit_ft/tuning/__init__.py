"""The training loop around the methods that train, and what comes out of it."""

from mergekit_ft.tuning.run import Tuned, tune

__all__ = ["Tuned", "tune"]
