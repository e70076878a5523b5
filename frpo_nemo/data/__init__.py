"""Prompts, supervised examples and the embedded world. Ground floor: imports nothing of ours but errors."""
