"""The figures that the op should reach, out of the rows."""

import io
import json

import pytest
from rich.console import Console

from benchmarks.aims import ahead_aims, aims_table, cpu_aims, family_aims, gpu_aims, main
from benchmarks.workloads import FIVE


def _row(workload, mode, ms, dtype="float32", implementation="xla", **more):
    return {"workload": workload, "mode": mode, "dtype": dtype, "implementation": implementation, "ms": ms} | more


def test_aims_on_a_cpu():
    rows = [
        _row(name, "forward", ms, dense_ms=10.0, torchvision_ms=200.0, scratch_bytes=3, columns_bytes=10)
        for name, ms in zip(FIVE, (10.0, 10.0, 10.0, 10.0, 20.0), strict=True)
    ]
    rows += [_row("small", "forward", 40.0, "bfloat16")]
    rows += [_row("batch1", "forward", 1.0, dense_ms=3.0), _row("batch4", "forward", 2.0, dense_ms=8.0)]
    rows += [_row("stack12", "forward_backward", None, compile_s=3.0, dense_compile_s=1.0)]
    aims = {aim.name: aim for aim in cpu_aims(rows)}
    expected = {
        "forward: ours / plain, mean of 5": (2**0.2, "reached"),
        "forward: ours / plain, worst of 5": (2.0, "not reached"),
        "forward: torchvision / ours, mean of 5": (20 / 2**0.2, "reached"),
        "forward: scratch / columns, worst of 5": (0.3, "reached"),
        "forward: bfloat16 / float32, worst of 1": (2.0, "not reached"),
        "forward: an image's ms, batch 1 to 64, most / least (plain: 1.50)": (2.0, "not reached"),
        "trace, lower, compile, with gradients: 12 layers, ours / plain": (3.0, "not reached"),
    }
    for name, (value, verdict) in expected.items():
        aim = aims.pop(name)
        assert aim.value == pytest.approx(value)
        assert aim.verdict == verdict
    assert {aim.verdict for aim in aims.values()} == {"not measured"}


def test_aims_beside_engines():
    rows = [
        _row("small", "forward", 2.0, onnxruntime_ms=4.0, openvino_ms=8.0, torchvision_ms=0.1),
        _row("groups4", "forward", 2.0, onnxruntime_ms=1.0, openvino_ms=9.0),
        _row("thin", "forward", 9.0, torchvision_ms=1.0),  # no engine was there
        _row("small", "forward_backward", 4.0, dense_ms=2.0, scratch_bytes=1, columns_bytes=2),
        _row("conv2-224", "forward_backward", 1.0, dense_ms=2.0, scratch_bytes=3, columns_bytes=4),
        _row("thin", "forward_backward", 7.0, dense_ms=2.0),
        _row("thin", "forward_backward", 7.0, "bfloat16", scratch_bytes=4, columns_bytes=2),
        _row("map14", "forward", 1.0, dense_ms=1.0),
        _row("map28", "forward", 8.0, dense_ms=4.0),
        _row("stack1", "forward_backward", None, compile_s=3.0, dense_compile_s=1.0),
    ]
    aims = {aim.name: aim for aim in ahead_aims(rows)}
    expected = {
        "forward / faster of onnxruntime, openvino: mean of 2": (1.0, "reached"),
        "forward / faster of onnxruntime, openvino: worst of 2: groups4": (2.0, "not reached"),
        "forward, most / least: ms a position, map 14² to 224² (plain: 1.00)": (2.0, "not reached"),
        "forward + backward: ours / plain, mean of 2": (1.0, "reached"),
        "forward + backward: ours / plain, 8×32×32, 32 → 32, 3×3": (2.0, "reached"),
        "forward + backward: ours / plain, 1×256×256, 16 → 16, 3×3": (3.5, "not reached"),
        "trace, lower, compile, with gradients: 1 layer, ours / plain": (3.0, "reached"),
        "scratch / columns: forward + backward, float32, worst of 2": (0.75, "reached"),
        "scratch / columns: forward + backward, bfloat16, worst of 1": (2.0, "not reached"),
    }
    for name, (value, verdict) in expected.items():
        aim = aims.pop(name)
        assert aim.value == pytest.approx(value)
        assert aim.verdict == verdict
    assert {aim.verdict for aim in aims.values()} == {"not measured"}


