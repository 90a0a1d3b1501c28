"""Floor 6: serving one base with thousands of adapters. docs/serving.md says how memory is laid out and why."""
