"""`examples/many_devices_stop.py`: signals, and when a run gives up."""

import signal
import types

import jax
import numpy as np
import pytest
from many_devices_stop import NotFinite, Problem, Signals


@pytest.fixture(autouse=True)
def _handlers():
    """Leave pytest's own in place."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_are_noted_and_a_second_interrupt_ends():
    mesh = jax.make_mesh((8,), ("data",))
    signals, sharding = Signals(), jax.NamedSharding(mesh, jax.P("data"))
    signals.listen()
    assert signals.on_devices(sharding).max() == 0
    signal.raise_signal(signal.SIGINT)
    assert signals.on_devices(sharding).max() == signal.SIGINT
    signal.raise_signal(signal.SIGTERM)
    assert signals.on_devices(sharding).max() == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signals.on_devices(sharding).max() == signal.SIGTERM


def metrics(in_a_row, *finite):
    return types.SimpleNamespace(skipped=np.array([in_a_row, 9]), finite=np.array(finite))


def test_a_row_of_steps_names_the_first_parameter_affected():
    not_finite = NotFinite(["a/bias", "a/kernel"], 2)
    not_finite.check(1, metrics(0, True, True))
    not_finite.check(2, metrics(1, False, True))
    not_finite.check(3, metrics(0, True, True))  # a new row begins after this
    not_finite.check(4, metrics(1, True, False))
    said = "stopped at step 5: 2 steps in a row .*; at step 4, a/kernel was the first of 1 parameter affected. Lower"
    with pytest.raises(Problem, match=said):
        not_finite.check(5, metrics(2, False, False))


def test_a_row_that_began_before_the_run_was_resumed_and_a_loss_alone():
    with pytest.raises(Problem, match="at step 7, the loss alone was affected"):
        NotFinite(["a"], 3).check(7, metrics(3, True))
