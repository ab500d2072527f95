"""The matrices that end each layer's MLP: found by name, and tried before they are trusted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergekit_ft.errors import SourceError
from mergekit_ft.layers import family
from mergekit_ft.models.layered import Layered, Look, Texts
from mergekit_ft.models.opening import Base

ENDS = (  # what they are called in a layer
    "mlp.down_proj",
    "mlp.c_proj",
    "mlp.dense_4h_to_h",
    "mlp.fc_out",
    "mlp.fc2",
    "mlp.shared_expert.down_proj",
    "mlp.shared_experts.down_proj",
    "feed_forward.down_proj",
    "feed_forward.w2",
    "fc2",
)
NEAR = 1e-3  # share by which what was put into a matrix's output may differ where it comes out


@dataclass(frozen=True)
class Matrix:
    """A matrix that an MLP ends with."""

    name: str  # in the checkpoint
    module: nn.Module
    weight: nn.Parameter  # (h, d_in), or (d_in, h) where transposed
    transposed: bool

    @property
    def width(self) -> int:
        """Return d_in, the entries of a key."""
        return int(self.weight.shape[0 if self.transposed else 1])

    @torch.no_grad()
    def answers(self, keys: Tensor) -> Tensor:
        """Return (h, n) float64 host, what comes out for (d_in, n) keys."""
        weight = self.weight.detach().double().cpu()
        out: Tensor = (weight.T if self.transposed else weight) @ keys.double()
        bias = getattr(self.module, "bias", None)
        return out if bias is None else out + bias.detach().double().cpu()[:, None]

    @torch.no_grad()
    def add(self, update: Tensor) -> None:
        """Add (h, d_in)."""
        change = update.T if self.transposed else update
        weight = self.weight.double().cpu() + change.double()
        self.weight.copy_(weight)


def matrices(base: Base, layered: Layered) -> dict[int, Matrix]:
    """Return the matrix of each layer that has one."""
    modules = {id(m.weight): m for m in base.model.modules() if hasattr(m, "weight")}
    inside = {id(p): i for i, layer in enumerate(layered.layers) for p in layer.parameters()}
    found: dict[int, Matrix] = {}
    for name, weight in base.parameters.items():
        layer = inside.get(id(weight))
        if layer is None or weight.dim() != 2 or family(name, base.places[name]) not in ENDS:
            continue
        module = modules[id(weight)]
        found[layer] = Matrix(name, module, weight, type(module).__name__ == "Conv1D")
    return found


def require(base: Base, layered: Layered, layer: int, found: dict[int, Matrix]) -> Matrix:
    """Return the matrix of a layer, if what it puts out reaches the stream as it is."""
    if layer not in found:
        names = sorted(
            {family(n, p) for n, p in base.places.items() if p.layer == layer and "mlp" in n}
        )
        raise SourceError(
            f"{base.source.reference}: layer {layer} has no one matrix that ends its MLP "
            f"({', '.join(ENDS[:3])}, ...), but {', '.join(names) or 'no MLP'}: values cannot be "
            "written here in closed form; locft_bf can edit it"
        )
    matrix = found[layer]
    if not _reaches(layered, layer, matrix):
        raise SourceError(
            f"{base.source.reference}: what {matrix.name} puts out is scaled or normalised before "
            "it joins the residual stream, so a value cannot be written into it in closed form; "
            "locft_bf can edit it"
        )
    return matrix


@torch.no_grad()
def _reaches(layered: Layered, layer: int, matrix: Matrix) -> bool:
    """Say whether what is added to a matrix's output is found in what leaves the layer."""
    device = layered.device
    tokens = torch.arange(4, device=device)[None]
    look = [Look(layered.layers[layer], out=True)]
    texts = Texts(tokens, torch.ones_like(tokens))
    (before,) = layered.look(texts, look)
    width = before.shape[-1]
    dice = torch.Generator().manual_seed(layer)
    put = torch.randn(width, generator=dice).to(before) * (before[0, -1].norm() / width**0.5)
    handle = matrix.module.register_forward_hook(lambda module, given, out: out + put)
    try:
        (after,) = layered.look(texts, look)
    finally:
        handle.remove()
    return bool((after[0, -1] - before[0, -1] - put).norm() <= NEAR * put.norm())
