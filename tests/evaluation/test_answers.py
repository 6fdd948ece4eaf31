"""Laws of evaluation: what a score may depend on, what it is made of, and every refusal in one line."""

import gzip
import json
import math
import statistics

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from switchkd.data import load_records, prepare
from switchkd.engine.readable import require_readable
from switchkd.errors import UserError
from switchkd.evaluation import evaluate, reference_losses, write_rows
from switchkd.evaluation.metrics import rouge_l
from switchkd.models.heads import output_head

WORDS = ["the", "cat", "sat", "on", "mat"]


def make_data(tokenizer, count=11, **options):
    """Prompts of ragged length; every third record has two references."""
    records = []
    for i in range(count):
        answer = " ".join(WORDS[: 1 + i % len(WORDS)])
        records.append({"prompt": "p" * (1 + 3 * i % 8), "completion": [answer, "mat"] if i % 3 == 0 else [answer]})
    return prepare(Dataset.from_list(records), tokenizer, **options)[0]


@pytest.fixture(scope="module")
def data(tiny_tokenizer):
    return make_data(tiny_tokenizer)


def texts(result):
    return {(row["seed"], row["index"]): row["completion"] for row in result.rows}


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


OPTIONS = {"decoding_seeds": (10, 20), "max_completion_length": 12, "progress": False}


# ------------------------------------------------------------------------------------------ generated text


def test_batch_size_and_the_other_examples_change_nothing(make_model, tiny_tokenizer, data):
    model = make_model()
    rows = evaluate(model, tiny_tokenizer, data, batch_size=8, **OPTIONS).rows
    assert rows == evaluate(model, tiny_tokenizer, data, batch_size=1, **OPTIONS).rows
    first = evaluate(model, tiny_tokenizer, data.select(range(4)), batch_size=3, **OPTIONS).rows
    assert first == [row for row in rows if row["index"] < 4]


def test_seeds_are_independent_of_each_other_and_repeat(make_gpt2, tiny_tokenizer, data):
    model = make_gpt2()
    both = evaluate(model, tiny_tokenizer, data, **OPTIONS)
    alone = evaluate(model, tiny_tokenizer, data, **{**OPTIONS, "decoding_seeds": (20,)})
    assert alone.rows == [row for row in both.rows if row["seed"] == 20]
    assert texts(both)[10, 0] != texts(both)[20, 0]


def test_greedy_answers_are_those_of_generate(make_model, tiny_tokenizer, data):
    model = make_model()
    result = evaluate(model, tiny_tokenizer, data, temperature=0.0, **OPTIONS)
    for row in result.rows[:11]:
        prompt = torch.tensor([data[row["index"]]["prompt_ids"]])
        whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12)
        assert row["completion"] == tiny_tokenizer.decode(whole[0, prompt.shape[1] :], skip_special_tokens=True)
    assert result.scores[0] == result.scores[1]
    assert result.rouge_l_std == 0.0


