"""Keras on its JAX backend, the only one whose tensors the ops of this library take."""

import importlib
from typing import Any

from dcn_jax._core import extras

HOW = 'set the environment variable KERAS_BACKEND=jax, or os.environ["KERAS_BACKEND"] = "jax", before keras is imported'

try:
    keras: Any = importlib.import_module("keras")  # Any, since type checkers know little of it
except ModuleNotFoundError as error:
    if error.name == "keras":
        raise extras.missing("dcn_jax.keras", "keras") from error
    raise ImportError(
        f"Keras's backend needs {error.name}, and dcn_jax.keras needs the backend 'jax'; {HOW}"
    ) from error


def require_jax(name: str) -> None:
    """Raise if Keras runs on another backend."""
    if keras.backend.backend() != "jax":
        raise RuntimeError(
            f"dcn_jax.keras.{name} needs Keras's backend 'jax', and this is {keras.backend.backend()!r}; {HOW}"
        )


def serializable(named: type) -> type:
    """A class that Keras finds by its name when it loads a model: `dcn_jax>DeformConv2D`."""
    return keras.saving.register_keras_serializable(package="dcn_jax")(named)
