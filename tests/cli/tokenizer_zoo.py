"""Tokenizers of the kinds that models have, trained here on a few kilobytes, and chat templates of all habits."""

from __future__ import annotations

import argparse
import inspect
import textwrap
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = (
    "<s>{% for message in messages %}<|im_start|>{{ message['role'] }}\n\n{{ message['content'] | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
INSTRUCT = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<s>{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ (system if loop.first else '') + message['content'].strip() }} [/INST]"
    "{% else %}{{ message['content'] }}</s>{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]

OTHER_SCRIPTS = """
Der schnelle braune Fuchs springt über den faulen Hund; ça alors, où est l'été? Пример текста на русском языке.
これは日本語の文章です。中文没有空格所以一个词可以很长。 هذا نص عربي قصير. 한국어 문장입니다. 12345 678,901.23 3.14159
emoji: 🙂 🚀 👩‍👩‍👧 e\u0301 combining, tabs\tand    runs   of spaces\n\n\n\nand newlines.
snake_case_name camelCaseName don't it's we'll
"""

_GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def corpus() -> str:
    """English prose and code from the standard library, and a little of other scripts."""
    return "\n\n".join([inspect.getsource(argparse)[:60_000], inspect.getsource(textwrap), OTHER_SCRIPTS * 4])


def train_byte_level(size: int = 900) -> Tokenizer:
    """As GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _train(tokenizer, trainers.BpeTrainer, size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def train_gpt4_split(size: int = 900) -> Tokenizer:
    """As Llama 3 and Qwen: digits in threes, letters with one character before them, NFC."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_GPT4_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _train(tokenizer, trainers.BpeTrainer, size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def train_unsplit(size: int = 900) -> Tokenizer:
    """As Llama 2: no pre-tokenizer when it runs, spaces as ▁, one put in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*"), behavior="isolated")
    trained = _train(tokenizer, trainers.BpeTrainer, size)
    trained.pre_tokenizer = None  # type: ignore[assignment]
    return trained


def train_unigram(size: int = 700) -> Tokenizer:
    """As T5 and XLNet: a unigram model, which weighs whole words."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _train(tokenizer, trainers.UnigramTrainer, size, unk_token="<unk>")


def wrap(tokenizer: Tokenizer, chat_template: str | None = None) -> Any:
    """The tokenizer as transformers serves it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=chat_template
    )


def _train(tokenizer: Tokenizer, trainer: Any, size: int, **arguments: Any) -> Tokenizer:
    texts = corpus().split("\n\n")
    tokenizer.train_from_iterator(
        texts, trainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False, **arguments)
    )
    return tokenizer
