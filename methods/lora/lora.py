"""LoRA (Hu et al. 2021, arXiv:2106.09685): factors of low rank beside frozen matrices train.

Of a matrix W (m x n) of a linear layer only the product of two factors is learned (section 4.1):

    h = W x + s B A x,   A (r x n) random, B (m x r) zero,   s = alpha / r

so that training begins at the base. rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) takes
s = alpha / sqrt(r); DoRA (Liu et al. 2024, arXiv:2402.09353) also learns the length of each row of
the sum. The layers are peft's.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from mergekit_ft.adapting import Adapted, Places, drawn
from mergekit_ft.learning import Adaptation, Selection, Subject, Tuner


class Lora(Tuner):
    """Factors of low rank beside the matrices of linear layers train."""

    learning_rate: ClassVar[float] = 2e-4  # the paper's of GPT-2 and GPT-3 (appendix D)
    adapts: ClassVar[bool] = True
    gives: ClassVar[tuple[str, ...]] = ("adapter", "full", "delta")

    rank: int = Field(16, ge=1, description="r, columns of B and rows of A")
    alpha: float | None = Field(
        None, gt=0, description="the product counts alpha / rank; None: rank"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the product's inputs left out")
    targets: tuple[str, ...] | None = Field(
        None, description="layers, by name or pattern: q_proj, '*.mlp.*'; None: all but heads"
    )
    use_rslora: bool = Field(False, description="the product counts alpha / sqrt(rank)")
    use_dora: bool = Field(False, description="the length of each row trains too")
    init: Literal["kaiming", "gaussian"] = Field("kaiming", description="how A is drawn; B is 0")

    def adapted(self, subject: Subject) -> Adaptation:
        """Put the factors into the model."""
        from peft import LoraConfig, get_peft_model

        places = Places(subject, self.targets)
        words = self._words(places.transposed)
        start: Any = "gaussian" if self.init == "gaussian" else True
        config = LoraConfig(**words, target_modules=list(places.chosen), init_lora_weights=start)
        with drawn(subject.seed):
            return Adapted(get_peft_model(subject.model, config), places, words)

    def select(self, subject: Subject, phase: int) -> Selection:
        """Choose every factor."""
        return Selection(whole=tuple(subject.parameters))

    def _words(self, transposed: bool) -> dict[str, Any]:
        """Return the scale and the kind of the product, in peft's words."""
        return {
            "r": self.rank,
            "lora_alpha": self.rank if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "fan_in_fan_out": transposed,
        }
