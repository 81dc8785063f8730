"""Training, the offset branch at a tenth of the rate, until a tap looks where the answer is.

The answer at each position is the pixel three rows further up and two columns further right, which
a plain 3×3 convolution never sees. The papers' tenth of the rate is one line of Optax, with
`dcn_jax.optim.offset_labels` to tell the offset branch's parameters from the others.

The last line is like
"the upper right tap, the nearest to the answer, moved by (dy, dx) = (-1.5, 0.9)".
"""

import statistics
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dcn_jax.linen import DeformConv
from dcn_jax.optim import offset_labels

SIZE, RATE = 24, 0.05
UP, RIGHT = 3, 2  # where the answer is, from each position
UPPER_RIGHT_TAP = (0, 2)  # of a 3×3 window, at (-1, 1): (-2, 1) away from the answer


def make_batch(key: jax.Array, size: int = 8) -> tuple[jax.Array, jax.Array]:
    """Smooth images `(size, SIZE, SIZE, 1)`, and the same, read further up and right."""
    noise = jax.random.normal(key, (size, 8, 8, 1))
    smooth = jax.image.resize(noise, (size, SIZE + UP, SIZE + RIGHT, 1), "cubic")
    return smooth[:, UP:, :SIZE], smooth[:, :SIZE, RIGHT:]


def make_optimizer() -> optax.GradientTransformation:
    """Adam, offset branches at a tenth of the rate; a network without any trains too."""
    return optax.multi_transform({"main": optax.adam(RATE), "offset": optax.adam(0.1 * RATE)}, offset_labels)


def train(layer: Any, steps: int) -> tuple[Any, float]:
    """Fit the layer, on new images in every step: (variables, mean squared error at the end)."""
    optimizer = make_optimizer()

    @jax.jit
    def step(variables, state, i):
        images, answers = make_batch(jax.random.fold_in(jax.random.key(1), i))
        error, gradients = jax.value_and_grad(lambda v: jnp.mean((layer.apply(v, images) - answers) ** 2))(variables)
        updates, state = optimizer.update(gradients, state, variables)
        return optax.apply_updates(variables, updates), state, error

    variables = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 1)))
    state, errors = jax.jit(optimizer.init)(variables), []
    for i in range(steps):
        variables, state, error = step(variables, state, i)
        errors.append(float(error))
    return variables, statistics.mean(errors[-20:])


def mean_offset(layer: Any, variables: Any) -> jax.Array:
    """`(3, 3, 2)`: how far each tap has moved, on average over the positions of a new image."""
    images, _ = make_batch(jax.random.key(2), 1)
    _, sown = jax.jit(lambda v, x: layer.apply(v, x, mutable="intermediates"))(variables, images)
    offset = sown["intermediates"]["offset"][0]  # (1, SIZE, SIZE, 18)
    return offset.reshape(-1, 3, 3, 2).mean(0)


def main(steps: int = 400) -> None:
    """Train a plain and a deformable layer, and print where the tap went."""
    _, error = train(nn.Conv(1, (3, 3)), steps)
    print(f"a plain convolution ends at a mean squared error of {error:.2f}")
    layer = DeformConv(1, (3, 3))
    variables, error = train(layer, steps)
    print(f"a deformable one at {error:.2f}")
    dy, dx = mean_offset(layer, variables)[UPPER_RIGHT_TAP]
    print(f"the upper right tap, the nearest to the answer, moved by (dy, dx) = ({dy:.1f}, {dx:.1f})")


if __name__ == "__main__":
    main()
