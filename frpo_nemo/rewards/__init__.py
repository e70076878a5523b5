"""Reward functions and the code that calls them safely. Lowest layer: of this package it imports only errors and data."""
