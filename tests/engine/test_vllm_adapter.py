"""Rollouts on vLLM without vLLM: sampler, record and driver on a stub of its scheduler. tests/vllm has the real one."""

import contextlib
import json
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import vllm_stub
from helpers.pairs import assert_same, make_pair, make_prompts
from helpers.vllm_policy import EveryNth
from helpers.vllm_stub import RunnerV2, StubChild, StubHost, StubHostV2
from safetensors.torch import load_file

import switchkd
from switchkd import UserError
from switchkd.engine.capture import HostReadError, NoHostReads
from switchkd.engine.vllm import engine as engine_module
from switchkd.engine.vllm.child import OF_A_LAUNCH, Child
from switchkd.engine.vllm.described import described, packed, policy_of, unpacked
from switchkd.engine.vllm.driver import drive, request
from switchkd.engine.vllm.private import check_version, runner_of
from switchkd.engine.vllm.process import Answers
from switchkd.engine.vllm.sampler_alone import AloneV1
from switchkd.engine.vllm.sampler_v2 import SamplerV2
from switchkd.engine.vllm.weights import write_model
from switchkd.engine.vllm.writing import Writing
from switchkd.policies import POLICIES, Policy
from switchkd.vllm import Engine

# Policies that ask the device in their own decisions.
WAITING = ["trb"]
SWITCH = switchkd.SwitchPolicy(initial_threshold=0.05, horizon=16)


@pytest.fixture(scope="module")
def pair():
    return make_pair("llama", noise=0.4)


@pytest.fixture
def stub(monkeypatch):
    """`stub(pair, host, **options)`: a stub host behind an `Engine`."""
    vllm_stub.install(monkeypatch)
    monkeypatch.setattr(engine_module, "Child", StubChild)

    def make(pair, host=StubHost, **options):
        engine = Engine(*pair, self_test=False)
        engine._child.host = host(*pair, **options)
        engine._child.host.call("switch_prepare")
        return engine

    return make


def both(engine, pair, prompts, **options):
    options = {"policy": SWITCH, "max_new_tokens": 16, "seed": 7, "return_drafted_ids": True, **options}
    found, wanted = engine.roll_out(*prompts, **options), switchkd.roll_out(*pair, *prompts, **options)
    assert_same(found, wanted)
    assert torch.equal(found.drafted_ids, wanted.drafted_ids)
    return found


HOSTS = pytest.mark.parametrize("host", [StubHost, StubHostV2], ids=["v1", "v2"])


@HOSTS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": switchkd.SwitchPolicy.of(initial_threshold=0.05, minimum_leg=3, clock="since_teacher")},
        {"policy": EveryNth(4)},
        {"policy": switchkd.SkdPolicy(teacher_top_k=5)},
        {"policy": switchkd.StudentPolicy()},
        {"temperature": 0.7, "top_p": 0.9, "excluded_ids": [3, 4]},
        {"temperature": 0.0},
        {"eos_token_id": list(range(20, 30))},
    ],
    ids=lambda options: "-".join(options) or "switch",
)
def test_text_authors_and_divergences_are_those_of_roll_out(pair, stub, host, options):
    rollout = both(stub(pair, host, max_num_seqs=3), pair, make_prompts(4, shortest=2), **options)
    assert rollout.stats["undrafted"] == 0
    assert 0 < rollout.stats["kept"] <= rollout.stats["drafted"]


@HOSTS
def test_requests_of_one_step_may_have_drafts_of_different_lengths(pair, stub, host):
    engine = stub(pair, host, shorten={2: 0, 3: 2, 4: 1, 6: 0, 7: 3})
    for policy in (SWITCH, EveryNth(4), switchkd.BlendPolicy(0.2)):
        both(engine, pair, make_prompts(4, shortest=2), policy=policy)


def refuse_host_reads(monkeypatch):
    """Let a question of the V2 sampler to the device be an error, between a draft and what is written."""

    def watched(function):
        def call(self, *given):
            with contextlib.nullcontext() if self.writing is None else NoHostReads():
                return function(self, *given)

        return call

    for name in ("draft", "decide", "add"):
        monkeypatch.setattr(SamplerV2, name, watched(getattr(SamplerV2, name)))


