"""How a run is shown: tables, and the summary picture."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchkd.errors import UserError

if TYPE_CHECKING:  # torch and matplotlib are slow to import and not needed to print a table; rich only on a terminal
    from rich.table import Table as RichTable

    from switchkd.rollout import Rollout

# Okabe and Ito's palette: distinguishable with every common colour vision deficiency, and in grey.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#7F7F7F"
SERIES_COLOURS = ("#B8B8B8", ORANGE, BLUE, GREEN, "#CC79A7", "#D55E00")


def table(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> str:
    """Return a plain table: columns two blanks apart, numbers aligned on the right, a rule under the headers.

    Args:
        rows: Cells of any type; floats get four significant digits and None becomes "-".
        headers: One per column.
    """
    cells = [[cell(value) for value in row] for row in rows]
    columns = list(zip(headers, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(map(_is_number, column[1:])) for column in columns]
    lines = [list(headers), ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def rich_table(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> "RichTable":
    """Return the same table as a terminal shows it: cells are folded where it is too narrow; they may have styles."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [[value if isinstance(value, Text) else Text(cell(value)) for value in row] for row in rows]
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column, name in enumerate(headers):
        numeric = all(_is_number(row[column].plain) for row in cells)
        result.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        result.add_row(*row)
    return result


def markdown_table(rows: Iterable[Sequence[Any]], headers: Sequence[str]) -> str:
    """Return the same cells as a table of Markdown."""
    lines = [list(headers), ["---"] * len(headers), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def position_curves(rollouts: Sequence["Rollout"], min_rows: int = 1) -> dict[str, list[float]]:
    """Return how rollouts run along the completion: the arguments of `plot_summary` that depend on the position.

    Args:
        rollouts: Rollouts of one policy.
        min_rows: Positions that fewer completions reach are left out: a mean over two rows says little.

    Returns:
        `position` (counted from 0), and at each the mean `teacher_share` in [0, 1], `divergence` and `threshold` in
        nats (nan where the policy has none) over the completions that reach it.
    """
    import torch

    from switchkd.rollout import Author

    length = max((rollout.completion_ids.shape[1] for rollout in rollouts), default=0)
    rows, teacher, divergence, threshold = (torch.zeros(length, dtype=torch.float64) for _ in range(4))
    for rollout in rollouts:
        reached = slice(rollout.completion_ids.shape[1])
        rows[reached] += rollout.completion_mask.sum(0).cpu()
        teacher[reached] += (rollout.author == Author.TEACHER).sum(0).cpu()
        for total, values in ((divergence, rollout.divergence), (threshold, rollout.threshold)):
            total[reached] += values.double().masked_fill(~rollout.completion_mask, 0.0).sum(0).cpu()
    keep = rows >= max(min_rows, 1)
    means = {"teacher_share": teacher, "divergence": divergence, "threshold": threshold}
    return {"position": keep.nonzero().squeeze(-1).tolist()} | {
        name: (total[keep] / rows[keep]).tolist() for name, total in means.items()
    }


def plot_summary(
    path: str | Path,
    *,
    position: Sequence[float],
    teacher_share: Sequence[float],
    divergence: Sequence[float],
    threshold: Sequence[float],
    scores: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> Path:
    """Draw who wrote along the completion and, where given, the scores; return the file's path.

    Left, above each other: the teacher's share, and the mean divergence with the threshold it was compared with, both
    against the position in the completion. Right: ROUGE-L by answer length, bars with one standard deviation.

    Args:
        path: PNG, PDF or SVG file, 1200 x 500 pixels as PNG.
        position: Positions in the completion, tokens from 0.
        teacher_share: Share of the tokens at that position that the teacher wrote, in [0, 1].
        divergence: Mean divergence there, nats.
        threshold: Threshold there, nats; nan or an empty list for a policy without one.
        scores: Model name -> length bucket -> (mean, standard deviation) of ROUGE-L in [0, 100].

    Raises:
        UserError: The file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")  # no window, also on a machine with a display
    from matplotlib import pyplot as plt

    path = Path(path)
    style = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "axes.titlesize": 12,
        "axes.titlelocation": "left",
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        figure = plt.figure(figsize=(12, 5), layout="constrained")
        left, right = figure.subfigures(1, 2, wspace=0.03) if scores else (figure, figure)
        share_axes, divergence_axes = left.subplots(2, 1, sharex=True)
        _draw_share(share_axes, position, teacher_share)
        _draw_divergence(divergence_axes, position, divergence, threshold)
        if scores:
            _draw_scores(right.subplots(), scores)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=100)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write the picture {path}: {error}") from error
        finally:
            plt.close(figure)
    return path


def _draw_share(axes: Any, position: Sequence[float], teacher_share: Sequence[float]) -> None:
    percent = [100 * share for share in teacher_share]
    axes.fill_between(position, percent, color=ORANGE, alpha=0.25, linewidth=0)
    axes.plot(position, percent, color=ORANGE, linewidth=1.8)
    axes.set(ylim=(0, 100), ylabel="teacher share [%]", title="Who writes: teacher share along the completion")
    axes.tick_params(labelbottom=False)


def _draw_divergence(
    axes: Any, position: Sequence[float], divergence: Sequence[float], threshold: Sequence[float]
) -> None:
    axes.plot(position, divergence, color=BLUE, linewidth=1.8, label="mean divergence")
    if len(threshold) and any(value == value for value in threshold):
        axes.plot(position, threshold, color="black", linewidth=1.6, linestyle=(0, (5, 2)), label="threshold")
    axes.set(xlabel="position in the completion [tokens]", ylabel="divergence [nats]")
    axes.set_title("Why: student against teacher, and the threshold")
    axes.set_ylim(bottom=0)
    if len(position):
        axes.set_xlim(position[0], max(position[-1], position[0] + 1))
    axes.legend(loc="upper right", ncols=2)
    axes.set_ylim(top=axes.get_ylim()[1] * 1.25)  # room for the legend


def _draw_scores(axes: Any, scores: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    buckets = list(dict.fromkeys(bucket for by_length in scores.values() for bucket in by_length))
    width = 0.8 / len(scores)
    for index, (name, by_length) in enumerate(scores.items()):
        shift = (index - (len(scores) - 1) / 2) * width
        groups = [group for group, bucket in enumerate(buckets) if bucket in by_length]
        means = [by_length[buckets[group]][0] for group in groups]
        deviations = [by_length[buckets[group]][1] for group in groups]
        bars = axes.bar(
            [group + shift for group in groups],
            means,
            0.92 * width,
            yerr=deviations,
            label=name,
            color=SERIES_COLOURS[index % len(SERIES_COLOURS)],
            error_kw={"elinewidth": 1.2, "capsize": 3, "ecolor": "#333333"},
        )
        if len(buckets) * len(scores) <= 16:
            for bar, mean, deviation in zip(bars, means, deviations, strict=True):
                axes.annotate(
                    f"{mean:.0f}",
                    (bar.get_x() + bar.get_width() / 2, mean + deviation),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                )
    highest = max((mean + deviation for row in scores.values() for mean, deviation in row.values()), default=0.0)
    axes.set(xticks=range(len(buckets)), xticklabels=buckets, ylim=(0, max(1.0, 1.1 * highest)))
    axes.set(xlabel="length of the reference answer [tokens]", ylabel="ROUGE-L")
    axes.set_title("Result: ROUGE-L by answer length")
    axes.tick_params(axis="x", length=0)
    columns = len(scores) if sum(map(len, scores)) + 8 * len(scores) <= 64 else 2
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=columns, columnspacing=1.5, handlelength=1.2)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").removesuffix("%"))
    except ValueError:
        return text == "-"
    return True


def cell(value: Any) -> str:
    """Return the text of a table's cell: floats with four significant digits, "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
