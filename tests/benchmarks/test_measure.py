"""Runs take turns, and the median of each counts."""

from benchmarks.measure import Case, Measurement, Settings, compile_ahead, prepare_workload, visits
from benchmarks.suites import Comparison


def test_on_a_gpu_the_inputs_are_rotated_and_both_implementations_timed(tiny):
    settings = Settings("gpu", "a stand-in", ("xla", "pallas_gpu"), 1, True, {})
    (case, compiled), *_ = compile_ahead([(Comparison(("tiny",), ("bfloat16",)), "forward_backward")], settings).items()
    assert case == ("tiny", "bfloat16", "forward_backward")
    rows, runs = prepare_workload(*case, False, settings, compiled)
    assert [row["implementation"] for row in rows] == ["xla", "pallas_gpu"]
    program = runs[Case("tiny", "bfloat16", "xla")].__self__
    assert len(program.inputs) == 16
    assert len({float(x.sum()) for _, x, *_ in program.inputs}) > 8  # not one again and again
    assert 0 < rows[0]["parity"] < 2e-2
    assert rows[1]["error"].startswith("not available: ")  # there is no GPU
    assert not program.chain
    assert runs[Case("tiny", "bfloat16", "dense")].__self__.chain


def test_on_a_cpu_nothing_is_compiled_ahead(tiny):
    settings = Settings("cpu", "a stand-in", ("xla",), 1, True, {})
    assert compile_ahead([(Comparison(("tiny",)), "forward")], settings) == {}


def test_runs_take_turns_and_the_median_counts():
    order = []

    def run(case, times):
        def call(calls):
            order.append(case.program)
            return next(times)

        return call

    programs = "dense", "xla", "onnxruntime", "torchvision"
    cases = {program: Case("w", "float32", program) for program in programs}
    # Two runs warm each visit up; then one outlier, which the median ignores.
    took = {program: [50.0, 50.0, 900.0, *(6 * [20.0]), 50.0, 50.0, *(8 * [20.0])] for program in programs}
    took["torchvision"] = [500.0, 500.0, 900.0, *(3 * [250.0]), 500.0, 500.0, *(3 * [250.0])]  # in even rounds only
    runs = {case: run(case, iter(took[program])) for program, case in cases.items()}
    row = {"workload": "w", "dtype": "float32", "implementation": "xla"}
    measurement = Measurement([row], runs)
    for rounds in (range(7), range(7, 14)):
        measurement.take_turns(rounds, 2, lambda: None)
    assert (row["ms"], row["dense_ms"], row["torchvision_ms"], row["onnxruntime_ms"]) == (20.0, 20.0, 250.0, 20.0)
    assert (row["peer"], row["peer_ms"]) == ("onnxruntime", 20.0)
    assert {case.program: len(times) for case, times in measurement.times.items()} == {
        "dense": 14,
        "xla": 14,
        "onnxruntime": 14,
        "torchvision": 7,
    }
    # there and back, and what is many times slower in every other round
    assert order[8:15] == [*programs, "onnxruntime", "xla", "dense"]


def test_every_comparison_is_visited_again():
    assert list(visits(2, 4)) == [(n, rounds) for rounds in (range(1), range(1, 2), range(2, 4)) for n in (0, 1)]
    assert list(visits(1, 1)) == [(0, range(1))]
