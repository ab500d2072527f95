"""TIES: trim the task vectors, elect a sign for each element, merge those that agree."""

from mergekit_ft.methods.ties.ties import Ties

__all__ = ["Ties"]
