"""Texts and tokens: tokenizers, SentencePiece, chat templates."""
