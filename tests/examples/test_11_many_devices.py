"""`examples/11_many_devices.py`: the same on any number of devices, and after being killed."""

import os
import random
import shutil
import signal
import socket
import time

import numpy as np
import pytest

from tests.examples.many_devices import end, finish, lines, losses, rows, start, wait_for

SHORT = ("--batch", 8, "--log-every", 5)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """The losses of 50 steps on one device, in float64."""
    path = tmp_path_factory.mktemp("one") / "one.json"
    finish("--steps", 50, *SHORT, "--json", path, x64=True)
    return losses(path)


def test_eight_devices_give_the_losses_of_one(one_device, tmp_path):
    out = finish("--steps", 50, *SHORT, "--json", tmp_path / "eight.json", devices=8, x64=True)
    np.testing.assert_allclose(losses(tmp_path / "eight.json"), one_device, rtol=1e-10)
    assert out.startswith("8 devices (cpu) in 1 process")
    assert max(map(len, out.splitlines())) <= 80
    first, *_, last = rows(tmp_path / "eight.json")
    assert set(first) == {"step", "loss"}
    assert last.keys() == {"parameters"}
    assert out.splitlines()[-1] == f"50 steps, parameters {last['parameters'][:12]}, on 8 devices"
    logged = rows(tmp_path / "eight.json")[9]
    assert set(logged) == {"step", "loss", "mean_offset", "largest_offset", "skipped"}
    assert 0 < logged["mean_offset"] < logged["largest_offset"] < 10
    assert np.mean(one_device[-5:]) < 0.6 * one_device[0]  # and they learn


@pytest.mark.slow
def test_two_processes_of_four_give_the_losses_of_one_device(one_device, tmp_path):
    """In float64 to the last digits; in float32 they are as near to each other as float32 is to float64."""
    here = {"program": "many_devices_here.py"}
    out = finish("--steps", 50, *SHORT, "--json", tmp_path / "two.json", **here, x64=True)
    np.testing.assert_allclose(losses(tmp_path / "two.json"), one_device, rtol=1e-10)
    assert out.splitlines()[0] == "8 devices (cpu) in 2 processes, from step 0"

    runs = {"one": {}, "eight": {"devices": 8}, "two": here}
    for name, how in runs.items():
        finish("--steps", 20, *SHORT, "--json", tmp_path / f"{name}.json", **how)
    one, *others = (np.array(losses(tmp_path / f"{name}.json")) for name in runs)
    rounding = np.maximum.accumulate(np.abs(one - one_device[:20]))  # of float32, up to each step
    assert rounding[-1] < 0.05
    for other in others:
        assert (np.abs(other - one) <= 2 * rounding + 1e-6).all()


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(tmp_path):
    options = ("--steps", 100, "--save-every", 2, *SHORT)
    finish(*options, "--json", tmp_path / "whole.json")

    path, checkpoints = tmp_path / "killed.json", tmp_path / "checkpoints"
    options = (*options, "--json", path, "--checkpoints", checkpoints, "--resume")
    moments, kills, inside = random.Random(0), 0, 0

    def unfinished():
        return checkpoints.exists() and any("tmp" in folder.name for folder in checkpoints.iterdir())

    while kills < 10 or inside < 3:
        assert kills < 20
        process = start(*options)
        if kills % 5 == 4:
            time.sleep(moments.uniform(0, 5))  # wherever that is: imports, compiling, the first steps
        else:
            process.stdout.readline()  # by then it has resumed
            wanted = lines(path) + moments.randint(2, 6)
            wait_for(lambda wanted=wanted: lines(path) >= wanted, process)
            if kills % 2:
                time.sleep(moments.uniform(0, 0.05))
            else:
                wait_for(unfinished, process)
        process.kill()
        process.communicate()
        kills, inside = kills + 1, inside + unfinished()
    finish(*options)
    assert rows(path)[-1] == rows(tmp_path / "whole.json")[-1]  # the hash of the parameters
    assert path.read_text() == (tmp_path / "whole.json").read_text()  # each loss


