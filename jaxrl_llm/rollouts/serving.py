"""An HTTP server that speaks OpenAI's API, over one engine: clients and tools that know it need no other.

    GET   /v1/models
    POST  /v1/completions         prompt: text, token ids, or a list of either
    POST  /v1/chat/completions    messages, by the tokenizer's chat template

Offered: max_tokens, temperature, top_p, n, stop, seed, stream, logprobs; and top_k and min_p. If the engine
has `serving_rules`: presence_penalty, frequency_penalty, logit_bias, response_format (schemas as far as
`sampling.json_schemas` knows them); and repetition_penalty and min_tokens. What is not offered is refused,
not ignored. A client that goes away cancels what it asked for.

`logprob` is the model's own, whatever the sampling parameters and rules. Beside it stand `token_id` and
`behaviour_logprob`, of the distribution that was drawn from. `text_offset` counts characters from the
completion's beginning. A `seed` with the same engine gives the same tokens.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxrl_llm.data.tokenizers import Tokenizer
from jaxrl_llm.rollouts.completion_api import BadRequest, Call, read_call, spelled
from jaxrl_llm.rollouts.engine import Completion, Engine
from jaxrl_llm.rollouts.serving_rules import RowRules
from jaxrl_llm.rollouts.streaming import Offsets, TextStream

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Served:
    """An engine, the tokenizer of its model, and what each token id writes."""

    engine: Engine
    tokenizer: Tokenizer
    spelling: list[bytes | None]


def make_app(engine: Engine, tokenizer: Tokenizer, *, model: str) -> Starlette:
    """The server.

    Args:
      engine: that does the work; others may use it too. Its rules decide what is offered.
      tokenizer: of its model.
      model: the name under which it is served.
    """
    served = Served(engine, tokenizer, spelled(tokenizer))
    rules = RowRules(engine, tokenizer)
    numbers = itertools.count()
    started = int(time.time())

    async def models(_: HttpRequest) -> Response:
        card = {"id": model, "object": "model", "created": started, "owned_by": "jaxrl_llm"}
        return JSONResponse({"object": "list", "data": [card]})

    async def answer(http: HttpRequest, *, chat: bool) -> Response:
        try:
            body = json.loads(await http.body())
        except ValueError as error:
            return refusal(f"the body is not JSON: {error}")
        try:
            call = read_call(body, tokenizer, chat=chat, model=model, max_length=engine.max_length)
            for request in call.requests:  # before the first is served
                engine.check(request)
            call = await asyncio.to_thread(rules.ruled, call)
        except BadRequest as error:
            engine.counts["refused"] += 1
            return refusal(str(error), error.param, error.status)
        except ValueError as error:
            return refusal(str(error))
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{next(numbers)}",
            "created": int(time.time()),
            "model": model,
        }
        if call.stream:
            return StreamingResponse(_events(served, call, head), media_type="text/event-stream")
        whole = asyncio.create_task(_whole(served, call, head))
        gone = asyncio.create_task(_disconnected(http))
        try:
            await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
            return whole.result() if whole.done() else Response(status_code=499)  # nobody reads it
        finally:
            whole.cancel()
            gone.cancel()

    async def completions(http: HttpRequest) -> Response:
        return await answer(http, chat=False)

    async def chat_completions(http: HttpRequest) -> Response:
        return await answer(http, chat=True)

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        ]
    )


def refusal(message: str, param: str | None = None, status: int = 400) -> JSONResponse:
    """An error as clients of the API expect it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": _error(message, kind, param)}, status)


def _error(message: str, kind: str, param: str | None = None) -> Json:
    return {"message": message, "type": kind, "param": param, "code": None}


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _pieces(engine: Engine, call: Call) -> AsyncGenerator[tuple[int, Completion], None]:
    """What the requests write, as it comes, each piece with the number of its choice.

    Whoever stops listening cancels all of them.
    """
    pieces: asyncio.Queue[tuple[int, Completion] | Exception] = asyncio.Queue()

    async def pump(index: int) -> None:
        try:
            async for piece in engine.stream(call.requests[index]):
                pieces.put_nowait((index, piece))
        except Exception as error:
            pieces.put_nowait(error)

    tasks = [asyncio.create_task(pump(index)) for index in range(len(call.requests))]
    try:
        running = len(tasks)
        while running:
            piece = await pieces.get()
            if isinstance(piece, Exception):
                raise piece
            running -= bool(piece[1].reason)
            yield piece
    finally:
        for task in tasks:
            task.cancel()


