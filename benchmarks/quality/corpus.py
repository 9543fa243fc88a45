"""What is measured on: calibration documents, and windows of held-out tokens, from texts or from the model itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CHUNK, NEXT = 256, 127
"""Tokens of a chunk, and of what follows the stored context and is judged."""
SHARE = 0.6
"""Of each text that calibration sees, the part that it sees: the beginning. Windows come from the rest."""
MOST_CALIBRATION = 65_536
"""Tokens of all calibration documents at most."""
SAMPLED = 128
"""Sequences that a model without a tokenizer writes."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """`documents`: token ids for calibration. `windows` and `long_windows`: int64 [windows, context + NEXT + 1].

    No window shares a token with a document. `long_windows` is empty where the model's context is too short for it.
    """

    documents: list[torch.Tensor]
    windows: torch.Tensor
    long_windows: torch.Tensor
    described: dict[str, Any]


def read_texts(folder: Path) -> dict[str, str]:
    """The .txt files of a folder, or one such file, by name."""
    paths = sorted(folder.glob("*.txt")) if folder.is_dir() else [folder]
    texts = {path.name: path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()}
    if not texts:
        raise SystemExit(f"expected .txt files in {folder}, found none; give TEXTS=dir")
    return texts


def corpus_of_texts(tokenizer: Any, folder: Path, *, windows: int, long_context: int) -> Corpus:
    """Documents are the beginnings of all texts but the shortest, which calibration never sees."""
    streams = {name: _encode(tokenizer, text) for name, text in read_texts(folder).items()}
    unseen = min(streams, key=lambda name: len(streams[name])) if len(streams) > 1 else None
    seen = [name for name in streams if name != unseen]
    bound = MOST_CALIBRATION // len(seen)
    cuts = {name: 0 if name == unseen else min(bound, int(len(ids) * SHARE)) for name, ids in streams.items()}
    rests = [ids[cuts[name] :] for name, ids in streams.items()]
    prefix = _prefix(tokenizer)
    described = {
        "calibration": {name: cuts[name] for name in seen},
        "held out": {name: len(ids) - cuts[name] for name, ids in streams.items()},
        "unseen in calibration": unseen,
        "first token": prefix or None,
    }
    return Corpus(
        [torch.tensor(prefix + streams[name][: cuts[name]]) for name in seen],
        cut_windows(rests, CHUNK, windows, prefix),
        cut_windows(rests, long_context, max(4, windows // 4), prefix) if long_context else torch.empty(0, 0).long(),
        described,
    )


def cut_windows(texts: Sequence[list[int]], context: int, count: int, prefix: list[int]) -> torch.Tensor:
    """`count` windows, evenly spread over each text, the same number from each as far as they are long enough."""
    size = context + NEXT + 1 - len(prefix)
    fitting = [len(ids) // size for ids in texts]
    found: list[list[int]] = []
    for index, ids in enumerate(texts):
        share = -(-(count - len(found)) // (len(texts) - index))
        number = min(share, fitting[index])
        starts = [fitting[index] * part // number * size for part in range(number)]
        found += [prefix + ids[start : start + size] for start in starts]
    if not found:
        raise SystemExit(f"expected a held-out text of {size} tokens or more, found none; give longer TEXTS")
    return torch.tensor(found)


@torch.no_grad()
def corpus_of_model(model: Any, *, windows: int, long_context: int) -> Corpus:
    """What the model itself writes, seed 0: the first sequences are documents, the last `windows` are judged."""
    config = model.config.get_text_config(decoder=True)
    start = config.bos_token_id if isinstance(config.bos_token_id, int) else 0
    context = long_context or CHUNK
    length = context + NEXT + 1
    torch.manual_seed(0)
    written = model.generate(
        torch.full((SAMPLED, 1), start, device=model.device),
        attention_mask=torch.ones((SAMPLED, 1), dtype=torch.long, device=model.device),
        do_sample=True,
        top_k=0,
        max_new_tokens=length - 1,
        min_new_tokens=length - 1,
        pad_token_id=start,
    ).cpu()
    judged = written[-windows:]
    return Corpus(
        list(written[:-windows]),
        judged[:, : CHUNK + NEXT + 1],
        judged[: max(4, windows // 4)] if long_context else torch.empty(0, 0).long(),
        {"sampled from the model": SAMPLED, "seed": 0, "tokens of each": length, "judged": len(judged)},
    )


def batches(windows: torch.Tensor, size: int = 8) -> Iterator[torch.Tensor]:
    yield from windows.split(size)


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _prefix(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every prompt, if it does."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []
