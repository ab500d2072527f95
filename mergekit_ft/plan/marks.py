"""YAML text -> plain values, with the place of every key and value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from mergekit_ft.errors import Fault

Keys = tuple["str | int", ...]  # a path: ("models", 0, "parameters", "weight")

MOST_NODES = 100_000  # after aliases are expanded
MOST_LEVELS = 50


@dataclass(frozen=True, slots=True)
class Mark:
    """The place of one value and of its key, counted from 1; 0: not from a text."""

    line: int = 0
    column: int = 0
    key_line: int = 0
    key_column: int = 0
    text: str | None = None  # a scalar as it was written
    label: str = ""  # "models[0].parameters.weight"


class Marks(dict[Keys, Mark]):
    """The mark of every path in a tree; it follows the tree when a node is removed."""

    def nearest(self, path: Keys) -> Mark:
        """Return the mark of a path, or of the nearest thing around it."""
        while path not in self and path:
            path = path[:-1]
        return self.get(path, Mark())

    def label(self, path: Keys) -> str:
        """Return how a person would write the path."""
        return self[path].label if path in self else label(path)

    def remove(self, path: Keys) -> None:
        """Forget a node and all below it; later items of its list move up by one."""
        *_, last = path
        n = len(path)
        for old in [old for old in self if old[: n - 1] == path[:-1] and len(old) >= n]:
            step = old[n - 1]
            if step == last:
                del self[old]
            elif isinstance(step, int) and isinstance(last, int) and step > last:
                self[(*old[: n - 1], step - 1, *old[n:])] = self.pop(old)


def label(path: Keys) -> str:
    """Return how a person would write a path."""
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in path]
    return "".join(steps).lstrip(".")


def earlier(label: str, line: int) -> str:
    """Return the label of a key that is given again further down."""
    return f"{label} on line {line}"


@dataclass
class Tree:
    """What a text holds: plain values, their marks, and the faults of the text itself."""

    value: Any
    marks: Marks
    faults: list[Fault]


class _Refusal(Exception):
    """A text of which nothing can be used."""

    def __init__(self, message: str, mark: yaml.Mark | None = None) -> None:
        super().__init__(message)
        self.mark = mark


class Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-5` is a number; `no`, `on`, `12:30` and dates are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (pyyaml's own spelling)


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
for _tag, (_pattern, _first) in _SCALARS.items():
    Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
    )


def parse(text: str, file: str, *, last: bool = False) -> Tree:
    """Return the first document of a text."""
    return documents(text, file, last=last)[0]


def documents(text: str, file: str, *, last: bool = False) -> list[Tree]:
    """Return the documents of a text, at least one.

    Of a key that is given twice, the first counts, or the last.
    """
    try:
        nodes = _documents(text)
    except _Refusal as refusal:
        return [Tree(None, Marks(), [_refused(refusal, file)])]
    return [_tree(node, file, last) for node in nodes]


def _tree(node: yaml.Node, file: str, last: bool) -> Tree:
    tree = Tree(None, Marks(), [])
    try:
        _Builder(tree, file, last).build(node, (), "", None)
    except _Refusal as refusal:
        tree.value = None
        tree.faults.append(_refused(refusal, file))
    return tree


def _refused(refusal: _Refusal, file: str) -> Fault:
    return Fault(str(refusal), file, *_place(refusal.mark))


def of_value(value: Any) -> Tree:
    """Return a tree built in Python: plain containers, labels, and no places."""
    tree = Tree(None, Marks(), [])
    tree.value = _plain(value, (), tree.marks)
    return tree


def _documents(text: str) -> list[yaml.Node]:
    try:
        nodes = [node for node in yaml.compose_all(text, Loader) if not _is_empty(node)]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _Refusal(_syntax(error.problem or error.context or ""), mark) from None
    except yaml.reader.ReaderError as error:
        raise _Refusal(f"character {error.character!r} may not stand in YAML") from None
    except RecursionError:
        raise _Refusal("nested too deeply to be a plan") from None
    if not nodes:
        raise _Refusal("the plan is empty; it needs merge_method and models")
    return nodes


def _is_empty(node: Any) -> bool:
    return node is None or (isinstance(node, yaml.ScalarNode) and node.value == "")


def _syntax(problem: str) -> str:
    if "'\\t'" in problem:
        return "a tab cannot indent YAML; use spaces"
    if "mapping values are not allowed" in problem:
        return "no ': ' is expected here; check the indentation, or quote the text"
    if "could not find expected ':'" in problem:
        return "not YAML: this line is neither `key: value` nor `- item`"
    return f"not YAML: {problem}"


def _place(mark: yaml.Mark | None) -> tuple[int, int]:
    return (mark.line + 1, mark.column + 1) if mark else (0, 0)


class _Builder:
    """Expand nodes into plain values, writing down marks and faults."""

    def __init__(self, tree: Tree, file: str, last: bool) -> None:
        self.tree = tree
        self.file = file
        self.last = last
        self.nodes = 0

    def build(self, node: yaml.Node, path: Keys, name: str, key: yaml.Node | None) -> None:
        self.tree.value = self._value(node, path, name, key)

    def _value(self, node: yaml.Node, path: Keys, name: str, key: yaml.Node | None) -> Any:
        self._count(node, len(path))
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        place, key_place = _place(node.start_mark), _place((key or node).start_mark)
        self.tree.marks[path] = Mark(*place, *key_place, text, name)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, name)
        if isinstance(node, yaml.SequenceNode):
            items = enumerate(node.value)
            return [self._value(item, (*path, i), f"{name}[{i}]", None) for i, item in items]
        return self._scalar(node)

    def _count(self, node: yaml.Node, levels: int) -> None:
        self.nodes += 1
        if levels > MOST_LEVELS:
            raise _Refusal("nested too deeply, or an anchor that holds itself", node.start_mark)
        if self.nodes > MOST_NODES:
            message = f"the aliases expand to more than {MOST_NODES:,} nodes"
            raise _Refusal(message, node.start_mark)

    def _mapping(self, node: yaml.MappingNode, path: Keys, name: str) -> dict[str, Any]:
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in self._own_pairs(node):
            if key.value in found:
                first = found[key.value][0].start_mark.line + 1
                message = f"key '{key.value}' is given twice (first on line {first}); keep one"
                self._fault(message, key, aside=earlier(f"{name}.{key.value}".lstrip("."), first))
            if self.last or key.value not in found:
                found[key.value] = key, value
        for key, value in self._merged_pairs(node, len(path)):
            found.setdefault(key.value, (key, value))
        return {
            word: self._value(value, (*path, word), f"{name}.{word}".lstrip("."), key)
            for word, (key, value) in found.items()
        }

    def _own_pairs(self, node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._fault("a key must be a word", key)
            elif not key.tag.endswith(":merge"):
                yield key, value

    def _merged_pairs(
        self, node: yaml.MappingNode, level: int
    ) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """Yield what `<<` brings in, nearest first."""
        for key, value in node.value:
            if not (isinstance(key, yaml.ScalarNode) and key.tag.endswith(":merge")):
                continue
            for other in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                self._count(other, level)
                if not isinstance(other, yaml.MappingNode):
                    self._fault("`<<` takes a mapping or a list of mappings", other)
                    continue
                yield from self._own_pairs(other)
                yield from self._merged_pairs(other, level + 1)

    def _scalar(self, node: yaml.Node) -> Any:
        kind = node.tag.rpartition(":")[2]
        text: str = node.value
        try:
            if kind == "int":
                return int(text, 0 if text[:2].lower() in ("0x", "0o") else 10)
            if kind == "float":
                return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        except ValueError:
            self._fault(f"'{text[:40]}' is not a number", node)
            return text
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind not in ("null", "str", "merge"):
            self._fault(f"the tag {node.tag} has no meaning in a plan", node)
        return None if kind == "null" else text

    def _fault(self, message: str, node: yaml.Node, aside: str = "") -> None:
        place = _place(node.start_mark)
        self.tree.faults.append(Fault(message, self.file, *place, aside=aside))


def _plain(value: Any, path: Keys, marks: Marks) -> Any:
    marks[path] = Mark(label=label(path))
    if isinstance(value, dict):
        return {str(key): _plain(item, (*path, str(key)), marks) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, i), marks) for i, item in enumerate(value)]
    if isinstance(value, str | int | float) or value is None:
        return value
    number = getattr(value, "item", None)  # of numpy or torch
    return number() if callable(number) else str(value)
