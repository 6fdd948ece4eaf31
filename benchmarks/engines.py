"""Rollouts on vLLM against the transformers engine, the same models and prompts, measured side by side in one run.

    python benchmarks/engines.py --python .venv-vllm/bin/python --batch_sizes 8 32
    python benchmarks/engines.py --python ... --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B --batch_sizes 64

Without names, random LLaMA models of 7M and 97M parameters are made. At each batch size and teacher share both engines
write in turn, `--repeats` times over after one round to warm up, and the medians are compared. The last line of stdout
is one JSON object.
"""

import argparse
import json
import platform
import statistics
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import switchkd

SHARES = (0.1, 0.5)
VOCABULARY, PROMPT = 16384, 32
SHAPES = {"student": (256, 4), "teacher": (768, 12)}


def made(role: str) -> Any:
    """Return a random model; the two are related by nothing."""
    hidden, layers = SHAPES[role]
    torch.manual_seed(layers)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).float().eval()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="the Python of an environment with vLLM")
    parser.add_argument("--student")
    parser.add_argument("--teacher")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--draft_length", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gpu_memory_utilization", type=float)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {}
    for role in ("student", "teacher"):
        name = getattr(options, role)
        model = made(role) if name is None else AutoModelForCausalLM.from_pretrained(name)
        models[role] = model.to(device, getattr(torch, options.dtype)).eval()
    student, teacher = models["student"], models["teacher"]
    rows = []
    with switchkd.vllm.Engine(
        student,
        teacher,
        python=options.python,
        draft_length=options.draft_length,
        max_model_len=PROMPT + options.new_tokens + 2 * (options.draft_length + 1),
        max_num_seqs=max(options.batch_sizes),
        gpu_memory_utilization=options.gpu_memory_utilization,
    ) as engine:
        for batch in options.batch_sizes:
            torch.manual_seed(batch)
            prompts = torch.randint(3, engine.vocabulary_size, (batch, PROMPT), device=device)
            common: dict[str, Any] = {"max_new_tokens": options.new_tokens}
            always = switchkd.SwitchPolicy(initial_threshold=0.0, schedule="constant")
            probe = switchkd.roll_out(student, teacher, prompts, policy=always, max_new_tokens=16)
            for share in SHARES:
                threshold = float(probe.divergence.quantile(1 - share))
                common["policy"] = switchkd.SwitchPolicy(initial_threshold=threshold, schedule="constant")
                seconds: dict[str, list[float]] = {"vllm": [], "transformers": []}
                for repeat in range(options.repeats + 1):
                    started = time.perf_counter()
                    found = engine.roll_out(prompts, seed=repeat, **common)
                    middle = time.perf_counter()
                    wanted = switchkd.roll_out(student, teacher, prompts, seed=repeat, **common)
                    if repeat:
                        seconds["vllm"].append(middle - started)
                        seconds["transformers"].append(time.perf_counter() - middle)
                tokens = batch * options.new_tokens
                speed = {name: tokens / statistics.median(times) for name, times in seconds.items()}
                row = {
                    "batch": batch,
                    "teacher_share": round(wanted.teacher_share, 3),
                    "equal_tokens": float((found.completion_ids == wanted.completion_ids).float().mean()),
                    **{f"{name}_tokens_per_s": round(value, 1) for name, value in speed.items()},
                    "ratio": round(speed["vllm"] / speed["transformers"], 2),
                }
                print(row, flush=True)
                rows.append(row)
        facts = engine.facts
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "vllm": facts["version"]}
    place = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} thread"
    )
    print(json.dumps({"rows": rows, "runner": facts["runner"], "dtype": options.dtype, "device": place, **versions}))


if __name__ == "__main__":
    main()
