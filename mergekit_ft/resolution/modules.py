"""The stacks of a model by the names that `modules:` gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergekit_ft.layers import Place, role_of, stacks
from mergekit_ft.plan import Part, Reading, parts
from mergekit_ft.plan.entries import InputSlice
from mergekit_ft.plan.marks import Keys
from mergekit_ft.registry import did_you_mean
from mergekit_ft.resolution.columns import Column, slices_of
from mergekit_ft.resolution.heights import Heights
from mergekit_ft.sources import Source

DEFAULT = "default"
DECODERS = ("decoder", "language_model", "text_model", "llm", "model")
ALIASES = {  # mergekit's word -> the last part of a stack's root
    "text_decoder": ("language_model", "text_model", "llm", "model"),
    "vision_tower": ("vision_tower", "vision_model", "visual", "vision"),
}
Names = dict[str, Column]  # a column under every name that it may be called by


def columns(
    reading: Reading, donor: Source, places: Mapping[str, Place], heights: Heights
) -> list[Column]:
    """Return the columns that a plan stacks, in the order of the donor; misfits are faults."""
    assert reading.plan is not None
    found = _by_name(donor, places)
    held = parts(reading.plan)
    if not any(column.stack is not None for column in found.values()):
        message = f"{donor.reference} has no numbered layers to take slices of"
        reading.add(held[0].path, message, key=True, kind="source")
        return []
    if not reading.plan.modules:
        return _plain(reading, donor, found, held, heights)
    return _told(reading, donor, found, held, heights)


def _plain(
    reading: Reading, donor: Source, found: Names, held: Sequence[Part], heights: Heights
) -> list[Column]:
    if DEFAULT not in found or found[DEFAULT].stack is None:
        message = f"{donor.reference} has several stacks of layers ({_listed(found)}); slice each "
        reading.add(("slices",), message + "under `modules:`, by its name", key=True)
        return []
    column = found[DEFAULT]
    _fill(reading, column, held, heights)
    return [column]


def _told(
    reading: Reading, donor: Source, found: Names, held: Sequence[Part], heights: Heights
) -> list[Column]:
    assert reading.plan is not None
    said: dict[int, str] = {}
    for name in reading.plan.modules:
        if name not in found:
            hint = did_you_mean(name, found)
            message = f"{donor.reference} has no module '{name}'{hint} (it has: {_listed(found)})"
            reading.add(("modules", name), message, key=True)
            continue
        column = found[name]
        if id(column) in said:
            message = f"'{name}' is the module '{said[id(column)]}' by another name; keep one"
            reading.add(("modules", name), message, key=True)
            continue
        said[id(column)] = name
        _fill(reading, column, [part for part in held if part.module == name], heights)
    everyone = list({id(column): column for column in found.values()}.values())
    missing = [column for column in everyone if id(column) not in said]
    if missing:
        names = [next(name for name in found if found[name] is column) for column in missing]
        message = f"modules leaves out {', '.join(names)}, which would be lost; list each"
        reading.add(("modules",), message, key=True)
    return [column for column in everyone if id(column) in said]


def _fill(reading: Reading, column: Column, held: Sequence[Part], heights: Heights) -> None:
    """Put slices into a column; those that reach past a model's end are faults, and left out."""
    layers: dict[Keys, int] = {}
    kept = []
    for part in held:
        if part.sliced and column.stack is None:
            reading.add(part.path, "this module has no layers to slice; give its `models:`")
            continue
        fits = [_fits(reading, column, part, i, heights, layers) for i in range(len(part.items))]
        if all(fits) and _even(part):
            kept.append(part)
    column.slices = slices_of(kept, layers, _is_based(reading))


