"""Programs for other devices are compiled anew each time: JAX's cache cannot read them back, and drops what is dumped."""

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache


@pytest.fixture(autouse=True)
def _compiled_anew(optimized):
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX looks at the option once
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    reset_cache()
