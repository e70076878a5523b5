"""FRPO inside other trainers, one module each. Nothing is imported here: a module may need its trainer."""
