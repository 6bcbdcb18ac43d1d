"""Text to batches: corpora, tokenizers, packing. Read `corpus` first."""
