"""The phases of a tuning, each a training of its own; a stopped run goes on where it was."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PrinterCallback, TrainingArguments

from mergekit_ft.data.batches import Collator, Groups, batches, grouped
from mergekit_ft.data.rows import Encoder, read_rows
from mergekit_ft.errors import OperatorError
from mergekit_ft.learning import (
    Adaptation,
    Batch,
    Misfit,
    Objective,
    Pace,
    Selection,
    Subject,
    Tuner,
)
from mergekit_ft.models.opening import Base
from mergekit_ft.options import Options
from mergekit_ft.plan.tuning import TunePlan
from mergekit_ft.registry import did_you_mean
from mergekit_ft.tuning.company import Company
from mergekit_ft.tuning.trained import Trained
from mergekit_ft.tuning.trainer import TuningTrainer, Work
from mergekit_ft.tuning.watching import CURVES, Curves, Paced

START, DONE = "start.safetensors", "done.safetensors"  # of a phase
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class Phases:
    """Trains a model as a plan asks."""

    def __init__(
        self,
        plan: TunePlan,
        tuner: Tuner,
        objective: Objective,
        base: Base,
        train: Groups,
        validation: Groups,
        options: Options,
        work: Path,
        show: str,
        company: Company,
    ) -> None:
        self.plan, self.tuner, self.base = plan, tuner, base
        self.samples, self.validation, self.work, self.show = train, validation, work, show
        self.company = company
        self.device = company.device or options.torch_device
        self.entries: list[dict[str, Any]] = []  # the curves
        self.collator = Collator(base.padding)
        self.objective = self._fitted(objective)
        self._place()
        self.subject = self._subject()
        self.reference = self._frozen_copy()
        self.adaptation = self._adapted()
        self.trained = Trained(self.subject.parameters, Selection())

    def train(self) -> dict[str, Any]:
        """Run every phase; return what is to be told of them."""
        counts = [self._phase(phase) for phase in range(self.tuner.phases)]
        total = sum(parameter.numel() for parameter in self.base.parameters.values())
        losses = [entry["eval_loss"] for entry in self.entries if "eval_loss" in entry]
        facts: dict[str, Any] = {
            "rows": len(self.samples),
            "steps": self.subject.steps * self.tuner.phases,
            "trained": counts[-1],
            "trained_share": round(counts[-1] / total, 6),
            "learning_rate": self.pace.rate,
            "precision": "bfloat16 products" if self.autocast else "float32",
            "seed": self.plan.training.seed,
        }
        if losses:
            facts["validation_loss"] = round(losses[-1], 6)
        return facts

    def held(self) -> dict[str, Tensor]:
        """Return every tensor that may differ from the base's, by the checkpoint's names.

        Of a tuning that adapts: the adapter's, by its own.
        """
        return {name: self.subject.parameters[name] for name in sorted(self.trained.touched)}

    # ---- before

    def _fitted(self, objective: Objective) -> Objective:
        used = {token for group in self.samples for sample in group for token in sample.tokens}
        vocabulary = self.base.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        with _told(self.plan, "objective"):
            return objective.fitted(vocabulary, used)

    def _place(self) -> None:
        """Put the model where it trains, in the precision that it trains in."""
        training, base = self.plan.training, self.base
        self.autocast = _wanted(training.precision, self.device) == "bfloat16"
        frozen = self.tuner.sparse or (self.tuner.adapts and not self.tuner.residual)
        if self.autocast and frozen and base.stored_in() == {"BF16"}:
            base.model.to(torch.bfloat16)  # frozen weights as they are stored
        if training.gradient_checkpointing:
            base.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        base.model.to(self.device)

    def _subject(self) -> Subject:
        training, base = self.plan.training, self.base
        given = training.learning_rate
        rate = self.tuner.learning_rate if given is None else given
        self.pace = Pace(rate, self.tuner.betas, self.tuner.epsilon)
        together = training.batch * self.company.size
        rounds = math.ceil(math.ceil(len(self.samples) / together) / training.accumulation)
        steps = training.steps or math.ceil((training.epochs or 1.0) * rounds)
        return Subject(
            base.model,
            base.parameters,
            base.places,
            steps,
            training.seed,
            base.origin,
            lambda size: batches(self.samples, size, self.collator),
            rows_of=self._rows_of,
        )

    def _rows_of(self, file: str) -> Iterator[Batch]:
        """Yield the rows of a file as tokens, one by one."""
        data = self.plan.data
        encoder = Encoder(self.base.tokenizer, data.rows, data.max_length, data.packing)
        samples = encoder.samples(read_rows((file,)))
        return batches(grouped(samples, False), 1, self.collator)

    def _adapted(self) -> Adaptation | None:
        """Put the tuner's adapter into the model, if it has one; that is then what trains."""
        if not self.tuner.adapts:
            return None
        with _told(self.plan, "tuner"):
            adaptation = self.tuner.adapted(self.subject)
        self.subject = replace(self.subject, parameters=adaptation.parameters)
        return adaptation

    def _frozen_copy(self) -> nn.Module | None:
        """Return the model as it is, where the objective needs it and it cannot be set back."""
        back = self.tuner.sparse or (self.tuner.adapts and not self.tuner.residual)
        if back or not self.objective.reference:
            return None
        return copy.deepcopy(self.base.model).eval().requires_grad_(False)

    # ---- one phase

    def _phase(self, phase: int) -> int:
        """Train one phase, or take over what an earlier run made of it; return what trained."""
        folder = self.work / f"phase-{phase + 1}"
        folder.mkdir(exist_ok=True)
        self._begin(phase, folder)
        count = self.trained.selection.count(self.subject.parameters)
        self.subject.earlier.append(self.trained.selection)
        if (folder / DONE).is_file():
            self.trained.restore(load_file(folder / DONE))
            self.entries += json.loads((folder / CURVES).read_text())
            return count
        show = self.show if self.company.leads else "nothing"
        watching = Curves(phase, self.tuner.phases, show)
        trainer = TuningTrainer(self._work(phase), self._arguments(folder), [watching])
        trainer.remove_callback(PrinterCallback)
        if self.plan.training.early_stop is not None:
            trainer.add_callback(EarlyStoppingCallback(self.plan.training.early_stop))
        elif self.plan.training.save_every is None:
            trainer.add_callback(Paced(self.company))
        newest = _newest(folder)
        if newest is not None:
            watching.entries += json.loads((newest / CURVES).read_text())
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        if self.validation and self.plan.training.evaluate_every is None:
            trainer.evaluate()
        self._end(folder, watching)
        return count

    def _begin(self, phase: int, folder: Path) -> None:
        """Choose what trains, or take the choice of an earlier run, by the weights as they are."""
        start = folder / START
        begun = start.is_file()
        self.company.wait()  # all have looked before one writes
        if begun:
            self.trained.restore(load_file(start))
            return
        with _told(self.plan, "tuner"):
            selection = self.tuner.select(self.subject, phase)
        if not selection.count(self.subject.parameters):
            raise OperatorError(f"{self.plan.tuner.method} selects nothing to train in this model")
        back = self.tuner.rewinds(phase)
        if back is not None:
            self._rewind(back)
        touched = self.trained.touched
        self.trained = Trained(self.subject.parameters, selection)
        self.trained.touched |= touched
        self._keep(start)

    @torch.no_grad()
    def _rewind(self, phase: int) -> None:
        """Set the weights back to what they were at the start of a phase."""
        then = load_file(self.work / f"phase-{phase + 1}" / START)
        for name in self.trained.touched:
            stored = then.get(f"weight:{name}")
            before = self.base.origin(name) if stored is None else stored
            self.base.parameters[name].copy_(before)

    def _work(self, phase: int) -> Work:
        training = self.plan.training
        return Work(
            self.tuner,
            self.objective,
            self.subject,
            self.trained,
            phase,
            self.samples,
            self.validation,
            self.collator,
            training.weight_decay,
            training.clip,
            self.pace,
            self.reference,
            self.autocast,
            self.adaptation,
            self.company,
        )

    def _end(self, folder: Path, watching: Curves) -> None:
        self.entries += watching.entries
        if self.company.leads:
            (folder / CURVES).write_text(json.dumps(watching.entries))
        self._keep(folder / DONE)
        if self.company.leads:
            for old in folder.glob("checkpoint-*"):
                shutil.rmtree(old)

    def _keep(self, path: Path) -> None:
        """Write the state, once for all processes, before any goes on."""
        if self.company.leads:
            _save(self.trained.state(), path)
        self.company.wait()

    def _arguments(self, folder: Path) -> TrainingArguments:
        training, steps = self.plan.training, self.subject.steps
        every = training.evaluate_every
        best = training.early_stop is not None
        save = every if best else training.save_every
        return TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=training.batch,
            per_device_eval_batch_size=training.batch,
            gradient_accumulation_steps=training.accumulation,
            max_steps=steps,
            learning_rate=self.pace.rate,
            lr_scheduler_type=SCHEDULES[training.schedule],
            warmup_steps=_warmup(training.warmup, steps),
            max_grad_norm=0.0,  # what trains is clipped where it is gathered
            seed=training.seed,
            data_seed=training.seed,
            logging_steps=training.log_every,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            eval_strategy="no" if every is None else "steps",
            eval_steps=every,
            save_strategy="no" if save is None else "steps",
            save_steps=save or steps,
            save_total_limit=2 if best else 1,
            load_best_model_at_end=best,
            metric_for_best_model="eval_loss" if best else None,
            greater_is_better=False if best else None,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=self.device.type == "cpu",
        )


