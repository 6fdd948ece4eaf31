"""Pages: one file, nothing loaded, nothing of a model's text taken for HTML, readable in every theme."""

import base64
import hashlib
import re
from importlib import resources

import pytest
from helpers.pages import Document

from switchkd.errors import UserError
from switchkd.page import document as document_module
from switchkd.page.document import Answers, Figure, Page, Section, Table, Text, check_file, render, write
from switchkd.page.rollouts import rollouts_page
from switchkd.page.writers import SHOWN_TOKENS, check_row, view, within

EVIL = "</script></style><script>alert('x')</script><img src=x onerror=alert(1)>\"'`&amp;\ud83d\x00\u2028"
SHOWN = EVIL.replace("\ud83d", "\\ud83d").replace("\x00", "\\x00").replace("\u2028", "\\u2028")


def row(tokens, authors, **more):
    return {
        "prompt": "Q: ",
        "tokens": tokens,
        "author": authors,
        "divergence": [0.25] * len(tokens),
        "threshold": [0.125] * len(tokens),
        "measured": "jsd_nats",
        "unit": "nats",
        "finish_reason": "length",
    } | more


def evil_page():
    top = [{"student": [{"token": EVIL, "id": 1, "probability": 0.5}], "teacher": []}]
    rollout = view(row([EVIL], ["teacher"], prompt=EVIL, top_tokens=top, drafted=[EVIL]), EVIL, EVIL)
    blocks = [
        Table(EVIL, [EVIL], [[EVIL]], EVIL, EVIL),
        Figure(EVIL, [], [EVIL], [[EVIL]], EVIL, EVIL, [(0, EVIL)], EVIL),
        Answers(EVIL, EVIL, [EVIL], [(EVIL, EVIL, EVIL)]),
        Text(EVIL, EVIL),
        rollout,
    ]
    return Page(EVIL, EVIL, [(EVIL, [EVIL])], [Section(EVIL, blocks, [EVIL], legend=True), Section("other")], [EVIL])


def test_text_of_a_model_is_never_html():
    text = render(evil_page())
    text.encode()
    document = Document(text)
    script = resources.files("switchkd.page").joinpath("page.js").read_text(encoding="utf-8")
    assert [data for tag, data in document.texts if tag == "script"] == [script]
    assert document.of("img") == [] and len(document.of("style")) == 1
    assert document.loads() == []
    assert document.strays == [] and document.open == []
    for tag in ("h1", "h2", "h3", "th", "td", "dd", "pre", "summary", "li"):
        assert SHOWN in document.text(tag), tag
    told = [one["data-told"] for one in document.of("span") if "data-told" in one]
    assert len(told) == 1 and "alert" in told[0] and "50%" in told[0]


