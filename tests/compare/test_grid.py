"""Laws of a grid: the product of its axes by enumeration, the tasks of runs spelt out by hand, one line per slip."""

import itertools
from pathlib import Path

import pytest

from switchkd.cli.run_folder import folder_name
from switchkd.compare.grid import all_runs
from switchkd.compare.pairs import partners
from switchkd.compare.plan import plan
from switchkd.errors import UserError

WRITER = {"student": {"method": "opd"}, "switch 50%": {"method": "switch", "target_teacher_share": 0.5}}
OBJECTIVE = {"forward KL": {"divergence": "forward_kl"}, "reverse KL": {"divergence": "reverse_kl"}}
FRACTION = {"all": {"on_policy_fraction": 1.0}, "half": {"on_policy_fraction": 0.5}}
GRID = {"writer": WRITER, "objective": OBJECTIVE, "fraction": FRACTION}


def cells(runs):
    return [tuple(run.cell.values()) for run in runs]


@pytest.mark.parametrize(
    "exclude",
    [
        [],
        [{"writer": "student"}],
        [{"writer": "student", "objective": "reverse KL"}, {"fraction": "half", "writer": "switch 50%"}],
        [{"objective": ["forward KL", "reverse KL"], "fraction": "half"}],
        [{"writer": "student", "objective": "forward KL", "fraction": "all"}, {"writer": "student", "fraction": "all"}],
    ],
)
def test_a_grid_is_the_product_of_its_axes_without_what_is_excluded(exclude):
    """An entry of `exclude` names some of the axes, as in a matrix of GitHub Actions."""

    def left_out(cell):
        def fits(entry):
            return all(cell[axis] in (want if isinstance(want, list) else [want]) for axis, want in entry.items())

        return any(map(fits, exclude))

    product = [dict(zip(GRID, labels, strict=True)) for labels in itertools.product(WRITER, OBJECTIVE, FRACTION)]
    found = all_runs(None, {**GRID, "exclude": exclude})
    assert [run.cell for run in found] == [cell for cell in product if not left_out(cell)]
    for run in found:
        writer, objective, fraction = run.cell.values()
        assert run.options == {**WRITER[writer], **OBJECTIVE[objective], **FRACTION[fraction]}
        assert run.label == f"{writer} / {objective} / {fraction}"


def test_included_options_reach_the_cells_that_match_and_win():
    include = [{"writer": "switch 50%", "target_teacher_share": 0.25}, {"fraction": "half", "on_policy_fraction": 0.4}]
    plain, found = all_runs(None, GRID), all_runs(None, {**GRID, "include": include})
    for before, after in zip(plain, found, strict=True):
        wanted = dict(before.options)
        if after.cell["writer"] == "switch 50%":
            wanted["target_teacher_share"] = 0.25
        if after.cell["fraction"] == "half":
            wanted["on_policy_fraction"] = 0.4
        assert after.options == wanted


def test_values_of_an_option_are_an_axis_too():
    listed = all_runs(None, {"method": ["switch", "opd"], "learning_rate": [0.001, 0.01]})
    spelt = {
        "method": {"switch": {"method": "switch"}, "opd": {"method": "opd"}},
        "learning_rate": {"0.001": {"learning_rate": 0.001}, "0.01": {"learning_rate": 0.01}},
    }
    assert listed == all_runs(None, spelt)


def test_several_grids_are_joined_and_a_cell_that_two_of_them_hold_runs_once():
    """As in scikit-learn's ParameterGrid: a plane in full, and lines through it."""
    plane = {"writer": WRITER, "objective": OBJECTIVE}
    line = {"writer": {"student": WRITER["student"]}, "objective": OBJECTIVE}
    other = {"writer": WRITER, "objective": {"JSD": {"divergence": "generalized_jsd"}}}
    found = all_runs(None, [plane, line, other])
    assert cells(found) == [*itertools.product(WRITER, OBJECTIVE), *itertools.product(WRITER, ["JSD"])]


