"""Supervised rows and packing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.data.supervised import Example, encode_supervised, pack
from jaxrl_llm.data.tokenizers import load


@pytest.fixture(scope="module")
def tokenizer():
    return load("bytes")


def test_the_completion_and_its_end_are_targets(tokenizer):
    rows = [{"prompt": "12+3=", "completion": "15"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    (first, second), dropped = encode_supervised(rows, tokenizer, max_length=100)
    eos = tokenizer.eos_ids[0]
    assert first == Example([*b"12+3=15", eos], [False] * 5 + [True] * 3, 0)
    assert second == Example([*b"ab", eos], [False, True, True], 1)
    assert dropped == 0


def test_a_conversation_trains_what_the_assistant_says(tokenizer):
    ask = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    reply = [
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "so"},
    ]
    (example,), _ = encode_supervised([{"prompt": ask, "completion": reply}], tokenizer, max_length=100)
    assert example.ids[: len(tokenizer.encode_prompt(ask))] == tokenizer.encode_prompt(ask)
    assert example.ids == tokenizer.encode(
        "<|system|>s<|end|><|user|>u<|end|><|assistant|>call<|end|><|tool|>result<|end|><|assistant|>so<|end|>"
    )
    targets = [i for i, written in zip(example.ids, example.loss_mask) if written]
    assert targets == tokenizer.encode("call<|end|>so<|end|>")
    # A string as the reply to a conversation is the assistant's one message.
    short = [{"prompt": ask, "completion": text} for text in ("so", reply[-1:])]
    a, b = encode_supervised(short, tokenizer, max_length=100)[0]
    assert (a.ids, a.loss_mask) == (b.ids, b.loss_mask)


def test_short_completions_are_filled_with_eos(tokenizer):
    """Up to their length and no further, as targets; what is longer stays as it is."""
    eos = tokenizer.eos_ids[0]
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bcdef"}]
    (short, long), _ = encode_supervised(rows, tokenizer, max_length=7, completion_length=4)
    assert short == Example([*b"abc", eos, eos, eos], [False] * 2 + [True] * 4, 0)
    assert long == Example([*b"abcdef", eos], [False] + [True] * 6, 1)
    assert encode_supervised(rows[:1], tokenizer, max_length=5, completion_length=4) == ([], 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "p", "answer": "a"},
            "row 1 needs a prompt and a completion .*got columns prompt, answer",
        ),
        ({"prompt": "", "completion": "a"}, "row 1 needs a prompt"),
        (
            {"prompt": "p", "completion": [{"role": "user", "content": "x"}]},
            r"row 1, column 'completion': .* got roles \['user'\]",
        ),
        (
            {"prompt": "p", "completion": [{"role": "assistant", "content": "x"}] * 3},
            "3 messages needs a prompt that",
        ),
        (
            {"prompt": "p" * 99, "completion": "a"},
            "row 1 has 101 tokens in all, more than max_length=9",
        ),
    ],
)
def test_bad_rows_are_named(tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        encode_supervised(
            [{"prompt": "a", "completion": "b"}, row], tokenizer, max_length=9, overlong="error"
        )


def test_overlong_examples_are_counted(tokenizer):
    rows = [{"prompt": "a", "completion": "b" * n} for n in (7, 8)]
    examples, dropped = encode_supervised(rows, tokenizer, max_length=9)
    assert [example.index for example in examples] == [0] and dropped == 1


@st.composite
def examples(draw):
    made = []
    for index in range(draw(st.integers(0, 12))):
        mask = draw(st.lists(st.booleans(), min_size=1, max_size=10))
        ids = draw(st.lists(st.integers(0, 999), min_size=len(mask), max_size=len(mask)))
        made.append(Example(ids, mask, index))
    return made


@given(examples(), st.integers(10, 24))
def test_packing_loses_and_mixes_nothing(rows, length):
    packed, used = pack(rows, length)
    assert used == len(rows)
    found = []
    for tokens, segments, positions, mask in zip(*packed):
        real = segments > 0
        used = int(real.sum())
        assert real[:used].all()  # the padding is at the end
        assert not tokens[used:].any() and not positions[used:].any() and not mask[used:].any()
        count = int(segments.max())
        assert sorted(set(segments[:used].tolist())) == list(range(1, count + 1))
        assert (np.diff(segments[:used]) >= 0).all()
        for segment in range(1, count + 1):
            at = segments == segment
            assert positions[at].tolist() == list(range(at.sum()))
            assert not mask[at][0]
            found.append((tokens[at].tolist(), mask[at].tolist()))
    expected = [(row.ids, [False, *row.loss_mask[1:]]) for row in rows]
    assert sorted(found) == sorted(expected)
    for array, again in zip(packed, pack(rows, length)[0]):
        np.testing.assert_array_equal(array, again)


@given(examples())
def test_first_fit_leaves_no_two_sequences_half_empty(rows):
    used = sorted((pack(rows, 10)[0].segment_ids > 0).sum(axis=1).tolist())
    assert len(used) < 2 or used[0] + used[1] > 10


def test_first_fit_by_hand():
    rows = [Example([n] * n, [True] * n, n) for n in (3, 4, 2, 1)]
    packed, _ = pack(rows, 6)
    assert packed.tokens.tolist() == [[3, 3, 3, 2, 2, 1], [4, 4, 4, 4, 0, 0]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 0, 0]]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
    assert packed.loss_mask.astype(int).tolist() == [[0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 0, 0]]
    assert [array.dtype for array in packed] == [np.int32, np.int32, np.int32, np.bool_]
    assert pack([], 6)[0].tokens.shape == (0, 6)


def test_an_example_too_long_to_pack():
    with pytest.raises(ValueError, match="the example of row 3 has 5 tokens, more than length=4"):
        pack([Example([1] * 5, [True] * 5, 3)], 4)
