"""Tables from the CSV: for the terminal, and for README.md by command.

python -m benchmarks.tables CSV            print every table
python -m benchmarks.tables CSV --readme   write the table between README.md's markers
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.cases import size

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def short(value):
    """Three significant digits."""
    if pd.isna(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        digits = f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:.0f}"
        return digits
    return f"{value:.2e}"


def spread(row, scale=1.0):
    if row is None:
        return "-"
    text = short(row.p50 * scale)
    if pd.isna(row.p20):
        return text
    return f"{text} ({short(row.p20 * scale)}-{short(row.p80 * scale)})"


def one(rows, **where):
    """The row with these values, or None."""
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return next(rows.itertuples(), None)


def time_of(row):
    """Median time of one call with its unit."""
    if row is None:
        return "-"
    for limit, scale, unit in ((1e3, 1, "ns"), (1e6, 1e-3, "us"), (1e9, 1e-6, "ms")):
        if row.p50 < limit:
            return f"{short(row.p50 * scale)} {unit}"
    return f"{short(row.p50 * 1e-9)} s"


# From here on rounds differ by more than most do on a machine that does nothing else.
DOUBTFUL = 0.1


def variation(row):
    """Half of p80 - p20, over the median."""
    return (row.p80 - row.p20) / 2 / row.p50


def per_call(row):
    """The same with its variation, marked where it makes the time doubtful."""
    if row is None:
        return "-"
    varies = variation(row)
    return f"{time_of(row)} {'[bold red]!' if varies > DOUBTFUL else '±'}{varies:.0%}"


def doubts(table):
    """A sentence where the machine was loaded while it was measured, else None."""
    times = table[
        (table.metric == "time") & (table.section != "bars")
    ]  # of which no table is shown
    loud = times[variation(times) > DOUBTFUL]
    if loud.empty:
        return None
    return (
        f"{len(loud)} of {len(times)} times vary by more than {DOUBTFUL:.0%} between rounds, "
        "marked with ! above: something else may have run on this machine. Measure when it is idle."
    )


def brief(case):
    return case.replace("forward and backward", "fwd+bwd").replace("forward", "fwd")


def in_bytes(row):
    return "-" if row is None else size(int(row.p50)) + "B" * (row.p50 >= 1024)


def heading(table):
    first = table.iloc[0]
    devices = " and ".join(table.device.unique())
    variant = table.loc[table.environment == "default", "cpu_variant"].dropna().unique()
    cpu = f", CPU variant {variant[0]}" if len(variant) else ""
    return (
        f"{devices}; torch {first.torch}, dropout_ext {first.dropout_ext}, "
        f"commit {first.commit}{cpu}"
    )


def comparison(table, section, title):
    """nn.Dropout, ours and the floor, one case a line."""
    rows = table[table.section == section]
    if rows.empty:
        return None
    caption = (
        "times: median ± half of p80 - p20; faster: median (p20-p80) of per-round ratios; "
        "GB/s: ours; saved: bytes kept for backward, torch's / ours"
    )
    out = Table(title=title, caption=caption)
    columns = ("case", "torch", "dropout_ext", "floor", "faster", "of floor", "GB/s", "saved")
    for column in columns:
        out.add_column(column, justify="left" if column == "case" else "right")
    for device in rows.device.unique():
        out.add_section()
        for case in rows[rows.device == device].case.unique():
            of = rows[(rows.case == case) & (rows.device == device)]
            time = {role: one(of, metric="time", role=role) for role in ("torch", "ours", "floor")}
            saved = {
                role: one(of, metric="saved for backward", role=role) for role in ("torch", "ours")
            }
            ratio = of[of.metric.str.startswith("time over")]
            ratio = one(ratio, role="torch")
            share = time["ours"].share_of_floor if time["ours"] else float("nan")
            out.add_row(
                brief(case),
                *(per_call(time[role]) for role in ("torch", "ours", "floor")),
                spread(ratio),
                "-" if pd.isna(share) else f"{share:.0%}",
                short(time["ours"].bytes_moved / time["ours"].p50),
                " / ".join(in_bytes(row) for row in saved.values() if row is not None),
            )
    return out


def bars(table):
    rows = table[table.bar.notna()]
    if rows.empty:
        return None
    out = Table(title="Bars")
    for column in ("case", "figure", "median (p20-p80)", "bar", "met"):
        out.add_column(column)
    # What is saved does not depend on the case, if the bar is met: the worst one stands for all.
    plain = rows.role == "bar"
    worst = rows[~plain].sort_values("p50", key=abs)
    worst = worst.drop_duplicates(["side", "metric", "device"], keep="last")
    for row in pd.concat([rows[plain], worst]).itertuples():
        met = row.met in (True, "True")
        figure = row.side if row.role == "bar" else f"{row.side}: {row.metric}, worst case"
        colour = "green" if met else "bold red"
        verdict = f"[{colour}]{'yes' if met else 'NO'}"
        out.add_row(brief(row.case), figure, spread(row), row.bar, verdict)
    return out


def statistics(table):
    rows = table[(table.section == "statistics") & ~table.metric.str.startswith("z of")]
    if rows.empty:
        return None
    out = Table(title="Output statistics (z: distance from the expectation in deviations)")
    for column in ("case", "expected", "nn.Dropout", "z", "dropout_ext", "z"):
        out.add_column(column, justify="left" if column == "case" else "right")
    for device in rows.device.unique():
        out.add_section()
        for case in rows[rows.device == device].case.unique():
            of = table[(table.case == case) & (table.device == device)]
            cells = []
            for role in ("torch", "ours"):
                value = of[(of.role == role) & ~of.metric.str.startswith("z of")].iloc[0]
                z = of[(of.role == role) & of.metric.str.startswith("z of")].iloc[0]
                cells += [f"{value.p50:.5f}", f"{z.p50:+.2f}"]
            out.add_row(case, f"{value.expected:.5f}", *cells)
    return out


def listing(table, section, title):
    """Every figure of a section: one line per case and side, one column per metric."""
    rows = table[(table.section == section) & (table.role != "bar")]
    if rows.empty:
        return None
    metrics = list(rows.metric.unique())
    out = Table(title=title)
    for column in ("case", "", *metrics):
        out.add_column(column, justify="left" if column in ("case", "") else "right")
    for (_, case), of in rows.groupby(["device", "case"], sort=False):
        out.add_section()
        for i, side in enumerate(of.side.unique()):
            cells = []
            for metric in metrics:
                row = one(of, metric=metric, side=side)
                if row is None:
                    cells.append("-")
                elif metric == "time":
                    cells.append(per_call(row))
                else:
                    unit = row.unit if row.unit in ("%", "ms", "MiB") else ""
                    cells.append(f"{spread(row)} {unit}".strip())
            out.add_row("" if i else brief(case), side, *cells)
    return out


def terminal():
    """A terminal as it is; a file or pipe wide enough for every table."""
    found = Console()
    return found if found.is_terminal else Console(width=140)


def show(table, console):
    console.print(f"\n[bold]{heading(table)}")
    for each in (
        statistics(table),
        listing(table, "training", "Training on scikit-learn's digits"),
        listing(table, "models", "Steps of whole models"),
        listing(table, "attention", "Attention with dropout on the CPU"),
        listing(table, "compiled", "Compiled with its neighbours on the CPU"),
        listing(table, "peers", "Other people's dropout"),
        comparison(table, "family", "The family"),
        listing(table, "gpu independence", "Consecutive calls in 16-bit types (independent: 0.5)"),
        listing(table, "gpu host", "Host time per call"),
        listing(table, "gpu memory", "Peak memory in bytes"),
        comparison(table, "gpu", "nn.Dropout and dropout_ext.Dropout on the GPU"),
        listing(table, "fused", "Fused with residual, norm and activation"),
        comparison(table, "hugepages", "Fresh outputs on huge pages (THP_MEM_ALLOC_ENABLE=1)"),
        comparison(table, "micro", "nn.Dropout and dropout_ext.Dropout"),
        bars(table),
    ):
        if each is not None:
            console.print(each)
    if warning := doubts(table):
        console.print(f"[bold red]{warning}")


def markdown(table, source):
    """README's tables: the price of dropout in models, then whole calls."""
    rows = table[table.section.isin(("micro", "gpu", "hugepages"))]
    rows = rows[rows.threads.fillna(1) == 1]
    lines = [
        "| | elements | `nn.Dropout` | `dropout_ext.Dropout` | faster | share of floor | saved for backward |",  # noqa: E501
        "|---|---|---|---|---|---|---|",
    ]
    for device in rows.device.unique():
        of = rows[rows.device == device]
        for section in of.section.unique():
            for dtype in ("float32", "bfloat16"):
                for op in ("forward", "forward and backward"):
                    for n in README_SIZES:
                        case = of[(of.section == section) & (of.elements == n)]
                        case = case[(case.dtype == dtype) & (case.op == op)]
                        line = markdown_line(case, op, dtype, n, section)
                        lines += [line] if line else []
    where = source.relative_to(record.ROOT) if source.is_relative_to(record.ROOT) else source.name
    threads = "one thread on the CPU, " if (rows.section == "micro").any() else ""
    pages = ""
    if (rows.section == "hugepages").any():
        pages = (
            " From 16 Mi on all sides pay for the page faults of a fresh output; with "
            "`THP_MEM_ALLOC_ENABLE=1`, PyTorch's own switch, it is on huge pages and they do not."
        )
    lines += [
        "",
        f"{heading(table)}. Time of one call at p = {rows.p.iloc[0]:g}, {threads}medians of one "
        f"interleaved run; the floor is `torch.mul(x, c)` on the CPU and `y.copy_(x)` on a GPU."
        f"{pages} Source: `{where}`.",
    ]
    return "\n".join([*markdown_models(table, source.parent, where.parent), *lines])


