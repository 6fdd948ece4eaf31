"""What `calibrate`, `diagnose`, `evaluate`, `judge` and `rollout` measured, each from its summary."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from switchkd.page.document import Figure, Section, Table, Text
from switchkd.page.figures import Interval, Line, intervals, lines
from switchkd.report.folders import Run

#: Measures of a diagnosis -> title and unit.
DIAGNOSED = {
    "teacher_entropy": ("Entropy of the teacher", "nats"),
    "jsd": ("JSD of student and teacher", "nats"),
    "top1_agreement": ("Same likeliest token", "share of tokens"),
}


def calibration_section(run: Run) -> Section:
    """Return the threshold that was found, and the teacher's share by position."""
    found = run.summary
    shares = found["share_by_position"]
    line = Line("teacher share", [((part["start"] + part["stop"] - 1) / 2, part["teacher_share"]) for part in shares])
    svg = lines([line], title="teacher share", x_label="position in the completion [tokens]", y_label="share of tokens",
                y_limits=(0.0, 1.0))  # fmt: skip
    cells = [[part["start"], part["stop"] - 1, part["tokens"], part["teacher_share"]] for part in shares]
    figure = Figure("Teacher share by position", [("at the threshold that was found", svg)],
                    ["from", "to", "tokens", "teacher share"], cells, f"calibration-{run.name}")  # fmt: skip
    tried = [[one["initial_threshold"], one["teacher_share"]] for one in found["history"]]
    table = Table("Thresholds that were tried", ["threshold at position 0 [nats]", "teacher share"], tried,
                  f"calibration-{run.name}-tried")  # fmt: skip
    return Section(f"Calibration: {run.name}", [figure, table], [_sentence(found["note"])])


def diagnosis_section(run: Run) -> Section:
    """Return the advice, how well the teacher goes on from each writer's text, and what both models are like there."""
    found = run.summary
    writers: dict[str, Any] = found["writers"]
    positions = found["positions"]
    panels = _panel("Guidance kept", writers, positions, "share of that on the answers", _guidance)
    for name, (title, unit) in DIAGNOSED.items():
        panels += _panel(title, writers, positions, unit, _measure(name))
    cells = [
        [writer, position, _of(guided, "value"), *_ends(guided), *(_of(values[place], "value") for values in measures)]
        for writer, one in writers.items()
        for measures in [[one["measures"][name]["by_position"] for name in DIAGNOSED]]
        for place, (position, guided) in enumerate(zip(positions, _guidance(one), strict=True))
    ]
    headers = ["text of", "position", "guidance kept", "low", "high", *DIAGNOSED]
    figure = Figure(
        "How well the teacher goes on from text of each writer", panels, headers, cells, f"diagnosis-{run.name}",
        f"Guidance: the teacher continues the text after that many tokens; its {found['measure']} as a share of that "
        "after the answers. Areas: 95% intervals over prompts.",
        list(enumerate(writers)),
    )  # fmt: skip
    rows = [
        [
            writer,
            one["completion_tokens"],
            one["teacher_share"],
            *(_kept(one[key]) for key in ("guidance", "against_teacher")),
        ]
        for writer, one in writers.items()
    ]
    table = Table(
        "All positions together", ["text of", "tokens", "teacher share", "guidance kept", "against the teacher's text"],
        rows, f"diagnosis-{run.name}-overall",
    )  # fmt: skip
    advice = found["advice"]
    command = [Text("The command", advice["command"])] if advice["command"] else []
    return Section(f"Diagnosis: {run.name}", [figure, table, *command], [_sentence(advice["sentence"])])


