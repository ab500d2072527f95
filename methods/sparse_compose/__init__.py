"""Sparse composition: the base plus a weighted sum of sparse deltas, in no order."""

from mergekit_ft.methods.sparse_compose.sparse_compose import SparseCompose

__all__ = ["SparseCompose"]
