"""Which tensors of two checkpoints are compared, and which are stored whole; from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from mergekit_ft.errors import PlanError, SourceError
from mergekit_ft.registry import nearest
from mergekit_ft.resolution import Ref
from mergekit_ft.sources import Source
from mergekit_ft.sources.dtypes import FLOATING
from mergekit_ft.sources.layout import listed

ASKED = "asked for by --dense"


@dataclass(frozen=True)
class Choice:
    """Globs of tensor names."""

    include: tuple[str, ...] = ()  # none: every tensor
    exclude: tuple[str, ...] = ()  # left as the base has them
    dense: tuple[str, ...] = ()  # stored whole, head or norms for instance


@dataclass(frozen=True)
class Pair:
    """One tensor of the tuned model, and of the base where that has it."""

    name: str
    base: Ref | None
    tuned: Ref
    why: str = ""  # it is stored whole; "" where its entries are looked at
    also: tuple[str, ...] = ()  # other names under which the base's files hold the same tensor

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return self.tuned.info.numel

    @property
    def nbytes(self) -> int:
        """Return the bytes that one look at both takes."""
        return self.tuned.info.nbytes + (self.base.info.nbytes if self.base else 0)


@dataclass
class Pairing:
    """The tensors of two checkpoints side by side."""

    base: Source
    tuned: Source
    pairs: list[Pair] = field(default_factory=list)  # in the base's order, then new ones
    excluded: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sparse(self) -> list[Pair]:
        """Return those whose entries are looked at."""
        return [pair for pair in self.pairs if not pair.why]

    @property
    def whole(self) -> list[Pair]:
        """Return those that are stored whole if they differ."""
        return [pair for pair in self.pairs if pair.why]


def paired(base: Source, tuned: Source, choice: Choice) -> Pairing:
    """Pair every tensor; tied ones once. All faults are told at once."""
    found, faults = Pairing(base, tuned), list(_unmatched(base, tuned, choice))
    if faults:
        raise PlanError("\n".join(faults))
    aliases = _aliases(base)
    missing = []
    for name in base:
        if base.ties.get(name) in base:
            continue  # goes with the tensor that it is tied to
        held = tuned.locate(name)
        if not _chosen(name, choice):
            found.excluded.append(name)
        elif held is None:
            missing.append(name)
        else:
            ref, other = Ref(base, name, base[name]), Ref(tuned, held, tuned[held])
            also = aliases.get(name, ())
            found.pairs.append(Pair(name, ref, other, _why(name, ref, other, choice), also))
    faults = [*_untied(base, tuned, choice), *_disagreeing(base), *_disagreeing(tuned)]
    if missing:
        faults.append(
            f"{tuned.reference} lacks {len(missing)} of the tensors of {base.reference} "
            f"({listed(missing)}); --exclude leaves them as the base has them"
        )
    if faults:
        raise SourceError("\n".join(faults))
    _add_new(found, choice)
    found.notes += _notes(found)
    return found


def _chosen(name: str, choice: Choice) -> bool:
    included = not choice.include or matches(name, choice.include + choice.dense)
    return included and not matches(name, choice.exclude)


def matches(name: str, globs: Iterable[str]) -> bool:
    """Say whether a name matches one of the globs."""
    return any(fnmatchcase(name, glob) for glob in globs)


def _why(name: str, base: Ref, tuned: Ref, choice: Choice) -> str:
    """Return why a tensor that both have is stored whole; "" where its entries can be."""
    if base.info.shape != tuned.info.shape:
        return f"of shape {list(tuned.info.shape)}, {list(base.info.shape)} in the base"
    if matches(name, choice.dense):
        return ASKED
    if base.info.dtype not in FLOATING or tuned.info.dtype not in FLOATING:
        return f"of dtype {tuned.info.dtype}, whose entries have no rank"
    return ""


def _add_new(found: Pairing, choice: Choice) -> None:
    """Add the tensors that the tuned model alone has; a tied one is another's second name."""
    base, tuned = found.base, found.tuned
    for name in tuned:
        if base.locate(name) is not None or tuned.ties.get(name) in tuned:
            continue
        if _chosen(name, choice):
            ref = Ref(tuned, name, tuned[name])
            found.pairs.append(Pair(name, None, ref, "new, the base has no such tensor"))
        else:
            found.excluded.append(name)


def _unmatched(base: Source, tuned: Source, choice: Choice) -> Iterator[str]:
    """Tell of globs that match nothing, and of tensors that two of them want otherwise."""
    names = list(dict.fromkeys([*base, *tuned]))
    options = {"--include": choice.include, "--exclude": choice.exclude, "--dense": choice.dense}
    for option, globs in options.items():
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in names):
                near = nearest(glob.replace("*", ""), names) or names[:3]
                yield f"{option} {glob!r} matches no tensor; the nearest: {', '.join(near)}"
    both = [name for name in names if matches(name, choice.dense) and matches(name, choice.exclude)]
    if both:
        yield f"--dense and --exclude both match {listed(both)}; change one of them"


def _aliases(base: Source) -> Mapping[str, tuple[str, ...]]:
    """Return, by tensor, the other names under which the files hold it."""
    found: dict[str, tuple[str, ...]] = {}
    for name in base:
        to = base.ties.get(name)
        if to is not None and to in base:
            found[to] = (*found.get(to, ()), name)
    return found


def _untied(base: Source, tuned: Source, choice: Choice) -> Iterator[str]:
    """Tell of tensors that would be lost, for the base's config ties them to others."""
    for name, to in base.ties.items():
        if name in tuned and name not in tuned.ties and _chosen(name, choice):
            yield (
                f"{tuned.reference} has a {name} of its own, which {base.reference} ties to {to}, "
                f"so that it would be lost; --exclude {name} leaves it out"
            )


def _disagreeing(source: Source) -> Iterator[str]:
    for name, to in source.ties.items():
        if not source.agrees(name):
            yield (
                f"{source.reference}: {name} is tied to {to}, and its file has other values for "
                "it; mend the checkpoint, or its tie_word_embeddings"
            )


def _notes(found: Pairing) -> Iterator[str]:
    """Say what of the two models is not in the delta, or is there in another dtype."""
    other = [
        pair.name
        for pair in found.sparse
        if pair.base is not None and pair.base.info.dtype != pair.tuned.info.dtype
    ]
    if other:
        first = next(pair for pair in found.sparse if pair.name == other[0])
        assert first.base is not None
        yield (
            f"{len(other)} tensors ({listed(other)}) are {first.tuned.info.dtype} in "
            f"{found.tuned.reference} and {first.base.info.dtype} in {found.base.reference}: their "
            "values are rounded to the base's dtype; --dense stores them as they are"
        )
    if found.excluded:
        yield f"left out: {len(found.excluded)} tensors ({listed(found.excluded)})"
    for source in (found.base, found.tuned):
        yield from source.notes
    yield from (f"{pair.name}: stored whole, {pair.why}" for pair in _told(found.whole))


def _told(whole: Sequence[Pair]) -> list[Pair]:
    return [pair for pair in whole if pair.why != ASKED]
