"""transformers' Trainer around what trains, with a loss that does not see how a step is split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from mergekit_ft.data.batches import Collator, Groups, batches
from mergekit_ft.learning import Adaptation, Objective, Pace, Subject, Tuner
from mergekit_ft.tuning.company import Company
from mergekit_ft.tuning.saying import said
from mergekit_ft.tuning.trained import Trained

STATE = "trained.safetensors"  # of a checkpoint to resume from


@dataclass
class Work:
    """One phase of a tuning."""

    tuner: Tuner
    objective: Objective
    subject: Subject
    trained: Trained
    phase: int
    train: Groups
    validation: Groups
    collator: Collator
    decay: float
    clip: float
    pace: Pace
    reference: nn.Module | None = None  # a frozen copy, where the model cannot be set back
    autocast: bool = False  # products in bfloat16
    adaptation: Adaptation | None = None  # where an adapter trains
    company: Company = field(default_factory=Company)
    norms: list[float] = field(default_factory=list)  # of gradients, since the last log


class TuningTrainer(Trainer):
    """A Trainer whose optimizer steps what a tuner chose, on what an objective asks."""

    def __init__(self, work: Work, args: TrainingArguments, callbacks: list[Any]) -> None:
        self.work = work
        super().__init__(
            model=work.subject.model,
            args=args,
            train_dataset=work.train,
            eval_dataset=work.validation or None,
            data_collator=work.collator,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = True  # so that the count of a whole step is passed on
        # no wrapper for many processes: gradients are gathered by hooks, and averaged by us
        self.accelerator.prepare_model = lambda model, *_, **__: model

    # ---- the optimizer

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """Make the tuner's optimizer, with what comes before and after each step."""
        if self.optimizer is None:
            groups = self.work.trained.groups(self.work.decay)
            self.optimizer = self.work.tuner.optimizer(groups, self.work.pace)
            self.optimizer.register_step_pre_hook(self._before_step)
            self.optimizer.register_step_post_hook(self._after_step)
        return self.optimizer

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        work, step = self.work, self.state.global_step + 1
        now = work.trained.selection
        work.company.average(parameter for _, parameter in work.trained.named())
        work.trained.add(work.tuner.penalties(work.subject, work.phase, step, now))
        work.norms.append(work.trained.clip(work.clip))

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        work, step = self.work, self.state.global_step + 1
        work.trained.write_back()
        if work.tuner.due(step, work.subject.steps):
            now = work.trained.selection
            again = work.tuner.reselect(work.subject, work.phase, step, now)
            work.trained.reselect(again, optimizer)

    # ---- the loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the batches of a step, and what its loss is divided by."""
        found, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        mine = sum(map(self.work.objective.count, found))
        return found, self.work.company.summed(mine)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the batch's share of the step's loss."""
        progress = self.state.global_step / max(1, self.state.max_steps)
        dice = torch.Generator().manual_seed(self._dice(inputs))
        shown = self.work.objective.corrupted(inputs, progress, dice)
        share = self._total(model, shown, inputs) / num_items_in_batch
        return share * self.work.company.size  # what processes find is averaged

    def _dice(self, inputs: Mapping[str, Tensor]) -> int:
        """Return a seed of a batch: of the run's, the step, and the tokens."""
        tokens = int(
            (inputs["input_ids"] * torch.arange(1, inputs["input_ids"].shape[1] + 1)).sum()
        )
        return (self.work.subject.seed * 1_000_003 + self.state.global_step) * 8191 + tokens

    def _total(
        self, model: nn.Module, shown: Mapping[str, Tensor], batch: Mapping[str, Tensor]
    ) -> Tensor:
        work = self.work
        before = self._before() if work.objective.reference and work.reference is None else None
        reference = work.reference if work.objective.reference else None
        with self._autocast():
            return work.objective.total(said(model, shown, batch, reference, before))

    def _before(self) -> AbstractContextManager[Any]:
        work = self.work
        if work.adaptation is not None:
            return work.adaptation.without()
        return work.trained.set_back(work.subject.origin)

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.work.autocast:
            return nullcontext()
        return torch.autocast(self.args.device.type, dtype=torch.bfloat16)

    # ---- evaluation

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return the validation rows' loss by the objective, over all their places at once."""
        work, total, count = self.work, 0.0, 0
        model = work.subject.model.eval()
        for batch in batches(work.validation, self.args.per_device_eval_batch_size, work.collator):
            batch = self._prepare_inputs(batch)
            total += float(self._total(model, batch, batch))
            count += work.objective.count(batch)
        model.train()
        found = {"eval_loss": total / count}
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the norm of the gradients as it was before clipping."""
        if "loss" in logs and self.work.norms:
            logs["grad_norm"] = sum(self.work.norms) / len(self.work.norms)
            self.work.norms.clear()
        super().log(logs, start_time)

    # ---- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save what trains, and no more; the rest is the base."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.work.trained.state(), folder / STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.work.trained.restore(load_file(Path(resume_from_checkpoint) / STATE))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        self.work.trained.restore(load_file(Path(best) / STATE))
