"""What 11_many_devices.py does in a step, and the state that goes from one to the next."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from digits_data import CANVAS
from digits_network import Network, init, loss_of, make_adam
from flax.traverse_util import flatten_dict


class State(NamedTuple):
    """All that a checkpoint holds."""

    step: Any  # how many are done; with `key`, the place in the data
    key: Any  # of the data
    params: Any
    optimizer: Any


class Metrics(NamedTuple):
    """What a step says of itself."""

    loss: Any
    finite: Any  # (P,): is each parameter's gradient, in the order of their names
    skipped: Any  # (2,): steps whose loss or gradients were not finite, in a row and in all
    offsets: Any  # their mean and largest length in pixels, by name; empty of a network without
    signal: Any  # the largest number of a signal that any process received, or 0


def make_optimizer(learning_rate: float, give_up: int) -> optax.GradientTransformation:
    """Adam, with warm-up; a step that is not finite changes nothing but a count."""
    schedule = functools.partial(optax.warmup_constant_schedule, 0, warmup_steps=10)
    return optax.apply_if_finite(make_adam(schedule, learning_rate), give_up)


def initial_state(network: Network, optimizer: optax.GradientTransformation, seed: int) -> State:
    """The same numbers in float32 and, with JAX_ENABLE_X64=1, in float64."""
    with jax.enable_x64(False):
        init_key, data_key = jax.random.split(jax.random.key(seed))
        variables: Any = init(network, init_key, jnp.zeros((1, CANVAS, CANVAS, 1)))
    params = jax.tree.map(lambda array: array.astype(float), variables["params"])
    return State(jnp.int32(0), jax.random.key_data(data_key), params, jax.jit(optimizer.init)(params))


def train_step(network, optimizer, state, canvases, labels, signals):
    """One step: (state, metrics). Nothing in it speaks of devices; the shardings of its arguments do."""

    def loss_and_offsets(params):
        scores, sown = network.apply({"params": params}, canvases.astype(float), mutable="intermediates")
        offsets = [layer["offset"][0] for layer in sown.get("intermediates", {}).values()]
        return loss_of(scores, labels), offsets

    (loss, offsets), gradients = jax.value_and_grad(loss_and_offsets, has_aux=True)(state.params)
    finite = jnp.stack([jnp.isfinite(g).all() for _, g in by_name(gradients)])
    gradients = jax.tree.map(lambda g: jnp.where(jnp.isfinite(loss), g, jnp.nan), gradients)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)

    lengths = [jnp.linalg.norm(o.reshape(*o.shape[:-1], -1, 2), axis=-1) for o in offsets]  # (B, 16, 16, 9) each
    lengths = (
        {"mean_offset": jnp.mean(jnp.stack(lengths)), "largest_offset": jnp.max(jnp.stack(lengths))} if lengths else {}
    )
    skipped = jnp.stack([optimizer_state.notfinite_count, optimizer_state.total_notfinite])
    metrics = Metrics(loss, finite, skipped, lengths, signals.max())
    return State(state.step + 1, state.key, params, optimizer_state), metrics


def by_name(params: Any) -> list[tuple[str, Any]]:
    """Each array and its name, such as "layer_0/kernel", in the order of the names."""
    return sorted(flatten_dict(params, sep="/").items())
