"""Named workloads: the shapes that the ops meet, for benchmark and tests alike."""

from benchmarks.convolution import Convolution
from benchmarks.family import Attention, Depthwise, GridSample, RoiAlign
from benchmarks.layers import Layer

Workload = Convolution | GridSample | Attention | Depthwise | RoiAlign | Layer

LEVELS = ((100, 152), (50, 76), (25, 38), (13, 19))  # of a detector's image of 800×1216, strides 8 to 64
STAGES = ((56, 128, 4), (28, 256, 8), (14, 512, 16), (7, 1024, 32))  # side, channels, groups

CONVOLUTIONS: dict[str, Convolution] = {
    # ResNet-50's 3×3 layers, one image or a few, at 224×224 and at a detector's size (800×1216)
    "conv2-224": Convolution((1, 56, 56, 64), 64),
    "conv3-224": Convolution((4, 28, 28, 128), 128),
    "conv4-224": Convolution((4, 14, 14, 256), 256),
    "conv5-224": Convolution((4, 7, 7, 512), 512),
    "conv3-detector": Convolution((1, 100, 152, 128), 128),
    "conv4-detector": Convolution((1, 50, 76, 256), 256),
    "conv5-detector": Convolution((1, 25, 38, 512), 512),
    "stride2": Convolution((4, 56, 56, 128), 128, strides=2),
    "dcnv1": Convolution((4, 28, 28, 128), 128, modulated=False),
    "small": Convolution((8, 32, 32, 32), 32),
    # groups of channels that convolve apart, that read apart, or both
    "groups4": Convolution((4, 28, 28, 128), 128, groups=4),
    "offset-groups4": Convolution((4, 28, 28, 128), 128, offset_groups=4),
    "groups4-offset-groups4": Convolution((4, 28, 28, 128), 128, groups=4, offset_groups=4),
    "groups32": Convolution((4, 28, 28, 128), 128, groups=32),  # as in a ResNeXt
    "offset-groups8": Convolution((1, 64, 64, 64), 64, offset_groups=8),
    "offset-groups16": Convolution((1, 64, 64, 128), 64, offset_groups=16),
    "depthwise": Convolution((4, 28, 28, 128), 128, groups=128),
    # few channels on a large map: each row that is read is short
    "thin": Convolution((1, 256, 256, 16), 16),
    # one and three spatial axes
    "1d": Convolution((8, 1024, 128), 128, window=(3,)),
    "3d": Convolution((1, 16, 28, 28, 32), 32, window=(3, 3, 3)),
    # ResNet-50's deformable layers at 800×1344 in a GPU's share of a batch, and a small map
    "gpu-conv3": Convolution((8, 100, 168, 128), 128),
    "gpu-conv4": Convolution((8, 50, 84, 256), 256),
    "gpu-conv5": Convolution((8, 25, 42, 512), 512),
    "gpu-conv2": Convolution((16, 56, 56, 64), 64),
    # how the time grows with the batch and with the map
    **{f"batch{n}": Convolution((n, 14, 14, 64), 64) for n in (1, 4, 16, 64)},
    **{f"map{n}": Convolution((1, n, n, 64), 64) for n in (14, 28, 56, 112, 224)},
}
FAMILY_CALLS: dict[str, Workload] = {
    # the family: one map, Deformable DETR's encoder and decoder, and DCNv4's four stages on one image
    "grid-sample": GridSample((1, 256, 256, 64)),
    "detr-encoder": Attention(LEVELS),
    "detr-decoder": Attention(LEVELS, queries=300),
    "roi-align": RoiAlign((1, 50, 76, 256), 512),  # a detector's boxes on one level
    **{f"dcnv3-{side}": Depthwise("dcnv3", (1, side, side, channels), groups) for side, channels, groups in STAGES},
    **{f"dcnv4-{side}": Depthwise("dcnv4", (1, side, side, channels), groups) for side, channels, groups in STAGES},
}

# Sets of them
FIVE = ("conv2-224", "conv3-224", "conv4-224", "conv4-detector", "small")
TEN = (*FIVE, "groups4", "offset-groups4", "offset-groups8", "offset-groups16", "thin")
RESNET = ("conv3-224", "conv4-224", "conv5-224", "conv3-detector", "conv4-detector", "conv5-detector")
GROUPS = ("groups4", "offset-groups4", "groups4-offset-groups4")
KINDS = (*GROUPS, "groups32", "depthwise", "1d", "3d")
GPU = ("gpu-conv3", "gpu-conv4", "gpu-conv5", "gpu-conv2")
BATCHES = tuple(name for name in CONVOLUTIONS if name.startswith("batch"))
MAPS = tuple(name for name in CONVOLUTIONS if name.startswith("map"))
FAMILY = tuple(FAMILY_CALLS)

# Layers of the shapes of ten convolutions: all of the cost that a network sees
LAYER_CALLS: dict[str, Workload] = {f"layer-{name}": Layer(CONVOLUTIONS[name]) for name in TEN}
LAYERS = tuple(LAYER_CALLS)

WORKLOADS: dict[str, Workload] = {**CONVOLUTIONS, **FAMILY_CALLS, **LAYER_CALLS}
