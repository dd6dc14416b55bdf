"""Requests of OpenAI's API for completions, read and refused: JSON in, engine requests out."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.data.tokenizers import Tokenizer
from jaxrl_llm.rollouts.engine import Request
from jaxrl_llm.rollouts.single_turn import stop_finder
from jaxrl_llm.sampling.logits import check_sampling

DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,  # top_k and min_p are additions, as in other open servers
    "min_p": 0.0,
    "n": 1,
    "seed": None,
    "stop": (),
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,  # and so are this and min_tokens
    "logit_bias": {},
    "min_tokens": 0,
    "response_format": {"type": "text"},
    "stream": False,
    "stream_options": {},
    "model": None,
}
IGNORED = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key"}
OFF: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}
"""What is not offered, with the values at which it asks for nothing."""

OWN = {
    False: {"prompt", "max_tokens", "logprobs"},
    True: {"messages", "max_tokens", "max_completion_tokens", "logprobs"},
}
"""Whether it is a chat -> the parameters that only that endpoint has, or reads in its own way."""

MOST = 128
"""Completions of one prompt, at most; also OpenAI's limit."""


class BadRequest(ValueError):
    """A request that is refused: what is wrong, the parameter, and the HTTP status."""

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.status = param, status


@dataclasses.dataclass(frozen=True)
class Controls:
    """What rules of decoding are to do; the defaults are nothing.

    Attributes:
      presence_penalty, frequency_penalty, repetition_penalty: as `sampling.rules.penalty_rule`.
      logit_bias: what is added to the logits of tokens (nats).
      min_tokens: how many are written before an EOS may be. (Stop strings end a completion all the same.)
      response_format: {"type": "text"}, {"type": "json_object"}, or
        {"type": "json_schema", "json_schema": {"schema": ...}}.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    min_tokens: int = 0
    response_format: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"type": "text"})


@dataclasses.dataclass(frozen=True)
class Call:
    """What a client asks for.

    Attributes:
      chat: whether it is a chat completion.
      requests: by choice: `n` for each prompt, prompts in order; without states of rules.
      controls: what those states are to do.
      prompt_tokens: of all prompts, each counted once.
      stops: strings that end a completion and do not belong to it.
      logprobs: whether log-probs are to be returned.
      stream, usage: whether to stream, and to end the stream with the numbers of tokens.
    """

    chat: bool
    requests: list[Request]
    n: int
    controls: Controls
    prompt_tokens: int
    stops: tuple[str, ...]
    logprobs: bool
    stream: bool
    usage: bool


def uid_of(seed: int, choice: int) -> int:
    """What the draws of a seeded request's choice depend on: 31 bits that are unlike for all pairs."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=4).digest()) >> 1


