"""Laws of data sets in Python's containers: streams, splits and mixtures."""

import itertools

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers.command_line import one_line_error, train_options, write_rows
from helpers.tiny import RAGGED_ROWS, build_gpt2, build_tokenizer

from switchkd import Mixture
from switchkd.data import load_records, prepare
from switchkd.errors import UserError


class Endless(torch.utils.data.IterableDataset):
    """A stream without an end."""

    def __iter__(self):
        return (RAGGED_ROWS[n % len(RAGGED_ROWS)] for n in itertools.count())


@pytest.mark.parametrize("stream", [Dataset.from_list(RAGGED_ROWS * 3).to_iterable_dataset(), Endless()])
def test_a_stream_gives_as_many_records_as_the_steps_read(make_trainer, stream):
    options = {"method": "kd", "max_steps": 2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), train_dataset=stream, **options)
    assert len(trainer.train_dataset) == 12
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_stream_without_a_number_of_records_is_refused(make_trainer):
    stream = Dataset.from_list(RAGGED_ROWS).to_iterable_dataset()
    for options, message in (
        ({"train_dataset": stream, "max_steps": -1}, "train_dataset is a stream .IterableDataset.: set max_steps"),
        ({"eval_dataset": stream}, "eval_dataset is a stream .IterableDataset.: give the records that are wanted"),
    ):
        with pytest.raises(UserError, match=message):
            make_trainer(build_gpt2(), build_gpt2(seed=1), method="kd", **options)


def test_the_only_split_of_a_dictionary_is_taken_and_evaluation_takes_several(make_trainer):
    rows = Dataset.from_list(RAGGED_ROWS)
    sets = DatasetDict(first=rows.select(range(3)), second=rows.select(range(2)))
    trainer = make_trainer(
        build_gpt2(), build_gpt2(seed=1), method="kd", train_dataset=DatasetDict(train=rows), eval_dataset=sets
    )
    assert len(trainer.train_dataset) == len(RAGGED_ROWS)
    assert {"eval_first_loss", "eval_second_loss"} <= trainer.evaluate().keys()


# ---- mixtures


def parts():
    chats = [{"prompt": f"p{n}", "completion": "x"} for n in range(60)]
    return {"chats": chats, "questions": Dataset.from_list([{"question": f"q{n}", "answer": "y"} for n in range(20)])}


def shares(data):
    texts = [prompt[0] for prompt in data["prompt"]]
    return {letter: texts.count(letter) / len(texts) for letter in "pq"}


@pytest.mark.parametrize("weights", [{}, {"chats": 3.0, "questions": 1.0}, {"chats": 0.2, "questions": 0.8}])
def test_a_mixture_holds_every_record_in_the_shares_of_its_weights(make_trainer, weights):
    trainer = make_trainer(build_gpt2(), build_gpt2(seed=1), method="kd", train_dataset=Mixture(parts(), weights))
    data = trainer.train_dataset
    assert set(data["prompt"]) == {f"p{n}" for n in range(60)} | {f"q{n}" for n in range(20)}
    wanted = weights.get("questions", 1.0) / (sum(weights.values()) or 2.0)
    deviation = (wanted * (1 - wanted) / len(data)) ** 0.5
    assert abs(shares(data)["q"] - wanted) < 4 * deviation
    assert list(trainer.prepare_reports) == ["train (chats)", "train (questions)"]
    again = make_trainer(build_gpt2(), build_gpt2(seed=1), method="kd", train_dataset=Mixture(parts(), weights))
    assert again.train_dataset["prompt"][:] == data["prompt"][:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture({"a": RAGGED_ROWS}), "a mixture needs two data sets or more, got a"),
        (lambda: Mixture(parts(), {"chats": 1.0}), "the mixture has no weight for questions"),
        (
            lambda: Mixture(parts(), {"chats": 0.0, "questions": 1.0}),
            "must be numbers > 0, .*, got chats",
        ),
        (lambda: Mixture(parts(), {"other": 1.0}), "one for each part, got other=1.0"),
    ],
)
def test_mixtures_that_mean_nothing_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_parts_with_and_without_a_teacher_prompt_do_not_mix(make_trainer):
    hinted = [{"prompt": "a", "completion": "b", "teacher_prompt": "c"}]
    with pytest.raises(UserError, match="some parts of the mixture have a teacher_prompt, others none"):
        data = Mixture({"hinted": hinted, "plain": RAGGED_ROWS})
        make_trainer(build_gpt2(), build_gpt2(seed=1), method="kd", train_dataset=data)


# ---- the same from the command line


def without_dataset(options):
    place = options.index("--dataset_name")
    return options[:place] + options[place + 2 :]


