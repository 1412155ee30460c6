"""Training data: records from files, folders or the hub -> token ids and labels -> blocks of one length.

A record is an object of one of three kinds:

    {"instruction": ..., "input": ..., "output": ...}     Alpaca's; loss on the output alone
    {"messages": [{"role": ..., "content": ...}, ...]}    a chat; loss on the assistant's messages alone
    {"text": ...}                                         plain text; loss on all of it

A file is `.jsonl` (a record a line), `.json` (a list of records) or text (one record). A record that cannot be used is
not an error: it is kept in `Corpus.skipped` with its place and the reason, for the caller to report.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from liger_deploy.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # a label that takes no part in the loss, as in torch.nn.functional.cross_entropy
OPEN_BLOCKS = 16  # blocks that packing fills side by side
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
RECORD_SUFFIXES = (".jsonl", ".json")
Packing = Literal["isolate", "concatenate"]
Ids = npt.NDArray[np.int64]

# Alpaca's two templates (github.com/tatsu-lab/stanford_alpaca), which the paper's recipe uses.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)


class BadRecordError(ValueError):
    """A record that cannot be used; the message says why."""


@dataclass(frozen=True)
class Document:
    """One record's tokens [T] int64, and its labels [T]: the token itself where it is trained, else IGNORED."""

    ids: Ids
    labels: Ids


@dataclass
class Corpus:
    """Documents of a data source, and the records that could not be used: (place, reason)."""

    documents: list[Document] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def summary(self) -> str:
        """One line for a person: how many were used, and the first that were not."""
        line = f"{len(self.documents)} records, {sum(len(d.ids) for d in self.documents):,} tokens"
        if self.skipped:
            first = "; ".join(f"{where}: {why}" for where, why in self.skipped[:3])
            line += f"; {len(self.skipped)} skipped ({first}{' ...' if len(self.skipped) > 3 else ''})"
        return line


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory. Raises CheckpointError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} has no usable tokenizer: {str(error).splitlines()[0]}") from None


def read_corpus(source: str, tokenizer: PreTrainedTokenizerBase, train_on_prompt: bool = False) -> Corpus:
    """Every record of `source` (a file, a folder of files, or a hub data set's id), encoded.

    Raises:
        UserError: nothing there, not readable, or no record that can be used.
    """
    corpus = Corpus()
    for where, record in _records(source):
        try:
            corpus.documents.append(encode(record, tokenizer, train_on_prompt))
        except BadRecordError as error:
            corpus.skipped.append((where, str(error)))
    if not corpus.documents:
        raise UserError(f"{source} has no record to train on: {corpus.summary()}")
    return corpus


def encode(record: object, tokenizer: PreTrainedTokenizerBase, train_on_prompt: bool = False) -> Document:
    """Token ids and labels of one record, begun by the tokenizer's BOS and ended by its EOS where it has them.

    Raises:
        BadRecordError: not one of the three kinds, or with nothing to train on.
    """
    if isinstance(record, BadRecordError):
        raise record
    if not isinstance(record, dict):
        raise BadRecordError(f"a record must be an object, not {type(record).__name__}")
    for key, parts in (("messages", _chat), ("output", _alpaca), ("text", _text)):
        if key in record:
            return _join(parts(record, tokenizer), tokenizer, train_on_prompt)
    raise BadRecordError("it has neither 'output', 'messages' nor 'text'")


def pack(documents: Iterable[Document], length: int, packing: Packing = "isolate") -> list[dict[str, Ids]]:
    """Blocks of `length` tokens: input_ids, labels and segment_ids, each [length] int64.

    "isolate" numbers the documents of a block from 1 (0 is padding), so that neither state nor attention crosses from
    one to the next; a document longer than a block is cut, each part on its own. "concatenate" is the reference code's
    way: one stream cut into blocks whose documents see their predecessors; what is left over is dropped. Blocks without
    a label are dropped in both.
    """
    blocks = _isolated(documents, length) if packing == "isolate" else _concatenated(documents, length)
    return [block for block in blocks if (block["labels"][1:] != IGNORED).any()]


def _isolated(documents: Iterable[Document], length: int) -> Iterator[dict[str, Ids]]:
    """First fit: each piece goes into the oldest open block that has room for it."""
    blocks: list[list[Document]] = []
    for document in documents:
        for start in range(0, len(document.ids), length):
            piece = Document(document.ids[start : start + length], document.labels[start : start + length])
            room = (block for block in blocks if sum(len(x.ids) for x in block) + len(piece.ids) <= length)
            block = next(room, None)
            if block is None:
                blocks.append([piece])
            else:
                block.append(piece)
        if len(blocks) > OPEN_BLOCKS:
            yield _block(blocks.pop(0), length)
    yield from (_block(block, length) for block in blocks)


def _block(pieces: list[Document], length: int) -> dict[str, Ids]:
    """A document's first token is predicted by nothing: the token before it belongs to another."""
    segments = [np.full(len(piece.ids), number + 1) for number, piece in enumerate(pieces)]
    labels = [np.concatenate([[IGNORED], piece.labels[1:]]) for piece in pieces]
    pad = length - sum(len(piece.ids) for piece in pieces)
    return {
        "input_ids": np.concatenate([*(piece.ids for piece in pieces), np.zeros(pad, np.int64)]),
        "labels": np.concatenate([*labels, np.full(pad, IGNORED)]),
        "segment_ids": np.concatenate([*segments, np.zeros(pad, np.int64)]),
    }


