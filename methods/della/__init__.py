"""DELLA: drop the smaller entries the likelier, rescale, merge those whose sign is elected."""

from mergekit_ft.methods.della.della import Della

__all__ = ["Della"]
