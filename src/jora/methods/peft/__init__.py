"""PEFT's directories: its adapter_config.json and tensors, for each method that it has."""
