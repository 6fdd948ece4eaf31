"""The partial-map walk: its records and its scorer, each against another reading of the same map.

`links` writes the whole map out, one entry for every place and direction; the checks here walk on that alone.
"""

import functools
import itertools
import json
import random
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "tasks"))

import partial_walk  # noqa: E402
import walk_map  # noqa: E402
from walk_map import (  # noqa: E402
    DIRECTIONS,
    PLACES,
    STREETS,
    Score,
    following,
    generate,
    make_map,
    read_prompt,
    score,
    score_rows,
    summarize,
)

from switchkd.evaluation.scorers import load_scorer  # noqa: E402

SIZES = {"train": 300, "validation": 20, "test": 40}
RHOS = (0.0, 0.25, 0.5, 1.0)
MAP = make_map()


@functools.cache
def links() -> dict[tuple[str, str], tuple[str, str]]:
    """(place, direction) -> the place one gets to and "street" or "detour", for the whole map, by names."""
    rows = {}
    for place, direction in itertools.product(range(PLACES), DIRECTIONS):
        street = direction in MAP.streets[place]
        end = MAP.streets[place][direction] if street else MAP.detours[place]
        rows[MAP.names[place], direction] = (MAP.names[end], "street" if street else "detour")
    return rows


def walked(prompt: str) -> list[tuple[str, str, str]]:
    """The steps of a prompt's walk by the written-out map: from, to, and street or detour."""
    words = prompt.split()
    place, taken = words[-1], []
    for direction in itertools.takewhile(lambda word: word in DIRECTIONS, words):
        end, kind = links()[place, direction]
        taken.append((place, end, kind))
        place = end
    return taken


@pytest.fixture(scope="module")
def splits():
    return {rho: generate(MAP, rho, seed=3, **SIZES) for rho in RHOS}


def test_every_generated_answer_is_the_walk_that_its_prompt_asks_for(splits):
    for rho, split in itertools.product(RHOS, ("teacher", "train", "validation", "test")):
        for row in splits[rho][split][-40:]:
            assert row["completion"].split() == [end for _, end, _ in walked(row["prompt"])]


def test_walks_have_24_to_48_steps_and_every_prompt_has_50_words(splits):
    lengths = {len(row["completion"].split()) for row in splits[0.0]["train"]}
    assert lengths == set(range(24, 49))
    assert {len(row["prompt"].split()) for row in splits[0.0]["train"]} == {50}


def test_the_students_warm_start_shows_the_whole_map_and_is_the_teachers_data_at_rho_1(splits):
    assert splits[1.0]["warm_start"] == splits[1.0]["teacher"]
    assert all(splits[rho]["warm_start"] == splits[1.0]["teacher"] for rho in RHOS)


def test_walks_to_be_answered_follow_streets_only_and_do_not_depend_on_rho(splits):
    for split in ("train", "validation", "test"):
        assert all(splits[rho][split] == splits[0.0][split] for rho in RHOS)
        assert {kind for row in splits[0.0][split][:40] for _, _, kind in walked(row["prompt"])} == {"street"}


@pytest.mark.parametrize("rho", RHOS)
def test_exactly_a_share_rho_of_the_places_has_its_detour_in_the_teachers_data(rho):
    split = generate(MAP, rho, seed=3, train=400, validation=10, test=10)["teacher"]
    taken = {begin for row in split for begin, _, kind in walked(row["prompt"]) if kind == "detour"}
    assert taken == {MAP.names[place] for place in MAP.known_detours(rho)}
    assert len(taken) == rho * PLACES


def test_detours_known_at_a_small_rho_are_known_at_a_larger_one():
    for small, large in itertools.pairwise(RHOS):
        assert MAP.known_detours(small) < MAP.known_detours(large)


def test_no_prompt_occurs_in_two_splits_or_twice_in_one(splits):
    for rho in RHOS:
        apart = [row["prompt"] for split in ("train", "validation", "test") for row in splits[rho][split]]
        assert len(set(apart)) == len(apart)
        for split in ("teacher", "warm_start"):
            prompts = {row["prompt"] for row in splits[rho][split]}
            assert len(prompts) == len(splits[rho][split]) == SIZES["train"]
            assert not prompts & {row["prompt"] for held in ("validation", "test") for row in splits[rho][held]}


