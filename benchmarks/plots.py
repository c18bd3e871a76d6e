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

COLOURS = {
    "torch": "#d1495b", "ours": "#00798c", "fused": "#003d5b", "floor": "#8d8d8d",
    "peer": "#edae49",
}  # fmt: skip
MODEL_SIDES = {"torch": "nn.Dropout", "ours": "dropout_ext", "fused": "dropout_ext, fused"}
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


def prices(table):
    """What dropout costs a training step of each model: time and peak memory, over p = 0."""
    rows = table[table.section == "models"]
    if rows.empty:
        return None
    cases = list(rows.case.unique())
    height = 0.8 / len(MODEL_SIDES)
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 0.45 * len(cases) + 1.6), sharey=True, squeeze=False
    )
    for i, (role, label) in enumerate(MODEL_SIDES.items()):
        time = rows[(rows.role == role) & (rows.metric == "time over p = 0")]
        memory = rows[rows.metric == "peak memory"].pivot_table("p50", "case", "role", sort=False)
        memory = memory.reindex(columns=["floor", *MODEL_SIDES])  # a run may end before some
        over = {
            "training step": time.set_index("case")[["p50", "p20", "p80"]],
            "peak memory": (memory[role] / memory["floor"]).dropna().to_frame("p50"),
        }
        for axis, of in zip(axes[0], over.values(), strict=True):
            places = [
                cases.index(case) + (i - (len(MODEL_SIDES) - 1) / 2) * height for case in of.index
            ]
            axis.barh(places, 100 * (of.p50 - 1), height, color=COLOURS[role], label=label)
            if "p20" in of:
                reach = [100 * (of.p50 - of.p20), 100 * (of.p80 - of.p50)]
                axis.errorbar(100 * (of.p50 - 1), places, xerr=reach, fmt="none", ecolor="black",
                              elinewidth=0.8)  # fmt: skip
        for axis, name in zip(axes[0], over, strict=True):
            axis.set_xlabel(f"{name}: more than at p = 0, in %")
            axis.axvline(0, color="black", linewidth=0.8)
            axis.grid(alpha=0.3, axis="x")
    axes[0][0].set_yticks(range(len(cases)), cases, fontsize=8)
    axes[0][0].invert_yaxis()
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False,
                  bbox_to_anchor=(0.5, 1 - 0.5 / figure.get_figheight()))  # fmt: skip
    first = rows.iloc[0]
    figure.suptitle(
        f"The price of dropout (whiskers: 20th to 80th percentile)\n{first.device}, "
        f"p = {first.p:g}, torch {first.torch}",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    return figure


def draw(table, folder):
    """Write every picture that the CSV has figures for; returns the paths."""
    paths = []

    def save(figure, device, name):
        if figure is not None:
            path = folder / f"{record.slug(device)}-{name}.png"
            figure.savefig(path, dpi=130)
            plt.close(figure)
            paths.append(path)

    for device, of in table[table.section == "models"].groupby("device", sort=False):
        save(prices(of), device, "price")
    for section in ("micro", "gpu"):
        of = table[table.section == section]
        if of.empty:
            continue
        device = of.device.iloc[0]
        save(
            grid(of, section, "Time per element", "ns per element", time_per_element),
            device,
            "time",
        )
        save(
            grid(of, section, "Share of the floor's speed", "% of the floor", share),
            device,
            "floor",
        )
        save(saved_picture(of, section), device, "saved")
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
