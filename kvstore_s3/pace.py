"""What a load competes with."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore_s3.errors import InvalidArgumentError
from kvstore_s3.planner import PrefillSpeed


@dataclass(frozen=True, slots=True)
class Pace:
    """What a load competes with: the engine could compute the prompt instead.

    `prompt_tokens` is the length of the whole prompt. With `deadline_s` (to the first token, from the start of the
    load), levels of lossy objects are left out, down to the setting `lowest_profile`, where they would come too late.
    `spent_s` passed before the load, such as for the lookup.

    `seconds_per_layer` is for engines that compute layer by layer while the load runs: the group of layer n is needed n
    times so long after the start. Others (0) wait for the whole: it comes as one group (or as few as the slabs allow),
    chunk by chunk, and is given up once it has cost a quarter of the prefill more than the chunks that are there save.
    """

    prefill: PrefillSpeed
    prompt_tokens: int
    deadline_s: float | None = None
    seconds_per_layer: float = 0.0
    spent_s: float = 0.0

    def __post_init__(self) -> None:
        seconds = (self.deadline_s or 0.0, self.seconds_per_layer, self.spent_s)
        if self.prompt_tokens < 0 or not all(0 <= value < float("inf") for value in seconds):
            raise InvalidArgumentError(f"tokens and seconds of a pace are finite and not negative, not {self}")

    @property
    def by_layer(self) -> bool:
        """Whether the engine starts before all layers are there."""
        return self.seconds_per_layer > 0