def test_the_same_seed_gives_the_same_records_and_another_seed_others(splits):
    assert generate(MAP, 0.5, seed=3, **SIZES) == splits[0.5]
    assert generate(MAP, 0.5, seed=4, **SIZES)["test"] != splits[0.5]["test"]


def test_as_many_streets_and_detours_end_at_a_place_as_begin_there():
    for kind, count in (("street", STREETS), ("detour", len(DIRECTIONS) - STREETS)):
        ends = [end for end, found in links().values() if found == kind]
        assert all(ends.count(name) == count for name in MAP.names)
    for name in MAP.names:
        ends = {links()[name, direction][0] for direction in DIRECTIONS}
        assert len(ends) == STREETS + 1 and name not in ends


def test_no_name_of_a_place_is_a_name_of_a_direction():
    assert len(set(MAP.names)) == PLACES
    assert not set(MAP.names) & set(DIRECTIONS)


def brute_force(prompt: str, answer: str, finished: bool) -> Score:
    """The score by the map written out."""
    directions, start = read_prompt(prompt)
    truth, given = [end for _, end, _ in walked(prompt)], answer.split()
    correct = 0
    while correct < len(truth) and correct < len(given) and truth[correct] == given[correct]:
        correct += 1
    steps = list(zip([start, *given], directions, given, strict=False))[correct + 1 :]
    kept = [links().get((begin, direction), ("",))[0] == end for begin, direction, end in steps]
    return Score(len(truth), correct, given == truth and finished, sum(kept), len(kept))


def test_the_scorer_agrees_with_brute_force_on_spoilt_answers(splits):
    draw = random.Random(0)
    for row in splits[0.0]["test"]:
        words = row["completion"].split()
        for _ in range(4):
            spoilt = list(words)
            for _ in range(draw.randrange(3)):
                spoilt[draw.randrange(len(spoilt))] = draw.choice([*MAP.names, "e", "nowhere"])
            spoilt = spoilt[: draw.choice([0, 5, len(spoilt), len(spoilt)])] + ["ba"] * draw.choice([0, 0, 2])
            finished = draw.random() < 0.8
            answer = " ".join(spoilt)
            found = score(MAP, row["prompt"], answer, finished=finished)
            assert found == brute_force(row["prompt"], answer, finished)


def test_an_answer_that_follows_the_map_from_its_wrong_place_is_followed_to_its_end(splits):
    for row in splits[0.0]["test"][:10]:
        directions, _ = read_prompt(row["prompt"])
        words = row["completion"].split()[:10]
        wrong = next(name for name in MAP.names if name not in (words[-1], MAP.names[0]))
        words[-1] = wrong
        for direction in directions[10:]:
            words.append(links()[words[-1], direction][0])
        found = score(MAP, row["prompt"], " ".join(words))
        assert (found.correct, found.followed, found.after_error) == (9, len(words) - 10, len(words) - 10)


def test_following_counts_no_step_to_or_from_a_word_that_is_no_place(splits):
    row = splits[0.0]["test"][0]
    directions, start = read_prompt(row["prompt"])
    words = row["completion"].split()
    words[4] = "nowhere"
    right = following(MAP, directions, start, words, 0, len(words))
    assert [k for k, ok in enumerate(right) if not ok] == [4, 5]


def test_a_prompt_of_another_task_is_refused():
    with pytest.raises(ValueError, match="not a prompt"):
        read_prompt("Recite 4 lines of the table of 3. Answer:")


def test_figures_of_four_answers_are_those_counted_by_hand():
    whole, early, late = Score(24, 24, True, 0, 0), Score(40, 10, False, 6, 29), Score(40, 30, False, 1, 6)
    unfinished = Score(30, 30, False, 0, 0)
    figures = summarize([whole, early, late, unfinished])
    assert figures["whole"] == 25.0
    assert figures["correct_prefix"] == pytest.approx(100 * (1 + 0.25 + 0.75 + 1) / 4)
    assert figures["first_error"] == 75.0
    assert figures["followed"] == pytest.approx(100 * 7 / 35)


