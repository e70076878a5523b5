"""Acceptance of a machine with GPUs: `make gpu-check`. checks/ measures, thresholds.yaml has
the accepted values, registry.py defines what runs together; gpu_check.py is the command."""
