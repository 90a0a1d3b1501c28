"""Floor 4: optimisers for a model's own weights: Adam with 32, 16 or 8 bit moments, and GaLore.

`scale_by_adam` and `galore` are optax transformations; `stacked` runs one over a stack of layers.
"""

from jora.optim.adam import scale_by_adam
from jora.optim.galore import GaLore, galore
from jora.optim.stacked import stacked

__all__ = ["GaLore", "galore", "scale_by_adam", "stacked"]
