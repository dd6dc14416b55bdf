"""The server, asked by the official client of OpenAI's API over loopback."""

import asyncio
import dataclasses
import json
import sys
import threading
import time
from typing import Annotated, Literal

import httpx2
import numpy as np
import openai
import pydantic
import pytest
import uvicorn
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_engine import TINY, make_engine, make_prompt

from jaxrl_llm.data import tokenizers
from jaxrl_llm.rollouts.completion_api import BadRequest, read_call, uid_of
from jaxrl_llm.rollouts.engine import Request
from jaxrl_llm.rollouts.serving import make_app
from jaxrl_llm.rollouts.serving_rules import BIASES, RowRules, serving_rules
from jaxrl_llm.rollouts.single_turn import stop_finder
from jaxrl_llm.rollouts.streaming import Offsets, TextStream
from jaxrl_llm.sampling.rules import bias, min_tokens, penalties

CFG = dataclasses.replace(TINY, vocab_size=320)
BYTES = tokenizers.load("bytes")
RULES = serving_rules(CFG.vocab_size, BYTES.eos_ids)
CHAT = [{"role": "user", "content": "hello"}]


class Server:
    def __init__(self):
        self.engine = make_engine(CFG, stop_ids=BYTES.eos_ids, rules=RULES)
        app = make_app(self.engine, BYTES, model="tiny")
        config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        self.wait_for(lambda: self.server.started)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)

    def wait_for(self, done) -> None:
        end = time.monotonic() + 30
        while not done():
            assert self.thread.is_alive() and time.monotonic() < end
            time.sleep(0.01)

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


def by_engine(ids, seed, choice=0, **options):
    """What an engine of its own writes."""
    engine = make_engine(CFG, stop_ids=BYTES.eos_ids, rules=RULES)
    return engine.generate([Request(ids, uid=uid_of(seed, choice), **options)])[0]


def test_models(server):
    assert [model.id for model in server.client.models.list()] == ["tiny"]


def test_completions_are_the_engine_s(server):
    """Two prompts, one as text and one as ids, and two choices of each."""
    ids = make_prompt(9)
    for prompt, context in (("one text", BYTES.encode_prompt("one text")), (ids, ids)):
        reply = server.client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=40,
            temperature=0.8,
            top_p=0.9,
            n=2,
            seed=7,
            logprobs=0,
            extra_body={"top_k": 50},
        )
        assert [choice.index for choice in reply.choices] == [0, 1]
        total = 0
        for choice in reply.choices:
            want = by_engine(
                context, 7, choice.index, max_new_tokens=40, temperature=0.8, top_p=0.9, top_k=50
            )
            logprobs = choice.logprobs.to_dict()
            assert logprobs["token_ids"] == want.tokens.tolist()
            np.testing.assert_allclose(logprobs["token_logprobs"], want.raw_logp, atol=2e-6)
            np.testing.assert_allclose(logprobs["behaviour_logprobs"], want.behaviour_logp, atol=2e-6)
            assert choice.text == BYTES.decode(want.tokens) and choice.finish_reason == want.reason
            for token, at in zip(want.tokens, choice.logprobs.text_offset):
                assert token >= 128 or choice.text[at] == chr(token)
            total += len(want.tokens)
        assert reply.usage.completion_tokens == total and reply.usage.prompt_tokens == len(context)
    first, second = reply.choices
    assert first.text != second.text


