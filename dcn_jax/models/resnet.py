"""ResNets with deformable stages. With torchvision's weights they compute what torchvision's do.

    stem                 conv1 7×7 stride 2, bn1, relu, max-pool 3×3 stride 2
    layer1 … layer4      lists of blocks, the papers' conv2 … conv5, of strides 4, 8, 16 and 32
    fc                   mean over positions, then the classifier

Modules have torchvision's names: its `layer2.0.downsample.1.weight` is
`model.layer2[0].downsample[1].scale`. A weight is `kernel` in a linear layer or convolution and
`scale` in a batch norm; `running_mean` is `mean`, `running_var` is `var`.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dcn_jax._core import checks, extras

try:
    from flax import nnx
except ModuleNotFoundError as error:
    raise extras.missing("dcn_jax.models", "flax") from error

from dcn_jax.nnx import DeformConv

STAGES = ("conv2", "conv3", "conv4", "conv5")

_he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")  # arXiv 1502.01852, section 2.2


class BasicBlock(nnx.Module):
    """Two 3×3 convolutions and a shortcut.

    y = relu(bn2(conv2(relu(bn1(conv1(x))))) + downsample(x))
    """

    expansion = 1

    def __init__(self, in_features: int, features: int, strides: int, *, conv: Any, conv3x3: Any, norm: Any):
        self.conv1 = conv3x3(in_features, features, (3, 3), strides, padding=1)
        self.bn1 = norm(features)
        self.conv2 = conv3x3(features, features, (3, 3), padding=1)
        self.bn2 = norm(features)
        self.downsample: tuple = _shortcut(in_features, features, strides, conv=conv, norm=norm)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(*batch, H, W, in_features)` to `(*batch, ⌈H / strides⌉, ⌈W / strides⌉, features)`."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        for layer in self.downsample:
            x = layer(x)
        return nnx.relu(y + x)


class Bottleneck(nnx.Module):
    """Convolutions 1×1, 3×3 with the stride ("v1.5") and 1×1, and a shortcut.

    y = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + downsample(x))
    """

    expansion = 4

    def __init__(self, in_features: int, features: int, strides: int, *, conv: Any, conv3x3: Any, norm: Any):
        self.conv1 = conv(in_features, features, (1, 1))
        self.bn1 = norm(features)
        self.conv2 = conv3x3(features, features, (3, 3), strides, padding=1)
        self.bn2 = norm(features)
        self.conv3 = conv(features, self.expansion * features, (1, 1))
        self.bn3 = norm(self.expansion * features)
        self.downsample: tuple = _shortcut(in_features, self.expansion * features, strides, conv=conv, norm=norm)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(*batch, H, W, in_features)` to `(*batch, ⌈H / strides⌉, ⌈W / strides⌉, 4 * features)`."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        for layer in self.downsample:
            x = layer(x)
        return nnx.relu(y + x)


def _shortcut(in_features: int, features: int, strides: int, *, conv: Any, norm: Any) -> tuple:
    """The layers that bring a block's input to the shape of its output, if it differs."""
    # A tuple: under nnx.capture, remat and the like fail on a module that holds an nnx.List.
    if strides == 1 and in_features == features:
        return nnx.data(())
    return nnx.data((conv(in_features, features, (1, 1), strides), norm(features)))


