"""Pre-training across islands of compute: one file per system, thin over the rounds machinery."""
