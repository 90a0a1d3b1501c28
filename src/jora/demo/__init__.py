"""The main job from end to end, on real input that a fresh clone can get."""
