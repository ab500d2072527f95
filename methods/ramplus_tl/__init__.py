"""RAM+: average what several models changed, strengthen what only one did."""

from mergekit_ft.methods.ramplus_tl.ramplus_tl import RamplusTl

__all__ = ["RamplusTl"]
