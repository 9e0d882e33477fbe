"""Reading training rows: the accepted forms, and what is said about the others."""

from __future__ import annotations

import gzip
import json
import math

import pytest

import dts
from dts.training.data import Row, read_rows

GOOD = {"prompt": "a", "response": "b"}


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def test_accepted_forms_and_sources(tmp_path):
    user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "s"}
    file = write(
        tmp_path / "rows.jsonl",
        GOOD,
        "",
        {"messages": [system, user, {"role": "assistant", "content": "b"}], "engagement": 3, "group": 7},
        {"prompt": [user], "completion": [{"role": "assistant", "content": "b"}], "thread": "t"},
        {"source_text": "s", "post_text": "p", "reply_text": "r", "reply_likes": 2, "thread": 0},
        {"source_text": "s", "post_text": "s", "reply_text": "r", "reply_likes": 0, "thread": 0},
    )
    rows = read_rows(str(tmp_path / "*.jsonl"))
    assert rows[0] == Row([user], "b", None, None, f"{file}:1")
    assert rows[1] == Row([system, user], "b", 3.0, "7", f"{file}:3")
    assert rows[2] == Row([user], "b", None, "t", f"{file}:4")
    assert (rows[3].response, rows[3].engagement, rows[3].group) == ("r", math.log1p(2), "0")
    assert rows[3].prompt[0]["content"].endswith("s\n\np")
    assert rows[4].prompt[0]["content"].endswith("\n\ns")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as packed:
        packed.write(json.dumps(GOOD))
    assert len(read_rows([file, file, tmp_path / "rows.jsonl.gz"])) == 6  # a file named twice counts once


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"response": "b"}, r'the row has no prompt; add "prompt"'),
        ({"prompt": "a"}, r'the row has no response; add "response" or "completion"'),
        ({"prompt": " ", "response": "b"}, "prompt is ' '; give text"),
        ({**GOOD, "engagement": math.nan}, "engagement is nan; give a finite number"),
        ({**GOOD, "engagement": "many"}, "engagement is 'many'"),
        ({**GOOD, "engagement": 10**400}, "give a finite number"),
        ({"source_text": "s", "reply_text": "r", "reply_likes": -1}, "reply_likes is -1; give a count >= 0"),
        ({"prompt": [{"role": "user"}], "response": "b"}, "is not a message"),
        ({"prompt": [{"role": "boss", "content": "a"}], "response": "b"}, "role 'boss' is unknown"),
        ({"prompt": [{"role": "assistant", "content": "a"}], "response": "b"}, "ends with an assistant message"),
        ({**GOOD, "group": 1.5}, "group is 1.5"),
        ("{not json}", "not valid JSON"),
        ("[1]", "list instead of an object"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path, record, reason):
    file = write(tmp_path / "rows.jsonl", GOOD, record)
    with pytest.raises(dts.UsageError, match=reason) as raised:
        read_rows(file)
    assert str(raised.value).startswith(f"{file}:2: ")
    assert "\n" not in str(raised.value)


def test_needs_are_the_callers(tmp_path):
    file = write(tmp_path / "rows.jsonl", {"prompt": "a"})
    assert read_rows(file, need=["prompt"])[0].response is None
    write(tmp_path / "cut.jsonl", '{"prompt": "a", "response": "b", "cut": true}\n{"prompt": "a", "response": "b"}\n')
    assert [row.cut for row in read_rows(tmp_path / "cut.jsonl")] == [True, False]
    with pytest.raises(dts.UsageError, match=r'has no group; add "group" or "thread"'):
        read_rows(file, need=["prompt", "group"])
    with pytest.raises(dts.UsageError, match="need="):
        read_rows(file, need=["reply"])


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(dts.UsageError, match="the file has no rows"):
        read_rows(write(tmp_path / "empty.jsonl", "", " "))
    with pytest.raises(dts.UsageError, match="there is no such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(dts.UsageError, match="no data file was named"):
        read_rows([])
    (tmp_path / "bad.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(dts.UsageError, match="cannot be read"):
        read_rows(tmp_path / "bad.jsonl.gz")


def test_the_real_replies(shared_data):
    rows = read_rows(shared_data / "tweet_replies.jsonl.gz", need=["prompt", "response", "engagement", "group"])
    assert len(rows) == 2856
    assert len({row.group for row in rows}) == 194
    assert sum(row.engagement > 0 for row in rows) == 795
    assert max(row.engagement for row in rows) == pytest.approx(math.log(453))
