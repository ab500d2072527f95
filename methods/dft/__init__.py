"""DFT: the likelihood of the answer's tokens, each weighted by its own probability."""

from mergekit_ft.methods.dft.dft import Dft

__all__ = ["Dft"]
