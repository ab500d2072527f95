"""The file of fitted weights: what is moved by how much of what, and how that was found."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_ft.errors import SourceError, WriteError
from mergekit_ft.plan import ModelReference

FORMAT, KIND = 1, "logit_fusion"


@dataclass(frozen=True)
class Weights:
    """Weights of experts, and the models that they are of."""

    base: ModelReference  # the model that is moved
    small: ModelReference | None  # what the experts were tuned from; None: base
    experts: Mapping[str, ModelReference]
    alpha: Mapping[str, float]  # by expert
    alpha_by_domain: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    story: Mapping[str, Any] = field(default_factory=dict)  # plan, calibration, diagnostics, ...

    def report(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "format_version": FORMAT,
            "kind": KIND,
            "base": _words(self.base),
            "small": None if self.small is None else _words(self.small),
            "experts": {name: _words(model) for name, model in self.experts.items()},
            "alpha": dict(self.alpha),
            "alpha_by_domain": {d: dict(a) for d, a in self.alpha_by_domain.items()},
            **self.story,
        }

    def chosen(self, domain: str | None) -> Mapping[str, float]:
        """Return the weights for all domains, or for one. SourceError where there are none."""
        if domain is None:
            return self.alpha
        if domain not in self.alpha_by_domain:
            known = ", ".join(self.alpha_by_domain) or "none"
            raise SourceError(f"no weights were fitted for domain {domain!r} (there are: {known})")
        return self.alpha_by_domain[domain]


def _words(reference: ModelReference) -> dict[str, Any]:
    return reference.model_dump(exclude_none=True)


def write_weights(weights: Weights, path: Path) -> None:
    """Write the file at once or not at all."""
    part = path.with_name(path.name + ".part")
    text = json.dumps(weights.report(), indent=2, ensure_ascii=False) + "\n"
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror or error}") from error


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Return what a file holds. SourceError where it is not one of ours, or is damaged."""
    try:
        words = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from None
    if not isinstance(words, dict) or words.get("kind") != KIND:
        raise SourceError(f"{path}: is no file of weights that `mergekit-ft fuse fit` wrote")
    if words.get("format_version") != FORMAT:
        raise SourceError(
            f"{path}: has format {words.get('format_version')}, and this version reads format "
            f"{FORMAT}: use the version that wrote it"
        )
    try:
        return _weights(words)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{path}: damaged: {error!r}; restore it, or fit again") from None


def _weights(words: dict[str, Any]) -> Weights:
    models = {name: ModelReference.model_validate(raw) for name, raw in words["experts"].items()}
    small = words["small"]
    alpha = _numbers(words["alpha"], models)
    domains = {name: _numbers(found, models) for name, found in words["alpha_by_domain"].items()}
    told = {"format_version", "kind", "base", "small", "experts", "alpha", "alpha_by_domain"}
    return Weights(
        ModelReference.model_validate(words["base"]),
        None if small is None else ModelReference.model_validate(small),
        models,
        alpha,
        domains,
        {key: value for key, value in words.items() if key not in told},
    )


def _numbers(raw: Mapping[str, Any], experts: Mapping[str, Any]) -> dict[str, float]:
    if raw.keys() != experts.keys():
        raise ValueError(f"weights of {', '.join(raw)}, experts {', '.join(experts)}")
    found = {name: float(raw[name]) for name in experts}
    if any(isinstance(raw[name], bool | str) or found[name] - found[name] for name in experts):
        raise ValueError("a weight is not a finite number")
    return found
