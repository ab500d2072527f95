"""Whether an output still is what its receipt says, and what its plan makes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_ft.checkpoint import lock
from mergekit_ft.errors import MergekitError, SourceError
from mergekit_ft.inspection.tables import count, size
from mergekit_ft.sources import open_source
from mergekit_ft.sources.sides import RECEIPT, walk

if TYPE_CHECKING:
    from mergekit_ft.inspection.recompute import Comparison
    from mergekit_ft.options import Progress
    from mergekit_ft.resolution import Resolution, Task

Report = dict[str, Any]
Advance = Callable[[int], None]
CHUNK = 1 << 20  # bytes hashed at a time
THREADS = 2  # that hash
SAMPLE = 16  # tensors computed again
TOLD = {"tuning": ("a training", "tune"), "editing": ("an editing", "edit")}
MEMORY = 4 << 30  # bytes that one tensor may take to compute again


def verify(
    out: Path,
    *,
    sample: int | None = SAMPLE,
    seed: int = 0,
    inputs: bool | None = None,
    memory: int = MEMORY,
    root: Path | None = None,
    offline: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Hash an output's files and its inputs', and compute a sample (None: all) of tensors again.

    `inputs` None hashes those that are there; True raises where one is not; False leaves them.
    """
    receipt = lock.read(out)
    watch = progress.advance if progress is not None else _unwatched
    if progress is not None:
        progress.start(_bytes(receipt, inputs), f"verifying {out}")
    report: Report = {"out": str(out), "method": receipt.get("method")}
    report["files"] = _files(out, receipt["outputs"], watch)
    report |= {"inputs": None, "tensors": None, "absent": None}
    if inputs is not False or sample != 0:
        report |= _against_sources(
            receipt, out, (inputs, root, offline), (sample, seed, memory), watch
        )
    parts = [report[key] for key in ("files", "inputs", "tensors") if report[key] is not None]
    return report | {"ok": not any(part["differ"] for part in parts)}


def _unwatched(nbytes: int) -> None:
    """Tell nobody."""


def _bytes(receipt: Report, inputs: bool | None) -> int:
    """Return the bytes to hash."""
    files = [receipt["outputs"], *(source["files"] for source in receipt["sources"])]
    return sum(
        file["size"] for part in files[: 1 if inputs is False else None] for file in part.values()
    )


def _against_sources(
    receipt: Report,
    out: Path,
    opening: tuple[bool | None, Path | None, bool],
    asked: tuple[int | None, int, int],
    advance: Advance,
) -> Report:
    """Hash the inputs and compute tensors again, where the sources still are what they were."""
    from mergekit_ft.inspection.recompute import Absent, reopen

    inputs, root, offline = opening
    for key, (what, command) in TOLD.items():
        if key in receipt:
            how = f"`mergekit-ft {command}` with its plan does that"
            return {"absent": f"{what} is not repeated; {how}"}
    try:
        resolution = reopen(receipt, out, root, offline=offline)
    except MergekitError as error:
        on_hub = any(source["revision"] for source in receipt["sources"])
        if inputs:
            raise
        if isinstance(error, Absent) or on_hub:
            return {"absent": str(error)}
        problem = {"file": "the plan", "problem": f"cannot be carried out any more: {error}"}
        return {"inputs": {"checked": 0, "bytes": 0, "differ": [problem]}}
    with closing(resolution):
        found = {} if inputs is False else {"inputs": _inputs(resolution, receipt, advance)}
        return found | {"tensors": _tensors(resolution, receipt, out, asked, advance)}


def _files(out: Path, recorded: Mapping[str, Mapping[str, Any]], advance: Advance) -> Report:
    wanted = [(name, out / name, file) for name, file in recorded.items()]
    extra = [name for name in walk(out) if name not in recorded and name != RECEIPT]
    return _hashed(wanted, advance) | {"extra": extra}


def _inputs(resolution: Resolution, receipt: Report, advance: Advance) -> Report:
    """Hash the weight files of every source, and compare its config."""
    if len(resolution.leaves) != len(receipt["sources"]):
        raise SourceError(f"{RECEIPT}: its sources are not those of its plan; restore it")
    entries = list(zip(resolution.leaves, receipt["sources"], strict=True))
    wanted, differ = [], []
    for source, entry in entries:
        paths = {name: file.path for name, file in source.inputs.items()}
        for name, file in entry["files"].items():
            wanted.append((f"{entry['reference']}: {name}", paths.get(name), file))
        if lock.config_digest(source) != entry.get("config"):
            differ.append({"file": f"{entry['reference']}: config.json", "problem": "has changed"})
    found = _hashed(wanted, advance)
    return found | {"differ": [*found["differ"], *differ]}


