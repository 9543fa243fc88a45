"""A tiny random model with a tokenizer of its own, and the command line run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cli.tokenizer_zoo import CHATML, train_byte_level, wrap

from kvstore_s3.cli.app import run

CONTEXT = 4096
CHUNK = 64


@dataclass(frozen=True)
class Ran:
    """One run of the command line."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)

    def fails_with(self, code: int, *parts: str) -> None:
        """It ended with `code` and one last line on stderr that holds all `parts`, without a traceback."""
        assert self.code == code, self
        assert "Traceback" not in self.err
        last = self.err.strip().splitlines()[-1]
        for part in parts:
            assert part in last, self.err


Cli = Callable[..., Ran]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run one command line from `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def execute(*arguments: object) -> Ran:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        return Ran(code, *capfd.readouterr())

    return execute


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a random Llama of two layers, bf16, with a byte-level BPE tokenizer and a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = wrap(train_byte_level(), CHATML)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture
def warm(cli: Cli, tiny_model: Path, tmp_path: Path) -> Cli:
    """`kvstore-s3 warm` with the tiny model, into the file store `tmp_path/store`."""

    def execute(*arguments: object) -> Ran:
        common = ("--model", tiny_model, "--store", store_url(tmp_path), "--chunk-tokens", CHUNK)
        return cli("warm", *arguments, *common)

    return execute


def store_url(tmp_path: Path) -> str:
    return (tmp_path / "store").as_uri()


def stored_objects(tmp_path: Path) -> list[Path]:
    """The files of all chunks in the file store, sorted."""
    return sorted(path for path in (tmp_path / "store").rglob("l*.h*") if path.is_file())
