"""Tests of the Keras layers, which `make test-keras` runs: Keras lives in an environment of its own."""

import os

import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")
# What Keras itself does: when NumPy reads its variables, and when labels are int64.
KERAS_OWN = (
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    "ignore:Explicitly requested dtype int64 requested in ShapeDtypeStruct:UserWarning",
)
keras = pytest.importorskip("keras")


def pytest_collection_modifyitems(items):
    for item in items:
        if "keras" in item.path.parts:
            item.add_marker(pytest.mark.lenient)  # Keras promotes dtypes and ranks
            item.add_marker(pytest.mark.filterwarnings(*KERAS_OWN))


@pytest.fixture
def policy():
    """Sets Keras's policy of dtypes, for this test alone."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)
