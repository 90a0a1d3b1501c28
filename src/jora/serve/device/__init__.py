"""The devices' side of serving: forward and sampling programs, and their dispatch."""
