"""A LoRA adapter: its files, its config, and what each of its tensors is for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergekit_ft.errors import SourceError
from mergekit_ft.sources.adapter_config import NAME, AdapterConfig, read_config
from mergekit_ft.sources.files import FileReader, Reader, sha256_of_blob
from mergekit_ft.sources.header import SourceFile, TensorInfo, read_file
from mergekit_ft.sources.layout import Layout, listed, read_json

SAFE, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
BESIDE = (".json", ".jinja", ".model", ".txt")  # endings of its config and its tokenizer
PREFIX = "base_model.model."  # peft's, before the names of the model that it wraps
FACTOR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<side>[AB])\.(?P<kind>weight|bias)"
    r"|lora_embedding_(?P<table>[AB])|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)
WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save)(?=\.\w+$)")
INSIDE = "adapter"  # the folder, in the list of a source's inputs, that its files stand under


@dataclass
class Factors:
    """What changes one module by a product of low rank."""

    module: str  # as the adapter names it
    a: TensorInfo | None = None
    b: TensorInfo | None = None
    table: bool = False  # of an embedding
    bias: TensorInfo | None = None
    magnitude: TensorInfo | None = None  # of DoRA


@dataclass
class Adapter:
    """An adapter, opened."""

    reference: str
    revision: str | None  # the commit, of one on the hub
    folder: Path
    config: AdapterConfig
    reader: Reader
    tensors: dict[str, TensorInfo]
    inputs: dict[str, SourceFile]
    factors: dict[str, Factors] = field(default_factory=dict)  # by module
    saved: dict[str, TensorInfo] = field(default_factory=dict)  # whole tensors, by their name


def open_adapter_folder(
    folder: Path, reference: str, *, allow_pickle: bool = False, revision: str | None = None
) -> Adapter:
    """Open the adapter in a folder."""
    if not (folder / NAME).is_file():
        raise SourceError(f"{reference}: holds no {NAME}, so it is no adapter of peft")
    config = read_config(read_json(_bytes(folder / NAME), str(folder)), str(folder))
    file, reader = _weights(folder, reference, allow_pickle)
    tensors = {info.name: info for info in file.tensors}
    if not tensors:
        raise SourceError(f"{reference}: the adapter holds no tensors: save it again")
    stat = os.stat(folder / NAME)
    words = SourceFile(NAME, folder / NAME, stat.st_size, {}, (), stat.st_mtime_ns)
    inputs = {f"{INSIDE}/{part.path.name}": part for part in (file, words)}
    adapter = Adapter(reference, revision, folder, config, reader, tensors, inputs)
    _sort(adapter)
    return adapter


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error


def _weights(folder: Path, reference: str, allow_pickle: bool) -> tuple[SourceFile, Reader]:
    path = folder / SAFE
    if path.is_file():
        file = replace(read_file(path, SAFE), sha256=sha256_of_blob(path))
        return file, FileReader((file,))
    if not (folder / PICKLED).is_file():
        raise SourceError(f"{reference}: the adapter has no weights: no {SAFE}")
    if not allow_pickle:
        raise SourceError(
            f"{reference}: the adapter's weights are a pickle ({PICKLED}), which can run code when "
            "loaded: save it again with a newer peft, or pass --allow-pickle to read tensors from "
            "it and nothing else"
        )
    from mergekit_ft.sources.pickles import open_pickles

    files, reader, _ = open_pickles(folder, Layout((PICKLED,), None, True), {})
    return files[0], reader


def _sort(adapter: Adapter) -> None:
    """Put each tensor to its module, or among those that are whole; all misfits in one error."""
    foreign = [name for name in adapter.tensors if not name.startswith(PREFIX)]
    if foreign:
        raise SourceError(
            f"{adapter.reference}: {len(foreign)} of its tensors do not begin with {PREFIX}, as "
            f"peft writes them: {listed(foreign)}"
        )
    for name, info in adapter.tensors.items():
        rest = name.removeprefix(PREFIX)
        match = FACTOR.fullmatch(rest)
        if match is None:
            _save(adapter, WRAPPED.sub("", rest), info)
        else:
            found = adapter.factors.setdefault(match["module"], Factors(match["module"]))
            _place(found, match, info)
    broken = [problem for found in adapter.factors.values() for problem in _faults(adapter, found)]
    if broken:
        raise SourceError(f"{adapter.reference}: {'; '.join(broken[:5])}: save the adapter again")


def _save(adapter: Adapter, name: str, info: TensorInfo) -> None:
    if "lora_" in name:
        raise SourceError(
            f"{adapter.reference}: {info.name} is no part of LoRA that is known, so it has no place"
        )
    if name in adapter.saved:
        raise SourceError(
            f"{adapter.reference}: {adapter.saved[name].name} and {info.name} are "
            "both for one tensor: save the adapter again"
        )
    adapter.saved[name] = info


def _place(found: Factors, match: re.Match[str], info: TensorInfo) -> None:
    if match["magnitude"]:
        found.magnitude = info
    elif match["kind"] == "bias":
        found.bias = info
    elif (match["side"] or match["table"]) == "A":
        found.a, found.table = info, bool(match["table"])
    else:
        found.b, found.table = info, bool(match["table"])


def _faults(adapter: Adapter, found: Factors) -> Iterator[str]:
    """Yield what is missing of a module, too much, or of a shape that its config does not say."""
    config, module = adapter.config, found.module
    if found.a is None or found.b is None:
        yield f"{module} has no lora_{'A' if found.a is None else 'B'}"
        return
    if config.dora != (found.magnitude is not None):
        held = "no" if config.dora else "a"
        yield f"{module} has {held} magnitude of DoRA, but use_dora is {config.dora}"
    if config.biased and found.bias is None and not found.table:
        yield f"{module} has no bias, but lora_bias is True"
    if len(found.a.shape) != 2 or len(found.b.shape) != 2:
        yield f"{module} is a convolution (its factors are no matrices), which is not supported"
        return
    rank = config.rank_of(module)
    if found.a.shape[0] != rank or found.b.shape[1] != rank:
        shapes = f"lora_A {list(found.a.shape)} and lora_B {list(found.b.shape)}"
        yield f"{module} has {shapes}, but its rank is {rank} by {NAME}"
