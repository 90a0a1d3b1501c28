"""Floor 4: adapter methods, one file each; the PEFT file format; merging."""