def read_call(body: Any, tokenizer: Tokenizer, *, chat: bool, model: str, max_length: int) -> Call:
    """Reads a request's JSON. A parameter that is null is as good as absent.

    Args:
      body: parsed.
      tokenizer: of the model.
      chat: which endpoint.
      model: the name that is served.
      max_length: of the engine: a chat's reply may fill it.

    Raises:
      BadRequest: what is wrong, and what would do.
    """
    if not isinstance(body, Mapping):
        raise BadRequest("the body must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    for name, value in given.items():
        if name in OFF and value not in OFF[name]:
            raise BadRequest(f"{name}={value!r} is not offered here: leave it out", name)
        if name not in DEFAULTS and name not in OFF and name not in OWN[chat]:
            raise BadRequest(f"unknown parameter {name}={value!r}: leave it out", name)
    p = DEFAULTS | given
    if p["model"] != model:
        status = 400 if p["model"] is None else 404
        raise BadRequest(f"model={p['model']!r} is not served here; {model!r} is", "model", status)
    temperature, top_p, min_p = (_number(p, name) for name in ("temperature", "top_p", "min_p"))
    n, top_k = _whole(p, "n", 1, MOST), _whole(p, "top_k", 0, 2**31 - 1)
    seed = None if p["seed"] is None else _whole(p, "seed", -(2**63), 2**63 - 1)
    try:
        check_sampling(temperature, top_p, top_k, min_p)
    except ValueError as error:
        raise BadRequest(str(error), str(error).partition("=")[0]) from error
    stops = _stops(p["stop"])
    prompts = _conversation(p, tokenizer) if chat else _prompts(p, tokenizer)
    requests: list[Request] = []
    for ids in prompts:
        room = _room(p, chat, max_length - len(ids))
        for _ in range(n):
            request = Request(
                ids,
                room,
                temperature,
                top_p,
                top_k,
                min_p,
                uid=None if seed is None else uid_of(seed, len(requests)),
                find_stop=stop_finder(tokenizer, stops),
            )
            requests.append(request)
    options = p["stream_options"]
    if not isinstance(options, Mapping) or set(options) - {"include_usage", "include_obfuscation"}:
        raise BadRequest(f"stream_options={options!r}: only include_usage is known", "stream_options")
    return Call(
        chat,
        requests,
        n,
        _controls(p, min(request.max_new_tokens for request in requests)),
        sum(map(len, prompts)),
        stops,
        _logprobs(p, chat),
        _flag(p, "stream"),
        bool(options.get("include_usage")),
    )


def _controls(p: Mapping[str, Any], room: int) -> Controls:
    """Of completions of up to `room` tokens."""
    repetition = _number(p, "repetition_penalty")
    if not 0 < repetition < math.inf:
        raise BadRequest(
            f"repetition_penalty={repetition} must be a finite number above 0 (1 = off)", "repetition_penalty"
        )
    least, form = _whole(p, "min_tokens", 0, room), _response_format(p["response_format"])
    if least and form["type"] != "text":
        raise BadRequest(
            f"min_tokens={least} with a response_format, which may have to end before: leave one out",
            "min_tokens",
        )
    return Controls(
        _number(p, "presence_penalty", -2, 2),
        _number(p, "frequency_penalty", -2, 2),
        repetition,
        _bias(p["logit_bias"]),
        least,
        form,
    )


def _bias(given: Any) -> dict[int, float]:
    if not isinstance(given, Mapping) or not all(re.fullmatch("[0-9]{1,9}", x) for x in given):
        raise BadRequest(f"logit_bias={given!r:.200} must map ids of tokens to numbers", "logit_bias")
    try:
        return {int(token): _number(given, token, -100, 100) for token in given}
    except BadRequest as error:
        raise BadRequest(f"logit_bias: {error}", "logit_bias") from error


def _response_format(form: Any) -> Mapping[str, Any]:
    kind = form.get("type") if isinstance(form, Mapping) else None
    inner = form.get("json_schema") if kind == "json_schema" else None
    if kind in ("text", "json_object"):
        return {"type": kind}
    if isinstance(inner, Mapping) and isinstance(inner.get("schema"), Mapping):
        return form
    raise BadRequest(
        f'response_format={form!r:.200} must be {{"type": "text"}}, {{"type": "json_object"}} or '
        '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}',
        "response_format",
    )


def _number(p: Mapping[str, Any], name: str, low: float = -math.inf, high: float = math.inf) -> float:
    value = p[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest(f"{name}={value!r} must be a number", name)
    if not low <= value <= high and (low, high) != (-math.inf, math.inf):
        raise BadRequest(f"{name}={value!r} must be a number from {low} to {high}", name)
    return float(value)


def _whole(p: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = p[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadRequest(f"{name}={value!r} must be a whole number from {low} to {high}", name)
    return value


def _flag(p: Mapping[str, Any], name: str) -> bool:
    if not isinstance(p[name], bool):
        raise BadRequest(f"{name}={p[name]!r} must be true or false", name)
    return p[name]


def _room(p: Mapping[str, Any], chat: bool, left: int) -> int:
    """How many tokens may be written: 16 if a completion does not say it, and all that fit in a chat."""
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in p]
    if names:
        return _whole(p, names[0], 1, 2**31 - 1)
    return max(left, 1) if chat else 16


def _logprobs(p: Mapping[str, Any], chat: bool) -> bool:
    if "logprobs" not in p:
        return False
    if chat:
        return _flag(p, "logprobs")
    if isinstance(p["logprobs"], bool) or p["logprobs"] != 0:
        raise BadRequest(
            f"logprobs={p['logprobs']!r}: only the tokens that were drawn have log-probs here; ask with 0",
            "logprobs",
        )
    return True


def _stops(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple) or not all(isinstance(x, str) and x for x in stops):
        raise BadRequest(f"stop={stop!r} must be a text or a list of texts, none of them empty", "stop")
    return tuple(stops)


def _prompts(p: Mapping[str, Any], tokenizer: Tokenizer) -> list[list[int]]:
    prompt = p.get("prompt")
    rows = prompt if isinstance(prompt, list) and not _are_ids(prompt) else [prompt]
    ids: list[list[int]] = []
    for row in rows:
        if not row or not (isinstance(row, str) or _are_ids(row)):
            raise BadRequest(
                f"prompt={prompt!r:.200} must be a text, token ids, or a list of either, none of them empty",
                "prompt",
            )
        ids.append(row if isinstance(row, list) else _encoded(tokenizer.encode_prompt, row, "prompt"))
    if not ids:
        raise BadRequest("prompt=[] has nothing to continue", "prompt")
    return ids


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(x) is int for x in value)


def _conversation(p: Mapping[str, Any], tokenizer: Tokenizer) -> list[list[int]]:
    messages = p.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest(f"messages={messages!r} must be a list of at least one message", "messages")
    return [_encoded(tokenizer.encode_chat, [_message(m) for m in messages], "messages")]


def _message(message: Any) -> dict[str, Any]:
    """A message whose content is one text; clients may give it in parts."""
    if isinstance(message, Mapping) and isinstance(message.get("role"), str):
        content = message.get("content")
        if isinstance(content, list):
            texts = [x.get("text") if isinstance(x, Mapping) else None for x in content]
            known = [text for text in texts if isinstance(text, str)]
            content = "".join(known) if len(known) == len(texts) else None
        if isinstance(content, str):
            return {**message, "content": content}
    raise BadRequest(f"messages: {message!r:.200} must have a role and a content of text", "messages")


def _encoded(encode: Any, text: Any, param: str) -> list[int]:
    try:
        return encode(text)
    except ValueError as error:  # a character or a role that the tokenizer does not know
        raise BadRequest(f"{param}: {error}", param) from error


def spelled(tokenizer: Tokenizer) -> list[bytes | None]:
    """What each id writes; nothing for kinds of tokenizers whose tokens are not the bytes they write."""
    try:
        return tokenizer.token_bytes()
    except ValueError:
        return []
