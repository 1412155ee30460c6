"""A benchmark's figures for people: a table on the terminal, a self-contained HTML page, a picture."""

from __future__ import annotations

import html
import io
import sys
from pathlib import Path
from typing import Any

from liger_deploy.errors import UserError
from liger_deploy.files import staged_file

COLUMNS = (
    "a token at each depth, ms",
    "first token",
    "prefill, tokens/s",
    "resident",
    "state or cache",
    "files",
    "load",
)


def check_plots() -> None:
    """Raises UserError where the package that draws is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--out draws with matplotlib: pip install 'liger-deploy[benchmark]'") from None


def rows(figures: dict[str, Any]) -> list[list[str]]:
    """A row a subject: name, milliseconds a token at each depth, then `COLUMNS` from the second on."""
    found = []
    for one in figures["subjects"]:
        last = one["depths"][-1]
        rates = [f"{d['prefill_tokens_s']:.0f}" for d in one["depths"]]
        found.append([
            one["label"],
            *(f"{d['step_ms']['median']:.2f}" for d in one["depths"]),
            f"{one['first_token_s'] * 1e3:.0f} ms",
            rates[0] if len(rates) == 1 else f"{rates[0]} to {rates[-1]}",
            size(last["resident"]), size(last["cache_bytes"]), size(one["file_bytes"]), f"{one['load_s']:.1f} s",
        ])  # fmt: skip
    return found


def headings(figures: dict[str, Any]) -> list[str]:
    """Of `rows`."""
    columns = [memory(figures) if name == "resident" else name for name in COLUMNS[1:]]
    return ["ms a token at depth", *(f"{c:,}" for c in figures["contexts"]), *columns]


def memory(figures: dict[str, Any]) -> str:
    """What the figures `resident` are of."""
    return "GPU memory" if figures["device"] == "cuda" else "resident memory"


def size(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / 1e6:.1f} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"


def note(figures: dict[str, Any]) -> str:
    """One line: threads, bandwidth, noise."""
    loop = figures["reference_loop_s"]
    threads = "" if figures["device"] == "cuda" else f"{figures['threads']} threads, "
    return (
        f"{threads}batch 1; memory reads at {figures['read_bandwidth_bytes_s'] / 1e9:.1f} GB/s; "
        f"a fixed loop beside the steps took {loop['p10'] * 1e3:.1f} to {loop['p90'] * 1e3:.1f} ms "
        "(10th to 90th percentile)"
    )


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(caption=note(figures))
    for i, heading in enumerate(headings(figures)):
        table.add_column(heading, justify="left" if i == 0 else "right")
    for row in rows(figures):
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def write(document: dict[str, Any], out: Path) -> None:
    """FILE.html (with the picture inside) and FILE.png beside FILE.json."""
    figures = document["figures"]
    for suffix, content in (
        (".png", picture(figures, "png")),
        (".html", page(document, picture(figures, "svg").decode()).encode()),
    ):
        with staged_file(out.with_suffix(suffix)) as stage:
            stage.write_bytes(content)


def picture(figures: dict[str, Any], form: str) -> bytes:
    """Milliseconds a token and resident memory against depth, both axes logarithmic; "svg" or "png"."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), dpi=120)
    for one in figures["subjects"]:
        ours = one["label"].startswith("liger")
        style = {"linewidth": 2.2 if ours else 1.3, "linestyle": "-" if ours else "--", "marker": "o", "markersize": 4}
        depths = [d["context"] for d in one["depths"]]
        low, middle, high = ([d["step_ms"][key] for d in one["depths"]] for key in ("p10", "median", "p90"))
        (line,) = axes[0].plot(depths, middle, label=one["label"], **style)
        axes[0].fill_between(depths, low, high, color=line.get_color(), alpha=0.12)
        axes[1].plot(depths, [d["resident"] / 1e6 for d in one["depths"]], color=line.get_color(), **style)
    for axis, label in zip(axes, ("milliseconds a token", f"{memory(figures)}, MB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="tokens in the conversation", ylabel=label)
        axis.set_xticks(figures["contexts"], [f"{c:,}" for c in figures["contexts"]])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.25)
    figure.legend(loc="lower center", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.05 + 0.04 * ((len(figures["subjects"]) + 2) // 3), 1, 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, metadata={"Date": None} if form == "svg" else None)
    plt.close(figure)
    return buffer.getvalue()


def page(document: dict[str, Any], svg: str) -> str:
    """One HTML file that needs nothing else."""
    figures, machine = document["figures"], document["machine"]
    head = "".join(f"<th>{html.escape(text)}</th>" for text in headings(figures))
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows(figures))
    name = machine.get("gpu") or machine["cpu"]
    where = f"{name}, {machine['cores']} cores, {document['date']}, commit {document['commit']}"
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>liger_deploy benchmark</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
svg {{ max-width: 100%; height: auto }} p {{ color: #555 }}
</style>
<h1>Time and memory by depth</h1>
<p>{html.escape(where)}</p>
{svg[svg.index("<svg") :]}
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
<p>{html.escape(note(figures))}. State or cache: what the conversation keeps at the last depth. Bands: 10th to 90th
percentile of the steps.</p>
<p><code>{html.escape(document["command"])}</code><br>{html.escape(versions)}</p>
</html>
"""