@pytest.mark.parametrize("name", list(POLICIES))
def test_the_v2_sampler_asks_the_device_nothing_between_draft_and_emission(pair, stub, monkeypatch, name):
    """A question would wait for the GPU in every round, and vLLM could not prepare the next step meanwhile."""
    prompts, options = make_prompts(4, shortest=2), {"policy": POLICIES[name](), "max_new_tokens": 12, "seed": 1}
    options["eos_token_id"] = [20, 21]
    # The text is right for all of them, those included that ask; what is made for all later calls is made here.
    both(stub(pair, StubHostV2), pair, prompts, **options)
    refuse_host_reads(monkeypatch)
    engine = stub(pair, StubHostV2, preempt={3: 0})
    with pytest.raises(HostReadError) if name in WAITING else contextlib.nullcontext():
        assert engine.roll_out(*prompts, **options).stats["undrafted"] > 0


def test_the_v2_sampler_sends_the_device_nothing_between_draft_and_emission():
    """Device "meta" stands for a GPU: it has shapes and no numbers, and nothing of the CPU may come in."""

    class NothingOfTheHost(NoHostReads):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            for value in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                    raise HostReadError(f"{func} reads a tensor of the host")
            return super().__torch_dispatch__(func, types, args, kwargs)

    requests, length, size = 3, 2, 8

    def column(*shape, dtype=torch.int64):
        return torch.zeros(*shape, dtype=dtype, device="meta")

    sampler = SamplerV2(RunnerV2(4, length, device="meta"))
    extra = {"row": 0, "offset": 0, "first": 3, "stop": 5, "end": -2}
    edges = np.array([0, 3, 4, 6])  # two drafted tokens, none, one
    batch = SimpleNamespace(
        idx_mapping=column(requests, dtype=torch.int32),
        cu_num_logits=column(requests + 1, dtype=torch.int32),
        cu_num_logits_np=edges,
        logits_indices=column(6),
        input_ids=column(6, dtype=torch.int32),
        positions=column(6),
    )
    for policy in (switchkd.SwitchPolicy.of(minimum_leg=2), switchkd.SkdPolicy(), switchkd.BlendPolicy(0.2)):
        job = {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "vocabulary_size": size, "excluded_ids": []}
        job |= {"policy": described(policy), "seed": 0, "row_ids": [0, 1, 2], "max_new_tokens": 9}
        sampler.begin(Writing(job, torch.device("meta")))
        with torch.no_grad(), NothingOfTheHost():
            sampler.add(1, extra)
            for _ in range(length):
                sampler.draft(column(requests, size, dtype=torch.float32), column(requests), batch.idx_mapping)
            sampled, emitted = sampler.decide(column(6, size, dtype=torch.float32), batch)
        assert sampled.shape == (requests, length + 1) and emitted.shape == (requests,)


# ---- the traps of vLLM, each by its name


@HOSTS
def test_trap_1_no_bonus_token_is_written(pair, stub, host):
    engine = stub(pair, host, draft_length=3)
    both(engine, pair, make_prompts(4, shortest=2), policy=switchkd.StudentPolicy())
    assert engine._child.host.longest_step == 3  # vLLM itself writes a fourth where all three are kept


def test_trap_2_the_first_token_after_the_prefill_is_the_last_of_the_prompt(pair, stub):
    asked = request(0, [5, 6, 7], [], 10, [1], 98)
    assert asked["prompt_token_ids"] == [5, 6] and asked["extra_args"]["first"] == 7 and asked["max_tokens"] == 11
    with pytest.raises(UserError, match="the prompt of row 1 has one token; vLLM samples"):
        stub(pair).roll_out([[3, 4], [5]], policy=SWITCH)


