"""Sensitivity: how far each kind of module moves along a chain of checkpoints."""

from mergekit_ft.methods.sensitivity.sensitivity import Sensitivity

__all__ = ["Sensitivity"]