def test_a_grid_plans_the_tasks_of_the_same_runs_spelt_out():
    sections = {
        "output_dir": Path("out"),
        "seeds": [0, 1],
        "train": {"max_steps": 3},
        "evaluate": {"dataset_name": "t.jsonl"},
        "students": {"small": {"student_layers": [0]}},
        "warm_start": {"max_steps": 1},
    }
    grid = plan(**sections, grid={"writer": WRITER, "objective": OBJECTIVE})
    by_hand = {}
    for (writer, one), (objective, other) in itertools.product(WRITER.items(), OBJECTIVE.items()):
        by_hand[f"{writer} {objective}"] = {**one, **other}
    spelt = plan(**sections, runs=by_hand)
    assert len(grid) == len(spelt) == 2 + 2 * 4
    for one, other in zip(grid, spelt, strict=True):
        assert (one.options, one.student, one.seed) == (other.options, other.student, other.seed)
        assert one.label.replace(" / ", " ") == other.label


def test_every_cell_is_compared_with_the_cell_of_the_same_column():
    runs = all_runs({"sft": None}, GRID)
    against, pairs = partners(runs, {"writer": "student"}, ["switch 50%:student", "half:all"])
    columns = list(itertools.product(OBJECTIVE, FRACTION))
    assert against == [(f"switch 50% / {o} / {f}", f"student / {o} / {f}") for o, f in columns]
    assert pairs[: len(columns)] == against
    assert pairs[len(columns) :] == [
        (f"{w} / {o} / half", f"{w} / {o} / all") for w, o in itertools.product(WRITER, OBJECTIVE)
    ]
    assert partners(runs, "student", [])[0] == against == partners(runs, None, [])[0]


def test_one_run_may_be_the_baseline_of_all():
    runs = all_runs({"sft": None}, {"writer": WRITER, "objective": OBJECTIVE})
    against, pairs = partners(runs, "sft", ["switch 50%:sft"])
    assert against == [(run.label, "sft") for run in runs if run.label != "sft"]
    assert pairs == [(f"switch 50% / {objective}", "sft") for objective in OBJECTIVE]
    assert partners(all_runs({"sft": None, "kd": None}), None, [])[0] == [("kd", "sft")]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([], "grid has no axis"),
        ({"writer": {}}, "axis 'writer' has no label"),
        ({"writer": "opd"}, "axis 'writer' must be a mapping from labels to options"),
        ({"writer": WRITER, "leave_out": [{"writer": "student"}]}, "lists of cells are `exclude` and `include`"),
        ({"writer": {"student": "opd"}}, "writer 'student' must be a mapping of options, got 'opd'"),
        ({"writer": {"a/b": {}}}, "'a/b' is not a valid name of a label of axis 'writer'"),
        ({"writer": WRITER, "exclude": [{"writr": "student"}]}, "axis 'writr'; the nearest is 'writer'"),
        ({"writer": WRITER, "exclude": [{"writer": "studnt"}]}, "'studnt' of axis 'writer'; the nearest is 'student'"),
        ({"writer": WRITER, "exclude": {"writer": "student"}}, "exclude must be a list of cells"),
        ({"writer": WRITER, "exclude": [{"writer": list(WRITER)}]}, "exclude leaves no cell"),
        ({"writer": WRITER, "include": [{"writer": "student"}]}, "gives no option"),
        (
            {"writer": WRITER, "exclude": [{"writer": "student"}], "include": [{"writer": "student", "top_k": 2}]},
            "matches no cell",
        ),
        ({"writer": WRITER, "other": {"kd": {"method": "kd"}}}, "method is set by axis 'writer' (student) and by axis"),
        ({"objective": OBJECTIVE}, "'forward KL' has no method"),
        ([{"writer": WRITER}, {"writer": {"student": {"method": "gkd"}}}], "two runs are called 'student'"),
        ({"top_k": [1, 1]}, "has the same value twice"),
    ],
)
def test_slips_in_a_grid_are_one_line(grid, message):
    with pytest.raises(UserError) as found:
        all_runs(None, grid or {"exclude": []})
    assert message in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("baseline", "pairs", "message"),
    [
        ("kd", [], "no run 'kd'; the runs are student / forward KL"),
        ({"writr": "student"}, [], "axis 'writr'; the nearest is 'writer'"),
        ({"writer": "studnt"}, [], "'studnt' of axis 'writer'; the nearest is 'student'"),
        (None, ["student"], "pairs are two runs joined by a colon"),
        (None, ["student:student"], "no two runs differ in this"),
        (None, ["student:kd"], "no run 'kd'"),
    ],
)
def test_slips_in_what_is_compared_are_one_line(baseline, pairs, message):
    runs = all_runs(None, {"writer": WRITER, "objective": OBJECTIVE})
    with pytest.raises(UserError) as found:
        partners(runs, baseline, pairs)
    assert message in str(found.value) and "\n" not in str(found.value)