@HOSTS
def test_trap_3_a_step_without_drafts_ends_the_request_and_the_text_is_asked_on(pair, stub, host):
    prompts, policy = make_prompts(6, shortest=2), switchkd.SwitchPolicy.of(initial_threshold=0.05, minimum_leg=3)
    engine = stub(pair, host, preempt={3: 0, 4: 2, 5: 2, 9: 1, 14: 0})
    found = both(engine, pair, prompts, policy=policy, eos_token_id=[20, 21])
    assert found.stats["undrafted"] >= 3 and found.stats["requests"] >= 9


def test_trap_4_a_padded_prefill_does_not_cost_the_batch_its_drafts(pair, stub):
    # A request of one token comes with drafts of -1; vLLM then forgets the draft's probabilities of the whole batch.
    engine = stub(pair, max_num_seqs=2)
    found = both(engine, pair, make_prompts(5, shortest=2, longest=2))
    assert found.stats["undrafted"] == 0


def test_trap_5_near_max_model_len_nothing_is_drafted(pair, stub):
    engine = stub(pair, max_model_len=40)
    engine.facts["max_model_len"] = 40
    with pytest.raises(UserError, match="12 tokens, 20 new ones and 10 of slack exceed max_model_len 40"):
        engine.roll_out([list(range(12))], policy=SWITCH, max_new_tokens=20)
    both(engine, pair, ([list(range(10))],), max_new_tokens=20)
    engine.facts["max_model_len"] = 128  # without the refusal
    with pytest.raises(UserError, match="1 texts do not go on"):
        engine.roll_out([list(range(30))], policy=SWITCH, max_new_tokens=20)


@HOSTS
def test_trap_6_a_prompt_that_ends_with_an_end_of_sequence_is_continued(pair, stub, host):
    # vLLM looks at stop ids before it looks at anything else, the written last token of the prompt included.
    eos = list(range(20, 45))
    found = both(stub(pair, host), pair, ([[5, 6, eos[0]], [7, eos[1]], [8, 9, 10]],), eos_token_id=eos)
    assert int(found.completion_mask.sum(-1).min()) >= 1
    assert request(0, [5, eos[0]], [], 9, eos, 98)["stop_token_ids"][0] == eos[1]


def test_trap_7_new_weights_reset_the_cache_of_prefixes():
    calls = []
    answers = Answers()
    answers.host = SimpleNamespace(
        call=lambda method, file: calls.append(method) or 3,
        llm=SimpleNamespace(reset_prefix_cache=lambda: calls.append("reset")),
    )
    assert answers.load_student("file") == 3
    assert calls == ["switch_load_student", "reset"]


def test_trap_9_a_step_in_flight_after_the_end_of_its_request_changes_nothing():
    job = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "vocabulary_size": 8, "excluded_ids": []}
    job |= {"policy": described(EveryNth()), "seed": 0, "row_ids": [0, 1], "max_new_tokens": 9}
    writing = Writing(job, torch.device("cpu"))
    rows, position = torch.tensor([0, 1]), torch.arange(2).expand(2, 2)
    flat = torch.zeros(4, 8).log_softmax(-1)
    drafted, lengths = torch.ones(2, 2, dtype=torch.int64), torch.tensor([2, 2])
    writing.check(drafted, flat, flat, rows, position, lengths, torch.tensor([True, False]))
    columns, _ = writing.take()
    assert writing.state.tolist() == [2, 0] and set(columns["row"].tolist()) == {0}


# ---- what goes over and what comes back


@pytest.mark.parametrize("policy", [kind() for kind in POLICIES.values()], ids=list(POLICIES))
def test_every_policy_arrives_as_it_was_sent(policy):
    assert policy_of(json.loads(json.dumps(described(policy)))) == policy


def test_policies_inside_policies_and_those_of_users_arrive():
    paced = switchkd.SwitchPolicy.of(initial_threshold=0.2, minimum_leg=3)
    assert policy_of(described(paced)) == paced
    own = policy_of(described(EveryNth(5)))
    assert type(own).__name__ == "EveryNth" and own.every == 5


def test_a_policy_that_cannot_be_sent_is_refused_in_one_line():
    @dataclass
    class Inner(Policy):
        every: int = 1

    with pytest.raises(UserError, match="Inner cannot be found by another process: define it at the top of a file"):
        described(Inner())
    with pytest.raises(UserError, match="EveryNth: option every is Tensor, which cannot be sent"):
        described(EveryNth(torch.tensor(3)))


