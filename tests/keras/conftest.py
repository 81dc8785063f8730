"""Tests of the Keras layers, which `make test-keras` runs: Keras lives in an environment of its own."""

import os

import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")
KERAS_OWN = "__array__ implementation doesn't accept a copy keyword"  # Keras's variables, when NumPy reads them
keras = pytest.importorskip("keras")


def pytest_collection_modifyitems(items):
    for item in items:
        if "keras" in item.path.parts:
            item.add_marker(pytest.mark.lenient)  # Keras promotes dtypes and ranks
            item.add_marker(pytest.mark.filterwarnings(f"ignore:{KERAS_OWN}:DeprecationWarning"))


@pytest.fixture
def policy():
    """Sets Keras's policy of dtypes, for this test alone."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)
