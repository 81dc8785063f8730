"""The benchmark: what it writes, what it says of wrong arguments, and that its workloads are what they claim."""

import json
import math
import sys

from benchmarks import run as benchmark
from benchmarks import report as benchmark_report
import jax
import numpy as np
import pytest
from benchmarks.workloads import WORKLOADS, Workload

TINY = Workload((1, 4, 5, 2), 3)
TINY_1D = Workload((1, 6, 2), 3, window=(3,))
KEYS = {"workload", "implementation", "dtype", "mode", "ms", "dense_ms", "peer_ms", "compile_s", "scratch_bytes"}

# Speaks the peer's protocol without torch: every call takes 7 ms.
FAKE_PEER = f"""#!{sys.executable}
import json, sys
if sys.argv[1] != "-c":
    print(json.dumps({{"version": "a stand-in"}}), flush=True)
    for line in sys.stdin:
        print(json.dumps({{"ms": 7.0}} if "run" in json.loads(line) else {{}}), flush=True)
"""


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(WORKLOADS, "tiny", TINY)
    monkeypatch.setitem(WORKLOADS, "tiny-1d", TINY_1D)
    monkeypatch.setattr(benchmark, "measure_rates", lambda *_: benchmark.Rates(1e9, 1e9, 1e9))


@pytest.mark.parametrize("name", WORKLOADS)
def test_each_workload_is_a_call_of_both_convolutions(name):
    work = WORKLOADS[name]
    shapes = work.shapes("float32")
    result = (work.x[0], *work.out_spatial, work.features)
    assert jax.eval_shape(work.deform_conv, *shapes).shape == result
    assert jax.eval_shape(work.dense, *shapes[:2]).shape == result
    assert work.columns == math.prod(result[:-1]) * math.prod(work.window) * work.x[-1]


def test_a_workload_s_arrays_have_its_shapes_and_a_unit_result():
    work = WORKLOADS["small"]._replace(x=(2, 16, 16, 32), modulated=False)
    arrays = work.arrays(0, "float32")
    assert [a.shape for a in arrays] == [s.shape for s in work.shapes("float32")]
    assert np.std(arrays[2]) == pytest.approx(2, rel=0.1)
    assert np.std(work.dense(*arrays[:2])) == pytest.approx(1, rel=0.1)


