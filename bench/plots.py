"""The plots: fastll and its peers, speed against size, time against shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import cycle, product
from math import inf, log2, prod
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, PercentFormatter

from bench.report import Record, Results, beside_the_fastest, exponent, machine, place, records, title

#: Okabe and Ito's colours, which colour-blind readers can tell apart, each with its own marker.
STYLES = {
    "fastll": ("#000000", "o"),
    "numpy": ("#E69F00", "s"),
    "scipy": ("#56B4E9", "D"),
    "torch": ("#D55E00", "^"),
    "torch.compile": ("#CC79A7", "v"),
    "jax": ("#009E73", "P"),
    "liger": ("#0072B2", "X"),
}
LINES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"))
DASHES = ("-", "--")
LOOK = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "font.size": 9,
    "svg.hashsalt": "fastll",  # the same results give the same file
}


def draw(results: Results, folder: Path) -> list[Path]:
    """Write each plot that the results have records for, as PNG and SVG."""
    by_group = defaultdict(list)
    for record in records(results):
        by_group[record["group"]].append(record)
    compared = [r for r in by_group["workloads"] if r["times_the_floor"] and r["peers"]]
    large = [r for r in by_group["workloads"] if r["times_the_floor"]]
    written: list[Path] = []
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(LOOK):
        for name, what in HEAT_MAPS.items():
            if any(map(what.value, by_group["grid"])):
                about = machine(results)
                written += _save(_heat_map(by_group["grid"], what, about), folder / name)
        if results["environment"]["device"] == "cuda":
            return _save(_shares(large), folder / "gpu") if large else []
        if compared:
            written += _save(_peers(compared), folder / "peers")
        if by_group["sizes"]:
            written += _save(_sizes(by_group["sizes"]), folder / "sizes")
        if by_group["frameworks"]:
            written += _save(_frameworks(by_group["frameworks"]), folder / "frameworks")
        if by_group["rows"] or by_group["classes"]:
            written += _save(_scaling(by_group["rows"], by_group["classes"]), folder / "scaling")
    return written


def _save(figure: Figure, path: Path) -> list[Path]:
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    for target in paths:
        figure.savefig(target, dpi=150, metadata={"Date": None} if target.suffix == ".svg" else None)
    return paths


def _peers(compared: list[Record]) -> Figure:
    """fastll and its peers as dots: on a logarithmic axis the length of a bar would mean nothing."""
    figure = Figure((9, 1.4 + 0.3 * len(compared)), layout="constrained")
    axes = figure.subplots()
    points: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for y, record in enumerate(compared):
        points["fastll"].append((record["times_the_floor"], y))
        for name, report in record["peers"].items():
            if "faster" in report:
                points[name].append((report["seconds"] / record["floor"], y))
    for name in (name for name in STYLES if name in points):
        color, marker = STYLES[name]
        x, y = zip(*points[name], strict=True)
        look = {"c": color, "s": 36}
        if name == "fastll":  # a ring, so that no peer is hidden
            look = {"c": "none", "edgecolors": color, "linewidths": 1.5, "s": 60}
        axes.scatter(x, y, marker=marker, label=name, zorder=2, **look)
    axes.axvline(1, color="0.4", lw=1)
    axes.set(xscale="log", xlabel="time, in multiples of the floor (line: the floor)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.grid(axis="x")
    labels = [f"{title(r)}\n{place(r)}, {r['dtype']}" for r in compared]
    axes.set_yticks(range(len(compared)), labels, fontsize=7)
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=len(points))
    return figure


def _frameworks(measured: list[Record]) -> Figure:
    """How many times as fast as the frameworks' own, and how many times it should be."""
    by_framework: dict[str, list[tuple[Record, str]]] = defaultdict(list)
    for record in measured:
        found = [(record, rival) for rival, told in record["peers"].items() if "faster" in told]
        by_framework[record["framework"]] += found
    counts = [len(compared) for compared in by_framework.values()]
    figure = Figure((9, 1 + 0.2 * sum(counts) + 0.25 * len(counts)), layout="constrained")
    panels = figure.subplots(len(counts), 1, sharex=True, squeeze=False, height_ratios=counts)
    for axes, (framework, compared) in zip(panels.flat, by_framework.items(), strict=True):
        ratios = [record["peers"][rival]["faster"] for record, rival in compared]
        axes.scatter(ratios, range(len(compared)), c="#000000", s=24, label="measured", zorder=2)
        for y, (record, rival) in enumerate(compared):
            kind, bound = record["targets"].get(rival, ("", 0))
            if kind == "faster":
                axes.scatter(bound, y, marker="|", c="#D55E00", s=80, label="target", zorder=3)
        axes.axvline(1, color="0.4", lw=1)
        axes.grid(axis="x")
        labels = [f"{title(r)}, {r['case']}, {r['dtype']}; {rival}" for r, rival in compared]
        axes.set_yticks(range(len(compared)), labels, fontsize=7)
        axes.set_ylim(len(compared) - 0.5, -0.5)
        axes.set_title(framework, loc="left", fontsize=9)
    axes.set(xscale="log", xlabel="time of the other, divided by that of fastll")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    named = {
        label: handle
        for axes in panels.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named, loc="outside upper center", ncols=2)
    return figure