class ResNet(nnx.Module):
    """A residual network with deformable stages; see `resnet18` to `resnet101`.

        y = fc(mean over positions of conv5(conv4(conv3(conv2(stem(x))))))

    Every 3×3 convolution of a deformable stage is a `dcn_jax.nnx.DeformConv`, also the first,
    which has the stage's stride. The ResNet-50 of the DCNv2 paper has 13 such layers:
    `deform_stages=("conv3", "conv4", "conv5")`. That of DCNv1 has 3: `deform_stages=("conv5",)`
    and `modulated=False`.

    Batch norms use the statistics of the batch in a new model and after `model.train()`, and their
    running statistics after `model.eval()`. As in Flax, the running variance averages the variance
    of each batch; torch multiplies that by n / (n - 1), with n positions.

    Args:
        block: the class of the blocks, `BasicBlock` or `Bottleneck`.
        depths: blocks in each of the four stages.
        num_classes: logits of the classifier; None for none: the model returns mean features.
        deform_stages: which of "conv2", "conv3", "conv4" and "conv5" are deformable.
        modulated: whether deformable layers have a modulation (DCNv2) or not (DCNv1).
        offset_groups: groups of channels of a deformable layer; each has offsets of its own.
        mask_scale: the modulation's upper bound. The papers and mmdetection have 1.0; with 2.0 a
            network with the weights of a plain one computes what that one does.
        max_offset: pixels, one bound for all offsets or one per axis; None for no bound.
        implementation: of the op: "xla", "pallas_gpu", "pallas_tpu" or None, which takes "xla" today.
        remat: whether the backward pass recomputes the inside of each block to save memory.
        in_features: channels of the images.
        width: features of the stem; stages have 1, 2, 4, 8 times as many (times 4: `Bottleneck`).
        dtype: of the computation; by default that of the input and parameters, promoted.
        param_dtype: of the parameters. The statistics of batch norms are always float32.
        precision: of the convolutions and the classifier.
        rngs: where the initializers' random keys come from.

    Raises:
        ValueError: an option does not fit; the message names it.
        TypeError: an option is of the wrong kind.

    Source: arXiv 1512.03385 (ResNet), arXiv 1811.11168 (DCNv2), section 4; torchvision's
        `resnet.py` for names and padding.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from dcn_jax.models.resnet import resnet18
        >>> make = lambda: resnet18(10, deform_stages=("conv4", "conv5"), rngs=nnx.Rngs(0))
        >>> model = nnx.eval_shape(make)  # shapes alone; nnx.jit(make)() has parameters too
        >>> type(model.layer4[0].conv2).__name__
        'DeformConv'
        >>> images = jnp.ones((2, 64, 64, 3))
        >>> nnx.eval_shape(lambda model, x: model(x), model, images).shape
        (2, 10)
        >>> [y.shape for y in nnx.eval_shape(lambda model, x: model.stages(x), model, images)]
        [(2, 16, 16, 64), (2, 8, 8, 128), (2, 4, 4, 256), (2, 2, 2, 512)]
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        num_classes: int | None = 1000,
        *,
        deform_stages: Collection[str] = (),
        modulated: bool = True,
        offset_groups: int = 1,
        mask_scale: float = 1.0,
        max_offset: float | Sequence[float | None] | None = None,
        implementation: str | None = None,
        remat: bool = False,
        in_features: int = 3,
        width: int = 64,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs,
    ):
        _check_options(num_classes, deform_stages, in_features, width)
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        bare: dict[str, Any] = {"use_bias": False, "kernel_init": _he_normal, "precision": precision, **common}
        conv = functools.partial(nnx.Conv, **bare)
        norm = functools.partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5, **common)  # torch's momentum of 0.1
        deform_conv = functools.partial(
            DeformConv,
            modulated=modulated,
            offset_groups=offset_groups,
            mask_scale=mask_scale,
            max_offset=max_offset,
            implementation=implementation,
            **bare,
        )

        def layer(stage: int) -> nnx.List:
            conv3x3 = deform_conv if STAGES[stage] in deform_stages else conv
            features = width * 2**stage
            before = width if stage == 0 else features // 2 * block.expansion
            strides = 1 if stage == 0 else 2
            shapes = [(before, features, strides)] + [(features * block.expansion, features, 1)] * (depths[stage] - 1)
            return nnx.List([block(*shape, conv=conv, conv3x3=conv3x3, norm=norm) for shape in shapes])

        self.in_features = in_features
        self.remat = remat
        self.conv1 = conv(in_features, width, (7, 7), 2, padding=3)
        self.bn1 = norm(width)
        self.layer1 = layer(0)
        self.layer2 = layer(1)
        self.layer3 = layer(2)
        self.layer4 = layer(3)
        self.fc: nnx.Linear | None = nnx.data(None)
        if num_classes is not None:
            self.fc = nnx.Linear(width * 8 * block.expansion, num_classes, precision=precision, **common)

    def stages(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The features of the stages conv2 to conv5.

        Args:
            x: images `(*batch, H, W, in_features)`, normalised as for the weights.

        Returns:
            Four arrays `(*batch, ⌈H / s⌉, ⌈W / s⌉, features)` of strides s = 4, 8, 16 and 32.

        Raises:
            ValueError: x is not of that shape.
        """
        if jnp.ndim(x) < 3 or x.shape[-1] != self.in_features:
            raise ValueError(f"x has shape {jnp.shape(x)}; wanted images (*batch, height, width, {self.in_features})")
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = _max_pool(x)
        run: Callable = nnx.remat(_run) if self.remat else _run
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                x = run(block, x)
            features.append(x)
        return tuple(features)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits of the images.

        Args:
            x: images `(*batch, H, W, in_features)`, normalised as for the weights.

        Returns:
            `(*batch, num_classes)`; if `num_classes` is None, conv5's features, averaged.

        Raises:
            ValueError: x is not of that shape.
        """
        features = jnp.mean(self.stages(x)[-1], axis=(-3, -2))
        return features if self.fc is None else self.fc(features)


def _max_pool(x: jax.Array) -> jax.Array:
    """Max-pool 3×3, stride 2, padding 1, for any batch axes; nnx.max_pool takes at most one."""
    batch = x.ndim - 3
    window, strides = (1,) * batch + (3, 3, 1), (1,) * batch + (2, 2, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, [(0, 0)] * batch + [(1, 1), (1, 1), (0, 0)])


def _run(block: nnx.Module, x: jax.Array) -> jax.Array:
    return block(x)


def _check_options(num_classes: Any, deform_stages: Any, in_features: Any, width: Any) -> None:
    if num_classes is not None:
        checks.count("num_classes", num_classes)
    checks.count("in_features", in_features)
    checks.count("width", width)
    if isinstance(deform_stages, str) or not isinstance(deform_stages, Collection):
        raise TypeError(
            f"deform_stages={deform_stages!r} is a {type(deform_stages).__name__}; wanted a tuple of names from {STAGES}"
        )
    if unknown := [stage for stage in deform_stages if stage not in STAGES]:
        raise ValueError(f"deform_stages has {unknown[0]!r}, which is not a stage; wanted names from {STAGES}")


def resnet18(num_classes: int | None = 1000, *, rngs: nnx.Rngs, **options: Any) -> ResNet:
    """ResNet-18: basic blocks, 11,689,512 parameters. Its options are those of `ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, rngs=rngs, **options)


def resnet34(num_classes: int | None = 1000, *, rngs: nnx.Rngs, **options: Any) -> ResNet:
    """ResNet-34: basic blocks, 21,797,672 parameters. Its options are those of `ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, rngs=rngs, **options)


def resnet50(num_classes: int | None = 1000, *, rngs: nnx.Rngs, **options: Any) -> ResNet:
    """ResNet-50: bottlenecks, 25,557,032 parameters. Its options are those of `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, rngs=rngs, **options)


def resnet101(num_classes: int | None = 1000, *, rngs: nnx.Rngs, **options: Any) -> ResNet:
    """ResNet-101: bottlenecks, 44,549,160 parameters. Its options are those of `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, rngs=rngs, **options)
