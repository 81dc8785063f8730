"""torchvision's op, on a CPU or a GPU, with or without gradients."""

import functools

import torch


def deform_conv(x, kernel, offset, mask=None, *, strides, padding, kernel_dilation, feature_group_count):
    """The op of torchvision, which reads the groups off the kernel."""
    import torchvision

    return torchvision.ops.deform_conv2d(
        x, offset, kernel, stride=strides, padding=tuple(padding), dilation=kernel_dilation, mask=mask
    )


OPS = {"deform_conv": deform_conv}


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
