"""The picture of `switchkd diagnose`: guidance, harmful tokens, entropy and divergence along the text."""

from pathlib import Path
from typing import Any

from switchkd.cli.display import BLUE, GREEN, GREY, ORANGE
from switchkd.commands.diagnose_report import TITLES
from switchkd.errors import UserError
from switchkd.evaluation.diagnosis import Diagnosis

_LOOK = {
    "dataset": ("black", "o"),
    "student": (BLUE, "s"),
    "random": (GREY, "v"),
    "switch": (ORANGE, "D"),
    "teacher": (GREEN, "^"),
}


def plot_diagnosis(diagnosis: Diagnosis, path: Path) -> None:
    """Draw the decay curves with 95% bands, what thresholds catch, and entropy and JSD by position.

    Args:
        diagnosis: What was measured.
        path: PNG file.

    Raises:
        UserError: The file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")  # no window, also on a machine with a display
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, grid = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
        _draw_guidance(grid[0, 0], diagnosis)
        _draw_caught(grid[0, 1], diagnosis)
        for axes, name, title in (
            (grid[1, 0], "teacher_entropy", "Entropy of the teacher [nats]"),
            (grid[1, 1], "jsd", "JSD of student and teacher [nats]"),
        ):
            _draw_measure(axes, diagnosis, name)
            axes.set_title(title, loc="left", fontweight="bold")
            axes.set_xlabel("position of the token")
            axes.set_ylim(bottom=0)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda place: list(TITLES.values()).index(labels[place]))
        figure.legend([handles[place] for place in order], [labels[place] for place in order],
                      loc="outside lower center", ncols=len(order), frameon=False)  # fmt: skip
        try:
            figure.savefig(path, dpi=120)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write the picture {path}: {error}") from error
        finally:
            plt.close(figure)


def _draw_guidance(axes: Any, diagnosis: Diagnosis) -> None:
    for writer in diagnosis.writers:
        points = [
            (position, one.share)
            for position, one in zip(diagnosis.positions, writer.by_position, strict=True)
            if one is not None and one.share is not None
        ]
        values = [(position, share.value, share.interval or (share.value,) * 2) for position, share in points]
        _draw_curve(axes, writer.name, [(x, 100 * y, (100 * low, 100 * high)) for x, y, (low, high) in values])
    axes.set_title("Guidance kept [% of that on the answers]", loc="left", fontweight="bold")
    axes.set_xlabel(f"tokens after which the teacher goes on ({diagnosis.measure})")


def _draw_caught(axes: Any, diagnosis: Diagnosis) -> None:
    found = [one for one in diagnosis.harm.caught if one.share is not None]
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1, linestyle="--")
    axes.annotate("random tokens", (78, 60), color=GREY, rotation=33, ha="center")
    for one in found:
        assert one.share is not None
        used = one.initial_threshold == diagnosis.policy.initial_threshold
        x, y = 100 * one.teacher_share, 100 * one.share.value
        axes.vlines(x, *(100 * end for end in one.share.interval), color=ORANGE, linewidth=1.5)
        axes.plot([x], [y], "D", color=ORANGE if used else "white", markeredgecolor=ORANGE, markeredgewidth=1.5)
        axes.annotate(f"{one.initial_threshold:.3g}", (x, y), xytext=(7, -11), textcoords="offset points", fontsize=8.5)
    if not found:
        axes.text(50, 80, "no harmful token", ha="center")
    axes.set(xlim=(0, 100), ylim=(0, 104))
    axes.set_title("First harmful tokens above the threshold [%]", loc="left", fontweight="bold")
    axes.set_xlabel("tokens of the student's text above the threshold [%]; labels: nats")


def _draw_measure(axes: Any, diagnosis: Diagnosis, name: str) -> None:
    ends = [*diagnosis.positions[1:], max(max(len(text.ids) for text in writer.texts) for writer in diagnosis.writers)]
    for writer in diagnosis.writers:
        points = [
            ((start + end - 1) / 2, mean.value, mean.interval or (mean.value, mean.value))
            for start, end, mean in zip(diagnosis.positions, ends, writer.measures[name], strict=True)
            if mean is not None
        ]
        _draw_curve(axes, writer.name, points)


def _draw_curve(axes: Any, writer: str, points: list[tuple[float, float, tuple[float, float]]]) -> None:
    colour, marker = _LOOK[writer]
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    axes.plot(xs, ys, color=colour, marker=marker, markersize=5, label=TITLES[writer], linewidth=1.6)
    axes.fill_between(xs, [ends[0] for *_, ends in points], [ends[1] for *_, ends in points],
                      color=colour, alpha=0.15, linewidth=0)  # fmt: skip
