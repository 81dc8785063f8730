"""The command: what it writes, and what it says of wrong arguments."""

import contextlib
import json
import sys

import numpy as np
import pytest

from benchmarks import run
from benchmarks.family import GridSample
from benchmarks.measure import Measurement
from benchmarks.programs import add_cotangent, truth
from benchmarks.rows import EMPTY
from benchmarks.workloads import WORKLOADS

KEYS = {"workload", "implementation", "dtype", "mode", "ms", "dense_ms", "peer_ms", "compile_s", "scratch_bytes"}
TWO_AXES = "torchvision's op has two spatial axes"

# Speaks the peers' protocol without torch: every call takes 7 ms. It hands back what is in a file beside it.
FAKE_PEER = f"""#!{sys.executable}
import json, pathlib, shutil, sys
if sys.argv[1] == "-c":
    print("torchvision")
else:
    print(json.dumps({{"version": "a stand-in"}}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "prepare" in command:
            mode = command["prepare"]["mode"]
            shutil.copy(pathlib.Path(__file__).with_name(mode + ".npz"), command["prepare"]["results"])
        print(json.dumps({{"ms": 7.0}} if "run" in command else {{}}), flush=True)
"""


def channels_first(array):
    """As the peers have them, kernels too."""
    return np.moveaxis(array, -1, 1) if array.shape[0] == 1 else np.transpose(array, (3, 2, 0, 1))


