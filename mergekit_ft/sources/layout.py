"""Which files of a checkpoint hold its weights, decided from names and the index."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from mergekit_ft.errors import SourceError

Fetch = Callable[[str], bytes]  # the content of a small file by its name within the folder

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<total>\d{5,})\.\w+")
NOT_A_MODEL = re.compile(  # pickles and the like that a training run leaves beside the weights
    r"training_args|optimizer|scheduler|scaler|rng_state|adapter_model|adapters|random_states"
)
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Kind:
    """The names of one way to keep weights."""

    single: str
    index: str
    suffixes: tuple[str, ...]


SAFE = Kind("model.safetensors", "model.safetensors.index.json", (".safetensors",))
PICKLE = Kind("pytorch_model.bin", "pytorch_model.bin.index.json", (".bin", ".pt", ".pth"))


@dataclass(frozen=True)
class Layout:
    """The weight files of a checkpoint, in order, and the index that names them."""

    files: tuple[str, ...]
    index: dict[str, Any] | None = None
    pickled: bool = False

    @property
    def weight_map(self) -> dict[str, str]:
        """Return the index's map from tensor to file, empty without an index."""
        return self.index["weight_map"] if self.index else {}


def weight_names(names: Collection[str], kind: Kind) -> list[str]:
    """Return the names in the folder itself that may hold a model's weights."""
    return sorted(
        name
        for name in names
        if name.endswith(kind.suffixes) and "/" not in name and not NOT_A_MODEL.match(name)
    )


def find(names: Collection[str], fetch: Fetch, where: str, kind: Kind = SAFE) -> Layout | None:
    """Choose the weight files of a kind; None when there are none."""
    weights = weight_names(names, kind)
    pickled = kind is PICKLE
    index = _index_name(names, kind, where)
    if index:
        content = read_index(fetch(index), f"{where}/{index}")
        _refuse_both(kind, weights, index, set(content["weight_map"].values()), where)
        return Layout(_named(content, names, f"{where}/{index}"), content, pickled)
    if not weights:
        return None
    sets = _shard_sets(weights)
    if kind.single in weights:
        _refuse_leftovers(kind, sets, where)
        return Layout((kind.single,), None, pickled)
    return Layout(_one_set(weights, sets, where), None, pickled)


def _index_name(names: Collection[str], kind: Kind, where: str) -> str | None:
    if kind.index in names:
        return kind.index
    ending = kind.index.removeprefix(kind.single.split(".")[0])
    others = sorted(name for name in names if name.endswith(ending) and "/" not in name)
    if len(others) > 1 and kind.single not in names:
        raise SourceError(
            f"{where}: several indexes ({', '.join(others)}): keep one, or rename it {kind.index}"
        )
    return others[0] if others and kind.single not in names else None


def _refuse_both(
    kind: Kind, weights: Collection[str], index: str, named: set[str], where: str
) -> None:
    if kind.single in weights and kind.single not in named:
        raise SourceError(
            f"{where}: holds both {kind.single} and {index}, two models in one folder "
            f"(transformers would load {kind.single}): remove {kind.single}, or the index and its "
            "shards"
        )


def _refuse_leftovers(
    kind: Kind, sets: Mapping[tuple[str, int], Mapping[int, str]], where: str
) -> None:
    stem = kind.single.split(".")[0]
    shards = [name for key, found in sets.items() if key[0] == stem for name in found.values()]
    if shards:
        raise SourceError(
            f"{where}: holds both {kind.single} and shards ({listed(shards)}), two models in one "
            f"folder (transformers would load {kind.single}): remove what is left over"
        )


def _shard_sets(weights: Collection[str]) -> dict[tuple[str, int], dict[int, str]]:
    """Group names such as model-00001-of-00003.safetensors by stem and total."""
    sets: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
    for name in weights:
        match = SHARD.fullmatch(name)
        if match:
            sets[match["stem"], int(match["total"])][int(match["number"])] = name
    return dict(sets)


def _one_set(
    weights: list[str], sets: Mapping[tuple[str, int], Mapping[int, str]], where: str
) -> tuple[str, ...]:
    sharded = sum(map(len, sets.values()))
    if len(weights) == 1 and not sets:
        return (weights[0],)
    if len(sets) != 1 or sharded != len(weights):
        raise SourceError(
            f"{where}: cannot tell which weight files are the model ({listed(weights)}): keep one "
            "set, or add its index"
        )
    (_, total), found = next(iter(sets.items()))
    wrong = sorted(found.keys() ^ set(range(1, total + 1)))
    if wrong:
        raise SourceError(
            f"{where}: shards missing (or too many): number {listed(map(str, wrong))} of {total}: "
            "fetch or save the checkpoint again"
        )
    return tuple(found[number] for number in sorted(found))


def read_index(raw: bytes, where: str) -> dict[str, Any]:
    """Parse an index and check its shape."""
    content = read_json(raw, where)
    found = content.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise SourceError(f"{where}: has no weight_map from tensors to files")
    for tensor, file in found.items():
        if not isinstance(file, str) or escapes(file):
            raise SourceError(
                f"{where}: tensor {tensor!r} is said to lie in {file!r}, which is not a file "
                "within the checkpoint's folder"
            )
    return content


def read_json(raw: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object."""
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not JSON: {str(error) or 'nested too deeply'}") from None
    if not isinstance(content, dict):
        raise SourceError(f"{where}: not a JSON object")
    return content


def escapes(name: str) -> bool:
    """Say whether a name may lead out of its folder, on any system."""
    path, windows = PurePosixPath(name), PureWindowsPath(name)
    return (
        not name.strip("/. ")
        or "\0" in name
        or "\\" in name
        or path.is_absolute()
        or bool(windows.drive or windows.root)
        or ".." in path.parts
    )


def _named(index: Mapping[str, Any], names: Collection[str], where: str) -> tuple[str, ...]:
    files = sorted(set(index["weight_map"].values()))
    missing = [name for name in files if name not in names]
    if missing:
        raise SourceError(
            f"{where}: names {len(missing)} of {len(files)} shards that are missing: "
            f"{listed(missing)}: fetch or save the checkpoint again"
        )
    return tuple(files)


def check_index(layout: Layout, held: Mapping[str, Collection[str]], where: str) -> None:
    """Check that the index and the headers (file -> tensors) name the same tensors."""
    if layout.index is None:
        return
    absent = [
        f"{tensor} ({file})"
        for tensor, file in layout.weight_map.items()
        if tensor not in held[file]
    ]
    if absent:
        raise SourceError(
            f"{where}: its index names {len(absent)} tensors that their shards do not hold: "
            f"{listed(absent)}: fetch or save the checkpoint again"
        )
    extra = [
        f"{tensor} ({file})"
        for file, tensors in held.items()
        for tensor in tensors
        if layout.weight_map.get(tensor) != file
    ]
    if extra:
        raise SourceError(
            f"{where}: its shards hold {len(extra)} tensors that its index does not name: "
            f"{listed(extra)}: save the checkpoint again"
        )


def listed(names: Any) -> str:
    """Return the first few names as text, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
