"""Inspection: what a checkpoint holds, what a plan would do, whether an output is what it says."""
