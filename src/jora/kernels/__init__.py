"""Floor 2: kernels with their XLA reference, chosen at run time by device and shape."""
