"""The options of 05_digits.py, checked before any work begins."""

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

SEEDS = "train each network with the seeds 0 to N - 1 and give mean ± standard deviation (default: 1)"
RATE = "its highest value; that of the offset branches is a tenth of it (default: 0.01)"
JSON = (
    "write the results there, a list with an object for each network and seed: model, seed, params, mean_iou, "
    "foreground_accuracy, step_ms"
)


def parse(argv: Sequence[str] | None, *, models: Iterable[str], description: str | None) -> argparse.Namespace:
    """Read and check the command line; `argv` of None is that of the program."""
    models = list(models)
    p = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # so that an error is one line
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--model", nargs="+", choices=models, default=models, help="which to train (default: all four)")
    p.add_argument("--steps", type=int, default=800, metavar="N", help="of training, for each network (default: 800)")
    p.add_argument("--seeds", type=int, default=1, metavar="N", help=SEEDS)
    p.add_argument("--batch", type=int, default=16, metavar="N", help="canvases in a step (default: 16)")
    p.add_argument("--learning-rate", type=float, default=0.01, metavar="RATE", help=RATE)
    p.add_argument("--json", type=Path, metavar="FILE", help=JSON)
    out = p.add_argument("--out", type=Path, default=Path("runs/digits"), metavar="DIR")
    out.help = "where sampling.png goes; made if need be (default: runs/digits)"
    args = p.parse_args(argv)

    for option in ("steps", "seeds", "batch"):
        if getattr(args, option) < 1:
            p.error(f"--{option} {getattr(args, option)}: wanted at least 1")
    if not 0 < args.learning_rate < math.inf:
        p.error(f"--learning-rate {args.learning_rate}: wanted a positive number")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        p.error(f"--json {args.json}: wanted the name of a file in a folder that exists")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        p.error(f"--out {args.out}: cannot make this folder ({error.strerror})")
    args.model = list(dict.fromkeys(args.model))
    return args
