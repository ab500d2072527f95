"""Merge and edit checkpoints of open models: streamed, checked, reproducible."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a checkout the method folders stand beside this package; a wheel carries them inside it.
_here = Path(__file__).resolve().parent
if not (_here / "methods").exists():
    __path__.append(str(_here.parent))

__version__ = "0.1.0"
__all__ = ["MergekitError", "__version__", "load", "merge", "open_plan"]

from mergekit_ft.errors import MergekitError  # noqa: E402  (after the path is whole)

if TYPE_CHECKING:
    from mergekit_ft.engine import merge
    from mergekit_ft.merged import load, open_plan


def __getattr__(name: str) -> Any:
    """Import the engine, and torch with it, only when it is asked for."""
    if name == "merge":
        from mergekit_ft.engine import merge

        return merge
    if name in ("load", "open_plan"):
        from mergekit_ft import merged

        return getattr(merged, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
