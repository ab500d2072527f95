"""Model Stock: the mean of fine-tunes, drawn to the base the more they disagree."""

from mergekit_ft.methods.model_stock.model_stock import ModelStock

__all__ = ["ModelStock"]
