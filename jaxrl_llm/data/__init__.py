"""Rows, their order, tokenizers, prompts and supervised examples. Host side: no params."""
