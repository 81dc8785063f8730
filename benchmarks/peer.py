"""torchvision's op, timed on request; peer_process.py runs this in a Python that has torch.

Reads one JSON command a line and answers with one a line: {"prepare": {…}, "name": …} makes the
tensors of a workload, {"run": name, "calls": n} times n calls of it.
"""

import json
import math
import sys
import time

import torch
import torchvision


def prepare(work, dtype, mode, device, copies, allow_tf32, warm_up):
    """A function that runs the workload `calls` times and returns the milliseconds of one."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
    dtype = getattr(torch, dtype)
    (batch, height, width, channels), (kh, kw) = work["x"], work["window"]
    out = batch, *work["out_spatial"]

    def tensors(seed):
        random = torch.Generator().manual_seed(seed)
        per_tap = work["offset_groups"] * kh * kw
        x = torch.randn(batch, channels, height, width, generator=random)
        kernel = torch.randn(work["features"], channels // work["groups"], kh, kw, generator=random)
        kernel /= math.sqrt(kernel[0].numel())
        offset = 2 * torch.randn(out[0], per_tap * 2, *out[1:], generator=random)
        mask = torch.rand(out[0], per_tap, *out[1:], generator=random)
        made = [x, kernel, offset, mask][: 3 + work["modulated"]]
        return [t.to(device, dtype).requires_grad_(mode != "forward") for t in made]

    def convolve(x, kernel, offset, mask=None):
        return torchvision.ops.deform_conv2d(
            x,
            offset,
            kernel,
            stride=work["strides"],
            padding=tuple(work["padding"]),
            dilation=work["dilation"],
            mask=mask,
        )

    inputs = [tensors(seed) for seed in range(copies)]
    with torch.no_grad():
        cotangent = torch.randn_like(convolve(*inputs[0]))

    def synchronize():
        if device == "cuda":
            torch.cuda.synchronize()

    def call(arguments):
        y = convolve(*arguments)
        if mode != "forward":
            torch.autograd.grad(y, arguments, cotangent)

    def run(calls):
        start = time.perf_counter()
        while True:  # what counts for nothing, once at least
            call(inputs[-1])
            synchronize()
            if time.perf_counter() - start > warm_up:
                break
        start = time.perf_counter()
        for i in range(calls):
            call(inputs[i % copies])
        synchronize()
        return 1e3 * (time.perf_counter() - start) / calls

    run(1)
    return run


def answer(command, runs, warm_up):
    """Obey one command; `runs` holds what was prepared."""
    if "run" in command:
        return {"ms": runs[command["run"]](command["calls"])}
    before = 0
    if command["prepare"]["device"] == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    runs[command["name"]] = prepare(**command["prepare"], warm_up=warm_up)
    cuda = command["prepare"]["device"] == "cuda"
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before if cuda else None}


def main():
    """Answer commands until the input ends."""
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps({"version": f"torchvision {torchvision.__version__}, torch {torch.__version__}"}), flush=True)
    runs = {}
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), runs, warm_up=float(sys.argv[2]))
        except (RuntimeError, NotImplementedError) as error:
            reply = {"error": str(error).strip().splitlines()[0]}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