@contextmanager
def _told(plan: TunePlan, word: str) -> Iterator[None]:
    """Turn what a method cannot do with this model into an error of the plan, with its place."""
    method = getattr(plan, word).method
    try:
        yield
    except Misfit as error:
        near = did_you_mean(error.word, error.words)
        told = f"{word}: {method}: {error}{near}"
        raise plan.refused((word, method, *error.at), told) from error
    except (ValueError, OSError) as error:
        raise plan.refused((word, method), f"{word}: {method}: {error}") from error


def _wanted(precision: str, device: torch.device) -> str:
    """Return the precision of products: bfloat16 where the device has instructions for it."""
    if precision != "auto":
        return precision
    if device.type == "cpu":
        able = bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    else:
        able = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return "bfloat16" if able else "float32"


def _warmup(asked: float, steps: int) -> int:
    return int(asked) if asked >= 1 else math.ceil(asked * steps)


def _newest(folder: Path) -> Path | None:
    """Return the last checkpoint that is whole: the one with its curves, written last."""
    found = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := CHECKPOINT.fullmatch(path.name)) and (path / CURVES).is_file()
    }
    return found[max(found)] if found else None


def _save(state: dict[str, Tensor], path: Path) -> None:
    """Write a state whole or not at all."""
    part = path.with_suffix(".part")
    save_file(state, part)
    os.replace(part, path)
