"""SCE: keep the places where models differ most, weigh models by their squares, merge who agree."""

from mergekit_ft.methods.sce.sce import Sce

__all__ = ["Sce"]
