"""Floor 7: what a person sees while work goes on."""