def markdown_models(table, folder, where):
    rows = table[table.section == "models"]
    if rows.empty:
        return
    yield from (
        f"What turning dropout on costs: a training step at p = {rows.p.iloc[0]:g} over that at "
        "p = 0, same run: time, medians (20th to 80th percentile), and peak memory; ours by "
        "`convert` and `override`, fused by `convert(fuse=True)`.",
        "",
        "| model | time: `nn.Dropout` | `dropout_ext` | fused "
        "| memory: `nn.Dropout` | `dropout_ext` | fused |",
        "|---|---|---|---|---|---|---|",
    )
    for case in rows.case.unique():
        of = rows[rows.case == case]
        off = one(of, role="floor", metric="peak memory")
        cells = []
        for role in ROLES:
            cells.append(spread(one(of, role=role, metric="time over p = 0")))
        for role in ROLES:
            peak = one(of, role=role, metric="peak memory")
            cells.append("-" if off is None or peak is None else f"{peak.p50 / off.p50:.2f}")
        yield f"| {case} | " + " | ".join(cells) + " |"
    for picture in sorted(folder.glob("*-price.png")):
        yield from ("", f"![the price of dropout in models]({where}/{picture.name})")
    yield from ("", "The operator by itself:", "")


ROLES = ("torch", "ours", "fused")


