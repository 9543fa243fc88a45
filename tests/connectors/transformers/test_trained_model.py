"""A trained model on real text: the answers of the plain model, warmed in steps and hit with a question."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvstore_s3 import Namespace, connect
from kvstore_s3.connectors.transformers import PrefixCache

ASSETS = Path(os.environ.get("KVSTORE_S3_TEST_ASSETS", Path(__file__).resolve().parents[4] / "shared"))
MODEL = ASSETS / "models" / "books8M"
TEXTS = ("shakes.txt", "union.txt", "kjb.txt")

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason=f"no trained model at {MODEL}; set KVSTORE_S3_TEST_ASSETS")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("books")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    with connect(root.as_uri(), Namespace.from_model(MODEL, cache_dir=root / "digests")) as store:
        yield PrefixCache(model, store)


@pytest.fixture(scope="module")
def tokens() -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return {name: tokenizer((ASSETS / "text" / name).read_text()[:40000])["input_ids"] for name in TEXTS}


CASES = (
    ("shakes.txt", 500, 30),
    ("shakes.txt", 1500, 7),
    ("shakes.txt", 3000, 1),
    ("union.txt", 512, 40),
    ("union.txt", 1024, 12),
    ("union.txt", 2047, 64),
    ("union.txt", 2900, 100),
    ("kjb.txt", 768, 5),
    ("kjb.txt", 1300, 250),
    ("kjb.txt", 2560, 20),
)
"""Text, tokens of the document, tokens of the question after it."""


@pytest.mark.parametrize(("text", "document", "question"), CASES)
def test_a_question_after_a_warmed_document_gets_the_plain_models_answer(
    cache, tokens, assert_same_answer, text, document, question
):
    start = 37 * document  # another passage for each case, so that none is stored already
    passage = torch.tensor([tokens[text][start % 5000 :][: document + question]])
    cache.warm(passage[:, :document])
    assert_same_answer(cache.generate, cache.model, passage, new_tokens=16)
    assert cache.last.loaded_tokens > document - 256 - 32
