"""`few_kernels`, a GPU's algorithm, on a CPU beside `loops`, which is tested against oracles: attention, grid_sample, roi_align."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import dcn_jax
from dcn_jax.ops.weighted_reads import few_kernels
from dcn_jax.ops.weighted_reads import sum as sums
from tests.support.running import assert_close

LEVELS = ((4, 5), (2, 3))


def draw(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def attend(points, **options):
    """A call of attention: values and locations that leave the maps, of `points` points on each level."""
    per_level = options.get("points_per_level")
    each = (sum(per_level),) if per_level else (2, points)
    value, locations = draw(2, 26, 2, 3), 0.5 + draw(2, 7, 2, *each, 2, seed=1, scale=0.5)
    f = functools.partial(dcn_jax.ms_deform_attn, spatial_shapes=LEVELS, **options)
    return lambda v, p, w: f(v, sampling_locations=p, attention_weights=w), (
        value,
        locations,
        draw(2, 7, 2, *each, seed=2),
    )


def sample(n, **options):
    """A call of `grid_sample` over n axes."""
    arrays = draw(2, *(5, 4, 3)[:n], 3), draw(2, 6, n, seed=1, scale=0.8)
    return functools.partial(dcn_jax.grid_sample, **options), arrays


def pool():
    rois = np.array([[0, 1, 1, 6, 5], [1, -2, 0, 3, 9], [0, 2, 2, 2, 2]], np.float32)
    return lambda x: dcn_jax.roi_align(x, rois, output_size=(2, 3)), (draw(2, 6, 7, 3),)


CALLS = {
    "four points": attend(4),
    "one point": attend(1),
    "more on one level": attend(None, points_per_level=(5, 2)),
    "none on one level": attend(None, points_per_level=(0, 2)),
    "nearest": attend(2, method="nearest"),
    "discrete": attend(2, method="discrete"),
    "1-D": sample(1),
    "2-D": sample(2, align_corners=True),
    "3-D": sample(3),
    "cubic": sample(2, method="cubic", padding_mode="reflect", align_corners=True),
    **{mode: sample(2, padding_mode=mode) for mode in ("edge", "wrap", "symmetric")},
    "regions": pool(),
}


@pytest.fixture
def there(monkeypatch):
    """Takes a GPU's algorithm; call it to do so."""
    algorithms, chosen = sums.algorithms, []

    def as_there(*arguments):
        found = tuple((("default", dict(by_platform)["default"]),) for by_platform in algorithms(*arguments))
        chosen.extend(found)
        return found

    def take():
        monkeypatch.setattr(sums, "algorithms", as_there)
        jax.clear_caches()

    yield take
    jax.clear_caches()
    assert chosen
    assert all(dict(found)["default"].result is few_kernels.result for found in chosen)


def both(f, arrays):
    """The result, and all gradients, at one cotangent."""

    @jax.jit
    def run(*arrays):
        y, pull = jax.vjp(f, *arrays)
        return y, pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype))

    return run(*arrays)


@pytest.mark.parametrize("name", CALLS)
def test_equals_the_cpus(name, there):
    f, arrays = CALLS[name]
    wanted = both(f, arrays)
    there()
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), both(f, arrays), wanted)


def test_bfloat16(there):
    f, arrays = CALLS["four points"]
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in arrays]
    wanted = both(f, arrays)
    there()
    jax.tree.map(functools.partial(assert_close, tolerance=1e-2), both(f, arrays), wanted)


def test_gradient_of_a_narrow_map_is_summed_wide(there):
    """A thousand points read one pixel: summed in bfloat16, its gradient would stop at 256."""
    there()
    features, grid = jnp.ones((3, 3, 1), jnp.bfloat16), jnp.zeros((1000, 2))
    gradient = jax.grad(lambda x: dcn_jax.grid_sample(x, grid).astype(jnp.float32).sum())(features)
    assert gradient[1, 1, 0] == 1000


def test_what_is_not_read_does_no_harm(there):
    """Infinite pixels reach only those that read them; points far away read zero, and a NaN stays where it is."""
    there()
    features = jnp.ones((5, 5, 1)).at[0].set(np.inf).at[-1].set(np.inf)
    grid = jnp.array([[0, 0], [np.inf, 0], [0, -1e30], [0, np.nan], [0.1, 0.1]])
    y = jax.jit(functools.partial(dcn_jax.grid_sample, align_corners=True))(features, grid)[:, 0]
    np.testing.assert_array_equal(y, [1, 0, 0, np.nan, 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one point", "2-D"])
def test_second_order(name, there, x64):
    f, arrays = CALLS[name]
    there()
    arrays = [np.asarray(a, np.float64) for a in arrays]
    check_grads(lambda *a: jnp.sin(f(*a)).sum(), arrays, order=2, modes=["fwd", "rev"], rtol=1e-4)
