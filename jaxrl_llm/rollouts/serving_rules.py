"""What clients of a server may ask of the decoder beside sampling: from parameters to states of rules.

    engine = Engine(..., stop_ids=tokenizer.eos_ids, rules=serving_rules(V, tokenizer.eos_ids))
    app = make_app(engine, tokenizer, model="policy")

An engine with other rules, or none, serves too: what it has no rule for is refused.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxrl_llm.data.tokenizers import Tokenizer
from jaxrl_llm.rollouts.completion_api import BadRequest, Call, Controls
from jaxrl_llm.rollouts.engine import Engine
from jaxrl_llm.sampling import rules as rules_lib
from jaxrl_llm.sampling.guided import Grammar, grammar, grammar_rule, json_object, json_schema
from jaxrl_llm.sampling.rules import Rule, Rules

BIASES = 1024
"""Tokens with a bias, at most."""

KEPT_GRAMMARS = 32
"""Grammars that are not made anew when they come again, about 1.3 MB each."""

PENALTIES = {"repetition": 1.0, "presence": 0.0, "frequency": 0.0}
"""Where they are off."""


def serving_rules(vocab_size: int, eos_ids: Sequence[int]) -> Rules:
    """Rules for all that `Controls` has: 7 bytes per slot and token of the vocabulary, and 1 MB per slot."""
    return (
        rules_lib.penalty_rule(vocab_size),
        rules_lib.bias_rule(BIASES),
        grammar_rule(vocab_size),
        rules_lib.min_tokens_rule(tuple(eos_ids)),
    )


class RowRules:
    """Makes states of an engine's rules for requests.

    Args:
      engine: whose rules they are.
      tokenizer: of its model.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.vocab_size = engine.cfg.vocab_size
        self.rules, self.neutral = engine.rules, engine.neutral
        self.kinds = serving_rules(self.vocab_size, tokenizer.eos_ids)
        self.busy = threading.Lock()  # what two ask for at the same time is made once

        @functools.lru_cache(KEPT_GRAMMARS)
        def make(pattern: str) -> Grammar:
            return grammar(pattern, tokenizer, self.vocab_size)

        self.grammar = make

    def ruled(self, call: Call) -> Call:
        """The call with requests that keep to its controls. Contexts are those that the engine takes.

        A grammar that is new takes about a second, so ask from a thread.

        Raises:
          BadRequest: what the engine has no rule for, or what can't be kept to.
        """
        if call.controls == Controls():
            return call
        contexts = [request.tokens for request in call.requests[:: call.n]]
        states = self._states(contexts, call.controls)
        requests = [
            dataclasses.replace(request, rules=states[i // call.n]) for i, request in enumerate(call.requests)
        ]
        return dataclasses.replace(call, requests=requests)

    def _states(self, contexts: Sequence[Sequence[int]], controls: Controls) -> list[tuple[Any, ...]]:
        """By context, the states of a row that continues it."""
        penalty, biased, guided, least = self.kinds
        states = list(self.neutral)
        if controls.logit_bias:
            at = self._place(biased, "logit_bias")
            with _named("logit_bias"):
                states[at] = rules_lib.bias(controls.logit_bias, BIASES, self.vocab_size)
        if controls.min_tokens:
            at = self._place(least, "min_tokens")
            states[at] = rules_lib.min_tokens(controls.min_tokens)
        if controls.response_format["type"] != "text":
            at = self._place(guided, "response_format")
            with _named("response_format"), self.busy:
                states[at] = self.grammar(_pattern(controls.response_format))
        values = {name: getattr(controls, f"{name}_penalty") for name in PENALTIES}
        used = [f"{name}_penalty" for name, off in PENALTIES.items() if values[name] != off]
        if not used:
            return [tuple(states)] * len(contexts)
        at = self._place(penalty, used[0])
        return [
            (*states[:at], rules_lib.penalties(context, self.vocab_size, **values), *states[at + 1 :])
            for context in contexts
        ]

    def _place(self, rule: Rule, param: str) -> int:
        """Which of the engine's rules it is."""
        if rule not in self.rules:
            raise BadRequest(
                f"{param} is not offered by this engine: leave it out, or build it with "
                "rules=serving_rules(...)",
                param,
            )
        return self.rules.index(rule)


@contextlib.contextmanager
def _named(param: str) -> Iterator[None]:
    """Says of which parameter an error is."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise BadRequest(f"{param}: {error}", param) from error


def _pattern(form: Mapping[str, Any]) -> str:
    """The regular expression of a response_format other than text."""
    if form["type"] == "json_object":
        return json_object()
    return json_schema(form["json_schema"]["schema"])
