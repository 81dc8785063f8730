"""A call of the convolution, for benchmark and tests alike."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import dcn_jax


class Convolution(NamedTuple):
    """One call of `deform_conv`: shapes and options; padding is half the window, as in every ResNet."""

    x: tuple[int, ...]  # (batch, *spatial, C)
    features: int
    window: tuple[int, ...] = (3, 3)
    strides: int = 1
    dilation: int = 1
    groups: int = 1  # feature_group_count
    offset_groups: int = 1
    modulated: bool = True

    op = "deform_conv"

    def __str__(self) -> str:
        """Sizes, channels in and out, window, and the options that are not the usual ones."""
        *sizes, channels = self.x
        shape, window = "×".join(map(str, sizes)), "×".join(map(str, self.window))
        counts = {key: getattr(self, key) for key in ("strides", "dilation", "groups", "offset_groups")}
        unusual = [f"{key.replace('_', ' ')} {count}" for key, count in counts.items() if count != 1]
        unusual += [] if self.modulated else ["no mask"]
        return ", ".join([shape, f"{channels} → {self.features}", window, *unusual])

    @property
    def padding(self) -> tuple[int, ...]:
        """Pixels of border on each side, per axis."""
        return tuple((k - 1) * self.dilation // 2 for k in self.window)

    @property
    def out_spatial(self) -> tuple[int, ...]:
        """The size of the result."""
        sizes = zip(self.x[1:-1], self.padding, self.window, strict=True)
        return tuple((s + 2 * p - (k - 1) * self.dilation - 1) // self.strides + 1 for s, p, k in sizes)

    @property
    def columns(self) -> int:
        """Elements of the im2col columns: output positions x taps x channels."""
        return self.x[0] * math.prod(self.out_spatial) * math.prod(self.window) * self.x[-1]

    @property
    def options(self) -> dict[str, Any]:
        """What the op is told beside its arrays."""
        return {
            "strides": self.strides,
            "padding": self.padding,
            "kernel_dilation": self.dilation,
            "feature_group_count": self.groups,
        }

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products, forward."""
        return 2 * self.columns // self.groups * self.features

    def shapes(self, dtype: Any) -> list[jax.ShapeDtypeStruct]:
        """x, kernel, offset and, if modulated, mask."""
        batch, taps = self.x[0], math.prod(self.window) * self.offset_groups
        shapes = [
            self.x,
            (*self.window, self.x[-1] // self.groups, self.features),
            (batch, *self.out_spatial, taps * len(self.window)),
            (batch, *self.out_spatial, taps),
        ]
        return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes[: 3 + self.modulated]]

    def arrays(self, seed: int, dtype: Any) -> list[jax.Array]:
        """Random: x and result ~ N(0, 1), offset ~ N(0, 2) in pixels, mask ~ U(0, 1)."""
        random = np.random.default_rng(seed)  # NumPy's: JAX would compile for each shape
        shapes = [s.shape for s in self.shapes(dtype)]
        unit = 1 / math.sqrt(math.prod(shapes[1][:-1]))
        made = [scale * random.standard_normal(s, np.float32) for scale, s in zip((1, unit, 2), shapes, strict=False)]
        made += [random.random(shape, np.float32) for shape in shapes[3:]]
        return [jnp.asarray(a).astype(dtype) for a in made]

    def call(self, x, kernel, offset, mask=None, *, implementation=None, precision=None):
        """The deformable convolution."""
        return dcn_jax.deform_conv(
            x, kernel, offset, mask, **self.options, implementation=implementation, precision=precision
        )

    def dense(self, x, kernel, *, precision=None):
        """The plain convolution of the same shape."""
        axes = "HWD"[: len(self.window)]
        return lax.conv_general_dilated(
            x,
            kernel,
            (self.strides,) * len(axes),
            [(p, p) for p in self.padding],
            rhs_dilation=(self.dilation,) * len(axes),
            feature_group_count=self.groups,
            precision=precision,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        )

    def beside(self, inputs: Sequence[Sequence[jax.Array]]) -> tuple[Callable, list]:
        """What it is compared with, and the inputs of that: the plain convolution."""
        return self.dense, [arguments[:2] for arguments in inputs]

    def sizes(self, dtype: Any) -> dict[str, int]:
        """What scratch memory is compared with."""
        return {"columns_bytes": self.columns * jnp.dtype(dtype).itemsize}
