"""The commands of the documents and the Python of README.md and the guide, run as they stand there.

They run in a folder that holds what the documents speak of, under the very names: tiny models called `S`, `T` and
`TEACHER`, a few records in `train.jsonl`, the configs in `examples/`. `RUN` gives every command the options that make
it small (a flag wins, also over an earlier one), so that the documented words are all read. A command that `RUN` does
not know fails the test, and so does an entry of `RUN` that no document has any more.
"""

import contextlib
import gzip
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
from helpers.chat import StandIn, completion
from helpers.tiny import RAGGED_ROWS, build_gpt2, build_llama, build_tokenizer

ROOT = Path(__file__).parents[1]
GUIDE = "docs/guide.md"
DOCUMENTS = (
    "README.md",
    "docs/index.md",
    "docs/data.md",
    GUIDE,
    "docs/scale.md",
    "docs/plan.md",
    "docs/report.md",
    "docs/judging.md",
    "docs/reproducing.md",
    "examples/README.md",
)
PROGRAMS = ("switchkd", "make", "pip", "python", "python3", "zcat", "git", "accelerate", "export")
SHELLS = ("bash", "sh", "shell", "console")

TRAIN = "--use_cpu --max_steps 2 --max_completion_length 8 --per_device_train_batch_size 2 --logging_steps 1"
WRITE = "--max_completion_length 8"
SCORE = f"{WRITE} --max_samples 2"
CHATS = f"{TRAIN} --max_train_samples 64"
COMPARE = shlex.join(
    [
        *("--jobs", "1", "--seeds", "0", "--baseline", "sft", "--pairs", "switch:sft"),
        *("--students", json.dumps({"tiny": {"student_config": {"hidden_size": 16}}})),
        *("--runs", json.dumps({"sft": None, "switch": {"initial_threshold": 0.2}})),
        *("--warm_start", json.dumps({"max_steps": 1, "method": "sft"})),
        "--train",
        json.dumps(
            {
                "teacher_model_name_or_path": "runs/demo/teacher",
                "dataset_name": "runs/demo/data/train.jsonl",
                "max_steps": 1,
                "max_completion_length": 8,
                "use_cpu": True,
            }
        ),
        *(
            "--evaluate",
            json.dumps(
                {"dataset_name": "runs/demo/data/test.jsonl", "decoding_seeds": [1], "max_completion_length": 8}
            ),
        ),
    ]
)


@dataclass(frozen=True)
class Run:
    """Run the command with more options at its end."""

    options: str = ""


@dataclass(frozen=True)
class Look:
    """Do not run it: only let the program say what it would do, with these options; `why` is for the reader."""

    options: str
    why: str


