"""Training a few tensors by what comes above them alone.

Below the lowest tuned tensor nothing changes, so what comes out there is computed once a text, and
kept. Where all that trains is one matrix whose output is added to the stream as it is, that is
what the matrix is given and what its output is added to; else it is what enters the lowest tuned
layer. Each step runs the rest, and shows the head the scored places alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergekit_ft.models.shelf import BUDGET, Shelf
from mergekit_ft.models.streaming import Batch, Streamed
from mergekit_ft.teaching import Graded

Tokens = tuple[int, ...]
TOKENS = 4096  # of a batch of the caching pass
NEAR = {torch.float32: 1e-3, torch.float64: 1e-3}  # share by which what a matrix puts out may
ROUGH = 5e-2  # differ where it comes out: of other dtypes


@dataclass(frozen=True)
class Text:
    """A text, of which the tokens from `start` on are scored."""

    tokens: Tokens
    start: int
    weight: float = 1.0


@dataclass
class Climbed:
    """The layer up to which texts were read, and what left it."""

    after: tuple[int, Shelf] | None = None


class Suffix:
    """What comes above the lowest tuned tensor, and the texts that it is taught."""

    def __init__(
        self,
        streamed: Streamed,
        tuned: Mapping[str, str],
        texts: Sequence[Text],
        anchors: Sequence[Tokens] = (),
        *,
        budget: int = BUDGET,
        say: Callable[[str], None] = lambda line: None,
        climbed: Climbed | None = None,
    ) -> None:
        """`tuned` are names of the checkpoint to the model's; `anchors` must go on as before.

        `climbed` keeps how far the texts were read for suffixes of more layers, lowest first.
        """
        self.streamed, self.texts, self.say = streamed, list(texts), say
        self.tuned, self._anchors = dict(tuned), list(anchors)
        self._rows = [t.tokens for t in self.texts] + self._anchors
        source = streamed.hollow.source
        self._named = {
            name: nn.Parameter(source.tensor(known).to(streamed.device, torch.float32))
            for known, name in self.tuned.items()
        }
        self.lowest = min(self._layer_of(name) for name in self._named)
        self._kept = Shelf(budget // 2)
        self.narrow = self._cache(budget, climbed)
        self._fill()
        self._before = Shelf(budget // 8)
        self._remember()

    @property
    def count(self) -> int:
        """Return how many texts there are."""
        return len(self.texts)

    @property
    def anchors(self) -> int:
        """Return at how many prompts it should go on to say what it said."""
        return len(self._anchors)

    @property
    def masters(self) -> list[nn.Parameter]:
        """Return what trains, in float32."""
        return list(self._named.values())

    @property
    def cached(self) -> int:
        """Return the bytes that are kept of the texts, in memory and in files."""
        return self._kept.held + self._kept.filed

    def held(self) -> dict[str, Tensor]:
        """Return what was trained, by the checkpoint's names: host, float32."""
        return {k: self._named[n].detach().cpu().clone() for k, n in self.tuned.items()}

    @torch.no_grad()
    def put(self, held: Mapping[str, Tensor]) -> None:
        """Take other values for what trains."""
        for known, tensor in held.items():
            self._named[self.tuned[known]].copy_(tensor)

    def grade(self, rows: Sequence[int]) -> Graded:
        """Return how the model fares on some texts."""
        texts = [self.texts[row] for row in rows]
        places = [(i, p) for i, t in enumerate(texts) for p in range(t.start, len(t.tokens))]
        at = torch.tensor([i for i, _ in places], device=self.streamed.device)
        wanted = [texts[i].tokens[p] for i, p in places]
        logits = self._logits(rows, at, [p - 1 for _, p in places])
        losses = nn.functional.cross_entropy(
            logits, torch.tensor(wanted, device=logits.device), reduction="none"
        )
        sums = torch.zeros(len(rows), device=logits.device).index_add(0, at, losses)
        tokens = torch.bincount(at, minlength=len(rows))
        weights = torch.tensor([text.weight for text in texts], device=logits.device)
        return Graded(sums, tokens, weights)

    def drift(self, rows: Sequence[int]) -> Tensor:
        """Return the mean of KL(before || now) at the ends of some anchors."""
        before = torch.stack([self._before.get(row) for row in rows]).to(self.streamed.device)
        now = self._ends(rows)
        return (before.exp() * (before - now)).sum(dim=-1).mean()

    @torch.no_grad()
    def said(self, rows: Sequence[int]) -> list[bool]:
        """Say of which texts every scored token is the likeliest, the tokens before it given."""
        texts = [self.texts[row] for row in rows]
        places = [(i, p) for i, t in enumerate(texts) for p in range(t.start, len(t.tokens))]
        at = torch.tensor([i for i, _ in places], device=self.streamed.device)
        likeliest = self._logits(rows, at, [p - 1 for _, p in places]).argmax(dim=-1).tolist()
        right = [True] * len(rows)
        for (i, p), token in zip(places, likeliest, strict=True):
            right[i] &= texts[i].tokens[p] == token
        return right

    def _ends(self, rows: Sequence[int]) -> Tensor:
        """Return (n, vocabulary) log p of what follows some anchors."""
        shifted = [self.count + row for row in rows]
        at = torch.arange(len(rows), device=self.streamed.device)
        places = [len(self._anchors[row]) - 1 for row in rows]
        return torch.log_softmax(self._logits(shifted, at, places), dim=-1)

    @torch.no_grad()
    def _remember(self) -> None:
        for start in range(0, self.anchors, 16):
            rows = range(start, min(start + 16, self.anchors))
            for row, logs in zip(rows, self._ends(rows), strict=True):
                self._before.put(row, logs)

    def _logits(self, rows: Sequence[int], at: Tensor, places: Sequence[int]) -> Tensor:
        """Return (q, vocabulary) float32 logits of kept texts at (at, places)."""
        batch = _padded([self._rows[row] for row in rows])
        kept = [self._kept.get(row) for row in rows]
        entering = nn.utils.rnn.pad_sequence(kept, batch_first=True).to(self.streamed.device)
        where = torch.tensor(places, device=entering.device)
        weights = {name: m.to(self.streamed.dtype) for name, m in self._named.items()}
        above = self.streamed.above
        if self.narrow is None:
            return above(self.lowest - 1, batch, entering, at, where, weights).float()
        own = {name.removeprefix(f"{self.narrow}."): w for name, w in weights.items()}
        module = self.streamed.model.get_submodule(self.narrow)
        given, residual = entering[..., : self._width], entering[..., self._width :]
        leaving = residual + functional_call(module, own, (given,))
        return above(self.lowest, batch, leaving, at, where).float()

    def _layer_of(self, name: str) -> int:
        inside = name.removeprefix(f"{self.streamed.hollow.stack}.")
        return int(inside.partition(".")[0])

    def _cache(self, budget: int, climbed: Climbed | None) -> str | None:
        """Keep what comes out below; return the one matrix that trains, where that will do."""
        order = sorted(range(len(self._rows)), key=lambda row: -len(self._rows[row]))
        lots = list(_lots(order, [len(row) for row in self._rows]))
        batches = [_padded([self._rows[row] for row in lot]) for lot in lots]
        self.say(f"{len(self._rows)} texts are read up to layer {self.lowest}")
        after = climbed.after if climbed is not None else None
        states = self.streamed.run(batches, upto=self.lowest - 1, budget=budget // 2, after=after)
        alone = {name.rpartition(".")[0] for name in self._named}
        narrow = alone.pop() if len(alone) == 1 else None
        if narrow is not None:
            with torch.no_grad(), self.streamed.layer(self.lowest):
                narrow = self._keep_narrow(narrow, lots, batches, states)
        if narrow is None:
            for number, lot in enumerate(lots):
                self._keep(lot, states.get(number))
        if climbed is None:
            states.close()
        else:
            climbed.after = (self.lowest - 1, states)
        return narrow

    def _keep_narrow(
        self, path: str, lots: list[list[int]], batches: list[Batch], states: Shelf
    ) -> str | None:
        """Keep what a matrix is given and what is added to its output; None: that will not do."""
        module = self.streamed.model.get_submodule(path)
        for number, (lot, batch) in enumerate(zip(lots, batches, strict=True)):
            entering = states.get(number).to(self.streamed.device)
            found = self._apart(module, batch, entering)
            if found is None:
                return None
            given, residual, out = found
            if number == 0 and not self._adds_up(batch, entering, residual, out):
                return None
            self._width = given.shape[-1]
            self._keep(lot, torch.cat([given, residual], dim=-1))
        return path

    def _apart(
        self, module: nn.Module, batch: Batch, entering: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return what a matrix is given, what leaves its layer without it, and what it puts out."""
        seen: list[tuple[Tensor, Tensor]] = []

        def silence(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
            seen.append((given[0], out))
            return torch.zeros_like(out)

        handle = module.register_forward_hook(silence)
        try:
            residual = self.streamed.through(self.lowest, batch, entering)
        finally:
            handle.remove()
        if len(seen) != 1 or seen[0][0].shape[:2] != entering.shape[:2]:
            return None
        given, out = seen[0]
        return (given, residual, out) if out.shape == residual.shape else None

    def _adds_up(self, batch: Batch, entering: Tensor, residual: Tensor, out: Tensor) -> bool:
        """Say whether what a matrix puts out is added to the stream as it is."""
        whole = self.streamed.through(self.lowest, batch, entering)
        off = (whole.float() - residual.float() - out.float()).norm()
        return bool(off <= NEAR.get(self.streamed.dtype, ROUGH) * out.float().norm())

    def _keep(self, lot: list[int], states: Tensor) -> None:
        for i, row in enumerate(lot):
            self._kept.put(row, states[i, : len(self._rows[row])])

    def _fill(self) -> None:
        """Hold in memory what each step runs; what trains is there as masters."""
        hollow = self.streamed.hollow
        if self.narrow is not None:
            module = self.streamed.model.get_submodule(self.narrow)
            hollow.fill([n for n in hollow.within(module) if n not in self._named])
            self.streamed.fill_above(self.lowest)
            return
        self.streamed.fill_above(self.lowest - 1, without=set(self._named))


def _padded(rows: Sequence[Tokens]) -> Batch:
    """Return texts that end in padding, which no token before it looks at."""
    length = max(len(row) for row in rows)
    return Batch(torch.tensor([[*row, *[0] * (length - len(row))] for row in rows]))


def _lots(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield rows, longest first, in lots of so many tokens, padding included."""
    lot: list[int] = []
    for row in order:
        if lot and (len(lot) + 1) * lengths[lot[0]] > TOKENS:
            yield lot
            lot = []
        lot.append(row)
    if lot:
        yield lot
