"""deformops' convolution and attention, one fused Triton kernel forward and one backward, on an NVIDIA GPU.

They are asked for by the backend's name, which takes the call or refuses it: none falls back to the
eager one. Maps are as ours, channels last, which is what the kernels read. Their products are full
float32 whatever the dtype and whatever `allow_tf32` says: the library has no switch for TF32.

Attention adds up the value's gradient as the library itself chooses: in the dtype of the value from
Hopper on, in float32 on older GPUs. Its kernels have no tuner.

The convolution's two kernels look for their best tile sizes by trying 24 and 16 of them. Triton takes 3
to 80 seconds to compile each, and does so again for every new shape. Here they try only those in
CANDIDATES, compiled side by side: of the forward kernel large tiles that spill no register on an H100, of the backward kernel
three that spill little (none, 24 and 516 bytes; the worst spill 52 kilobytes).
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from deformops.backends.triton._kernels import conv_deform2d as kernels
from deformops.registry import Backend, conv, msda
from with_torch import make_calls, synchronize, to_numpy

__all__ = ["prepare", "synchronize", "to_numpy"]

# Positions, features and channels of a tile, and warps
CANDIDATES = {
    "_conv_forward_kernel": {(64, 64, 32, 4), (64, 64, 32, 8), (32, 64, 32, 8), (128, 64, 32, 8)},
    "_conv_backward_kernel": {(32, 32, 32, 8), (32, 64, 32, 8), (64, 32, 32, 8)},
}


def deform_conv(x, kernel, offset, mask=None, *, strides, padding, kernel_dilation, feature_group_count):
    """The op of deformops on the backend of fused kernels."""
    taps = kernel.shape[2] * kernel.shape[3]
    offset = offset.unflatten(-1, (-1, taps, 2))
    return conv(
        x,
        offset,
        kernel,
        mask=None if mask is None else mask.unflatten(-1, (-1, taps)),
        stride=strides,
        padding=tuple(padding),
        dilation=kernel_dilation,
        groups=feature_group_count,
        offset_groups=offset.shape[3],
        backend=Backend.TRITON,
    )


def ms_deform_attn(value, locations, weights, *, spatial_shapes):
    """The attention of deformops on the backend of fused kernels."""
    sizes, starts = level_table(tuple(map(tuple, spatial_shapes)), value.device)
    hopper_or_newer = torch.cuda.get_device_capability() >= (9, 0)
    return msda(value, sizes, starts, locations, weights, backend=Backend.TRITON, fp32acc=not hopper_or_newer)


@functools.cache
def level_table(spatial_shapes, device):
    """Each level's height and width, and where it starts; made once, since a CUDA graph records no copy from the host."""
    pixels = [height * width for height, width in spatial_shapes]
    starts = [sum(pixels[:level]) for level in range(len(pixels))]
    return torch.tensor(spatial_shapes, device=device), torch.tensor(starts, device=device)


OPS = {"deform_conv": deform_conv, "ms_deform_attn": ms_deform_attn}


def few(kernel, candidates, executor):
    """Let a kernel's tuner choose among the candidates, which are compiled side by side."""
    tile = "BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps"
    kernel.configs = [c for c in kernel.configs if tuple(c.all_kwargs()[key] for key in tile) in candidates]

    def prune_configs(options):
        with triton.AsyncCompileMode(executor):
            for config in kernel.configs:
                kernel.fn.run(*kernel.nargs.values(), **options | config.all_kwargs() | {"warmup": True})
        return kernel.configs

    kernel.prune_configs = prune_configs  # the tuner's step before it times, once for each shape


@functools.cache
def tune_among_few(threads):
    """Both kernels' tuners choose among the candidates, from now on."""
    executor = ThreadPoolExecutor(threads)
    for name, candidates in CANDIDATES.items():
        few(getattr(kernels, name), candidates, executor)


def prepare(arrays, *, op, options, threads, **how):
    """`call(i)` of the i-th copy of the inputs; with gradients, the first array is the result's."""
    tune_among_few(threads)
    return make_calls(functools.partial(OPS[op], **options), arrays, threads=threads, **how)
