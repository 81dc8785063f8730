"""A call of the layer `dcn_jax.nnx.DeformConv`, offset convolution included, beside `nnx.Conv`."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.convolution import Convolution
from dcn_jax.nnx import DeformConv


class Layer(NamedTuple):
    """One call of the layer with the shapes and options of a convolution."""

    convolution: Convolution

    op = "layer"

    def __str__(self) -> str:
        """Those of the convolution."""
        return f"{self.convolution}, layer"

    @property
    def options(self) -> dict[str, Any]:
        """What both layers are told."""
        return self.convolution.options

    def shapes(self, dtype: Any) -> list[jax.ShapeDtypeStruct]:
        """x; kernel and bias; kernel and bias of the offset convolution."""
        work = self.convolution
        x, kernel, *emitted = work.shapes(dtype)
        branch = sum(shape.shape[-1] for shape in emitted)  # channels of offsets and modulation
        more = (work.features,), (*work.window, work.x[-1], branch), (branch,)
        return [x, kernel, *(jax.ShapeDtypeStruct(shape, dtype) for shape in more)]

    def arrays(self, seed: int, dtype: Any) -> list[jax.Array]:
        """Random: x and result ~ N(0, 1), offsets ~ N(0, 2) in pixels; biases are zero."""
        random = np.random.default_rng(seed)
        x, kernel, bias, branch, branch_bias = (s.shape for s in self.shapes(dtype))
        scales = ((x, 1), (kernel, unit(kernel)), (branch, 2 * unit(branch)))
        made = [scale * random.standard_normal(shape, np.float32) for shape, scale in scales]
        made[2:2] = [np.zeros(bias)]
        return [jnp.asarray(a, dtype) for a in (*made, np.zeros(branch_bias))]

    def call(self, x, kernel, bias, branch, branch_bias, *, implementation=None, precision=None):
        """The layer."""
        options = {
            "offset_groups": self.convolution.offset_groups,
            "modulated": self.convolution.modulated,
            "implementation": implementation,
        }
        layer = self._layer(DeformConv, x, precision, **options)
        set_values(layer.offset_conv, branch, branch_bias)
        return set_values(layer, kernel, bias)(x)

    def plain(self, x, kernel, bias, *, precision=None):
        """Flax's layer of the same shape."""
        return set_values(self._layer(nnx.Conv, x, precision), kernel, bias)(x)

    def _layer(self, kind: Callable, x: jax.Array, precision: Any, **options) -> Any:
        """A layer whose parameters are shapes."""
        work = self.convolution
        options |= {**self.options, "dtype": x.dtype, "precision": precision}
        return nnx.eval_shape(lambda: kind(work.x[-1], work.features, work.window, rngs=nnx.Rngs(0), **options))

    def beside(self, inputs: Sequence[Sequence[jax.Array]]) -> tuple[Callable, list]:
        """What it is compared with, and the inputs of that: Flax's layer."""
        return self.plain, [arguments[:3] for arguments in inputs]

    def sizes(self, dtype: Any) -> dict[str, int]:
        """What scratch memory is compared with."""
        return self.convolution.sizes(dtype)


def unit(kernel: tuple[int, ...]) -> float:
    """The scale of a kernel that keeps the size of what it reads."""
    return 1 / math.sqrt(math.prod(kernel[:-1]))


def set_values(layer: Any, kernel: jax.Array, bias: jax.Array) -> Any:
    """The layer, with these parameters."""
    layer.kernel.set_value(kernel)
    layer.bias.set_value(bias)
    return layer