def _shares(large: list[Record]) -> Figure:
    """Results of a GPU: bars for the share of a copy's bandwidth, marks for targets, dots for peers."""
    figure = Figure((9, 1.4 + 0.25 * len(large)), layout="constrained")
    axes = figure.subplots()
    places = range(len(large))
    axes.barh(places, [1 / r["times_the_floor"] for r in large], color="0.75", label="fastll")
    aims = [(r["target"], y) for y, r in enumerate(large) if r["target"]]
    if aims:
        axes.scatter(*zip(*aims, strict=True), marker="|", c="#000000", s=80, label="target", zorder=3)
    points: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for y, record in enumerate(large):
        for name, report in record["peers"].items():
            if "seconds" in report:
                points[name].append((record["floor"] / report["seconds"], y))
    for name, at in points.items():
        color, marker = STYLES[name]
        axes.scatter(*zip(*at, strict=True), marker=marker, c=color, s=24, label=name, zorder=2)
    axes.axvline(1, color="0.4", lw=1)
    axes.set(xlabel="share of the bandwidth of a copy (line)", xlim=(0, None))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="x")
    axes.set_yticks(places, [f"{title(r)}, {r['case']}, {r['dtype']}" for r in large], fontsize=7)
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=5)
    return figure


def _sizes(swept: list[Record]) -> Figure:
    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    _lines(axes, swept, lambda r: prod(r["shape"]), lambda r: 1 / r["times_the_floor"])
    axes.axhline(1, color="0.4", lw=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="elements of the logits", ylabel="speed, as a share of the floor's", ylim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def _scaling(rows: list[Record], classes: list[Record]) -> Figure:
    figure = Figure((9, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for i, (name, swept) in enumerate((("rows", rows), ("classes", classes))):
        _lines(axes[i], swept, lambda r, i=i: r["shape"][i], lambda r: 1e3 * r["seconds"])  # type: ignore[misc]
        axes[i].set(xscale="log", yscale="log", xlabel=name)
        for line in axes[i].get_lines():  # exact proportion, through the largest
            x, y = line.get_data()
            axes[i].plot(x, y[-1] * x / x[-1], color="0.6", lw=1, ls=":", zorder=1)
    axes[0].set_ylabel("milliseconds")
    drawn = axes[0 if rows else 1].get_legend_handles_labels()
    figure.legend(*drawn, loc="outside upper center", ncols=2)
    return figure


def _lines(
    axes: Axes, swept: list[Record], x: Callable[[Record], float], y: Callable[[Record], float]
) -> None:
    """Draw one line per operation and backend."""
    lines = defaultdict(list)
    for record in swept:
        lines[title(record), record["backend"]].append((x(record), y(record)))
    styles = dict(zip(dict.fromkeys(name for name, _ in lines), cycle(LINES)))
    dashes = dict(zip(dict.fromkeys(backend for _, backend in lines), cycle(DASHES)))
    for (name, backend), points in lines.items():
        color, marker = styles[name]
        look = {"color": color, "marker": marker, "ms": 4, "ls": dashes[backend]}
        axes.plot(*zip(*points, strict=True), label=f"{name} ({backend})", **look)


class HeatMap(NamedTuple):
    """What the colours of a heat map stand for."""

    value: Callable[[Record], float | None]
    title: str
    colors: str
    range: tuple[float, float, float]  # lowest, that of the middle of the colours, highest
    ticks: tuple[float, ...]
    outlined: float  # cells above this


HEAT_MAPS = {
    "grid-peers": HeatMap(
        beside_the_fastest,
        "Time of fastll over that of the fastest of {peers}: below 1 it is faster, outlined cells lose",
        "RdBu_r",
        (0.1, 1, 2),
        (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.4, 2),
        1,
    ),
    "grid-floor": HeatMap(
        lambda record: record["times_the_floor"],
        "Time of fastll over the floor, the time of memory access alone; grey: too small for a floor",
        "viridis_r",
        (0.8, 3, 30),
        (0.8, 1, 1.2, 1.5, 2, 3, 5, 10, 20, 30),
        inf,
    ),
}
#: Width and height of a cell in inches, with and without room for a number; up to so many columns.
CELL, NARROW, COLUMNS_WITH_NUMBERS = (0.29, 0.17), (0.12, 0.15), 26


def _heat_map(cells: list[Record], what: HeatMap, about: str) -> Figure:
    """A panel per operation and dtype: the classes and sizes that were measured, at equal distances."""
    classes = sorted({record["shape"][1] for record in cells})
    sizes = sorted({exponent(record["shape"]) for record in cells})
    rows = list(dict.fromkeys(map(title, cells)))
    columns = list(dict.fromkeys(record["dtype"] for record in cells))
    roomy = len(classes) <= COLUMNS_WITH_NUMBERS
    width, height = CELL if roomy else NARROW
    shape = (len(columns) * (width * len(classes) + 0.6), len(rows) * (height * len(sizes) + 0.8))
    figure = Figure((shape[0] + 1, shape[1] + 0.8), layout="constrained")
    panels = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    low, middle, high = map(log2, what.range)
    norm = TwoSlopeNorm(middle, low, high)
    for i, j in product(range(len(rows)), range(len(columns))):
        values = np.full((len(sizes), len(classes)), np.nan)
        axes, measured = panels[i, j], np.zeros_like(values)
        for record in cells:
            if (title(record), record["dtype"]) == (rows[i], columns[j]):
                at = sizes.index(exponent(record["shape"])), classes.index(record["shape"][1])
                measured[at], values[at] = 1, what.value(record) or np.nan
        look = {"origin": "lower", "aspect": "auto"}
        axes.imshow(np.where(measured, 1, np.nan), cmap="Greys", vmin=0, vmax=4, **look)
        image = axes.imshow(np.log2(values), cmap=what.colors, norm=norm, **look)
        _outline(axes, values > what.outlined)
        if roomy:
            _write_numbers(axes, values, image)
        axes.set_title(f"{rows[i]}, {columns[j]}", fontsize=9)
        axes.grid(False)
        axes.patch.set(hatch="//////", edgecolor="0.85", linewidth=0)  # what was not measured
        axes.set_yticks(range(len(sizes)), [f"$2^{{{size}}}$" for size in sizes], fontsize=7)
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=6 if roomy else 5)
    figure.supxlabel("classes", fontsize=9)
    figure.supylabel("elements", fontsize=9)
    peers = ", ".join(dict.fromkeys(peer for record in cells for peer in record["peers"]))
    figure.suptitle(f"{what.title.format(peers=peers)}\n{about}", fontsize=9)
    bar = figure.colorbar(image, ax=panels, extend="both", shrink=0.5, pad=0.01, aspect=40)
    bar.set_ticks([log2(tick) for tick in what.ticks], labels=[f"{tick:g}" for tick in what.ticks])
    return figure


def _outline(axes: Axes, chosen: Any) -> None:
    """Outline cells, just inside their edges."""
    boxes = [Rectangle((x - 0.42, y - 0.42), 0.84, 0.84) for y, x in np.argwhere(chosen)]
    axes.add_collection(PatchCollection(boxes, facecolor="none", edgecolor="black", linewidth=0.9))


def _write_numbers(axes: Axes, values: Any, image: AxesImage) -> None:
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(log2(value)))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            digits = 2 if value < 0.995 else 1 if value < 9.95 else 0
            said = f"{value:.{digits}f}".removeprefix("0")
            look = {"ha": "center", "va": "center", "fontsize": 5.5}
            axes.text(x, y, said, color="white" if dark else "black", **look)
