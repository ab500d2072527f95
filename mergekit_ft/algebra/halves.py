"""The half of a model: which matrices and norms of each block a draw by category selects.

HFT (Hui et al. 2024, arXiv:2404.18466): of a block's attention matrices half, of its feed-forward
matrices two in one half of the blocks and one in the other (of three), of its norms half.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from mergekit_ft.algebra.draws import drawn
from mergekit_ft.layers import Place

ATTENTION = re.compile(r"attn|attention")
FEED_FORWARD = re.compile(r"mlp|feed_?forward|ffn|intermediate|^output|dense_h_to|dense_4h|fc\d")
NORM = re.compile(r"(?:^|[._])(?:(?:.*_)?(?:layer_?|rms_?)?norm\w*|ln(?:_\w+)?)(?:\.|$)", re.I)
Categories = dict[str, list[str]]  # "attention", "feed_forward", "norm" -> modules, in order


def half(names: Iterable[str], places: Mapping[str, Place], *key: object) -> set[str]:
    """Return the parameters of a model that are selected: half of its blocks, and all beside."""
    held = list(names)
    blocks = _blocks([name for name in held if places[name].layer is not None], places)
    more = set(drawn(blocks, len(blocks) // 2, *key))
    picked = {
        module for at, block in blocks.items() for module in _picked(block, at in more, at, *key)
    }
    return {
        name for name in held if places[name].layer is None or name.rpartition(".")[0] in picked
    }


def _picked(block: Categories, more: bool, *key: object) -> Iterator[str]:
    """Yield the modules of a block that are selected."""
    for category, modules in block.items():
        count = len(modules) // 2
        if category == "feed_forward" and len(modules) % 2:
            count += more  # of three: two in one half of the blocks, one in the other
        elif len(modules) == 1:
            count = int(more)
        yield from drawn(modules, count, category, *key)


def _blocks(names: Iterable[str], places: Mapping[str, Place]) -> dict[str, Categories]:
    """Return the categories of each block, in order, by the block's name."""
    found: dict[str, Categories] = {}
    for name in names:
        place, module = places[name], name.rpartition(".")[0]
        at = f"{place.stack}.{place.layer}"
        held = found.setdefault(at, {}).setdefault(category(module.removeprefix(f"{at}.")), [])
        if module not in held:
            held.append(module)
    return found


def category(module: str) -> str:
    """Return what a module of a block is, by its name within the block."""
    if NORM.search(module):
        return "norm"
    if ATTENTION.search(module):
        return "attention"
    return "feed_forward" if FEED_FORWARD.search(module) else "other"
