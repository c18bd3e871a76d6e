"""The outcomes as a table, as CSV and as Markdown."""

import math

import pandas as pd
from rich.table import Table

from benchmarks.stats.result import ALPHA, POWER

OURS, TORCH = "dropout_ext", "nn.Dropout"


def significance(results) -> float:
    """Bonferroni: each asserted p-value of the product gets an equal part of ALPHA."""
    family = sum(r.subject == OURS and r.asserted and r.p_value is not None for r in results)
    return ALPHA / max(family, 1)


def number(value):
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return str(int(value))
    return f"{value:.3g}"


def probability(p):
    if p is None:
        return ""
    return f"{p:g}" if p <= 0.999 else f"1 - {1 - p:.0e}"


def verdict(r, level):
    if r.subject == OURS and r.asserted:
        return "FAIL" if r.seen(level) else "ok"
    return "seen" if r.seen(level) else "-"


def frame(results, level, about):
    rows = []
    for r in results:
        rows.append(
            {
                "subject": r.subject,
                "section": r.section,
                "test": r.test,
                "p": r.p,
                "samples": r.samples,
                "statistic": r.statistic,
                "value": r.value,
                "where": r.where,
                "expected": r.expected,
                "p_value": r.p_value,
                "smallest_deviation": r.smallest(level),
                "deviation_of": r.measure,
                "significance": level if r.p_value is not None else None,
                "asserted": r.subject == OURS and r.asserted,
                "verdict": verdict(r, level),
            }
            | about
        )
    return pd.DataFrame(rows)


def _lines(results, level):
    """One line per test of the product, with nn.Dropout's outcome of the same test beside it."""
    beside = {(r.section, r.test, r.p): r for r in results if r.subject == TORCH}
    for r in results:
        if r.subject != OURS:
            continue
        other = beside.get((r.section, r.test, r.p))
        torch = (
            "" if other is None else number(other.value if other.p_value is None else other.p_value)
        )
        if other is not None and other.seen(level):
            torch += " (seen)"
        smallest = r.smallest(level)
        yield (
            r.section,
            (
                r.test,
                probability(r.p),
                number(r.samples) if r.samples < 1e6 else f"{r.samples:.3g}",
                f"{r.statistic} {number(r.value)}" + (f" ({r.where})" if r.where else ""),
                r.expected,
                "exact" if r.p_value is None else number(r.p_value),
                "-" if smallest is None else f"{number(smallest)} {r.measure}",
                verdict(r, level),
                torch,
            ),
        )


COLUMNS = (
    "test", "p", "samples", "statistic", "expected", "p-value", "smallest deviation seen", "",
    "nn.Dropout",
)  # fmt: skip


def table(results, level):
    out = Table(title="statistics of dropout_ext", row_styles=["", "dim"])
    for column in COLUMNS:
        out.add_column(column, overflow="fold")
    section = None
    for name, cells in _lines(results, level):
        if name != section:
            out.add_section()
            out.add_row(f"[bold]{name}[/]", *[""] * (len(COLUMNS) - 1))
            section = name
        style = "bold red" if cells[7] == "FAIL" else None
        out.add_row(*(cell.replace("[", r"\[") for cell in cells), style=style)
    return out


def caught(results, level):
    """{mutation: {test: smallest p-value}} of the tests that see it; 0 where a test is exact."""
    out = {}
    for r in results:
        if r.subject in (OURS, TORCH):
            continue
        seen = out.setdefault(r.subject, {})
        if r.seen(level):
            p_value = 0.0 if r.p_value is None else r.p_value
            seen[r.test] = min(seen.get(r.test, 1.0), p_value)
    return out


def mutation_lines(results, level):
    by_mutation = caught(results, level)
    tests = dict.fromkeys(r.test for r in results if r.subject in by_mutation)
    for test in tests:
        if any(test in seen for seen in by_mutation.values()):
            yield (
                test,
                *(number(seen[test]) if test in seen else "" for seen in by_mutation.values()),
            )


def mutation_table(results, level):
    by_mutation = caught(results, level)
    out = Table(
        title="broken on purpose: the tests that see it, with their smallest p-value",
        row_styles=["", "dim"],
    )
    out.add_column("test")
    for name in by_mutation:
        out.add_column(name, justify="right")
    for line in mutation_lines(results, level):
        out.add_row(*line)
    return out


def summary(results, level):
    ours = [r for r in results if r.subject == OURS]
    asserted = [r for r in ours if r.asserted and r.p_value is not None]
    exact = [r for r in ours if r.asserted and r.p_value is None]
    failed = [r for r in ours if r.asserted and r.seen(level)]
    torch = [r for r in results if r.subject == TORCH]
    text = (
        f"Family-wise significance {ALPHA:g} over {len(asserted)} p-values (Bonferroni), so "
        f"{level:.3g} for each; besides, {len(exact)} exact comparisons. The smallest deviation in "
        f"a row would have been seen with probability {POWER:g}. "
    )
    text += f"{len(failed)} failed." if failed else "None failed."
    if asserted:
        least = min(asserted, key=lambda r: r.p_value)
        text += f" Smallest p-value: {least.p_value:.3g} ({least.test})."
    if torch:
        text += (
            f" nn.Dropout, reported and not asserted: {sum(r.seen(level) for r in torch)} of "
            f"{len(torch)} rows show a deviation."
        )
    return text


def markdown(results, level, about, notes):
    def grid(columns, lines):
        yield "| " + " | ".join(columns) + " |"
        yield "|" + "---|" * len(columns)
        for line in lines:
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"

    yield "# Statistics\n"
    yield ", ".join(f"{name} {value}" for name, value in about.items()) + ".\n"
    yield summary(results, level) + "\n"
    yield "docs/statistics.md says what each test looks at.\n"
    section, lines = None, []
    for name, cells in [*_lines(results, level), (None, None)]:
        if name != section:
            if lines:
                yield f"## {section[0].upper()}{section[1:]}\n"
                yield from grid([column or "outcome" for column in COLUMNS], lines)
                yield ""
            section, lines = name, []
        lines.append(cells)
    by_mutation = caught(results, level)
    if by_mutation:
        yield "## Broken on purpose\n"
        yield "The tests that see each, with the smallest p-value; empty where they see nothing.\n"
        yield from grid(["test", *by_mutation], mutation_lines(results, level))
        yield ""
    for note in notes:
        yield f"{note}\n"
