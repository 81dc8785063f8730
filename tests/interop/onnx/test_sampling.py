"""grid_sample in ONNX: methods, borders, both meanings of ±1, one to three axes, open sizes."""

import functools
import itertools

import numpy as np
import pytest

from dcn_jax import grid_sample
from dcn_jax.interop import to_onnx
from tests.support.onnx_models import check, checked

pytestmark = pytest.mark.lenient


def draw(spatial, query, batch=2, channels=3):
    """Features, and a grid that leaves the map by up to its size."""
    rng = np.random.default_rng(0)
    grid = rng.uniform(-2, 2, (batch, *query, len(spatial)))
    given = {"features": rng.normal(size=(batch, *spatial, channels)), "grid": grid}
    return {name: array.astype(np.float32) for name, array in given.items()}


def shapes(given, known):
    return {
        name: array.shape if known else (*(None for _ in array.shape[1:]), array.shape[-1])
        for name, array in given.items()
    }


BORDERS = list(itertools.product(("zeros", "edge", "reflect", "symmetric"), (False, True)))


@pytest.mark.parametrize(("padding_mode", "align_corners"), BORDERS)
def test_borders(padding_mode, align_corners):
    given, options = draw((4, 5), (3, 6)), {"padding_mode": padding_mode, "align_corners": align_corners}
    sample = functools.partial(grid_sample, **options)
    for known in True, False:
        check(checked(sample, shapes(given, known)), sample, given)


@pytest.mark.parametrize("method", ["linear", "nearest"])
@pytest.mark.parametrize(("spatial", "query"), [((6,), (5,)), ((4, 1), (2, 3, 2)), ((3, 4, 5), (2, 3))])
def test_axes_and_methods(spatial, query, method):
    given, sample = draw(spatial, query), functools.partial(grid_sample, method=method)
    check(checked(sample, shapes(given, known=False)), sample, given)


def test_positions_at_infinity():
    given = draw((4, 5), (3, 2))
    given["grid"][:, 0] = [[np.inf, 0.1], [1e30, -1e30]]
    check(checked(grid_sample, shapes(given, True)), grid_sample, given)


def test_before_opset_20():
    given = draw((4, 5), (3, 6))
    check(checked(grid_sample, shapes(given, True), opset=17, decompose=True), grid_sample, given, reference=False)
    with pytest.raises(ValueError, match="over three axes are read from opset 20 on, and opset=19"):
        to_onnx(grid_sample, shapes(draw((3, 4, 5), (2,)), True), opset=19)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_mode": "wrap"}, "padding_mode='wrap' has no form in ONNX"),
        ({"padding_mode": ("zeros", "edge")}, r"padding_mode=\('zeros', 'edge'\) has no form"),
        ({"method": "cubic"}, "method='cubic' is not known; wanted one of"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        to_onnx(functools.partial(grid_sample, **options), shapes(draw((4, 5), (3, 6)), True))


def test_a_grid_of_other_axes():
    with pytest.raises(ValueError, match=r"^grid has shape \(2, 3, 3\); wanted \(batch, \*query, 2\)"):
        to_onnx(grid_sample, {"features": (2, 4, 5, 3), "grid": (2, 3, 3)})
