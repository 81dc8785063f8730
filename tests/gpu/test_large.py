"""Maps of many tiles, on a GPU: against float64 on the host, or where that takes too long, XLA's full float32 on the GPU."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import workloads
from tests.support import gpu, oracle
from tests.support.cases import draw
from tests.support.running import value_and_gradients

if reason := gpu.missing():
    pytest.skip(reason, allow_module_level=True)


@pytest.mark.parametrize("kind", ["HIGHEST", "TF32", "bfloat16"])
@pytest.mark.parametrize("name", workloads.GPU)
def test_workloads(record_property, name, kind):
    """One image of each; in bfloat16, XLA is given the rounded arguments."""
    (_, *spatial), features = workloads.WORKLOADS[name][:2]
    case = draw((1, *spatial), (3, 3), features, bias=False)
    cotangent = gpu.draw_cotangent(case)
    precision, tolerance = gpu.PRECISIONS.get(kind, (None, gpu.HALVES.get(kind)))
    tolerance = gpu.KERNELS_TF32 if kind == "TF32" else tolerance
    if kind in gpu.HALVES:
        case, cotangent = case.astype(jnp.dtype(kind)), cotangent.astype(jnp.dtype(kind))
    got = gpu.run(gpu.gradients_of(gpu.bound("pallas_gpu", precision=precision)), case.arrays, cotangent)
    reference = gpu.gradients_of(gpu.bound("xla", precision=gpu.PRECISIONS["HIGHEST"][0]))
    wanted = gpu.run(reference, case.astype(np.float32).arrays, cotangent.astype(np.float32))
    # Full float32 is a sum of thousands of products in another order.
    gpu.check(record_property, f"{name} {kind}", gpu.named(got), gpu.named(wanted), max(tolerance, 3e-5))


def all_at_one_pixel(case):
    """The same, but that every tap reads within half a pixel of the middle: its gradient is a sum over all positions."""
    x, kernel, offset, *rest = case.arrays
    geometry = oracle.Geometry(x.shape[1:3], (3, 3), 1, "SAME", 1)
    regular = np.reshape([geometry.tap_positions(p) for p in np.ndindex(*x.shape[1:3])], offset.shape[1:])
    middle = np.tile(np.array(x.shape[1:3]) // 2, 9)
    near = middle - regular + np.random.default_rng(4).uniform(-0.4, 0.4, offset.shape)
    return case._replace(arrays=(x, kernel, near.astype(np.float32), *rest))


STRIPS = draw((2, 70, 131, 16), (3, 3), 24)
CASES = {"strips": STRIPS, "one pixel": all_at_one_pixel(STRIPS)}


@pytest.mark.parametrize("implementation", ["pallas_gpu", "xla"])
@pytest.mark.parametrize("name", CASES)
def test_a_map_of_several_strips(record_property, name, implementation):
    case = CASES[name]
    cotangent = gpu.draw_cotangent(case)
    precision, tolerance = gpu.PRECISIONS["HIGHEST"]
    got = gpu.run(gpu.gradients_of(gpu.bound(implementation, precision=precision)), case.arrays, cotangent)

    def on_host(arrays, cotangent):
        return value_and_gradients(gpu.bound("xla"), arrays, cotangent)

    wanted = gpu.on_host(on_host, case.arrays, cotangent)
    gpu.check(record_property, name, gpu.named(got), gpu.named(wanted), 10 * tolerance)
