"""Guided decoding: whatever a random model writes matches, and the mass that was kept is exact."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.data import tokenizers
from jaxrl_llm.data.sentencepieces import train_sentencepiece
from jaxrl_llm.models import params as params_lib
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.rollouts.engine import Engine
from jaxrl_llm.rollouts.requests import Request
from jaxrl_llm.sampling.automata import automaton, over_tokens
from jaxrl_llm.sampling.autoregressive import prepare
from jaxrl_llm.sampling.guided import grammar, grammar_rule, json_object, json_schema, make_guide
from jaxrl_llm.sampling.logits import sample, sampling_params

V = 270  # a few rows more than the tokenizer has ids, as padded vocabularies have
BYTES = tokenizers.load("bytes")
TINY = ModelConfig(
    vocab_size=V,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=16,
)
SCHEMA = {
    "$defs": {
        "point": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": ["null", "boolean"]}]}
    },
    "properties": {
        "é": {"type": "string", "minLength": 1, "maxLength": 3},
        "of": {"enum": ["a.b", 1, None]},
        "at": {"$ref": "#/$defs/point"},
        "many": {
            "type": "array",
            "items": {"anyOf": [{"const": True}, {"const": 2}]},
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["of", "many"],
}
PATTERNS = {
    "date": r"\d{2}-(0[1-9]|1[0-2])",
    "words": "((ab|c)d?){1,4}",
    "accents": "[éèñ]{1,3}!?",
    "call": json_schema(SCHEMA),
}


def accepts(value) -> bool:
    """SCHEMA, by hand."""
    x, y = value.get("at", [0, None])
    return (
        {"of", "many"} <= set(value) <= set(SCHEMA["properties"])
        and 1 <= len(value.get("é", "?")) <= 3
        and value["of"] in ("a.b", 1, None)
        and (type(x) is int and (y is None or isinstance(y, bool)))
        and 1 <= len(value["many"]) <= 3
        and all(item is True or item == 2 for item in value["many"])
    )


GUIDE = make_guide(PATTERNS, BYTES, V)


def make_engine(seed, guide=GUIDE, tokenizer=BYTES):
    params = params_lib.init(jax.random.key(seed), transformer.param_specs(TINY))
    params |= {"embed": params["embed"] * 20}
    return Engine(
        prepare(params, TINY),
        TINY,
        slots=8,
        max_length=128,
        key=jax.random.key(seed),
        stop_ids=tokenizer.eos_ids,
        block=16,
        rules=(guide.rule,),
    )


def test_everything_that_random_models_write_matches():
    """Four grammars and free rows beside each other, checked by Python's re and json."""
    finished = dict.fromkeys(PATTERNS, 0)
    for seed in (0, 1):
        names = [*PATTERNS, None] * 6
        requests = [
            Request(
                BYTES.encode(f"{i}: "),
                110,
                temperature=(0.5, 1.0, 2.0)[i % 3],
                top_p=(1.0, 0.9)[i % 2],
                rules=() if name is None else (GUIDE.start(name),),
            )
            for i, name in enumerate(names)
        ]
        for name, out in zip(names, make_engine(seed).generate(requests)):
            if name is None:
                assert np.all(np.abs(out.log_kept) < 0.2)  # no more than top-p takes
                continue
            assert np.all(out.tokens < BYTES.vocab_size) and np.all(out.log_kept < 1e-6)
            if out.reason == "length":  # the beginning of a match: the automaton goes on
                assert name == "call" and GUIDE.start(name, out.tokens) > 0
                continue
            assert out.reason == "stop" and out.tokens[-1] in BYTES.eos_ids
            text = bytes(out.tokens[:-1].tolist()).decode()
            assert re.fullmatch(PATTERNS[name], text), (name, text)
            if name == "call":
                assert accepts(json.loads(text)), text
            finished[name] += 1
    assert all(count >= 4 for count in finished.values()), finished