def test_the_references_score_full_marks_in_every_bucket_of_length(splits):
    rows = [{**row, "finished": True} for row in splits[0.0]["test"]]
    found = score_rows(MAP, rows)
    assert found["whole"] == found["correct_prefix"] == 100.0
    assert list(found["by_length"]) == ["24-32", "33-40", "41-48"]
    assert all(part["whole"] == 100.0 for part in found["by_length"].values())
    assert score_rows(MAP, [{**row, "finished": False} for row in rows])["whole"] == 0.0


def test_evaluate_finds_the_scorer_and_gives_the_share_before_the_first_error(splits):
    scorer = load_scorer(f"{ROOT / 'benchmarks' / 'tasks' / 'walk_map.py'}:correct_prefix")
    row = splits[0.0]["test"][0]
    words = row["completion"].split()
    assert scorer(row["prompt"], row["completion"], []) == 100.0
    assert scorer(row["prompt"], " ".join([*words[:6], "nowhere", *words[7:]]), []) == 100 * 6 / len(words)


def test_the_tokenizer_has_one_id_per_word_and_gives_the_text_back(splits):
    tokenizer = partial_walk.make_tokenizer(MAP)
    for row in splits[0.5]["teacher"][-5:]:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert len(ids) == 50 + len(row["completion"].split())
        assert tokenizer.decode(ids) == row["prompt"] + row["completion"]


def test_scoring_a_folder_makes_one_line_of_the_seeds_of_a_run(splits, tmp_path):
    right = [{**row, "finished": True} for row in splits[0.0]["test"]]
    wrong = [{**row, "completion": ""} for row in right]
    for name, rows in {"s/a-run/seed-0": right, "s/a-run/seed-1": wrong, "s/other/seed-0": right}.items():
        folder = tmp_path / name / "evaluate"
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {Path(line[0]).name: line[1] for line in partial_walk.scores_below(tmp_path)}
    assert found == {"a-run": "50.0 +- 70.7", "other": "100.0"}


def test_the_example_distils_the_student_whose_gate_was_measured_with_the_lengths_of_the_walks():
    example = yaml.safe_load((ROOT / "examples" / "map_walk.yaml").read_text())
    [options] = example["students"].values()
    sizes = partial_walk.STUDENTS["two_layers"]
    heads = sizes["num_attention_heads"]
    same = {"num_key_value_heads": heads, "head_dim": sizes["hidden_size"] // heads}
    assert options["student_config"] == {**sizes, **same}
    warm_start, steps = example["warm_start"], partial_walk.WARM_START_STEPS["two_layers"]
    wanted = {"max_steps": steps, **partial_walk.WARM_START_OPTIONS}
    assert {name: float(warm_start[name]) if name == "learning_rate" else warm_start[name] for name in wanted} == wanted
    data = Path(example["train"]["dataset_name"]).parent
    assert Path(warm_start["dataset_name"]) == data / "warm_start.jsonl"
    assert Path(example["train"]["teacher_model_name_or_path"]).parent == data.parent
    for section in ("train", "evaluate"):
        for name in ("max_prompt_length", "max_completion_length"):
            assert example[section][name] == partial_walk.COMMON_OPTIONS[name], (section, name)


def test_what_follows_an_error_counts_in_one_measure_and_not_in_the_other(splits):
    row = splits[0.0]["test"][0]
    words = row["completion"].split()
    directions, _ = read_prompt(row["prompt"])
    wrong = next(name for name in MAP.names if name != words[4])
    answer = [*words[:4], wrong]
    for direction in directions[5:]:
        answer.append(links()[answer[-1], direction][0])
    text = " ".join(answer)
    assert walk_map.correct_prefix(row["prompt"], text, []) == 4 / len(words)
    assert walk_map.followed(row["prompt"], text, []) == (len(words) - 1) / len(words)


def test_a_gate_that_cannot_be_measured_is_null_and_the_file_stays_json(splits):
    perfect = [{**row, "finished": True} for row in splits[0.0]["test"]]
    gate = partial_walk.plain(score_rows(MAP, perfect))
    assert json.loads(json.dumps(gate, allow_nan=False))["first_error"] is None
