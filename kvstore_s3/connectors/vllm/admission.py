"""Whether the store is worth asking, reading and filling: for each prompt, from measured costs. Pure.

docs/admission.md gives the reasoning. What is not known, or was measured too long ago, speaks for the store: using it
is how it becomes known.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median_low

from kvstore_s3.connectors.vllm.costs import LinearFit, PrefillMeter
from kvstore_s3.connectors.vllm.plans import floor_to

MISS_SHARE = 0.01
"""Share of the time to compute prompts that may be spent waiting for lookups that find nothing."""

WORTH = 0.9
"""A load is worth it if it is expected to take at most this share of the time to compute the same tokens."""

PATIENCE = 0.25
"""Share of the time to compute a prompt by which its first token may be late in the worst case."""

LIFETIME_S = 60.0
"""Seconds after which a measured wait, link or load is not known any more: it is measured again by being used."""

FIRST_CREDIT_S = 0.1
"""Seconds of waiting that are allowed before anything was earned."""

MOST_CREDIT_S = 2.0
"""Seconds of waiting that can be saved up, or owed: so much is spent after a time of many hits, before it counts that
there are none any more."""

ENOUGH = 3
"""Waits and loads from which on their cost counts as known: the first ones open connections and touch fresh memory."""

_WAITS = 15
_LOADS = 16
_FITS = 4
"""Rounds of a fit, each of which brings it closer, that new loads are worth at most."""
_FADE = 0.9

SHORT = "short"
NOT_WORTH_IT = "not-worth-it"
UNLIKELY = "unlikely"
FIRST_SIGHT = "first-sight"


class LoadCosts:
    """What loads from one place take, by size. Known from `ENOUGH` loads on, until `LIFETIME_S` after the last one."""

    def __init__(self) -> None:
        self._fit = LinearFit((0.0, 0.0), window=_LOADS)
        """Features: bytes, one."""
        self._new = 0
        self._last = float("-inf")

    def note(self, size: int, seconds: float, now: float) -> None:
        if size <= 0 or seconds <= 0:
            return
        if now - self._last > LIFETIME_S:
            self._fit.clear()
        self._fit.add((size, 1.0), seconds)
        self._new += 1
        self._last = now

    def seconds(self, size: float, now: float) -> float | None:
        if self._fit.samples < ENOUGH or now - self._last > LIFETIME_S:
            return None
        for _ in range(min(self._new, _FITS)):  # loads end in bunches: fitted together, when it is asked for
            self._fit.fit()
        self._new = 0
        by_byte, fixed = self._fit.coefficients
        return float(fixed + size * by_byte)


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided last, and from which numbers (seconds; None: not known)."""

    question: str
    begin: int
    end: int
    reason: str | None
    prefill_s: float | None = None
    load_s: float | None = None
    wait_s: float | None = None
    credit_s: float | None = None

    def __str__(self) -> str:
        numbers = (
            ("computing takes", self.prefill_s),
            ("loading", self.load_s),
            ("the lookup", self.wait_s),
            ("left for waiting", self.credit_s),
        )
        known = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in numbers if seconds is not None)
        answer = "yes" if self.reason is None else f"no, {self.reason}"
        return f"{self.question} of tokens {self.begin} to {self.end}: {answer} ({known or 'nothing is known yet'})"