def judge_section(run: Run) -> Section:
    """Return how often the answers of each run were judged better."""
    found = run.summary
    counts = ("first", "tie", "second", "contradictions", "identical", "unreadable")
    cells, rows, said = [], [], []
    for name, one in found["test_sets"].items():
        rate = one["win_rate"]
        value, low, high = (None, None, None) if rate is None else (rate["value"], *rate["interval"])
        cells.append([name, *(one[count] for count in counts), value, low, high, one["p_value"]])
        said.append(f"{name}: {one['said']}.")
        if value is not None:
            rows.append(Interval(name, value, low, high, filled=one["p_value"] < 0.05, said=f"{value:.0%}"))
    headers = ["test set", "first wins", "ties", "second wins", *counts[3:], "win rate", "low", "high", "p"]
    title = f"Win rate of {found['first']} over {found['second']}"
    svg = intervals(rows, title=title, x_label="share of the wins, ties counted half", limits=(0.0, 1.0))
    note = (
        f"Judged by {found['judge']['model']}, in both orders. Filled: the sign test's p is below 0.05, not corrected."
    )
    figure = Figure(title, [("95% intervals over prompts", svg)], headers, cells, f"judged-{run.name}", note)
    return Section(f"Judged: {run.name}", [figure, Table("As a table", headers, cells, f"judged-{run.name}")], said)


def distance_section(run: Run) -> Section | None:
    """Return how far an evaluated model is from its teacher as a writer; None where no teacher was given."""
    found = run.summary.get("sequence_divergences")
    if not found:
        return None
    names = {
        "reverse_sequence_kl": "KL(model, teacher)",
        "teacher_cross_entropy": "teacher's cross-entropy",
        "forward_sequence_kl": "KL(teacher, model)",
    }
    rows = []
    for name, title in names.items():
        parts = {"all": found[name], **found[name]["by_position"]}
        rows += [
            [title, position, one["per_token"], *(one["per_token_interval"] or (None, None))]
            for position, one in parts.items()
        ]
    headers = ["measure", "positions", "nats per token", "low", "high"]
    note = "95% intervals over prompts; the first two on the model's answers, the last on the teacher's."
    table = Table("Per token, by position", headers, rows, f"distance-{run.name}-{run.test_set}", note)
    return Section(f"Distance from the teacher: {run.name}, {run.test_set}", [table])


def training_table(trainings: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """Return how trainings ended, `(label, summary)` a line each."""
    keys = {
        "method": "method", "seed": "seed", "steps": "steps", "loss_first": "first loss", "loss_last": "last loss",
        "teacher_share": "teacher share", "teacher_passes": "teacher passes", "eval_loss": "evaluation loss",
        "eval_rouge_l": "ROUGE-L", "seconds": "seconds",
    }  # fmt: skip
    kept = [key for key in keys if any(summary.get(key) is not None for _, summary in trainings)]
    rows = [[label, *(summary.get(key) for key in kept)] for label, summary in trainings]
    headers = ["run", *(keys[key] for key in kept)]
    return Table("How the trainings ended", headers, rows, "trainings", open=len(rows) <= 16)


def _panel(
    title: str, writers: Mapping[str, Any], positions: Sequence[int], unit: str, values: Callable[[Any], Sequence[Any]]
) -> list[tuple[str, Markup]]:
    """A panel with a line for each writer; none where nothing is known."""
    drawn = []
    for number, (writer, one) in enumerate(writers.items()):
        known = [(x, mean) for x, mean in zip(positions, values(one), strict=True) if mean is not None]
        points = [(x, mean["value"]) for x, mean in known]
        band = [(x, *mean["interval"]) for x, mean in known if mean["interval"]]
        if points:
            drawn.append(Line(writer, points, [band] if len(band) == len(points) else [], number))
    return [(title, lines(drawn, title=title, x_label="position [tokens]", y_label=unit))] if drawn else []


def _guidance(writer: Mapping[str, Any]) -> list[Any]:
    return [None if one is None else one["share"] for one in writer["by_position"]]


def _measure(name: str) -> Callable[[Any], Sequence[Any]]:
    return lambda writer: list(writer["measures"][name]["by_position"])


def _of(mean: Mapping[str, Any] | None, part: str) -> Any:
    return None if mean is None else mean[part]


def _ends(mean: Mapping[str, Any] | None) -> Sequence[float | None]:
    return (None, None) if mean is None or mean["interval"] is None else mean["interval"]


def _kept(found: Mapping[str, Any] | None) -> str | None:
    if found is None or found["share"] is None:
        return None
    low, high = _ends(found["share"])
    between = f" ({low:.0%} to {high:.0%})" if low is not None else ""
    return f"{found['share']['value']:.1%}{between}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"
