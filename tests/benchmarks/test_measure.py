"""Runs take turns, and the median of each counts."""

from benchmarks.measure import Case, Measurement, Settings, prepare_workload, visits


def test_on_a_gpu_the_inputs_are_rotated_and_both_implementations_timed(tiny):
    settings = Settings("gpu", "a stand-in", ("xla", "pallas"), 1, True, None)
    rows, runs = prepare_workload("tiny", "bfloat16", "forward_backward", False, settings)
    assert [row["implementation"] for row in rows] == ["xla", "pallas"]
    program = runs[Case("tiny", "bfloat16", "xla")].__self__
    assert len(program.inputs) == 16
    assert len({float(x.sum()) for _, x, *_ in program.inputs}) > 8  # not one again and again
    assert 0 < rows[0]["parity"] < 2e-2


def test_runs_take_turns_and_the_median_counts():
    order = []

    def run(case, times):
        def call(calls):
            order.append(case.program)
            return next(times)

        return call

    cases = {program: Case("w", "float32", program) for program in ("dense", "xla", "peer")}
    # Two runs warm each visit up; then one outlier, which the median ignores.
    took = {"dense": [900.0] + 6 * [20.0], "xla": [900.0] + 6 * [20.0], "peer": [900.0, 20.0, 20.0]}
    took = {program: [50.0, 50.0, *times, 50.0, 50.0, *(8 * [20.0])] for program, times in took.items()}
    took["peer"].insert(3, 20.0)  # four even rounds in the first visit, three in the second
    runs = {case: run(case, iter(took[program])) for program, case in cases.items()}
    row = {"workload": "w", "dtype": "float32", "implementation": "xla"}
    measurement = Measurement([row], runs)
    for rounds in (range(7), range(7, 14)):
        measurement.take_turns(rounds, 2, lambda: None)
    assert (row["ms"], row["dense_ms"], row["peer_ms"]) == (20.0, 20.0, 20.0)
    assert {case.program: len(times) for case, times in measurement.times.items()} == {
        "dense": 14,
        "xla": 14,
        "peer": 7,
    }
    assert order[6:11] == ["dense", "xla", "peer", "xla", "dense"]  # the peer in every other round


def test_every_comparison_is_visited_again():
    assert list(visits(2, 4)) == [(n, rounds) for rounds in (range(1), range(1, 2), range(2, 4)) for n in (0, 1)]
    assert list(visits(1, 1)) == [(0, range(1))]
