"""Examples drawn at random, the same in each run, as many as a test asks for. None is made smaller, none is kept.

The strategies are those that tests/device use (tests/test_gpu_stand_ins.py looks after that).
"""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

EXAMPLES = 25
EDGES = 0.2
"""How often an integer is one of its bounds."""

Strategy = Callable[[random.Random], Any]


class HealthCheck:
    function_scoped_fixture = "function_scoped_fixture"
    too_slow = "too_slow"


def settings(*, max_examples: int = EXAMPLES, **_: object) -> Callable[[Any], Any]:
    def mark(test: Any) -> Any:
        test.max_examples = max_examples
        return test

    return mark


settings.register_profile = settings.load_profile = lambda *_, **__: None  # they say nothing that is heeded here


def given(*strategies: Strategy) -> Callable[[Any], Any]:
    """The last parameters of a test are drawn."""

    def decorate(test: Any) -> Any:
        parameters = list(inspect.signature(test).parameters.values())

        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            for number in range(getattr(run, "max_examples", EXAMPLES)):
                generator = random.Random(f"{test.__name__} {number}")
                drawn = [strategy(generator) for strategy in strategies]
                names = [parameter.name for parameter in parameters[len(parameters) - len(strategies) :]]
                try:
                    test(**fixtures, **dict(zip(names, drawn, strict=True)))
                except BaseException as error:
                    error.add_note(f"example {number} of this stand-in for hypothesis: {repr(drawn)[:500]}")
                    raise

        run.__signature__ = inspect.Signature(parameters[: len(parameters) - len(strategies)])
        del run.__wrapped__
        return run

    return decorate


def _integers(least: int, most: int) -> Strategy:
    def draw(generator: random.Random) -> int:
        if generator.random() < EDGES:
            return generator.choice((least, most))
        return generator.randint(least, most)

    return draw


def _booleans() -> Strategy:
    return lambda generator: generator.random() < 0.5


def _sampled_from(choices: Sequence[Any]) -> Strategy:
    return lambda generator: generator.choice(choices)


def _lists(items: Strategy, *, min_size: int = 0, max_size: int) -> Strategy:
    return lambda generator: [items(generator) for _ in range(generator.randint(min_size, max_size))]


def _tuples(*items: Strategy) -> Strategy:
    return lambda generator: tuple(item(generator) for item in items)


def _data() -> Strategy:
    return lambda generator: SimpleNamespace(draw=lambda strategy: strategy(generator))


def _composite(draw_all: Callable[..., Any]) -> Callable[..., Strategy]:
    def make(*arguments: Any, **named: Any) -> Strategy:
        return lambda generator: draw_all(lambda strategy: strategy(generator), *arguments, **named)

    return make


strategies = SimpleNamespace(
    booleans=_booleans,
    integers=_integers,
    sampled_from=_sampled_from,
    lists=_lists,
    tuples=_tuples,
    data=_data,
    composite=_composite,
    DrawFn=Any,
    DataObject=Any,
)
