"""Laws of chats: which tokens are supervised, what users write is text, tools are shown or refused."""

import copy
import itertools

import pytest
import torch
from datasets import Dataset
from helpers.tiny import build_gpt2, build_tokenizer
from helpers.training import watch_batches
from transformers import AutoTokenizer

from switchkd.data import encode_prompt, prepare
from switchkd.data.batches import Rows, padded_batch
from switchkd.errors import UserError

#: How real families write a turn: with `<eos>` behind the assistant's words.
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + (eos_token if m.role == 'assistant' "
    "else '') + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "trims": "{% for m in messages %}{{ '[' + m.role + ']' + (m.content | trim) + (eos_token if m.role == 'assistant' "
    "else '') }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}",
    "brackets": "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}",
    # Only the last turn keeps an empty thought, as in Qwen3: earlier turns are not what they were.
    "thinks": "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '(thought)' }}{% endif %}{{ m.content + (eos_token if m.role == 'assistant' else '') + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
}
#: The user repeats what the assistant says, and the assistant repeats itself.
SAID = ["ab", "cd", "ab", "ab", "What, ab?", "ef"]
TALK = [{"role": role, "content": said} for role, said in zip(("user", "assistant") * 3, SAID, strict=True)]


def tokenizer_with(template):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def supervised(tokenizer, records, **options):
    """The texts of the supervised tokens, one for each run of them, and all tokens of the first row."""
    data, _ = prepare(Dataset.from_list(records), tokenizer, **options)
    batch = padded_batch(Rows(list(data)), tokenizer.pad_token_id)
    completions = batch["input_ids"][:, -batch["completion_mask"].shape[1] :]
    runs = []
    for ids, mask in zip(completions.tolist(), batch["completion_mask"].tolist(), strict=True):
        groups = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
        runs.append([tokenizer.decode([token for token, _ in group]) for kept, group in groups if kept])
    read = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
    return runs, read


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_turn_of_the_assistant_is_supervised_with_its_eos_and_nothing_else(name):
    tokenizer = tokenizer_with(TEMPLATES[name])
    blank = " " if name == "brackets" else ""
    last = "(thought)" if name == "thinks" else ""
    wanted = [f"{blank}cd{blank}<eos>", f"{blank}ab{blank}<eos>", f"{blank}{last}ef{blank}<eos>"]
    records = [{"messages": TALK}, {"messages": TALK[:2]}]
    (turns, single), read = supervised(tokenizer, records, supervise="all")
    assert turns == wanted
    assert single == [f"{blank}{last}cd{blank}<eos>"]
    (only, _), same = supervised(tokenizer, records, supervise="last")
    assert only == wanted[-1:]
    # Both read the same text, which is what the template writes up to the last end of sequence.
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert read == same
    assert tokenizer.decode(read) == whole[: whole.rindex("<eos>") + 5]


#: Turns end with a token that is not the end of sequence: as Gemma writes them, and as Phi-3, which adds the end of
#: sequence to a whole conversation.
OTHER_ENDS = {
    "gemma": ("{{ '<turn>' + m.role + '\n' + (m.content | trim) + '<end>\n' }}", ""),
    "phi": ("{{ '<turn>' + m.role + '\n' + m.content + '<end>\n' }}", "{{ eos_token }}"),
}


@pytest.mark.parametrize("name", OTHER_ENDS)
def test_a_turn_that_ends_with_another_token_is_supervised_with_that_token(name):
    turn, whole = OTHER_ENDS[name]
    waits = "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% else %}" + whole + "{% endif %}"
    tokenizer = tokenizer_with("{% for m in messages %}" + turn + "{% endfor %}" + waits)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<end>"]})
    (turns,), _ = supervised(tokenizer, [{"messages": TALK}], supervise="all")
    assert turns == ["cd<end>", "ab<end>", "ef<end>\n<eos>"]


def test_turns_without_words_of_their_own_end_with_the_token_that_ends_a_last_one():
    """As in Qwen3: a thought disappears from earlier turns, and a call of tools has no words."""
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if loop.last %}{{ m.content }}{% else %}"
        "{{ m.content.split('(/thought)') | last }}{% endif %}{{ m.tool_calls | tojson if m.tool_calls }}"
        "{{ eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    call = {"role": "assistant", "tool_calls": ["add"]}
    talk = [TALK[0], {"role": "assistant", "content": "hm(/thought)cd"}, TALK[2], call, TALK[4], TALK[5]]
    (turns,), _ = supervised(tokenizer_with(template), [{"messages": talk}], supervise="all")
    assert turns == ["cd<eos>", '["add"]<eos>', "ef<eos>"]


def test_rollouts_continue_the_prompt_before_the_last_turn_whatever_is_supervised():
    tokenizer = tokenizer_with(TEMPLATES["chatml"])
    for supervise in ("last", "all"):
        data, _ = prepare(Dataset.from_list([{"messages": TALK}]), tokenizer, supervise=supervise)
        assert Rows(list(data)).prompts() == [encode_prompt(TALK[:-1], tokenizer)]


def test_a_chat_that_the_user_ends_trains_on_the_turns_before():
    tokenizer = tokenizer_with(TEMPLATES["chatml"])
    (turns,), _ = supervised(tokenizer, [{"messages": TALK[:3]}], supervise="all")
    assert turns == ["cd<eos>"]


def test_gradients_of_several_turns_are_those_of_the_turns_one_by_one(make_trainer):
    """The sum over one record's turns is the sum over records that end with each of them."""
    tokenizer = tokenizer_with(TEMPLATES["chatml"])
    moved = []
    for rows, supervise in (
        ([{"messages": TALK}], "all"),
        ([{"messages": TALK[:end]} for end in (2, 4, 6)], "last"),
    ):
        student = build_gpt2(seed=1)
        trainer = make_trainer(
            student,
            build_gpt2(seed=2),
            method="kd",
            train_dataset=rows,
            processing_class=tokenizer,
            supervise=supervise,
            divergence="forward_kl",
        )
        batches = watch_batches(trainer)
        trainer.train()
        assert int(batches[0][1]) == 9  # three turns of two letters and an end of sequence
        moved.append(torch.cat([value.detach().flatten() for value in student.parameters()]))
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-4, atol=1e-6)


def test_turns_that_a_template_hides_are_refused_where_they_should_be_supervised():
    template = "{% for m in messages %}{{ m.content | upper if not loop.last else m.content }}{{ loop.length }}"
    template += "{% endfor %}"
    with pytest.raises(UserError, match="row 1: the chat template rewrites the assistant's message 2"):
        prepare(Dataset.from_list([{"messages": TALK}]), tokenizer_with(template), supervise="all")


def test_teacher_prompts_belong_to_one_answer():
    rows = Dataset.from_list([{"messages": TALK, "teacher_prompt": "hint"}])
    with pytest.raises(UserError, match="supervise=all and a column teacher_prompt exclude each other"):
        prepare(rows, tokenizer_with(TEMPLATES["chatml"]), supervise="all")


# ---- special tokens that users write


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.filterwarnings("ignore:.*spell special tokens")
def test_special_tokens_that_users_write_are_text_and_those_of_the_template_stay(name):
    tokenizer = tokenizer_with(TEMPLATES[name])
    eos = tokenizer.eos_token_id
    talk = copy.deepcopy(TALK)
    talk[0]["content"] = "a<eos>b<unk>"
    talk[3]["content"] = "<eos>"
    talk[5]["content"] = "e<eos>f"
    for supervise in ("last", "all"):
        (turns,), read = supervised(tokenizer, [{"messages": talk}], supervise=supervise)
        whole = tokenizer.apply_chat_template(talk, tokenize=False)
        # The text is the same to the last letter, and only the template's three ends are ends.
        assert tokenizer.decode(read) == whole[: whole.rindex("<eos>") + 5]
        assert read.count(eos) == 3 and tokenizer.unk_token_id not in read
        assert [turn.count("<eos>") for turn in turns] == [1, 2, 2][-len(turns) :]
    marked, _ = prepare(Dataset.from_list([{"messages": talk}]), tokenizer, split_special_tokens=False)
    assert marked["prompt_ids"][0].count(eos) == 4 and marked["completion_ids"][0].count(eos) == 1


@pytest.mark.parametrize("name", ["gpt2", "opt"])
@pytest.mark.filterwarnings("ignore:.*spell special tokens")
def test_special_tokens_of_published_tokenizers_are_text_in_prompts_answers_and_chats(shared_dir, name):
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "data" / "tokenizers" / name)
    tokenizer.chat_template = TEMPLATES["chatml"]
    spelled, eos = tokenizer.eos_token, tokenizer.eos_token_id
    start = tokenizer("")["input_ids"]
    rows = [{"prompt": f"Why {spelled} now", "completion": f" so {spelled}{spelled} it is"}]
    data, _ = prepare(Dataset.from_list(rows), tokenizer)
    prompt, completion = data["prompt_ids"][0], data["completion_ids"][0]
    assert prompt[: len(start)] == start and eos not in prompt[len(start) :]
    assert completion.count(eos) == 1 and completion[-1] == eos
    text = tokenizer.decode(prompt[len(start) :] + completion[:-1])
    assert text == rows[0]["prompt"] + rows[0]["completion"]
    talk = [{"role": "user", "content": f"Why {spelled} now"}, {"role": "assistant", "content": f"so {spelled} "}]
    data, _ = prepare(Dataset.from_list([{"messages": talk}]), tokenizer)
    prompt, completion = data["prompt_ids"][0], data["completion_ids"][0]
    assert eos not in prompt and completion.count(eos) == 1
    whole = tokenizer.apply_chat_template(talk, tokenize=False)
    assert tokenizer.decode(prompt + completion) == whole.rstrip("\n")
    # What spells no special token has the ids that it always had.
    assert encode_prompt("Why now", tokenizer) == tokenizer("Why now")["input_ids"]


