"""The checkpoint: weights plus everything around them."""
