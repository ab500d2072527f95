"""Vocabularies: embeddings and heads aligned by token string, tokenizer files, chat templates."""

from mergekit_ft.tokens.chat import check_template
from mergekit_ft.tokens.indexed import row_remedy
from mergekit_ft.tokens.view import by_token

__all__ = ["by_token", "check_template", "row_remedy"]
