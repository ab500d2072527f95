"""Multi-SLERP: the mean direction of models, or of task vectors, with their mean norm."""

from mergekit_ft.methods.multislerp.multislerp import Multislerp

__all__ = ["Multislerp"]