def test_kept_mass_is_exact_by_enumeration():
    """Allowed is what Python's re can still complete, found without any automaton; log_kept is its mass."""
    guide = make_guide({"g": "(ab|c){2}d?"}, BYTES, V)
    texts = {x + y + d for x in ("ab", "c") for y in ("ab", "c") for d in ("", "d")}
    logits = 3 * jax.random.normal(jax.random.key(0), (1, V))
    apply, draw = jax.jit(guide.rule.apply), jax.jit(sample)
    for written in sorted({text[:n] for text in texts for n in range(len(text) + 1)}):
        state = jnp.asarray([guide.start("g", BYTES.encode(written))])
        allowed = np.zeros(V, bool)
        for text in texts:
            if text == written:
                allowed[list(BYTES.eos_ids)] = True
            elif text.startswith(written):
                allowed[ord(text[len(written)])] = True
        ruled = apply(state, logits)
        assert np.array_equal(np.isfinite(ruled[0]), allowed), written
        for temperature in (0.6, 1.0):
            drawn = draw(ruled, sampling_params(1, temperature=temperature), jnp.array([0.3]), logits)
            full = np.exp(np.asarray(logits[0], np.float64) / temperature)
            assert abs(float(drawn.log_kept[0]) - np.log(full[allowed].sum() / full.sum())) < 1e-5
            token = int(drawn.token[0])
            assert abs(float(drawn.behaviour_logp[0]) - np.log(full[token] / full[allowed].sum())) < 1e-5


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.sampled_from(["a", "b", "ab", "[ab]", "é", "."]),
        lambda inner: st.one_of(
            st.tuples(inner, inner).map("".join),
            st.tuples(inner, inner).map("|".join),
            st.tuples(inner, inner).map(lambda x: f"(?:{x[0]}|{x[1]})"),
            inner.map(lambda x: f"(?:{x})?"),
            inner.map(lambda x: f"(?:{x}){{1,2}}"),
        ),
        max_leaves=5,
    ),
    st.lists(st.sampled_from(["a", "b", "é", "z"]), max_size=4).map("".join),
)
def test_the_table_accepts_what_re_accepts(pattern, text):
    guide = make_guide({"g": pattern}, BYTES, V)
    try:
        end = guide.start("g", [*BYTES.encode(text), BYTES.eos_ids[0]])
    except ValueError:
        end = None
    assert (end is not None) == bool(re.fullmatch(pattern, text))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["(ab|é)*c?", "(a|ba){2,4}", "[^b]*b", "é{1,3}|a(bc)+"]),
    st.lists(st.text("abcé", min_size=1, max_size=3), min_size=1, max_size=6, unique=True),
    st.lists(st.integers(0, 5), max_size=5),
)
def test_tokens_of_any_length_go_where_their_bytes_go(pattern, pieces, picks):
    """Any tokens one after the other, where Python's re finds that up to three more make a match."""
    written = [*(piece.encode() for piece in pieces), None]
    eos = len(pieces)
    texts = ["".join(some) for n in range(4) for some in itertools.product(pieces, repeat=n)]
    try:
        table, classes = over_tokens(automaton(pattern), written, [eos], len(written))
    except ValueError:
        assert not any(re.fullmatch(pattern, text) for text in texts)
        return
    state, text = 0, ""
    for pick in picks:
        assert (table[state, classes[eos]] >= 0) == bool(re.fullmatch(pattern, text))
        allowed = [token for token in range(eos) if table[state, classes[token]] >= 0]
        for token, piece in enumerate(pieces):
            if any(re.fullmatch(pattern, text + piece + end) for end in texts):
                assert token in allowed
        if not allowed:
            break
        token = allowed[pick % len(allowed)]
        state, text = int(table[state, classes[token]]), text + pieces[token]


def test_a_grammar_per_row_is_the_engine_s():
    """Rows with grammars of their own and a free row take the same ways as in one table of all."""
    names = ["words", None, "call"]
    rule = grammar_rule(V, 1 << 15)
    free = jax.tree.map(lambda x: x[0], rule.init(1))
    rows = [free if name is None else grammar(PATTERNS[name], BYTES, V, 1 << 15) for name in names]
    own = jax.tree.map(lambda *xs: jnp.stack(xs), *rows)
    shared = jnp.asarray([0 if name is None else GUIDE.start(name) for name in names])
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, V)), jnp.float32)
    apply, advance = jax.jit(rule.apply), jax.jit(rule.advance)
    for step in range(12):
        out = apply(own, logits)
        assert np.array_equal(out, GUIDE.rule.apply(shared, logits))
        assert np.array_equal(out[1], logits[1])
        token = jnp.argmax(jnp.roll(out, step, axis=1), axis=1) - step
        token = jnp.where(token < 0, token + V, token)
        live = jnp.asarray([True, True, step % 2 == 0])
        own, shared = advance(own, token, live), GUIDE.rule.advance(shared, token, live)


def test_rows_that_are_done_stay_where_they_are():
    state = jnp.asarray([GUIDE.start("words"), GUIDE.start("words"), 0])
    after = GUIDE.rule.advance(state, jnp.full(3, ord("c")), jnp.array([True, False, True]))
    assert after.tolist() == [GUIDE.start("words", b"c"), GUIDE.start("words"), 0]