def test_every_eos_of_tokenizer_and_model_ends_an_answer_and_is_counted_but_not_shown(make_gpt2, tiny_tokenizer, data):
    model = make_gpt2()
    letters = [tiny_tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghijklm"]
    model.generation_config.eos_token_id = letters
    result = evaluate(model, tiny_tokenizer, data, **{**OPTIONS, "max_completion_length": 40})
    finished = [row for row in result.rows if row["finished"]]
    assert finished
    for row in result.rows:
        assert not set(row["completion"]) & set("abcdefghijklm")
        assert row["finished"] or row["completion_tokens"] == 40
    assert result.summary()["finished_share"] == len(finished) / len(result.rows)


def test_scores_are_the_means_of_their_rows(make_gpt2, tiny_tokenizer, data):
    result = evaluate(
        make_gpt2(), tiny_tokenizer, data, **{**OPTIONS, "decoding_seeds": (1, 2, 3), "max_completion_length": 40}
    )
    for seed, score in zip(result.decoding_seeds, result.scores, strict=True):
        scores = [row["rouge_l"] for row in result.rows if row["seed"] == seed]
        assert len(scores) == len(data)
        assert score == pytest.approx(statistics.mean(scores))
    for row in result.rows:
        assert row["rouge_l"] == rouge_l(row["completion"], data[row["index"]]["references"])
        assert row["references"] == data[row["index"]]["references"]
    assert result.rouge_l == pytest.approx(statistics.mean(result.scores))
    assert result.rouge_l_std == pytest.approx(statistics.stdev(result.scores))
    assert sum(bucket["examples"] for bucket in result.by_length.values()) == len(data)
    weighted = sum(bucket["examples"] * bucket["rouge_l"] for bucket in result.by_length.values()) / len(data)
    assert weighted == pytest.approx(result.rouge_l)


def test_a_model_that_says_one_of_the_references_matches_exactly(make_gpt2, tiny_tokenizer, data):
    model, options = make_gpt2(), {**OPTIONS, "temperature": 0.0, "decoding_seeds": (0,)}
    own = [row["completion"] for row in evaluate(model, tiny_tokenizer, data, **options).rows]
    bare = data.remove_columns("references")
    same = evaluate(model, tiny_tokenizer, bare.add_column("references", [["other", text] for text in own]), **options)
    longer = evaluate(
        model, tiny_tokenizer, bare.add_column("references", [[text + " word"] for text in own]), **options
    )
    assert (same.exact_match, longer.exact_match) == (100.0, 0.0)
    assert same.rouge_l > longer.rouge_l > 0.0


def test_reference_length_is_counted_in_tokens_of_the_first_reference(make_gpt2, tiny_tokenizer):
    records = [{"prompt": "p", "completion": ["x" * length, "y"]} for length in (10, 11, 40, 41)]
    data, _ = prepare(Dataset.from_list(records), tiny_tokenizer)
    result = evaluate(make_gpt2(), tiny_tokenizer, data, **OPTIONS)
    assert {name: bucket["examples"] for name, bucket in result.by_length.items()} == {
        "0-10": 1,
        "11-40": 2,
        "41-100": 1,
    }


def test_train_mode_and_dropout_do_not_reach_the_answers_and_are_restored(make_model, tiny_tokenizer, data):
    expected = texts(evaluate(make_model(), tiny_tokenizer, data, **OPTIONS))
    model = make_model(train=True)
    assert texts(evaluate(model, tiny_tokenizer, data, **OPTIONS)) == expected
    assert all(module.training for module in model.modules())
    assert evaluate(model, tiny_tokenizer, data, no_repeat_ngram_size=2, **OPTIONS).rows
    assert all(module.training for module in model.modules())


def test_rows_and_summary_are_json(make_gpt2, tiny_tokenizer, data, tmp_path):
    result = evaluate(make_gpt2(), tiny_tokenizer, data, **OPTIONS)
    write_rows(result, tmp_path / "deep" / "rows.jsonl")
    lines = (tmp_path / "deep" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == result.rows
    assert len(lines) == 2 * len(data)
    summary = json.loads(json.dumps(result.summary()))
    assert summary["scores"] == dict(zip(["10", "20"], result.scores, strict=True))
    assert summary["examples"] == len(data)
    assert summary["decoding"] == {
        "decoder": "roll_out",
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_completion_length": 12,
        "no_repeat_ngram_size": 0,
        "decoding_seeds": [10, 20],
        "batch_size": 8,
    }


# -------------------------------------------------------------------------------------------- n-gram block


def test_ngram_block_is_said_seeded_and_leaves_the_global_generator_alone(make_gpt2, tiny_tokenizer, data):
    model = make_gpt2()
    state = torch.random.get_rng_state()
    result = evaluate(model, tiny_tokenizer, data, no_repeat_ngram_size=2, **{**OPTIONS, "max_completion_length": 40})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert result.summary()["decoding"]["decoder"] == "transformers.generate"
    assert result.summary()["decoding"]["no_repeat_ngram_size"] == 2
    torch.manual_seed(123)
    again = evaluate(model, tiny_tokenizer, data, no_repeat_ngram_size=2, **{**OPTIONS, "max_completion_length": 40})
    assert again.rows == result.rows
    assert texts(result)[10, 0] != texts(result)[20, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ngram_block_blocks(make_gpt2, tiny_tokenizer, data, temperature):
    def repeats(**options):
        result = evaluate(
            make_gpt2(),
            tiny_tokenizer,
            data,
            **{**OPTIONS, "max_completion_length": 60},
            temperature=temperature,
            top_k=2,
            **options,
        )
        pairs = [list(zip(row["completion"], row["completion"][1:], strict=False)) for row in result.rows]
        return sum(len(pair) - len(set(pair)) for pair in pairs)

    assert repeats(no_repeat_ngram_size=2) == 0
    assert repeats() > 0


def test_ngram_decoder_samples_from_the_whole_distribution_whatever_the_model_asks_for(make_gpt2, tiny_tokenizer, data):
    plain, opinionated = make_gpt2(), make_gpt2()
    opinionated.generation_config.update(top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=5.0, do_sample=False)
    options = {**OPTIONS, "no_repeat_ngram_size": 6}
    assert texts(evaluate(plain, tiny_tokenizer, data, **options)) == texts(
        evaluate(opinionated, tiny_tokenizer, data, **options)
    )


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_completion_length": 122},
            "the longest prompt has 8 tokens and max_completion_length is 122, together more than",
        ),
        ({"max_completion_length": 0}, "max_completion_length must be an integer >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be an integer >= 0, got -1"),
        ({"decoding_seeds": ()}, "decoding_seeds must be one or more different integers, got []"),
        ({"decoding_seeds": (1, 1)}, "decoding_seeds must be one or more different integers, got [1, 1]"),
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"temperature": -1.0, "no_repeat_ngram_size": 6}, "temperature must be >= 0"),
        ({"top_p": 0.0}, "top_p must lie in (0, 1]"),
    ],
)
def test_settings_out_of_range_are_refused(make_model, tiny_tokenizer, data, options, message):
    assert message in refusal(evaluate, make_model(), tiny_tokenizer, data, **{**OPTIONS, **options})