def _hashed(
    wanted: Sequence[tuple[str, Path | None, Mapping[str, Any]]], advance: Advance
) -> Report:
    """Compare each file with its recorded size and SHA-256."""
    with ThreadPoolExecutor(THREADS) as pool:
        problems = list(pool.map(lambda item: _problem(item[1], item[2], advance), wanted))
    differ = [
        {"file": item[0], "problem": problem}
        for item, problem in zip(wanted, problems, strict=True)
        if problem
    ]
    return {
        "checked": len(wanted),
        "bytes": sum(item[2]["size"] for item in wanted),
        "differ": differ,
    }


def _problem(path: Path | None, file: Mapping[str, Any], advance: Advance) -> str:
    """Say what is wrong with a file, nothing where it is what it was."""
    try:
        if path is None or not path.is_file():
            return "is missing"
        if (found := path.stat().st_size) != file["size"]:
            return f"has {found:,} bytes, not {file['size']:,}"
        return "" if _sha256(path, advance) == file["sha256"] else "has another SHA-256"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _sha256(path: Path, advance: Advance) -> str:
    sha, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(buffer):
            sha.update(buffer[:got])
            advance(got)
    return sha.hexdigest()


def _tensors(
    resolution: Resolution,
    receipt: Report,
    out: Path,
    asked: tuple[int | None, int, int],
    advance: Advance,
) -> Report:
    """Compute the sample again and compare it with what is stored."""
    from mergekit_ft.inspection.recompute import as_merged, compare, need

    sample, seed, memory = asked
    tasks = as_merged(resolution, receipt)
    fitting = [task for task in tasks if need(task) <= memory]
    skipped = [{"name": task.name, "needs": need(task)} for task in tasks if need(task) > memory]
    chosen = _sampled(fitting, sample, seed)
    found: Report = {"recomputed": len(chosen), "of": len(resolution.tasks), "seed": seed}
    found |= {"skipped": skipped, "memory": memory, "differ": []}
    try:
        with open_source(str(out)) as stored:
            for task in chosen:
                comparison = compare(task, stored, receipt)
                advance(task.bytes_read)
                found["differ"] += [] if comparison.ok else [_told(comparison)]
    except SourceError as error:
        found["differ"].append({"name": str(out), "problem": str(error)})
    return found


def _sampled(tasks: Sequence[Task], sample: int | None, seed: int) -> list[Task]:
    """Choose by the digest of seed and name, so that the choice is the same everywhere."""

    def draw(task: Task) -> bytes:
        return hashlib.sha256(f"{seed}:{task.name}".encode()).digest()

    chosen = {task.name for task in sorted(tasks, key=draw)[:sample]}
    return [task for task in tasks if task.name in chosen]


def _told(comparison: Comparison) -> Report:
    problem = comparison.problem or (
        f"differs in {comparison.differ:,} of {comparison.elements:,} elements, "
        f"by at most {comparison.largest:.3g}"
    )
    return {"name": comparison.name, "problem": problem}


def lines(report: Report) -> Iterator[str]:
    """Yield the report as text."""
    yield f"{report['out']}: {report['method']}"
    yield from _part("files", report["files"])
    for name in report["files"]["extra"]:
        yield f"  {name}: not in the receipt"
    if report["inputs"] is not None:
        yield from _part("inputs", report["inputs"])
    if report["tensors"] is not None:
        yield from _tensor_lines(report["tensors"])
    if report["absent"]:
        yield f"inputs: not checked and no tensor computed again: {report['absent']}"
    so_far = ", as far as could be checked" if report["absent"] else ""
    yield f"as recorded{so_far}" if report["ok"] else "DIFFERENT"


def _part(what: str, part: Report) -> Iterator[str]:
    held = f"{count(part['checked'], 'file')} of the receipt hashed, {size(part['bytes'])}"
    yield f"{what}: {held}; {len(part['differ']):,} differ"
    yield from _differences(part["differ"], "file")


def _tensor_lines(part: Report) -> Iterator[str]:
    total = count(part["of"], "tensor")
    yield f"tensors: {part['recomputed']:,} of {total} computed again (seed {part['seed']})"
    for skipped in part["skipped"]:
        yield (
            f"  {skipped['name']}: not computed again, it takes {size(skipped['needs'])} "
            f"(--memory {size(part['memory'])})"
        )
    yield from _differences(part["differ"], "name")


def _differences(found: Iterable[Mapping[str, str]], key: str) -> Iterator[str]:
    yield from (f"  {item[key]}: {item['problem']}" for item in found)
