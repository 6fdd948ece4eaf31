"""How trainings went: what was logged against the step."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from switchkd.page.document import Figure, Section
from switchkd.page.figures import Line, lines
from switchkd.page.scales import finite
from switchkd.report.compared import Trained

#: Key of a log -> title of its panel, and its unit.
SHOWN = {
    "loss": ("Loss", "nats per token"),
    "eval_loss": ("Evaluation loss", "nats per token"),
    "eval_cross_entropy": ("Evaluation cross-entropy", "nats per token"),
    "eval_rouge_l": ("ROUGE-L of sampled answers", "ROUGE-L"),
    "rollout/teacher_share": ("Teacher share", "share of tokens"),
    "rollout/jsd_nats": ("Divergence compared: JSD", "nats"),
    "rollout/kl_nats": ("Divergence compared: KL", "nats"),
    "rollout/entropy_nats": ("Compared: the student's entropy", "nats"),
    "rollout/surprisal_nats": ("Compared: the student's surprisal", "nats"),
    "rollout/rank": ("Compared: the drafted token's rank", "rank"),
    "rollout/threshold_nats": ("Threshold, mean over tokens", "nats"),
    "rollout/initial_threshold_nats": ("Threshold at position 0", "nats"),
    "rollout/completion_tokens": ("Length of rollouts", "tokens"),
}


def curve_section(
    trained: Sequence[Trained], stages: Collection[str] = (), title: str = "Learning curves"
) -> Section | None:
    """Return what trainings logged; the seeds of a run are one line, their mean, in an area from lowest to highest.

    Args:
        trained: With different labels, or the same ones with different seeds.
        stages: Labels of trainings that came before the others: they get a figure of their own.
        title: Of the section.
    """
    before = [one for one in trained if one.label.rpartition(": ")[2] in stages]
    parts = [(one for one in trained if one not in before), before]
    names = ("What was logged", "What came before")
    figures = [_figure(list(part), name) for part, name in zip(parts, names, strict=True)]
    shown = [figure for figure in figures if figure is not None]
    return Section(title, shown) if shown else None


def _figure(trained: Sequence[Trained], title: str) -> Figure | None:
    labels = list(dict.fromkeys(one.label for one in trained))
    panels, cells = [], []
    for key, (name, unit) in SHOWN.items():
        drawn = []
        for number, label in enumerate(labels):
            logs = [one.run.metrics for one in trained if one.label == label]
            steps = _by_step(logs, key)
            if not steps:
                continue
            points = [(step, sum(values) / len(values)) for step, values in steps.items()]
            band = [(step, min(values), max(values)) for step, values in steps.items()]
            drawn.append(Line(label, points, [band] if len(logs) > 1 else [], number))
            cells += [
                [label, name, unit, step, mean, low, high]
                for (step, mean), (_, low, high) in zip(points, band, strict=True)
            ]
        if drawn:
            limits = (0.0, 1.0) if key == "rollout/teacher_share" else None
            svg = lines(drawn, title=name, x_label="optimizer step", y_label=unit, y_limits=limits)
            panels.append((name, svg))
    if not panels:
        return None
    seeds = max(sum(one.label == label for one in trained) for label in labels)
    note = f"Mean of {seeds} training seeds; the area reaches from the lowest to the highest." if seeds > 1 else ""
    headers = ["run", "measure", "unit", "step", "mean", "lowest", "highest"]
    return Figure(title, panels, headers, cells, "-".join(title.lower().split()), note, list(enumerate(labels)))


def _by_step(logs: Sequence[Sequence[Mapping[str, Any]]], key: str) -> dict[float, list[float]]:
    steps: dict[float, list[float]] = {}
    for log in logs:
        for entry in log:
            value, step = entry.get(key), entry.get("step")
            if isinstance(value, int | float) and isinstance(step, int) and finite([value]):
                steps.setdefault(step, []).append(value)
    return dict(sorted(steps.items()))
