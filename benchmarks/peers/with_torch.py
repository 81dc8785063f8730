"""torchvision's op and torch's own, on a CPU or a GPU, with or without gradients."""

import functools

import torch


def deform_conv(x, kernel, offset, mask=None, *, strides, padding, kernel_dilation, feature_group_count):
    """The op of torchvision, which reads the groups off the kernel."""
    import torchvision

    return torchvision.ops.deform_conv2d(
        x, offset, kernel, stride=strides, padding=tuple(padding), dilation=kernel_dilation, mask=mask
    )


def grid_sample(x, grid, *, align_corners):
    """The op of torch."""
    return torch.nn.functional.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=align_corners)


def ms_deform_attn(value, locations, weights, *, spatial_shapes):
    """Deformable DETR's attention by `grid_sample`, level after level, as its authors publish it for a CPU."""
    batch, _, heads, channels = value.shape
    levels = value.split([height * width for height, width in spatial_shapes], dim=1)
    read = []
    for level, (size, pixels) in enumerate(zip(spatial_shapes, levels, strict=True)):
        maps = pixels.permute(0, 2, 3, 1).reshape(batch * heads, channels, *size)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)  # (N M, Q, P, 2)
        read.append(grid_sample(maps, grid, align_corners=False))  # (N M, D, Q, P)
    weights = weights.transpose(1, 2).flatten(0, 1).flatten(-2)[:, None]  # (N M, 1, Q, L P)
    y = (torch.stack(read, dim=-2).flatten(-2) * weights).sum(-1)  # (N M, D, Q)
    return y.reshape(batch, heads * channels, -1).transpose(1, 2)


OPS = {"deform_conv": deform_conv, "grid_sample": grid_sample, "ms_deform_attn": ms_deform_attn}


def prepare(arrays, *, op, options, mode, dtype, device, copies, threads, allow_tf32, **_):
    """`call(i)` of the i-th copy of the inputs; with gradients, the first array is the result's."""
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
    before = 0
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    tensors = [torch.from_numpy(array).to(device, getattr(torch, dtype)) for array in arrays]
    inputs = [[tensor.clone() for tensor in tensors] for _ in range(copies)]
    function = functools.partial(OPS[op], **options)

    def forward(copy):
        return [function(*inputs[copy])]

    def forward_backward(copy):
        cotangent, *arguments = inputs[copy]
        y = function(*arguments)
        return [y, *torch.autograd.grad(y, arguments, cotangent)]

    if mode == "forward":
        call = forward
    else:
        call = forward_backward
        for _, *arguments in inputs:
            for tensor in arguments:
                tensor.requires_grad_()
    call(0)
    return call, {"peak_bytes": torch.cuda.max_memory_allocated() - before if device == "cuda" else None}


def synchronize():
    """Wait for what was begun."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def to_numpy(result):
    """The result as an array of float32."""
    return result.detach().float().cpu().numpy()
