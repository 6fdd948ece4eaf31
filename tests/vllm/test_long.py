"""Laws on the real vLLM that take minutes: `make test-vllm-long`."""

import contextlib
import json

import pytest
import torch
from helpers import vllm_ranks
from helpers.pairs import make_prompts
from helpers.vllm_real import MARKS, OPTIONS, PYTHON, SETTINGS, SHAPE, both, learn, pair, serving
from scipy.stats import chisquare
from training.test_distributed import both_end, started

from switchkd import SwitchPolicy
from switchkd.vllm import Engine

pytestmark = [*MARKS, pytest.mark.long]


def jensen_shannon(student, teacher):
    middle = torch.logaddexp(student, teacher) - torch.log(torch.tensor(2.0, dtype=student.dtype))
    return 0.5 * ((student.exp() * (student - middle)).sum(-1) + (teacher.exp() * (teacher - middle)).sum(-1))


def test_the_first_two_tokens_have_the_exact_distribution():
    """8 ids, 64 texts of two tokens, 8,000 draws; a threshold in the midst of the divergences has both models write."""
    kept, prompt, draws = 8, [20, 31, 42], 8000
    models = pair()
    texts = [prompt, *([*prompt, token] for token in range(kept))]

    def log_probs(model):
        with torch.no_grad():
            rows = [model(torch.tensor([text])).logits[0, -1, :kept].double() for text in texts]
        return torch.stack(rows).log_softmax(-1)

    student, teacher = (log_probs(model) for model in models)
    divergence = jensen_shannon(student, teacher)
    threshold = float(divergence.sort().values[4:6].mean())
    by_teacher = (divergence > threshold).unsqueeze(-1)
    assert 0 < int(by_teacher.sum()) < len(texts)
    written = torch.where(by_teacher, teacher, student)
    expected = (written[0].unsqueeze(1) + written[1:]).exp().flatten()
    policy = SwitchPolicy(initial_threshold=threshold, schedule="constant")
    with Engine(*models, python=PYTHON, max_num_seqs=256) as engine:
        found = engine.roll_out(
            [prompt] * draws, policy=policy, max_new_tokens=2, seed=11, excluded_ids=tuple(range(kept, 98))
        )
    cells = found.completion_ids[:, 0] * kept + found.completion_ids[:, 1]
    counts = torch.bincount(cells, minlength=kept * kept).double()
    # Rare cells are counted together, as the test asks for five in each.
    rare = expected * draws < 5
    observed = torch.cat([counts[~rare], counts[rare].sum().unsqueeze(0)])
    wanted = torch.cat([expected[~rare], expected[rare].sum().unsqueeze(0)]) * draws
    some = wanted > 0
    assert chisquare(observed[some], wanted[some] * float(observed.sum() / wanted.sum())).pvalue > 1e-3


def test_two_workers_of_tensor_parallelism_write_the_same_text():
    student, teacher = pair()
    prompts = make_prompts(12, longest=30, shortest=2)
    with Engine(student, teacher, **OPTIONS, tensor_parallel_size=2) as engine:
        for name in ("exponential", "temperature and top-p", "a user's own, with a state"):
            both(engine, (student, teacher), prompts, **SETTINGS[name])
        learn(student, teacher)
        engine.load_student(student)
        both(engine, (student, teacher), prompts)


@pytest.mark.parametrize("place", ["an engine each", "one server"])
def test_two_processes_train_as_one_does_on_transformers(tmp_path, place):
    options = {"rollout_engine": "vllm", "shape": SHAPE}
    with contextlib.ExitStack() as stack:
        if place == "one server":
            student, teacher = pair()
            learn(student, teacher)  # the server's student is another one until the training sends its own
            port = stack.enter_context(serving(tmp_path, student, pair()[1]))
            options |= {"vllm_mode": "server", "vllm_server_port": port}
        else:
            options |= {"vllm_python": PYTHON}
        running = started(vllm_ranks.__file__, tmp_path, json.dumps(options))
        wanted = vllm_ranks.main(tmp_path / "one", 1, shape=SHAPE, reuse_teacher_hidden=False)
        both_end(running)
    vllm_ranks.assert_trained_alike(torch.load(tmp_path / "result.pt"), wanted, rel=1e-3, atol=1e-4)
