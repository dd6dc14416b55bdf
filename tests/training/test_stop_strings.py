"""Stop strings are found in text and cut in tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.data import tokenizers
from jaxrl_llm.rollouts.single_turn import stop_finder

TOKENIZER = tokenizers.load("characters", alphabet="abc\n")


@given(st.text("abc\n", min_size=1, max_size=30), st.sampled_from([("ab",), ("\n", "cc"), ("bca", "aa")]))
def test_the_first_stop_ends_the_row(text, stops):
    ids = np.array(TOKENIZER.encode(text))
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert stop_finder(TOKENIZER, stops)(ids) == (min(ends) if ends else None)


def test_no_stop_strings():
    assert stop_finder(TOKENIZER, ()) is None


@pytest.mark.parametrize("kind", ["bytes"])
def test_a_stop_of_several_bytes(kind):
    tokenizer = tokenizers.load(kind)
    ids = np.array(tokenizer.encode("x€y"))
    assert stop_finder(tokenizer, ("€",))(ids) == 4
