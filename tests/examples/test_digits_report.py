"""`examples/digits_report.py`: the table."""

from digits_report import results_table


def test_the_table_gives_mean_and_deviation():
    row = {"model": "conv", "seed": 0, "params": 1234, "mean_iou": 0.5, "foreground_accuracy": 0.25, "step_ms": 10.0}
    table = results_table([row, row | {"seed": 1, "mean_iou": 0.6}])
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["conv", "1,234", "0.550 ± 0.071", "0.250 ± 0.000", "10.0 ± 0.0"]
    assert [next(iter(column.cells)) for column in results_table([row]).columns][2:] == [
        "0.500",
        "0.250",
        "10.0",
    ]
