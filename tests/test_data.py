"""Records to tokens to blocks: what is trained, what is refused and named, and that nothing is lost in packing."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from liger_deploy.data import IGNORED, BadRecordError, Document, encode, pack, read_corpus
from liger_deploy.errors import UserError
from liger_deploy.export import EMBEDDED

END = 0  # the embedded tokenizer's BOS and EOS
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(EMBEDDED)


def trained(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(document.labels[document.labels != IGNORED])


def test_alpaca_trains_the_response(tokenizer: PreTrainedTokenizerBase) -> None:
    document = encode({"instruction": "Add.", "input": "1 + 1", "output": "It is 2."}, tokenizer)
    assert trained(document, tokenizer) == "It is 2.<|endoftext|>"
    text = tokenizer.decode(document.ids)
    assert text.startswith("<|endoftext|>Below is an instruction that describes a task, paired with an input")
    assert "### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\nIt is 2." in text
    assert "### Input" not in tokenizer.decode(encode({"instruction": "Say.", "output": "x"}, tokenizer).ids)
    both = encode({"instruction": "Say.", "output": "x"}, tokenizer, train_on_prompt=True)
    assert (both.labels == both.ids).all()


def test_chat_trains_the_assistant(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHAT
    turns = [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Bye"),
        ("assistant", "So long."),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    document = encode({"messages": messages}, tokenizer)
    assert trained(document, tokenizer) == "Hello.\nSo long.\n<|endoftext|>"
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(document.ids) == f"<|endoftext|>{whole}<|endoftext|>"
    tokenizer.chat_template = None
    with pytest.raises(BadRecordError, match="no chat template"):
        encode({"messages": messages}, tokenizer)


def test_text_trains_all_of_it(tokenizer: PreTrainedTokenizerBase) -> None:
    document = encode({"text": "def f(): pass"}, tokenizer)
    assert (document.ids == document.labels).all()
    assert document.ids[0] == document.ids[-1] == END


def test_bad_records_are_counted_and_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    lines = [
        '{"text": "fine"}',
        "{not json",
        '{"instruction": "x", "output": ""}',
        '{"instruction": 3, "output": "y"}',
        "[1, 2]",
        "",
        '{"question": "x"}',
        '{"messages": [{"role": "user", "content": "x"}]}',
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    corpus = read_corpus(str(tmp_path / "d.jsonl"), tokenizer)
    assert len(corpus.documents) == 1
    assert [place for place, _ in corpus.skipped] == [f"d.jsonl, line {n}" for n in (2, 3, 4, 5, 7, 8)]
    reasons = [reason for _, reason in corpus.skipped]
    assert reasons[0].startswith("not JSON: Expecting property name")
    assert reasons[1:] == [
        "'output' is empty",
        "'instruction' must be text",
        "a record must be an object, not list",
        "it has neither 'output', 'messages' nor 'text'",
        "no message of the assistant",
    ]
    assert corpus.summary().startswith("1 records, 4 tokens; 6 skipped (d.jsonl, line 2: not JSON")


def test_folders_lists_and_text_files(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    (tmp_path / "in" / "b.txt").write_text("three")
    (tmp_path / "c.bin").write_bytes(b"\x00")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    corpus = read_corpus(str(tmp_path), tokenizer)
    assert sorted(tokenizer.decode(d.ids[1:-1]) for d in corpus.documents) == ["one", "three", "two"]
    assert corpus.skipped == [("d.txt", "not UTF-8 at byte 0")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", "{}\n", "has no record to train on: 0 records, 0 tokens; 1 skipped"),
        ("x.json", '{"text": "a"}', "must hold a JSON list"),
        ("x.json", "", "must hold a JSON list"),
        ("x.txt", " \n", "'text' is empty"),
    ],
)
def test_nothing_to_train_on(
    name: str, content: str, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_corpus(str(tmp_path / name), tokenizer)


def test_missing_data(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="is missing"):
        read_corpus(str(tmp_path / "absent.jsonl"), tokenizer)
    with pytest.raises(UserError, match="has no data files"):
        read_corpus(str(tmp_path), tokenizer)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["text", "output", "messages", "role"]), x),
    max_leaves=9,
)


@settings(max_examples=200, deadline=None)
@given(record=JSON)
def test_any_record_is_used_or_named(record: object, tokenizer: PreTrainedTokenizerBase) -> None:
    with contextlib.suppress(BadRecordError):
        assert len(encode(record, tokenizer).ids) > 1


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30), length=st.integers(4, 32))
def test_packing_loses_and_leaks_nothing(lengths: list[int], length: int) -> None:
    documents, start = [], 1
    for count in lengths:
        ids = np.arange(start, start + count)
        documents.append(Document(ids, ids.copy()))
        start += count
    seen: list[int] = []
    for block in pack(documents, length):
        ids, labels, segments = (block[key] for key in ("input_ids", "labels", "segment_ids"))
        assert len(ids) == len(labels) == len(segments) == length
        assert (np.diff(segments[segments > 0]) >= 0).all()
        for number in range(1, segments.max() + 1):
            place = np.flatnonzero(segments == number)
            assert (np.diff(place) == 1).all()
            assert (np.diff(ids[place]) == 1).all()  # one document's tokens, in order
            assert labels[place[0]] == IGNORED
            assert (labels[place[1:]] == ids[place[1:]]).all()
            seen += ids[place].tolist()
        assert (labels[segments == 0] == IGNORED).all()
    lost = set(range(1, start)) - set(seen)
    assert len(seen) == len(set(seen))
    # Only whole blocks without a label are dropped: pieces of one token have none.
    assert len(lost) <= sum(count % length == 1 for count in lengths)


def test_concatenated_blocks_are_the_stream() -> None:
    documents = [Document(np.arange(a, b), np.arange(a, b)) for a, b in ((1, 8), (8, 10), (10, 31))]
    blocks = pack(documents, 9, "concatenate")
    assert np.concatenate([b["input_ids"] for b in blocks]).tolist() == list(range(1, 28))
    assert all((b["segment_ids"] == 1).all() for b in blocks)
