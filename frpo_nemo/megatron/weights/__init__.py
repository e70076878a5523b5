"""Hugging Face weights in and out of a megatron-core model. table.py says what corresponds to what, once; binding.py
joins the table to a live model; load.py reads, export.py streams and writes. The table alone needs no torch."""