def test_longest_answer_that_fits_the_context_is_accepted(make_model, tiny_tokenizer):
    data, _ = prepare(Dataset.from_list([{"prompt": "p" * 120, "completion": "a"}]), tiny_tokenizer)
    evaluate(make_model(), tiny_tokenizer, data, **{**OPTIONS, "max_completion_length": 8})


def test_data_without_references_and_unprepared_data_are_refused(make_gpt2, tiny_tokenizer):
    records = Dataset.from_list([{"prompt": "p", "completion": ["a"]}, {"prompt": "q", "completion": []}])
    data, _ = prepare(records, tiny_tokenizer)
    model = make_gpt2()
    assert refusal(evaluate, model, tiny_tokenizer, data).startswith("row 2 of the prepared data set has no reference")
    assert "row 2 of the prepared data set has no reference" in refusal(reference_losses, model, tiny_tokenizer, data)
    assert "make it with switchkd.data.prepare" in refusal(evaluate, model, tiny_tokenizer, records)
    assert "holds no records" in refusal(evaluate, model, tiny_tokenizer, data.select([]))


def test_no_eos_anywhere_is_refused(make_gpt2, tiny_tokenizer, data):
    model = make_gpt2()
    model.config.eos_token_id = model.generation_config.eos_token_id = None

    class Without:
        eos_token_id = None

    assert "no end-of-sequence token anywhere" in refusal(evaluate, model, Without(), data, **OPTIONS)


# --------------------------------------------------------------------------------- losses on reference text


def slow_losses(student, teacher, data):
    """Row by row, nothing padded, the definitions written out in float64."""
    cross_entropy, forward_kl, jsd = [], [], []
    for record in data:
        ids = torch.tensor([record["prompt_ids"] + record["completion_ids"]])
        first = len(record["prompt_ids"])
        with torch.no_grad():
            student_logits, teacher_logits = student(ids).logits.double(), teacher(ids).logits.double()
        for position in range(first, ids.shape[1]):
            q = student_logits[0, position - 1].softmax(-1)
            p = teacher_logits[0, position - 1].softmax(-1)
            m = (p + q) / 2
            cross_entropy.append(-q[ids[0, position]].log())
            forward_kl.append((p * (p / q).log()).sum())
            jsd.append(0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum())
    return [float(torch.stack(values).mean()) for values in (cross_entropy, forward_kl, jsd)]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_losses_equal_the_definitions_row_by_row_whatever_is_padded(make_model, tiny_tokenizer, data, batch_size):
    student, teacher = make_model(seed=1, train=True), make_model(seed=2)
    losses = reference_losses(student, tiny_tokenizer, data, teacher=teacher, batch_size=batch_size)
    assert all(module.training for module in student.modules())
    expected = slow_losses(student.eval(), teacher, data)
    assert [losses[name] for name in ("cross_entropy", "forward_kl", "jsd")] == pytest.approx(expected, rel=1e-5)
    assert losses["tokens"] == sum(len(ids) for ids in data["completion_ids"])
    assert 0 < losses["jsd"] < math.log(2)


