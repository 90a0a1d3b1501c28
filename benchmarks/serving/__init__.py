"""Parts of `benchmarks/serve.py`: traces, metrics, floors, and the contestants."""
