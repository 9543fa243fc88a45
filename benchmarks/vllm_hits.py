"""Time to first token of one prompt: computed, from the engine's own prefix cache, from each tier, and from LMCache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Any

from peers.lmcache_server import LMCache, PeerMissingError, find_lmcache
from vllm_model import CHUNK_TOKENS, PROMPT_TOKENS, random_tokens, whole_chunks
from vllm_process import Answer, Engine, EngineFailedError, running_engine
from vllm_stores import BUCKET, DOMAIN, Store, await_bytes, forget_pages

PROMPT = random_tokens(PROMPT_TOKENS, seed=1)
WARM_UP = random_tokens(100, seed=2)
"""Shorter than a chunk: it makes the engine warm, and is neither saved nor looked up."""
AGAIN = 5
HOST_TIER_BYTES = 2**29


class Hits:
    """Fills the stores once, then asks in rounds: each round starts a new engine for each way."""

    def __init__(self, store: Store, model: Path) -> None:
        self._store = store
        self._model = model
        self._nvme = store.folder / "nvme"
        self._rows: dict[str, list[float]] = {}
        self._wrong: list[str] = []
        self._expected: tuple[int, ...] | None = None
        self._skipped: dict[str, str] = {}
        self._bytes_by_source: dict[str, dict[str, int]] = {}
        self._lmcache = self._find_lmcache()

    def measure(self, rounds: int) -> dict[str, Any]:
        if not self._nvme.exists():  # another measurement of this run has filled all of them
            self._fill()
        ways: list[Callable[[], None]] = [self._compute, self._from_s3, self._from_idle_s3, self._from_nvme]
        if self._lmcache is not None:
            ways.append(self._from_lmcache)
        for number in range(rounds):
            for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                self._try(way)
        self._try(self._from_host)
        rows = {name: summarise(values) for name, values in self._rows.items()}
        for name, row in rows.items():
            print(f"{name:44}{row['ms']:10.1f} ms   ({row['least']:.1f} to {row['most']:.1f})")
        return {
            "rows": rows,
            "bytes_by_source": self._bytes_by_source,
            "tokens_that_differ": self._wrong,
            "skipped": self._skipped,
            **self._versions(),
        }

    def _fill(self) -> None:
        """One engine saves to the store and to the NVMe tier, one by way of LMCache."""
        fill(self._store, self._model, nvme_tier_dir=self._nvme)
        if self._lmcache is not None:
            self._try(self._fill_lmcache)

    def _fill_lmcache(self) -> None:
        assert self._lmcache is not None
        before = len(self._store.chunk_sizes(""))
        with self._lmcache.running() as port, self._lmcache_engine("lmcache-fill", port) as engine:
            engine.ask(WARM_UP, PROMPT)
            chunks = PROMPT_TOKENS // CHUNK_TOKENS
            if (found := self._store.await_chunks("", before + chunks) - before) < chunks:
                raise PeerMissingError(f"LMCache stored {found} of {chunks} chunks")

    def _compute(self) -> None:
        """Cold, then from the engine's own prefix cache: the floor."""
        with self._engine("compute", None, {}, enable_prefix_caching=True) as engine:
            _, first, *again = engine.ask(WARM_UP, *[PROMPT] * (1 + AGAIN))
        self._expected = self._expected or first.tokens
        self._note("computed", [first], cached=0)
        self._note("the engine's own prefix cache", again)

    def _from_s3(self) -> None:
        with self._engine("s3", self._store.ours("hits"), self._store.environment()) as engine:
            engine.ask(WARM_UP)
            self._store.serve(self._store.chunks("hits/"))
            first, *again = engine.ask(*[PROMPT] * (1 + AGAIN))
        self._note("S3, new engine", [first])
        self._note("S3, again", again)

    def _from_idle_s3(self) -> None:
        with self._engine("s3-idle", self._store.ours("hits"), self._store.environment()) as engine:
            _, first = engine.ask(WARM_UP, PROMPT)
        self._note("S3, new engine, idle server", [first])

    def _from_nvme(self) -> None:
        forget_pages(self._nvme)
        environment = self._store.environment(nvme_tier_dir=self._nvme)
        with self._engine("nvme", self._store.ours("hits"), environment) as engine:
            _, first, *again = engine.ask(WARM_UP, *[PROMPT] * (1 + AGAIN))
            self._sources("NVMe", engine.tell({"do": "counters"}))
        self._note("NVMe, new engine", [first])
        self._note("NVMe, again", again)

    def _from_host(self) -> None:
        environment = self._store.environment(host_tier_bytes=HOST_TIER_BYTES)
        with self._engine("host", self._store.ours("hits"), environment) as engine:
            _, _, *again = engine.ask(WARM_UP, *[PROMPT] * (2 + 2 * AGAIN))
            self._sources("host memory", engine.tell({"do": "counters"}))
        self._note("host memory, again", again[1:])

    def _from_lmcache(self) -> None:
        assert self._lmcache is not None
        with self._lmcache.running() as port, self._lmcache_engine("lmcache", port) as engine:
            engine.ask(WARM_UP)
            self._store.serve(self._store.chunks_of_others())
            (first,) = engine.ask(PROMPT)
        self._note("LMCache over S3, new engine", [first])

    def _engine(
        self, name: str, connector: Mapping[str, Any] | None, environment: Mapping[str, str], **more: Any
    ) -> AbstractContextManager[Engine]:
        arguments = {"enable_prefix_caching": False, **more}
        log = self._store.folder / f"{name}.log"
        return running_engine(self._model, connector=connector, environment=environment, log=log, **arguments)

    def _lmcache_engine(self, name: str, port: int) -> AbstractContextManager[Engine]:
        assert self._lmcache is not None
        environment = self._lmcache.environment()
        return self._engine(name, self._lmcache.connector(port), environment, python=self._lmcache.python)

    def _note(self, name: str, answers: list[Answer], *, cached: int = whole_chunks(PROMPT_TOKENS)) -> None:
        """Keep the times of answers that came the way they should; say it where they did not."""
        for answer in answers:
            if answer.tokens != (self._expected or answer.tokens):
                self._wrong.append(name)
            if answer.cached != cached:
                self._skip(name, f"{answer.cached} tokens were not computed, expected {cached}")
                continue
            self._rows.setdefault(name, []).append(answer.ms)

    def _sources(self, name: str, counters: Mapping[str, float]) -> None:
        """Where our connector says that its bytes came from."""
        found = {key: int(value) for key, value in counters.items() if "kvstore_bytes_read" in key and value}
        self._bytes_by_source[name] = found

    def _try(self, way: Callable[[], None]) -> None:
        try:
            way()
        except (EngineFailedError, PeerMissingError) as error:
            self._skip(way.__name__.strip("_").replace("_", " "), str(error))

    def _skip(self, name: str, reason: str) -> None:
        if name not in self._skipped:
            self._skipped[name] = reason
            print(f"{name}: skipped, {reason}")

    def _find_lmcache(self) -> LMCache | None:
        try:
            return find_lmcache(self._store.server, BUCKET, DOMAIN, self._store.folder)
        except PeerMissingError as error:
            self._skip("LMCache", str(error))
            return None

    def _versions(self) -> dict[str, str]:
        return {} if self._lmcache is None else {"lmcache": self._lmcache.version()}


def fill(store: Store, model: Path, nvme_tier_dir: Path | None = None) -> None:
    """Let an engine save PROMPT under hits/ and to the tier, where one is given. It ends when all is stored."""
    chunks, log = PROMPT_TOKENS // CHUNK_TOKENS, store.folder / "fill.log"
    environment = store.environment(**({"nvme_tier_dir": nvme_tier_dir} if nvme_tier_dir else {}))
    with running_engine(model, connector=store.ours("hits"), environment=environment, log=log) as engine:
        engine.ask(WARM_UP, PROMPT)
        if (found := store.await_chunks("hits/", chunks)) < chunks:
            raise EngineFailedError(f"{found} of {chunks} chunks were saved")
        if nvme_tier_dir is not None:  # it is filled in the background
            await_bytes(nvme_tier_dir, sum(store.chunk_sizes("hits/")))


def summarise(values: list[float]) -> dict[str, Any]:
    return {
        "ms": round(median(values), 1),
        "least": round(min(values), 1),
        "most": round(max(values), 1),
        "samples": [round(value, 1) for value in values],
    }
