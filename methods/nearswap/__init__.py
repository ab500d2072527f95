"""NearSwap: the base moved towards another model, by at most t in each element."""

from mergekit_ft.methods.nearswap.nearswap import Nearswap

__all__ = ["Nearswap"]
