"""Model Breadcrumbs with TIES: drop both tails of each task vector, merge those that agree."""

from mergekit_ft.methods.breadcrumbs_ties.breadcrumbs_ties import BreadcrumbsTies

__all__ = ["BreadcrumbsTies"]