def test_rows_of_both_modes_and_a_picture(tiny, tmp_path, capsys):
    (tmp_path / "python").write_text(FAKE_PEER)
    (tmp_path / "python").chmod(0o755)
    inputs = [tiny.arrays(0, "float32")]
    for mode, (arguments,) in {"forward": inputs, "forward_backward": add_cotangent(tiny.call, inputs)}.items():
        np.savez(tmp_path / f"{mode}.npz", *map(channels_first, truth(tiny, mode, arguments)))
    rows = run.main(
        [
            *("--workload", "tiny", "tiny-1d", "--quick", "--peer-python", str(tmp_path / "python")),
            *("--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "bars.png")),
        ]
    )
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert (tmp_path / "bars.png").stat().st_size > 1000
    assert [(row["workload"], row["mode"]) for row in rows] == [
        (name, mode) for name in ("tiny", "tiny-1d") for mode in ("forward", "forward_backward")
    ]
    for row in rows:
        assert row.keys() >= KEYS
        assert row["ms"] > 0
        assert row["dense_ms"] > 0
        assert row["compile_s"] > 0
        assert row["columns_bytes"] == 4 * WORKLOADS[row["workload"]].columns
        # torchvision has two spatial axes
        told = (None, 7.0, 7.0, "torchvision") if row["workload"] == "tiny" else (TWO_AXES, None, None, None)
        assert tuple(row[key] for key in ("torchvision_error", "torchvision_ms", "peer_ms", "peer")) == told
    printed = capsys.readouterr().out
    assert "geometric mean" in printed
    assert "a stand-in" in printed


def test_a_picture_leaves_out_what_has_no_plain_counterpart(monkeypatch, tmp_path, tiny):
    monkeypatch.setitem(WORKLOADS, "tiny-grid", GridSample((1, 4, 5, 2)))
    picture = tmp_path / "bars.png"
    command = ["--mode", "forward", "--quick", "--plot", str(picture), "--workload"]
    run.main([*command, "tiny-grid"])
    assert not picture.exists()
    run.main([*command, "tiny", "tiny-grid"])
    assert picture.exists()


def test_an_implementation_that_is_not_there_has_a_row_that_says_why(tiny, capsys):
    ours, theirs = run.main(
        ["--workload", "tiny", "--mode", "forward", "--quick", "--implementation", "xla", "pallas_gpu"]
    )
    assert ours["error"] is None
    assert theirs["ms"] is None
    assert theirs["error"].startswith("not available: ")
    assert theirs["error"] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--workload smal", "--workload smal: not known; small?"),
        ("--workload x --suite cpu", "--workload x: not known; --list names them"),
        ("--workload small --suite cpu", "exclude each other"),
        ("--suite fast", "invalid choice: 'fast'"),
        ("--repeats 0", "--repeats 0: wanted at least 1"),
        ("--json no/such/rows.json", "--json no/such/rows.json: there is no such folder"),
        ("--plot bars", "wanted a name that ends in .png"),
        ("--peer-python no-such-python", "--peer-python no-such-python: no such program"),
        ("--device gpu", "--device gpu: "),
        ("--rounds 3", "unrecognized arguments: --rounds 3; --help lists all options"),
        ("--repeat 3", "unrecognized arguments: --repeat 3; --repeats?"),
    ],
)
def test_a_wrong_argument_gets_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(arguments.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in said
    assert said.count("\n") == 1


def test_a_python_without_a_peer_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "python").write_text(f"#!{sys.executable}\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(SystemExit):
        run.main(["--peer-python", str(tmp_path / "python")])
    said = capsys.readouterr().err
    assert (
        "has none of torch, zeromodels, torchvision, deformops, onnxruntime, openvino; name a Python that has one"
        in said
    )
    assert said.count("\n") == 1


def test_nothing_begins_when_the_time_is_over(tiny, capsys):
    assert run.main(["--workload", "tiny", "--quick", "--minutes", "0"]) == []
    assert "0 minutes are over" in capsys.readouterr().out


@pytest.mark.parametrize("visit", [0, 1])
def test_an_interrupt_keeps_what_was_measured(tiny, monkeypatch, capsys, visit):
    take_turns = Measurement.take_turns

    def interrupted(measurement, rounds, *rest):
        if measurement.rows[0]["mode"] == "forward_backward" and rounds[0] == visit:
            raise KeyboardInterrupt
        take_turns(measurement, rounds, *rest)

    monkeypatch.setattr(Measurement, "take_turns", interrupted)
    rows = run.main(["--workload", "tiny", "--quick"])
    assert [row["mode"] for row in rows] == ["forward", "forward_backward"][: 1 + visit]
    assert all(row["ms"] > 0 for row in rows)
    assert "interrupted" in capsys.readouterr().out


def test_every_workload_is_visited_again(tiny, monkeypatch):
    visits = []
    take_turns = Measurement.take_turns

    def noted(measurement, rounds, *rest):
        visits.append((measurement.rows[0]["workload"], list(rounds)))
        take_turns(measurement, rounds, *rest)

    monkeypatch.setattr(Measurement, "take_turns", noted)
    run.main(["--workload", "tiny", "tiny-1d", "--mode", "forward", "--repeats", "4"])
    assert visits == [(name, rounds) for rounds in ([0], [1], [2, 3]) for name in ("tiny", "tiny-1d")]


@pytest.mark.parametrize("suite", ["reach", "ahead"])
def test_suites_that_compile_stacks_too(tiny, monkeypatch, suite):
    monkeypatch.setitem(run.SUITES, suite, run.singly(["tiny"]))
    stack = EMPTY | {"mode": "forward_backward", "device": "a stand-in"}
    monkeypatch.setattr(run, "compile_stack", lambda name, settings: stack | {"workload": name})
    rows = run.main(["--suite", suite, "--quick", "--mode", "forward"])
    assert [row["workload"] for row in rows] == ["tiny", "stack1", "stack12"]


@pytest.mark.parametrize("option", ["--help", "--list"])
def test_what_there_is_to_choose_from_fits_in_80_columns(option, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.suppress(SystemExit):  # --help ends so
        run.main([option])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= len(WORKLOADS)
    assert max(map(len, lines)) <= 80


def test_the_table_is_as_wide_as_COLUMNS_says_and_whole_in_a_file(tiny, monkeypatch, capsys):
    command = ["--workload", "tiny", "--quick"]
    monkeypatch.setenv("COLUMNS", "60")
    run.main(command)
    narrow = capsys.readouterr().out
    monkeypatch.delenv("COLUMNS")
    run.main(command)
    whole = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 60
    assert "A wider terminal" in narrow
    assert "A wider terminal" not in whole
    assert "compile s" in whole
