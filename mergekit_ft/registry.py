"""A folder's name -> a method: listed from the disk, imported only when asked for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mergekit_ft
from mergekit_ft.errors import PlanError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from mergekit_ft.contract import Operator


GROUP = "mergekit_ft.methods"  # of entry points, and where the folders are importable


class Kind(NamedTuple):
    """A kind of method."""

    word: str  # the class that those of this kind derive from
    told: str  # what one is, for people


KINDS = {
    "adjustment": Kind("Adjustment", "a method that merges"),
    "tuner": Kind("Tuner", "a tuner, for `tuner:` of a tune plan"),
    "objective": Kind("Objective", "an objective, for `objective:` of a tune plan"),
    "editor": Kind("Editor", "an editor, for `mergekit-ft edit`"),
    "probe": Kind("Probe", "a probe, for `mergekit-ft probe`"),
    "fusion": Kind("Fusion", "a fusion of logits, for `mergekit-ft fuse fit`"),
    "operator": Kind("Operator", "a method that merges"),
}


def names(wanted: str | None = None) -> list[str]:
    """Return every method's name, or those of a kind, sorted, without importing one."""
    found = sorted({*_folders(), *_entry_points()})
    return found if wanted is None else [name for name in found if _is(name, wanted)]


def summary(name: str) -> str:
    """Return the first docstring line of a method, read without importing it."""
    import ast

    documented = ast.get_docstring(ast.parse(_module_file(name).read_text(encoding="utf-8")))
    return (documented or "").split("\n", 1)[0]


def kind(name: str) -> str:
    """Return what a method is, a key of KINDS, read without importing it.

    An "adjustment" is an operator that may also stand under `then:`.
    """
    module = _module_file(name)
    files = [file for file in (module, module.with_name(f"{name}.py")) if file.is_file()]
    bases = {base for file in files for base in _bases(file)}
    return next((kind for kind, known in KINDS.items() if known.word in bases), "operator")


@cache
def _bases(file: Path) -> frozenset[str]:
    """Return the classes that those of a module derive from."""
    import ast

    return frozenset(
        base.id
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if isinstance(base, ast.Name)
    )


def card(name: str) -> str:
    """Return a method's card: the README.md beside its module."""
    readme = _module_file(name).with_name("README.md")
    if not readme.is_file():
        raise PlanError(f"method '{name}' has no card: {readme} is missing")
    return readme.read_text(encoding="utf-8")


def method(name: str) -> type[Operator]:
    """Return the class of a method that merges; torch is imported with it."""
    found: type[Operator] = of_kind(name, "operator")
    return found


def of_kind(name: str, wanted: str) -> Any:
    """Return the class of a method of a kind, a key of KINDS; torch is imported with it."""
    _require(name, wanted)
    if name in _folders() and name in _entry_points():
        raise PlanError(f"method '{name}' is both built in and an entry point; uninstall one")
    if name in _folders():
        return _only_class(f"{GROUP}.{name}", "")
    return _only_class(_entry_points()[name].module, _entry_points()[name].attr)


def nearest(word: str, words: Iterable[str], most: int = 3) -> list[str]:
    """Return the valid words that come nearest, best first; empty when none is near."""
    from difflib import get_close_matches

    plain: dict[str, str] = {}
    for valid in words:
        plain.setdefault(_plain(valid), valid)
    return [plain[hit] for hit in get_close_matches(_plain(word), plain, n=most)]


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return "; did you mean 'weight'?", or nothing when no word is near."""
    near = nearest(word, words, most=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _plain(word: str) -> str:
    return word.lower().replace("-", "_").strip("_ ")


@lru_cache(maxsize=1)
def _folders() -> dict[str, Path]:
    """Return the method folders, in a checkout beside this package and in a wheel inside it."""
    homes = [Path(home) / "methods" for home in mergekit_ft.__path__]
    home = next((home for home in homes if (home / "__init__.py").is_file()), None)
    if home is None:
        return {}
    return {folder.name: folder for folder in home.iterdir() if (folder / "__init__.py").is_file()}


@lru_cache(maxsize=1)
def _entry_points() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=GROUP)}


def _require(name: str, wanted: str | None = None) -> None:
    """Refuse a name that no method has, or one of another kind."""
    valid = names(wanted)
    if name in valid:
        return
    if name in names():
        raise PlanError(f"{name} is {KINDS[kind(name)].told}, not {KINDS[str(wanted)].told}")
    what = "method" if wanted in (None, "operator") else wanted
    listed = f"{what}s: {', '.join(valid) or 'none'}"
    raise PlanError(f"unknown {what} '{name}'{did_you_mean(name, valid)} ({listed})")


def _is(name: str, wanted: str) -> bool:
    return kind(name) == wanted or (wanted, kind(name)) == ("operator", "adjustment")


def _module_file(name: str) -> Path:
    _require(name)
    if name in _folders():
        return _folders()[name] / "__init__.py"
    found = importlib.util.find_spec(_entry_points()[name].module)
    if found is None or not found.origin:
        raise PlanError(f"method '{name}' names a module that cannot be found")
    return Path(found.origin)


def _only_class(module_name: str, attribute: str) -> Any:
    from mergekit_ft import contract, fusing, learning, looking, rewriting

    kinds = (
        contract.Operator,
        learning.Tuner,
        learning.Objective,
        looking.Probe,
        fusing.Fusion,
        rewriting.Editor,
    )
    module = importlib.import_module(module_name)
    exported = [attribute] if attribute else list(getattr(module, "__all__", ()))
    found = [getattr(module, word, None) for word in exported]
    if len(found) != 1 or not (isinstance(found[0], type) and issubclass(found[0], kinds)):
        raise PlanError(f"{module_name} must export one method's class in __all__, not {exported}")
    return found[0]
