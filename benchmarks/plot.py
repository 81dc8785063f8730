"""The picture: each time as a share of the plain convolution's."""

from benchmarks.peers.process import PEERS
from benchmarks.rows import ratio, spoken


def plot(rows: list[dict], path: str) -> None:
    """Draw each time over the plain convolution's as a bar from 1, one panel a mode."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if ratio(row, "ms", "dense_ms") is not None]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    series: dict[str, dict] = {}  # label to {(workload, mode): ratio}
    for row in rows:
        place = row["workload"], row["mode"]
        series.setdefault(f"dcn_jax {row['implementation']}, {row['dtype']}", {})[place] = ratio(row, "ms", "dense_ms")
        for peer in PEERS:
            if row.get(f"{peer}_ms"):
                series.setdefault(f"{peer}, {row['dtype']}", {})[place] = ratio(row, f"{peer}_ms", "dense_ms")

    thickness = 0.8 / len(series)
    canvas = Figure(figsize=(2 + 4 * len(modes), 1.5 + 0.12 * len(workloads) * (1 + len(series))), layout="constrained")
    panels = canvas.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for panel, mode in zip(panels, modes, strict=True):
        for index, (label, values) in enumerate(series.items()):
            bars = [(w + index * thickness, values[n, mode]) for w, n in enumerate(workloads) if (n, mode) in values]
            places, widths = [place for place, _ in bars], [value - 1 for _, value in bars]
            panel.barh(places, widths, left=1, height=thickness, align="edge", label=label)
        panel.axvline(1, color="black", linewidth=1)
        panel.set(xscale="log", title=spoken(mode), xlabel="time / the plain convolution's")
        panel.set_yticks([w + 0.4 for w in range(len(workloads))], workloads)
    panels[0].set_ylim(len(workloads), -0.2)  # the first on top
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    canvas.savefig(path, dpi=150)