def _fits(
    reading: Reading,
    column: Column,
    part: Part,
    i: int,
    heights: Heights,
    layers: dict[Keys, int],
) -> bool:
    item, path = part.items[i], (*part.path, i)
    count = layers[path] = heights.layers(item.model.key, column.stack, column.words)
    if not isinstance(item, InputSlice):
        if count == layers[(*part.path, 0)]:
            return True
        message = f"{item.model} has {count} layers, {part.items[0].model} "
        message += f"{layers[(*part.path, 0)]}; take equally many with `slices:`"
        reading.add((*path, "model"), message, kind="source")
        return False
    if item.layer_range[1] <= count:
        return True
    first, end = item.layer_range
    if not count:
        message = f"{item.model} has no layers in {column.stack}, where those of the output are"
        reading.add((*path, "model"), message, kind="source")
        return False
    message = f"layer_range [{first}, {end}] reaches past the end of {item.model}, which has "
    message += f"{count} layers ({column.stack or '(top)'} 0..{count - 1})"
    if first < count:
        message += f"; the last is in [{first}, {count}]"
    reading.add((*path, "layer_range"), message, kind="source")
    return False


def _is_based(reading: Reading) -> bool:
    """Say whether the base is a model apart that each slice needs."""
    from mergekit_ft.contract import Base

    if reading.lookup is None or reading.plan is None:
        return False
    return reading.lookup.method.base is not Base.IGNORED or bool(reading.plan.then)


def _even(part: Part) -> bool:
    """Say whether its slices are of one length; where not, that has been told."""
    return len({one.layer_range[1] - one.layer_range[0] for one in part.slices}) < 2


def _listed(found: Names) -> str:
    """Return one name for each module."""
    first: dict[int, str] = {}
    for name, column in found.items():
        first.setdefault(id(column), name)
    return ", ".join(first.values())


def _by_name(donor: Source, places: Mapping[str, Place]) -> Names:
    """Return a model's columns by name, the first of each to be shown."""
    held = list(stacks(places))
    if len(held) < 2:
        stack = held[0] if held else None
        loose = frozenset(name for name in donor if not _inside(places[name], held))
        column = Column(stack, loose)
        return {DEFAULT: column} | ({stack: column} if stack else {})
    roots = {stack: _root(stack, held) for stack in held}
    groups = _loose(donor, places, roots)
    found: Names = {}
    for stack, root in roots.items():
        last = root.rpartition(".")[2]
        column = Column(stack, frozenset(groups.pop(stack, ())), _words(last))
        names = [last, root, *(word for word, ends in ALIASES.items() if last in ends), stack]
        for name in names:
            found.setdefault(name, column)
    rest = groups.pop(None, [])
    if rest:
        column = Column(None, frozenset(rest))
        heads = {name.partition(".")[0] for name in rest}
        names = [*heads, DEFAULT] if len(heads) == 1 else [DEFAULT]
        found |= {name: column for name in names if name not in found}
    return found


def _inside(place: Place, held: Sequence[str]) -> bool:
    return place.layer is not None and place.stack in held


def _root(stack: str, held: Sequence[str]) -> str:
    """Return the shortest beginning of a stack's name that no other stack has."""
    words = stack.split(".")
    for n in range(1, len(words) + 1):
        root = ".".join(words[:n])
        if not any(other != stack and f"{other}.".startswith(f"{root}.") for other in held):
            return root
    return stack


def _loose(
    donor: Source, places: Mapping[str, Place], roots: Mapping[str, str]
) -> dict[str | None, list[str]]:
    """Return the tensors outside the layers by the stack that they go with."""
    decoders = [s for s, root in roots.items() if root.rpartition(".")[2] in DECODERS]
    groups: dict[str | None, list[str]] = {}
    for name in donor:
        if _inside(places[name], list(roots)):
            continue
        own = [stack for stack, root in roots.items() if name.startswith(f"{root}.")]
        if not own and role_of(name) == "head" and len(decoders) == 1:
            own = decoders
        groups.setdefault(own[0] if own else None, []).append(name)
    return groups


def _words(last: str) -> tuple[str, ...]:
    """Return the words by which a config tells a part from the others."""
    if last in ALIASES["text_decoder"]:
        return ("text", "language", "llm")
    if last in ALIASES["vision_tower"]:
        return ("vision", "visual")
    return (last,)
