"""Reward functions and what calls them safely. Ground floor: imports nothing of ours but errors and data."""