async def _whole(served: Served, call: Call, head: Json) -> Response:
    """All choices in one response."""
    texts = [TextStream(served.tokenizer, call.stops) for _ in call.requests]
    offsets = [Offsets() for _ in texts]
    written = [""] * len(texts)
    entries: list[list[Json]] = [[] for _ in texts]
    reasons = [""] * len(texts)
    async with contextlib.aclosing(_pieces(served.engine, call)) as pieces:
        async for index, piece in pieces:
            written[index] += texts[index].push(piece.tokens.tolist(), last=bool(piece.reason))
            entries[index] += _entries(served, piece)
            reasons[index] = piece.reason
            if piece.reason == "failed":
                return refusal(str(piece.error), status=500)
    choices = [
        {
            "index": index,
            **(
                {"message": {"role": "assistant", "content": written[index], "refusal": None}}
                if call.chat
                else {"text": written[index]}
            ),
            "logprobs": _logprobs(entries[index], call, offsets[index]),
            "finish_reason": reasons[index],
        }
        for index in range(len(texts))
    ]
    kind = "chat.completion" if call.chat else "text_completion"
    usage = _usage(call, sum(map(len, entries)))
    return JSONResponse(head | {"object": kind, "choices": choices, "usage": usage})


async def _events(served: Served, call: Call, head: Json) -> AsyncIterator[str]:
    """Server-sent events: what is new of a choice in each."""
    head = head | {"object": "chat.completion.chunk" if call.chat else "text_completion"}
    texts = [TextStream(served.tokenizer, call.stops) for _ in call.requests]
    offsets = [Offsets() for _ in texts]
    started = [False] * len(texts)
    count = 0
    try:
        async with contextlib.aclosing(_pieces(served.engine, call)) as pieces:
            async for index, piece in pieces:
                if piece.reason == "failed":
                    raise RuntimeError(piece.error)
                text = texts[index].push(piece.tokens.tolist(), last=bool(piece.reason))
                role = {} if started[index] else {"role": "assistant"}
                started[index] = True
                count += len(piece.tokens)
                choice = {
                    "index": index,
                    **({"delta": role | {"content": text}} if call.chat else {"text": text}),
                    "logprobs": _logprobs(_entries(served, piece), call, offsets[index]),
                    "finish_reason": piece.reason or None,
                }
                yield _event(head | {"choices": [choice]})
    except Exception as error:  # the status has been sent: what is left is to say it
        yield _event({"error": _error(str(error), "server_error")})
        return
    if call.usage:
        yield _event(head | {"choices": [], "usage": _usage(call, count)})
    yield "data: [DONE]\n\n"


def _event(data: Json) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _usage(call: Call, written: int) -> Json:
    return {
        "prompt_tokens": call.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": call.prompt_tokens + written,
    }


def _entries(served: Served, piece: Completion) -> list[Json]:
    """What is told of each token."""

    def one(token: int, raw: float, behaviour: float) -> Json:
        written = served.spelling[token] if token < len(served.spelling) else None
        text = served.tokenizer.decode([token]) if written is None else written.decode(errors="replace")
        return {
            "token": text,
            "bytes": None if written is None else list(written),
            "logprob": raw,
            "top_logprobs": [],
            "token_id": token,
            "behaviour_logprob": behaviour,
        }

    return [
        one(*values)
        for values in zip(piece.tokens.tolist(), piece.raw_logp.tolist(), piece.behaviour_logp.tolist())
    ]


def _logprobs(entries: list[Json], call: Call, offsets: Offsets) -> Json | None:
    """Of the tokens that follow those before, as the endpoint tells it."""
    if not call.logprobs:
        return None
    if call.chat:
        return {"content": entries, "refusal": None}
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": None,
        "text_offset": [offsets.push(bytes(entry["bytes"] or entry["token"].encode())) for entry in entries],
        "token_ids": [entry["token_id"] for entry in entries],
        "behaviour_logprobs": [entry["behaviour_logprob"] for entry in entries],
    }