def test_aims_of_the_family():
    rows = [
        _row("detr-encoder", "forward", 10.0, torch_ms=50.0, zeromodels_ms=80.0, scratch_bytes=4, result_bytes=2),
        _row("detr-decoder", "forward", 10.0, torch_ms=15.0, scratch_bytes=1, result_bytes=2),
        _row("dcnv3-56", "forward_backward", 2.0, dense_ms=4.0),
        _row("dcnv3-7", "forward_backward", 3.0, dense_ms=4.0),
    ]
    aims = {aim.name: (aim.value, aim.verdict) for aim in family_aims(rows)}
    assert aims.pop("ms_deform_attn, forward: torch / ours, least: detr-decoder") == (1.5, "not reached")
    assert aims.pop("ms_deform_attn, forward: zeromodels / ours, least: detr-encoder") == (8.0, "reached")
    assert aims.pop("ms_deform_attn, forward: scratch / result, worst: detr-encoder") == (2.0, "reached")
    assert aims.pop("dcnv3, forward + backward: ours / the dense DCNv2, worst: dcnv3-7") == (0.75, "reached")
    assert {verdict for _, verdict in aims.values()} == {"not measured"}
    assert len(aims) == 18  # of 5 ops in 2 modes


def test_aims_on_a_gpu():
    more = {"dense_ms": 1.0, "torchvision_ms": 20.0, "floor_ms": 0.5, "scratch_bytes": 1, "columns_bytes": 100}
    rows = [
        _row("gpu-conv3", "forward", 2.0, dtype, "pallas_gpu", **more) for dtype in ("float32", "float16", "bfloat16")
    ]
    rows[2]["torchvision_ms"] = None  # it has no bfloat16
    rows += [_row("gpu-conv4", "forward", 1.0, "float32", "pallas_gpu", torchvision_ms=3.0, deformops_ms=0.9)]
    rows += [_row("gpu-conv5", "forward", 1.0, "float32", "xla", torchvision_ms=0.1, deformops_ms=0.1)]
    aims = {aim.name: (aim.value, aim.verdict) for aim in gpu_aims(rows)}
    mean = f"{30**0.5:.2f}"
    assert aims[f"forward, float32: torchvision / ours, least (mean {mean}): gpu-conv4"] == (3.0, "not reached")
    assert aims["forward, float32: deformops / ours, least (mean 0.90): gpu-conv4"] == (0.9, "not reached")
    assert aims["forward, float16: torchvision / ours, least (mean 10.00): gpu-conv3"] == (10.0, "reached")
    half = "forward, bfloat16: torchvision in float16 / ours, least (mean 10.00): gpu-conv3"
    assert aims[half] == (10.0, "reached")
    assert aims["forward, bfloat16: ours / plain, worst: gpu-conv3"] == (2.0, "reached")
    assert aims["forward, bfloat16: ours / floor, worst: gpu-conv3"] == (4.0, "not reached")
    assert aims["forward, bfloat16: scratch / columns, worst"] == (0.01, "reached")
    assert aims["forward + backward, float16: torchvision / ours, least (mean –): none"] == (None, "not measured")


def test_aims_of_rows_in_several_files(tmp_path, capsys):
    halves = {"bfloat16": {"torchvision_ms": None}, "float16": {"torchvision_ms": 18.0}}
    for dtype, more in halves.items():
        row = _row("gpu-conv3", "forward", 2.0, dtype, "pallas_gpu", scratch_bytes=1, columns_bytes=100) | more
        (tmp_path / f"{dtype}.json").write_text(json.dumps([row]))
    main(["gpu", *(str(tmp_path / f"{dtype}.json") for dtype in halves)])
    line = next(line for line in capsys.readouterr().out.splitlines() if "in float16 / ours" in line)
    assert line.split()[-4:] == ["9", "≥", "8", "reached"]


@pytest.mark.parametrize("width", [60, 80, 120, 180])
@pytest.mark.parametrize(
    "aims", [cpu_aims([]), ahead_aims([]), family_aims([]), gpu_aims([])], ids=["cpu", "ahead", "family", "gpu"]
)
def test_no_figure_is_cut(aims, width):
    console = Console(width=width, file=io.StringIO())
    console.print(aims_table(aims))
    printed = console.file.getvalue()
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= width
    assert printed.count("not measured") == len(aims)
