"""Localized edits: facts written into a few tensors, and what is needed to do so."""
