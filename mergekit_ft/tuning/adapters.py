"""What comes out of a tuning that trained an adapter: a folder of peft's, or merged weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mergekit_ft import registry
from mergekit_ft.checkpoint.card import HUB_ID, fenced, joined
from mergekit_ft.errors import OperatorError
from mergekit_ft.learning import Adaptation
from mergekit_ft.lora.folder import AdapterFolder
from mergekit_ft.lora.receipts import Inputs, name_of, places, surround
from mergekit_ft.lora.words import config_words, task_type
from mergekit_ft.options import Options
from mergekit_ft.plan.tuning import TunePlan
from mergekit_ft.sources import Source, adapted
from mergekit_ft.sources.adapter import open_adapter_folder
from mergekit_ft.sources.adapter_config import NAME
from mergekit_ft.tuning.outputs import PLAN, TuneStory, training_section

FOLDER = "adapter"  # in OUT.work, where weights are merged from


def require_plain(plan: TunePlan) -> None:
    """Refuse an adapter to a model that is itself put together: nothing could load it."""
    if plan.base.adapter is not None or plan.base.delta is not None:
        raise plan.refused(
            ("output",),
            f"an adapter is to a checkpoint as it is published, and the base is {plan.base}: "
            "write `output: full` or `delta`, or save the base first",
        )


def write_adapter(
    base: Source, adaptation: Adaptation, out: Path, story: TuneStory, options: Options
) -> None:
    """Write the adapter as peft reads it, with card, lock, plan and curves; or nothing."""
    again = options.overwrite or options.resume  # what a stopped run left beside OUT goes
    with (
        AdapterFolder(out, places(base), overwrite=again) as folder,
        Inputs([base], options.workers) as inputs,
    ):
        _fill(folder, base, adaptation, options.allow_unchanged)
        folder.write(PLAN, story.plan.text)
        for name in story.curves:
            folder.write_bytes(name, (story.folder / name).read_bytes())
        words = {"plan": story.plan.text, "method": story.plan.tuner.method}
        card = _card(base, story)
        surround(folder, "tune", words, {"tuning": dict(story.facts)}, card, inputs)


def merged(base: Source, adaptation: Adaptation, work: Path) -> dict[str, Tensor]:
    """Return the tensors that the adapter changes, computed as `base + adapter` is: float32."""
    place = work / FOLDER
    with AdapterFolder(place, [], overwrite=True) as folder:
        _fill(folder, base, adaptation, False)
        folder.commit({})
    made = adapted(base, open_adapter_folder(place, str(place)))
    return {name: made.tensor(name) for name in adaptation.changes}


def _fill(
    folder: AdapterFolder, base: Source, adaptation: Adaptation, unchanged_allowed: bool
) -> None:
    """Write the weights and the config."""
    tensors = adaptation.tensors()
    _require_finite(tensors)
    if not unchanged_allowed and not adaptation.moved():
        raise OperatorError("nothing was learned: the adapter changes nothing")
    for name, tensor in tensors.items():
        folder.append(name, tensor)
    words = config_words(
        dict.fromkeys(adaptation.modules, adaptation.words["r"]),
        base=name_of(base),
        revision=base.revision,
        task=task_type(base),
        others=adaptation.others,
    )
    folder.seal({**words, **adaptation.words}, NAME)


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are no numbers."""
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise OperatorError(f"{bad[0]} is not finite: lower the learning rate, or clip")


def _card(base: Source, story: TuneStory) -> str:
    """Return the README.md of an adapter."""
    plan, name = story.plan, name_of(base)
    tuner, objective = plan.tuner.method, plan.objective.method
    on_hub = HUB_ID.fullmatch(name) and not os.path.exists(name)
    named = f"base_model: {name}\n" if on_hub else ""
    use = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{name}")\n'
        'model = PeftModel.from_pretrained(base, "PATH OF THIS FOLDER")'
    )
    return joined(
        [
            f"---\n{named}library_name: peft\ntags:\n- lora\n- mergekit-ft\n---",
            f"# {tuner} of {Path(plan.base.path).name}",
            f"An adapter to `{base}`, tuned with mergekit-ft.",
            f"- **Tuner** `{tuner}`: {registry.summary(tuner)}",
            f"- **Objective** `{objective}`: {registry.summary(objective)}",
            training_section(story.facts, story.curves),
            f"## Use\n\n{fenced(use, 'python')}",
            f"## Plan\n\n{fenced(plan.text.strip(), 'yaml')}\n\n`{PLAN}` holds the same text.",
        ]
    )
