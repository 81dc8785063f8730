"""torchvision's op in a Python of its own: this end of the pipe, peer.py is the other."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.programs import WARM_UP
from benchmarks.workloads import Workload


class Peer:
    """torchvision's op in a Python of its own, asked over a pipe."""

    def __init__(self, python: str, device: str, allow_tf32: bool):
        self.device, self.allow_tf32 = {"gpu": "cuda"}.get(device, device), allow_tf32
        script = Path(__file__).with_name("peer.py")
        self.process: Any = subprocess.Popen(
            [python, str(script), str(threads()), str(WARM_UP)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is ours to answer
            # its threads do not spin on into the next one's turn
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        )
        self.version = self._answer()["version"]

    def ask(self, **command: Any) -> dict:
        """The worker's answer to one command."""
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"torchvision's process ended with status {self.process.wait()}")
        return json.loads(line)

    def prepare(self, work: Workload, dtype: str, mode: str, copies: int, name: str) -> dict:
        """Make a workload's tensors, to be run by `name`; {"error": …} where it cannot run."""
        if len(work.window) != 2:
            return {"error": "torchvision's op has two spatial axes"}
        description = {**work._asdict(), "padding": work.padding, "out_spatial": work.out_spatial}
        settings = {"dtype": dtype, "mode": mode, "device": self.device, "allow_tf32": self.allow_tf32}
        return self.ask(name=name, prepare={"work": description, "copies": copies, **settings})

    def run(self, name: str, calls: int) -> float:
        """Milliseconds of one of `calls` calls of a prepared workload."""
        answer = self.ask(run=name, calls=calls)
        if "error" in answer:
            raise RuntimeError(f"torchvision: {answer['error']}")
        time.sleep(0.01)  # its threads spin for a while before they sleep
        return answer["ms"]

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def threads() -> int:
    """Cores that this process may use: XLA takes as many threads, and torch is told to."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peer_problem(python: str) -> str | None:
    """Why torchvision cannot be asked in that Python, or None."""
    if not shutil.which(python):
        return "no such program"
    check = subprocess.run([python, "-c", "import torchvision"], capture_output=True, text=True)
    return f"cannot import torchvision ({check.stderr.strip().splitlines()[-1]})" if check.returncode else None
