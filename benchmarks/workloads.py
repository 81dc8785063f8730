"""Named workloads: the shapes that deformable convolution meets, for benchmark and tests alike."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import dcn_jax


class Workload(NamedTuple):
    """One call of the op: shapes and options; padding is half the window, as in every ResNet."""

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
    def two_axes(self) -> bool:
        """Whether peers have an op for it."""
        return len(self.window) == 2

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

    def deform_conv(self, x, kernel, offset, mask=None, *, implementation=None, precision=None):
        """The deformable convolution of this workload."""
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


WORKLOADS = {
    # ResNet-50's 3×3 layers, one image or a few, at 224×224 and at a detector's size (800×1216)
    "conv2-224": Workload((1, 56, 56, 64), 64),
    "conv3-224": Workload((4, 28, 28, 128), 128),
    "conv4-224": Workload((4, 14, 14, 256), 256),
    "conv5-224": Workload((4, 7, 7, 512), 512),
    "conv3-detector": Workload((1, 100, 152, 128), 128),
    "conv4-detector": Workload((1, 50, 76, 256), 256),
    "conv5-detector": Workload((1, 25, 38, 512), 512),
    "stride2": Workload((4, 56, 56, 128), 128, strides=2),
    "dcnv1": Workload((4, 28, 28, 128), 128, modulated=False),
    "small": Workload((8, 32, 32, 32), 32),
    # groups of channels that convolve apart, that read apart, or both
    "groups4": Workload((4, 28, 28, 128), 128, groups=4),
    "offset-groups4": Workload((4, 28, 28, 128), 128, offset_groups=4),
    "groups4-offset-groups4": Workload((4, 28, 28, 128), 128, groups=4, offset_groups=4),
    "groups32": Workload((4, 28, 28, 128), 128, groups=32),  # as in a ResNeXt
    "offset-groups8": Workload((1, 64, 64, 64), 64, offset_groups=8),
    "offset-groups16": Workload((1, 64, 64, 128), 64, offset_groups=16),
    "depthwise": Workload((4, 28, 28, 128), 128, groups=128),
    # few channels on a large map: each row that is read is short
    "thin": Workload((1, 256, 256, 16), 16),
    # one and three spatial axes
    "1d": Workload((8, 1024, 128), 128, window=(3,)),
    "3d": Workload((1, 16, 28, 28, 32), 32, window=(3, 3, 3)),
    # ResNet-50's deformable layers at 800×1344 in a GPU's share of a batch, and a small map
    "gpu-conv3": Workload((8, 100, 168, 128), 128),
    "gpu-conv4": Workload((8, 50, 84, 256), 256),
    "gpu-conv5": Workload((8, 25, 42, 512), 512),
    "gpu-conv2": Workload((16, 56, 56, 64), 64),
    # how the time grows with the batch and with the map
    **{f"batch{n}": Workload((n, 14, 14, 64), 64) for n in (1, 4, 16, 64)},
    **{f"map{n}": Workload((1, n, n, 64), 64) for n in (14, 28, 56, 112, 224)},
}

# Sets of them
FIVE = ("conv2-224", "conv3-224", "conv4-224", "conv4-detector", "small")
TEN = (*FIVE, "groups4", "offset-groups4", "offset-groups8", "offset-groups16", "thin")
RESNET = ("conv3-224", "conv4-224", "conv5-224", "conv3-detector", "conv4-detector", "conv5-detector")
GROUPS = ("groups4", "offset-groups4", "groups4-offset-groups4")
KINDS = (*GROUPS, "groups32", "depthwise", "1d", "3d")
GPU = ("gpu-conv3", "gpu-conv4", "gpu-conv5", "gpu-conv2")
BATCHES = tuple(name for name in WORKLOADS if name.startswith("batch"))
MAPS = tuple(name for name in WORKLOADS if name.startswith("map"))
