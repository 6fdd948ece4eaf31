"""The documented command of lm_eval on a folder that training wrote; skipped where lm_eval is not installed."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.command_line import Run, environment, train_options
from transformers import AutoModelForCausalLM, AutoTokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "judging.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', PAGE, flags=re.MULTILINE | re.DOTALL))
(COMMAND,) = re.findall(r"^```\n(lm_eval .*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def likelihood(model: torch.nn.Module, tokenizer: object, context: str, choice: str) -> float:
    """ln p of a choice after a context, nats."""
    first, whole = (torch.tensor([tokenizer(text)["input_ids"]]) for text in (context, context + choice))  # type: ignore[operator]
    with torch.no_grad():
        log_probs = model(whole).logits.log_softmax(-1)[0, first.shape[1] - 1 : -1]
    return float(log_probs.gather(1, whole[0, first.shape[1] :, None]).sum())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install '.[lm_eval]' brings lm_eval")
def test_the_documented_command_scores_a_trained_folder(
    models: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*train_options(models, tmp_path / "runs" / "mine", "--initial_threshold", 0.2))[0] == 0
    (tmp_path / "tasks").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    words = shlex.split(COMMAND.replace("\\\n", " "))
    assert words[0] == "lm_eval"
    done = subprocess.run(
        [sys.executable, "-m", *words, "--device", "cpu"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (tmp_path / "runs" / "lm_eval").rglob("results_*.json")
    (samples,) = (tmp_path / "runs" / "lm_eval").rglob("samples_colours_*.jsonl")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "mine").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "runs" / "mine")
    right = 0
    for sample in map(json.loads, samples.read_text().splitlines()):
        context = f"Question: {sample['doc']['question']}\nAnswer:"
        own = [likelihood(model, tokenizer, context, f" {choice}") for choice in sample["doc"]["choices"]]
        theirs = [float(answer[0][0]) for answer in sample["resps"]]
        assert theirs == pytest.approx(own, rel=1e-4)
        right += own.index(max(own)) == sample["doc"]["answer"]
    accuracy = json.loads(found.read_text())["results"]["colours"]["acc,none"]
    assert accuracy == pytest.approx(right / len(FILES["tasks/colours.jsonl"].splitlines()))
