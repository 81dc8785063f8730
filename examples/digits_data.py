"""The data of 05_digits.py: 8×8 digits, each warped onto its own 32×32 canvas, without end."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets

from dcn_jax import linear_sample

IMAGE, CANVAS = 8, 32  # pixels along each side
POSITIONS = CANVAS // 2  # of labels, along each side
BACKGROUND, CLASSES = 10, 11  # the ten digits, then the background


class Digits(NamedTuple):
    """Handwritten digits and what they are."""

    images: jax.Array  # (N, 8, 8), ink in [0, 1]
    digits: jax.Array  # (N,)


def load_digits() -> tuple[Digits, Digits]:
    """scikit-learn's 1,797 digits: four fifths to train on, the others to test with."""
    data: Any = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images, digits = jnp.asarray(data.images[order] / 16, jnp.float32), jnp.asarray(data.target[order], jnp.int32)
    test = len(order) // 5
    return Digits(images[test:], digits[test:]), Digits(images[:test], digits[:test])


def random_warp(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A random warp: the matrix that turns, scales and shears an image, and where its center goes."""
    keys = jax.random.split(key, 4)
    angle = jax.random.uniform(keys[0], minval=-0.5, maxval=0.5)  # radians, some 30 degrees either way
    log_scale = jax.random.uniform(keys[1], minval=math.log(1.25), maxval=math.log(3.75))
    scale = jnp.exp(log_scale)  # a digit of 10 to 30 pixels
    shear = jax.random.uniform(keys[2], minval=-0.25, maxval=0.25)
    room = (CANVAS - scale * IMAGE) / 2
    center = (CANVAS - 1) / 2 + room * jax.random.uniform(keys[3], (2,), minval=-1, maxval=1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return scale * jnp.array([[cos, -sin], [sin, cos]]) @ jnp.array([[1.0, shear], [0.0, 1.0]]), center


def warp(image: jax.Array, matrix: jax.Array, center: jax.Array) -> jax.Array:
    """The image `(8, 8)` on a canvas `(32, 32, 1)`: pixel p reads it at  matrix⁻¹ (p - center) + middle."""
    pixels = jnp.stack(jnp.meshgrid(jnp.arange(CANVAS), jnp.arange(CANVAS), indexing="ij"), axis=-1)  # (32, 32, 2)
    points = (pixels - center) @ jnp.linalg.inv(matrix).T + (IMAGE - 1) / 2
    return linear_sample(image[..., None], points)


def label(canvas: jax.Array, digit: jax.Array) -> jax.Array:
    """`(16, 16)`: the digit where a position's 2×2 pixels average more than 0.4 of ink, else background."""
    ink = canvas.reshape(POSITIONS, 2, POSITIONS, 2).mean((1, 3))
    return jnp.where(ink > 0.4, digit, BACKGROUND)


@functools.partial(jax.jit, static_argnames="size")
def make_batch(key: jax.Array, data: Digits, size: int) -> tuple[jax.Array, jax.Array]:
    """Canvases `(size, 32, 32, 1)` of random digits, and their labels `(size, 16, 16)`."""
    choice, warps = jax.random.split(key)
    chosen = jax.random.randint(choice, (size,), 0, len(data.digits))
    matrices, centers = jax.vmap(random_warp)(jax.random.split(warps, size))
    canvases = jax.vmap(warp)(data.images[chosen], matrices, centers)
    return canvases, jax.vmap(label)(canvases, data.digits[chosen])