def test_a_model_does_not_diverge_from_itself_and_no_teacher_gives_no_divergence(make_gpt2, tiny_tokenizer, data):
    losses = reference_losses(make_gpt2(), tiny_tokenizer, data, teacher=make_gpt2())
    assert losses["forward_kl"] == pytest.approx(0.0, abs=1e-6)
    assert losses["jsd"] == pytest.approx(0.0, abs=1e-6)
    alone = reference_losses(make_gpt2(), tiny_tokenizer, data)
    assert alone.keys() == {"cross_entropy", "tokens", "intervals", "by_length"}
    assert (alone["cross_entropy"], alone["tokens"]) == (losses["cross_entropy"], losses["tokens"])


def test_padded_vocabulary_rows_of_the_teacher_do_not_count(make_gpt2, tiny_tokenizer, data):
    student, teacher = make_gpt2(seed=1), make_gpt2(seed=2, vocab_size=128)
    narrow = make_gpt2(seed=3)
    token_rows = ("wte.weight", "lm_head.weight")
    state = {name: value[:98] if name.endswith(token_rows) else value for name, value in teacher.state_dict().items()}
    narrow.load_state_dict(state)
    wide = reference_losses(student, tiny_tokenizer, data, teacher=teacher)
    same = reference_losses(student, tiny_tokenizer, data, teacher=narrow)
    for name in ("cross_entropy", "forward_kl", "jsd"):
        assert wide[name] == pytest.approx(same[name], rel=1e-5)


def test_references_longer_than_the_context_are_refused(make_model, tiny_tokenizer):
    records = Dataset.from_list([{"prompt": "p" * 100, "completion": "a" * 28}])
    data, _ = prepare(records, tiny_tokenizer)
    message = refusal(reference_losses, make_model(), tiny_tokenizer, data)
    assert "have 129 tokens, the model's context is 128" in message
    long_model = make_model(
        **{"n_positions" if make_model.__name__ == "build_gpt2" else "max_position_embeddings": 129}
    )
    assert reference_losses(long_model, tiny_tokenizer, data)["tokens"] == 29
    assert "the teacher's context is 128" in refusal(
        reference_losses, long_model, tiny_tokenizer, data, teacher=make_model()
    )


# -------------------------------------------------------------------------------------------- real models


def test_published_story_models_keep_their_known_losses(shared_dir):
    folder = shared_dir / "models" / "tinystories-char-teacher"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder)
    student = AutoModelForCausalLM.from_pretrained(shared_dir / "models" / "tinystories-char-student")
    with gzip.open(shared_dir / "data" / "tinystories" / "tinystories_sample.txt.gz", "rt", encoding="utf-8") as file:
        stories = [" ".join(story.split()) for story in file.read().split("<|endoftext|>")[:12]]
    records = Dataset.from_list([{"prompt": "<s>" + story[:20], "completion": story[20:220]} for story in stories])
    data, _ = prepare(records, tokenizer, max_completion_length=200, split_special_tokens=False)
    teacher_loss = reference_losses(teacher, tokenizer, data)["cross_entropy"]
    losses = reference_losses(student, tokenizer, data, teacher=teacher)
    assert teacher_loss < losses["cross_entropy"] < 1.0
    assert 0 < losses["jsd"] < losses["forward_kl"] < 0.5


def test_real_instruction_records_are_scored(shared_dir, make_gpt2):
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "data" / "tokenizers" / "gpt2")
    data, _ = prepare(load_records(str(shared_dir / "data" / "vicuna" / "valid.jsonl")), tokenizer)
    model = make_gpt2(vocab_size=50257, n_positions=512, eos_token_id=50256, bos_token_id=50256, pad_token_id=50256)
    result = evaluate(
        model, tokenizer, data.select(range(6)), decoding_seeds=(10, 20), max_completion_length=16, progress=False
    )
    assert len(result.rows) == 12
    assert result.by_length.keys() <= {"41-100", "over 100", "11-40", "0-10"}


@pytest.mark.parametrize("teacher", [False, True])
def test_reference_losses_never_hold_the_logits_of_a_whole_batch(make_gpt2, tiny_tokenizer, data, teacher):
    """A second code path held [B, C, V] of both models."""
    models = [make_gpt2(), make_gpt2(seed=1)]
    widths = []
    for model in models:
        output_head(model)
        require_readable(model, "model")
        model.register_forward_hook(lambda module, args, output: widths.append(output.logits.shape[-1]))
    losses = reference_losses(models[0], tiny_tokenizer, data, teacher=models[1] if teacher else None)
    assert widths and set(widths) == {1} and losses["cross_entropy"] > 0
