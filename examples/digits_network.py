"""The networks of 05_digits.py and 11_many_devices.py, their optimizer and their loss."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from digits_data import BACKGROUND, CLASSES

from dcn_jax.linen import DeformConv
from dcn_jax.optim import offset_labels

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "conv": nn.Conv,
    "dilated": functools.partial(nn.Conv, kernel_dilation=2),
    "dcnv1": functools.partial(DeformConv, modulated=False),
    "dcnv2": DeformConv,  # starts at half of nn.Conv, which the GroupNorm after it makes up for
}


class Network(nn.Module):
    """Two plain convolutions, to half resolution; three residual layers; the labels' scores."""

    model: str
    features: int = 32

    @nn.compact
    def __call__(self, canvas: jax.Array) -> jax.Array:
        """`(B, 32, 32, 1)` -> `(B, 16, 16, 11)`."""
        x = nn.relu(nn.GroupNorm(8)(nn.Conv(16, (3, 3))(canvas)))
        x = nn.Conv(self.features, (3, 3), strides=2)(x)  # (B, 16, 16, features)
        for i in range(3):
            layer = LAYERS[self.model](self.features, (3, 3), name=f"layer_{i}")
            x = x + nn.relu(nn.GroupNorm(8)(layer(x)))
        return nn.Dense(CLASSES)(x)


init = jax.jit(Network.init, static_argnums=0)  # network, key, canvas -> variables


def make_adam(schedule: Callable[[float], optax.Schedule], learning_rate: float) -> optax.GradientTransformation:
    """Adam at a schedule of each rate; offset branches at a tenth of the rate, as in the papers."""
    layers, branches = optax.adamw(schedule(learning_rate)), optax.adamw(schedule(0.1 * learning_rate))
    adam = optax.multi_transform({"main": layers, "offset": branches}, offset_labels)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


def loss_of(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy, the positions of digits weighted fourfold: they are few."""
    weights = jnp.where(labels == BACKGROUND, 1.0, 4.0)
    return jnp.average(optax.softmax_cross_entropy_with_integer_labels(scores, labels), weights=weights)
