"""The plan of a warm: which documents have which tokens, and how many of them are stored. This is the whole dry run."""

from __future__ import annotations

import sys
from array import array
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore_s3.cli.documents import Document, Rejected, read_documents
from kvstore_s3.cli.progress import LINE_INTERVAL_S, WorkProgress
from kvstore_s3.cli.prompts import PromptStyle, Tokenizer, build_prompt
from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.hashing import chunk_keys, root_key

if TYPE_CHECKING:
    from kvstore_s3.runtime import SyncKVStore
    from kvstore_s3.store import Hit

LOOKUPS_AHEAD = 8
"""Documents whose lookup may be in flight while the next ones are tokenised."""


@dataclass(frozen=True, slots=True)
class PlannedDocument:
    """A document's shared tokens (only kept where some are missing), those in whole chunks, and those stored."""

    name: str
    tokens: array[int]
    shared: int
    whole: int
    stored: int

    @property
    def missing(self) -> int:
        return self.whole - self.stored


@dataclass(slots=True)
class Plan:
    documents: list[PlannedDocument] = field(default_factory=list)
    failed: list[Rejected] = field(default_factory=list)
    chunks: set[bytes] = field(default_factory=set)
    """Keys of all whole chunks: what documents share counts once."""
    present: set[bytes] = field(default_factory=set)

    @property
    def missing_tokens(self) -> int:
        """Upper bound of what is to be computed: a prefix that documents share is in it once for each."""
        return sum(document.missing for document in self.documents)


class Planner:
    """Makes a `Plan`. `context` is the model's longest request in tokens, None for no limit."""

    def __init__(
        self, store: SyncKVStore, tokenizer: Tokenizer, style: PromptStyle, context: int | None, salt: str | None
    ) -> None:
        self._store = store
        self._tokenizer = tokenizer
        self._style = style
        self._context = context
        self._salt = salt
        self._root = root_key(store.namespace.digest, salt)
        self._lookups: deque[tuple[str, array[int], Future[Hit]]] = deque()

    def plan(self, sources: Sequence[Path], jsonl_field: str | None) -> Plan:
        """Read, tokenise and look up all documents. Raises `StoreError` where the store fails."""
        plan = Plan()
        with WorkProgress("read", len(sources), "file", patience_s=LINE_INTERVAL_S) as progress:
            for source in sources:
                for document in read_documents(source, sys.stdin.buffer, jsonl_field=jsonl_field):
                    rejected = document if isinstance(document, Rejected) else self._start(plan, document)
                    if rejected is not None:
                        plan.failed.append(rejected)
                progress.advance(1, str(source))
            while self._lookups:
                self._finish(plan)
        return plan

    def _start(self, plan: Plan, document: Document) -> Rejected | None:
        """Tokenise a document and send its lookup off."""
        try:
            prompt = build_prompt(self._tokenizer, document, self._style)
        except InvalidArgumentError as error:
            return Rejected(document.name, str(error))
        if self._context is not None and prompt.request_tokens >= self._context:
            return Rejected(
                document.name,
                f"has {prompt.request_tokens:,} tokens with all that goes around it, the model's context is "
                f"{self._context:,} with question and answer; split it",
            )
        lookup = self._store.runtime.submit(self._store.kv.lookup(prompt.tokens, salt=self._salt, thorough=True))
        self._lookups.append((document.name, prompt.tokens, lookup))
        if len(self._lookups) > LOOKUPS_AHEAD:
            self._finish(plan)
        return None

    def _finish(self, plan: Plan) -> None:
        name, tokens, lookup = self._lookups.popleft()
        hit = lookup.result()
        keys = chunk_keys(self._root, tokens, self._store.namespace.chunk_tokens)
        plan.chunks.update(keys)
        plan.present.update(keys[: len(hit.chunks)])
        whole = len(keys) * self._store.namespace.chunk_tokens
        kept = tokens if hit.tokens < whole else array("I")
        plan.documents.append(PlannedDocument(name, kept, len(tokens), whole, hit.tokens))
