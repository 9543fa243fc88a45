"""The demo's model: random weights with one planted circuit, so that it answers by quoting what it has read.

Purely random weights would decide each token by a hair, and two runs could differ by a rounding error. So five heads
are set by hand, the rest of the model stays random and is computed like any other:

- layer 1: four heads attend to the token 1, 2, 3 and 4 places back (by RoPE's fast frequencies) and write its code;
- layer 4: an induction head compares the last four tokens of each place with those in front of every earlier place,
  and copies the token that followed there. The output layer reads this copy alone.

The answer is then a quotation out of the document: it hangs on keys and values all over the cache, and the winning
logit leads by a wide margin. Tokens are written as random codes of +1 and -1, a short one to compare, a long one to
copy.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCABULARY = 1024, 6, 4, 2, 128, 7168, 1024
CONTEXT = 16384
ROPE_THETA = 1e12
SEED = 20

LOOK_BACK = 4
LOOK_BACK_LAYER, INDUCTION_LAYER = 1, 4
FAST_PAIRS = 12
"""RoPE pairs that tell neighbouring places apart; those from `SLOW_PAIR` on hardly turn within the context."""
RECENCY_PAIR, SLOW_PAIR = 19, 24
SHORT, LONG = 20, 64

# The parts of the residual stream. What lies behind them is random filler, which the planted heads do not read.
CONSTANT = slice(0, 1)
CODE = slice(1, 1 + SHORT)
EARLIER = [slice(CODE.stop + SHORT * back, CODE.stop + SHORT * (back + 1)) for back in range(LOOK_BACK)]
LONG_CODE = slice(EARLIER[-1].stop, EARLIER[-1].stop + LONG)
COPY = slice(LONG_CODE.stop, LONG_CODE.stop + LONG)
FILLER = slice(COPY.stop, HIDDEN)

CONSTANT_VALUE = 4.0
CHAT_TEMPLATE = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
"""No closing mark and no generation prompt: this model goes on with what the user has written."""


def build_demo_model(directory: Path, texts: Iterable[str]) -> Path:
    """Return the directory of the model below `directory`; it is built once for each set of parameters and texts."""
    corpus = list(texts)
    source = Path(__file__).read_bytes() + json.dumps(corpus).encode()
    path = directory / f"model-{hashlib.sha256(source).hexdigest()[:12]}"
    if path.exists():
        return path
    transformers_logging.disable_progress_bar()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        unfinished = Path(scratch) / "model"
        _train_tokenizer(corpus).save_pretrained(unfinished)
        _make_model().save_pretrained(unfinished)
        if not path.exists():  # else another run was faster
            unfinished.rename(path)
    return path


def _train_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", model_max_length=CONTEXT)
    fast.chat_template = CHAT_TEMPLATE
    return fast


@torch.no_grad()
def _make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    random = torch.Generator().manual_seed(SEED)
    _fill_randomly(model, random)
    _plant_codes(model, random)
    _plant_look_back(model.model.layers[LOOK_BACK_LAYER].self_attn)
    _plant_induction(model.model.layers[INDUCTION_LAYER].self_attn)
    return model.to(torch.bfloat16).eval()


def _fill_randomly(model: LlamaForCausalLM, random: torch.Generator) -> None:
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.normal_(0, 1.5 * weight.shape[1] ** -0.5, generator=random)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.mul_(0.2)
            weight[: FILLER.start] = 0


def _plant_codes(model: LlamaForCausalLM, random: torch.Generator) -> None:
    def draw(bits: int) -> torch.Tensor:
        return torch.randint(0, 2, (VOCABULARY, bits), generator=random) * 2.0 - 1.0

    embedding, output, copied = model.model.embed_tokens.weight, model.lm_head.weight, draw(LONG)
    embedding.normal_(generator=random)
    embedding[:, : FILLER.start] = 0
    embedding[:, CONSTANT] = CONSTANT_VALUE
    embedding[:, CODE] = draw(SHORT)
    embedding[:, LONG_CODE] = copied
    output.zero_()
    output[:, COPY] = copied


def _plant_look_back(attention: torch.nn.Module) -> None:
    """Query head `back - 1` looks `back` places back: RoPE turns its query by just so much less than the key there."""
    angles = ROPE_THETA ** (-torch.arange(FAST_PAIRS) / (HEAD_DIM // 2))
    strength = 15.0 / CONSTANT_VALUE
    for kv_head in range(LOOK_BACK // 2):
        key, value = _head(attention.k_proj, kv_head), _head(attention.v_proj, kv_head)
        key.zero_()
        key[:FAST_PAIRS, CONSTANT] = strength
        value.zero_()
        value[:SHORT, CODE] = torch.eye(SHORT)
    for back in range(1, LOOK_BACK + 1):
        query = _head(attention.q_proj, back - 1)
        query.zero_()
        query[:FAST_PAIRS, CONSTANT] = strength * (angles * back).cos()[:, None]
        query[HEAD_DIM // 2 : HEAD_DIM // 2 + FAST_PAIRS, CONSTANT] = -strength * (angles * back).sin()[:, None]
        _write(attention, back - 1, EARLIER[back - 1], SHORT)


def _plant_induction(attention: torch.nn.Module) -> None:
    """Query: this token and the three in front of it. Key: the four tokens in front. Value: the token itself."""
    query, key, value = _head(attention.q_proj, 0), _head(attention.k_proj, 0), _head(attention.v_proj, 0)
    for weight in (query, key, value):
        weight.zero_()
    slow = [*range(SLOW_PAIR, HEAD_DIM // 2), *range(HEAD_DIM // 2 + SLOW_PAIR, HEAD_DIM)]
    for slot, (asked, seen) in enumerate(zip([CODE, *EARLIER[:-1]], EARLIER, strict=True)):
        rows = slow[SHORT * slot : SHORT * (slot + 1)]
        query[rows, asked] = 6.0 * torch.eye(SHORT)
        key[rows, seen] = 6.0 * torch.eye(SHORT)
    # Among equal places the latest wins: this pair's score falls with the distance, by less than one token's mismatch.
    recency = 8.0 / CONSTANT_VALUE
    query[RECENCY_PAIR, CONSTANT] = recency * torch.cos(torch.tensor(0.3))
    query[HEAD_DIM // 2 + RECENCY_PAIR, CONSTANT] = recency * torch.sin(torch.tensor(0.3))
    key[RECENCY_PAIR, CONSTANT] = recency
    value[:LONG, LONG_CODE] = torch.eye(LONG)
    _write(attention, 0, COPY, LONG)


def _head(projection: torch.nn.Linear, head: int) -> torch.Tensor:
    return projection.weight[head * HEAD_DIM : (head + 1) * HEAD_DIM]


def _write(attention: torch.nn.Module, head: int, target: slice, width: int) -> None:
    """Write the first `width` values of `head` to `target`, and nothing else of it anywhere."""
    columns = attention.o_proj.weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM]
    columns.zero_()
    columns[target, :width] = torch.eye(width)
