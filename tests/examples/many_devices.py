"""What the tests of 11_many_devices.py share: starting it as a user does, and reading what it leaves."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAM = "11_many_devices.py"


# Runs a program that may write files of so many bytes. Not by `preexec_fn`, which forks this process: JAX warns of that.
LIMITED = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (int(sys.argv[1]),)); os.execv(sys.argv[2], sys.argv[2:])"


def start(*options, program=PROGRAM, devices=1, x64=False, largest_file=None, **popen):
    """Start the program on so many devices of the CPU; what it compiles is kept for the next, as other tests' is."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_ENABLE_X64": str(int(x64)),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, str(EXAMPLES / program), *map(str, options)]
    if largest_file is not None:
        command = [sys.executable, "-c", LIMITED, str(largest_file), *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen(command, **pipes, **popen)


def end(process, timeout=240):
    """Wait for it: (exit status, what it printed, what it printed of errors)."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def finish(*options, **how):
    """Run the program to its end, which has to be a good one: what it printed."""
    status, out, err = end(start(*options, **how))
    assert status == 0, err
    return out


def rows(path):
    """The lines of --json."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def losses(path):
    """The losses, one a step; each step is there once, in order."""
    steps = rows(path)[:-1]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    return [row["loss"] for row in steps]


def wait_for(condition, process, timeout=120):
    """Wait until the condition holds, while the process runs."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def lines(path):
    """How many lines a file has, none if it is not there."""
    return Path(path).read_text().count("\n") if Path(path).exists() else 0
