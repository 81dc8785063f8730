"""What the networks of 05_digits.py reach on canvases of digits that are never trained on."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from digits_data import BACKGROUND, CLASSES, Digits, make_batch

TEST_CANVASES, TEST_BATCH = 1024, 128


class Run(NamedTuple):
    """One trained network and what it reached."""

    row: dict[str, Any]  # what --json writes
    network: Any
    variables: Any


def test(network: Any, variables: Any, digits: Digits) -> dict[str, float]:
    """Mean IoU and foreground accuracy of a network, on the same canvases for every one."""
    keys = jax.random.split(jax.random.key(0), TEST_CANVASES // TEST_BATCH)
    mean_iou, foreground_accuracy = scores_of(sum(confusion(network, variables, key, digits) for key in keys))
    return {"mean_iou": mean_iou, "foreground_accuracy": foreground_accuracy}


@functools.partial(jax.jit, static_argnames="network")
def confusion(network, variables, key, digits):
    """`(11, 11)`: how many positions of each class got each label, on one batch of canvases."""
    canvases, labels = make_batch(key, digits, TEST_BATCH)
    predicted = network.apply(variables, canvases).argmax(-1)
    return jnp.zeros((CLASSES, CLASSES), int).at[labels, predicted].add(1)


def scores_of(confusion: Any) -> tuple[float, float]:
    """Mean over classes of intersection / union, and the share of digit positions that got their digit."""
    confusion = np.asarray(confusion)
    right = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - right
    digits = slice(0, BACKGROUND)
    return float(np.mean(right / np.maximum(union, 1))), float(right[digits].sum() / confusion[digits].sum())