def test_rows_of_both_modes_and_a_picture(tiny, tmp_path, capsys):
    (tmp_path / "python").write_text(FAKE_PEER)
    (tmp_path / "python").chmod(0o755)
    rows = benchmark.main(
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
        assert row["peer_ms"] == (7.0 if row["workload"] == "tiny" else None)  # torchvision has two spatial axes
    printed = capsys.readouterr().out
    assert "geometric mean" in printed
    assert "a stand-in" in printed


def test_an_implementation_that_is_not_there_has_a_row_that_says_why(tiny, capsys):
    ours, theirs = benchmark.main(
        ["--workload", "tiny", "--mode", "forward", "--quick", "--implementation", "xla", "pallas"]
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
        ("--rounds 3", "unrecognized arguments: --rounds 3"),
    ],
)
def test_a_wrong_argument_gets_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(arguments.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in said
    assert said.count("\n") == 1


def test_a_python_without_torchvision_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "python").write_text(f"#!{sys.executable}\nimport sys\nsys.exit('No module named torchvision')\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(SystemExit):
        benchmark.main(["--peer-python", str(tmp_path / "python")])
    assert "cannot import torchvision (No module named torchvision)" in capsys.readouterr().err


def test_nothing_begins_when_the_time_is_over(tiny, capsys):
    assert benchmark.main(["--workload", "tiny", "--quick", "--minutes", "0"]) == []
    assert "0 minutes are over" in capsys.readouterr().out


def test_on_a_gpu_the_inputs_are_rotated_and_both_implementations_timed(tiny):
    options = benchmark.Options("gpu", "a stand-in", ("xla", "pallas"), 1, True, None)
    rows, runs = benchmark.prepare("tiny", "bfloat16", "forward_backward", False, options)
    assert [row["implementation"] for row in rows] == ["xla", "pallas"]
    program = runs[benchmark.Case("tiny", "bfloat16", "xla")].__self__
    assert len(program.inputs) == 16
    assert len({float(x.sum()) for _, x, *_ in program.inputs}) > 8  # not one array again and again
    assert 0 < rows[0]["parity"] < 2e-2


def test_parity_sees_a_wrong_result(tiny):
    inputs = [TINY.arrays(0, "float32")]
    right = benchmark.JaxProgram(TINY.deform_conv, inputs)
    wrong = benchmark.JaxProgram(lambda *a: TINY.deform_conv(*a).at[0, 0, 0, 0].add(1), inputs)
    assert benchmark.parity("tiny", "forward", right) < 1e-6
    assert benchmark.parity("tiny", "forward", wrong) > 1e-2


@pytest.mark.parametrize("visit", [0, 1])
def test_an_interrupt_keeps_what_was_measured(tiny, monkeypatch, capsys, visit):
    take_turns = benchmark.Job.take_turns

    def interrupted(job, rounds, *rest):
        if job.rows[0]["mode"] == "forward_backward" and rounds[0] == visit:
            raise KeyboardInterrupt
        take_turns(job, rounds, *rest)

    monkeypatch.setattr(benchmark.Job, "take_turns", interrupted)
    rows = benchmark.main(["--workload", "tiny", "--quick"])
    assert [row["mode"] for row in rows] == ["forward", "forward_backward"][: 1 + visit]
    assert all(row["ms"] > 0 for row in rows)
    assert "interrupted" in capsys.readouterr().out


def test_runs_take_turns_and_the_median_counts():
    order = []

    def run(case, times):
        def call(calls):
            order.append(case.program)
            return next(times)

        return call

    cases = {program: benchmark.Case("w", "float32", program) for program in ("dense", "xla", "peer")}
    # Two runs warm each visit up; then one outlier, which the median ignores.
    took = {"dense": [900.0] + 6 * [20.0], "xla": [900.0] + 6 * [20.0], "peer": [900.0, 20.0, 20.0]}
    took = {program: [50.0, 50.0, *times, 50.0, 50.0, *(8 * [20.0])] for program, times in took.items()}
    took["peer"].insert(3, 20.0)  # four even rounds in the first visit, three in the second
    runs = {case: run(case, iter(took[program])) for program, case in cases.items()}
    row = {"workload": "w", "dtype": "float32", "implementation": "xla"}
    job = benchmark.Job([row], runs)
    for rounds in (range(7), range(7, 14)):
        job.take_turns(rounds, 2, lambda: None)
    assert (row["ms"], row["dense_ms"], row["peer_ms"]) == (20.0, 20.0, 20.0)
    assert {case.program: len(times) for case, times in job.times.items()} == {"dense": 14, "xla": 14, "peer": 7}
    assert order[6:11] == ["dense", "xla", "peer", "xla", "dense"]  # the peer in every other round


def test_every_workload_is_visited_again(tiny, monkeypatch):
    visits = []
    take_turns = benchmark.Job.take_turns

    def noted(job, rounds, *rest):
        visits.append((job.rows[0]["workload"], list(rounds)))
        take_turns(job, rounds, *rest)

    monkeypatch.setattr(benchmark.Job, "take_turns", noted)
    benchmark.main(["--workload", "tiny", "tiny-1d", "--mode", "forward", "--repeats", "4"])
    assert visits == [(name, rounds) for rounds in ([0], [1], [2, 3]) for name in ("tiny", "tiny-1d")]


def test_the_floor_is_the_tightest_of_three_bounds():
    work = WORKLOADS["small"]
    rates = {"flops": 1e30, "memory": 1e30, "cache": 1e30}
    products = benchmark.floor(work, "float32", benchmark.Rates(**rates | {"flops": 1e9}))
    corners = benchmark.floor(work, "float32", benchmark.Rates(**rates | {"cache": 1e9}))
    traffic = benchmark.floor(work, "float32", benchmark.Rates(**rates | {"memory": 1e9}))
    positions = 8 * 32 * 32
    assert products == pytest.approx(1e-6 * 2 * positions * 9 * 32 * 32)
    assert corners == pytest.approx(1e-6 * positions * 9 * 32 * 4 * 4)
    assert traffic == pytest.approx(1e-6 * 4 * (positions * (32 + 18 + 9 + 32) + 9 * 32 * 32))


def _row(workload, mode, ms, dtype="float32", implementation="xla", **more):
    return {"workload": workload, "mode": mode, "dtype": dtype, "implementation": implementation, "ms": ms} | more


def test_figures_of_the_cpu():
    rows = [
        _row(name, "forward", ms, dense_ms=10.0, peer_ms=200.0, scratch_bytes=3, columns_bytes=10)
        for name, ms in zip(benchmark.FIVE, (10.0, 10.0, 10.0, 10.0, 20.0), strict=True)
    ]
    rows += [_row("small", "forward", 40.0, "bfloat16")]
    rows += [_row("batch1", "forward", 1.0, dense_ms=3.0), _row("batch4", "forward", 2.0, dense_ms=8.0)]
    rows += [_row(benchmark_report.STACK, "forward_backward", None, compile_s=3.0, dense_compile_s=1.0)]
    figures = {figure.name: figure for figure in benchmark_report.cpu_figures(rows)}
    expected = {
        "forward: ours / plain, mean of 5": (2**0.2, "reached"),
        "forward: ours / plain, worst of 5": (2.0, "not reached"),
        "forward: torchvision / ours, mean of 5": (20 / 2**0.2, "reached"),
        "forward: scratch / columns, worst of 5": (0.3, "reached"),
        "forward: bfloat16 / float32, worst of 1": (2.0, "not reached"),
        "forward: an image's ms, batch 1 to 64, most / least (plain: 1.50)": (2.0, "not reached"),
        "compiling 12 layers: ours / plain": (3.0, "not reached"),
    }
    for name, (value, verdict) in expected.items():
        figure = figures.pop(name)
        assert figure.value == pytest.approx(value)
        assert figure.verdict == verdict
    assert {figure.verdict for figure in figures.values()} == {"not measured"}


def test_figures_of_a_gpu():
    more = {"dense_ms": 1.0, "peer_ms": 20.0, "floor_ms": 0.5, "scratch_bytes": 1, "columns_bytes": 100}
    rows = [_row("gpu-conv3", "forward", 2.0, dtype, "pallas", **more) for dtype in ("float32", "float16", "bfloat16")]
    figures = {figure.name: (figure.value, figure.verdict) for figure in benchmark_report.gpu_figures(rows)}
    assert figures["forward, float32: torchvision / ours, least"] == (10.0, "reached")
    assert figures["forward, bfloat16: ours / plain, worst"] == (2.0, "reached")
    assert figures["forward, bfloat16: ours / floor, worst"] == (4.0, "not reached")
    assert figures["forward, bfloat16: scratch / columns, worst"] == (0.01, "reached")
    assert figures["forward + backward, float16: torchvision / ours, least"] == (None, "not measured")
