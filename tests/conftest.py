"""What all tests share: eight CPU devices, strict JAX, and `op`, the deformable convolution under test.

Tests of the op take the fixture `op`, which is `dcn_jax.deform_conv` bound to one implementation, and run once for each
implementation that can do what they need. A test that needs more than the plain op says so, on itself or on one case:

    @pytest.mark.needs("float64", "forward_mode")
    pytest.param(..., marks=pytest.mark.needs("rank 3"))
"""

import contextlib
import functools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

import dcn_jax
from dcn_jax._pallas.launch import interpret

jax.config.update("jax_num_cpu_devices", 8)

# What each implementation can do beyond values and first gradients, in float32, of 1 and 2 spatial axes.
IMPLEMENTATIONS = {
    "xla": {"float64", "half", "complex", "rank 3", "forward_mode", "second_order", "export", "sharding", "shard_map"},
    # Not "shard_map" with its checks: Pallas's interpreter types its loops as varying over no device. Compiled, it does.
    "pallas": {"half", "second_order", "sharding"},
}
ABILITIES = set.union(*IMPLEMENTATIONS.values())

# The kernels take seconds a test in Pallas's interpreter: these tests of the op run over them always, the others are slow.
QUICK = {
    "test_values_and_gradients[pallas-plain]",
    "test_values_and_gradients[pallas-groups]",
    "test_values_and_gradients[pallas-v1, no bias]",
    "test_values_and_gradients[pallas-asymmetric padding]",
    "test_values_and_gradients[pallas-two batch axes]",
    "test_values_and_gradients[pallas-batch of zero]",
    "test_values_and_gradients[pallas-1-D]",
    "test_half_precision_is_as_near_as_its_inputs_allow[pallas-bfloat16]",
    "test_far_offsets_read_zero_with_zero_gradients[pallas-2-D]",
    "test_a_nan_offset_makes_nan_at_its_own_output_alone[pallas-2-D]",
    "test_vmap[pallas-mixed]",
    "test_gradient_of_a_gradient[pallas]",
    "test_batch_sharded_backward_sums_only_gradients_of_parameters[pallas-plain]",
}


def pytest_configure(config):
    config.addinivalue_line("markers", "needs(*abilities): what `op` has to be able to do, of conftest.IMPLEMENTATIONS")
    config.addinivalue_line("markers", "lenient: runs without strict promotion of dtypes and ranks (Flax, optax)")


def pytest_generate_tests(metafunc):
    if "op" in metafunc.fixturenames:
        metafunc.parametrize("op", IMPLEMENTATIONS, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave out each test of an implementation that cannot do what the test needs: it is not skipped, it does not exist."""
    items[:] = [item for item in items if _able(item)]
    for item in items:
        if _implementation(item) == "pallas" and item.name not in QUICK:
            item.add_marker(pytest.mark.slow)


def _implementation(item):
    return getattr(item, "callspec", None) and item.callspec.params.get("op")


def _able(item):
    needs = {ability for mark in item.iter_markers("needs") for ability in mark.args}
    if unknown := needs - ABILITIES:
        raise pytest.UsageError(f"{item.nodeid} needs {unknown}; known are {ABILITIES}")
    implementation = _implementation(item)
    return implementation is None or needs <= IMPLEMENTATIONS[implementation]


@pytest.fixture
def op(request):
    """`dcn_jax.deform_conv` with its implementation chosen, the GPU kernels in Pallas's interpreter."""
    with interpret() if request.param == "pallas" else contextlib.nullcontext():
        yield functools.partial(dcn_jax.deform_conv, implementation=request.param)


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
