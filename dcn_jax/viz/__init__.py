"""Pictures of what deformable layers do, and the arrays behind them.

`looked` reads from a model what its layers saw and did; the other functions say, and draw, where
its taps read. Flax, Optax and matplotlib load with the functions that need them.
"""

from dcn_jax.viz._explore import explore
from dcn_jax.viz._looked import Layer, looked
from dcn_jax.viz._page import Page
from dcn_jax.viz._sampling import plot_sampling

__all__ = ["Layer", "Page", "explore", "looked", "plot_sampling"]
