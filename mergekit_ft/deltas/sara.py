"""Files of SaRA (Hu et al. 2024): {'threshold': tau, 0: values, 1: values, ...}.

The keys count a model's parameters in the order in which it declares them; the values stand where
the base's magnitude is below tau. So the base tells the places, and transformers, from its config,
the order.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from mergekit_ft.deltas.foreign import Foreign, Sparse
from mergekit_ft.errors import SourceError
from mergekit_ft.sources import Source


def read(path: Path, base: Source) -> Foreign:
    """Return what a file puts into a base."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(f"{path}: cannot be read as SaRA's: {told}") from None
    if not isinstance(held, dict) or "threshold" not in held:
        raise SourceError(f"{path}: has no `threshold`: is it SaRA's?")
    tau, names = float(held["threshold"]), _order(base)
    numbers = [key for key in held if isinstance(key, int)]
    if sorted(numbers) != list(range(len(names))):
        raise SourceError(
            f"{path}: holds {len(numbers)} parameters, {base.reference} has {len(names)}: it is "
            "of another model"
        )
    found = Foreign(str(path), parameters={"tau": tau})
    for number, name in enumerate(names):
        found.replaced[name] = _part(path, base, name, tau, held[number])
    return found


def _part(path: Path, base: Source, name: str, tau: float, values: Any) -> Sparse:
    weight = base.tensor(name)
    indices = (weight.abs().flatten() < tau).nonzero().flatten()
    if len(indices) != values.numel():
        raise SourceError(
            f"{path}: {name} has {values.numel()} values, and {len(indices)} entries of "
            f"{base.reference} are below {tau:g}: it was trained on another model, or another dtype"
        )
    kept = values.flatten().to(weight.dtype)
    changed = kept != weight.flatten()[indices]
    return Sparse(indices[changed], kept[changed])


def _order(base: Source) -> list[str]:
    """Return the base's tensors in the order of the model's parameters, tied ones once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if base.folder is None or not base.config:
        raise SourceError(f"{base.reference}: has no config.json, which tells SaRA's order")
    config = AutoConfig.from_pretrained(base.folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    found = [name for name, _ in model.named_parameters()]
    missing = [name for name in found if base.locate(name) is None]
    if missing:
        raise SourceError(f"{base.reference}: lacks {missing[0]}, a parameter of its model")
    return [base.locate(name) or name for name in found]
