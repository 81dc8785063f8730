"""`examples/many_devices_log.py`: the JSON lines, also of a run that goes on, and what the terminal shows."""

import hashlib
import io
import json
import types

import numpy as np
import rich.console
from many_devices_log import Log, sha256_of


def metrics(loss, skipped=0, **offsets):
    return types.SimpleNamespace(loss=np.float32(loss), skipped=np.array([0, skipped]), offsets=offsets)


def log_of(path, start=0):
    screen = io.StringIO()
    return Log(path, None, rich.console.Console(file=screen, width=80), start), screen


def test_a_line_a_step(tmp_path):
    log, screen = log_of(tmp_path / "log.json")
    log.step(1, metrics(0.5), show=False)
    log.step(2, metrics(np.nan, 1, mean_offset=np.float32(0.25), largest_offset=np.float32(3.5)), show=True)
    expected = '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null, "skipped": 1, "mean_offset": 0.25, "largest_offset": 3.5}\n'
    assert (tmp_path / "log.json").read_text() == expected  # before it is closed
    log.row({"parameters": "a"})
    log.close()
    assert (tmp_path / "log.json").read_text() == expected + '{"parameters": "a"}\n'
    assert screen.getvalue() == "step     2  loss nan  offsets 0.25 pixels, at most 3.50  skipped 1\n"


def test_a_network_without_offsets_shows_none(tmp_path):
    log, screen = log_of(None)
    log.step(2, metrics(0.5), show=True)
    assert screen.getvalue() == "step     2  loss 0.5000\n"


def test_a_run_that_goes_on_keeps_the_lines_of_its_steps_only(tmp_path):
    path = tmp_path / "log.json"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 3.0}\n{"step": 4, "lo')
    log, _ = log_of(path, start=2)
    assert path.read_text().count("\n") == 2  # already, should it be killed now
    log.step(3, metrics(0.5), show=False)
    log.close()
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1, 2, 0.5]
    path.write_text(path.read_text() + '{"parameters": "a"}\n')
    log_of(path, start=3)[0].close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    log_of(path)[0].close()
    assert path.read_text() == ""


def test_the_hash_is_of_the_bytes_in_their_order():
    a, b = np.arange(3, dtype=np.float32), np.ones((2, 2))
    assert sha256_of([("a", a), ("b", b)]) == hashlib.sha256(a.tobytes() + b.tobytes()).hexdigest()
