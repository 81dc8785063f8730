"""torchvision's op and torch's own, on a CPU or a GPU, with or without gradients.

On a GPU a call is the replay of a CUDA graph, so that no launching from Python is timed, and the
clock is read around many of them.
"""

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


def roi_align(x, rois, *, output_size, **options):
    """The op of torchvision."""
    import torchvision

    return torchvision.ops.roi_align(x, rois, output_size, **options)


OPS = {
    "deform_conv": deform_conv,
    "grid_sample": grid_sample,
    "ms_deform_attn": ms_deform_attn,
    "roi_align": roi_align,
}


def prepare(arrays, *, op, options, **how):
    """`call(i)` of the i-th copy of the inputs; with gradients, the first array is the result's."""
    return make_calls(functools.partial(OPS[op], **options), arrays, **how)


def make_calls(function, arrays, *, mode, dtype, device, copies, threads, allow_tf32, **_):
    """`call(i)` of `function` of the i-th copy of `arrays`, and what else there is to tell."""
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
    tensors = [torch.from_numpy(array).to(device, getattr(torch, dtype)) for array in arrays]
    inputs = [tensors]

    def forward(copy):
        return [function(*inputs[copy])]

    def forward_backward(copy):
        cotangent, *arguments = inputs[copy]
        leaves = [tensor.requires_grad_() for tensor in arguments]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, cotangent, materialize_grads=True)]

    call = forward if mode == "forward" else forward_backward
    if device != "cuda":
        call(0)
        inputs += [[tensor.detach().clone() for tensor in tensors] for _ in range(copies - 1)]
        return call, {"peak_bytes": None}
    call(0)  # what is compiled and tuned is compiled and tuned now
    torch.cuda.synchronize()
    others = torch.cuda.memory_allocated() - sum(tensor.nbytes for tensor in tensors)
    torch.cuda.reset_peak_memory_stats()
    call(0)
    more = {"peak_bytes": torch.cuda.max_memory_allocated() - others}
    inputs += [[tensor.detach().clone() for tensor in tensors] for _ in range(copies - 1)]
    try:
        return record(call, copies), more | {"timed": "graphs"}
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"timed by single launches, since CUDA records no graph of it: {error}")
        return call, more | {"timed": "launches"}


def record(call, copies):
    """`call`, whose kernels are CUDA graphs: Python launches them more slowly than a GPU runs small ones."""
    stream, graphs, pool = torch.cuda.Stream(), [], None
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)  # what a stream's first call makes is not recorded
        for copy in range(copies):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(*([pool] if pool else []))
            try:
                results = call(copy)
            finally:
                graph.capture_end()
            pool = graph.pool()
            graphs.append((graph, results))
    torch.cuda.current_stream().wait_stream(stream)

    def replay(copy):
        graph, results = graphs[copy]
        graph.replay()
        return results

    return replay


def synchronize():
    """Wait for what was begun."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def to_numpy(result):
    """The result as an array of float32."""
    return result.detach().float().cpu().numpy()
