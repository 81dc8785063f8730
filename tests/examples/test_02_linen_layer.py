"""`examples/02_linen_layer.py`: what the layer owns, and what it sows."""

import pytest


@pytest.mark.lenient
def test_it_prints_what_it_promises(run):
    *parameters, call, offset, mask = run("02_linen_layer")
    assert [line.split(maxsplit=1) for line in parameters] == [
        ["bias", "(16,)"],
        ["kernel", "(3, 3, 8, 16)"],
        ["offset_conv/bias", "(27,)"],
        ["offset_conv/kernel", "(3, 3, 8, 27)"],
    ]
    assert call == "images (2, 16, 16, 3) -> features (2, 8, 8, 16)"
    assert offset == "offset (2, 8, 8, 18), all zero: True; mask (2, 8, 8, 9)"
    assert mask == "the mask's mean is 0.500: a fresh layer reads at half strength"
