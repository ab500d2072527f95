"""MEMIT: facts written together into several layers, by least squares."""

from mergekit_ft.methods.memit.memit import Memit

__all__ = ["Memit"]
