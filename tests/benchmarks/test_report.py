"""The table of results, in terminals of any width."""

import io
import itertools

import pytest
from rich.console import Console

from benchmarks.programs import MODES
from benchmarks.report import FIGURES, print_results
from benchmarks.rows import EMPTY
from benchmarks.suites import DTYPES
from benchmarks.workloads import FAMILY, GPU, WORKLOADS

MEASURED = {
    "ms": 1234.56,
    "dense_ms": 123.45,
    "peer": "torchvision",
    "peer_ms": 12345.67,
    "compile_s": 12.34,
    "scratch_bytes": 123e6,
    "peak_bytes": 12345e6,
    "parity": 1e-6,
    "dense_compile_s": 1.23,
    "dense_scratch_bytes": 0,
    "dense_peak_bytes": 1234e6,
    "peer_peak_bytes": 12345e6,
    "floor_ms": 100.0,
    "columns_bytes": 200e6,
}
CUT = "unrecognised [bold] backend"  # an error that would vanish as markup


def rows_of(workloads, dtypes=("float32",), implementations=("xla",), modes=MODES, **more):
    keys = "workload", "mode", "dtype", "implementation"
    rows = itertools.product(workloads, modes, dtypes, implementations)
    return [EMPTY | MEASURED | dict(zip(keys, row, strict=True)) | more for row in rows]


SUITES = {
    "one": rows_of(["small"]),
    "one, no peer": rows_of(["small"], peer=None, peer_ms=None, peer_peak_bytes=None, parity=None),
    "cpu": rows_of(WORKLOADS, parity=None, peer_peak_bytes=None),
    "reach": rows_of(WORKLOADS, DTYPES[:2]),
    "family": rows_of(FAMILY, peer="torch", columns_bytes=None, result_bytes=100e6, floor_ms=None),
    "gpu": rows_of(GPU, DTYPES, ("xla", "pallas_gpu")),
    "no pallas": [*rows_of(GPU), *rows_of(GPU, implementations=("pallas_gpu",), error=f"not available: {CUT}")],
    "nothing": rows_of(GPU, ms=None, error="not available: it is out"),
}


def printed(rows, width):
    console = Console(width=width, file=io.StringIO())
    print_results(rows, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 180])
@pytest.mark.parametrize("suite", SUITES)
def test_no_figure_is_cut_and_no_name_wrapped(suite, width):
    rows = SUITES[suite]
    lines = printed(rows, width).splitlines()
    assert "…" not in "".join(lines)
    assert max(map(len, lines)) <= width
    for row in rows:
        figure = "none (1)" if row["error"] else "1234.56"
        assert any(line.startswith(f"{row['workload']} ") and figure in line for line in lines)


@pytest.mark.parametrize(("suite", "least"), [("one", 6), ("cpu", 4), ("reach", 3), ("gpu", 3)])
def test_what_matters_most_fits_in_80_columns(suite, least):
    head = " ".join(printed(SUITES[suite], 80).partition("─")[0].split())
    assert [column.heading.split("\n")[0] in head for column in FIGURES[:least]] == [True] * least


def test_a_narrow_terminal_says_what_a_wider_one_shows():
    narrow = " ".join(printed(SUITES["cpu"], 80).split())
    assert "A wider terminal shows more: peer, plain ms, peer ms, ours / floor, compile s" in narrow
    assert narrow.index("scratch /") < narrow.index("A wider terminal")
    wide = printed(SUITES["gpu"], 180)
    assert "A wider terminal" not in wide
    shown = [column for column in FIGURES if column.heading != "scratch /\nresult"]
    assert all(wide.count(f" {line}") for column in shown for line in column.heading.split("\n"))
    family = printed(SUITES["family"], 180)
    assert " result " in family
    assert " columns " not in family


def test_what_all_rows_share_is_in_the_title():
    title, _, table = printed(rows_of(["small"], modes=["forward"]), 80).strip().partition("\n")
    assert title == "xla, float32, forward"
    assert not any(word in table for word in ("xla", "f32", "forward", "mode", "dtype", "impl."))
    table = printed(SUITES["gpu"], 80)
    assert all(
        word in table for word in ("xla", "pallas_gpu", "f32", "bf16", "f16", "+ backward", "mode", "dtype", "impl.")
    )


def test_means_of_rows_of_one_kind():
    rows = [row for ms in (1.0, 8.0) for row in rows_of(["small"], ms=ms, dense_ms=2.0, peer_ms=None)]
    lines = [line.split() for line in printed(rows, 120).splitlines() if line.startswith("geometric mean")]
    assert [line[2:] for line in lines] == [["forward", "1.41"], ["+", "backward", "1.41"]]


def test_why_a_row_has_no_figures_is_told_once_and_as_it_is():
    assert printed(SUITES["no pallas"], 80).count(f"(1) not available: {CUT}") == 1


def test_the_rates_of_the_floor_are_told():
    text = " ".join(printed(rows_of(GPU, DTYPES[:2], flops=4e14, bandwidth=3.04e12), 80).split())
    assert "For the floor, bfloat16: 400 TFLOP/s of a product and 3.04 TB/s of memory were measured." in text


def test_why_a_peer_has_no_figures_is_told_once():
    error = "torchvision: not implemented for 'BFloat16'"
    text = printed(rows_of(GPU, torchvision_error=error, peer=None, peer_ms=None, peer_peak_bytes=None), 80)
    assert text.count(error) == 1


def test_a_compiled_stack_has_a_sentence_and_no_line():
    rows = [*SUITES["cpu"], EMPTY | {"workload": "stack12", "mode": MODES[1], "compile_s": 3.0, "dense_compile_s": 0.5}]
    text = " ".join(printed(rows, 80).split())
    assert "compiling 12 layers, forward + backward: 3.00 s, plain 0.50 s, 6.00 times" in text
    assert "stack12" not in text


def test_nothing_is_said_of_no_rows():
    assert printed([], 80) == ""
