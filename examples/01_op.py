"""The op alone: what offsets and a mask do, in which order their channels come, and a gradient.

The last line should be "found the shift (dy, dx) = (1.50, -0.75)".
"""

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax import deform_conv

SIZE, CHANNELS, FEATURES = 12, 4, 8  # pixels along each side of the map, its channels, those of the result
GROUPS, WINDOW = 2, (3, 3)  # offset groups; the kernel's size
CENTER = (1, 1)  # of the window


def no_offsets(x: jax.Array, kernel: jax.Array) -> None:
    """Zero offsets, without a mask: the plain convolution. A mask scales what each tap reads."""
    plain = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    offset = jnp.zeros((1, SIZE, SIZE, 3 * 3 * 2))  # for each output position: 9 taps, (dy, dx)
    mask = jnp.full((1, SIZE, SIZE, 3 * 3), 0.5)
    same = jnp.allclose(deform_conv(x, kernel, offset), plain, atol=1e-4)
    half = jnp.allclose(deform_conv(x, kernel, offset, mask), 0.5 * plain, atol=1e-4)
    print(f"zero offsets give the plain convolution: {same}; with a mask of 0.5, half of it: {half}")


def channel_order(x: jax.Array) -> None:
    """Channels of an offset: (offset group, tap row, tap column, (dy, dx)), flattened.

    A kernel whose center tap alone counts copies x. Moving that tap of the second group by (1, 2) makes the
    second half of the channels read one row further down and two columns further right.
    """
    copy = jnp.zeros((*WINDOW, CHANNELS, CHANNELS)).at[CENTER].set(jnp.eye(CHANNELS))
    offset = jnp.zeros((1, SIZE, SIZE, GROUPS, *WINDOW, 2)).at[..., 1, *CENTER, :].set(jnp.array([1.0, 2.0]))
    y = deform_conv(x, copy, offset.reshape(1, SIZE, SIZE, -1))
    half = CHANNELS // 2
    first = jnp.allclose(y[..., :half], x[..., :half])
    second = jnp.allclose(y[:, :-1, :-2, half:], x[:, 1:, 2:, half:])
    print(f"channels {offset.shape[-4:]} in a row: group 0 stays: {first}; group 1 moves by (1, 2): {second}")


def find_shift(shift: tuple[float, float], steps: int = 60, rate: float = 240.0) -> jax.Array:
    """Positions have gradients: descend to the offset that gives the shifted picture."""
    rows, columns = jnp.meshgrid(jnp.arange(24.0), jnp.arange(24.0), indexing="ij")
    picture = jnp.exp(-((rows - 11) ** 2 + (columns - 12) ** 2) / 40)[None, ..., None]  # (1, 24, 24, 1), a blob

    def moved(offset):  # (2,): every position reads one tap, moved by the same offset
        return deform_conv(picture, jnp.ones((1, 1, 1, 1)), jnp.broadcast_to(offset, (1, 24, 24, 2)))

    target = moved(jnp.array(shift))

    @jax.jit
    def step(offset):
        return offset - rate * jax.grad(lambda offset: jnp.mean((moved(offset) - target) ** 2))(offset)

    offset = jnp.zeros(2)
    for _ in range(steps):
        offset = step(offset)
    return offset


def main() -> None:
    """Print one line for each."""
    x = jax.random.normal(jax.random.key(0), (1, SIZE, SIZE, CHANNELS))
    kernel = jax.random.normal(jax.random.key(1), (*WINDOW, CHANNELS, FEATURES))
    no_offsets(x, kernel)
    channel_order(x)
    dy, dx = find_shift((1.5, -0.75))
    print(f"found the shift (dy, dx) = ({dy:.2f}, {dx:.2f})")


if __name__ == "__main__":
    main()
