"""Replicas of the engine under Ray Serve, behind the one HTTP app (docs/scale-out.md). Needs the extra `ray`."""