def test_a_label_of_two_axes_must_be_spelt_out():
    half = {"half": {"top_k": 3}, "full": {"top_k": 0}}
    runs = all_runs(None, {"fraction": FRACTION, "width": half}, {"method": "opd"})
    with pytest.raises(UserError, match="'half' is a label of the axes fraction and width"):
        partners(runs, "half", [])


def test_folders_of_labels_are_plain_and_those_of_two_runs_differ():
    assert folder_name("switch 50% / forward KL") == "switch-50%-forward-KL"
    for labels in (("a b", "a-b"), ("Sft", "sft")):
        runs = {label: {"method": "sft"} for label in labels}
        with pytest.raises(UserError, match=f"{labels[0]!r} and {labels[1]!r} would share the folder"):
            plan(output_dir=Path("out"), seeds=[0], train={}, evaluate={}, runs=runs)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"runs": {"sft": {"method": None}}}, "'sft' has an empty method; name one or remove the key"),
        ({"runs": {"sft": {"seed": 3}}}, "seed=3 in run 'sft' does nothing"),
        ({"runs": {"sft": {"output_dir": "x"}}}, "output_dir=x in run 'sft' does nothing"),
        ({"runs": {"sft": {"model_name_or_path": "x"}}, "warm_start": {}}, "model_name_or_path=x in run 'sft'"),
        ({"runs": {"sft": {"student_layers": [0]}}, "warm_start": {}}, "student_layers=[0] in run 'sft'"),
        ({"runs": {"sft": None}, "train": {"student_layers": [0]}, "warm_start": {}}, "student_layers=[0] in train"),
        ({"runs": {"sft": None}, "train": {"seed": 3}}, "seed=3 in train does nothing"),
        ({"runs": {"sft": None}, "train": {"method": "kd"}}, "method=kd in train does nothing"),
        ({"runs": {"sft": None}, "students": {"s": {"seed": 3}}}, "seed=3 in students: s does nothing"),
        ({"runs": {"sft": None}, "warm_start": {"seed": 3}}, "seed=3 in warm_start does nothing"),
        ({"runs": {"sft": None}, "evaluate": {"model_name_or_path": "m"}}, "model_name_or_path=m in evaluate"),
        ({"runs": {"sft": None}, "evaluate": {"output_dir": "m"}}, "output_dir=m in evaluate"),
        ({"grid": {"seed": [1, 2], "method": ["sft"]}}, "seed=1 in run '1 / sft' does nothing"),
    ],
)
def test_options_that_a_comparison_sets_itself_are_refused(sections, message):
    sections = {"train": {}, "evaluate": {}, **sections}
    with pytest.raises(UserError) as found:
        plan(output_dir=Path("out"), seeds=[0], **sections)
    assert message in str(found.value) and "\n" not in str(found.value)
