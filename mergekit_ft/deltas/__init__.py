"""Changes to a model as small files: made, put on, taken off, composed."""
