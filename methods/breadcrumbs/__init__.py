"""Model Breadcrumbs: drop each task vector's largest and smallest entries, add up the rest."""

from mergekit_ft.methods.breadcrumbs.breadcrumbs import Breadcrumbs

__all__ = ["Breadcrumbs"]
