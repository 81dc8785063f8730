"""`examples/01_op.py`: each of its statements is true, and it finds the shift."""


def test_it_prints_what_it_promises(run):
    same, order, found = run("01_op")
    assert same == "zero offsets give the plain convolution: True; with a mask of 0.5, half of it: True"
    assert order == "channels (2, 3, 3, 2) in a row: group 0 stays: True; group 1 moves by (1, 2): True"
    assert found == "found the shift (dy, dx) = (1.50, -0.75)"
