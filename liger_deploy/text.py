"""Text in and out: the bundle's tokenizer and chat template, without transformers."""

from __future__ import annotations

import json
from pathlib import Path

from liger_deploy.bundle import Bundle, Chat
from liger_deploy.errors import BundleError, TokenError, UserError


class Text:
    """The tokenizer of a bundle. A bundle without one speaks token ids: "12 7 99"."""

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self._bos = manifest.generation.bos_token_id
        self._template = (bundle.path / manifest.chat_template) if manifest.chat_template else None
        self._tokenizer = _load(bundle.path / manifest.tokenizer) if manifest.tokenizer else None

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, begun as the model was trained to begin; never empty.

        Raises:
            TokenError: nothing to encode, or text for a bundle without a tokenizer.
        """
        if self._tokenizer is None:
            return _ids(prompt)
        if not prompt:
            raise TokenError("the prompt is empty: give --prompt some text")
        ids: list[int] = self._tokenizer.encode(prompt).ids
        if self._bos < 0:
            return ids
        while ids[:1] == [self._bos]:  # the tokenizer may have put one before the template's own
            ids = ids[1:]
        return [self._bos, *ids]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        return str(self._tokenizer.decode(ids))

    def chat(self, message: str) -> str:
        """One user message in the model's chat template.

        Raises:
            UserError: the bundle has no chat template, or it does not render.
        """
        if self._template is None:
            raise UserError("this bundle has no chat template: use --prompt without --chat")
        bos = self._tokenizer.id_to_token(self._bos) if self._tokenizer and self._bos >= 0 else ""
        try:
            return render(self._template.read_text(encoding="utf-8"), [message], bos or "")
        except ValueError as error:
            raise UserError(f"{self._template} does not render: {error}") from None


def render(template: str, messages: list[str], bos: str) -> str:
    """Messages, of the user and the assistant in turn, in a chat template (Jinja), up to where an answer begins.

    Raises:
        ValueError: the template does not render.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)]
    try:
        return environment.from_string(template).render(messages=turns, add_generation_prompt=True, bos_token=bos)
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(str(error)) from None


def plain_form(template: str, bos: str) -> Chat:
    """What a template puts around messages; empty if that depends on the messages, or changes them."""
    first, answer, second = "\u0001first\u0001", "\u0001answer\u0001", "\u0001second\u0001"
    try:
        one, three = (render(template, messages, bos) for messages in ([first], [first, answer, second]))
    except ValueError:
        return Chat()
    before, found, after = one.partition(first)
    _, answered, rest = three.partition(answer)
    between, last, end = rest.partition(second)
    same = three.startswith(before + first + after + answer) and end == after
    return Chat(before, after, between) if found and answered and last and after and same else Chat()


class Stream:
    """Turns a growing list of token ids into text as it becomes certain.

    A byte-level token may end inside a character; its bytes wait for the rest. Only ids since the last complete piece
    are decoded again, so a long text costs no more a token than a short one.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._context: list[int] = []
        self._pending: list[int] = []

    def feed(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        self._pending.append(token)
        before = self._text.decode(self._context)
        after = self._text.decode(self._context + self._pending)
        if after.endswith("\ufffd"):
            return ""
        self._context, self._pending = self._pending, []
        return after[len(before) :]


def _load(path: Path):  # type: ignore[no-untyped-def]  # tokenizers ships no types
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:
        raise BundleError(f"{path} is not a tokenizer: {error}") from None


def _ids(prompt: str) -> list[int]:
    try:
        ids = json.loads("[" + ",".join(prompt.replace(",", " ").split()) + "]")
    except ValueError:
        ids = None
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise TokenError("this bundle has no tokenizer: give the prompt as token ids, like --prompt '12 7 99'")
    if not ids:
        raise TokenError("the prompt is empty: give token ids, like --prompt '12 7 99'")
    return ids