def test_tokens_of_several_characters_and_parts_of_characters(tmp_path):
    """A sentencepiece model: pieces of several letters, a mark for the space, bytes of rare characters."""
    path = tmp_path / "tokenizer.model"
    train_sentencepiece(["the cat sat on the mat", "a hat and a bat"] * 20, path, vocab_size=300)
    for tokenizer in (
        tokenizers.load("sentencepiece", path=str(path)),
        BYTES,
        tokenizers.load("characters", alphabet="the cañ–"),
    ):
        pieces = tokenizer.token_bytes()
        assert len(pieces) == tokenizer.vocab_size
        assert all(pieces[i] is None for i in tokenizer.eos_ids)
        for text in ("the cat", "ña–e"):
            ids = tokenizer.encode(text)
            assert b"".join(pieces[i] for i in ids).decode() == text
            guide = make_guide({"g": ".a[^b]*"}, tokenizer, tokenizer.vocab_size)
            if text[1] == "a":
                assert guide.start("g", ids) > 0
            else:
                with pytest.raises(ValueError, match="goes on with token"):
                    guide.start("g", ids)


def test_a_state_that_never_ends_is_not_entered():
    """(a|b)*z without z: a and b could go on for ever. With an alternative, only what can end is allowed."""
    tokenizer = tokenizers.load("characters", alphabet="abc")
    guide = make_guide({"g": "(a|b)*c|b"}, tokenizer, tokenizer.vocab_size)
    assert guide.start("g", tokenizer.encode("abac")) > 0
    for pattern in ("(a|b)*z", "z", "a(b|[^abc])*z"):
        with pytest.raises(ValueError, match="grammar 'g'"):
            make_guide({"g": pattern}, tokenizer, tokenizer.vocab_size)
    guide = make_guide({"g": "b|a+ca*z?b|ca*z"}, tokenizer, tokenizer.vocab_size)
    with pytest.raises(ValueError, match="goes on with token 2 at 0"):
        guide.start("g", tokenizer.encode("c"))
    assert guide.start("g", tokenizer.encode("acab")) > 0


def test_classes_make_the_table_small_and_lose_nothing():
    """Bytes of one range are one column; the table is the union of the grammars' own."""
    guide = make_guide({"x": "[a-z]+", "y": "[a-m]+"}, BYTES, V)
    assert guide.table.shape[1] == 4 and guide.nbytes == guide.table.nbytes + 4 * V
    assert len(guide.table) == 1 + sum(
        len(make_guide({n: p}, BYTES, V).table) - 1 for n, p in (("x", "[a-z]+"), ("y", "[a-m]+"))
    )
    assert guide.start("x", BYTES.encode("zoo")) and guide.start("y", BYTES.encode("abba"))
    with pytest.raises(ValueError, match="goes on"):
        guide.start("y", BYTES.encode("zoo"))


def test_strings_of_bounded_length_take_states_by_their_length():
    """Not two to the power of it, which escaped quotes make of a search that may start anywhere."""
    sizes = [len(automaton(json_schema({"type": "string", "maxLength": n})).table) for n in (20, 40, 60)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] < 20 * 12


# --- JSON schemas


