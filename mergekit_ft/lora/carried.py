"""Tensors that adapters hold whole: carried over where their merge is one of them, else refused."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal

from mergekit_ft.errors import SourceError
from mergekit_ft.lora.folder import AdapterFolder
from mergekit_ft.lora.members import WAY_OUT, Member, Members
from mergekit_ft.sources import TensorInfo
from mergekit_ft.sources.adapter import PREFIX
from mergekit_ft.sources.layout import listed

STEP = 1 << 20  # bytes at a time


class Carried:
    """What is kept whole of the adapters, and what is left out.

    A tensor X in place of the base's is the delta X - base. With weights w over adapters that hold
    the same X this is (sum of w) * (X - base): X itself where the weights add up to 1.
    """

    def __init__(self, held: Members, others: Literal["refuse", "skip"], *, summed: bool) -> None:
        self.held, self._summed = held, summed
        self.taken: dict[str, tuple[Member, TensorInfo]] = {}
        self.left: dict[str, str] = {}  # name -> why
        for name in sorted({name for member in held for name in member.adapter.saved}):
            why = self._obstacle(name)
            if why is None:
                member = self._holding(name)[0]
                self.taken[name] = (member, member.adapter.saved[name])
            else:
                self.left[name] = why
        if self.left and others == "refuse":
            raise SourceError(
                f"{listed(self.left)}: held whole and {next(iter(self.left.values()))}; --others "
                f"skip leaves them out, or {WAY_OUT}"
            )

    def modules(self) -> list[str]:
        """Return the modules that peft is to copy: those that the configs name."""
        named = {
            word
            for member, _ in self.taken.values()
            for word in member.words.get("modules_to_save") or ()
        }
        held = {name.rpartition(".")[0] for name in self.taken}
        return sorted(module for module in held if module.endswith(tuple(named))) if named else []

    @property
    def biased(self) -> bool:
        """Say whether biases are among them that no kept module holds."""
        kept = set(self.modules())
        return any(n.endswith("bias") and n.rpartition(".")[0] not in kept for n in self.taken)

    def write(self, folder: AdapterFolder, factored: Collection[str]) -> None:
        """Write them under the names by which peft finds them."""
        for name, (member, info) in self.taken.items():
            module, _, last = name.rpartition(".")
            inner = ".base_layer" if module in factored else ""
            runs = _runs(member, info)
            folder.append_runs(f"{PREFIX}{module}{inner}.{last}", info.dtype, info.shape, runs)

    def notes(self) -> Iterator[str]:
        """Say what was kept and what was not."""
        if self.taken:
            yield f"carried over whole: {listed(self.taken)}"
        if self.left:
            yield f"held whole and left out: {listed(self.left)}"

    def _holding(self, name: str) -> list[Member]:
        return [member for member in self.held if name in member.adapter.saved]

    def _obstacle(self, name: str) -> str | None:
        """Return why a tensor cannot be carried over; None where it can."""
        holding = self._holding(name)
        if (
            name.rpartition(".")[0] in self._copied()
            and name.rpartition(".")[0] in self.held.shapes
        ):
            return "changed by factors as well"
        if any(not _same(holding[0], other, name) for other in holding[1:]):
            return "different in the adapters, whose merge needs the base"
        if not self._summed:
            everywhere = len(holding) == len(self.held)
            return None if everywhere else "not in all adapters, and operators merge factors alone"
        total = sum(member.weight for member in holding)
        if total != 1.0:
            return f"of weight {total:g} in all, where only weight 1 needs no base"
        return None

    def _copied(self) -> set[str]:
        """Return the modules that the adapters' configs keep whole."""
        found = set()
        for member in self.held:
            named = tuple(member.words.get("modules_to_save") or ())
            modules = {name.rpartition(".")[0] for name in member.adapter.saved}
            found |= {module for module in modules if named and module.endswith(named)}
        return found


def _same(one: Member, other: Member, name: str) -> bool:
    mine, theirs = one.adapter.saved[name], other.adapter.saved[name]
    if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
        return False
    return all(a == b for a, b in zip(_runs(one, mine), _runs(other, theirs), strict=True))


def _runs(member: Member, info: TensorInfo) -> Iterator[bytearray]:
    for start in range(0, info.nbytes, STEP):
        data = bytearray(min(STEP, info.nbytes - start))
        member.adapter.reader.read_into(info, start, memoryview(data))
        yield data
