"""NuSLERP: two models, or their task vectors, joined along the arc between them."""

from mergekit_ft.methods.nuslerp.nuslerp import Nuslerp

__all__ = ["Nuslerp"]
