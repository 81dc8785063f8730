"""What all tests share: eight CPU devices, strict JAX, and `op`, the deformable convolution under test.

Tests of the op take the fixture `op`, which is `dcn_jax.deform_conv` bound to one implementation, and run once for each
implementation that can do what they need. A test that needs more than the plain op says so, on itself or on one case:

    @pytest.mark.needs("float64", "forward_mode")
    pytest.param(..., marks=pytest.mark.needs("rank 3"))
"""

import functools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

import dcn_jax

jax.config.update("jax_num_cpu_devices", 8)

# What each implementation can do beyond values and first gradients, in float32, of 1 and 2 spatial axes.
IMPLEMENTATIONS = {
    "xla": {"float64", "half", "complex", "rank 3", "forward_mode", "second_order", "export", "sharding"},
}
ABILITIES = set.union(*IMPLEMENTATIONS.values())


def pytest_configure(config):
    config.addinivalue_line("markers", "needs(*abilities): what `op` has to be able to do, of conftest.IMPLEMENTATIONS")
    config.addinivalue_line("markers", "lenient: runs without strict promotion of dtypes and ranks (Flax, optax)")


def pytest_generate_tests(metafunc):
    if "op" in metafunc.fixturenames:
        metafunc.parametrize("op", IMPLEMENTATIONS, indirect=True)


def pytest_collection_modifyitems(items):
    """Leave out each test of an implementation that cannot do what the test needs: it is not skipped, it does not exist."""
    items[:] = [item for item in items if _able(item)]


def _able(item):
    needs = {ability for mark in item.iter_markers("needs") for ability in mark.args}
    if unknown := needs - ABILITIES:
        raise pytest.UsageError(f"{item.nodeid} needs {unknown}; known are {ABILITIES}")
    implementation = getattr(item, "callspec", None) and item.callspec.params.get("op")
    return implementation is None or needs <= IMPLEMENTATIONS[implementation]


@pytest.fixture
def op(request):
    """`dcn_jax.deform_conv` with its implementation chosen."""
    return functools.partial(dcn_jax.deform_conv, implementation=request.param)


@pytest.fixture(autouse=True)
def _strict(request):
    """Promote neither dtypes nor ranks: what the library computes in is written down in it."""
    if request.node.get_closest_marker("lenient"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    """Double precision, for this test alone."""
    with jax.enable_x64(True):
        yield
