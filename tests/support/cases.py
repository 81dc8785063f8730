"""Random arguments for the op, drawn in NumPy so that the library and the oracle see the same ones."""

from typing import NamedTuple

import numpy as np

from tests.support import oracle


class Case(NamedTuple):
    """Arguments of one call: `arrays` (x, kernel, offset, mask, bias) by position, `options` by name."""

    arrays: tuple
    options: dict

    def astype(self, dtype):
        return self._replace(arrays=tuple(None if a is None else a.astype(dtype) for a in self.arrays))


def draw(x, window, features, *, offset_groups=1, mask=True, bias=True, whole=0.2, seed=0, **options):
    """Arguments for an input of shape `x`, from N(0, 1); offsets within ±3 pixels, some `whole`, the rest away from the kinks."""
    rng = np.random.default_rng(seed)
    rank, taps = len(window), int(np.prod(window))
    geometry = oracle.Geometry(
        x[-rank - 1 : -1],
        window,
        options.get("strides", 1),
        options.get("padding", "SAME"),
        options.get("kernel_dilation", 1),
    )
    positions = (*x[: -rank - 1], *geometry.out)
    kernel = (*window, x[-1] // options.get("feature_group_count", 1), features)
    shape = (*positions, offset_groups * taps * rank)
    fraction = np.where(rng.random(shape) < whole, 0.0, rng.uniform(0.1, 0.9, shape))
    arrays = (
        rng.standard_normal(x),
        rng.standard_normal(kernel),
        rng.integers(-3, 3, shape) + fraction,
        rng.random((*positions, offset_groups * taps)) if mask else None,
        rng.standard_normal(features) if bias else None,
    )
    return Case(tuple(None if a is None else a.astype(np.float32) for a in arrays), options)
