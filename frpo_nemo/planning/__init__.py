"""Estimate what a run will need: memory, time, communication. Nothing here starts anything."""
