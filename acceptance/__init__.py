"""Acceptance of a machine with GPUs: `make gpu-check`. What is measured is in checks/, what is accepted in
thresholds.yaml, what runs together in registry.py; gpu_check.py is the command."""
