"""Conversations: only what is new is encoded, what was sampled stays, and rows say who wrote which token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.data.chat import NotAppendOnly, text_after_reply
from jaxrl_llm.data.tokenizers import load, train_sentencepiece
from jaxrl_llm.rollouts.conversation import Conversation, Row, Turn, stack
from jaxrl_llm.rollouts.requests import Completion

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 2?\n"}]
TOOL = [{"role": "tool", "content": "3"}, {"role": "user", "content": "so"}]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (  # thoughts of earlier turns are cut out
    "{% for m in messages %}{% set c = m['content'] if loop.last else m['content'].split('</think>')[-1] %}"
    "{{ m['role'] + ':' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
CUT_AT_ONCE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'].split('</think>')[-1] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TRIMMED = CHATML.replace("m['content']", "m['content'] | trim")
MODEL_SAYS_WHO = "{% for m in messages %}{{ m['content'] }}.{% endfor %}{{ 'by' if add_generation_prompt }}"


def completion(ids, reason="stop", seed=0) -> Completion:
    """`ids` with log-probs that no two tokens share."""
    rng = np.random.default_rng([seed, len(ids)])
    behaviour, raw, kept = -rng.random((3, len(ids))).astype(np.float32)
    version = rng.integers(0, 9, len(ids), dtype=np.int32)
    return Completion(np.array(ids, np.int32), behaviour, raw, kept, version, reason)


def folder(path, template):
    """A tokenizer folder: a byte-level BPE with merges, <|im_end|> (id 1) as its EOS, and the template."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    backend = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    text = ["user assistant system what is the sum of these numbers\n\n"] * 3
    backend.train_from_iterator(text, vocab_size=320, special_tokens=special, show_progress=False)
    PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, eos_token="<|im_end|>", chat_template=template
    ).save_pretrained(path)
    (path / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    return load("folder", path=str(path))


@pytest.fixture(scope="module", params=["chatml", "trimmed", "sentencepiece", "bytes"])
def tokenizer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    if request.param == "bytes":
        return load("bytes")
    if request.param == "sentencepiece":
        train_sentencepiece([f"{i} + {i}? so be brief\n" for i in range(99)], path / "m", vocab_size=340)
        return load("sentencepiece", path=str(path / "m"))
    return folder(path, {"chatml": CHATML, "trimmed": TRIMMED}[request.param])


def say(conversation, new, ids, reason="stop"):
    draft = conversation.draft(new)
    return draft, conversation.commit(draft, completion(ids, reason))


word = st.text("ab 12+\n", min_size=1, max_size=6).filter(lambda x: x == x.strip())


@given(words=st.lists(word, min_size=3, max_size=3))
@settings(max_examples=20, deadline=None)
def test_replies_in_the_tokenizers_own_ids_give_the_whole_conversation(tokenizer, words):
    """The oracle encodes everything anew, which must agree where the policy writes as the tokenizer would."""
    end, talk = tokenizer.eos_ids[0], [*ASK]
    conversation = Conversation(tokenizer=tokenizer)
    for new, said in zip((ASK, TOOL, TOOL[1:]), words):
        talk += new if conversation.rows else []
        draft, turn = say(conversation, new, [*tokenizer.encode(said), end])
        assert draft.ids == tokenizer.encode_chat(talk) and turn.text == said
        talk.append({"role": "assistant", "content": said})
    assert len(conversation.rows) == 1 and [turn.number for turn in conversation.turns] == [0, 1, 2]


def test_sampled_ids_stay_whatever_their_text_would_encode_to(tokenizer):
    """Letters one by one, blanks around them, an end that is missing: the ids are kept, none is encoded."""
    letters = [i for c in " sum of\n" for i in tokenizer.encode(c)]
    conversation = Conversation(tokenizer=tokenizer)
    first, _ = say(conversation, ASK, letters, "length")
    second, turn = say(conversation, TOOL, letters)
    start = len(first.ids) + len(letters)
    assert second.ids[:start] == first.ids + letters
    # the turn that the limit cut short is closed for it, by a token that it did not write
    assert second.ids[start] == tokenizer.eos_ids[0]
    reference = Conversation(tokenizer=tokenizer)
    say(reference, ASK, [*tokenizer.encode("x"), tokenizer.eos_ids[0]])
    after_x = reference.draft(TOOL).ids[len(first.ids) + len(tokenizer.encode("x")) :]
    assert second.ids[start:] == after_x
    assert turn.start == len(second.ids) and conversation.rows[0].ids[turn.start :] == letters


def test_only_what_is_new_is_encoded(tmp_path, monkeypatch):
    tokenizer = folder(tmp_path, CHATML)
    conversation = Conversation(tokenizer=tokenizer)
    say(conversation, [{"role": "user", "content": "long ago " * 50}], [300, 1])
    seen, encode = [], tokenizer._encode
    monkeypatch.setattr(
        tokenizer, "_encode", lambda text, **kwargs: seen.append(text) or encode(text, **kwargs)
    )
    conversation.draft(TOOL)
    assert seen and not any("long ago" in text for text in seen)


def test_another_end_than_the_templates_is_kept(tmp_path):
    tokenizer = folder(tmp_path, CHATML)
    conversation = Conversation(tokenizer=tokenizer)
    first, _ = say(conversation, ASK, [300, 0])
    assert conversation.draft(TOOL).ids[len(first.ids) :][:3] == [300, 0, 1]


def test_a_reply_without_tokens_is_closed(tokenizer):
    conversation = Conversation(tokenizer=tokenizer)
    first, _ = say(conversation, ASK, [], "deadline")
    assert conversation.draft(TOOL).ids[len(first.ids)] == tokenizer.eos_ids[0]


@pytest.mark.parametrize(
    ("template", "reply", "place", "change"),
    [
        (
            FORGETFUL,
            "hm</think>3",
            "system:Be brief.<|im_end|>\nuser:1 + 2?\n<|im_end|>\nassistant:",
            "'hm</th",
        ),
        (
            CUT_AT_ONCE,
            "hm</think>3",
            "system:Be brief.<|im_end|>user:1 + 2?\n<|im_end|>assistant:",
            "'hm</th",
        ),
        (MODEL_SAYS_WHO, "3", "Be brief..1 + 2?\n.", "'byreply' becomes 'reply.'"),
    ],
    ids=["later", "at once", "header"],
)
def test_a_template_that_rewrites_is_a_loud_error_or_a_fork(tmp_path, template, reply, place, change):
    tokenizer = folder(tmp_path, template)
    ids = [*tokenizer.encode(reply), tokenizer.eos_ids[0]]
    strict, forked = (Conversation(tokenizer=tokenizer, fork=fork) for fork in (False, True))
    for conversation in (strict, forked):
        say(conversation, ASK, ids)
    with pytest.raises(NotAppendOnly) as error:
        strict.draft(TOOL)
    for part in (str(tmp_path), f"from character {len(place)} on, {change}", "fork=True"):
        assert part in str(error.value)
    assert len(strict.rows) == 1 and strict.rows[0].ids[-len(ids) :] == ids  # as it was

    draft, turn = say(forked, TOOL, ids)
    said = [{"role": "assistant", "content": reply}]
    assert draft.ids == tokenizer.encode_chat([*ASK, *said, *TOOL])
    assert [len(row.turns) for row in forked.rows] == [1, 1] and turn.number == 1
    assert forked.rows[0].ids == tokenizer.encode_chat(ASK) + ids


def test_a_template_that_cuts_thoughts_is_fine_where_there_are_none(tmp_path):
    tokenizer = folder(tmp_path, FORGETFUL)
    conversation = Conversation(tokenizer=tokenizer)
    say(conversation, ASK, [*tokenizer.encode("3"), 1])
    said = [{"role": "assistant", "content": "3"}]
    assert conversation.draft(TOOL).ids == tokenizer.encode_chat([*ASK, *said, *TOOL])


def test_what_ends_a_turn_is_found_by_hand():
    def render(messages, header):
        return "".join(f"[{m['content'].strip()}]~" for m in messages) + "[" * header

    assert text_after_reply(render, ASK, " a\n", TOOL, template="t") == "]~[3]~[so]~["
    assert text_after_reply(render, ASK, "", [], template="t") == "]~["


def test_plain_text_and_ids_are_appended_as_they_are(tokenizer):
    conversation = Conversation(tokenizer=tokenizer)
    first, _ = say(conversation, "sum of", [9, 8])
    assert first.ids == tokenizer.encode_prompt("sum of")
    second, _ = say(conversation, " and", [7])
    assert second.ids == [*first.ids, 9, 8, *tokenizer.encode(" and")]
    third, _ = say(conversation, np.array([5, 4]), [])
    assert third.ids == [*second.ids, 7, 5, 4]
    assert conversation.draft([]).ids == third.ids
    with pytest.raises(ValueError, match="messages cannot follow plain text or token ids"):
        conversation.draft(TOOL)


def test_bad_input():
    with pytest.raises(ValueError, match="nothing to begin a conversation with"):
        Conversation().draft([])
    for new in ("text", ASK):
        with pytest.raises(ValueError, match="need the model's tokenizer"):
            Conversation().draft(new)
    row = Row([1, 2], [Turn(0, 1, completion([2]))])
    with pytest.raises(ValueError, match="row of 2 tokens does not fit into width=1"):
        stack([(Conversation(), row)], group=[0], rewards=[{}], width=1)


# --- rows


turns = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=4)


