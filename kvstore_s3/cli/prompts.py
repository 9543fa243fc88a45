"""Which tokens of a document any later request shares. Pure, given a tokenizer.

A later request asks something after the document. The tokens at the end of the document depend on what follows:
byte-pair merges, digit groups, runs of white space, Unicode normalisation and a template that strips its input all
reach over the seam. So the request is rendered and tokenised with many different continuations, and cut before the last
word in front of the seam; the tokens that all of these share are stable under any question.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvstore_s3.cli.documents import Document
from kvstore_s3.errors import InvalidArgumentError

CONTINUATIONS = (
    "",
    "a",
    "The",
    " a",
    " ",
    "\n",
    "\n\nQuestion: why?",
    "\t",
    "7",
    "1234",
    ".",
    "'s",
    '"',
    "-",
    "_",
    "\u0301",  # combining acute accent: normalisation may merge it with the last letter
    "\u4e2d",
    "\u0416",
    "\u0645",
    "\U0001f642",
    "\u200d",  # zero width joiner
)
"""Texts that may follow a document: one or more of each kind that tokenizers tell apart."""

LAST_WORD_CHARS = 64
"""How far back the last word may reach; text without white space is cut here."""

WINDOW_CHARS = 4096
"""Only so much of the text before the seam is tokenised once for each continuation."""

IN_STEP_TOKENS = 32
"""Tokens before the seam in which a window must agree with the whole text, or the whole text is used."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used."""

    chat_template: Any

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any: ...

    def apply_chat_template(self, conversation: Any, **arguments: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class PromptStyle:
    """How a client builds its request around a document.

    Plain: the text `prefix + document + question`, tokenised with special tokens. Chat: the messages
    `[system: prefix] + [user: document + question]` through the template with `template_arguments`, with the generation
    prompt, tokenised without special tokens (the template writes them).
    """

    prefix: str = ""
    chat: bool = False
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    """`tokens`: those that every later request shares; `request_tokens`: those of a request without a question."""

    tokens: array[int]
    request_tokens: int


def build_prompt(tokenizer: Tokenizer, document: Document, style: PromptStyle) -> Prompt:
    """Tokenise a document up to where any question may follow it. Raises `InvalidArgumentError`."""

    def encode(texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=not style.chat)["input_ids"]
        return ids

    requests = [render_request(tokenizer, document, question, style) for question in CONTINUATIONS]
    cut = _cut_last_word(requests[0][: _count_shared(requests)])
    requests += [cut, cut + "."]
    tokens, total = share_tokens(encode, requests)
    return Prompt(array("I", tokens), total)


def render_request(tokenizer: Tokenizer, document: Document, question: str, style: PromptStyle) -> str:
    """Return the text of the request that asks `question` after the document: what a client has to send.

    A conversation that ends with a user turn gets the question at the end of that turn, any other one as a user turn
    of its own.
    """
    if not style.chat:
        if document.messages:
            raise InvalidArgumentError("it is a conversation ('messages'); use --chat")
        return style.prefix + document.text + question
    messages = _compose_messages(document, question, style.prefix)
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **style.template_arguments
        )
    except (ValueError, TypeError, LookupError, ArithmeticError, _template_error()) as error:
        raise InvalidArgumentError(f"the chat template refuses it: {_first_line(error)}") from error
    return text


def share_tokens(encode: Callable[[Sequence[str]], list[list[int]]], texts: Sequence[str]) -> tuple[list[int], int]:
    """Return the tokens that all `texts` start with, and the number of tokens of `texts[0]`.

    Only the end of each text is tokenised for itself: a tokenizer's decisions are local. Where the end is not in step
    with the whole text, all of every text is tokenised.
    """
    start = _count_shared(texts) - WINDOW_CHARS
    if start > 0:
        whole = encode([texts[0]])[0]
        ends = encode([text[start:] for text in texts])
        loose = len(ends[0]) - _count_shared(ends)
        checked = loose + IN_STEP_TOKENS
        if len(ends[0]) > checked and whole[-checked:] == ends[0][-checked:]:
            return whole[: len(whole) - loose], len(whole)
    wholes = encode(texts)
    return wholes[0][: _count_shared(wholes)], len(wholes[0])


def check_template(tokenizer: Tokenizer, style: PromptStyle, model: str) -> None:
    """Raise `InvalidArgumentError` where the style calls for a chat template that the tokenizer lacks."""
    if style.chat and not tokenizer.chat_template:
        raise InvalidArgumentError(f"the tokenizer of {model!r} has no chat template; leave --chat out or add one")


def writes_date(tokenizer: Tokenizer, style: PromptStyle) -> bool:
    """Whether the chat template writes today's date: tomorrow's requests would then share nothing."""
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template]
    dated = any("strftime_now" in text for text in texts if isinstance(text, str))
    return style.chat and dated and "date_string" not in style.template_arguments


def _count_shared(sequences: Sequence[str] | Sequence[list[int]]) -> int:
    low, high = min(sequences), max(sequences)  # all others lie between these two, and share what they share
    differences = (place for place, (one, other) in enumerate(zip(low, high, strict=False)) if one != other)
    return next(differences, min(len(low), len(high)))


def _compose_messages(document: Document, question: str, prefix: str) -> list[Mapping[str, Any]]:
    turns = list(document.messages) or [{"role": "user", "content": document.text}]
    if prefix:
        if turns[0]["role"] == "system":
            raise InvalidArgumentError("it has a system message of its own; leave --prefix-file out")
        turns.insert(0, {"role": "system", "content": prefix})
    if turns[-1]["role"] == "user":
        turns[-1] = {**turns[-1], "content": turns[-1]["content"] + question}
    else:
        turns.append({"role": "user", "content": question})
    return turns


def _cut_last_word(text: str) -> str:
    """The text up to the white space before its last word, however long that space is."""
    body = text.rstrip()
    limit = max(0, len(body) - LAST_WORD_CHARS)
    end = body[limit:]
    words = end.rsplit(maxsplit=1)
    if len(words) == 2 or end[:1].isspace():
        return body[: len(body) - len(words[-1])].rstrip()
    return text[:limit]


def _template_error() -> type[Exception]:
    from jinja2 import TemplateError  # a dependency of chat templates in transformers, not of this package

    return TemplateError


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
