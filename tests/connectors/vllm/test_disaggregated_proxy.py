"""The proxy between prefill and decode engines, with HTTP servers that answer as engines do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from aiohttp import ClientError, ClientSession, web
from disaggregated_proxy import Engine, Proxy, count_tokens, decode_body, parse_options, prefill_body

PROMPT = list(range(600))
Handler = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


class FakeEngine:
    """Notes each body, and answers as `handler` does. `dropped` is set when a client goes before its answer."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.bodies: list[dict[str, Any]] = []
        self.asked = asyncio.Event()
        self.dropped = asyncio.Event()
        self.headers: dict[str, str] = {}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        body = json.loads(raw) if raw else {}
        self.bodies.append(body)
        self.headers = dict(request.headers)
        self.asked.set()
        try:
            return await self._handler(request, body)
        except asyncio.CancelledError:
            self.dropped.set()
            raise


async def say(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """An answer in two pieces where it is to be streamed."""
    if not body.get("stream"):
        return web.json_response({"text": "whole"})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for piece in (b"data: one\n\n", b"data: [DONE]\n\n"):
        await response.write(piece)
    await response.write_eof()
    return response


async def refuse(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.json_response({"error": "no"}, status=500)


async def hang_up(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def never(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """The head of a stream at once, and then nothing, as long as the client is there."""
    response = web.StreamResponse()
    await response.prepare(request)
    await asyncio.Event().wait()
    return response


@asynccontextmanager
async def serving(answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    async with serving_app(app) as url:
        yield url


@asynccontextmanager
async def serving_app(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def proxied(prefill: FakeEngine, *decode: FakeEngine) -> AsyncIterator[tuple[ClientSession, Proxy]]:
    """A client of a proxy between one prefill engine and some that decode."""
    async with AsyncExitStack() as stack:
        prefill_url, *urls = [await stack.enter_async_context(serving(one.answer)) for one in (prefill, *decode)]
        proxy = Proxy([Engine(prefill_url)], [Engine(url) for url in urls], least_tokens=512)
        url = await stack.enter_async_context(serving_app(proxy.make_app()))
        yield await stack.enter_async_context(ClientSession(url)), proxy


async def complete(client: ClientSession, **body: Any) -> tuple[int, bytes]:
    async with client.post("/v1/completions", json={"model": "m", "prompt": PROMPT, "max_tokens": 9, **body}) as answer:
        return answer.status, await answer.read()


async def test_both_engines_get_the_prompt_and_the_decode_engine_answers():
    prefill, decode = FakeEngine(say), FakeEngine(say)
    async with proxied(prefill, decode) as (client, proxy):
        status, text = await complete(client)
        assert (status, json.loads(text)) == (200, {"text": "whole"})
        assert [engine.busy for engine in proxy.prefill + proxy.decode] == [0, 0]
    assert decode.bodies[0]["prompt"] == PROMPT
    assert decode.bodies[0]["max_tokens"] == 9
    assert decode.bodies[0]["kv_transfer_params"] == {"do_remote_prefill": True}
    assert [body["max_tokens"] for body in prefill.bodies] == [1]
    assert prefill.bodies[0]["prompt"] == PROMPT


async def test_a_stream_is_passed_on():
    prefill, decode = FakeEngine(say), FakeEngine(say)
    async with proxied(prefill, decode) as (client, _):
        status, text = await complete(client, stream=True)
    assert (status, text) == (200, b"data: one\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("failing", [refuse, hang_up])
async def test_a_prefill_that_fails_has_the_decode_engine_asked_anew(failing: Handler):
    async def wait_for_prefill(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await (never if "kv_transfer_params" in body else say)(request, body)

    prefill, decode = FakeEngine(failing), FakeEngine(wait_for_prefill)
    async with proxied(prefill, decode) as (client, _):
        status, text = await complete(client)
        assert (status, json.loads(text)) == (200, {"text": "whole"})
        async with asyncio.timeout(60):
            await decode.dropped.wait()
    assert [body.get("kv_transfer_params") for body in decode.bodies] == [{"do_remote_prefill": True}, None]


async def test_an_answer_that_comes_before_the_prefill_ends_is_not_waited_with():
    prefill, decode = FakeEngine(never), FakeEngine(say)
    async with proxied(prefill, decode) as (client, _):
        status, _text = await complete(client)
        assert status == 200
        async with asyncio.timeout(60):
            await prefill.dropped.wait()


async def test_a_client_that_goes_ends_the_work_of_both_engines():
    prefill, decode = FakeEngine(never), FakeEngine(never)
    async with proxied(prefill, decode) as (client, _):
        asking = asyncio.create_task(complete(client))
        async with asyncio.timeout(60):
            await asyncio.gather(prefill.asked.wait(), decode.asked.wait())
            asking.cancel()
            await asyncio.gather(prefill.dropped.wait(), decode.dropped.wait())


async def test_short_prompts_and_other_requests_go_to_the_decode_engine_alone():
    prefill, decode = FakeEngine(say), FakeEngine(say)
    async with proxied(prefill, decode) as (client, _):
        await complete(client, prompt=[1, 2, 3])
        async with client.get("/v1/models", headers={"Authorization": "Bearer key"}) as answer:
            assert answer.status == 200
    assert prefill.bodies == []
    assert "kv_transfer_params" not in decode.bodies[0]
    assert decode.headers["Authorization"] == "Bearer key"


async def test_an_error_of_the_decode_engine_is_passed_on():
    prefill, decode = FakeEngine(say), FakeEngine(refuse)
    async with proxied(prefill, decode) as (client, _):
        status, text = await complete(client)
    assert (status, json.loads(text)) == (500, {"error": "no"})


async def test_a_decode_engine_that_is_gone_is_a_bad_gateway():
    prefill, decode = FakeEngine(say), FakeEngine(hang_up)
    async with proxied(prefill, decode) as (client, _):
        status, _text = await complete(client)
    assert status == 502


async def test_an_answer_that_breaks_off_does_not_end_well():
    async def break_off(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: one\n\n")
        assert request.transport is not None
        request.transport.close()
        return response

    prefill, decode = FakeEngine(say), FakeEngine(break_off)
    async with proxied(prefill, decode) as (client, _):
        with pytest.raises(ClientError):
            await complete(client, stream=True)


async def test_the_engine_with_the_fewest_requests_is_taken():
    prefill, one, other = FakeEngine(say), FakeEngine(never), FakeEngine(say)
    async with proxied(prefill, one, other) as (client, _):
        waiting = asyncio.create_task(complete(client))
        await one.asked.wait()
        for _ in range(3):
            assert (await complete(client))[0] == 200
        waiting.cancel()
    assert (len(one.bodies), len(other.bodies)) == (1, 3)


def test_the_prefill_engine_is_asked_for_one_token_and_nothing_that_forbids_it():
    chat = {"messages": [], "max_tokens": 9, "min_tokens": 5, "stream": True, "stream_options": {}, "n": 2}
    asked = prefill_body(chat)
    assert asked == {
        "messages": [],
        "max_completion_tokens": 1,
        "n": 1,
        "stream": False,
        "kv_transfer_params": {"do_remote_decode": True},
    }
    assert decode_body(chat) == {**chat, "kv_transfer_params": {"do_remote_prefill": True}}


def test_tokens_are_counted_or_guessed():
    assert count_tokens({"prompt": PROMPT}) == 600
    assert count_tokens({"prompt": "x" * 400}) == 100
    assert count_tokens({"prompt": ["several", "prompts"]}) == 0
    assert count_tokens({"messages": [{"role": "user", "content": "x" * 4000}]}) > 1000
    assert count_tokens({}) == 0


def test_engines_are_named_on_the_command_line():
    options = parse_options(["--prefill", "http://a", "--prefill", "http://b", "--decode", "http://c"])
    assert (options.prefill, options.decode, options.port) == (["http://a", "http://b"], ["http://c"], 8100)


async def test_what_a_client_says_of_prefill_and_decode_is_not_passed_on():
    prefill, decode = FakeEngine(say), FakeEngine(say)
    async with proxied(prefill, decode) as (client, _):
        for prompt in ([1, 2, 3], PROMPT):
            await complete(client, prompt=prompt, kv_transfer_params={"do_remote_prefill": True, "other": 1})
    assert [body.get("kv_transfer_params") for body in decode.bodies] == [None, {"do_remote_prefill": True}]
