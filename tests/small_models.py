"""Three small models in a folder, plans over them, and the command line in this process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor

from mergekit_ft.cli import main
from mergekit_ft.sources.files import FileReader
from tests.checkpoints import write_checkpoint

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "num_hidden_layers": 3,
}
NAMES = ("base", "maths", "chat")


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder with ./base, ./maths and ./chat."""
    monkeypatch.setenv("MERGEKIT_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path)
    return tmp_path


def weights(
    seed: int, *, width: int = 8, layers: int = 3, dtype: torch.dtype = torch.float32, **extra: Any
) -> dict[str, Tensor]:
    """Return tensors under a Llama's names; `extra` tensors come last."""
    dice = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (2 * width, width)}
    for i in range(layers):
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (width, width)
        shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (2 * width, width)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (width,)
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (2 * width, width)}
    made = {name: torch.randn(s, generator=dice).to(dtype) for name, s in shapes.items()}
    return made | extra


def write_models(folder: Path, **options: Any) -> None:
    """Write base, maths and chat."""
    for seed, name in enumerate(NAMES):
        write_checkpoint(folder / name, weights(seed, **options), config=CONFIG)


def arithmetic(
    maths: str = "./maths", base: str = "./base", weight: str = "0.5", more: str = ""
) -> str:
    """Return a plan of task arithmetic with one tuned model."""
    return (
        f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n"
        f"  - {{model: {maths}, parameters: {{weight: {weight}}}}}\n{more}"
    )


def three(method: str, parameters: str, more: str = "") -> str:
    """Return a plan of both tuned models over the base."""
    return (
        f"merge_method: {method}\nbase_model: ./base\nmodels:\n"
        f"  - {{model: ./maths, parameters: {{{parameters}}}}}\n"
        f"  - {{model: ./chat, parameters: {{{parameters}}}}}\n{more}"
    )


def cli(*words: str, text: str | None = None) -> Result:
    """Run `mergekit-ft`; what it raises beyond its own exit codes is raised here."""
    result = CliRunner().invoke(main, words, input=text)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def merged(text: str, out: str = "out", *options: str) -> Result:
    """Merge by the text of a plan; it must succeed."""
    result = cli("merge", "-", out, *options, text=text)
    assert result.exit_code == 0, result.output
    return result


def refused(code: int, said: str, text: str, out: str = "out", *options: str) -> str:
    """Merge by the text of a plan; it must end in this exit code and one line that says so."""
    result = cli("merge", "-", out, *options, text=text)
    others = ("merging into", "hint: ")
    lines = [line for line in result.stderr.splitlines() if not line.startswith(others)]
    assert result.exit_code == code, result.output
    assert len(lines) == 1, lines
    assert said in lines[0]
    assert not Path(out + ".part").exists()
    return lines[0]


def no_reading(monkeypatch: Any) -> None:
    """Make every read of a weight's byte an error."""

    def read(*given: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(FileReader, "read_into", read)


def tensors(folder: str | Path = "out") -> dict[str, Tensor]:
    """Return every tensor of a checkpoint."""
    found: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_bytes(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> set[str]:
    """Return the names whose bytes are the same in both."""
    assert one.keys() == other.keys()
    return {
        name
        for name in one
        if one[name].dtype == other[name].dtype
        and torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
    }


def hashes(folder: str | Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def process(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `mergekit-ft` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mergekit_ft", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
