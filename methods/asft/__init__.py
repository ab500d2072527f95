"""ASFT: DFT held near the model before tuning by a KL term."""

from mergekit_ft.methods.asft.asft import Asft

__all__ = ["Asft"]
