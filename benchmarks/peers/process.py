"""A peer's op in a process of its own: this end of the pipe, worker.py is the other."""

import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.convolution import Convolution
from benchmarks.peers.onnx_model import write_model
from benchmarks.programs import warm_up
from benchmarks.workloads import Workload


class Kind(NamedTuple):
    """What a peer can do."""

    ops: tuple[str, ...]
    gradients: bool = True  # an inference engine has none, and runs here in float32
    devices: tuple[str, ...] = ("cpu", "gpu")


PEERS = {
    "torch": Kind(("grid_sample", "ms_deform_attn")),
    "zeromodels": Kind(("ms_deform_attn",)),
    "torchvision": Kind(("deform_conv", "roi_align")),
    "deformops": Kind(("deform_conv", "ms_deform_attn"), devices=("gpu",)),
    "onnxruntime": Kind(("deform_conv",), gradients=False, devices=("cpu",)),
    "openvino": Kind(("deform_conv",), gradients=False, devices=("cpu",)),
}

# The axes of ours in an op's order, of the result and of each argument. Most have maps with channels first.
MAP, OURS, KERNEL = (0, 3, 1, 2), (0, 1, 2, 3), (3, 2, 0, 1)
LAYOUTS = {
    "deform_conv": (MAP, MAP, KERNEL, MAP, MAP),
    "grid_sample": (MAP, MAP, OURS),
    "roi_align": (MAP, MAP, (0, 1)),
    "ms_deform_attn": tuple(tuple(range(axes)) for axes in (3, 4, 6, 5)),  # as ours
}
CHANNELS_LAST = {("deformops", "deform_conv"): (OURS, OURS, KERNEL, OURS, OURS)}


class Peer:
    """A peer's op in a process of its own, asked over a pipe."""

    def __init__(self, name: str, python: str, device: str, allow_tf32: bool):
        self.name, self.kind = name, PEERS[name]
        self.device, self.allow_tf32 = {"gpu": "cuda"}.get(device, device), allow_tf32
        self.folder = tempfile.TemporaryDirectory()  # arrays are handed over in files
        script = Path(__file__).with_name("worker.py")
        self.process: Any = subprocess.Popen(
            [python, str(script), name, str(threads()), str(warm_up(device))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is ours to answer
            # its threads do not spin on into the next one's turn; zeromodels' Keras computes by JAX
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "KERAS_BACKEND": "jax"},
        )
        answer = self._answer()
        self.version = answer.get("version")
        self.problem = f"{name} {answer['error']}" if "error" in answer else None

    def ask(self, **command: Any) -> dict:
        """The worker's answer to one command."""
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}'s process ended with status {self.process.wait()}")
        return json.loads(line)

    def refusal(self, work: Workload, dtype: str, mode: str) -> str | None:
        """Why the peer has no figure of this, or None."""
        if work.op not in self.kind.ops:
            return f"{self.name} has no {work.op}"
        if isinstance(work, Convolution) and len(work.window) != 2:
            return f"{self.name}'s op has two spatial axes"
        if not self.kind.gradients and (dtype, mode) != ("float32", "forward"):
            return f"{self.name} is asked for inference in float32 on a CPU"
        return self.problem

    def prepare(self, work: Workload, inputs: Sequence[Any], dtype: str, mode: str, copies: int, name: str) -> dict:
        """Make a call ready, to be run by `name`, of so many copies of `inputs`.

        `inputs` are the op's arguments, with gradients after the result's cotangent. The answer holds
        the peer's "results" in our layout, or why there are none: {"error": …}.
        """
        if problem := self.refusal(work, dtype, mode):
            return {"error": problem}
        result, *arguments = CHANNELS_LAST.get((self.name, work.op)) or LAYOUTS[work.op]
        arguments, gradients = arguments[: len(work.shapes(dtype))], mode != "forward"
        axes = [result, *arguments] if gradients else arguments
        arrays = [np.asarray(a, np.float32).transpose(order) for a, order in zip(inputs, axes, strict=True)]
        files = {key: str(Path(self.folder.name) / key) for key in ("arrays", "results", "model")}
        files["arrays"] += ".npz"
        files["results"] += ".npz"
        np.savez(files["arrays"], *map(np.ascontiguousarray, arrays))
        if self.name == "onnxruntime":
            if not importlib.util.find_spec("onnx"):
                return {"error": "onnxruntime reads a model, which is made here with onnx: pip install onnx"}
            write_model(files["model"], arrays, work.options)
        call = {"op": work.op, "options": work.options, "mode": mode, "dtype": dtype, "copies": copies}
        answer = self.ask(name=name, prepare=files | call | {"device": self.device, "allow_tf32": self.allow_tf32})
        if "error" in answer:
            return {"error": f"{self.name}: {answer['error']}"}
        with np.load(files["results"]) as stored:
            made = [stored[key] for key in stored.files]
        axes = [result, *arguments] if gradients else [result]
        return answer | {"results": [a.transpose(np.argsort(order)) for a, order in zip(made, axes, strict=True)]}

    def run(self, name: str, calls: int) -> float:
        """Milliseconds of one of `calls` calls of what was prepared."""
        answer = self.ask(run=name, calls=calls)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        if self.device == "cpu":
            time.sleep(0.02)  # its threads spin for a while before they sleep
        return answer["ms"]

    def close(self) -> None:
        """End the process."""
        self.process.communicate()
        self.folder.cleanup()


def threads() -> int:
    """Cores that this process may use: XLA takes as many threads, and peers are told to."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def importable(python: str) -> tuple[str, ...]:
    """The peers that a Python seems to have."""
    find = f"from importlib.util import find_spec; print(*[n for n in {tuple(PEERS)} if find_spec(n)])"
    found = subprocess.run([python, "-c", find], capture_output=True, text=True)
    return tuple(found.stdout.split())


def peer_problem(python: str) -> str | None:
    """Why no peer can be asked in that Python, or None."""
    if not shutil.which(python):
        return "no such program"
    return None if importable(python) else f"has none of {', '.join(PEERS)}"


def start_peers(pythons: Sequence[str], ops: set[str], device: str, allow_tf32: bool) -> dict[str, Peer]:
    """Each peer that has one of the ops on the device, in a process of its own: of the first Python that has it."""
    homes = {name: python for python in reversed(pythons) for name in importable(python)}
    kinds = {name: kind for name, kind in PEERS.items() if name in homes}
    names = [name for name, kind in kinds.items() if ops.intersection(kind.ops) and device in kind.devices]
    return {name: Peer(name, homes[name], device, allow_tf32) for name in names}
