"""`examples/03_nnx_layer.py`: what the layer owns, and what nnx.capture sees."""

import pytest


@pytest.mark.lenient
def test_it_prints_what_it_promises(run):
    *parameters, call, seen, unchanged = run("03_nnx_layer")
    assert [line.split(maxsplit=1) for line in parameters] == [
        ["bias", "(16,)"],
        ["kernel", "(3, 3, 8, 16)"],
        ["offset_conv.bias", "(27,)"],
        ["offset_conv.kernel", "(3, 3, 8, 27)"],
    ]
    assert call == "images (2, 16, 16, 3) -> features (2, 8, 8, 16)"
    assert seen == "offset (2, 8, 8, 18), all zero: True; mask (2, 8, 8, 9), mean 0.500"
    assert unchanged == "the captures left the model as it was: True"
