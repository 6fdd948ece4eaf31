"""Lines that are read back say whether they are as they were written."""

import json

import pytest

from switchkd.cli.sealed import append_sealed, read_sealed
from switchkd.errors import UserError

ROWS = [{"ids": [1, 2], "text": "é\u2028 \U0001f600"}, {"value": 0.1 + 0.2, "none": None}, {"ids": []}]


def test_rows_come_back_and_a_cut_last_line_is_taken_out(tmp_path):
    path = tmp_path / "a.jsonl"
    assert read_sealed(path, "resume") == []
    append_sealed(path, ROWS[:2])
    append_sealed(path, ROWS[2:])
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        found = read_sealed(path, "resume")
        assert found == ROWS[: whole[:end].count(b"\n")]
        append_sealed(path, ROWS[len(found) :])
        assert path.read_bytes() == whole


def test_every_changed_byte_is_seen(tmp_path):
    """A changed digit was another answer."""
    path = tmp_path / "a.jsonl"
    append_sealed(path, ROWS)
    whole = path.read_bytes()
    for place in range(len(whole) - 1):  # the last line break stands for a line that was cut
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        try:
            found = read_sealed(path, "resume")
        except UserError as error:
            assert "is damaged; remove that file, or all of it from that line on" in str(error)
        else:
            # Blanks and names of keys that nobody reads: never other values.
            assert found == ROWS, place


def test_lines_without_a_checksum_are_of_an_older_version(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n[1]\n")
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_sealed(path, "resume")
