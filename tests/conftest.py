"""What all tests share: eight CPU devices, strict JAX, and `op`, the deformable convolution under test.

Tests of the op take the fixture `op`, which is `dcn_jax.deform_conv` bound to one implementation, and run once for each
implementation that can do what they need. A test that needs more than the plain op says so, on itself or on one case:

    @pytest.mark.needs("float64", "forward_mode")
    pytest.param(..., marks=pytest.mark.needs("rank 3"))

Over the GPU kernels they are slow, since Pallas's interpreter takes seconds a test, but for those marked `quick`.
"""

import gc
import os
import shutil

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from tests.support.implementations import ABILITIES, IMPLEMENTATIONS, bound

jax.config.update("jax_num_cpu_devices", 8)

# Compiling is most of a test's time, and most of compiling is LLVM's optimising: values do not need it. With
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests compile as users do.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)

# Tracing makes many small objects that live on: where Python seldom looks through them, tests take a fifth less time.
gc.set_threshold(50_000)


def pytest_configure(config):
    config.addinivalue_line("markers", "needs(*abilities): what `op` has to be able to do, of IMPLEMENTATIONS")
    config.addinivalue_line("markers", "quick: runs over the GPU kernels always, where tests of the op are slow")
    config.addinivalue_line("markers", "lenient: runs without strict promotion of dtypes and ranks (Flax, optax)")
    if hasattr(config, "cache"):  # not with `-p no:cacheprovider`
        _keep_programs(config)


def _keep_programs(config, limit=500e6):
    """Keep what JAX compiles for the next run, in pytest's own cache (`--cache-clear` forgets it), within `limit` bytes.

    JAX tells programs apart by what they compute, its version, the devices and the compiler's options. Processes that
    tests start do not see this cache: they meet the library as a user's do.
    """
    folder = config.cache.mkdir("jax")
    starts_workers = not hasattr(config, "workerinput")
    if starts_workers and sum(file.stat().st_size for file in folder.iterdir()) > limit:
        shutil.rmtree(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def pytest_generate_tests(metafunc):
    if "op" in metafunc.fixturenames:
        metafunc.parametrize("op", IMPLEMENTATIONS, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave out each test of an implementation that cannot do what the test needs: it is not skipped, it does not exist."""
    items[:] = [item for item in items if _able(item)]
    for item in items:
        if _implementation(item) == "pallas_gpu" and not item.get_closest_marker("quick"):
            item.add_marker(pytest.mark.slow)


def _implementation(item):
    return getattr(item, "callspec", None) and item.callspec.params.get("op")


def _able(item):
    needs = {ability for mark in item.iter_markers("needs") for ability in mark.args}
    if unknown := needs - ABILITIES:
        raise pytest.UsageError(f"{item.nodeid} needs {unknown}; known are {ABILITIES}")
    implementation = _implementation(item)
    able = implementation is None or needs <= IMPLEMENTATIONS[implementation]
    if item.get_closest_marker("quick") and (implementation is None or (implementation == "pallas_gpu" and not able)):
        raise pytest.UsageError(f"{item.nodeid} is marked quick, but does not run over the GPU kernels")
    return able


@pytest.fixture
def op(request):
    """`dcn_jax.deform_conv` with its implementation chosen, the GPU kernels in Pallas's interpreter."""
    with bound(request.param) as op:
        yield op


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


@pytest.fixture
def optimized():
    """Programs as users compile them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
