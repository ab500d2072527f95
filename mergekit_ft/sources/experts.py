"""Experts of a mixture: a tensor each, or all of a layer in one; read one way as the other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mergekit_ft.errors import SourceError
from mergekit_ft.sources.header import TensorInfo
from mergekit_ft.sources.pieces import Run, Runs, whole

APART = re.compile(
    r"(?P<stem>.*\.experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w[123])\.weight"
)
FUSED = re.compile(r"(?P<stem>.*\.experts)\.(?P<part>gate_up_proj|gate_proj|up_proj|down_proj)")
PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up"}
PARTS |= {"down_proj": "down", "w2": "down", "gate_up_proj": "gate_up"}


@dataclass(frozen=True)
class Seat:
    """Which expert's matrix a tensor holds."""

    stem: str  # "model.layers.0.mlp.experts"
    part: str  # gate, up, down; gate_up: both, one expert's gate before its up
    expert: int | None  # None: of all experts


def seat(name: str, shape: tuple[int, ...]) -> Seat | None:
    """Return an expert tensor's seat; None for any other tensor."""
    if len(shape) == 2 and (match := APART.fullmatch(name)):
        return Seat(match["stem"], PARTS[match["part"]], int(match["expert"]))
    if len(shape) == 3 and (match := FUSED.fullmatch(name)):
        return Seat(match["stem"], PARTS[match["part"]], None)
    return None


@dataclass
class Experts:
    """The expert tensors of a model under the names that another gives their modules."""

    reference: str
    apart: dict[tuple[str, str], dict[int, TensorInfo]] = field(default_factory=dict)
    fused: dict[tuple[str, str], TensorInfo] = field(default_factory=dict)

    def add(self, at: Seat, info: TensorInfo) -> None:
        """Add a tensor of the model."""
        if at.expert is None:
            self.fused[at.stem, at.part] = info
        else:
            self.apart.setdefault((at.stem, at.part), {})[at.expert] = info

    def count(self, at: Seat) -> int:
        """Return how many experts of a part have tensors of their own."""
        return len(self.apart.get((at.stem, at.part), ()))

    def runs(self, wanted: TensorInfo, at: Seat, count: int) -> tuple[TensorInfo, Runs] | None:
        """Return the bytes that make a tensor of a model of so many experts; None without any."""
        if at.expert is None:
            return self._stacked(wanted, at, count)
        return self._cut(wanted, at, at.expert, count)

    def _stacked(
        self, wanted: TensorInfo, at: Seat, wanted_count: int
    ) -> tuple[TensorInfo, Runs] | None:
        parts = ("gate", "up") if at.part == "gate_up" else (at.part,)
        held = [self.apart.get((at.stem, part)) for part in parts]
        if not all(held):
            return None
        count = max(map(len, filter(None, held)))
        infos = [group[e] for e in range(count) for group in held if group and e in group]
        if len(infos) != count * len(parts):
            raise SourceError(f"{self.reference}: {at.stem} lacks tensors of some experts")
        self._require_count(count, wanted_count, at)
        rows, columns = infos[0].shape
        made = (count, rows * len(parts), columns)
        self._require(infos, made, wanted)
        return _like(wanted, infos[0]), tuple(run for info in infos for run in whole(info))

    def _cut(
        self, wanted: TensorInfo, at: Seat, expert: int, count: int
    ) -> tuple[TensorInfo, Runs] | None:
        held = self.apart.get((at.stem, at.part), {}).get(expert)
        if held is not None:  # only its name is another
            return _like(wanted, held), whole(held)
        share, place = 1, 0
        info = self.fused.get((at.stem, at.part))
        if info is None and at.part in ("gate", "up"):
            share, place = 2, int(at.part == "up")
            info = self.fused.get((at.stem, "gate_up"))
        if info is None:
            return None
        self._require_count(info.shape[0], count, at)
        rows, columns = wanted.shape
        made = (info.shape[0], rows * share, columns)
        self._require([info], made, wanted, info.shape)
        nbytes = info.nbytes // (info.shape[0] * share)
        return _like(wanted, info), (Run(info.name, (expert * share + place) * nbytes, nbytes),)

    def _require_count(self, held: int, wanted: int, at: Seat) -> None:
        if held != wanted:
            raise SourceError(
                f"{self.reference}: {at.stem} has {held} experts, not {wanted}: models of as many "
                "experts merge"
            )

    def _require(
        self,
        infos: Iterable[TensorInfo],
        made: tuple[int, ...],
        wanted: TensorInfo,
        fused: tuple[int, ...] | None = None,
    ) -> None:
        """Refuse what cannot be stacked, or lies the other way round."""
        infos, found = list(infos), fused or wanted.shape
        if made != found:
            other_way = (made[0], made[2], made[1]) == found
            problem = (
                "the fused experts are transposed, which is not supported"
                if other_way
                else f"{list(made)} would be needed, and it is {list(found)}"
            )
            raise SourceError(
                f"{self.reference}: the experts {infos[0].name} and {wanted.name} lie in different "
                f"layouts, and {problem}; save both models in one layout"
            )
        if len({(info.dtype, info.shape) for info in infos}) > 1:
            raise SourceError(
                f"{self.reference}: the experts stacked for {wanted.name} have several shapes or "
                "dtypes; save them alike"
            )


def experts(reference: str, infos: Mapping[str, TensorInfo]) -> Experts:
    """Return the experts among tensors, by the name that each is to have."""
    found = Experts(reference)
    for name, info in infos.items():
        at = seat(name, info.shape)
        if at is not None:
            found.add(at, info)
    return found


def _like(wanted: TensorInfo, held: TensorInfo) -> TensorInfo:
    """Return what is known of a tensor as wanted, in the dtype that is held."""
    size = held.nbytes // max(1, held.numel)
    return TensorInfo(
        wanted.name, held.dtype, wanted.shape, held.file, 0, wanted.numel * size, held.stored
    )