#: Every documented command, blanks between words made one, without its comment.
RUN: dict[str, Run | Look] = {
    "make demo": Look("--dry-run", "installs from the network"),
    "make test": Look("--dry-run", "would run this test"),
    "switchkd demo": Look("--help", "two minutes, without options for its sizes; tests/test_demo.py runs it small"),
    "switchkd demo --output_dir runs/demo": Look("--help", "as above; what it leaves is made by `folder`"),
    "switchkd train --config examples/gpt2_xl_dolly_switch.yaml --output_dir runs/mine": Run(f"{TRAIN} --bf16 false"),
    'switchkd rollout --model_name_or_path S --teacher_model_name_or_path T --prompt "Once upon a time"': Run(WRITE),
    "switchkd evaluate --model_name_or_path runs/mine --dataset_name test.jsonl --decoding_seeds 1,2,3": Run(SCORE),
    "switchkd compare --config examples/compare_demo.yaml": Run(COMPARE),
    "switchkd report runs/compare": Run(),
    "switchkd plan --student S --teacher T --gpus 8": Run(),
    "switchkd report runs/mine runs/diagnose --output_file both.html": Run(),
    "switchkd rollout --model_name_or_path S --teacher_model_name_or_path T --dataset_name test.jsonl "
    "--top_tokens 5 --html rollout.html --output_dir runs/rollout": Run(WRITE),
    "switchkd report runs/compare runs/rollout": Run(),
    "switchkd diagnose --model_name_or_path S --teacher_model_name_or_path T --dataset_name train.jsonl": Run(
        "--max_completion_length 8 --max_samples 4 --output_dir runs/diagnose"
    ),
    "switchkd calibrate --model_name_or_path S --teacher_model_name_or_path T --dataset_name train.jsonl "
    "--target_teacher_share 0.53": Run("--max_completion_length 8 --tolerance 0.5"),
    "export OPENAI_BASE_URL=http://localhost:8000/v1": Run(),
    "export OPENAI_MODEL=judge": Run(),
    **{
        f"switchkd evaluate --model_name_or_path {model} --dataset_name test.jsonl --output_dir runs/of-{name}": Run(
            SCORE
        )
        for model, name in (("S", "s"), ("T", "t"))
    },
    "switchkd judge runs/of-s runs/of-t --output_dir runs/judge --prices 0.15,0.60": Run(),
    "switchkd judge runs/of-s runs/of-t --output_dir runs/judge --yes": Run(),
    "switchkd recipe run gpt2-small --output_dir runs/gpt2-small": Look(
        "--help", "days on a GPU; tests/recipes runs every stage small"
    ),
    "switchkd recipe run gpt2-small --output_dir runs/gpt2-small --set dolly=data/dolly sni=null unni=null": Look(
        "--help", "as above"
    ),
    "switchkd recipe run miniature --output_dir runs/miniature": Look("--help", "half an hour, downloads; as above"),
    "switchkd recipe list": Run(),
    "switchkd recipe show opt-350m": Run(),
    "switchkd recipe show gpt2-small --stages teacher > teacher.yaml": Run(),
    "switchkd train --model_name_or_path S --teacher_model_name_or_path T --dataset_name qa.csv "
    "--columns prompt=query,completion=reply --output_dir runs/qa": Run(TRAIN),
    "switchkd train --model_name_or_path S --teacher_model_name_or_path T "
    "--dataset_mixture chats.jsonl=0.7 questions.csv=0.3 --output_dir runs/mixture": Run(f"{TRAIN} --template none"),
    "pip install .": Look("--help", "installs from the network"),
    "export OMP_NUM_THREADS=1": Run(),
    "python make_chats.py": Run(),
    "python make_tokenizer.py": Run(),
    "switchkd train --method sft --tokenizer_name_or_path tokenizer --dataset_name chats/train.jsonl "
    '--output_dir runs/teacher --student_config \'{"model_type": "llama", "hidden_size": 128, '
    '"intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.06}\' '
    "--max_steps 800 --per_device_train_batch_size 32 --learning_rate 3e-3 --lr_scheduler_type cosine "
    "--warmup_steps 20 --logging_steps 100": Run(CHATS),
    "switchkd train --method sft --tokenizer_name_or_path tokenizer --dataset_name chats/train.jsonl "
    '--output_dir runs/student --student_config \'{"model_type": "llama", "hidden_size": 32, '
    '"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.06}\' '
    "--max_steps 400 --per_device_train_batch_size 32 --learning_rate 5e-3 --lr_scheduler_type cosine "
    "--warmup_steps 20 --logging_steps 100": Run(CHATS),
    "switchkd diagnose --model_name_or_path runs/student --teacher_model_name_or_path runs/teacher "
    "--dataset_name chats/train.jsonl --max_completion_length 64 --output_dir runs/diagnose": Run(
        "--max_completion_length 8 --max_samples 4 --overwrite_output_dir"
    ),
    "switchkd train --method switch --output_dir runs/distilled --model_name_or_path runs/student "
    "--teacher_model_name_or_path runs/teacher --dataset_name chats/train.jsonl --max_completion_length 64 "
    "--max_steps 200 --per_device_train_batch_size 32 --learning_rate 3e-3 --lr_scheduler_type linear "
    "--logging_steps 40": Run(CHATS),
    **{
        f"switchkd evaluate --model_name_or_path runs/{model} --dataset_name chats/test.jsonl "
        "--decoding_seeds 1,2,3 --max_completion_length 64 --batch_size 200": Run(SCORE)
        for model in ("teacher", "student", "distilled")
    },
    "switchkd rollout --model_name_or_path runs/student --teacher_model_name_or_path runs/teacher "
    "--dataset_name chats/test.jsonl --dataset_train_split test --max_samples 4 --initial_threshold 0.005": Run(WRITE),
    "switchkd train --method switch --output_dir runs/qwen --model_name_or_path Qwen/Qwen3-0.6B "
    "--teacher_model_name_or_path Qwen/Qwen3-4B --dataset_name chats/train.jsonl --max_completion_length 256 "
    "--max_steps 500 --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --learning_rate 1e-5 --bf16 "
    "--gradient_checkpointing": Run(f"{CHATS} --bf16 false"),
    "accelerate launch --num_processes 2 -m switchkd train --config train.yaml --output_dir runs/mine": Look(
        "--help", "each process says its help; tests/training/test_distributed.py trains with two"
    ),
    "switchkd prepare --source dolly --dataset_name dolly --output_dir data/dolly": Run(),
    "switchkd train --model_name_or_path S --teacher_model_name_or_path T --dataset_name data/dolly "
    "--dataset_test_split validation --eval_strategy epoch --output_dir runs/dolly": Run(f"{TRAIN} --template none"),
    "switchkd evaluate --model_name_or_path runs/dolly --dataset_name data/dolly": Run(
        f"{SCORE} --template none --decoding_seeds 1"
    ),
    'zcat stories.txt.gz | awk \'BEGIN { RS = "<[|]endoftext[|]>" } { gsub(/[[:space:]]+/, " "); gsub(/^ | $/, ""); '
    'gsub(/[\\\\"]/, "") if (length($0) > 200) printf "{\\"prompt\\": \\"<s>%s\\"}\\n", substr($0, 1, 40) }\' '
    "> stories.jsonl": Run(),
    "switchkd train --config examples/tinystories_switch.yaml --teacher_model_name_or_path TEACHER "
    "--dataset_name stories.jsonl --output_dir runs/tinystories": Run(TRAIN),
    "switchkd rollout --model_name_or_path runs/tinystories --teacher_model_name_or_path TEACHER "
    '--prompt "<s>Once upon a time" --split_special_tokens false --max_completion_length 100': Run(),
    "switchkd train --config examples/gpt2_small_teacher_sft.yaml --tokenizer_name_or_path TOKENIZER "
    "--dataset_name dolly/train.jsonl.gz": Run(f"{TRAIN} --max_prompt_length 400"),
    "switchkd train --config examples/gpt2_small_switch.yaml --dataset_name dolly/train.jsonl.gz": Run(
        f"{TRAIN} --max_prompt_length 400"
    ),
    "switchkd evaluate --model_name_or_path runs/gpt2-student --teacher_model_name_or_path runs/gpt2-teacher "
    "--dataset_name dolly/valid.jsonl --decoding_seeds 10,20 --max_completion_length 64 --batch_size 32": Run(
        f"{SCORE} --max_prompt_length 400"
    ),
}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

