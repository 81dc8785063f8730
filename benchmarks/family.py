"""Calls of the family: `grid_sample`, `ms_deform_attn`, `dcnv3` and `dcnv4`."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import dcn_jax
from benchmarks.convolution import Convolution


class GridSample(NamedTuple):
    """One call of `grid_sample`: a map that is warped by a flow ~ N(0, 2) pixels."""

    x: tuple[int, ...]  # (batch, H, W, C)

    align_corners: bool = False

    op = "grid_sample"

    def __str__(self) -> str:
        """Sizes and channels."""
        return f"{by(self.x[:-1])}, {self.x[-1]}, grid_sample"

    @property
    def options(self) -> dict[str, Any]:
        """What the op is told beside its arrays."""
        return {"align_corners": self.align_corners}

    def shapes(self, dtype: Any) -> list[jax.ShapeDtypeStruct]:
        """The map, and the grid."""
        return [jax.ShapeDtypeStruct(shape, dtype) for shape in (self.x, (*self.x[:-1], 2))]

    def arrays(self, seed: int, dtype: Any) -> list[jax.Array]:
        """Random: x ~ N(0, 1), and the grid."""
        random, size = np.random.default_rng(seed), self.x[1:-1]
        flow = 2 * random.standard_normal((*self.x[:-1], 2)) / size[::-1]  # (x, y), as a share of the map
        at = pixel_centres(size).reshape(1, *size, 2) + flow
        return [jnp.asarray(a, dtype) for a in (random.standard_normal(self.x), 2 * at - 1)]

    def call(self, x, grid, *, implementation=None, precision=None):
        """The op."""
        only_xla(self.op, implementation)
        return dcn_jax.grid_sample(x, grid, align_corners=self.align_corners)

    def beside(self, inputs: Sequence[Sequence[jax.Array]]) -> None:
        """JAX has nothing to compare it with."""

    def sizes(self, dtype: Any) -> dict[str, int]:
        """What scratch memory is compared with."""
        return {"result_bytes": math.prod(self.x) * jnp.dtype(dtype).itemsize}


class Attention(NamedTuple):
    """One call of `ms_deform_attn`, which reads ~ N(0, 2) pixels from where the query is."""

    levels: tuple[tuple[int, int], ...]
    queries: int | None = None  # at random places; None for one at each pixel of each level
    batch: int = 1
    heads: int = 8
    channels: int = 32  # of each head
    points: int = 4  # on each level

    op = "ms_deform_attn"

    def __str__(self) -> str:
        """Queries, heads, channels, points and levels."""
        sizes = ", ".join(map(by, self.levels))
        return f"{self.batch}×{self.query_count}×{self.heads}×{self.channels}, {self.points} points on {sizes}"

    @property
    def pixels(self) -> int:
        """Of all levels."""
        return sum(map(math.prod, self.levels))

    @property
    def query_count(self) -> int:
        """How many queries there are."""
        return self.queries or self.pixels

    @property
    def options(self) -> dict[str, Any]:
        """What the op is told beside its arrays."""
        return {"spatial_shapes": self.levels}

    def shapes(self, dtype: Any) -> list[jax.ShapeDtypeStruct]:
        """Value, sampling_locations and attention_weights."""
        read = (self.batch, self.query_count, self.heads, len(self.levels), self.points)
        value = (self.batch, self.pixels, self.heads, self.channels)
        return [jax.ShapeDtypeStruct(shape, dtype) for shape in (value, (*read, 2), read)]

    def arrays(self, seed: int, dtype: Any) -> list[jax.Array]:
        """Random: value and result ~ N(0, 1)."""
        random = np.random.default_rng(seed)
        value, locations, weights = (s.shape for s in self.shapes(dtype))
        at = np.concatenate([pixel_centres(size) for size in self.levels])  # (S, (x, y))
        if self.queries:
            at = random.random((self.queries, 2))
        pixels = np.array(self.levels)[:, None, ::-1]  # (L, 1, (x, y))
        moved = at[:, None, None, None] + 2 * random.standard_normal(locations) / pixels
        share = 2 * random.random(weights) / math.sqrt(len(self.levels) * self.points)
        return [jnp.asarray(a, dtype) for a in (random.standard_normal(value), moved, share)]

    def call(self, value, locations, weights, *, implementation=None, precision=None):
        """The op."""
        return dcn_jax.ms_deform_attn(value, self.levels, locations, weights, implementation=implementation)

    def beside(self, inputs: Sequence[Sequence[jax.Array]]) -> None:
        """JAX has nothing to compare it with."""

    def sizes(self, dtype: Any) -> dict[str, int]:
        """What scratch memory is compared with."""
        return {"result_bytes": self.batch * self.query_count * self.heads * self.channels * jnp.dtype(dtype).itemsize}


class Depthwise(NamedTuple):
    """One call of `dcnv3` or `dcnv4`, 3×3."""

    op: str
    x: tuple[int, ...]  # (batch, H, W, C)
    groups: int

    def __str__(self) -> str:
        """Sizes, channels, groups."""
        return f"{by(self.x[:-1])}, {self.x[-1]}, {self.op}, groups {self.groups}"

    @property
    def options(self) -> dict[str, Any]:
        """What the op is told beside its arrays."""
        return {"groups": self.groups} if self.op == "dcnv4" else {}

    def shapes(self, dtype: Any) -> list[jax.ShapeDtypeStruct]:
        """x, and offset and mask, or both in one."""
        counts = (27,) if self.op == "dcnv4" else (18, 9)
        more = [(*self.x[:-1], self.groups * count) for count in counts]
        return [jax.ShapeDtypeStruct(shape, dtype) for shape in (self.x, *more)]

    def arrays(self, seed: int, dtype: Any) -> list[jax.Array]:
        """Random: x ~ N(0, 1), offset ~ N(0, 2) in pixels, mask ~ U(0, 1)."""
        random, positions = np.random.default_rng(seed), self.x[:-1]
        offset = 2 * random.standard_normal((*positions, self.groups, 18))
        mask = random.random((*positions, self.groups, 9))
        taps = [np.concatenate([offset, mask], -1)] if self.op == "dcnv4" else [offset, mask]
        flat = [a.reshape(*positions, -1) for a in taps]
        return [jnp.asarray(a, dtype) for a in (random.standard_normal(self.x), *flat)]

    def call(self, *arrays, implementation=None, precision=None):
        """The op."""
        only_xla(self.op, implementation)
        return getattr(dcn_jax, self.op)(*arrays, **self.options)

    def beside(self, inputs: Sequence[Sequence[jax.Array]]) -> tuple[Callable, list]:
        """What it is compared with, and the inputs of that: the dense DCNv2 of its shape."""
        dense = Convolution(self.x, self.x[-1])
        return dense.call, [dense.arrays(seed, x.dtype) for seed, (x, *_) in enumerate(inputs)]

    def sizes(self, dtype: Any) -> dict[str, int]:
        """What scratch memory is compared with."""
        return {"result_bytes": math.prod(self.x) * jnp.dtype(dtype).itemsize}


class RoiAlign(NamedTuple):
    """One call of `roi_align`, 7×7 bins of 2×2 samples; the boxes have no gradient, as torchvision's have none."""

    x: tuple[int, ...]  # (batch, H, W, C)
    boxes: int

    op = "roi_align"

    def __str__(self) -> str:
        """Sizes, channels, boxes."""
        return f"{by(self.x[:-1])}, {self.x[-1]}, roi_align of {self.boxes} boxes"

    @property
    def options(self) -> dict[str, Any]:
        """What the op is told beside its arrays."""
        return {"output_size": 7, "spatial_scale": 1.0, "sampling_ratio": 2, "aligned": True}

    def shapes(self, dtype: Any) -> list[jax.ShapeDtypeStruct]:
        """The map, and the boxes."""
        return [jax.ShapeDtypeStruct(shape, dtype) for shape in (self.x, (self.boxes, 5))]

    def arrays(self, seed: int, dtype: Any) -> list[jax.Array]:
        """Random: x ~ N(0, 1); boxes from 1 to 16 pixels high and wide, anywhere on the map."""
        random, (batch, height, width, _) = np.random.default_rng(seed), self.x
        start = random.random((self.boxes, 2)) * (width, height)
        rois = np.concatenate([start, start + random.uniform(1, 16, (self.boxes, 2))], axis=1)
        image = random.integers(0, batch, (self.boxes, 1))
        return [jnp.asarray(a, dtype) for a in (random.standard_normal(self.x), np.concatenate([image, rois], 1))]

    def call(self, x, rois, *, implementation=None, precision=None):
        """The op."""
        only_xla(self.op, implementation)
        return dcn_jax.roi_align(x, jax.lax.stop_gradient(rois), **self.options)

    def beside(self, inputs: Sequence[Sequence[jax.Array]]) -> None:
        """JAX has nothing to compare it with."""

    def sizes(self, dtype: Any) -> dict[str, int]:
        """What scratch memory is compared with."""
        return {"result_bytes": self.boxes * 7 * 7 * self.x[-1] * jnp.dtype(dtype).itemsize}


def by(sizes: Sequence[int]) -> str:
    """Sizes in words."""
    return "×".join(map(str, sizes))


def pixel_centres(size: tuple[int, ...]) -> np.ndarray:
    """Where the pixels of a map are, from 0 to 1, row by row: (H · W, (x, y))."""
    rows, columns = ((np.arange(n) + 0.5) / n for n in size)
    return np.stack(np.meshgrid(columns, rows), -1).reshape(-1, 2)


def only_xla(op: str, implementation: str | None) -> None:
    """Refuse what the op does not have."""
    if implementation not in (None, "xla"):
        raise ValueError(f"{op} has no implementation={implementation!r}")
