"""What is timed is checked against an exact result."""

from benchmarks.programs import Program, parity


def test_parity_sees_a_wrong_result(tiny):
    inputs = [tiny.arrays(0, "float32")]
    right = Program(tiny.call, inputs)
    wrong = Program(lambda *a: tiny.call(*a).at[0, 0, 0, 0].add(1), inputs)
    assert parity("tiny", "forward", right) < 1e-6
    assert parity("tiny", "forward", wrong) > 1e-2
