"""Whatever is given, it works or ends in one line: random files, texts and numbers; a bounded number of cases.

`HYPOTHESIS_PROFILE=long` tries a hundred times as many.
"""

import json
import math
import os
import tempfile
from pathlib import Path

import pytest
from helpers.tiny import build_gpt2, build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import switchkd
from switchkd.cli.options import OptionParser
from switchkd.data import encode_prompt, load_records, prepare
from switchkd.errors import UserError, UserErrors
from switchkd.policies import POLICIES

settings.register_profile("short", max_examples=60, deadline=None, derandomize=True, database=None)
settings.register_profile("long", max_examples=6000, deadline=None, print_blob=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

TOKENIZER = build_tokenizer()
PAIR = build_gpt2(seed=1), build_gpt2(seed=2)
WILD = st.floats() | st.integers(-(10**24), 10**24)
VALUES = st.recursive(
    st.none() | st.booleans() | WILD | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)
ROWS = st.dictionaries(st.sampled_from(["prompt", "completion", "messages", "instruction", "output", "x"]), VALUES)


def one_line(action):
    """What the action returns; a refusal must be one line."""
    try:
        return action()
    except UserErrors as error:
        assert all("\n" not in message for message in error.messages)
    except UserError as error:
        assert "\n" not in str(error).strip()
    return None


@given(st.lists(ROWS, max_size=4), st.integers(0, 200), st.binary(max_size=3))
def test_a_file_of_records_is_read_or_refused_whatever_is_in_it(rows, cut, junk):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    place = min(cut, len(data))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        path.write_bytes(data[:place] + junk + data[place + len(junk) :])
        records = one_line(lambda: load_records(str(path)))
        if records is not None:
            one_line(lambda: prepare(records, TOKENIZER, max_prompt_length=20, max_completion_length=20))


@given(st.text(max_size=40))
def test_any_prompt_becomes_ids_that_the_model_can_read_or_is_refused(text):
    ids = one_line(lambda: encode_prompt(text, TOKENIZER))
    if ids is not None:
        assert ids and all(0 <= token < len(TOKENIZER) for token in ids)
        assert TOKENIZER.eos_token_id not in ids


@pytest.mark.parametrize("name", POLICIES)
@given(st.data())
def test_a_policy_takes_a_number_or_refuses_it_in_one_line(name, data):
    options = POLICIES[name].options()
    if not options:
        return
    option = data.draw(st.sampled_from(sorted(options)))
    value = data.draw(WILD | st.sampled_from(["", "linear", "nan"]) | st.none())
    policy = one_line(lambda: POLICIES[name].of(**{option: value}))
    if policy is not None and isinstance(value, float):
        assert math.isfinite(value) or value > 0  # a horizon without end is none, but a sense


@given(
    temperature=WILD, top_p=WILD, top_k=st.integers(-3, 200), new=st.integers(-2, 6), draft=st.integers(-2, 9),
    prompts=st.lists(st.lists(st.integers(-1, 99), max_size=5), max_size=3),
)  # fmt: skip
def test_a_rollout_is_written_or_refused_in_one_line(temperature, top_p, top_k, new, draft, prompts):
    rollout = one_line(
        lambda: switchkd.roll_out(
            *PAIR,
            prompts,
            policy=switchkd.SwitchPolicy(),
            max_new_tokens=new,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            draft_length=draft,
        )
    )
    if rollout is not None:
        assert rollout.completion_ids.shape == (len(prompts), new)
        assert bool((rollout.completion_ids >= 0).all()) and bool((rollout.completion_ids < 98).all())


@given(st.lists(st.text(max_size=12) | st.sampled_from(["--rate", "--rate=1", "--many", "1", "nan"]), max_size=5))
def test_a_command_line_is_read_or_refused_in_one_line(words):
    parser = OptionParser()
    parser.add_argument("--rate", type=float)
    parser.add_argument("--many", nargs="+")
    parser.add_shared_options("where to write")
    one_line(lambda: parser.resolve(words))


@given(st.text(max_size=60) | st.dictionaries(st.text(max_size=6), VALUES, max_size=3).map(json.dumps))
def test_a_config_file_is_read_or_refused_in_one_line(text):
    parser = OptionParser()
    parser.add_argument("--rate", type=float)
    parser.add_shared_options("where to write")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_text(text, encoding="utf-8", errors="replace")
        one_line(lambda: parser.resolve(["--config", str(path)]))
