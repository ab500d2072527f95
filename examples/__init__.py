"""Hold whole stories on a real model."""
