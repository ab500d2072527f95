"""Several models over the same calibration texts: each heard once, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mergekit_ft import __version__
from mergekit_ft.data.rows import UNSCORED
from mergekit_ft.errors import OperatorError, SourceError, WriteError
from mergekit_ft.fusing import Heard
from mergekit_ft.fusion.recording import LOGS, SAID, Recording, Shape
from mergekit_ft.fusion.texts import Texts
from mergekit_ft.models.opening import around, open_speaker
from mergekit_ft.models.speaker import ModelSpeaker
from mergekit_ft.models.streaming import Streamed
from mergekit_ft.options import Options, Progress
from mergekit_ft.plan import ModelReference
from mergekit_ft.sources import Source

PIECE = 1 << 19  # entries of a vocabulary that are computed with at a time
SPARE = 1 << 24  # bytes that are left free on a disk


@dataclass(frozen=True)
class Models:
    """The models that are heard, and what they have in common."""

    references: Mapping[str, ModelReference]  # by role
    sources: Mapping[str, Source]
    tokenizer: Any
    vocabulary: int  # logits that all have


def open_models(references: Mapping[str, ModelReference], offline: bool) -> Models:
    """Open the models' headers. SourceError where their tokens are not the same."""
    found = {role: around(reference, offline=offline) for role, reference in references.items()}
    (first, (_, tokenizer)), *rest = found.items()
    words = tokenizer.get_vocab()
    for role, (_, other) in rest:
        _require_same(first, words, role, other.get_vocab())
    sources = {role: source for role, (source, _) in found.items()}
    return Models(references, sources, tokenizer, min(map(_width, sources.values())))


def _require_same(first: str, words: dict[str, int], role: str, other: dict[str, int]) -> None:
    odd = sorted(words.items() ^ other.items())
    if odd:
        token = odd[0][0]
        told = f"{token!r} is {words.get(token, 'no token')} in {first} and "
        raise SourceError(
            f"{role}: its vocabulary is not that of {first}: {told}{other.get(token, 'no token')} "
            f"here, and {len(odd)} entries differ; logits are fused token by token"
        )


def _width(source: Source) -> int:
    """Return how many logits a model gives."""
    config = source.config or {}
    for words in (config, config.get("text_config") or {}):
        if isinstance(words.get("vocab_size"), int):
            return int(words["vocab_size"])
    raise SourceError(f"{source.reference}: config.json does not say `vocab_size`")


@dataclass
class Collection:
    """What all models said."""

    texts: Texts
    files: Mapping[str, Path]  # by role
    shape: Shape
    seconds: dict[str, float] = field(default_factory=dict)  # of models heard in this run
    targets: Tensor = field(init=False)  # (n,)
    weights: Tensor = field(init=False)  # (n,) float64

    def __post_init__(self) -> None:
        samples = [sample for part in self.texts.parts for sample in part.samples]
        came = [label for s in samples for label in s.labels[1:] if label != UNSCORED]
        self.targets = torch.tensor(came)
        self.weights = torch.tensor(self.texts.weights(), dtype=torch.float64)

    def said(self, role: str) -> Tensor:
        """Return (n,) float32 log-probabilities of what came, before rounding."""
        with safe_open(self.files[role], "pt") as file:
            found: Tensor = file.get_tensor(SAID)
        return found

    @property
    def nbytes(self) -> int:
        """Return the bytes on disk."""
        whole = len(self.shape.header()) + self.shape.nbytes
        return whole * len(set(self.files.values()))


