"""Floor 5: sampling, generation with a KV cache, and evaluation."""