def _concatenated(documents: Iterable[Document], length: int) -> Iterator[dict[str, Ids]]:
    held = [np.zeros(0, np.int64), np.zeros(0, np.int64)]
    for document in documents:
        held = [np.concatenate([a, b]) for a, b in zip(held, (document.ids, document.labels), strict=True)]
        while len(held[0]) >= length:
            yield {"input_ids": held[0][:length], "labels": held[1][:length], "segment_ids": np.ones(length, np.int64)}
            held = [x[length:] for x in held]


def _records(source: str) -> Iterator[tuple[str, object]]:
    """(place, record) pairs; a record that is not even JSON is a BadRecordError in its place."""
    path = Path(source)
    if path.is_dir():
        suffixes = (*RECORD_SUFFIXES, *TEXT_SUFFIXES)
        files = sorted(p for p in path.rglob("*") if p.suffix in suffixes and p.is_file())
        if not files:
            raise UserError(f"{path} has no data files: {', '.join(suffixes)}")
        for file in files:
            yield from _file_records(file)
    elif path.is_file():
        yield from _file_records(path)
    elif source.count("/") == 1 and not source.startswith((".", "/")):
        yield from _hub_records(source)
    else:
        raise UserError(f"{source} is missing: --data takes a file, a folder or a hub data set's id")


def _file_records(path: Path) -> Iterator[tuple[str, object]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        yield path.name, BadRecordError(f"not UTF-8 at byte {error.start}")
        return
    except OSError as error:
        raise UserError(f"{path} is not readable: {error.strerror}") from None
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path.name}, line {number}", _json(line)
    elif path.suffix == ".json":
        records = _json(text)
        if not isinstance(records, list):
            raise UserError(f"{path} must hold a JSON list of records" + (f": {records}" if text else ": it is empty"))
        yield from ((f"{path.name}, record {number}", record) for number, record in enumerate(records, 1))
    else:
        yield path.name, {"text": text}


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRecordError(f"not JSON: {error}")


def _hub_records(source: str) -> Iterator[tuple[str, object]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"data set {source!r} is on the hub, which needs datasets: pip install datasets") from None
    try:
        rows = load_dataset(source, split="train")
    except Exception as error:
        raise UserError(f"data set {source!r} could not be loaded: {type(error).__name__}") from None
    yield from ((f"{source}, row {number}", dict(row)) for number, row in enumerate(rows, 1))


# Each kind of record as a list of (text, whether it is trained).
Parts = list[tuple[str, bool]]


def _alpaca(record: dict[str, Any], _: PreTrainedTokenizerBase) -> Parts:
    values = {key: _string(record, key) for key in ("instruction", "output")}
    given = _string(record, "input") if record.get("input") else ""
    prompt = (ALPACA_WITH_INPUT if given else ALPACA).format(instruction=values["instruction"], input=given)
    return [(prompt, False), (values["output"], True)]


def _text(record: dict[str, Any], _: PreTrainedTokenizerBase) -> Parts:
    return [(_string(record, "text"), True)]


def _chat(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Parts:
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BadRecordError("'messages' must be a list of objects")
    for message in messages:
        for key in ("role", "content"):
            _string(message, key)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRecordError("no message of the assistant")
    if not getattr(tokenizer, "chat_template", None):
        raise BadRecordError("the tokenizer has no chat template")
    parts: Parts = []
    done = ""
    for i, message in enumerate(messages):
        trained = message["role"] == "assistant"
        for upto, prompt, train in ((i, True, False), (i + 1, False, True)) if trained else ((i + 1, False, False),):
            try:
                text = str(tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=prompt))
            except Exception as error:  # templates raise what they like
                raise BadRecordError(f"the chat template refuses it: {error}") from None
            if not text.startswith(done):
                raise BadRecordError("the chat template rewrites earlier messages: loss cannot be confined to answers")
            parts.append((text[len(done) :], train))
            done = text
    return parts


def _string(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise BadRecordError(f"it has no {key!r}" if value is None else f"{key!r} must be text")
    if not value.strip():
        raise BadRecordError(f"{key!r} is empty")
    return value


def _join(parts: Parts, tokenizer: PreTrainedTokenizerBase, train_on_prompt: bool) -> Document:
    ids: list[int] = []
    labels: list[int] = []
    for text, trained in parts:
        new = tokenizer(text, add_special_tokens=not ids, verbose=False)["input_ids"]
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if not ids and bos is not None and new[:1] != [bos]:
            new = [bos, *new]
        if not ids and len(new) > 1 and eos is not None and new[-1] == eos:
            new = new[:-1]  # some tokenizers end every text; a record is ended below, once
        ids += new
        labels += new if trained or train_on_prompt else [IGNORED] * len(new)
    if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id if parts[-1][1] or train_on_prompt else IGNORED)
    return Document(np.array(ids, np.int64), np.array(labels, np.int64))
