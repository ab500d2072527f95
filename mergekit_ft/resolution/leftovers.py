"""What a merge leaves unread or stores otherwise, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mergekit_ft.layers import places
from mergekit_ft.plan.stages import references
from mergekit_ft.resolution.found import Resolution
from mergekit_ft.resolution.stack import runs, span
from mergekit_ft.sources import Source, TensorInfo

NAMED = 5  # tensors named before "and N more"


def unused(found: Resolution) -> dict[str, list[str]]:
    """Return, by model, the tensors that no task reads, but those that a stack leaves out."""
    rest = {s.reference: names for s, names in _unread(found).items()}
    if found.stack is not None:
        inside = [f"{column.stack}." for column in found.stack.columns if column.stack]
        rest = {
            reference: [
                name
                for name in names
                if name not in found.donor and not name.startswith(tuple(inside))
            ]
            for reference, names in rest.items()
        }
    return {reference: names for reference, names in rest.items() if names}


def untaken(found: Resolution) -> Iterator[str]:
    """Say what of each model a stack leaves out."""
    assert found.stack is not None
    for source, names in _unread(found).items():
        if len(names) == len(source):
            yield (
                f"{source.reference}: none of its tensors is in a slice; only its config and side "
                "files are used"
            )
            continue
        seats = places(source)
        for column in found.stack.columns:
            inside = (seats[name] for name in names if seats[name].stack == column.stack)
            layers = sorted({place.layer for place in inside if place.layer is not None})
            if layers and column.stack is not None:
                noun = "layer" if len(layers) == 1 else "layers"
                spans = ", ".join(map(span, runs(layers)))
                yield f"{source.reference}: {noun} {spans} of {column.stack} in no slice"
        outside = [name for name in names if name in found.donor and seats[name].layer is None]
        if outside:
            yield (
                f"{source.reference}: {named(outside)} not used: what comes before the layers is "
                "of the first slice, what comes after them of the last"
            )


def _unread(found: Resolution) -> dict[Source, list[str]]:
    read: dict[int, set[str]] = {id(source): set() for source in found.sources}
    for task in found.tasks:
        for ref in (task.base, task.copy, *task.tuned):
            if ref is not None:
                read[id(ref.source)].add(ref.name)
    rest = {s: [name for name in s if name not in read[id(s)]] for s in found.sources}
    return {source: names for source, names in rest.items() if names}


def notes(found: Resolution) -> Iterator[str]:
    """Say what is not used, and what is stored in another dtype than it was read."""
    donor = found.donor
    stored = {task.name: task.dtype for task in found.tasks}
    yield from dict.fromkeys(_overridden(found))
    yield from dict.fromkeys(note for source in found.sources for note in source.notes)
    for lacking, names in _by_lacking(found).items():
        yield f"{donor.reference}: {named(names)} copied as they are, for {lacking} has none"
    for reference, names in found.unused.items():
        others = [name for name in names if name not in found.alone]
        if others:
            yield f"{reference}: {named(others)} not in {donor.reference}, so not used"
        if len(others) < len(names):
            shared = [name for name in names if name in found.alone]
            yield f"{reference}: {named(shared)} not used, for not every model has them"
    yield from _shares(found)
    for source in found.sources:
        held = (name for name in donor if name in stored)
        other = [name for name in held if _stored_otherwise(source, donor[name])]
        if other:
            first = other[0]
            yield (
                f"{source.reference}: {named(other)} stored as {source[first].kept}, "
                f"{donor[first].kept} in {donor.reference}; the output is {stored[first]}"
            )


def _shares(found: Resolution) -> Iterator[str]:
    """Say how much is of which model, where every tensor is one model's as it is."""
    held: dict[str, int] = {}
    for task in (task for task in found.merged if task.name == task.known):
        if task.copy is None:
            return
        reference = task.copy.source.reference
        held[reference] = held.get(reference, 0) + task.numel
    total = sum(held.values())
    if len(held) > 1 and found.stack is None:
        told = (f"{size / total:.1%} {reference}" for reference, size in held.items())
        yield f"parameters are taken as they are: {', '.join(told)}"


def _overridden(found: Resolution) -> Iterator[str]:
    for _, model in references(found.plan):
        if model.override_architecture is not None:
            yield (
                f"{model}: override_architecture ({model.override_architecture}) changes nothing: "
                "tensors are matched by name and shape, for any architecture"
            )


def _by_lacking(found: Resolution) -> dict[str, list[str]]:
    """Return the donor's own tensors by the models that lack them."""
    groups: dict[str, list[str]] = {}
    for name, models in found.alone.items():
        groups.setdefault(" and ".join(models), []).append(name)
    return groups


def named(names: Sequence[str]) -> str:
    """Return a count and the first few names."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    noun = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {noun} ({', '.join(names[:NAMED])}{more})"


def _stored_otherwise(source: Source, info: TensorInfo) -> bool:
    name = source.locate(info.name)
    return name == info.name and source[name].kept != info.kept
