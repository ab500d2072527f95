"""LoRA: factors of low rank beside frozen matrices train; an adapter comes out."""

from mergekit_ft.methods.lora.lora import Lora

__all__ = ["Lora"]
