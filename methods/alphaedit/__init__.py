"""AlphaEdit: MEMIT within the directions that the model does not use."""

from mergekit_ft.methods.alphaedit.alphaedit import AlphaEdit

__all__ = ["AlphaEdit"]
