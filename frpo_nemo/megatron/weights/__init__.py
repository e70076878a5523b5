"""Move Hugging Face weights into and out of a megatron-core model. table.py defines the correspondence, once; binding.py
joins the table to a live model; load.py reads, export.py streams and writes. The table alone needs no torch."""
