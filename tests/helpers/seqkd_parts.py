"""Writes a teacher's text as one of several processes; not a test, `test_peers.py` starts it."""

import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from helpers.tiny import RAGGED_ROWS, build_gpt2, build_tokenizer
from switchkd.data import prepare
from switchkd.policies import TeacherPolicy
from switchkd.training import teacher_text


def main(folder: Path, rank: int, ranks: int, most: int) -> None:
    """Write, and count the rows written now; with `most` die once so many are."""
    teacher_text.ROWS_PER_PART = 2
    rows = [{"prompt": f"{row['prompt']} {number}"} for number in range(2) for row in RAGGED_ROWS]
    tokenizer = build_tokenizer()
    data, _ = prepare(Dataset.from_list(rows), tokenizer, max_prompt_length=64, max_completion_length=12)
    roll_out, written = teacher_text.roll_out, 0

    def counted(student: Any, teacher: Any, prompts: Any, **options: Any) -> Any:
        nonlocal written
        if most and written >= most:
            os._exit(9)
        written += len(prompts)
        return roll_out(student, teacher, prompts, **options)

    teacher_text.roll_out = counted
    teacher_text.with_teacher_text(
        data,
        build_gpt2(),
        build_gpt2(seed=1),
        folder / "text.jsonl",
        policy=TeacherPolicy(),
        tokenizer=tokenizer,
        part=(rank, ranks),
        wait=torch.distributed.barrier if ranks > 1 else lambda: None,
        max_new_tokens=12,
        seed=0,
    )
    teacher_text.roll_out = roll_out
    (folder / f"rollouts-{rank}.json").write_text(json.dumps(written))


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    main(
        Path(sys.argv[1]),
        int(os.environ["RANK"]),
        int(os.environ["WORLD_SIZE"]),
        4 if sys.argv[2] == "kill" else 0,
    )
    torch.distributed.barrier()
    os._exit(0)
