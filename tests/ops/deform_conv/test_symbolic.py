"""Sizes that are known only when an exported program is called."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from dcn_jax import deform_conv, linear_sample, sampling_points
from tests.support.running import assert_close

SIZES = [(1, 3, 5), (2, 8, 7)]


def shapes(*sizes):
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sizes]


def arrays(*sizes):
    random = np.random.default_rng(0)
    return [random.standard_normal(shape).astype(np.float32) for shape in sizes]


def layer(x, kernel, branch, *, strides, padding, **options):
    """A convolution that makes the offsets, and the op."""
    pads = padding if isinstance(padding, str) else [(padding, padding)] * 2
    dimensions = ("NHWC", "HWIO", "NHWC")
    offset = lax.conv_general_dilated(x, branch, (strides, strides), pads, dimension_numbers=dimensions)
    return deform_conv(x, kernel, offset, strides=strides, padding=padding, **options)


@pytest.mark.parametrize(
    ("strides", "padding", "options"),
    [
        (1, "SAME", {}),
        (2, "SAME", {"padding_mode": ("edge", "reflect")}),
        (1, 1, {"padding_mode": "wrap"}),
        (2, "VALID", {}),
    ],
)
def test_batch_height_and_width(strides, padding, options):
    """Exported for three platforms at once, and read back."""
    batch, height, width = export.symbolic_shape("batch, height, width", constraints=["height >= 3", "width >= 3"])
    f = jax.jit(functools.partial(layer, strides=strides, padding=padding, **options))
    exported = export.export(f, platforms=("cpu", "cuda", "tpu"))(
        *shapes((batch, height, width, 4), (3, 3, 4, 3), (3, 3, 4, 36))
    )
    reread = export.deserialize(exported.serialize())
    for size in SIZES:
        given = arrays((*size, 4), (3, 3, 4, 3), (3, 3, 4, 36))
        assert_close(reread.call(*given), f(*given), 1e-6)


def test_gradients():
    batch, height, width = export.symbolic_shape("batch, height, width")

    def loss(x, kernel, offset, mask):
        return jnp.sum(jnp.sin(deform_conv(x, kernel, offset, mask)))

    f = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
    at = batch, height, width
    exported = export.export(f)(*shapes((*at, 2), (3, 3, 2, 3), (*at, 18), (*at, 9)))
    for size in SIZES:
        given = arrays((*size, 2), (3, 3, 2, 3), (*size, 18), (*size, 9))
        for gradient, wanted in zip(exported.call(*given), f(*given), strict=True):
            assert_close(gradient, wanted, 1e-5)


def test_one_and_three_spatial_axes():
    for rank, kernel in ((1, (3, 2, 2)), (3, (2, 1, 2, 2, 2))):
        spatial = export.symbolic_shape(", ".join("def"[:rank]))
        channels = rank * int(np.prod(kernel[:rank]))
        exported = export.export(jax.jit(deform_conv))(*shapes((*spatial, 2), kernel, (*spatial, channels)))
        sizes = (4, 3, 5)[:rank]
        given = arrays((*sizes, 2), kernel, (*sizes, channels))
        assert_close(exported.call(*given), deform_conv(*given), 1e-6)


def test_valid_by_the_sizes_of_the_result():
    """JAX cannot tell that (height - 2) * (width - 2) is no negative number; written the other way round it can."""
    height, width = export.symbolic_shape("height, width")
    f = jax.jit(functools.partial(deform_conv, padding="VALID"))
    exported = export.export(f)(*shapes((height + 2, width + 2, 2), (3, 3, 2, 3), (height, width, 18)))
    given = arrays((6, 5, 2), (3, 3, 2, 3), (4, 3, 18))
    assert_close(exported.call(*given), f(*given), 1e-6)


@pytest.mark.parametrize("mode", ["zeros", "edge", "wrap", "reflect", "symmetric"])
def test_linear_sample(mode):
    height, width, points = export.symbolic_shape("height, width, points")
    f = jax.jit(functools.partial(linear_sample, padding_mode=mode))
    exported = export.export(f)(*shapes((height, width, 3), (points, 2)))
    given = arrays((4, 5, 3), (30, 2))
    given[1] *= 6
    assert_close(exported.call(*given), f(*given), 1e-6)


def test_sampling_points():
    batch, height, width = export.symbolic_shape("batch, height, width")

    def f(x, offset):
        return sampling_points(offset, (3, 3), strides=2, padding=1, spatial=x.shape[1:3])

    shape = jax.eval_shape(lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 2, 2, 1), [(0, 0), (1, 1), (1, 1), (0, 0)]), *shapes((batch, height, width, 18)))  # fmt: skip
    exported = export.export(jax.jit(f))(*shapes((batch, height, width, 1)), shape)
    given = arrays((2, 7, 6, 1), (2, 4, 3, 18))
    np.testing.assert_array_equal(exported.call(*given), f(*given))


@pytest.mark.slow
def test_a_fresh_process_calls_it(tmp_path):
    batch, height, width = export.symbolic_shape("batch, height, width")
    f = jax.jit(functools.partial(layer, strides=2, padding="SAME"))
    exported = export.export(f)(*shapes((batch, height, width, 4), (3, 3, 4, 3), (3, 3, 4, 36)))
    given = arrays((2, 8, 7, 4), (3, 3, 4, 3), (3, 3, 4, 36))
    (tmp_path / "program").write_bytes(exported.serialize())
    np.savez(tmp_path / "given.npz", *given)
    code = (
        "import sys, numpy as np; from jax import export\n"
        "folder = sys.argv[1]\n"
        "program = export.deserialize(bytearray(open(f'{folder}/program', 'rb').read()))\n"
        "np.save(f'{folder}/y.npy', program.call(*np.load(f'{folder}/given.npz').values()))\n"
        "assert 'dcn_jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert_close(np.load(tmp_path / "y.npy"), f(*given), 1e-6)
