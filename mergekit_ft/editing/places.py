"""Which tensors an editor that trains writes into: a layer, a part of it, or a pattern of names."""

from __future__ import annotations

from fnmatch import fnmatchcase

from mergekit_ft.editing.matrices import ENDS
from mergekit_ft.errors import PlanError, SourceError
from mergekit_ft.layers import family, places
from mergekit_ft.models.hollow import Hollow
from mergekit_ft.registry import did_you_mean
from mergekit_ft.sources.dtypes import FLOATING

WORDS = ("down_proj", "up_proj", "mlp", "attention", "layer")
STARTS = (  # what an MLP begins with, its gate apart
    "mlp.up_proj",
    "mlp.c_fc",
    "mlp.dense_h_to_4h",
    "mlp.fc_in",
    "mlp.fc1",
    "mlp.shared_expert.up_proj",
    "mlp.shared_experts.up_proj",
    "feed_forward.up_proj",
    "feed_forward.w3",
    "fc1",
)
PARTS = {
    "mlp": ("mlp.", "feed_forward.", "block_sparse_moe.", "fc1", "fc2"),
    "attention": ("self_attn.", "attn.", "attention.", "self_attention."),
    "layer": ("",),
}
DEPTH = 0.70  # of the layers: 22 of 32 and 23 of 32 in the paper
DEPTHS = {"qwen2": 6 / 28}  # by model type, where the paper found another


def usual_layer(model_type: str | None, count: int) -> int:
    """Return the layer that the paper's choices point to, by its place among `count`."""
    return min(count - 1, round(DEPTHS.get(model_type or "", DEPTH) * count))


def chosen(hollow: Hollow, layer: int, module: str, *, given: bool) -> dict[str, str]:
    """Return the tensors that are tuned: the checkpoint's names to the model's.

    `given` says that the layer was asked for, so that a pattern of names is bound to it.
    """
    count = len(hollow.layers)
    if not 0 <= layer < count:
        raise PlanError(f"layer {layer}: this model has layers 0 to {count - 1}")
    own = [n for i in range(count) for n in hollow.within(hollow.layers[i])]
    here = set(hollow.within(hollow.layers[layer]))
    pattern = module not in WORDS
    among = [n for n in own if n in here or (pattern and not given)]
    found = {name: hollow.origins(name) for name in among if _wanted(name, module, hollow)}
    if not found:
        raise PlanError(_nothing(module, among, hollow))
    for name, origins in found.items():
        _require_one(hollow, name, origins)
    return {origins[0]: name for name, origins in found.items()}


def _wanted(name: str, module: str, hollow: Hollow) -> bool:
    if module not in WORDS:
        return any(fnmatchcase(origin, module) for origin in hollow.origins(name))
    told = family(name, places([name])[name])
    if module in ("down_proj", "up_proj"):
        return told in (ENDS if module == "down_proj" else STARTS)
    return told.startswith(PARTS[module])


def _require_one(hollow: Hollow, name: str, origins: tuple[str, ...]) -> None:
    """Refuse what is no tensor of its own, or of no dtype that can be trained."""
    source = hollow.source
    if len(origins) > 1:
        raise SourceError(
            f"{source.reference}: transformers fuses {origins[0]} and {len(origins) - 1} more into "
            f"{name}, so they cannot be tuned one by one; name what the experts share, such as "
            "`module: '*.shared_expert.down_proj.weight'`, or the attention"
        )
    if len(source[origins[0]].shape) == 3:
        raise SourceError(
            f"{source.reference}: {origins[0]} holds the matrices of all experts in one tensor of "
            "three axes, of which every text sees few; name what the experts share, or the "
            "attention"
        )
    if source[origins[0]].dtype not in FLOATING:
        raise SourceError(f"{source.reference}: {origins[0]} is {source[origins[0]].dtype}")


def _nothing(module: str, among: list[str], hollow: Hollow) -> str:
    families = sorted({family(name, places([name])[name]) for name in among})
    if module in WORDS:
        return f"module {module}: the layer has no such part, but {', '.join(families)}"
    hint = did_you_mean(module, WORDS)
    return (
        f"module '{module}': no tensor of a layer has such a name{hint} (valid: "
        f"{', '.join(WORDS)}, or a pattern such as '{hollow.origins(among[0])[0]}')"
    )
