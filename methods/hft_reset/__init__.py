"""Half reset: half of each block of a tuned model put back to the base."""

from mergekit_ft.methods.hft_reset.hft_reset import HftReset

__all__ = ["HftReset"]
