"""The checkpoints of 11_many_devices.py: Orbax writes them, in the background; what goes wrong becomes a sentence.

A checkpoint is a folder named after its step. It has another name until it is complete, so that a run that is killed
while it writes leaves the one before as the last.
"""

import contextlib
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from many_devices_stop import Problem

KEPT = 3
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of one that is not complete


class Checkpoints:
    """The checkpoints of one run in one folder. `run` is what must not change when it is resumed."""

    def __init__(self, folder: Path, run: dict[str, Any], *, resume: bool):
        self.folder, self.run = folder.absolute(), run
        # Orbax logs each error that it raises, and TensorStore's threads report to an event loop that is gone by then.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        sys.unraisablehook = lambda _: None
        self._check(resume)
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
        with self._or_say(f"cannot write checkpoints to {folder}", "name a folder that can be written to"):
            self.manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def _check(self, resume: bool) -> None:
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise Problem(f"--checkpoints {self.folder} is a file; name a folder")
        steps, others = self._steps(), [p.name for p in self.folder.iterdir() if UNFINISHED not in p.name]
        if steps and not resume:
            raise Problem(
                f"{self.folder} has checkpoints already, the last of step {steps[-1]}; "
                "go on from it with --resume, or name another folder"
            )
        if others and not steps:
            raise Problem(
                f"{self.folder} holds {min(others)} and no checkpoint; name an empty folder, or one that is not there yet"
            )

    def _steps(self) -> list[int]:
        """The steps of all complete checkpoints."""
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def restore(self, state: Any) -> Any:
        """The state of the last checkpoint, laid out over devices as `state` is; `state` where there is none."""
        step = self.manager.latest_step()
        if step is None:
            return state
        path = self.folder / str(step)
        earlier = [s for s in self._steps() if s < step]
        back = f"resume from step {earlier[-1]}" if earlier else "start anew"
        with self._or_say(
            f"the checkpoint {path} cannot be read: it is damaged, or another program wrote it",
            f"move it away to {back}, or name another folder",
        ):
            run = self.manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
            there = shapes(self.manager.item_metadata(step).state.tree["params"])
        here = shapes(state.params)
        differences = [f"{k} is {run.get(k)} there and {v} here" for k, v in self.run.items() if run.get(k) != v]
        differences += [
            f"{k} is {there.get(k, 'missing')} there and {here.get(k, 'missing')} here"
            for k in sorted(there | here)
            if there.get(k) != here.get(k)
        ]
        if differences:
            raise Problem(
                f"the checkpoint {path} is of another run or network: {differences[0]}"
                f"{f', and {len(differences) - 1} more' if differences[1:] else ''}; "
                "resume it with the options it began with, or name another folder"
            )
        with self._or_say(f"the checkpoint {path} cannot be read: it is damaged", f"move it away to {back}"):
            wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            return self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))["state"]

    def save(self, step: int, state: Any) -> None:
        """Begin to write; an error of the write before, in the background, is raised here."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(self.run))
        with self._writing():
            self.manager.save(step, args=items)

    def finish(self) -> None:
        """Wait until all is written."""
        with self._writing():
            self.manager.wait_until_finished()

    def _writing(self):
        last = f"the last good one is of step {max(self._steps(), default=None)}"
        return self._or_say(
            f"cannot write a checkpoint to {self.folder}; {last if self._steps() else 'none is complete yet'}",
            "make room there and run again with --resume",
        )

    @contextlib.contextmanager
    def _or_say(self, what: str, to_do: str):
        """Turn any error into a sentence: Orbax and TensorStore raise many kinds."""
        try:
            yield
        except Exception as error:
            raise Problem(f"{what} ({cause_of(error)}); {to_do}") from error


def cause_of(error: BaseException) -> str:
    """What the first of a chain of errors says; of TensorStore's, the part after the names of files."""
    while error.__cause__:
        error = error.__cause__
    said = str(error).partition(" [tensorstore_spec=")[0].rpartition('": ')[2].splitlines()
    return f"{type(error).__name__}: {said[0][:160]}" if said else type(error).__name__


def shapes(tree: Any) -> dict[str, str]:
    """Each array's shape and dtype by its name."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): f"{a.dtype}{list(a.shape)}" for path, a in leaves}
