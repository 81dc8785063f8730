"""The race for a GPU, run on a CPU with small arrays: nothing in it fails for a silly reason on the day."""

import json

import jax
import pytest

from benchmarks import race, run
from benchmarks.convolution import Convolution
from benchmarks.family import Attention, GridSample
from dcn_jax.ops.deform_conv.xla import schedule

ATTENTION = Attention(((4, 5), (2, 3)), queries=3, heads=2, channels=4, points=2)


def rows_of(tmp_path, *options):
    path = tmp_path / "race.jsonl"
    rows = run.main(["--device", "cpu", "--quick", "--suite", "race", "--json", str(path), *options])
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    return rows


def check(rows):
    """All but those that cannot run here are right and timed."""
    for row in rows:
        if "problem" in row:
            assert row["contestant"] in ("pallas_gpu", "deformops", f"xla of {race.OLD}"), row
        elif row["contestant"] != "plain":
            assert row["ms"] > 0
            assert row["error"] < (1e-2 if row["dtype"] == "bfloat16" else 1e-5), row


def test_a_short_race(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(race, "SMALL", ((Convolution((2, 4, 5, 4), 4),), (GridSample((1, 4, 5, 3)),)))
    monkeypatch.setattr(race, "BLOCKS", (2,))
    kept = schedule.algorithms
    rows = rows_of(tmp_path)
    check(rows)
    assert schedule.algorithms is kept
    convolution = [row for row in rows if row["op"] == "deform_conv"]
    assert rows[: len(convolution)] == convolution  # the most telling first
    assert [row["dtype"] for row in convolution] == 12 * ["bfloat16"] + 12 * ["float32"]
    assert {row["contestant"] for row in convolution} == {
        "xla", "pallas_gpu", "plain", "deformops", "xla, 2 blocks", f"xla of {race.OLD}"
    }  # fmt: skip
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "--archive DIR names its sources: git archive f08c659 | tar" in said


@pytest.mark.parametrize(
    ("device", "problem"), [("cpu", "needs a GPU"), ("gpu", "--peer-python names no Python that has it")]
)
@pytest.mark.parametrize("work", [ATTENTION, Convolution((2, 4, 5, 4), 4)], ids=lambda work: work.op)
def test_that_deformops_is_missing_is_said(monkeypatch, work, device, problem):
    monkeypatch.setattr(race, "truth", lambda *_: None)
    entrants = race.entrants(
        race.Heat(work, "float32", "forward"), race.Race(device, 1, None, {}, None, 0, print, print)
    )
    with pytest.raises(RuntimeError, match=problem):
        entrants["deformops"]()


def test_deformops_runs_attention():
    heat, asked = race.Heat(ATTENTION, "bfloat16", "forward_backward"), []

    class Deformops:
        name, device = "deformops", "cuda"

        def prepare(self, work, inputs, dtype, mode, copies, name):
            asked.append((work, dtype, mode))
            return {"results": race.truth(work, mode, inputs)}

        def run(self, name, calls):
            return 7.0

    peers = {"deformops": Deformops()}
    contestant = race.entrants(heat, race.Race("gpu", 1, None, peers, None, 0, print, print))["deformops"]()
    assert asked == [(ATTENTION, "bfloat16", "forward_backward")]
    assert (contestant.run(1), contestant.error) == (7.0, 0)


def test_it_ends_in_time(tmp_path, capsys):
    assert rows_of(tmp_path, "--minutes", "0") == []
    assert "0 minutes are over" in capsys.readouterr().out


def test_a_number_of_blocks_is_taken():
    """And a GPU's algorithm, on a CPU too."""
    work = Convolution((1, 4, 6, 4), 4)
    inputs = work.arrays(0, "float32")
    for blocks in (3, 2):
        with race.forms_of_a_gpu(blocks):
            text = jax.jit(work.call).lower(*inputs).compile().as_text()
        assert f'known_trip_count":{{"n":"{blocks}"}}' in text


@pytest.mark.slow
def test_the_whole_of_it(tmp_path):
    check(rows_of(tmp_path))
