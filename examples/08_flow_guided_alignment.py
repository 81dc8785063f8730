"""Second-order flow-guided alignment, as in BasicVSR++: deformable layers that correct an optical flow, frame after frame.

A scene moves over the frames of a film. At each frame the layer brings the features of the two frames
before it to where they are now. It starts from an optical flow, its `base_offset`, and learns the
rest; its branch sees the features that the flow has moved, those of the frame itself, and the flow:

    offset = max_offset · tanh(z / max_offset) + flow,   z = offset_conv(warped, current, flow)

BasicVSR++ itself computes 10 · tanh(z) + flow. For its weights, the layer takes
`offset_activation=lambda z: 10 * jnp.tanh(z)` instead of `max_offset`.

The flow here is that of a network which underestimates: a quarter too short.

Source: Chan et al., BasicVSR++ (arXiv 2104.13371), section 3.2.

The last line is like "alignment error with the flow, and what was learned: 0.04".
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from dcn_jax import linear_sample, sampling_points
from dcn_jax.nnx import DeformConv
from dcn_jax.optim import offset_labels

SIZE, CHANNELS, FRAMES = (20, 20), 8, 4
GROUPS, WINDOW = 16, (3, 3)  # a group for each channel of the two frames: the first 8 read one, the last 8 the other
BORDER = 6  # pixels at the edge, whose past was outside of the picture


def film(key):
    """Frames `(T, H, W, C)` of a scene that moves at one velocity, and the flows back to each frame's predecessor."""
    keys = jax.random.split(key, 3)
    velocity = jax.random.uniform(keys[0], (2,), minval=-2.5, maxval=2.5)  # (dy, dx), in pixels a frame
    waves = jax.random.normal(keys[1], (6, CHANNELS, 2)) / 4
    phases = jax.random.uniform(keys[2], (6, CHANNELS), maxval=2 * jnp.pi)
    pixels = jnp.stack(jnp.meshgrid(*map(jnp.arange, SIZE), indexing="ij"), axis=-1)
    places = pixels - jnp.arange(FRAMES)[:, None, None, None] * velocity  # (T, H, W, 2)
    frames = jnp.sin(jnp.einsum("thwa,kca->thwkc", places, waves) + phases).mean(-2)
    return frames, jnp.broadcast_to(-velocity, (FRAMES, *SIZE, 2))


def warp(features, flow):
    """Features `(H, W, C)`, read where the flow `(H, W, 2)` says."""
    points = sampling_points(flow, (1, 1), spatial=SIZE)[..., 0, 0, :]
    return linear_sample(features, points)


class Alignment(nnx.Module):
    """Brings the features of two frames, one above the other, to where they are in the frame that follows."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.deform = DeformConv(
            2 * CHANNELS,
            CHANNELS,
            WINDOW,
            kernel_init=mean_of_both,
            offset_groups=GROUPS,
            mask_scale=2.0,  # a fresh layer does what the flow says, and no more
            max_offset=4.0,
            offset_in_features=3 * CHANNELS + 4,
            offset_conv_cls=partial(nnx.Conv, kernel_size=(1, 1), kernel_init=nnx.initializers.zeros_init()),
            rngs=rngs,
        )

    def __call__(self, one_ago, two_ago, current, flow, flow_of_two):
        """Features `(H, W, C)` of three frames, flows `(H, W, 2)` back to each of the first two -> `(H, W, C)`."""
        seen = [warp(one_ago, flow), warp(two_ago, flow_of_two), current, flow, flow_of_two]
        # One displacement for each group: (dy, dx) again for each of its taps, in the order of offsets.
        per_group = GROUPS * WINDOW[0] * WINDOW[1] // 2
        base = jnp.concatenate([jnp.tile(flow, per_group), jnp.tile(flow_of_two, per_group)], axis=-1)
        return self.deform(
            jnp.concatenate([one_ago, two_ago], axis=-1),
            offset_inputs=jnp.concatenate(seen, axis=-1),
            base_offset=base,
        )


def mean_of_both(key, shape, dtype):
    """A kernel that takes the mean of the two frames, channel by channel, at its middle tap."""
    del key
    middle = jnp.concatenate([jnp.eye(CHANNELS), jnp.eye(CHANNELS)]) / 2
    return jnp.zeros(shape, dtype).at[1, 1].set(middle.astype(dtype))


def align(model, frames, flows):
    """Each frame from the third on, made of the two before it: `(T, H, W, C)` -> `(T - 2, H, W, C)`, in one scan."""

    def step(past, now):
        (one_ago, two_ago, flow_before), (current, flow) = past, now
        aligned = model(one_ago, two_ago, current, flow, flow + warp(flow_before, flow))
        return (current, one_ago, flow), aligned

    return lax.scan(step, (frames[1], frames[0], flows[1]), (frames[2:], flows[2:]))[1]


def error(aligned, frames):
    """The mean distance from the frames as they are, in parts of their own mean magnitude, away from the edge."""
    inside = (slice(None),) * 2 + (slice(BORDER, -BORDER),) * 2
    wanted = frames[:, 2:][inside]
    return jnp.abs(aligned[inside] - wanted).mean() / jnp.abs(wanted).mean()


def main(steps: int = 40) -> None:
    """Learn alignment on random films, and print the errors on others, by what was used."""
    model = Alignment(rngs=nnx.Rngs(0))
    branch_alone = optax.multi_transform({"main": optax.set_to_zero(), "offset": optax.adam(1e-2)}, offset_labels)
    optimizer = nnx.Optimizer(model, branch_alone, wrt=nnx.Param)
    over_films = jax.vmap(align, in_axes=(None, 0, 0))

    @nnx.jit
    def train(model, optimizer, key):
        frames, flows = jax.vmap(film)(jax.random.split(key, 2))
        loss, gradients = nnx.value_and_grad(lambda model: error(over_films(model, frames, 0.75 * flows), frames))(
            model
        )
        optimizer.update(model, gradients)
        return loss

    frames, flows = jax.vmap(film)(jax.random.split(jax.random.key(1), 8))
    measure = nnx.jit(lambda model, flows: error(over_films(model, frames, flows), frames))
    errors = {"no flow": measure(model, 0 * flows), "the flow alone": measure(model, 0.75 * flows)}
    for step in range(steps):
        train(model, optimizer, jax.random.key(100 + step))
    errors["the flow, and what was learned"] = measure(model, 0.75 * flows)
    for name, value in errors.items():
        print(f"alignment error with {name}: {value:.2f}")


if __name__ == "__main__":
    main()
