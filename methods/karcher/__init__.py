"""Karcher mean: the mean of models' directions on the sphere, with their mean norm."""

from mergekit_ft.methods.karcher.karcher import Karcher

__all__ = ["Karcher"]
