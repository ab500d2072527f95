"""A plan's text without some of its words; the rest of the text stays as it was written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import yaml

from mergekit_ft.errors import Fault
from mergekit_ft.plan import marks

Span = tuple[int, int]  # of characters of the text
_ALIAS = re.compile(r"\s*:?\s*\*[^\s,\]}]+")


def stripped(text: str, idle: Collection[Fault]) -> tuple[str, bool]:
    """Return a plan without what has no effect, and whether its comments could be kept.

    What holds nothing any more goes as well. Where a document cannot be cut (an anchor is needed
    elsewhere), the rest of it is written anew.
    """
    whole, parts, above = True, [], 0
    for part in re.split(r"(?m)^(?=---(?:\s|$))", text):  # documents, each with its mark
        last = above + part.count("\n") + (not part.endswith("\n"))
        labels = {fault.aside for fault in idle if above < fault.line <= last}
        if labels:
            part, kept = _stripped(part, labels, above)
            whole &= kept
        parts.append(part)
        above = last
    return "".join(parts), whole


def _stripped(part: str, labels: Collection[str], above: int) -> tuple[str, bool]:
    """Strip one document that has so many lines above it."""
    rest, kept = pruned("\n" * above + part, labels)
    if kept:
        return rest[above:], True
    return ("---\n" if part.startswith("---") else "") + rest, False


def pruned(text: str, labels: Collection[str]) -> tuple[str, bool]:
    """Return one document without what the labels name, and whether it could be cut."""
    wanted, _ = _without(marks.parse(text, "", last=True).value, "", labels)
    cut = _cut(text, labels)
    if marks.parse(cut, "", last=True).value == wanted:
        return cut, True
    return yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True), False


def _without(value: Any, name: str, labels: Collection[str]) -> tuple[Any, bool]:
    """Return a value without what is named, and whether something is left of it."""
    if not isinstance(value, dict | list) or not value:
        return value, True
    items = value.items() if isinstance(value, dict) else enumerate(value)
    kept = {}
    for step, item in items:
        label = below(name, step)
        rest, some = _without(item, label, labels)
        if label not in labels and some:
            kept[step] = rest
    return (kept if isinstance(value, dict) else list(kept.values())), bool(kept)


def below(name: str, step: str | int) -> str:
    """Return the label of a key or an item below another."""
    return f"{name}[{step}]" if isinstance(step, int) else f"{name}.{step}".lstrip(".")


def _cut(text: str, labels: Collection[str]) -> str:
    cutter = _Cutter(text, labels)
    if (root := yaml.compose(text, marks.Loader)) is not None:
        cutter.empties(root, "")
    rest, end = "", 0
    for start, stop in sorted(cutter.spans):
        rest += text[end : max(end, start)]
        end = max(end, stop)
    return rest + text[end:]


class _Cutter:
    """Finds the spans of a text that are to go."""

    def __init__(self, text: str, labels: Collection[str]) -> None:
        self.text, self.labels = text, labels
        self.spans: set[Span] = set()

    def empties(self, node: yaml.Node, name: str) -> bool:
        """Note the spans that go within a node; say whether nothing is left of it."""
        parts = list(self._parts(node, name))
        gone = [i for i, (label, _, value) in enumerate(parts) if self._goes(label, value, name)]
        if parts and len(gone) == len(parts):
            return True
        starts = [first for _, first, _ in parts]
        ends = [self._end(node, i) for i in range(len(parts))]
        for i in gone:
            after = next((starts[j] for j in range(i + 1, len(parts)) if j not in gone), None)
            before = next((ends[j] for j in range(i - 1, -1, -1) if j not in gone), None)
            self.spans.add(self._span(node, (starts[i], ends[i]), before, after))
        return False

    def _goes(self, label: str, value: yaml.Node, name: str) -> bool:
        return label in self.labels or self.empties(value, name if label.endswith("<<") else label)

    def _parts(self, node: yaml.Node, name: str) -> Iterator[tuple[str, int, yaml.Node]]:
        """Yield label, first character and value of each pair or item."""
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                first = item.start_mark.index
                dash = first if node.flow_style else self.text.rfind("-", 0, first)
                yield below(name, i), dash, item
        elif isinstance(node, yaml.MappingNode):
            left = Counter(str(key.value) for key, _ in node.value)
            for key, value in node.value:
                word = str(key.value)
                left[word] -= 1
                label = below(name, word)
                label = marks.earlier(label, key.start_mark.line + 1) if left[word] else label
                yield label, key.start_mark.index, value

    def _end(self, node: yaml.Node, i: int) -> int:
        """Return where the i-th pair or item of a node ends."""
        if isinstance(node, yaml.SequenceNode):
            return self._last(node.value[i])
        key, value = node.value[i]
        alias = _ALIAS.match(self.text, key.end_mark.index)
        return alias.end() if alias else self._last(value)

    def _last(self, node: yaml.Node) -> int:
        """Return where a node's last word ends, before any comment."""
        if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
            return self._end(node, len(node.value) - 1)
        start, stop = node.start_mark.index, node.end_mark.index
        return start + len(self.text[start:stop].rstrip())

    def _span(self, node: yaml.Node, own: Span, before: int | None, after: int | None) -> Span:
        """Return what goes with a pair or item, between those that stay before and after it."""
        start, stop = own
        line = self.text.rfind("\n", 0, start) + 1
        if isinstance(node, yaml.CollectionNode) and node.flow_style:
            return (start, after) if after is not None else (before or start, stop)
        if self.text[line:start].strip():  # behind the dash of an item
            return (start, after) if after is not None else own
        end = self.text.find("\n", stop)
        return line, len(self.text) if end < 0 else end + 1


def embedded(text: str) -> list[tuple[int, str]]:
    """Return the plans in the fenced blocks of a model card, each with its first line's number."""
    blocks = _blocks(text.splitlines())
    return [(line, plan) for line, plan in blocks if re.search(r"(?m)^\s*merge_method\s*:", plan)]


def _blocks(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield every fenced block of a Markdown text."""
    fence, held, first = "", list[str](), 0
    for number, line in enumerate(lines, 1):
        mark = re.match(r"\s*(`{3,}|~{3,})(.*)", line)
        if fence and mark and mark[1].startswith(fence) and not mark[2].strip():
            yield first, "\n".join(held) + "\n"
            fence = ""
        elif fence:
            held.append(line)
        elif mark:
            fence, held, first = mark[1], [], number + 1
