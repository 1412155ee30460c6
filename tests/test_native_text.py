"""The C++ tokenizer is Hugging Face's, for the kinds of GPT-2, Llama 3 and Qwen; chat templates in their plain form."""

from __future__ import annotations

import random
import shutil
import string
import unicodedata
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from liger_deploy.bundle import Bundle, Chat
from liger_deploy.export import EMBEDDED, export_bundle
from liger_deploy.text import Text, plain_form, render
from tests.conftest import relisted
from tests.native.programs import ROOT, call, ids, probe

HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + "
    "'<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)


def alphabet() -> list[str]:
    """Pieces that tokenizers trip over: white space, quotes, digits of all scripts, marks, emoji, prose.

    Characters of Unicode 3.2: Hugging Face's normalizer does not know the newest marks, whose order ours puts right.
    """
    chosen = random.Random(1)
    letters = [c for c in map(chr, range(0x250, 0x1F000)) if unicodedata.ucd_3_2_0.category(c)[0] in "LNMPSZ"]
    pieces = [*string.printable, *"  \n\n\t\r''", "\x1c", "\x7f", "\x85", "\xa0", "\u2003", "\u3000", "'\u017f", "'Re"]
    pieces += ["don't", "I'LL", "<|endoftext|>", "    ", "\r\n", "12345", "\u0967\u0968", "\u00bd", "\u2164"]
    pieces += ["e\u0301", "\u1100\u1161\u11a8", "a\u0323\u0307", "\u212b", "\U0001f600", "\U0001f469\u200d\U0001f469"]
    pieces += ["caf\u00e9", "\u65e5\u672c\u8a9e", "\u0441\u043b\u043e\u0432\u043e", "\u0645\u0631\u062d\u0628\u0627"]
    pieces += chosen.choices(letters, k=300)
    return pieces + (ROOT / "LICENSE").read_text(encoding="utf-8").split(" ")


def strings(count: int) -> list[str]:
    chosen, pieces = random.Random(0), [piece for piece in alphabet() if piece and "\0" not in piece]
    return ["".join(chosen.choices(pieces, k=chosen.randint(1, 30))) for _ in range(count)]


def trained(kind: str, vocab: int) -> Tokenizer:
    """A tokenizer of a model's kind, trained on a little text."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(HEAD + ("{1,3}" if kind == "llama3" else "") + TAIL), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(strings(400), trainer)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    if kind == "llama3":
        end = tokenizer.token_to_id("<|endoftext|>")
        tokenizer.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)]),
        ])  # fmt: skip
    return tokenizer


def with_tokenizer(kind: str, bundle: Path, copy: Path) -> Path:
    """The bundle with a trained tokenizer of this kind; itself for "embedded"."""
    if kind == "embedded":
        return bundle
    shutil.copytree(bundle, copy)
    trained(kind, 2048).save(str(copy / "tokenizer.json"))
    return relisted(copy)


@pytest.mark.parametrize("kind", ["embedded", "gpt2", "llama3", "qwen"])
def test_prompts_are_encoded_as_in_python(kind: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """10,000 strings; ids back to bytes too."""
    bundle = with_tokenizer(kind, tiny_bundle, tmp_path / "b")
    text, given = Text(Bundle.open(bundle)), strings(10_000)
    found = probe("encode", bundle, stdin="".join(s + "\0" for s in given)).splitlines()
    assert len(found) == len(given)
    for one, line in zip(given, found, strict=True):
        assert ids(line) == text.encode(one), repr(one)


def test_another_kind_of_tokenizer_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "b")
    tokenizer = trained("gpt2", 2048)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(copy / "tokenizer.json"))
    assert "way to split text is not known here" in call(relisted(copy), "--prompt", "a", rc=2)
    Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(copy / "tokenizer.json"))
    assert "is not a BPE tokenizer" in call(relisted(copy), "--prompt", "a", rc=2)
    assert ids(call(copy, "--tokens", "5 6", "--print-ids", "--max-new-tokens", 3, rc=2)[:0]) == []


@pytest.mark.parametrize(("template", "bos"), [(CHATML, ""), (LLAMA3, "<|endoftext|>")])
def test_chat_templates_in_their_plain_form(template: str, bos: str, tmp_path: Path) -> None:
    """What the manifest holds, put around messages, is what the template renders; C++ says the same."""
    form = plain_form(template, bos)
    turns = ["hello", "hi", "sort a list"]
    assert render(template, turns[:1], bos) == form.before + "hello" + form.after
    assert (
        render(template, turns, bos) == form.before + "hello" + form.after + "hi" + form.between + turns[2] + form.after
    )
    source = shutil.copytree(EMBEDDED, tmp_path / "model")
    (source / "chat_template.jinja").write_text(template)
    bundle = export_bundle(source, "onnx", tmp_path / "b")
    assert bundle.manifest.chat == plain_form(template, "<|endoftext|>")
    flags = ["--print-ids", "--temperature", 0, "--max-new-tokens", 8]
    text = Text(bundle)
    expected = call(bundle.path, "--tokens", " ".join(map(str, text.encode(text.chat("sort it")))), *flags)
    assert call(bundle.path, "--prompt", "sort it", "--chat", *flags) == expected


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0]['content'] | upper }}", "{{ messages | length }}", "{{ raise_exception('no') }}", "{% if %}", "x"],
)
def test_templates_that_have_no_plain_form(template: str) -> None:
    assert plain_form(template, "") == Chat()