@pytest.mark.slow
@pytest.mark.parametrize("receivers", [(1,), (0, 1)], ids=["one", "all"])
def test_sigterm_saves_stops_and_can_be_resumed_on_another_number_of_devices(receivers, one_device, tmp_path):
    path, options = tmp_path / "losses.json", ("--steps", 20, *SHORT, "--checkpoints", tmp_path / "checkpoints")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        together = ("--coordinator", f"localhost:{free.getsockname()[1]}", "--processes", 2, "--process")
    processes = [start(*options, "--json", path, *together, i, devices=2, x64=True) for i in range(2)]
    wait_for(lambda: lines(path) >= 7, processes[0])
    for i in receivers:
        processes[i].send_signal(signal.SIGTERM)
    (first, out, _), (second, *silence) = map(end, processes)
    assert (first, second) == (0, 0)
    assert silence == ["", ""]
    step = lines(path)
    assert out.splitlines()[-1].startswith(f"SIGTERM: stopped after step {step}; go on from ")
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    out = finish(*options, "--json", path, "--resume", x64=True)
    assert out.startswith(f"1 device (cpu) in 1 process, from step {step}\n")
    np.testing.assert_allclose(losses(path), one_device[:20], rtol=1e-10)


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    options = ("--steps", 8, "--save-every", 2, *SHORT, "--checkpoints", tmp_path / "checkpoints", "--resume")
    finish(*options, "--steps", 4)
    status, _, err = end(start(*options, largest_file=100_000))  # the parameters take more bytes
    assert status == 1
    said = err.splitlines()[-1]
    assert "the last good one is of step 4 (" in said
    assert "File too large" in said
    assert said.endswith("make room there and run again with --resume")
    assert "Traceback" not in err
    assert finish(*options).startswith("1 device (cpu) in 1 process, from step 4\n")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_advice_works(tmp_path):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    options = ("--model", "conv", "--steps", 4, "--save-every", 2, *SHORT)
    finish(*options, "--checkpoints", whole, "--json", tmp_path / "whole.json")
    options = (*options, "--checkpoints", damaged, "--json", tmp_path / "resumed.json", "--resume")
    for file in ("run/metadata", "state/_METADATA", "state/manifest.ocdbt", "state/ocdbt.process_0/d/*"):
        shutil.copytree(whole, damaged)
        path = max((damaged / "4").glob(file), key=lambda path: path.stat().st_size)
        os.truncate(path, path.stat().st_size // 2)
        status, _, err = end(start(*options))
        assert status == 1
        (said,) = err.splitlines()
        assert said.startswith(f"the checkpoint {damaged / '4'} cannot be read: it is damaged")
        assert "; move it away to resume from step 2" in said
        assert sorted(os.listdir(damaged)) == ["2", "4"]
        if file == "run/metadata":  # the advice, followed
            (damaged / "4").rename(tmp_path / "away")
            assert finish(*options).startswith("1 device (cpu) in 1 process, from step 2\n")
            assert rows(tmp_path / "resumed.json")[-1] == rows(tmp_path / "whole.json")[-1]
        shutil.rmtree(damaged)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_names_a_parameter(tmp_path):
    options = ("--steps", 20, *SHORT, "--learning-rate", 1e30, "--give-up", 3, "--json", tmp_path / "losses.json")
    status, _, err = end(start(*options))
    assert status == 1
    assert "3 steps in a row were skipped" in err
    assert ", Conv_0/bias was the first of 22 parameters affected" in err
    assert [row["loss"] for row in rows(tmp_path / "losses.json")[-3:]] == [None] * 3


@pytest.mark.slow
def test_curves_and_a_profile_are_written(tmp_path):
    options = ("--steps", 8, *SHORT, "--tensorboard", tmp_path / "curves", "--profile", tmp_path / "profile")
    finish(*options)
    (curves,) = (tmp_path / "curves").iterdir()
    assert all(name in curves.read_bytes() for name in (b"loss", b"mean_offset", b"largest_offset", b"skipped"))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
