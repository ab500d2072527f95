"""Vocabularies: embeddings and heads aligned by token string, tokenizer files, chat templates."""

from mergekit_ft.tokens.indexed import row_remedy
from mergekit_ft.tokens.view import by_token

__all__ = ["by_token", "row_remedy"]
