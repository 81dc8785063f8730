"""Pictures of what deformable layers do, and the arrays behind them.

`looked` tells what the layers of a model read and did for one image; the other functions say, and
draw, where its taps read and what its results depend on. Flax, Optax and matplotlib load with the
functions that need them.
"""

from dcn_jax.viz._attention import plot_attention
from dcn_jax.viz._explore import explore
from dcn_jax.viz._gradients import (
    effective_receptive_field,
    effective_sampling,
    plot_effective_sampling,
    plot_receptive_field,
)
from dcn_jax.viz._looked import Layer, looked
from dcn_jax.viz._page import Page
from dcn_jax.viz._saliency import plot_saliency_region, saliency_region
from dcn_jax.viz._sampling import plot_sampling
from dcn_jax.viz._through import plot_sampling_through, sampling_through

__all__ = [
    "Layer",
    "Page",
    "effective_receptive_field",
    "effective_sampling",
    "explore",
    "looked",
    "plot_attention",
    "plot_effective_sampling",
    "plot_receptive_field",
    "plot_saliency_region",
    "plot_sampling",
    "plot_sampling_through",
    "saliency_region",
    "sampling_through",
]
