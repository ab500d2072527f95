"""What a checkpoint holds, from its headers alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from mergekit_ft.inspection.tables import count, size, table
from mergekit_ft.layers import Place, places
from mergekit_ft.sources import Source, TensorInfo, open_source

Report = dict[str, Any]
ROLES = ("embedding", "norm", "head", "other")


def inspect(path: str, *, tensors: bool = True, **opening: Any) -> Report:
    """Return what the headers of a checkpoint say; `opening` as for a source."""
    with open_source(path, headers_only=True, **opening) as opened:
        source = opened.on_disk
        at = places(source)
        listed = [_tensor(info, at[info.name]) for info in source.values()] if tensors else None
        return _report(source, at) | ({"tensors": listed} if tensors else {})


def _report(source: Source, at: dict[str, Place]) -> Report:
    infos = list(source.values())
    return {
        "reference": source.reference,
        "revision": source.revision,
        "model_type": source.config.get("model_type"),
        "architectures": source.config.get("architectures"),
        "parameters": sum(info.numel for info in infos if _own(source, info.name)),
        "bytes": sum(info.nbytes for info in infos),
        "tensor_count": len(infos),
        "dtypes": _dtypes(infos),
        "stacks": _stacks(infos, at),
        "outside": _outside(infos, at),
        "ties": _ties(source),
        "quantisation": source.config.get("quantization_config"),
        "files": [_file(file) for file in source.files],
        "index": source.index is not None,
        "side_files": [path.as_posix() for path in source.side_files()],
        "custom_code": [path.as_posix() for path in source.code_files()],
        "weights_not_read": list(source.unread),
    }


def _own(source: Source, name: str) -> bool:
    """Say whether a tensor counts as parameters: not where it stands for another that is there."""
    return source.ties.get(name, name) not in source or name not in source.ties


def _dtypes(infos: Iterable[TensorInfo]) -> dict[str, dict[str, int]]:
    tensors: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for info in infos:
        tensors[info.dtype] += 1
        nbytes[info.dtype] += info.nbytes
    return {dtype: {"tensors": n, "bytes": nbytes[dtype]} for dtype, n in tensors.most_common()}


def _stacks(infos: Iterable[TensorInfo], at: dict[str, Place]) -> dict[str, Report]:
    """Return, by stack, its layers, the parameters in them, and whether they are alike."""
    per_layer: dict[str, Counter[int]] = defaultdict(Counter)
    for info in infos:
        place = at[info.name]
        if place.layer is not None:
            per_layer[place.stack][place.layer] += info.numel
    return {
        stack: {
            "layers": max(layers) + 1,
            "parameters": sum(layers.values()),
            "alike": len(set(layers.values())) == 1,
            "missing": [i for i in range(max(layers) + 1) if i not in layers],
        }
        for stack, layers in per_layer.items()
    }


def _outside(infos: Iterable[TensorInfo], at: dict[str, Place]) -> dict[str, list[str]]:
    """Return the tensors outside every stack by their role."""
    loose = [info.name for info in infos if at[info.name].layer is None]
    found = {role: [name for name in loose if at[name].role == role] for role in ROLES}
    return {role: names for role, names in found.items() if names}


def _ties(source: Source) -> dict[str, Report]:
    return {name: {"to": to, "stored": name in source} for name, to in sorted(source.ties.items())}


def _file(file: Any) -> Report:
    return {
        "name": file.name,
        "bytes": file.size,
        "tensors": len(file.tensors),
        "metadata": file.metadata,
    }


def _tensor(info: TensorInfo, place: Place) -> Report:
    return {
        "name": info.name,
        "dtype": info.dtype,
        "shape": list(info.shape),
        "bytes": info.nbytes,
        "file": info.file,
        "role": place.role,
        "stack": place.stack or None,
        "layer": place.layer,
    }


def lines(report: Report) -> Iterator[str]:
    """Yield a report as text."""
    revision = f" at {report['revision']}" if report["revision"] else ""
    yield f"{report['reference']}{revision}"
    named = report["architectures"]
    kind = ", ".join(named) if isinstance(named, list) else report["model_type"] or "no config.json"
    yield f"  {kind}: {report['parameters']:,} parameters, {_weight(report)}"
    for dtype, held in report["dtypes"].items():
        yield f"  {dtype}: {count(held['tensors'], 'tensor')}, {size(held['bytes'])}"
    yield from _stack_lines(report)
    for name, tie in report["ties"].items():
        stored = "both stored" if tie["stored"] else "stored once"
        yield f"  {name} is tied to {tie['to']} ({stored})"
    yield f"  quantisation: {report['quantisation'] or 'none'}"
    yield from _file_lines(report)
    if report.get("tensors"):
        yield ""
        rows = [_row(tensor) for tensor in report["tensors"]]
        yield from table(("tensor", "dtype", "shape", "size"), rows)


def _weight(report: Report) -> str:
    tensors, files = count(report["tensor_count"], "tensor"), count(len(report["files"]), "file")
    return f"{tensors}, {size(report['bytes'])} in {files}"


def _stack_lines(report: Report) -> Iterator[str]:
    for stack, held in report["stacks"].items():
        alike = "alike" if held["alike"] else "of different sizes"
        missing = f", missing {held['missing']}" if held["missing"] else ""
        layers = count(held["layers"], "layer")
        yield f"  {stack}: {layers} {alike}, {held['parameters']:,} parameters{missing}"
    for role, names in report["outside"].items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        yield f"  {role}: {', '.join(names[:4])}{more}"


def _file_lines(report: Report) -> Iterator[str]:
    for file in report["files"]:
        yield f"  {file['name']}: {count(file['tensors'], 'tensor')}, {size(file['bytes'])}"
    for key, words in (
        ("side_files", "side files"),
        ("custom_code", "custom code"),
        ("weights_not_read", "weights that are not read"),
    ):
        if report[key]:
            yield f"  {words}: {', '.join(report[key])}"


def _row(tensor: Report) -> tuple[str, str, str, str]:
    shape = "x".join(map(str, tensor["shape"])) or "scalar"
    return tensor["name"], tensor["dtype"], shape, size(tensor["bytes"])
