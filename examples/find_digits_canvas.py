"""The canvases of 10_find_digits.py: two to four digits on each, without end."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from digits_data import CANVAS, IMAGE, Digits, warp

DIGITS, NONE = 4, 10  # places for digits on a canvas, and the kind of an empty one


class Canvases(NamedTuple):
    """Canvases, and what is where on them."""

    images: jax.Array  # (B, 32, 32, 1)
    kinds: jax.Array  # (B, 4): 0 to 9, or NONE
    centers: jax.Array  # (B, 4, 2), as (y, x) in [0, 1]


@functools.partial(jax.jit, static_argnames="size")
def make_canvases(key: jax.Array, data: Digits, size: int) -> Canvases:
    """A canvas has four places, of which two to four hold a digit; digits may touch and overlap."""
    keys = jax.random.split(key, 6)
    chosen = jax.random.randint(keys[0], (size, DIGITS), 0, len(data.digits))
    here = jnp.arange(DIGITS) < jax.random.randint(keys[1], (size, 1), 2, DIGITS + 1)
    here = jax.random.permutation(keys[2], here, axis=1, independent=True)
    scale = jax.random.uniform(keys[3], (size, DIGITS, 1), minval=1.1, maxval=2.0)  # a digit of 9 to 16 pixels
    angle = jax.random.uniform(keys[4], (size, DIGITS), minval=-0.4, maxval=0.4)  # radians
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turn = jnp.stack([cos, -sin, sin, cos], axis=-1).reshape(size, DIGITS, 2, 2)
    quarters = jnp.array([[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]])
    room = 0.25 - scale * IMAGE / CANVAS / 2 + 1 / 16  # up to two pixels beyond the place
    centers = quarters + room * jax.random.uniform(keys[5], (size, DIGITS, 2), minval=-1, maxval=1)
    images = jax.vmap(jax.vmap(warp))(data.images[chosen], scale[..., None] * turn, centers * CANVAS - 0.5)
    images = jnp.where(here[..., None, None, None], images, 0).max(1)  # (B, 4, 32, 32, 1) -> (B, 32, 32, 1)
    return Canvases(images, jnp.where(here, data.digits[chosen], NONE), centers)
