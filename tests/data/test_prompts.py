"""Prompts as ids, padding, buckets."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.data.prompts import Prompt, bucket_length, encode_prompts, ladder, pad
from jaxrl_llm.data.tokenizers import load


@pytest.fixture(scope="module")
def tokenizer():
    return load("bytes")


def test_overlong_prompts_are_dropped_and_counted(tokenizer):
    rows = [{"prompt": text, "answer": n} for n, text in enumerate(["abc", "abcd", "abcde", "é\n"])]
    prompts, dropped = encode_prompts(rows, tokenizer, max_prompt_length=3)
    assert prompts == [Prompt(list(b"abc"), rows[0], 0), Prompt(list("é\n".encode()), rows[3], 3)]
    assert dropped == 2
    assert encode_prompts(rows, tokenizer, max_prompt_length=5)[1] == 0
    with pytest.raises(ValueError, match="row 1 has 4 tokens, more than max_prompt_length=3"):
        encode_prompts(rows, tokenizer, max_prompt_length=3, overlong="error")
    with pytest.raises(ValueError, match="unknown overlong='truncate'; one of drop, error"):
        encode_prompts(rows, tokenizer, max_prompt_length=3, overlong="truncate")


def test_messages_count_with_their_template(tokenizer):
    rows = [{"prompt": [{"role": "user", "content": "ab"}]}]
    (prompt,), _ = encode_prompts(rows, tokenizer, max_prompt_length=5)
    assert prompt.ids == tokenizer.encode("<|user|>ab<|end|><|assistant|>") and len(prompt.ids) == 5
    assert encode_prompts(rows, tokenizer, max_prompt_length=4) == ([], 1)


def test_a_prompt_that_cannot_be_written_is_named():
    with pytest.raises(ValueError, match="the prompt of row 1: character 'x' at position 2"):
        encode_prompts(
            [{"prompt": "1"}, {"prompt": "1+x"}], load("characters", alphabet="1+"), max_prompt_length=9
        )


@pytest.mark.parametrize("empty", ["", []])
def test_an_empty_prompt_is_named(tokenizer, empty):
    with pytest.raises(ValueError, match="the prompt of row 1 is empty"):
        encode_prompts([{"prompt": "a"}, {"prompt": empty}], tokenizer, max_prompt_length=9)


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), max_size=5), st.integers(6, 9))
def test_padding_keeps_every_id(rows, length):
    tokens, lengths = pad(rows, length=length)
    assert tokens.shape == (len(rows), length) and tokens.dtype == lengths.dtype == np.int32
    for row, padded, size in zip(rows, tokens, lengths):
        assert padded[:size].tolist() == row and not padded[size:].any()


def test_padding_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="row 1 has 3 tokens, more than the array's 2"):
        pad([[1], [1, 2, 3]], length=2)


@given(st.integers(1, 5000), st.integers(1, 300), st.booleans(), st.data())
def test_buckets_hold_every_length_and_are_few(limit, multiple, middles, data):
    buckets = ladder(limit, multiple_of=multiple, middles=middles)
    n = data.draw(st.integers(0, limit))
    chosen = bucket_length(n, buckets)
    assert chosen in buckets and chosen >= n
    assert not any(n <= bucket < chosen for bucket in buckets)
    assert all(bucket % multiple == 0 for bucket in buckets)
    assert limit <= buckets[-1] < limit + multiple
    assert len(buckets) <= 2 + (1 + middles) * np.log2(max(limit / multiple, 1))
    assert all(b <= (1.5 if middles and a > multiple else 2) * a for a, b in itertools.pairwise(buckets))


def test_no_bucket_is_large_enough():
    assert bucket_length(3, [8, 4]) == 4
    with pytest.raises(ValueError, match=r"9 tokens fit into none of the buckets \(4, 8\)"):
        bucket_length(9, [4, 8])
    with pytest.raises(ValueError, match="must be positive"):
        ladder(0)
