"""Rows to learn from and to be asked: read, made into tokens, chosen, rebuilt."""
