"""Keras layers with weights that are not zero, and models made of them."""

import keras
import numpy as np


def normal(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def fill(layer, scale=0.5):
    """Random numbers in all weights of a built layer, which it returns."""
    for seed, weight in enumerate(layer.weights):
        weight.assign(scale * normal(*weight.shape, seed=seed))
    return layer


def functional(layer, *shapes):
    """A model of one layer, which takes one tensor or a list of them."""
    inputs = [keras.Input(shape) for shape in shapes]
    inputs = inputs[0] if len(inputs) == 1 else inputs
    return keras.Model(inputs, layer(inputs))


def last(x):
    """From channels first to channels last."""
    return np.moveaxis(np.asarray(x), 1, -1)


def first(x):
    """From channels last to channels first."""
    return np.moveaxis(np.asarray(x), -1, 1)