@pytest.mark.parametrize("depth", [0, 2])
def test_json_objects_by_depth(depth):
    guide = make_guide({"g": json_object(depth)}, BYTES, V)
    good = ["{}", '{"a": true,"b":"\\n"}', '{"a": -1.5e3}']
    good += ['{"a":[[], {}, 1, null], "b": {"c": {}, "d": ["e"]}}'] * (depth == 2)
    for text in good:
        json.loads(text)
        assert guide.start("g", [*BYTES.encode(text), *BYTES.eos_ids[:1]]) > 0
    for bad in ("[]", '{"a"}', '{"a":1,}', '{"a":01}', '{"a":' + "[" * (depth + 1)):
        with pytest.raises(ValueError, match="goes on"):
            guide.start("g", BYTES.encode(bad))


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer"}, ["0", "-12"], ["01", "1.0", "+1"]),
        ({"type": "number"}, ["1", "-0.5e-7", "2E+9"], [".5", "1.", "NaN"]),
        ({"type": "string"}, ['""', '"a é\\n"'], ['"a', '"\n"', '"\\x"', '"""']),
        ({"type": "string", "pattern": "^a|b$"}, ['"a"', '"b"'], ['"a', '"ab"']),
        ({"type": "string", "format": "date"}, ['"2024-02-28"'], ['"2024-13-01"']),
        ({"type": "array", "items": {"type": "null"}}, ["[]", "[null, null]"], ["[null,]", "[,null]"]),
        ({"type": "array", "items": {"type": "null"}, "minItems": 2}, ["[null,null]"], ["[]", "[null]"]),
        ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
        ({"type": "object", "additionalProperties": False}, ["{}"], ['{"a":1}']),
        ({"type": "object", "additionalProperties": {"type": "null"}}, ["{}", '{"a": null}'], ['{"a":1}']),
        (
            {"properties": {k: {"const": 1} for k in "abc"}, "required": ["b"]},
            ['{"b":1}', '{"a": 1, "b": 1}', '{"b":1,"c":1}', '{"a":1,"b":1,"c":1}'],
            ["{}", '{"a":1}', '{,"b":1}', '{"b":1,}', '{"b":1,"a":1}'],
        ),
        ({"properties": {"a": {"const": 1}}}, ["{}", '{"a":1}'], ['{"a":1,"a":1}']),
    ],
    ids=str,
)  # fmt: skip
def test_schema_by_cases(schema, good, bad):
    pattern = json_schema(json.dumps(schema))
    guide = make_guide({"g": pattern}, BYTES, V)
    for text in good:
        json.loads(text)
        assert re.fullmatch(pattern, text), text
        assert guide.start("g", [*BYTES.encode(text), *BYTES.eos_ids[:1]]) > 0
    for text in bad:
        assert not re.fullmatch(pattern, text), text
        with pytest.raises(ValueError, match="goes on"):
            guide.start("g", [*BYTES.encode(text), *BYTES.eos_ids[:1]])


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "not JSON"),
        (True, "no schema"),
        ({}, "give a type"),
        ({"type": "tree"}, "unknown type 'tree'"),
        ({"type": "number", "minimum": 3}, "minimum can't be kept"),
        ({"type": "array", "items": {"type": "null"}, "uniqueItems": True}, "uniqueItems"),
        ({"properties": {"a": {"not": {}}}}, "#/properties/a: not can't"),
        ({"properties": {}, "required": ["a"]}, "required a"),
        ({"anyOf": [{"type": "null"}], "type": "null"}, "type can't be kept to beside anyOf"),
        ({"oneOf": [{"type": "null"}]}, "oneOf"),
        ({"$ref": "#/$defs/x"}, "nothing at"),
        ({"$defs": {"x": {"type": "array", "items": {"$ref": "#/$defs/x"}}}, "$ref": "#/$defs/x"}, "itself"),
        ({"type": "string", "pattern": ".*"}, "JSON would escape"),
        ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "one of them"),
        ({"type": "string", "format": "email"}, "format 'email'"),
        ({"type": "string", "enum": ["a", 1]}, "1 is not of type string"),
        ({"enum": []}, "nothing says"),
        ({"type": "array"}, "needs items"),
        ({"type": {}}, "{} is no value of type"),
        ({"type": "string", "maxLength": "9"}, "'9' is no value of maxLength"),
        ({"type": "string", "minLength": -1}, "-1 is no value of minLength"),
        ({"properties": ["a"]}, "['a'] is no value of properties"),
        ({"properties": {"a": {"type": "null"}}, "required": [["a"]]}, "[['a']] is no value of required"),
        ({"anyOf": {"type": "null"}}, "{'type': 'null'} is no value of anyOf"),
        ({"type": "string", "pattern": 1}, "1 is no value of pattern"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "no string has"),
    ],
    ids=str,
)
def test_what_cannot_be_kept_to_is_refused(schema, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        json_schema(schema)


def test_bad_input():
    with pytest.raises(ValueError, match="unknown grammar 'x'; one of date"):
        GUIDE.start("x")
    for pattern in ("(a", "a)(b", "(?=a)b", "^a$", "b|^a", r"a|\bb", "(a{500}){,500}", "[a&&b]"):
        with pytest.raises(ValueError, match=re.escape(f"grammar 'g', pattern {pattern!r}")):
            make_guide({"g": pattern}, BYTES, V)
    with pytest.raises(ValueError, match="262 ids and the model's vocabulary 100 rows"):
        make_guide({"g": "a"}, BYTES, 100)
    with pytest.raises(ValueError, match="its 502 states do not fit into a table of 512 entries"):
        grammar("a{500}b?", BYTES, V, 512)
    assert make_guide({"g": r"[)^$(]\)\\[(]{1,2}"}, BYTES, V).start("g", BYTES.encode(r"^)\(("))