def test_several_prompts_come_in_order(server):
    ids = [make_prompt(4), make_prompt(5)]
    reply = server.client.completions.create(model="tiny", prompt=ids, n=2, seed=1, logprobs=0)
    for i, choice in enumerate(reply.choices):
        want = by_engine(ids[i // 2], 1, i, max_new_tokens=16)
        assert choice.logprobs.to_dict()["token_ids"] == want.tokens.tolist()


def test_chat_streams_what_it_answers_whole(server):
    asked = {"model": "tiny", "messages": CHAT, "max_tokens": 50, "seed": 3, "n": 2, "logprobs": True}
    whole = server.client.chat.completions.create(**asked)
    want = by_engine(BYTES.encode_chat(CHAT), 3, 0, max_new_tokens=50)
    entries = whole.choices[0].logprobs.content
    assert [entry.to_dict()["token_id"] for entry in entries] == want.tokens.tolist()
    np.testing.assert_allclose([entry.logprob for entry in entries], want.raw_logp, atol=2e-6)
    assert [entry.bytes for entry in entries if entry.bytes] == [[i] for i in want.tokens if i < 256]

    texts, reasons, logprobs, events = ["", ""], [None, None], [[], []], 0
    stream = server.client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += choice.delta.content
            reasons[choice.index] = choice.finish_reason
            logprobs[choice.index] += [entry.logprob for entry in choice.logprobs.content]
            events += 1
        usage = chunk.usage
    assert events > 2  # in blocks of 16
    assert usage == whole.usage
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert reasons[choice.index] == choice.finish_reason
        want = [entry.logprob for entry in choice.logprobs.content]
        np.testing.assert_allclose(logprobs[choice.index], want, atol=2e-6)


def test_stop_strings_end_a_text_and_are_not_in_it(server):
    ids = make_prompt(6)
    text = BYTES.decode(by_engine(ids, 5, max_new_tokens=60).tokens)
    stop = next(text[i : i + 2] for i in range(20, 50) if text[i : i + 2].isascii())
    asked = {"model": "tiny", "prompt": ids, "max_tokens": 60, "seed": 5, "stop": ["never", stop]}
    reply = server.client.completions.create(**asked)
    assert reply.choices[0].text == text[: text.index(stop)]
    assert reply.choices[0].finish_reason == "stop" and reply.usage.completion_tokens < 60
    pieces = [chunk.choices[0] for chunk in server.client.completions.create(**asked, stream=True)]
    assert "".join(piece.text for piece in pieces) == reply.choices[0].text
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]


# --- rules of decoding


def test_penalties_are_the_engine_s(server):
    """The repetition penalty holds for each prompt's own tokens."""
    prompts = [make_prompt(4), make_prompt(5)]
    asked = {"presence": 0.5, "frequency": 0.25, "repetition": 1.5}
    reply = server.client.completions.create(
        model="tiny",
        prompt=prompts,
        n=2,
        seed=1,
        logprobs=0,
        max_tokens=40,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={"65": 2.5, "66": -100},
        extra_body={"repetition_penalty": 1.5, "min_tokens": 3},
    )
    vocab_size, neutral = CFG.vocab_size, server.engine.neutral
    for i, choice in enumerate(reply.choices):
        ids = prompts[i // 2]
        states = (
            penalties(ids, vocab_size, **asked),
            bias({65: 2.5, 66: -100}, BIASES, vocab_size),
            neutral[2],
            min_tokens(3),
        )
        want = by_engine(ids, 1, i, max_new_tokens=40, rules=states)
        got = choice.logprobs.to_dict()
        assert got["token_ids"] == want.tokens.tolist() and 66 not in want.tokens
        np.testing.assert_allclose(got["token_logprobs"], want.raw_logp, atol=2e-6)
        np.testing.assert_allclose(got["behaviour_logprobs"], want.behaviour_logp, atol=2e-6)
        plain = by_engine(ids, 1, i, max_new_tokens=40)
        assert got["token_ids"] != plain.tokens.tolist()


def test_bias_and_least_length(server):
    """What is all but certain: a token, or the end as soon as it may come. Neighbours know nothing of it."""
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 20, "seed": 4}
    create = server.client.completions.create
    assert create(**asked, logit_bias={"65": 100}).choices[0].text == "A" * 20
    ends = {str(token): 100 for token in BYTES.eos_ids}
    for least in (0, 5):
        reply = create(**asked, logit_bias=ends, extra_body={"min_tokens": least})
        assert reply.usage.completion_tokens == least + 1 and reply.choices[0].finish_reason == "stop"
    want = BYTES.decode(by_engine(BYTES.encode_prompt("a"), 4, max_new_tokens=20).tokens)
    assert create(**asked).choices[0].text == want


class Part(pydantic.BaseModel):
    name: Literal["left", "right"]
    on: bool | None


class Reply(pydantic.BaseModel):
    kind: Literal["a", "b"]
    parts: Annotated[list[Part], pydantic.Field(min_length=1, max_length=2)]


def test_structured_outputs(server):
    """A random model writes what the client's own parser takes, streaming or not, and other rows are free."""
    asked = {"model": "tiny", "messages": CHAT, "seed": 3, "max_tokens": 110}
    reply = server.client.chat.completions.parse(**asked, n=3, response_format=Reply)
    assert all(isinstance(choice.message.parsed, Reply) for choice in reply.choices)
    assert len({choice.message.content for choice in reply.choices}) > 1
    with server.client.chat.completions.stream(**asked, response_format=Reply) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == reply.choices[0].message.parsed
    free = server.client.chat.completions.create(**asked).choices[0].message.content
    want = by_engine(BYTES.encode_chat(CHAT), 3, max_new_tokens=110)
    assert free == BYTES.decode(want.tokens)


def test_json_objects(server):
    """With a bias for what ends strings and objects, so that they end."""
    reply = server.client.completions.create(
        model="tiny",
        prompt="json: ",
        n=8,
        seed=0,
        max_tokens=100,
        logit_bias={"34": 3, "125": 3},
        extra_body={"response_format": {"type": "json_object"}},
    )
    ended = [choice.text for choice in reply.choices if choice.finish_reason == "stop"]
    assert len(ended) >= 4 and all(isinstance(json.loads(text), dict) for text in ended)
    assert any(json.loads(text) for text in ended)


def test_what_asks_for_nothing_is_taken(server):
    nothing = {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "service_tier": "auto"}
    nothing |= {"echo": False, "best_of": 1, "suffix": "", "logit_bias": {}, "user": "me", "min_tokens": 0}
    nothing |= {"response_format": {"type": "text"}, "presence_penalty": 0, "repetition_penalty": 1}
    body = {"model": "tiny", "prompt": "a", "seed": 1, "max_tokens": 5}
    plain, same = (httpx2.post(f"{server.url}/completions", json=x).json() for x in (body, body | nothing))
    assert same["choices"] == plain["choices"]


def schema(**inner):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": inner}}}


def test_an_engine_without_rules_refuses_them():
    engine = make_engine(CFG, stop_ids=BYTES.eos_ids)
    rules, limits = RowRules(engine, BYTES), {"chat": False, "model": "tiny", "max_length": 128}
    call = read_call({"model": "tiny", "prompt": "a"}, BYTES, **limits)
    assert rules.ruled(call) is call
    for change in (
        {"presence_penalty": 1},
        {"repetition_penalty": 2},
        {"logit_bias": {"5": 1}},
        {"min_tokens": 1},
        schema(type="null"),
    ):
        call = read_call({"model": "tiny", "prompt": "a", **change}, BYTES, **limits)
        with pytest.raises(BadRequest, match=f"{next(iter(change))} is not offered by this engine"):
            rules.ruled(call)


def test_without_the_extra_it_is_said_what_to_install(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    body = {"model": "tiny", "prompt": "a", **schema(enum=["something", "new"])}
    reply = httpx2.post(f"{server.url}/completions", json=body)
    assert reply.status_code == 400 and "pip install outlines-core" in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slots(server, stream):
    """Each of its requests is cancelled, those that still wait among them, and the next is served."""
    engine = server.engine
    before = engine.counts["cancelled"]
    body = {"model": "tiny", "prompt": make_prompt(3), "max_tokens": 120, "n": 6, "stop": "\0never"}
    step = engine.step

    def slow_step():  # the client is to be gone before the end
        time.sleep(0.1)
        return step()

    engine.step = slow_step
    try:
        with httpx2.Client() as client:
            if stream:
                with client.stream(
                    "POST", f"{server.url}/completions", json=body | {"stream": True}
                ) as reply:
                    next(reply.iter_lines())
            else:
                with pytest.raises(httpx2.ReadTimeout):
                    client.post(f"{server.url}/completions", json=body, timeout=0.25)
        server.wait_for(lambda: engine.counts["cancelled"] > before and not engine.running)
    finally:
        engine.step = step
    assert not engine.waiting and not bool(engine.slots.left.any())
    assert engine.counts["cancelled"] - before >= 2
    reply = server.client.completions.create(model="tiny", prompt="next", max_tokens=4)
    assert reply.usage.completion_tokens <= 4


BAD = {
    "temperature": ({"temperature": -1}, "temperature=-1.0 is outside its range"),
    "temperature's type": ({"temperature": "hot"}, "temperature='hot' must be a number"),
    "top_p": ({"top_p": 0}, "top_p=0.0 is outside its range"),
    "n": ({"n": 0}, "n=0 must be a whole number from 1 to 128"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens=0 must be a whole number"),
    "too long": ({"max_tokens": 1000}, "max_new_tokens=1000 do not fit into max_length=128"),
    "stop": ({"stop": [""]}, "none of them empty"),
    "seed": ({"seed": 1.5}, "seed=1.5 must be a whole number"),
    "stream": ({"stream": 1}, "stream=1 must be true or false"),
    "logprobs": ({"logprobs": 5}, "logprobs=5: only the tokens that were drawn"),
    "tools": ({"tools": [{}]}, "tools=[{}] is not offered here"),
    "penalty": ({"presence_penalty": 2.5}, "presence_penalty=2.5 must be a number from -2 to 2"),
    "repetition": ({"repetition_penalty": 0}, "repetition_penalty=0.0 must be a finite number above 0"),
    "bias": ({"logit_bias": {"5": 200}}, "logit_bias: 5=200 must be a number from -100 to 100"),
    "bias's ids": ({"logit_bias": {"a": 1}}, "must map ids of tokens to numbers"),
    "large id": ({"logit_bias": {"9" * 30: 1}}, "must map ids of tokens to numbers"),
    "biased token": ({"logit_bias": {"400": 1}}, "token id 400 is outside the vocabulary of 320"),
    "penalised prompt": ({"prompt": [400], "presence_penalty": 1}, "token id 400 is outside the vocabulary"),
    "min_tokens": ({"min_tokens": 17}, "min_tokens=17 must be a whole number from 0 to 16"),
    "format and least": ({"min_tokens": 1, **schema(type="null")}, "min_tokens=1 with a response_format"),
    "format": ({"response_format": {"type": "xml"}}, "response_format={'type': 'xml'} must be"),
    "schema": (schema(type="tree"), "response_format: JSON schema at #: unknown type 'tree'"),
    "large schema": (schema(type="string", maxLength=10**6), "more than 16384 parts"),
    "unknown": ({"temprature": 1}, "unknown parameter temprature=1"),
    "empty prompt": ({"prompt": ""}, "prompt='' must be a text"),
    "no prompts": ({"prompt": []}, "prompt=[] has nothing to continue"),
    "ids": ({"prompt": [400]}, "token id 400 is outside the vocabulary of 320"),
    "kinds of prompts": ({"prompt": ["a", 3]}, "must be a text"),
    "options": ({"stream_options": {"x": 1}}, "only include_usage is known"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input_is_named(server, change, message):
    refused = server.engine.counts["refused"]
    body = {"prompt": "a", "n": 2, **change}
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.post("/completions", body={"model": "tiny", **body}, cast_to=object)
    assert message in caught.value.body["message"]
    assert server.engine.counts["refused"] == refused + 1 and not server.engine.waiting


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "at least one message"),
        ([{"role": "user"}], "must have a role and a content of text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "a content of text"),
        ([{"role": "wizard", "content": "x"}], "unknown role wizard"),
        ([{"role": "user", "content": "x" * 200}], "do not fit into max_length=128"),
    ],
)
def test_bad_messages_are_named(server, messages, message):
    with pytest.raises(openai.BadRequestError, match=message):
        server.client.chat.completions.create(model="tiny", messages=messages)


def test_content_in_parts_is_one_text(server):
    parts = [{"role": "user", "content": [{"type": "text", "text": x} for x in ("hel", "lo")]}]
    first, second = (
        server.client.chat.completions.create(model="tiny", messages=m, max_completion_tokens=8, seed=2)
        for m in (CHAT, parts)
    )
    assert first.choices[0].message.content == second.choices[0].message.content


def test_unknown_model_and_broken_json(server):
    with pytest.raises(openai.NotFoundError, match="model='big' is not served here; 'tiny' is"):
        server.client.completions.create(model="big", prompt="a")
    reply = httpx2.post(f"{server.url}/completions", content=b"{")
    assert reply.status_code == 400 and "not JSON" in reply.json()["error"]["message"]
    reply = httpx2.post(f"{server.url}/completions", json=[])
    assert reply.status_code == 400 and "JSON object" in reply.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_on_the_way_is_reported(server, stream, monkeypatch):
    def broken(tokenizer, stops):
        def find(ids):
            raise RuntimeError("boom")

        return find

    monkeypatch.setattr("jaxrl_llm.rollouts.completion_api.stop_finder", broken)
    with pytest.raises(openai.APIError, match="boom"):
        list(server.client.completions.create(model="tiny", prompt="a", stream=stream))


# --- the engine's stream, and text


def test_stream_gives_each_token_once():
    """With a stop that is found within a round: what comes after it is not given out."""

    def find(ids):
        return 21 if len(ids) >= 21 else None

    request = Request(make_prompt(5), 40, uid=3, find_stop=find)
    engine = make_engine(stop_ids=())
    (want,) = make_engine(stop_ids=()).generate([request])
    assert len(want.tokens) == 21

    async def listen():
        return [piece async for piece in engine.stream(request)]

    pieces = asyncio.run(listen())
    assert [len(piece.tokens) for piece in pieces] == [16, 5]
    assert [piece.reason for piece in pieces] == ["", "stop"]
    for name in ("tokens", "behaviour_logp", "raw_logp", "log_kept", "policy_version"):
        joined = np.concatenate([getattr(piece, name) for piece in pieces])
        np.testing.assert_array_equal(joined, getattr(want, name))


def test_who_stops_listening_cancels():
    engine = make_engine(stop_ids=())

    async def listen():
        stream = engine.stream(Request(make_prompt(5), 100))
        await anext(stream)
        await stream.aclose()
        await engine.mover

    asyncio.run(listen())
    assert engine.counts == {"cancelled": 1} and not engine.running


def test_stream_hears_of_an_engine_that_stops(monkeypatch):
    engine = make_engine()
    monkeypatch.setattr(engine, "_admit", lambda: 1 / 0)

    async def listen():
        with pytest.raises(ZeroDivisionError):
            await anext(engine.stream(Request([7], 4)))
        await engine.mover  # the caller has heard: nothing is left for the event loop to report

    asyncio.run(listen())


@given(
    text=st.text("abé漢😀", max_size=20),
    junk=st.binary(max_size=4),
    stops=st.lists(st.text("abé", min_size=1, max_size=3), max_size=2),
    cuts=st.lists(st.integers(1, 5), max_size=30),
)
@example(text="éaab", junk=b"", stops=["ab"], cuts=[1, 3])
@example(text="baa", junk=b"", stops=["a", "baa"], cuts=[2])
def test_pieces_of_text_join_whatever_the_cuts(text, junk, stops, cuts):
    """Characters and stop strings across pieces, and bytes that are no text."""
    ids = [*text.encode(), *junk]
    whole = BYTES.decode(ids)
    complete = [n for n in range(len(whole) + 1) if any(whole[:n].endswith(stop) for stop in stops)]
    seen = whole[: complete[0]] if complete else whole
    end = min((len(seen) - len(stop) for stop in stops if seen.endswith(stop)), default=len(seen))
    stream, pieces = TextStream(BYTES, stops), []
    for cut in cuts:
        pieces.append(stream.push(ids[:cut], last=False))
        assert whole[:end].startswith("".join(pieces))
        ids = ids[cut:]
    pieces.append(stream.push(ids, last=True))
    assert "".join(pieces) == whole[:end]


@given(
    st.lists(st.one_of(st.text("abé漢😀", max_size=3).map(str.encode), st.binary(max_size=2)), max_size=12),
    st.lists(st.integers(0, 3), max_size=40),
)
@example([b"a\xe6", b"b\xc3", "é漢".encode()], [1, 1, 2])
def test_offsets_say_where_tokens_begin(parts, cuts):
    """By the text of every beginning, whatever bytes are in it; a token that writes nothing is at its end."""
    left, offsets, before = b"".join(parts), Offsets(), b""
    while left:
        size = cuts.pop() if cuts else 1
        token, left = left[:size], left[size:]
        at = offsets.push(token)
        text = (before + token + left).decode(errors="replace")
        if token[:1].isascii() and token:
            assert text[at] == chr(token[0])
            assert text[:at] == before.decode(errors="replace")
        assert len(before.decode(errors="ignore")) <= at <= len(before.decode(errors="replace"))
        before += token


def test_a_stop_found_in_tokens_is_the_one_found_in_text():
    ids = [*b"one, two, three"]
    assert stop_finder(BYTES, ["two"])(np.array(ids)) == 8
    assert TextStream(BYTES, ["two"]).push(ids[:8], last=True) == "one, "
