"""Hugging Face weights in and out of a megatron-core model. table.py says what corresponds to what, once; binding.py
joins the table to a live model; load.py reads, export.py streams and writes."""

from frpo_nemo.megatron.hf_weights.export import save_hf, stream_hf_weights
from frpo_nemo.megatron.hf_weights.load import check_checkpoint, load_hf_weights

__all__ = ["check_checkpoint", "load_hf_weights", "save_hf", "stream_hf_weights"]
