"""Laws of the arguments of `roll_out`: what has a meaning is taken, the rest is one line, nothing is a traceback."""

import collections
import math

import numpy as np
import pytest
import torch
from helpers.pairs import assert_same, make_pair, make_prompts
from helpers.tiny import EOS_ID, build_gpt2
from torch import nn

from switchkd.engine import roll_out
from switchkd.errors import UserError
from switchkd.policies import StudentPolicy, SwitchPolicy

IDS, MASK = make_prompts(3, longest=5)
ROWS = torch.tensor([4, 9, 2])
RAGGED = [ids[keep].tolist() for ids, keep in zip(IDS, MASK, strict=True)]


@pytest.fixture(scope="module")
def pair():
    return make_pair("gpt2")


def arguments(pair, **over):
    given = {
        "student": pair[0],
        "teacher": pair[1],
        "prompt_ids": IDS,
        "prompt_mask": MASK,
        "policy": SwitchPolicy(),
        "max_new_tokens": 8,
        "seed": 3,
        "temperature": 1.0,
        "top_k": 5,
        "top_p": 0.5,
        "draft_length": 2,
        "eos_token_id": [EOS_ID, 7],
        "pad_token_id": EOS_ID,
        "row_ids": ROWS,
        "teacher_prompt_ids": IDS,
        "teacher_prompt_mask": MASK,
        "return_teacher_hidden": False,
        "max_active_rows": 2,
        "excluded_ids": [11],
    }
    return given | over


def written(pair, **over):
    return roll_out(**arguments(pair, **over))


# ---- the same thing said in another way


@pytest.mark.parametrize(
    "over",
    [
        {"prompt_ids": IDS.tolist(), "prompt_mask": MASK.tolist(), "row_ids": ROWS.tolist()},
        {"prompt_ids": IDS.numpy(), "prompt_mask": MASK.numpy(), "row_ids": ROWS.numpy()},
        {"teacher_prompt_ids": IDS.tolist(), "teacher_prompt_mask": MASK.int().tolist()},
        {"prompt_ids": list(IDS), "prompt_mask": tuple(MASK)},
        {"prompt_ids": IDS.numpy()[::-1][::-1].astype(np.int32), "row_ids": ROWS.numpy().astype(np.uint16)},
        {"prompt_ids": IDS.to(torch.int16), "prompt_mask": MASK.float(), "row_ids": tuple(ROWS.tolist())},
        {"prompt_mask": MASK.long(), "row_ids": ROWS.int()},
        {"prompt_ids": RAGGED, "prompt_mask": None},
        {"prompt_ids": tuple(map(torch.tensor, RAGGED)), "prompt_mask": None},
        {"teacher_prompt_ids": RAGGED, "teacher_prompt_mask": None},
        {"eos_token_id": np.array([7, EOS_ID])},
        {"eos_token_id": torch.tensor([EOS_ID, 7, 7])},
        {"eos_token_id": {np.int64(7), EOS_ID}},
        {"eos_token_id": (index for index in (7, float(EOS_ID)))},
        {"max_new_tokens": 8.0, "seed": 3.0, "top_k": 5.0, "draft_length": 2.0, "max_active_rows": 2.0},
        {"max_new_tokens": np.int64(8), "seed": np.uint8(3), "top_k": np.int32(5), "draft_length": np.int64(2)},
        {"max_new_tokens": torch.tensor(8), "temperature": torch.tensor(1.0), "top_p": np.float64(0.5)},
        {"temperature": 1, "pad_token_id": np.int64(EOS_ID), "return_teacher_hidden": np.bool_(False)},
        {"excluded_ids": np.array([11])},
        {"excluded_ids": (11, 11, 5000)},
        {"max_active_rows": None},
        {"draft_length": "auto"},
        {"row_ids": ROWS.numpy()[::-1].copy()[::-1]},
    ],
    ids=lambda over: " ".join(over),
)
def test_other_ways_to_say_the_same_write_the_same(pair, over):
    assert_same(written(pair, **over), written(pair))


def test_one_end_of_sequence_may_be_any_kind_of_integer(pair):
    for value in (7, np.int64(7), torch.tensor(7), 7.0, [7], range(7, 8)):
        assert_same(written(pair, eos_token_id=value), written(pair, eos_token_id=7))


# ---- what has no meaning

NONSENSE = [
    None, True, "", "auto", "switch", "8", b"8", 1j, math.nan, math.inf, -math.inf, -1, -1.5, 0, 0.5, 2**70, -(2**70),
    1e300, 10**6, np.int64(-1), np.float32("nan"), np.bool_(True), np.str_("a"), np.datetime64("2020"), np.array(None),
    np.array([]), np.array(["a"]), np.array([[1.5]]), np.zeros((2, 2, 2)), [], [[]], [[], []], [[1, 2], [3]], [None],
    [[None]], ["a"], ["a"] * 3, [[math.nan] * 5] * 3, [1, "a"], [2**70] * 3, [[2**70]], {}, {1: 2}, {1}, set(),
    frozenset({-1}), object(), object, len, lambda: 1, range(3), range(0), iter([]), slice(1), ..., NotImplemented,
    Exception("x"), collections.UserDict(input_ids=1), torch.tensor([]), torch.tensor(math.nan), torch.tensor([[1.5]]),
    torch.tensor([[True]]), torch.zeros(3), torch.zeros(3, 5), torch.full((3, 5), -1), torch.full((3, 5), 98),
    torch.full((3, 5), 2**40), torch.full((3, 5), math.nan), torch.zeros(3, 1, 1), torch.zeros(3, 5,
    dtype=torch.complex64), torch.zeros(0, 5, dtype=torch.int64), torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3,
    5, device="meta"), torch.zeros((), device="meta"), torch.eye(3, 5).to_sparse(), torch.eye(5, 3).t(), torch.ones(2,
    5, dtype=torch.int64), torch.ones(3, 5, dtype=torch.int64), torch.ones(3, dtype=torch.int64),
    torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), torch.float32, nn.Linear(2, 2),
    SwitchPolicy, SwitchPolicy(), StudentPolicy(), build_gpt2, "a\nb", ["a\nb"],
]  # fmt: skip