def test_a_mixture_trains_from_flags_and_from_yaml_and_is_written_down(run, models, tmp_path):
    names = [str(write_rows(tmp_path / f"{name}.jsonl", list(rows))) for name, rows in parts().items()]
    mixed = without_dataset(train_options(models, tmp_path / "run", "--save_strategy", "no"))
    code, out, err = run(*mixed, "--dataset_mixture", f"{names[0]}=3", f"{names[1]}=1")
    assert code == 0, err
    assert f"train ({names[0]}) data: 60 of 60 records kept (prompt + completion)" in out
    assert f"train ({names[1]}) data: 20 of 20 records kept (question + answer)" in out
    config = tmp_path / "mixture.yaml"
    config.write_text(f"dataset_mixture:\n  {names[0]}: 3\n  {names[1]}: 1\n")
    mixed[mixed.index("--output_dir") + 1] = tmp_path / "again"
    code, out, err = run(*mixed, "--config", config)
    assert code == 0 and "20 of 20 records kept (question + answer)" in out, err
    # What it wrote down is a config itself.
    code, _, err = run("train", "--config", tmp_path / "again" / "config.yaml", "--output_dir", tmp_path / "third")
    assert code == 0, err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dataset_mixture", "a.jsonl=1"), "dataset_mixture and dataset_name exclude each other"),
        (("--dataset_streaming", "--max_steps", -1), "dataset_streaming needs max_train_samples or max_steps"),
        (("--dataset_config", "en"), "dataset_config=en does nothing:"),
    ],
)
def test_options_of_data_that_do_not_fit_together_are_refused(run, models, tmp_path, options, message):
    assert message in one_line_error(*run(*train_options(models, tmp_path / "run", *options)))


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        (("a.jsonl",), "dataset_mixture must be different name=weight pairs"),
        (("a.jsonl=x",), "dataset_mixture must be different name=weight pairs"),
        (("a.jsonl=1", "a.jsonl=2"), "dataset_mixture must be different name=weight pairs"),
        (("missing.jsonl=1", "other.jsonl=2"), "no file or folder missing.jsonl"),
    ],
)
def test_mixtures_that_cannot_be_read_are_refused(run, models, tmp_path, mixture, message):
    options = without_dataset(train_options(models, tmp_path / "run"))
    assert message in one_line_error(*run(*options, "--dataset_mixture", *mixture))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_streaming_takes_the_first_records_of_every_format(tmp_path, name):
    path = tmp_path / name
    rows = Dataset.from_list(RAGGED_ROWS)
    {"csv": rows.to_csv, "parquet": rows.to_parquet}.get(path.suffix[1:], rows.to_json)(
        path, **({"compression": "gzip"} if path.suffix == ".gz" else {})
    )
    stream = load_records(str(path), streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    assert list(stream.take(3)) == RAGGED_ROWS[:3]
    assert load_records(str(path)).to_list() == RAGGED_ROWS


def test_streaming_trains_and_evaluates_on_the_records_that_are_asked_for(run, models, tmp_path):
    options = train_options(models, tmp_path / "run", "--save_strategy", "no", "--dataset_streaming")
    code, out, err = run(*options, "--max_train_samples", 5)
    assert code == 0 and "train data: 5 of 5 records kept" in out, err
    options[options.index("--output_dir") + 1] = tmp_path / "other"
    code, out, err = run(*options)
    assert code == 0 and "train data: 8 of 8 records kept" in out, err  # two steps of four rows
    scoring = ("evaluate", "--model_name_or_path", models / "student", "--dataset_name", models / "train.jsonl")
    more = (
        "--decoding_seeds",
        1,
        "--max_completion_length",
        4,
        "--output_dir",
        tmp_path / "scores",
        "--dataset_streaming",
    )
    assert "dataset_streaming needs max_samples" in one_line_error(*run(*scoring, *more))
    code, out, err = run(*scoring, *more, "--max_samples", 2)
    assert code == 0 and "data: 2 of 2 records kept" in out, err


def test_every_command_that_reads_data_names_its_columns(run, models, tmp_path):
    path = write_rows(tmp_path / "named.jsonl", [{"q": row["prompt"], "a": row["completion"]} for row in RAGGED_ROWS])
    pair = ("--model_name_or_path", models / "student", "--teacher_model_name_or_path", models / "teacher")
    data = ("--dataset_name", path, "--columns", "prompt=q,completion=a", "--max_samples", 2)
    short = ("--max_completion_length", 6)
    for command, options in {
        "evaluate": ("--decoding_seeds", 1, "--output_dir", tmp_path / "evaluate"),
        "calibrate": ("--tolerance", 0.9),
        "rollout": (),
        "diagnose": ("--output_dir", tmp_path / "diagnose", "--initial_threshold", 0.4, "--positions", "0,2"),
    }.items():
        code, out, err = run(command, *pair, *data, *short, *options)
        assert code == 0, (command, err)
        assert "2 of 2 records kept (q" in out + err, command


def test_prepared_tables_hold_what_lists_held():
    data, _ = prepare(Dataset.from_list(RAGGED_ROWS * 300), build_tokenizer())
    assert len(data) == 2400
    assert data[2399] == {**prepare(Dataset.from_list(RAGGED_ROWS[-1:]), build_tokenizer())[0][0]}
