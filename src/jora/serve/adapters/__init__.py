"""Adapters in the serving engine: as streams of pages, on the device, and in host memory."""
