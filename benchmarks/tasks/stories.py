"""Beginnings of short stories to continue, from a file of stories separated by `<|endoftext|>`.

    python benchmarks/tasks/stories.py --stories tinystories_sample.txt.gz --output_dir runs/stories

writes `data/train.jsonl`, `data/validation.jsonl` and `data/test.jsonl`, rows of `prompt` (the first characters of a
story) and `completion` (those that follow it). A story is in one split only.
"""

import argparse
import gzip
import json
import random
from pathlib import Path

SEPARATOR = "<|endoftext|>"


def read_stories(path: Path, characters: int) -> list[str]:
    """Return the different stories of at least that many characters, each on one line, in the order of the file."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        stories = [" ".join(story.split()) for story in file.read().split(SEPARATOR)]
    return [story for story in dict.fromkeys(stories) if len(story) >= characters]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, required=True, help="text file, .gz or plain")
    parser.add_argument("--output_dir", type=Path, required=True, help="where to write")
    parser.add_argument("--prompt_characters", type=int, default=40, help="length of a prompt")
    parser.add_argument("--completion_characters", type=int, default=96, help="length of a completion")
    parser.add_argument("--begin", default="<s>", help="what stands before every prompt")
    parser.add_argument("--held_out", type=int, default=200, help="stories of the test set, and of the validation set")
    options = parser.parse_args()
    length = options.prompt_characters + options.completion_characters
    stories = read_stories(options.stories, length)
    random.Random(0).shuffle(stories)
    held_out = options.held_out
    splits = {
        "test": stories[:held_out],
        "validation": stories[held_out : 2 * held_out],
        "train": stories[2 * held_out :],
    }
    folder = options.output_dir / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in splits.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for story in chosen:
                prompt, completion = story[: options.prompt_characters], story[options.prompt_characters : length]
                file.write(json.dumps({"prompt": options.begin + prompt, "completion": completion}) + "\n")
    print(", ".join(f"{name}: {len(chosen)} stories" for name, chosen in splits.items()), "in", folder)


if __name__ == "__main__":
    main()
