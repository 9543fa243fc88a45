"""Every token that is warmed is a token of every later request about the document."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli.tokenizer_zoo import (
    CHATML,
    INSTRUCT,
    NO_SYSTEM,
    OTHER_SCRIPTS,
    TRIMMING,
    corpus,
    train_byte_level,
    train_gpt4_split,
    train_unigram,
    train_unsplit,
    wrap,
)

from kvstore_s3.cli import prompts
from kvstore_s3.cli.documents import Document
from kvstore_s3.cli.prompts import PromptStyle, build_prompt, check_template, render_request, share_tokens, writes_date
from kvstore_s3.errors import InvalidArgumentError

ASSETS = Path(os.environ.get("KVSTORE_S3_TEST_ASSETS", Path(__file__).resolve().parents[3] / "shared"))
TEMPLATES = {"chatml": CHATML, "trimming": TRIMMING, "instruct": INSTRUCT}
TRAINERS = {
    "byte-level": train_byte_level,
    "gpt4-split": train_gpt4_split,
    "unsplit": train_unsplit,
    "unigram": train_unigram,
}
QUESTIONS = [
    "",
    "What is this about?",
    "  two spaces",
    "\n\n\nHow many?",
    "\r\nwindows",
    "s and more",
    "ing",
    "er than",
    "0",
    "42nd",
    "000000",
    ", and then?",
    "...",
    "'ll it?",
    '"?',
    "_suffix",
    "\u0301\u0301",
    "\u00e9t\u00e9",
    "的意思是什么",
    "です",
    "вопрос",
    "ما هذا",
    "🙂🙂",
    "\u200d👧",
    "\ufe0f",
    "<|im_end|>",
    "</s>",
    "\x00",
    "\u00a0nbsp",
    "\t\tdef f():",
]


@pytest.fixture(scope="module", params=TRAINERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return wrap(TRAINERS[request.param](), CHATML)


def cut_documents(text: str, count: int, seed: int) -> Iterator[str]:
    """Pieces of a text that end anywhere: in words, numbers, white space, between any two characters."""
    chance = random.Random(seed)
    for _ in range(count):
        start = chance.randrange(len(text) - 400)
        yield text[start : start + chance.randrange(1, 400)]


def random_question(chance: random.Random) -> str:
    pieces = ["a", "E", " ", "\n", "7", ".", "é", "\u0301", "中", "🙂", "'", "_", "\t", "ß", "ing", "tion", "ー"]
    return "".join(chance.choices(pieces, k=chance.randrange(1, 6)))


def tokens_of_request(tokenizer: Any, document: Document, question: str, style: PromptStyle) -> list[int]:
    text = render_request(tokenizer, document, question, style)
    ids: list[int] = tokenizer(text, add_special_tokens=not style.chat)["input_ids"]
    return ids


def assert_shared(tokenizer: Any, document: Document, style: PromptStyle, questions: list[str]) -> int:
    """Check the promise for one document; return how many tokens of its request were given up."""
    prompt = build_prompt(tokenizer, document, style)
    stored = prompt.tokens.tolist()
    for question in questions:
        request = tokens_of_request(tokenizer, document, question, style)
        assert request[: len(stored)] == stored, (document, question)
    return prompt.request_tokens - len(stored)


@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_every_request_starts_with_the_tokens_of_its_document(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = TEMPLATES.get(template or "chatml")
    style = PromptStyle("You answer questions about documents.\n", chat=template is not None)
    chance = random.Random(5)
    texts = [*cut_documents(corpus(), 12, seed=1), *cut_documents(OTHER_SCRIPTS * 4, 12, seed=2)]
    for text in texts:
        questions = [*QUESTIONS, *(random_question(chance) for _ in range(12))]
        assert_shared(tokenizer, Document("d", text), style, questions)


@pytest.mark.parametrize("text", ["a", " ", "中", " a", "a ", "word" * 100, "two words", "x " * 200])
def test_the_shortest_and_the_strangest_documents_keep_the_promise(text: str, tokenizer: Any) -> None:
    assert_shared(tokenizer, Document("d", text), PromptStyle("Prefix: "), QUESTIONS)


def test_little_of_a_document_is_given_up(tokenizer: Any) -> None:
    for text in cut_documents(corpus(), 20, seed=3):
        lost = assert_shared(tokenizer, Document("d", text), PromptStyle(), ["", " Why?"])
        assert lost <= prompts.LAST_WORD_CHARS + 2


@pytest.mark.parametrize("chat", [False, True])
def test_a_trained_models_tokenizer_keeps_the_promise_too(chat: bool) -> None:
    directory, texts = ASSETS / "models" / "books8M", ASSETS / "text"
    if not directory.is_dir():
        pytest.skip(f"no shared models in {ASSETS}")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TRIMMING
    style = PromptStyle("Answer briefly.", chat=chat)
    for path in sorted(texts.glob("*.txt")):
        for text in cut_documents(path.read_text(), 10, seed=4):
            assert_shared(tokenizer, Document("d", text), style, QUESTIONS)


@pytest.mark.parametrize("chat", [False, True])
def test_a_long_document_is_cut_where_all_of_it_tokenised_would_be(
    tokenizer: Any, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = CHATML
    style = PromptStyle("Answer briefly.", chat=chat)
    for end in (20_000, 23_457, 30_001):
        document = Document("d", corpus()[:end])
        windowed = build_prompt(tokenizer, document, style)
        with monkeypatch.context() as patch:
            patch.setattr(prompts, "WINDOW_CHARS", 10**9)
            assert build_prompt(tokenizer, document, style) == windowed


def test_a_window_that_is_out_of_step_is_not_trusted() -> None:
    def encode(texts: Any) -> list[list[int]]:  # counts from the front, so that an end alone says nothing
        return [[position * 1000 + ord(char) for position, char in enumerate(text)] for text in texts]

    body = "x" * (prompts.WINDOW_CHARS + 500)
    tokens, total = share_tokens(encode, [body + "a", body + "b"])
    assert (len(tokens), total) == (len(body), len(body) + 1)


def test_a_conversation_ends_before_the_next_question(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    turns = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Here is the text: " + corpus()[:600]},
        {"role": "assistant", "content": "Thanks, I have read it. "},
    )
    for count in (2, 3):
        assert_shared(tokenizer, Document("d", "", turns[:count]), PromptStyle(chat=True), QUESTIONS)


def test_a_conversation_needs_chat_and_brings_its_own_system_message(tokenizer: Any) -> None:
    document = Document("d", "", ({"role": "system", "content": "x"}, {"role": "user", "content": "y"}))
    with pytest.raises(InvalidArgumentError, match="use --chat"):
        build_prompt(tokenizer, document, PromptStyle())
    with pytest.raises(InvalidArgumentError, match="leave --prefix-file out"):
        build_prompt(tokenizer, document, PromptStyle("prefix", chat=True))


def test_a_template_that_refuses_says_why(tokenizer: Any) -> None:
    tokenizer.chat_template = NO_SYSTEM
    with pytest.raises(InvalidArgumentError, match="System role not supported"):
        build_prompt(tokenizer, Document("d", "text"), PromptStyle("system", chat=True))
    assert build_prompt(tokenizer, Document("d", "some text here"), PromptStyle(chat=True)).tokens


def test_variables_reach_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ date_string or strftime_now('%d') }}" + CHATML
    document = Document("d", "text")
    fixed = PromptStyle(chat=True, template_arguments={"date_string": "1 May 2026"})
    assert render_request(tokenizer, document, "?", fixed).startswith("1 May 2026<|im_start|>user\ntext?")
    assert writes_date(tokenizer, PromptStyle(chat=True))
    assert not writes_date(tokenizer, fixed)
    assert not writes_date(tokenizer, PromptStyle())


def test_chat_needs_a_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(InvalidArgumentError, match="has no chat template"):
        check_template(tokenizer, PromptStyle(chat=True), "acme/base")
    check_template(tokenizer, PromptStyle(), "acme/base")
