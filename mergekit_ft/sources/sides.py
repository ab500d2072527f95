"""Side files: everything of a checkpoint that is not the weights."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path

from mergekit_ft.errors import SourceError
from mergekit_ft.sources.layout import read_json

WEIGHTS = (  # endings of weights, in whatever format
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".tflite",
    ".mlmodel",
    ".ot",
    ".npz",
    ".safetensors.index.json",
    ".bin.index.json",
)
NOT_OURS = re.compile(  # of other tools, other checkpoints, other runs
    r"(^|/)(\.git|\.cache|\.ipynb_checkpoints|__pycache__|checkpoint-\d+)/|(^|/)\.DS_Store$"
)
RECEIPT = "mergekit_ft.lock.json"  # of a folder that a merge made
PLAN = "mergekit_config.yml"  # the plan beside it, by the name that other tools look for
ADAPTER = re.compile(r"adapter_config\.json|adapter_model\.\w+")  # weights of another model


def side_files(names: Collection[str], fetch: Callable[[str], bytes]) -> tuple[str, ...]:
    """Choose the non-weight files out of every file, and the weights of its added modules."""
    modules = module_folders(names, fetch)
    return tuple(
        sorted(
            name
            for name in names
            if not NOT_OURS.search(name)
            and not ADAPTER.fullmatch(name)
            and (not name.endswith(WEIGHTS) or name.startswith(modules))
        )
    )


def module_folders(names: Collection[str], fetch: Callable[[str], bytes]) -> tuple[str, ...]:
    """Return the folders of modules that sentence-transformers adds after the model."""
    if "modules.json" not in names:
        return ()
    try:
        listing = read_json(b'{"modules":' + fetch("modules.json") + b"}", "modules.json")
    except SourceError:
        return ()
    found = listing["modules"] if isinstance(listing["modules"], list) else []
    paths = [part.get("path") for part in found if isinstance(part, dict)]
    return tuple(f"{path.strip('/')}/" for path in paths if isinstance(path, str) and path)


def walk(folder: Path) -> tuple[str, ...]:
    """Return every file below a folder, relative, with forward slashes; links are followed once.

    Folders that are a merge of ours are left out: they are other checkpoints.
    """
    found, seen = [], set()
    for root, below, files in os.walk(folder, followlinks=True):
        base, real = Path(root).relative_to(folder), os.path.realpath(root)
        if real in seen or (RECEIPT in files and base.parts):
            below[:] = []
            continue
        seen.add(real)
        below[:] = [name for name in below if name not in (".git", ".cache", "__pycache__")]
        found += [(base / name).as_posix() for name in files]
    return tuple(sorted(found))
