"""Read rows, and make prompts and supervised examples of them."""