#: In README's Python: what stands there -> what stands for it here.
IN_PYTHON = {
    '"Qwen/Qwen3-0.6B"': '"S"',
    '"Qwen/Qwen3-4B"': '"T"',
    'template="chat"': 'template="none"',
    "bf16=True": "use_cpu=True, max_steps=1, max_completion_length=8, per_device_train_batch_size=2",
    'load_dataset("databricks/databricks-dolly-15k", split="train")': (
        'load_dataset("json", data_files="dolly/train.jsonl.gz", split="train")'
    ),
    "max_new_tokens=256": "max_new_tokens=8",
}


def blocks(document: str) -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def files(document: str) -> dict[str, str]:
    """The files that a document tells the reader to save: the title of a block -> its text."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', text, flags=re.MULTILINE | re.DOTALL))


def commands(document: str) -> list[str]:
    """Every shell command, one string each, lines joined and comments removed.

    A block without a language is commands if it begins with a program, otherwise it is what a program prints.
    """
    found: list[str] = []
    for language, text in blocks(document):
        if not (language in SHELLS or (not language and text.split(maxsplit=1)[0] in PROGRAMS)):
            continue
        pending = ""
        for line in text.splitlines():
            pending = f"{pending}\n{line}" if pending else line
            if pending.count("'") % 2 or pending.endswith("\\"):
                continue
            if pending.strip():
                found.append(re.sub(r"\\\n|(?:^|\s)#.*$", " ", pending).strip())
            pending = ""
        assert not pending, f"{document}: a command does not end: {pending}"
    return found


def words(command: str) -> str:
    """The command with single blanks, as it stands in `RUN`."""
    return re.sub(r"\s+", " ", command)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that the documents speak of, as the current one."""
    levels = transformers.logging.get_verbosity(), datasets.logging.get_verbosity()
    tokenizer = build_tokenizer()
    tiny = build_llama(seed=3, num_hidden_layers=5)
    for name, model in {
        "S": build_gpt2(seed=1),
        "T": build_gpt2(seed=2),
        "TEACHER": tiny,
        "runs/gpt2-sft": build_gpt2(seed=1, n_positions=512),  # an Alpaca prompt, a character a token
        "runs/gpt2-xl-sft": build_gpt2(seed=2, n_positions=512),
        "runs/demo/teacher": tiny,
    }.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "TOKENIZER")
    tokenizer.chat_template = CHAT_TEMPLATE
    for name, seed in {"Qwen/Qwen3-0.6B": 1, "Qwen/Qwen3-4B": 2}.items():
        build_llama(seed=seed, max_position_embeddings=512).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    answers = "".join(json.dumps(row) + "\n" for row in RAGGED_ROWS)
    instructions = "".join(
        json.dumps({"instruction": row["prompt"], "input": "", "output": row["completion"]}) + "\n"
        for row in RAGGED_ROWS
    )
    for name, text in {
        "train.jsonl": answers,
        "test.jsonl": answers,
        "runs/demo/data/train.jsonl": answers,
        "runs/demo/data/test.jsonl": answers,
        "dolly/valid.jsonl": instructions,
        "dolly/dev.jsonl": instructions,
        "dolly/train.jsonl.gz": instructions,
        "chats.jsonl": answers,
        "qa.csv": "query,reply\nHow many?,2\nWhy not?,no reason\n",
        "questions.csv": "question,answer\nHow many?,2\nWhy not?,no reason\n",
        "stories.txt.gz": "<|endoftext|>".join(f"Story {n}. " + "Once there was a fox. " * 12 for n in range(4)),
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    for name, source in files(GUIDE).items():
        (tmp_path / name).write_text(source)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    judge = StandIn(lambda request: completion("[[C]]"))
    for name, value in {"OPENAI_BASE_URL": judge.url, "OPENAI_MODEL": "judge", "no_proxy": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    judge.shutdown()
    judge.server_close()
    # The commands quiet these libraries for the whole process.
    transformers.logging.set_verbosity(levels[0])
    datasets.logging.set_verbosity(levels[1])
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()


def execute(command: str, options: str, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """Run one command and return its exit code; switchkd runs in this process, as `python -m switchkd` does."""
    if not command.startswith("switchkd "):
        line = f"{command} {options}".strip()
        here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line], timeout=60, env={**os.environ, "PATH": here}
        ).returncode
    command, _, file = command.partition(" > ")
    monkeypatch.setattr(sys, "argv", shlex.split(f"{command} {options}"))
    try:
        with contextlib.ExitStack() as stack:
            if file:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(file, "w"))))
            runpy.run_module("switchkd", run_name="__main__")
    except SystemExit as done:
        return done.code
    return 0


