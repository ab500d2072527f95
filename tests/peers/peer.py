"""mergekit 0.1.5 as an oracle: a process of its own interpreter that merges on request."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("MERGEKIT_PEER") or ROOT / ".venv-peer" / "bin" / "python")
SERVER = Path(__file__).with_name("server.py")

Plan = dict[str, Any]


class PeerError(Exception):
    """What the peer said when it could not merge."""


class Peer:
    """Merges by mergekit; each answer is read back from the checkpoint that it wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.log = (folder / "log.txt").open("w")
        self.process = subprocess.Popen(
            [PYTHON, SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=folder,
        )
        self._answer()

    def merge(self, plan: Plan, **options: Any) -> dict[str, Tensor]:
        """Return the tensors of the merged checkpoint."""
        out = self.write(plan, **options)
        merged = tensors_of(out)
        shutil.rmtree(out)
        return merged

    def write(self, plan: Plan, **options: Any) -> Path:
        """Return the folder of the merged checkpoint."""
        self.count += 1
        out = self.folder / f"merge-{self.count}"
        request = {"plan": text_of(plan), "out": str(out), "options": options}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        self._answer()
        return out

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.log.close()

    def _answer(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            log = Path(self.log.name).read_text()[-2000:]
            raise RuntimeError(f"the peer died; the end of its log:\n{log}")
        error = json.loads(line)["error"]
        if error is not None:
            raise PeerError(error)


def text_of(plan: Plan) -> str:
    """Return a plan as YAML."""
    return yaml.safe_dump(plan, sort_keys=False)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def in_mergekits_words(plan: Plan, architecture: str | None) -> Plan:
    """Return the plan with each model's architecture overridden; an unknown one is inferred."""
    if architecture is None:
        return plan

    def model(path: str) -> dict[str, str]:
        return {"model": path, "override_architecture": architecture}

    entries = [{**entry, "model": model(entry["model"])} for entry in plan["models"]]
    changed = {**plan, "models": entries}
    if "base_model" in plan:
        changed["base_model"] = model(plan["base_model"])
    return changed
