"""The processes that train one model together: each takes its share of a step's rows.

No wrapper is put around the model: what trains has its gradients averaged before a step, so that
vectors of entries are shared as whole parameters are, and every process takes the same step.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from mergekit_ft.errors import PlanError

SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
BUCKET = 2**22  # entries that are sent at once


@dataclass(frozen=True)
class Company:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # its own, where there are several of the kind

    @property
    def leads(self) -> bool:
        """Say whether this process writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.size > 1:
            distributed.barrier()

    def summed(self, count: int) -> int:
        """Return the sum of a number over all processes."""
        if self.size == 1:
            return count
        total = torch.tensor(count, device=self.device)
        distributed.all_reduce(total)
        return int(total)

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every process the mean of all gradients; who has none gives zeros."""
        if self.size == 1:
            return
        waiting: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            waiting.append(parameter.grad)
            if sum(grad.numel() for grad in waiting) >= BUCKET:
                self._send(waiting)
        self._send(waiting)

    def _send(self, grads: list[Tensor]) -> None:
        """Average gradients, small ones in one message."""
        if not grads:
            return
        flat = torch.cat([grad.flatten() for grad in grads]) if len(grads) > 1 else grads[0]
        distributed.all_reduce(flat)
        flat.div_(self.size)
        if len(grads) > 1:
            parts = torch.split(flat, [grad.numel() for grad in grads])
            for grad, part in zip(grads, parts, strict=True):
                grad.copy_(part.view_as(grad))
        grads.clear()


def company_of(device: torch.device) -> Company:
    """Join the processes that `accelerate launch` or torchrun started, if they did."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Company()
    sharding = next((told for word, told in SHARDED.items() if _on(word)), None)
    if sharding is not None:
        raise PlanError(
            f"tune does not run under {sharding}: entries of sharded parameters cannot be gathered "
            "by their place; launch it with --multi_gpu (or --multi_cpu), where each process holds "
            "the model whole"
        )
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    return Company(state.process_index, state.num_processes, state.device)


def _on(word: str) -> bool:
    return os.environ.get(word, "false").lower() in ("1", "true", "yes")