def test_every_documented_command_is_known_and_every_known_one_is_documented():
    documented = {words(command) for document in DOCUMENTS for command in commands(document)}
    assert documented - set(RUN) == set(), "say in RUN how to run it"
    assert set(RUN) - documented == set(), "no document has it any more"


@pytest.mark.slow
def test_every_documented_command_runs(folder, monkeypatch, capfd):
    # In the order of the documents: later commands go on with what earlier ones left.
    for command in dict.fromkeys(command for document in DOCUMENTS for command in commands(document)):
        how = RUN[words(command)]
        capfd.readouterr()
        code = execute(command, how.options, monkeypatch)
        assert code in (0, None), f"{command}\n{capfd.readouterr().err}"
    (python,) = [text for language, text in blocks(GUIDE) if language == "python" and text not in files(GUIDE).values()]
    given: dict[str, Any] = {}
    exec(compile(python, GUIDE, "exec"), given)
    assert isinstance(given["answer"], str)


def test_the_python_of_the_readme_runs(folder):
    source = "\n".join(text for language, text in blocks("README.md") if language == "python")
    for there, here in IN_PYTHON.items():
        assert there in source, f"README.md has it no more: {there}"
        source = source.replace(there, here)
    tokenizer = build_tokenizer()
    prompts = tokenizer([row["prompt"] for row in RAGGED_ROWS[:3]], padding=True, return_tensors="pt")
    given = {
        "student": build_gpt2(seed=1),
        "teacher": build_gpt2(seed=2),
        "tokenizer": tokenizer,
        "prompt_ids": prompts["input_ids"],
        "prompt_mask": prompts["attention_mask"],
    }
    exec(compile(source, "README.md", "exec"), given)
    assert given["trainer"].state.global_step == 1
    assert given["rollout"].completion_mask.any()
