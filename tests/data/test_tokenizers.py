"""Tokenizers: a Hugging Face folder, sentencepiece, bytes, characters."""

import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.data.tokenizers import check_vocabulary, load, train_sentencepiece

DIGITS = "0123456789+-= \n"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 2?\n"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "so"},
]
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As reasoning models' templates do: thoughts of earlier turns are cut out.
FORGETFUL = (
    "{% for m in messages %}{% set c = m['content'] if loop.last else m['content'].split('</think>')[-1] %}"
    "{{ m['role'] + ':' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def fast_tokenizer(**changes):
    """A byte-level BPE as real models have, with BOS in front of plain text and ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["user assistant system what is the sum of these numbers\n\n"] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=changes.pop("single", "<s> $A"), special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML, **changes}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    fast_tokenizer().save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3], "temperature": 0.6}))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("sp") / "small.model"
    texts = [f"What is {i} + {i * 7}?\n\nAnswer:\n  {i * 8}\n" for i in range(200)] + ["x" * 9000]
    train_sentencepiece(texts, path, vocab_size=340)
    return str(path)


@pytest.fixture(scope="module", params=["folder", "sentencepiece", "bytes"])
def tokenizer(request, folder, model):
    """One of the tokenizers that can write any text."""
    path = {"folder": folder, "sentencepiece": model}.get(request.param, "")
    return load(request.param, path=path)


# As in transformers, text that spells a special token becomes that token.
ordinary = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<"))


@given(text=ordinary)
@settings(max_examples=50)
def test_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert not set(ids) & {*tokenizer.eos_ids}


@given(text=st.text(string.printable.replace("<", "")))
@settings(max_examples=50)
def test_newlines_and_runs_of_spaces_survive(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(f"\n\n{text}   \n")) == f"\n\n{text}   \n"


@given(text=st.text(DIGITS))
@settings(max_examples=50)
def test_characters_are_their_places_in_the_alphabet(text):
    tokenizer = characters
    assert tokenizer.encode(text) == [DIGITS.index(c) for c in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text


characters = load("characters", alphabet=DIGITS)


@given(text=ordinary)
@settings(max_examples=50)
def test_bytes_are_the_utf8_bytes(text):
    assert byte_level.encode(text) == list(text.encode())


byte_level = load("bytes")


def test_a_prompt_rendered_beforehand_is_the_chat(folder):
    tokenizer = load("folder", path=folder)
    rendered = "<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(rendered) == tokenizer.encode_chat(TALK[3:])
    assert byte_level.encode("<|user|>so<|end|><|assistant|>") == byte_level.encode_chat(TALK[3:])


def test_sizes_and_special_ids(folder, model):
    assert byte_level.vocab_size == 256 + 6 and byte_level.pad_id == 256 and byte_level.eos_ids == (257,)
    assert characters.vocab_size == len(DIGITS) + 6 and characters.eos_ids == (len(DIGITS) + 1,)
    hf = load("folder", path=folder)
    assert hf.eos_ids == (3, 1)  # its own first, then generation_config.json's
    assert hf.pad_id == 3  # it has none
    sp = load("sentencepiece", path=model)
    assert sp.eos_ids == (1,) and sp.pad_id == 2 and 300 < sp.vocab_size <= 340


def test_decoding_skips_special_tokens_and_ids_without_a_token(tokenizer):
    ids = tokenizer.encode("a\nb")
    noisy = [tokenizer.pad_id, *ids[:1], tokenizer.eos_ids[0], 10**6, *ids[1:], *tokenizer.eos_ids]
    assert tokenizer.decode(noisy) == "a\nb"
    headed = tokenizer.encode_chat([{"role": "user", "content": ""}])
    assert tokenizer.decode(headed) in ("", "user\n\nassistant\n")


def test_a_folders_chat_is_what_transformers_renders(folder):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer = load("folder", path=folder)
    expected = reference.apply_chat_template(
        TALK, tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert tokenizer.encode_chat(TALK) == tokenizer.encode_prompt(TALK) == expected
    assert reference.decode(expected).endswith("<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n")
    assert (
        tokenizer.encode_prompt("sum of")
        == reference("sum of")["input_ids"]
        == [0, *tokenizer.encode("sum of")]
    )


def test_a_prompt_is_not_closed(tmp_path):
    fast_tokenizer(single="<s> $A </s>", eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = load("folder", path=str(tmp_path))
    assert tokenizer.encode_prompt("sum") == [0, *tokenizer.encode("sum")]
    assert tokenizer.encode_prompt("sum</s>")[-1] == 1  # the user's own
    assert tokenizer.encode_completion("sum", "of")[0][-1:] == [1]


def test_the_own_template_by_hand(model):
    assert characters.encode_chat([{"role": "user", "content": "1+1"}]) == [
        *characters.encode("<|user|>1+1<|end|><|assistant|>")
    ]
    assert len(characters.encode_chat([{"role": "user", "content": "1+1"}])) == 6
    sp = load("sentencepiece", path=model)
    header = {role: i + 3 for i, role in enumerate(("system", "user", "assistant", "tool"))}
    ids = []
    for message in TALK:
        ids += [header[message["role"]], *sp.encode(message["content"]), 1]
    assert sp.encode_chat(TALK) == [*ids, header["assistant"]]
    assert not set(sp.encode("<|user|></s><pad>")) & {1, 2, *header.values()}  # text cannot forge a turn


def test_the_template_is_append_only(tokenizer):
    so_far = tokenizer.encode_chat(TALK[:2])
    assert tokenizer.encode_chat(TALK)[: len(so_far)] == so_far


def test_completions_continue_the_prompt(tokenizer):
    for prompt, completion in [
        ("1 + 2 = ", "3\n"),
        (TALK, "4"),
        ("ends in a newline\n", "\nmore"),
        ("p", ""),
    ]:
        ids, mask = tokenizer.encode_completion(prompt, completion)
        assert ids[-1] in tokenizer.eos_ids and mask == [True] * len(ids)
        assert tokenizer.decode(ids) == completion
    # The whole conversation as one prompt and as prompt and completion: the same ids.
    ids, mask = tokenizer.encode_completion(TALK[:2], [*TALK[2:], {"role": "assistant", "content": "so?"}])
    whole = tokenizer.encode_chat([*TALK, {"role": "assistant", "content": "so?"}])
    joined = tokenizer.encode_chat(TALK[:2]) + ids
    assert whole[: len(joined)] == joined
    said = tokenizer.decode([i for i, written in zip(ids, mask) if written])
    assert said == "3so?"


def test_headers_within_a_reply_are_not_targets(tokenizer):
    said = [{"role": "assistant", "content": word} for word in ("one", "two")]
    for between in ([], [{"role": "tool", "content": "x"}, {"role": "user", "content": "y"}]):
        reply = [said[0], *between, said[1]]
        ids, mask = tokenizer.encode_completion(TALK, reply)
        targets = [i for i, written in zip(ids, mask) if written]
        assert targets == [
            *tokenizer.encode_completion(TALK, said[:1])[0],
            *tokenizer.encode_completion(TALK, said[1:])[0],
        ]
        prompt = tokenizer.encode_chat([*TALK, said[0], *between])  # what the second answer is sampled after
        assert (tokenizer.encode_chat(TALK) + ids)[: len(prompt)] == prompt


def test_a_forgetful_template_is_a_loud_error(tmp_path):
    fast_tokenizer(chat_template=FORGETFUL).save_pretrained(tmp_path)
    tokenizer = load("folder", path=str(tmp_path))
    thought = {"role": "assistant", "content": "hm</think>3"}
    ask = TALK[1:2]
    assert tokenizer.decode(tokenizer.encode_completion(ask, [thought])[0]) == "hm</think>3"
    with pytest.raises(ValueError, match="not append-only"):
        tokenizer.encode_completion(ask, [thought, ask[0], thought])


def test_a_template_without_an_end_still_ends(tmp_path):
    endless = (
        "{% for m in messages %}{{ ':' if m['role'] == 'assistant' }}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    fast_tokenizer(chat_template=endless).save_pretrained(tmp_path)
    tokenizer = load("folder", path=str(tmp_path))
    ids, mask = tokenizer.encode_completion([{"role": "user", "content": "a"}], "b")
    assert ids == [*tokenizer.encode("b"), 3] and mask == [True, True]


def test_no_template(tmp_path):
    fast_tokenizer(chat_template=None).save_pretrained(tmp_path)
    tokenizer = load("folder", path=str(tmp_path))
    assert tokenizer.decode(tokenizer.encode_prompt("sum")) == "sum"
    with pytest.raises(ValueError, match="has no chat template"):
        tokenizer.encode_prompt(TALK)


def test_unknown_roles_are_named(model):
    for tokenizer in (characters, load("sentencepiece", path=model)):
        with pytest.raises(ValueError, match=r"unknown role '?judge'?; one of system, user"):
            tokenizer.encode_chat([{"role": "judge", "content": "1"}])


def test_an_unknown_character_is_named_with_its_place(tmp_path):
    with pytest.raises(ValueError, match=r"character 'x' at position 2 of '1\+x='.*alphabet '0123456789"):
        characters.encode("1+x=")
    with pytest.raises(ValueError, match=r"character 'é' at position 21 of '<\|assistant\|>1<\|end\|>é'"):
        characters.encode("<|assistant|>1<|end|>é")
    characters.save(tmp_path)
    with pytest.raises(ValueError, match="character '<' at position 0"):
        load("folder", path=str(tmp_path)).encode_prompt("<|judge|>")


@pytest.mark.parametrize("original", [byte_level, characters], ids=["bytes", "characters"])
def test_built_in_tokenizers_export_as_hugging_face_folders(original, tmp_path):
    from transformers import AutoTokenizer

    original.save(tmp_path)
    text = "12 + 30 =\n\n  42"
    outside = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert outside.encode(text) == original.encode(text)
    assert outside.decode(outside.encode(text)) == text
    assert (outside.pad_token_id, outside.eos_token_id) == (original.pad_id, original.eos_ids[0])
    talk = [{"role": "user", "content": text}]
    chat = outside.apply_chat_template(talk, tokenize=True, return_dict=False, add_generation_prompt=True)
    assert chat == original.encode_chat(talk)
    again = load("folder", path=str(tmp_path))
    assert again.encode_completion(talk, "42") == original.encode_completion(talk, "42")
    assert (again.vocab_size, again.pad_id, again.eos_ids) == (
        original.vocab_size,
        original.pad_id,
        original.eos_ids,
    )


def test_saving_and_loading_round_trips(tokenizer, folder, tmp_path):
    tokenizer.save(tmp_path)
    kind = "sentencepiece" if (tmp_path / "tokenizer.model").exists() else "folder"
    again = load(kind, path=str(tmp_path))
    assert again.encode_chat(TALK) == tokenizer.encode_chat(TALK)
    assert again.encode_prompt("é \n x") == tokenizer.encode_prompt("é \n x")
    assert (again.vocab_size, again.pad_id, again.eos_ids) == (
        tokenizer.vocab_size,
        tokenizer.pad_id,
        tokenizer.eos_ids,
    )


def test_saving_keeps_a_generation_config_that_is_there(folder, tmp_path):
    target = tmp_path / "generation_config.json"
    target.write_text("{}")
    load("folder", path=folder).save(tmp_path)
    assert target.read_text() == "{}"


def test_the_vocabulary_must_fit_the_model(tmp_path):
    check_vocabulary(characters, 21)
    check_vocabulary(characters, 128)
    with pytest.raises(ValueError, match="the tokenizer has 21 ids and the model's vocabulary 20 rows"):
        check_vocabulary(characters, 20)
    fast = fast_tokenizer()
    size = len(fast)
    fast.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    fast.save_pretrained(tmp_path)
    check_vocabulary(load("folder", path=str(tmp_path)), size)  # a text-only model has no row for it
    fast.add_special_tokens({"additional_special_tokens": ["<tool_call>"]})
    fast.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"has {size + 2} ids and the model's vocabulary {size} rows"):
        check_vocabulary(load("folder", path=str(tmp_path)), size)


def test_fitting_sentencepiece(tmp_path):
    texts = ["line one\nline two\n"] * 50
    for name in ("a", "b"):
        train_sentencepiece(iter(texts), tmp_path / name, vocab_size=300)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(
        ValueError, match=r"vocab_size=100 is too small for these texts, which need \d+ pieces"
    ):
        train_sentencepiece(texts, tmp_path / "c", vocab_size=100)
    smallest = 256 + 3 + 4 + len(set("".join(texts)) | {"▁"} - {" "})
    train_sentencepiece(texts, tmp_path / "d", vocab_size=smallest + 1)
    with pytest.raises(ValueError, match="no text"):
        train_sentencepiece(["", ""], tmp_path / "c", vocab_size=300)


def test_a_sentencepiece_model_of_another_making(tmp_path):
    """As Llama's: BOS, no symbols for roles, a blank put in front of the text."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["what is the sum of one and two"] * 20),
        model_writer=model,
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = load("sentencepiece", path=str(tmp_path))
    assert tokenizer.pad_id == tokenizer.eos_ids[0] == 2
    assert tokenizer.encode_prompt("the sum") == [1, *tokenizer.encode("the sum")]
    chat = tokenizer.encode_chat([{"role": "user", "content": "one"}])
    assert chat == [
        *[1, *tokenizer.encode("<|user|>"), *tokenizer.encode("one"), 2, *tokenizer.encode("<|assistant|>")]
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"kind": "tiktoken"},
            ValueError,
            "unknown tokenizer kind 'tiktoken'; one of folder, sentencepiece, bytes, ch",
        ),
        ({"kind": "folder"}, ValueError, "'folder' needs path"),
        ({"kind": "characters"}, ValueError, "'characters' needs alphabet"),
        ({"kind": "bytes", "path": "x"}, ValueError, "takes no path, got 'x'"),
        ({"kind": "characters", "alphabet": "aba"}, ValueError, "the alphabet 'aba' repeats 'a'"),
        ({"kind": "folder", "path": "nowhere"}, FileNotFoundError, "no tokenizer folder at 'nowhere'"),
        (
            {"kind": "sentencepiece", "path": "nowhere"},
            FileNotFoundError,
            "no sentencepiece model at 'nowhere'",
        ),
        ({"kind": "sentencepiece", "path": __file__}, ValueError, "is not a sentencepiece model"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        load(**arguments)


def test_folders_that_hold_no_usable_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="finds no tokenizer that it can read"):
        load("folder", path=str(tmp_path))
    fast_tokenizer(eos_token=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no EOS token"):
        load("folder", path=str(tmp_path))
