"""The published data of the protocol: where each source is, how it is split, which of its records count; no import."""

from collections.abc import Mapping
from dataclasses import dataclass, field

#: The splits that a source may have, in the order in which they are written.
SPLITS = ("train", "validation", "test")
#: Version of the rules of this file and of `switchkd.data.protocol`, noted in every `prepared.json`.
RULES = 1


@dataclass(frozen=True)
class Source:
    """One source of the protocol.

    Attributes:
        name: What `--source` calls it.
        summary: One line.
        hub_id: Where it is read from if no file is named; None for data of the user's own.
        stems: Split -> names, without endings, of the files that hold it, the first that is there.
        subfolder: Folder of the published files to prefer where several have such a name.
        whole: Where one file holds all: the split that its records go to, once `sizes` are taken out.
        sizes: Split -> records that are taken out of a whole file.
        min_response_words: Records with a shorter (first) response are left out; None keeps all.
        max_samples: The first records, after that filter, that a split keeps; None keeps all.
        published: Split -> records that the papers have.
        published_overlap: "test in train" -> prompts of the published split that occur in both.
        reference: Where the rules are from.
    """

    name: str
    summary: str
    hub_id: str | None
    stems: Mapping[str, tuple[str, ...]]
    subfolder: str | None = None
    whole: str = "test"
    sizes: Mapping[str, int] = field(default_factory=dict)
    min_response_words: int | None = None
    max_samples: int | None = None
    published: Mapping[str, int] = field(default_factory=dict)
    published_overlap: Mapping[str, int] = field(default_factory=dict)
    reference: str = ""


_TEST = {"test": ("test", "valid")}  # the papers' files of test sets are called valid
_MINILLM = "Gu et al., arXiv 2306.08543, and its public data"

#: Name -> source, in the order of the papers' tables.
SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            name="dolly",
            summary="instructions to train on, validate and test with",
            hub_id="MiniLLM/dolly",
            stems={"train": ("train",), "validation": ("dev", "validation"), "test": ("test", "valid")},
            whole="train",
            sizes={"validation": 1000, "test": 500},
            published={"train": 11_435, "validation": 1000, "test": 500},
            published_overlap={"test in train": 9, "validation in train": 27},
            reference=_MINILLM,
        ),
        Source(
            name="self_instruct",
            summary="user-oriented instructions, test only",
            hub_id="MiniLLM/self-inst",
            stems=_TEST,
            published={"test": 242},
            reference=f"Wang et al., arXiv 2212.10560; {_MINILLM}",
        ),
        Source(
            name="vicuna",
            summary="80 open questions, test only",
            hub_id="MiniLLM/Vicuna",
            stems=_TEST,
            published={"test": 80},
            reference=f"Chiang et al., Vicuna, 2023; {_MINILLM}",
        ),
        Source(
            name="sni",
            summary="Super-NaturalInstructions, several references, responses of 11 words and more, test only",
            hub_id="MiniLLM/sinst",
            stems=_TEST,
            subfolder="11_",
            min_response_words=11,
            published={"test": 1694},
            reference=f"Wang et al., arXiv 2204.07705; {_MINILLM}",
        ),
        Source(
            name="unni",
            summary="Unnatural Instructions, responses of 11 words and more, the first 10,000, test only",
            hub_id="MiniLLM/uinst",
            stems=_TEST,
            subfolder="11_",
            min_response_words=11,
            max_samples=10_000,
            published={"test": 10_000},
            reference=f"Honovich et al., arXiv 2212.09689; {_MINILLM}",
        ),
        Source(
            name="custom",
            summary="data of your own in any shape that training reads",
            hub_id=None,
            stems={"train": ("train",), "validation": ("validation", "valid", "dev", "val"), "test": ("test",)},
            whole="train",
        ),
    )
}