class Admission:
    """Decides for the scheduler; for its thread alone. Each call takes some microseconds, however long the prompt.

    Answers are None for yes, else the reason, as a metric's label: "short" (a longer prompt would repay),
    "not-worth-it", "unlikely" and "first-sight". With `always`, only prompts without a whole chunk are left alone;
    `save_at` holds all the same.
    """

    def __init__(
        self,
        meter: PrefillMeter,
        *,
        chunk_tokens: int,
        always: bool = False,
        save_at: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`save_at` 2: a chunk is saved when it is seen for the second time."""
        self.meter = meter
        self._chunk_tokens = chunk_tokens
        self._always = always
        self._save_at = save_at
        self._clock = clock
        self._waits: deque[float] = deque(maxlen=_WAITS)
        self._waited_at = float("-inf")
        self._far = LoadCosts()
        self._near = LoadCosts()
        self._link: tuple[float, float] | None = None  # bytes/s, seconds of latency
        self._link_at = float("-inf")
        self._bytes = self._tokens = 0.0
        self._credit_s = FIRST_CREDIT_S
        self._waiting = 0
        self._last: Decision | None = None

    def explain(self) -> str:
        """The last decision in words, for the debug log."""
        return str(self._last) if self._last else "nothing was decided yet"

    # Questions.

    def may_look_up(self, prompt_tokens: int) -> str | None:
        """Whether a new request should wait for the store's answer. To be asked once for each: it earns credit.

        "unlikely": look up, as saves need the answer too, but do not let the request wait for it. The other reasons
        leave the request alone.
        """
        whole = floor_to(prompt_tokens, self._chunk_tokens)
        if not whole:
            return self._decide(Decision("lookup", 0, prompt_tokens, SHORT))
        prefill = self.meter.seconds(0, whole)
        if self._always or prefill is None:
            self._waiting += 1
            return self._decide(Decision("lookup", 0, whole, None, prefill))
        self._earn(MISS_SHARE * (self.meter.seconds(0, prompt_tokens) or 0.0))
        reason, load, wait = self._weigh(whole, prefill)
        credit_s = self._credit_s - self._waiting * (wait or 0.0)  # what those who wait now will have cost
        if reason is None and credit_s <= 0 and (wait is None or wait > MISS_SHARE * prefill):
            reason = UNLIKELY
        self._waiting += reason is None
        return self._decide(Decision("lookup", 0, whole, reason, prefill, load, wait, credit_s))

    def end_wait(self) -> None:
        """A request that was allowed to wait does so no more: to be told once of each, beside `note_lookup`."""
        self._waiting = max(0, self._waiting - 1)

    def patience_s(self, begin: int, prompt_tokens: int, deadline_s: float) -> float:
        """Most seconds that the store may cost a request of which tokens from `begin` on would be computed."""
        prefill = self.meter.seconds(begin, prompt_tokens)
        return deadline_s if self._always or prefill is None else min(deadline_s, PATIENCE * prefill)

    def may_load(self, computed: int, hit_tokens: int, prompt_tokens: int, hit_bytes: int, near: bool) -> str | None:
        """Whether to load tokens `computed` to `hit_tokens`, `hit_bytes` encoded; `near`: from this machine's tiers."""
        end = min(hit_tokens, prompt_tokens)
        prefill = self.meter.seconds(computed, end)
        load = self._load_seconds(hit_bytes, near=near)
        refused = not self._always and prefill is not None and load is not None and load > WORTH * prefill
        return self._decide(Decision("load", computed, end, NOT_WORTH_IT if refused else None, prefill, load))

    def may_save(self, begin: int, end: int, *, prompt_tokens: int, seen_tokens: int = 0) -> tuple[int, str | None]:
        """Up to which token of `begin` to `end` to save, and why not all of it.

        `seen_tokens` leading tokens of the prompt, whole chunks, were in an earlier request (`Sights.note`).
        """
        whole = floor_to(prompt_tokens, self._chunk_tokens)
        prefill = self.meter.seconds(0, whole)
        if not self._always and prefill is not None:
            reason, load, wait = self._weigh(whole, prefill)
            if reason is not None:
                self._decide(Decision("save", begin, end, reason, prefill, load, wait))
                return begin, reason
        limit = min(end, max(begin, seen_tokens)) if self._save_at > 1 else end
        reason = FIRST_SIGHT if limit < end else None
        self._decide(Decision("save", begin, end, reason, prefill))
        return limit, reason

    # What was measured.

    def note_lookup(self, waited_s: float | None, *, hit_tokens: int = 0, hit_bytes: int = 0) -> None:
        """A lookup ended, or was given up, and its request waited `waited_s` for it; the hit is all that is stored.

        None: the request did not wait, and what was found came too late for it. That earns what waiting would have.
        """
        self._note_size(hit_tokens, hit_bytes)
        if waited_s is not None:
            self._waits.append(waited_s)
            self._waited_at = self._clock()
            self._earn(-waited_s)
        elif hit_tokens:
            load = self._load_seconds(hit_bytes, near=False) or 0.0
            self._earn(max(0.0, (self.meter.seconds(0, hit_tokens) or 0.0) - load - (self._wait_seconds() or 0.0)))

    def note_load(self, begin: int, end: int, size: int, seconds: float, *, near: bool) -> None:
        """Tokens `begin` to `end`, `size` bytes encoded, were loaded in `seconds`, from the order to the report."""
        (self._near if near else self._far).note(size, seconds, self._clock())
        prefill = self.meter.seconds(begin, end)
        if prefill is not None:
            self._earn(prefill - seconds)

    def note_save(self, tokens: int, size: int) -> None:
        """A save wrote `tokens` tokens as `size` bytes."""
        self._note_size(tokens, size)

    def note_link(self, bytes_per_s: float | None, latency_s: float) -> None:
        """What a worker thinks of the link. Told again without a change, it grows no younger."""
        if bytes_per_s and (bytes_per_s, latency_s) != self._link:
            self._link, self._link_at = (bytes_per_s, latency_s), self._clock()

    def _note_size(self, tokens: int, size: int) -> None:
        if tokens > 0 and size > 0:
            self._bytes, self._tokens = self._bytes * _FADE + size, self._tokens * _FADE + tokens

    def _earn(self, seconds: float) -> None:
        self._credit_s = min(max(self._credit_s + seconds, -MOST_CREDIT_S), MOST_CREDIT_S)

    def _weigh(self, whole: int, prefill: float) -> tuple[str | None, float | None, float | None]:
        """Why a prompt whose `whole` tokens were all stored would not repay, and what loading and waiting take."""
        wait = self._wait_seconds()
        size = whole * self._bytes / self._tokens if self._tokens else None
        times = [self._load_seconds(size, near=near) for near in (False, True)] if size else [None]
        known = [seconds for seconds in times if seconds is not None]
        if times[0] is None or wait is None:
            return None, times[0], wait
        load = min(known)
        if wait + load <= WORTH * prefill:
            return None, load, wait
        return self._why_not(whole, size or 0.0), load, wait

    def _why_not(self, whole: int, size: float) -> str:
        """A prompt sixteen times as long tells whether it is the length."""
        times = [self._load_seconds(16 * size, near=near) for near in (False, True)]
        load = min(seconds for seconds in times if seconds is not None)
        prefill = self.meter.seconds(0, 16 * whole) or 0.0
        return SHORT if load <= WORTH * prefill else NOT_WORTH_IT

    def _wait_seconds(self) -> float | None:
        """What a lookup makes a request wait: the median of the last ones."""
        if len(self._waits) < ENOUGH or self._clock() - self._waited_at > LIFETIME_S:
            return None
        return median_low(self._waits)

    def _load_seconds(self, size: float, *, near: bool) -> float | None:
        now = self._clock()
        seconds = (self._near if near else self._far).seconds(size, now)
        if seconds is None and not near and self._link and now - self._link_at <= LIFETIME_S:
            rate, latency_s = self._link
            seconds = latency_s + size / rate
        return seconds

    def _decide(self, decision: Decision) -> str | None:
        self._last = decision
        return decision.reason
