"""Single-turn rollouts: an engine writes what the sampler of whole batches writes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import KEY, TINY, make_params

from jaxrl_llm.data import tokenizers
from jaxrl_llm.data.prompts import Prompt
from jaxrl_llm.rollouts.single_turn import Rollout, Settings, failed_rows, rollout
from jaxrl_llm.sampling import prefixes, slots
from jaxrl_llm.sampling.autoregressive import prepare

TOKENIZER = tokenizers.load("characters", alphabet="0123456789+-=. ")
CFG = dataclasses.replace(TINY, vocab_size=TOKENIZER.vocab_size, tied_head=False)
PROMPTS = [
    Prompt(TOKENIZER.encode(text), {"prompt": text}, i)
    for i, text in enumerate(["1+2=", "7 - 3 + 25.", "9", "0123456789+0123456789=", "44 + 1 ="])
]
SETTINGS = Settings(
    max_prompt_length=24, max_completion_length=80, num_generations=3, temperature=1.3, top_p=0.9
)


def sample(settings: Settings, *, params=None, prompts=PROMPTS, **options) -> Rollout:
    prepared = prepare(make_params(CFG) if params is None else params, CFG)
    options = {"key": KEY, "first_uid": 2**31 - 7, "policy_version": 9} | options
    return rollout(prepared, CFG, TOKENIZER, prompts, settings, **options)


def assert_same(a: Rollout, b: Rollout) -> None:
    """Equal but for the rounding of log-probs."""
    for field in dataclasses.fields(a.trajectories):
        x, y = (getattr(out.trajectories, field.name) for out in (a, b))
        if field.name in ("behaviour_logp", "raw_logp", "log_kept"):
            np.testing.assert_allclose(x, y, atol=1e-5, err_msg=field.name)
        elif isinstance(x, jax.Array):
            np.testing.assert_array_equal(x, y, field.name)
            assert x.dtype == y.dtype
        else:
            assert x == y
    assert a.prompts == b.prompts and a.completions == b.completions and a.completion_ids == b.completion_ids


@pytest.mark.parametrize("stop_strings", [(), ("0212", "57", "33")], ids=["eos", "stop strings"])
def test_slots_write_what_whole_batches_write(stop_strings):
    """Fewer slots than rows; EOS, stop strings and the limit; numbers of rows that wrap around."""
    settings = dataclasses.replace(SETTINGS, stop_strings=stop_strings)
    together = sample(settings)
    refilled = sample(dataclasses.replace(settings, slots=4))
    assert_same(together, refilled)
    t = refilled.trajectories
    lengths = t.completion_lengths.tolist()
    assert t.group.tolist() == np.repeat(range(5), 3).tolist()
    assert set(t.policy_version[t.action_mask].tolist()) == {9}
    stopped = [any(stop in text for stop in stop_strings) for text in refilled.completions]
    ended = [ids[-1] in TOKENIZER.eos_ids for ids in refilled.completion_ids]
    assert t.finished.tolist() == [a or b for a, b in zip(stopped, ended)]
    if stop_strings:  # one of them after more than a round
        assert sum(stopped) > 3 and max(n for n, stop in zip(lengths, stopped) if stop) > 32
    else:
        assert 0 < sum(ended) < 15 and max(lengths) == 80
    assert not failed_rows(refilled, settings).any()
    for text in refilled.completions:  # nothing after the first stop
        assert all(text.find(stop) in (-1, len(text) - len(stop)) for stop in stop_strings)


def test_each_prompt_as_many_completions_as_it_is_given():
    counts = [1, 5, 2, 3, 4]
    ragged = sample(dataclasses.replace(SETTINGS, slots=4), counts=counts)
    assert ragged.trajectories.group.tolist() == np.repeat(range(5), counts).tolist()
    one_each = dataclasses.replace(SETTINGS, num_generations=1)
    rows = [prompt for prompt, count in zip(PROMPTS, counts) for _ in range(count)]
    expected = sample(one_each, prompts=rows)
    alike = dataclasses.replace(expected.trajectories, group=ragged.trajectories.group)
    assert_same(ragged, dataclasses.replace(expected, trajectories=alike))
    with pytest.raises(ValueError, match=r"counts=\[1, 5, 2, 3, 4\] that differ need an engine"):
        sample(SETTINGS, counts=counts)


def test_new_params_are_used_at_once_and_nothing_is_traced_again():
    settings = dataclasses.replace(SETTINGS, slots=4)
    sample(settings)
    functions = (slots.decode, slots.place, prefixes.prefill)
    before = [f._cache_size() for f in functions]
    params = make_params(CFG, 1)
    new = sample(dataclasses.replace(settings, temperature=0.7, top_k=9), params=params)
    assert [f._cache_size() for f in functions] == before
    assert_same(new, sample(dataclasses.replace(SETTINGS, temperature=0.7, top_k=9), params=params))


def test_rows_without_logits_fail_alone():
    params = make_params(CFG)
    nine = TOKENIZER.encode("9")[0]
    poisoned = params | {"embed": params["embed"].at[nine].set(jnp.nan)}
    settings = dataclasses.replace(SETTINGS, slots=4)
    whole, broken = (sample(settings, params=p) for p in (params, poisoned))
    for row, failed in enumerate(failed_rows(broken, settings)):
        before, after = whole.completion_ids[row], broken.completion_ids[row]
        if nine in broken.prompts[row].ids:
            assert failed and after == []
        elif nine in before:  # the last token that it draws
            assert failed and after == before[: before.index(nine) + 1]
        else:
            assert not failed and after == before
    assert 6 < sum(failed_rows(broken, settings)) < 15
