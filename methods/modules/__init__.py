"""Modules: tune the parameters whose names match, freeze the rest."""

from mergekit_ft.methods.modules.modules import Modules

__all__ = ["Modules"]
