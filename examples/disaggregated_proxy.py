"""A small proxy for prefill-decode disaggregation through a KV store: what an engine prefills, another one decodes.

    python examples/disaggregated_proxy.py --prefill http://host-a:8000 --decode http://host-b:8000 --port 8100

Each prompt goes to a prefill engine, which computes and stores it, and at the same moment to a decode engine, which
loads its chunks while they are being stored and answers. Neither knows of the other: both make the same keys of the
same prompt. Where a prefill fails before the answer has begun, the decode engine is asked anew and computes what is
missing. Several of each may be named; the one with the fewest requests is taken. docs/disaggregation.md says more.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, web

log = logging.getLogger("disaggregated_proxy")

GENERATING = ("/v1/completions", "/v1/chat/completions")
NOT_FOR_PREFILL = ("min_tokens", "stream_options", "logprobs", "top_logprobs", "prompt_logprobs", "best_of")
"""What the prefill engine need not, or with one token to make must not, be asked for."""
CHARACTERS_PER_TOKEN = 4
PASSED_ON = ("authorization", "content-type")


@dataclass(slots=True)
class Engine:
    """One engine's URL, and how many requests it is at work on."""

    url: str
    busy: int = 0

    @contextlib.contextmanager
    def at_work(self) -> Iterator[str]:
        self.busy += 1
        try:
            yield self.url
        finally:
            self.busy -= 1


def least_busy(engines: Sequence[Engine]) -> Engine:
    return min(engines, key=lambda engine: engine.busy)


def count_tokens(body: Mapping[str, Any]) -> int:
    """Tokens of the prompt: exact where it is given as ids, else a guess. What is not understood counts as nothing."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
        return len(prompt)
    if isinstance(prompt, str):
        return len(prompt) // CHARACTERS_PER_TOKEN
    messages = body.get("messages")
    return len(json.dumps(messages)) // CHARACTERS_PER_TOKEN if isinstance(messages, list) else 0


def prefill_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same prompt, and one token as the answer."""
    kept = {name: value for name, value in body.items() if name not in NOT_FOR_PREFILL}
    limit = "max_tokens" if "prompt" in body else "max_completion_tokens"
    kept.pop("max_tokens", None)
    return {**kept, limit: 1, "n": 1, "stream": False, "kv_transfer_params": {"do_remote_decode": True}}


def decode_body(body: Mapping[str, Any]) -> dict[str, Any]:
    return {**body, "kv_transfer_params": {"do_remote_prefill": True}}


@dataclass(slots=True)
class Proxy:
    """Prompts of at least `least_tokens` go to both kinds of engine; all else goes to a decode engine alone."""

    prefill: list[Engine]
    decode: list[Engine]
    least_tokens: int
    session: ClientSession = field(init=False)

    def make_app(self) -> web.Application:
        app = web.Application(client_max_size=64 * 1024**2)
        app.cleanup_ctx.append(self._connect)
        app.router.add_route("*", "/{path:.*}", self.handle)
        return app

    async def _connect(self, app: web.Application) -> AsyncIterator[None]:
        timeout = ClientTimeout(total=None, sock_connect=10)
        async with ClientSession(timeout=timeout, auto_decompress=False) as self.session:
            yield

    async def handle(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        body = parse(raw) if request.path in GENERATING else None
        if body is not None and body.pop("kv_transfer_params", None) is not None:  # the proxy's to say, not a client's
            raw = json.dumps(body).encode()
        with least_busy(self.decode).at_work() as url:
            try:
                if body is None or count_tokens(body) < self.least_tokens:
                    answer = await self._ask(url, request, raw)
                    return await relay(answer, request)
                return await self._disaggregate(url, request, body)
            except ClientError as error:
                log.warning("%s does not answer: %s", url, error)
                raise web.HTTPBadGateway(text="the engine does not answer") from error

    async def _disaggregate(self, url: str, request: web.Request, body: Mapping[str, Any]) -> web.StreamResponse:
        prefill = asyncio.create_task(self._prefill(request, body))
        decode = asyncio.create_task(self._ask(url, request, json.dumps(decode_body(body)).encode()))
        try:
            await asyncio.wait((prefill, decode), return_when=asyncio.FIRST_COMPLETED)
            if not decode.done() and not prefill.result():  # it would wait in vain for what does not come
                await cancel(decode)
                decode = asyncio.create_task(self._ask(url, request, json.dumps(body).encode()))
            return await relay(await decode, request)
        finally:
            await cancel(prefill, decode)

    async def _prefill(self, request: web.Request, body: Mapping[str, Any]) -> bool:
        """Whether a prefill engine has computed the prompt."""
        with least_busy(self.prefill).at_work() as url:
            try:
                answer = await self._ask(url, request, json.dumps(prefill_body(body)).encode())
                async with answer.response:
                    await answer.response.read()
            except ClientError as error:
                log.warning("prefill at %s failed: %s", url, error)
                return False
        if answer.response.status != 200:
            log.warning("prefill at %s failed with status %d", url, answer.response.status)
        return answer.response.status == 200

    async def _ask(self, url: str, request: web.Request, body: bytes) -> Answer:
        """An engine's answer, once it has begun: of a stream, the head alone says nothing yet."""
        headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
        response = await self.session.request(request.method, url + request.path_qs, data=body, headers=headers)
        try:
            return Answer(response, await response.content.readany())
        except BaseException:
            response.close()
            raise


@dataclass(frozen=True, slots=True)
class Answer:
    """An engine's answer, of which `first` was read."""

    response: ClientResponse
    first: bytes


def parse(raw: bytes) -> dict[str, Any] | None:
    """A request's body; None where it is no JSON object, which the engine may say itself."""
    try:
        body = json.loads(raw)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


async def relay(answer: Answer, request: web.Request) -> web.StreamResponse:
    """Pass an engine's answer on as it comes. One that breaks off is broken off."""
    async with answer.response as source:
        kept = {"Content-Type": source.headers.get("Content-Type", "application/json")}
        response = web.StreamResponse(status=source.status, headers=kept)
        await response.prepare(request)
        try:
            await response.write(answer.first)
            async for piece in source.content.iter_any():
                await response.write(piece)
            await response.write_eof()
        except ClientError as error:
            log.warning("an answer broke off: %s", error)
            if request.transport is not None:
                request.transport.abort()
    return response


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """End tasks, and with them their requests: an engine drops a request whose client is gone."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prefill on some engines, decode on others, KV through a store.")
    parser.add_argument("--prefill", action="append", required=True, metavar="URL", help="an engine that prefills")
    parser.add_argument("--decode", action="append", required=True, metavar="URL", help="an engine that decodes")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8100, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--least-tokens",
        type=int,
        default=512,
        help="shorter prompts are prefilled where they are decoded (%(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = parse_options(arguments)
    prefill, decode = ([Engine(url.rstrip("/")) for url in urls] for urls in (options.prefill, options.decode))
    app = Proxy(prefill, decode, options.least_tokens).make_app()
    web.run_app(app, host=options.host, port=options.port, handler_cancellation=True, access_log=None)


if __name__ == "__main__":
    main()