def test_the_policy_of_the_page_allows_its_own_script_only():
    document = Document(render(evil_page()))
    (policy,) = [one["content"] for one in document.of("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    (script,) = [data for tag, data in document.texts if tag == "script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")


def test_the_draft_that_the_teacher_replaced_is_told_and_in_the_file():
    shown = view(row(["a", "b", "c"], ["student", "teacher", "teacher"], drafted=["a", "x", "c"]), "", "")
    told = [token.told for run in shown.runs for token in run.tokens]
    assert ["drafted" in one for one in told] == [False, True, True]
    assert "the student drafted 'x'" in told[1] and [line[3] for line in shown.rows] == ["a", "x", "c"]
    for damaged in (None, "axc", [1, 2], []):
        assert not any("drafted" in token.told for run in view(row(["a"], ["teacher"], drafted=damaged), "", "").runs
                       for token in run.tokens)  # fmt: skip


def test_writers_are_marked_and_every_token_says_what_was_measured():
    authors = ["student", "teacher", "teacher", "student"]
    document = Document(
        render(rollouts_page([row(["a", " b", " ", "d"], authors)], {"policy": "switch", "seed": 0}, ""))
    )
    runs = [one["class"] for one in document.of("span") if str(one.get("class")).startswith("run ")]
    assert runs[-3:] == ["run student", "run teacher", "run student"]
    tokens = [one for one in document.of("span") if one.get("class") == "k"]
    assert [one["data-told"].split("\n") for one in tokens][1] == [
        "token 2, by the teacher",
        "jsd 0.25, threshold 0.125 nats",
    ]
    assert "a b\N{MIDDLE DOT}d" in document.text("span")
    (lines,) = document.files().values()
    assert [line["author"] for line in lines] == authors and lines[1]["token"] == " b"
    assert [float(line["jsd_nats"]) for line in lines] == [0.25] * 4


def test_a_rollout_too_long_to_show_is_cut_and_says_so():
    length = SHOWN_TOKENS + 5
    found = view(row(["x"] * length, ["student"] * length), "long", "long")
    assert sum(len(run.tokens) for run in found.runs) == SHOWN_TOKENS
    assert f"{length} tokens" in found.facts and "are shown" in found.facts
    assert len(found.rows) == length


def test_rollouts_fill_a_page_and_no_more():
    views = [view(row(["word"] * 200, ["student"] * 200), str(n), str(n)) for n in range(300)]
    shown, left_out = within(views)
    assert 0 < len(shown) < 300 and len(shown) + left_out == 300
    assert len(render(Page("a", "b", sections=[Section("all", shown)])).encode()) < document_module.LARGEST
    alone, rest = within(views, budget=1)
    assert len(alone) == 1 and rest == 299


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        {"prompt": "p"},
        row(["a"], ["student", "teacher"]),
        row(["a"], ["nobody"]),
        row([1], ["student"]),
        row(["a"], ["student"], divergence=["x"]),
        row(["a"], ["student"], prompt=None),
    ],
)
def test_what_is_not_a_rollout_is_refused(wrong):
    with pytest.raises(UserError, match="file, line 3 is not a rollout"):
        check_row(wrong, "file, line 3")


def test_only_pages_of_this_package_are_written_over(tmp_path):
    path = tmp_path / "new" / "page.html"
    write(Page("first", ""), path)
    check_file(path)
    assert write(Page("second", ""), path) == path.stat().st_size
    (tmp_path / "mine.html").write_text("<html>my own</html>")
    with pytest.raises(UserError, match="is not a page of switchkd"):
        check_file(tmp_path / "mine.html")
    with pytest.raises(UserError, match="is a folder"):
        check_file(tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        write(Page("third", ""), tmp_path / "mine.html" / "page.html")


def test_a_page_that_would_be_too_large_is_not_written(tmp_path):
    with pytest.raises(UserError, match="give fewer runs"):
        write(Page("large", "x" * document_module.LARGEST), tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


# ---- the style sheet

STYLE = resources.files("switchkd.page").joinpath("page.css").read_text(encoding="utf-8")
TEXT_ON_GROUND = [
    *(("ink", "paper"), ("soft", "paper"), ("link", "paper"), ("ink", "panel"), ("soft", "panel")),
    *(("teacher-ink", "teacher-paper"), ("dataset-ink", "dataset-paper"), ("tip-ink", "tip-paper")),
    *((f"s{number}", "paper") for number in range(6)),
]


def themes():
    """The colours of the style sheet: light, dark and printed."""
    blocks = re.findall(r":root \{(.*?)\}", STYLE, flags=re.DOTALL)
    light, dark, printed = (dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in blocks)
    return {"light": light, "dark": dark, "printed": {**light, **printed}}


def luminance(colour):
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", ["light", "dark", "printed"])
@pytest.mark.parametrize(("ink", "ground"), TEXT_ON_GROUND)
def test_text_can_be_read(theme, ink, ground):
    colours = themes()[theme]
    dark, light = sorted((luminance(colours[ink]), luminance(colours[ground])))
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_writers_are_told_apart_without_colours():
    for writer in ("teacher", "dataset"):
        rules = re.findall(rf"\.run\.{writer}[^{{]*\{{([^}}]*)\}}", STYLE)
        assert any("text-decoration: underline" in rule for rule in rules)
        assert any("content:" in rule for rule in rules)
    assert "print-color-adjust" in STYLE


def test_the_style_sheet_loads_nothing():
    assert "url(" not in STYLE and "@import" not in STYLE and "http" not in STYLE
