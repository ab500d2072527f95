"""Logit fusion baked: the base plus task vectors by the weights fitted on the models' logits."""

from mergekit_ft.methods.logit_fusion.logit_fusion import LogitFusion

__all__ = ["LogitFusion"]
