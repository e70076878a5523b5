"""FRPO inside other trainers, one module each; each needs its own trainer installed, so nothing is imported here."""
