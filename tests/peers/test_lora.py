"""Extracted factors have the products of mergekit-extract-lora's."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import tiny_llama
from tests.peers.peer import PYTHON
from tests.test_lora_extraction import extract, tuned
from tests.test_lora_merging import deltas_of

pytestmark = pytest.mark.peer


def by_mergekit(base: Path, other: Path, out: Path, rank: int) -> dict[str, Any]:
    script = PYTHON.with_name("mergekit-extract-lora")
    if not script.exists():
        pytest.skip(f"needs mergekit 0.1.5 beside {PYTHON} (MERGEKIT_PEER names another python)")
    words = ("--model", other, "--base-model", base, "--out-path", out, "--max-rank", rank)
    subprocess.run([str(script), *map(str, words)], check=True, capture_output=True)
    return deltas_of(out)


def test_the_products_are_mergekits(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    other = tuned(base, tmp_path / "tuned", lambda name: "proj" in name)
    theirs = by_mergekit(base, other, tmp_path / "theirs", 4)
    report = extract(base, other, tmp_path / "ours", "--rank", 4)
    ours = deltas_of(tmp_path / "ours")
    assert theirs.keys() == ours.keys() == {m["module"] for m in report["matrices"]}
    for module, product in ours.items():
        assert float((product - theirs[module]).abs().max()) < 2e-6, module


def test_of_bfloat16_models_ours_are_nearer_as_factors_are_not_rounded(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    other = tuned(base, tmp_path / "tuned", lambda name: "proj" in name)
    theirs = by_mergekit(base, other, tmp_path / "theirs", 4)
    report = extract(base, other, tmp_path / "ours", "--rank", 4)
    ours = deltas_of(tmp_path / "ours")
    before, after = (load_file(path / "model.safetensors") for path in (base, other))
    for matrix in report["matrices"]:
        module, name = matrix["module"], matrix["tensor"]
        change = after[name].double() - before[name].double()
        assert (change - ours[module]).norm() < (change - theirs[module]).norm()
        assert (theirs[module] - ours[module]).norm() < 0.02 * change.norm()
