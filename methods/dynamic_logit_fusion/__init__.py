"""Dynamic logit fusion: how far each expert's shift of the logits moves another model."""

from mergekit_ft.methods.dynamic_logit_fusion.dynamic_logit_fusion import DynamicLogitFusion

__all__ = ["DynamicLogitFusion"]