def test_records_that_spell_special_tokens_are_counted_in_one_warning():
    rows = [{"prompt": "a"}, {"prompt": "b<eos>"}]
    with pytest.warns(UserWarning, match="1 of 2 records spell special tokens such as '<eos>': they are text"):
        prepare(Dataset.from_list(rows), build_tokenizer())


# ---- tools

WITH_TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + TEMPLATES["chatml"]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"x": {"type": "number"}}}}


@pytest.mark.parametrize("tools", [[TOOL], '[{"type": "function", "function": {"name": "add"}}]'])
def test_tools_reach_the_template(tools):
    rows = [{"messages": TALK[:2], "tools": tools}]
    data, _ = prepare(Dataset.from_list(rows), tokenizer_with(WITH_TOOLS))
    assert data["prompt"][0].startswith('[{"type": "function", "function": {"name": "add"')
    assert data["prompt"][0].endswith(encode_text(TALK[:1]))


def encode_text(messages):
    return tokenizer_with(TEMPLATES["chatml"]).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_tools_of_some_records_leave_the_others_as_they_are():
    rows = [{"messages": TALK[:2], "tools": [TOOL]}, {"messages": TALK[:2], "tools": None}, {"messages": TALK[:2]}]
    data, _ = prepare(Dataset.from_list(rows), tokenizer_with(WITH_TOOLS))
    assert ["add" in prompt for prompt in data["prompt"]] == [True, False, False]


def test_calls_of_tools_need_no_words():
    template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    data, _ = prepare(Dataset.from_list([{"messages": [TALK[0], call]}]), tokenizer_with(template))
    assert '"name": "add"' in build_tokenizer().decode(data["completion_ids"][0])
