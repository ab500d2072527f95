"""CorDA: what training data need most, or least, of each matrix trains as factors of low rank."""

from mergekit_ft.methods.corda.corda import Corda

__all__ = ["Corda"]
