"""The checks, a module per subject. A check is a function of a Context that returns what it measured, by name."""