def markdown_line(case, op, dtype, n, section):
    theirs = one(case, metric="time", role="torch")
    ours = one(case, metric="time", role="ours")
    if theirs is None or ours is None:
        return None
    ratio = one(case[case.metric.str.startswith("time over")], role="torch")
    saved = case[case.metric == "saved for backward"]
    saved = [one(saved, role=role) for role in ("torch", "ours")]
    kept = " / ".join(in_bytes(row) for row in saved) if saved[0] else ""
    share = "" if pd.isna(ours.share_of_floor) else f"{ours.share_of_floor:.0%}"
    pages = ", huge pages" if section == "hugepages" else ""
    return (
        f"| {op}, {dtype}{pages} | {size(n)} | {time_of(theirs)} | {time_of(ours)} "
        f"| {ratio.p50:.3g}x | {share} | {kept} |"
    )


README_SIZES = (1024, 2**16, 2**20, 2**24, 2**26)


def write_readme(table, source, path):
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path} must hold the markers {BEGIN} and {END} once each")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    path.write_text(f"{head}{BEGIN}\n{markdown(table, source)}\n{END}{tail}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables", description=__doc__.splitlines()[0]
    )
    parser.add_argument("csv", type=Path, nargs="?", help="default: this machine's full run")
    parser.add_argument("--readme", nargs="?", type=Path, const=record.ROOT / "README.md",
                        help="write the table into this file")  # fmt: skip
    args = parser.parse_args(argv)
    source = (args.csv or record.RESULTS / record.slug(record.cpu_name()) / "bench.csv").resolve()
    table = record.read(source)
    if args.readme:
        write_readme(table, source, args.readme)
    else:
        show(table, terminal())


if __name__ == "__main__":
    sys.exit(main())