@pytest.mark.parametrize("name", sorted(arguments((None, None))))
def test_whatever_is_given_there_is_a_rollout_or_one_line(pair, name):
    refused = 0
    for value in NONSENSE:
        try:
            rollout = written(pair, **{name: value})
        except UserError as error:
            refused += 1
            assert str(error) and "\n" not in str(error), value
        except BaseException as error:  # the law itself: nothing else may come out
            raise AssertionError(f"{name}={value!r}: {type(error).__name__}: {error}") from error
        else:
            assert rollout.completion_ids.shape[1] <= 8 or name == "max_new_tokens"
    assert refused > len(NONSENSE) // 3


@pytest.mark.parametrize("value", [None, "3", math.nan, math.inf, 2.5, [3], True], ids=str)
@pytest.mark.parametrize("name", ["max_new_tokens", "seed", "top_k", "draft_length", "pad_token_id", "max_active_rows"])
def test_what_is_no_integer_is_named_with_its_value(pair, name, value):
    if value is None and name in ("pad_token_id", "max_active_rows"):
        return
    with pytest.raises(UserError, match=rf"^{name} must be .*integer"):
        written(pair, **{name: value})


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"student": None}, "the student must be a causal language model of transformers, got None; load it with Auto"),
        ({"student": "gpt2"}, "the student must be a causal language model of transformers, got 'gpt2'"),
        ({"teacher": nn.Linear(2, 2)}, "the teacher must be a causal language model of transformers, got a Linear"),
        ({"policy": "switch"}, "policy must be a policy such as switchkd.SwitchPolicy(), got 'switch'"),
        ({"policy": SwitchPolicy}, "; write SwitchPolicy()"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"temperature": math.nan}, "temperature must be >= 0 (0 is greedy), got nan"),
        ({"temperature": math.inf}, "temperature must be >= 0 (0 is greedy), got inf"),
        ({"top_p": None}, "top_p must be a number, got None"),
        ({"top_p": math.nan}, "top_p must lie in (0, 1], got nan"),
        ({"eos_token_id": -1}, "eos_token_id -1 lies outside the vocabulary, ids 0 to 97: no text could end with it"),
        ({"eos_token_id": [7, 98]}, "eos_token_id 98 lies outside the vocabulary"),
        ({"eos_token_id": "7"}, "eos_token_id must be an integer, got '7'"),
        ({"prompt_ids": IDS.float()}, "student prompts must hold integers, got float32"),
        ({"prompt_ids": MASK}, "student prompts must hold integers, got bool"),
        (
            {"prompt_ids": [1, 2, 3], "prompt_mask": None},
            "student prompts must be [B, P] or a list of ids for each row",
        ),
        ({"prompt_ids": [[1, 2], []], "prompt_mask": None}, "student prompt of row 1 is empty"),
        ({"prompt_ids": [[1, 2], [0.5]], "prompt_mask": None}, "student prompt of row 1 must hold integers"),
        ({"prompt_ids": [[1, 2], "ab"], "prompt_mask": None}, "student prompt of row 1 must be a tensor"),
        ({"prompt_ids": [[1, 2], [10**30]], "prompt_mask": None}, "an id that does not fit 64 bits"),
        (
            {"prompt_ids": [], "prompt_mask": None},
            "student prompts must be [B, P] with at least one token, got no rows",
        ),
        ({"prompt_ids": [[1, 2], [3]]}, "student prompts must be a tensor, an array or lists of equal length"),
        ({"prompt_ids": IDS.masked_fill(MASK, -5)}, "student prompt holds id -5, but the model knows only ids 0 to 97"),
        ({"prompt_mask": MASK * 2}, "student prompt mask must hold only True and False, or 1 and 0"),
        ({"prompt_mask": torch.where(MASK, 0.0, -math.inf)}, "student prompt mask must hold only"),
        ({"row_ids": ROWS.float()}, "row_ids must hold integers, got float32"),
        ({"row_ids": ROWS.unsqueeze(1)}, "row_ids must be [3], one for each prompt, got [3, 1]"),
        ({"teacher_prompt_ids": None}, "teacher_prompt_mask goes with teacher_prompt_ids, which is None"),
        ({"return_teacher_hidden": "yes"}, "return_teacher_hidden must be True or False, got 'yes'"),
        ({"excluded_ids": [-1]}, "excluded_ids must be >= 0, got -1"),
        ({"excluded_ids": range(98)}, "excluded_ids holds every one of the 98 ids that the models share"),
    ],
    ids=str,
)
def test_the_line_says_what_is_wrong(pair, over, message):
    with pytest.raises(UserError) as caught:
        written(pair, **over)
    assert message in str(caught.value)


@pytest.mark.parametrize("draft_length", [1, 4])
def test_any_id_may_stand_under_the_mask(draft_length):
    """-100 worked with drafts and failed without."""
    student, teacher = build_gpt2(seed=1), build_gpt2(seed=2)
    ids = torch.tensor([[7, 7, 5], [1, 2, 3]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]], dtype=torch.bool)
    found = [
        roll_out(
            *(student, teacher, torch.where(mask, ids, padding), mask),
            policy=SwitchPolicy(initial_threshold=0.2),
            max_new_tokens=6,
            draft_length=draft_length,
        ).completion_ids
        for padding in (0, -100, 10**6)
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
