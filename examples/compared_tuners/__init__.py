"""Ways to tune the same model on the same task, compared."""