def test_a_record_is_the_same_after_its_way_and_a_damaged_one_is_refused(pair, stub):
    job = {"policy": described(SWITCH), "temperature": 1.0, "top_k": 0, "top_p": 1.0, "vocabulary_size": 98}
    job |= {"excluded_ids": [], "seed": 0, "row_ids": [0], "max_new_tokens": 5}
    columns, _ = drive(stub(pair)._child.host, job, [[3, 4]], [])
    texts = packed(columns)
    for name, column in unpacked(texts).items():
        assert column.dtype == columns[name].dtype and column.tolist() == columns[name].tolist()
    with pytest.raises(ValueError, match="differ in length"):
        unpacked({**texts, "token": ""})
    with pytest.raises(ValueError, match="expected the columns"):
        unpacked({"token": ""})


def test_a_vllm_that_writes_otherwise_is_refused(pair, stub, monkeypatch):
    engine = stub(pair)
    monkeypatch.setattr(engine._child.host, "_draft", lambda active: None)  # never drafts again
    with pytest.raises(UserError, match="texts do not go on, the first at token 0"):
        engine.roll_out([[3, 4, 5]], policy=SWITCH, max_new_tokens=9)


# ---- a student alone


@HOSTS
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "top_k": 9, "excluded_ids": [3]}, {"temperature": 0.0}, {"eos_token_id": [20, 21, 22]}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_a_student_alone_writes_what_roll_out_writes(pair, stub, host, options):
    engine = stub((pair[0], None), host, max_num_seqs=3, preempt={4: 1})
    both(engine, (pair[0], None), ([[3], *make_prompts(4)[0].tolist()],), policy=switchkd.StudentPolicy(), **options)


def test_a_student_alone_is_tested_at_its_start_and_takes_new_weights(pair, monkeypatch):
    vllm_stub.install(monkeypatch)
    monkeypatch.setattr(engine_module, "Child", StubChild)
    with Engine(pair[0], None) as engine:
        assert engine.facts["draft_length"] == 0 and "speculative_config" not in engine._child.options
        engine.load_student(pair[1])
        both(engine, (pair[1], None), make_prompts(3), policy=switchkd.StudentPolicy())
        with pytest.raises(UserError, match="this engine has no teacher, so that the student writes alone, not Switch"):
            engine.roll_out([[3, 4]], policy=SWITCH)
    monkeypatch.setattr(AloneV1, "draw", lambda self, logits, rows, positions: logits.argmax(-1))
    with pytest.raises(UserError, match=r"the self-test failed: vLLM stub .* parts from the reference's text at token"):
        Engine(pair[0], None)


# ---- the engine


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_prompt_ids": [[1, 2]]}, "the teacher cannot read prompts of its own"),
        ({"return_teacher_hidden": True}, "return_teacher_hidden is not possible"),
        ({"cuda_graphs": True}, "cuda_graphs are those of the transformers engine"),
        ({"draft_length": 8}, "draft_length is 4 since the engine started, not 8"),
        ({"eos_token_id": 98}, "eos_token_id 98 lies outside the vocabulary"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1"),
    ],
)
def test_what_vllm_cannot_honour_is_refused_by_name(pair, stub, options, message):
    with pytest.raises(UserError, match=message):
        stub(pair).roll_out([[3, 4]], policy=SWITCH, **options)


def test_unequal_vocabularies_are_refused_before_anything_starts(pair):
    other = make_pair("llama", vocab_size=99)[1]
    with pytest.raises(UserError, match="the student scores 98 ids and the teacher 99; vLLM needs models of one size"):
        Engine(pair[0], other)


