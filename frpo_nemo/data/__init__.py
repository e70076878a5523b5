"""Rows, prompts and supervised examples."""