@given(
    rows=st.lists(turns.filter(lambda row: any(n for _, n in row)), min_size=1, max_size=4), data=st.data()
)
@settings(max_examples=50, deadline=None)
def test_stacked_rows_equal_a_token_by_token_count(rows, data):
    """Each turn reads some tokens and writes some: an oracle that goes through them one at a time."""
    conversations, expected = [], []
    for index, plan in enumerate(rows):
        conversation, cells = Conversation(role=index % 2, temperature=0.5 + index), []
        for number, (read, wrote) in enumerate(plan):
            read += number == 0
            new, own = (
                range(10, 10 + read),
                completion(range(50, 50 + wrote), "stop", seed=7 * index + number),
            )
            draft = conversation.draft(list(new))
            turn = conversation.commit(draft, own)
            turn.reward = data.draw(st.floats(-2, 2, width=32))
            cells += [(i, False, number, 0.0, 0.0, 0.0, -1, 0.0) for i in new]
            for j in range(wrote):
                values = own.behaviour_logp[j], own.raw_logp[j], own.log_kept[j], own.policy_version[j]
                cells.append((50 + j, True, number, *values, turn.reward if j == wrote - 1 else 0.0))
        while not cells[-1][1]:
            cells.pop()  # nothing was written after it
        # what a turn without tokens has read leads to the next one that has some
        for t in reversed(range(len(cells) - 1)):
            if not cells[t][1]:
                cells[t] = (*cells[t][:2], cells[t + 1][2], *cells[t][3:])
        conversations.append(conversation)
        expected.append(cells)
    width = max(map(len, expected)) + 2
    t = stack(
        [(c, c.rows[0]) for c in conversations],
        group=[3 * i for i in range(len(rows))],
        rewards=[{"a": float(i)} if i % 2 else {"b": 1.0} for i in range(len(rows))],
        width=width,
    )
    names = ("tokens", "action_mask", "turn", "behaviour_logp", "raw_logp", "log_kept", "policy_version")
    blank = (0, False, 0, 0.0, 0.0, 0.0, -1, 0.0)
    full = [cells + [blank] * (width - len(cells)) for cells in expected]
    for column, name in enumerate((*names, "token_rewards")):
        want = np.array([[cell[column] for cell in row] for row in full])
        assert np.array_equal(np.asarray(getattr(t, name)), want.astype(getattr(t, name).dtype)), name
    assert t.lengths.tolist() == [len(cells) for cells in expected]
    assert t.group.tolist() == [3 * i for i in range(len(rows))]
    assert t.role.tolist() == [i % 2 for i in range(len(rows))]
    assert t.temperature.tolist() == [0.5 + i for i in range(len(rows))]
    assert np.array_equal(t.rewards["b"], [1.0 if i % 2 == 0 else np.nan for i in range(len(rows))], True)
    if len(rows) > 1:
        assert float(t.rewards["a"][1]) == 1.0 and np.isnan(t.rewards["a"][0])


def test_a_row_is_finished_if_its_last_turn_is():
    for reasons in (("stop", "length"), ("length", "stop")):
        conversation = Conversation()
        for reason in reasons:
            say(conversation, [1], [2], reason)
        t = stack([(conversation, conversation.rows[0])], group=[0], rewards=[{}], width=4)
        assert t.finished.tolist() == [reasons[-1] == "stop"]


def test_no_rows():
    t = stack([], group=[], rewards=[], width=8)
    assert t.tokens.shape == (0, 8) and t.rewards == {}
