"""Draw the pictures from the CSV: `python -m benchmarks.plots [CSV]`, into the CSV's folder."""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, NullLocator

from benchmarks import record
from benchmarks.cases import size

COLOURS = {"torch": "#d1495b", "ours": "#00798c", "floor": "#8d8d8d", "peer": "#edae49"}
PEERS = ("#edae49", "#66a182", "#8d6a9f")
OPS = ("forward", "forward and backward")


def plain(value, _):
    return f"{value:g}"


def grid(table, section, title, ylabel, draw):
    """One panel per operation and type; None when the section has no figures."""
    rows = table[table.section == section]
    rows = rows[rows.threads.fillna(1) == 1]
    if rows.empty:
        return None
    dtypes = list(rows.dtype.unique())
    figure, axes = plt.subplots(
        len(dtypes), len(OPS), figsize=(10, 3.2 * len(dtypes) + 0.8), squeeze=False, sharex=True
    )
    for i, dtype in enumerate(dtypes):
        for j, op in enumerate(OPS):
            axis = axes[i][j]
            draw(axis, rows[(rows.dtype == dtype) & (rows.op == op)])
            axis.set_title(f"{op}, {dtype}", fontsize=10)
            axis.set_xscale("log", base=2)
            sizes = sorted(rows.elements.dropna().unique())
            axis.xaxis.set_major_locator(FixedLocator(sizes))
            axis.xaxis.set_major_formatter(FixedFormatter([size(int(n)) for n in sizes]))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.tick_params(axis="x", labelrotation=45)
            axis.grid(alpha=0.3)
            if j == 0:
                axis.set_ylabel(ylabel)
            if i == len(dtypes) - 1:
                axis.set_xlabel("elements")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False,
                  bbox_to_anchor=(0.5, 1 - 0.55 / figure.get_figheight()))  # fmt: skip
    first = rows.iloc[0]
    threads = ", one thread" if section == "micro" else ""
    figure.suptitle(
        f"{title}\n{first.device}{threads}, p = {first.p:g}, torch {first.torch}", fontsize=11
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    return figure


def lines(axis, rows, value, low=None, high=None):
    peers = iter(PEERS)
    for side in rows.side.unique():
        of = rows[rows.side == side].sort_values("elements")
        role = of.role.iloc[0]
        colour = next(peers) if role == "peer" else COLOURS[role]
        axis.plot(of.elements, value(of), "o-", color=colour, label=side, markersize=3.5)
        if low:
            axis.fill_between(of.elements, low(of), high(of), color=colour, alpha=0.2, linewidth=0)


def time_per_element(axis, rows):
    rows = rows[rows.metric == "time"]
    lines(
        axis,
        rows,
        lambda r: r.p50 / r.elements,
        lambda r: r.p20 / r.elements,
        lambda r: r.p80 / r.elements,
    )
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(plain))


def speed_up(axis, rows):
    rows = rows[rows.metric.str.startswith("time over") & (rows.role != "floor")]
    peers = iter(PEERS)
    for side in rows.side.unique():
        of = rows[rows.side == side].sort_values("elements")
        colour = COLOURS["ours"] if of.role.iloc[0] == "torch" else next(peers)
        axis.plot(of.elements, of.p50, "o-", color=colour, label=f"over {side}", markersize=3.5)
        axis.fill_between(of.elements, of.p20, of.p80, color=colour, alpha=0.2, linewidth=0)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(FixedLocator([0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 30, 50, 100]))
    axis.yaxis.set_major_formatter(FuncFormatter(plain))
    axis.yaxis.set_minor_locator(NullLocator())


def share(axis, rows):
    lines(axis, rows[rows.metric == "time"], lambda r: 100 * r.share_of_floor)
    axis.set_ylim(bottom=0)


def saved(axis, rows):
    rows = rows[(rows.metric == "saved for backward") & (rows.role != "floor")]
    lines(axis, rows, lambda r: r.p50)
    axis.set_yscale("log", base=10)


def saved_picture(table, section):
    """Bytes saved for backward: one panel per type, only where there is a backward."""
    rows = table[
        (table.section == section)
        & (table.metric == "saved for backward")
        & (table.role != "floor")
        & (table.op == "forward and backward")
        & (table.threads.fillna(1) == 1)
    ]
    if rows.empty:
        return None
    dtypes = list(rows.dtype.unique())
    figure, axes = plt.subplots(1, len(dtypes), figsize=(5 * len(dtypes), 3.8), squeeze=False,
                                sharey=True)  # fmt: skip
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        of = rows[rows.dtype == dtype]
        saved(axis, of)
        axis.set_title(dtype, fontsize=10)
        axis.set_xscale("log", base=2)
        sizes = sorted(of.elements.unique())
        axis.xaxis.set_major_locator(FixedLocator(sizes))
        axis.xaxis.set_major_formatter(FixedFormatter([size(int(n)) for n in sizes]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.tick_params(axis="x", labelrotation=45)
        axis.set_xlabel("elements")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("bytes kept for backward")
    axes[0][0].legend(frameon=False)
    figure.suptitle(f"Saved for backward beside the input\n{rows.device.iloc[0]}", fontsize=11)
    figure.tight_layout()
    return figure


def draw(table, folder):
    """Write every picture that the CSV has figures for; returns the paths."""
    paths = []
    for section in ("micro", "gpu"):
        of = table[table.section == section]
        if of.empty:
            continue
        device = record.slug(of.device.iloc[0])
        for name, figure in (
            ("time", grid(of, section, "Time per element", "ns per element", time_per_element)),
            ("speed-up", grid(of, section, "Speed-up of dropout_ext.Dropout",
                              "times faster", speed_up)),
            ("floor", grid(of, section, "Share of the floor's speed", "% of the floor", share)),
            ("saved", saved_picture(of, section)),
        ):  # fmt: skip
            if figure is None:
                continue
            path = folder / f"{device}-{name}.png"
            figure.savefig(path, dpi=130)
            plt.close(figure)
            paths.append(path)
    return paths


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("csv", type=Path, nargs="?", help="default: every CSV under results/")
    args = parser.parse_args(argv)
    sources = [args.csv] if args.csv else sorted(record.RESULTS.glob("*/bench.csv"))
    if not sources:
        parser.error(f"no bench.csv under {record.RESULTS}; run python -m benchmarks")
    for source in sources:
        for path in draw(record.read(source), source.parent):
            print(path)


if __name__ == "__main__":
    sys.exit(main())
