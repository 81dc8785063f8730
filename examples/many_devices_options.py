"""The options of 11_many_devices.py, checked before any work begins."""

import argparse
import importlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

SAVE = "a checkpoint every N steps and at the end (default: 50)"
CHECKPOINTS = "where checkpoints go, the last three are kept; made if need be (default: none are written)"
RESUME = "go on from the last checkpoint in --checkpoints; from the start where there is none yet"
JSON = (
    'a line {"step": n, "loss": x} a step, at the end {"parameters": sha256}; after --resume, as if never interrupted'
)
LOG = "print the loss and the offsets every N steps, and add the offsets to --json (default: 10)"
GIVE_UP = "stop after N steps in a row whose loss or gradients are not finite (default: 5)"
PROFILE = "write a profile of five steps there, for TensorBoard, XProf or Perfetto"


def parse(argv: Sequence[str] | None, *, models: Iterable[str], description: str | None) -> argparse.Namespace:
    """Read and check the command line; `argv` of None is that of the program."""
    p = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # so that an error is one line
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--model", choices=list(models), default="dcnv2", help="which network (default: dcnv2)")
    p.add_argument("--steps", type=int, default=200, metavar="N", help="of training (default: 200)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the parameters and the data (default: 0)")
    p.add_argument(
        "--batch", type=int, default=16, metavar="N", help="canvases in a step, on all devices (default: 16)"
    )
    p.add_argument("--learning-rate", type=float, default=0.01, metavar="RATE", help="after ten steps (default: 0.01)")
    p.add_argument("--checkpoints", type=Path, metavar="DIR", help=CHECKPOINTS)
    p.add_argument("--save-every", type=int, default=50, metavar="N", help=SAVE)
    p.add_argument("--resume", action="store_true", help=RESUME)
    p.add_argument("--json", type=Path, metavar="FILE", help=JSON)
    p.add_argument("--log-every", type=int, default=10, metavar="N", help=LOG)
    p.add_argument("--give-up", type=int, default=5, metavar="N", help=GIVE_UP)
    p.add_argument("--tensorboard", type=Path, metavar="DIR", help="write what is logged there too, for TensorBoard")
    p.add_argument("--profile", type=Path, metavar="DIR", help=PROFILE)
    p.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 runs, and a port that is free there")
    p.add_argument("--processes", type=int, metavar="N", help="how many there are; each is started with these options")
    p.add_argument("--process", type=int, metavar="I", help="which this is, from 0 to N - 1; 0 alone prints and logs")
    args = p.parse_args(argv)

    for option in ("steps", "batch", "save_every", "log_every", "give_up"):
        if getattr(args, option) < 1:
            p.error(f"--{option.replace('_', '-')} {getattr(args, option)}: wanted at least 1")
    if not 0 <= args.seed < 2**32:
        p.error(f"--seed {args.seed}: wanted 0 to {2**32 - 1}")
    if not 0 < args.learning_rate < math.inf:
        p.error(f"--learning-rate {args.learning_rate}: wanted a positive number")
    if args.resume and not args.checkpoints:
        p.error("--resume: wanted --checkpoints DIR too, to resume from")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        p.error(f"--json {args.json}: wanted the name of a file in a folder that exists")
    if args.tensorboard and not installed("tensorboardX"):
        p.error("--tensorboard: tensorboardX is not installed: pip install tensorboardX")

    together = (args.coordinator, args.processes, args.process)
    if any(value is not None for value in together):
        if None in together:
            p.error("--coordinator, --processes and --process: wanted all three or none")
        host, _, port = args.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            p.error(f"--coordinator {args.coordinator}: wanted HOST:PORT, such as 10.0.0.1:1234")
        if not 0 <= args.process < args.processes:
            p.error(f"--process {args.process}: wanted 0 to {args.processes - 1}, one less than --processes")
    return args


def installed(module: str) -> bool:
    """Can it be imported?"""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True
