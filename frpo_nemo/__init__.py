"""FRPO (Fine-tuning Robust Policy Optimization, arXiv 2602.08813) on megatron-core and vLLM."""

__version__ = "0.1.0"
