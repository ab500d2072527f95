"""LoRA adapters: extracted from a tuned model, and merged in the space of their deltas."""
