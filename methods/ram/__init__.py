"""RAM: average what several models changed, keep whole what only one did."""

from mergekit_ft.methods.ram.ram import Ram

__all__ = ["Ram"]
