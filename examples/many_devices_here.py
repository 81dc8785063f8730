"""Run 11_many_devices.py in several processes on this machine, each with some devices of its CPU: `make train-many`.

All options but these two are handed on, and so is SIGTERM.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    """Start the processes and wait for them; returns the first exit status that is not 0."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--processes", type=int, default=2, metavar="N", help="(default: 2)")
    p.add_argument("--devices", type=int, default=4, metavar="N", help="of each process (default: 4)")
    args, options = p.parse_known_args()

    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, str(Path(__file__).with_name("11_many_devices.py")), *options]
    together = ["--coordinator", coordinator, "--processes", str(args.processes), "--process"]
    processes = [subprocess.Popen([*program, *together, str(i)], env=environment) for i in range(args.processes)]

    def hand_on(number, _):
        for process in processes:
            process.send_signal(number)

    signal.signal(signal.SIGTERM, hand_on)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all processes
    while all(process.poll() is None for process in processes):
        time.sleep(0.1)
    statuses = [wait(process, 60 if not any(p.poll() for p in processes) else 10) for process in processes]
    if -signal.SIGKILL in statuses and max(statuses) == 0:
        print("a process was killed, and the others with it; run again with --resume", file=sys.stderr)
    return next((abs(status) for status in statuses if status), 0)


def wait(process: subprocess.Popen, seconds: float) -> int:
    """Its exit status; it is killed if it does not end in time, as when it waits for one that is lost."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


if __name__ == "__main__":
    sys.exit(main())
