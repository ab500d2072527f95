"""Facts edited into a model, tried, and taken out again."""
