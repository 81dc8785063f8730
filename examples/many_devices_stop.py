"""Why a run of 11_many_devices.py ends before its last step."""

import signal
from typing import Any

import jax
import numpy as np


class Problem(Exception):
    """One sentence: what is wrong, and what to do. It is printed without a traceback."""


class Signals:
    """SIGTERM, by which clusters preempt, and Ctrl-C: received here, and known to all processes one step later."""

    def __init__(self):
        self.received = 0

    def listen(self) -> None:
        """From now on both are noted; a Ctrl-C after either ends the program at once."""
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, _) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_devices(self, sharding: jax.NamedSharding) -> jax.Array:
        """What each process has received, one element a device; a step returns their maximum."""
        shape = (sharding.mesh.size,)
        return jax.make_array_from_callback(shape, sharding, lambda _: np.full(1, self.received, np.int32))


class NotFinite:
    """Counts the steps skipped because their loss or gradients are not finite, and knows when to give up."""

    def __init__(self, names: list[str], patience: int):
        self.names, self.patience = names, patience
        self.first = ""  # where the present row of such steps began

    def check(self, step: int, metrics: Any) -> None:
        """Raise Problem if `patience` of them came in a row."""
        in_a_row = int(metrics.skipped[0])
        if in_a_row == 1 or (in_a_row and not self.first):
            affected = [name for name, finite in zip(self.names, metrics.finite, strict=True) if not finite]
            count = f"{len(affected)} parameter{'s' if affected[1:] else ''}"
            what = f"{affected[0]} was the first of {count}" if affected else "the loss alone was"
            self.first = f"at step {step}, {what} affected"
        if in_a_row >= self.patience:
            raise Problem(
                f"stopped at step {step}: {in_a_row} steps in a row were skipped, because their loss or gradients were "
                f"not finite; {self.first}. Lower --learning-rate, or look at the data and the offsets there"
            )