@dataclass(frozen=True)
class Recorded:
    """Some places of a collection: a `Hearing`."""

    collection: Collection
    names: Sequence[str]  # of the experts
    spans: Sequence[tuple[int, int]]

    @property
    def experts(self) -> int:
        """Return how many experts there are."""
        return len(self.names)

    def __iter__(self) -> Iterator[Heard]:
        files = self.collection.files
        size = max(1, PIECE // self.collection.shape.vocabulary)
        with _Opened(files) as opened:
            for start, stop in self.spans:
                for at in range(start, stop, size):
                    yield self._heard(opened, slice(at, min(at + size, stop)))

    def picked(self, role: str) -> Tensor:
        """Return (n,) what was kept of the tokens that came, by one model."""
        size = max(1, PIECE // self.collection.shape.vocabulary)
        found = []
        with _Opened({role: self.collection.files[role]}) as opened:
            for start, stop in self.spans:
                for at in range(start, stop, size):
                    some = slice(at, min(at + size, stop))
                    targets = self.collection.targets[some]
                    found.append(opened.logs(role, some).gather(1, targets[:, None])[:, 0])
        return torch.cat(found)

    def _heard(self, opened: _Opened, at: slice) -> Heard:
        base = opened.logs(BASE, at)
        small = opened.logs(SMALL, at) if SMALL in self.collection.files else base
        tuned = torch.stack([opened.logs(expert(name), at) for name in self.names])
        teacher = opened.logs(TEACHER, at) if TEACHER in self.collection.files else None
        held = self.collection
        return Heard(base, small, tuned, held.targets[at], held.weights[at], teacher)


BASE, SMALL, TEACHER = "base", "small", "teacher"  # roles


def expert(name: str) -> str:
    """Return the role of an expert."""
    return f"expert {name}"


class _Opened:
    """Files that are mapped, and let go of."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files, self._stack = files, ExitStack()
        self._slices: dict[str, Any] = {}

    def __enter__(self) -> _Opened:
        for role, path in self._files.items():
            opened: Any = safe_open(path, "pt")
            self._slices[role] = self._stack.enter_context(opened).get_slice(LOGS)
        return self

    def __exit__(self, *error: object) -> None:
        self._slices.clear()
        self._stack.close()

    def logs(self, role: str, at: slice) -> Tensor:
        """Return (n, vocabulary) float32 log-probabilities."""
        found: Tensor = self._slices[role][at].float()
        return found


def collect(
    models: Models,
    texts: Texts,
    folder: Path,
    dtype: torch.dtype,
    options: Options,
    progress: Progress,
) -> Collection:
    """Hear every model at every place; what is on disk already is not asked for again."""
    shape = Shape(texts.places, models.vocabulary, dtype)
    digest = texts.digest()
    identities = {
        role: _identity(models.references[role], source, digest, shape, options)
        for role, source in models.sources.items()
    }
    found = {
        role: Recording(folder / f"{identity[:32]}.safetensors", shape, texts)
        for role, identity in identities.items()
    }
    _require_space(folder, {r.path: r for r in found.values()}.values(), shape)
    seconds: dict[str, float] = {}
    for role, recording in found.items():
        if recording.whole:
            continue
        progress.start(texts.places, f"hearing {role} ({shape.nbytes:,} bytes to keep)")
        try:
            model = _opened(models.references[role], models.sources[role], options)
            with _by(role):
                seconds[role] = recording.record(model, identities[role], progress.advance)
        finally:
            progress.close()
    return Collection(texts, {role: r.path for role, r in found.items()}, shape, seconds)


def _opened(reference: ModelReference, source: Source, options: Options) -> ModelSpeaker | Streamed:
    """Return a model in memory, or one that is read layer by layer where it is too large."""
    if 4 * sum(info.numel for info in source.values()) > options.memory:
        return Streamed(source, device=options.torch_device)
    return open_speaker(reference, device=options.torch_device, offline=options.offline)


@contextmanager
def _by(role: str) -> Iterator[None]:
    """Tell which model met an error."""
    try:
        yield
    except OperatorError as error:
        raise OperatorError(f"{role}: {error}") from error


def _identity(
    reference: ModelReference, source: Source, digest: str, shape: Shape, options: Options
) -> str:
    """Return what two recordings share exactly when one can stand for the other."""
    words: list[Any] = [__version__, str(reference), source.revision, source.fingerprint(), digest]
    words += [shape.vocabulary, str(shape.dtype), options.torch_device.type]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _require_space(folder: Path, recordings: Any, shape: Shape) -> None:
    need = SPARE + sum(max(0, shape.nbytes - recording.there) for recording in recordings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise WriteError(f"{folder}: cannot be made: {error.strerror or error}") from error
    if free < need:
        raise WriteError(
            f"{folder} has {free:,} bytes free and the logits of these models take {need:,}; make "
            "room, name a folder on another disk, or ask for fewer `positions`"
        )