def test_the_self_test_refuses_another_text_than_the_references(pair, monkeypatch):
    vllm_stub.install(monkeypatch)
    monkeypatch.setattr(engine_module, "Child", StubChild)
    Engine(*pair).close()  # the stub passes it

    class Wrong(StubChild):
        def start(self, options):
            facts = super().start(options)
            with torch.no_grad():  # vLLM reads another teacher
                self.host.teacher.lm_head.weight.mul_(1.1)
            return facts

    monkeypatch.setattr(engine_module, "Child", Wrong)
    with pytest.raises(UserError, match=r"the self-test failed: vLLM stub \(runner v1, float32\) measures divergences"):
        Engine(*pair)


def test_new_weights_are_used_by_the_next_rollout(pair, stub):
    student, teacher = make_pair("llama", noise=0.4)
    engine, prompts = Engine(student, teacher, self_test=False), make_prompts(4, shortest=2)
    before = both(engine, (student, teacher), prompts)
    with torch.no_grad():
        for mine, its in zip(student.parameters(), teacher.parameters(), strict=True):
            mine.lerp_(its, 0.5)
    engine.load_student(student)
    after = both(engine, (student, teacher), prompts)
    engine.load_student(pair[0].state_dict())
    assert torch.equal(engine.roll_out(*prompts, policy=SWITCH, max_new_tokens=16, seed=7).author, before.author)
    assert not torch.equal(before.completion_ids, after.completion_ids)


def test_an_adapter_is_merged_into_what_vllm_reads(pair, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    student = make_pair("llama", noise=0.4)[0]
    plain = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    adapted = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.1)
    write_model(adapted.eval(), tmp_path)
    ids = torch.arange(12).view(1, 12)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)
    for name, tensor in adapted.get_base_model().state_dict().items():  # and the student is as it was
        if "q_proj.base_layer" in name:
            assert torch.equal(tensor, plain[name.replace(".base_layer", "")])


def test_weights_are_written_in_every_process_and_not_in_the_first_alone(pair, tmp_path, monkeypatch):
    """Each training process has a vLLM of its own, and transformers saves in the first process only."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *group: 1)
    file = write_model(pair[0], tmp_path)
    assert torch.equal(load_file(file)["model.norm.weight"], pair[0].model.norm.weight)
    assert (tmp_path / "config.json").is_file() and "should_save_on_this_rank" not in vars(pair[0])


def test_the_process_of_vllm_is_none_of_those_that_train(monkeypatch, tmp_path):
    for name in OF_A_LAUNCH:
        monkeypatch.setenv(name, "1")
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "rank=$RANK port=$MASTER_PORT its own=$OWN"\nexit 3\n')
    script.chmod(0o755)
    child = Child(str(script), {"OWN": "here"})
    with pytest.raises(UserError, match="rank= port= its own=here"):
        child.ask("start", options={})
    child.close()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "here has no vLLM; wanted is 0.32: give --vllm_python"),
        ("0.31.2", "here has vLLM 0.31.2, wanted is 0.32 .its model runners V1 and V2"),
    ],
)
def test_another_version_of_vllm_is_refused_in_one_line(found, message):
    with pytest.raises(UserError, match=message):
        check_version(found, "here")
    check_version("0.32.4+cpu", "here")


def test_a_model_runner_that_lacks_something_is_refused_by_its_name(pair):
    host = StubHost(*pair)
    assert runner_of(host) == "v1"
    del host.model_runner.drafter._sample_draft_tokens
    with pytest.raises(UserError, match=r"has no model_runner\.drafter\._sample_draft_tokens, which vLLM 0\.32"):
        runner_of(host)
    host.model_runner = SimpleNamespace()
    with pytest.raises(UserError, match="the model runner is SimpleNamespace"):
        runner_of(host)


@pytest.mark.slow  # the process imports torch
def test_a_python_without_vllm_is_refused_in_one_line(pair):
    with pytest.raises(UserError, match=r"has no vLLM; wanted is 0\.32") as caught:
        Engine(*pair, python=sys.executable)
    assert "\n" not in str(caught.value)


def test_a_process_that_dies_ends_in_one_line(pair, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho no memory left\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(UserError, match="process ended with exit code 3: no memory left; what was saved before"):
        Engine(*pair, python=str(script))
    with pytest.raises(UserError, match="cannot run /nowhere/python: No such file"):
        Engine(*pair, python="/nowhere/python")
