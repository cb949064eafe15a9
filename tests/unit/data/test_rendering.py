"""Documents and records to tokens, with those of them that are predicted."""

import numpy as np
import pytest

from areal_ray.config import ConfigError, DataConfig
from areal_ray.data.build import build_renderer
from areal_ray.data.records import Document
from areal_ray.data.rendering import text as text_module
from areal_ray.data.tokenizers import build_tokenizer, check_of_model
from tests.unit.data.tokenizer_files import SPECIAL, save_tokenizer

pytestmark = pytest.mark.unit

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (  # thoughts of earlier turns are left out, as some templates of reasoning models do it
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if loop.last %}<think>{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REFUSING = "{{ raise_exception('only user and assistant roles') }}"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "größer?"},
    {"role": "assistant", "content": "Größer."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No 🙂."},
    {"role": "user", "content": "Bye."},
    {"role": "assistant", "content": "Bye!"},
]


def by_hand(messages):
    """Pieces of text with whether they are predicted."""
    for message in messages:
        yield f"<|im_start|>{message['role']}\n", False
        yield f"{message['content']}<|im_end|>", message["role"] == "assistant"
        yield "\n", False


def expected(tokenizer, pieces):
    ids = [(tokenizer.ids(text.encode()).tolist(), predicted) for text, predicted in pieces]
    return [i for piece, _ in ids for i in piece], [predicted for piece, predicted in ids for _ in piece]


def render(config, tokenizer, content):
    return list(build_renderer(config, tokenizer)(Document(content, "file.jsonl:7")))


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["without marks", "with marks"])
@pytest.mark.parametrize("source", ["own", "text", "file"])
def test_of_a_chat_the_assistants_tokens_are_predicted_with_the_end_of_each_turn(tmp_path, template, source):
    tokenizer = build_tokenizer(save_tokenizer(tmp_path / "t", template=template if source == "own" else REFUSING))
    (tmp_path / "template.jinja").write_text(template)
    given = {"own": None, "text": template, "file": str(tmp_path / "template.jinja")}[source]
    config = DataConfig(format="messages", chat_template=given)
    (made,) = render(config, tokenizer, {"messages": CHAT})
    ids, predicted = expected(tokenizer, by_hand(CHAT))
    assert made.ids.tolist() == ids
    assert made.predicted.tolist() == predicted
    assert made.ids.tolist().count(SPECIAL["<|im_end|>"]) == 7


@pytest.mark.parametrize(
    ("template", "messages", "why"),
    [
        (FORGETFUL, CHAT, "renders turn 3 in another way when others follow"),
        (REFUSING, CHAT, "the chat template refuses it: TemplateError: only user and assistant roles"),
        (CHATML, CHAT[:2], "the assistant says nothing"),
        (CHATML, [], "with one at least"),
        (CHATML, ["hi"], "message 1 must have a role"),
    ],
)
def test_a_chat_that_cannot_be_rendered_is_an_error_with_file_and_line_or_counted(tmp_path, template, messages, why):
    tokenizer = build_tokenizer(save_tokenizer(tmp_path, template=template))
    with pytest.raises(ConfigError) as caught:
        render(DataConfig(format="messages"), tokenizer, {"messages": messages})
    assert caught.value.message.startswith("file.jsonl:7: ")
    assert why in caught.value.message
    renderer = build_renderer(DataConfig(format="messages", on_error="skip"), tokenizer)
    assert list(renderer(Document({"messages": messages}, "a:1"))) == []
    assert renderer.skipped == {"records that cannot be rendered left out": 1}


def test_a_chat_of_bytes_needs_a_template_and_tools_are_for_it(tmp_path):
    tokenizer = build_tokenizer("bytes")
    with pytest.raises(ConfigError) as caught:
        build_renderer(DataConfig(format="messages"), tokenizer)
    assert caught.value.key == "data.chat_template"
    template = "{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}" + CHATML
    record = {"messages": CHAT[:3], "tools": '[{"name": "add"}]'}
    (made,) = render(DataConfig(format="messages", chat_template=template), tokenizer, record)
    assert bytes(made.ids.astype(np.uint8)).startswith(b"[add]<|im_start|>system")
    assert bytes(made.ids[made.predicted].astype(np.uint8)) == "Größer.<|im_end|>\n".encode()


def test_a_template_with_the_date_gives_the_same_tokens_every_day():
    tokenizer = build_tokenizer("bytes")
    template = "Today is {{ strftime_now('%d %b %Y %H:%M:%S') }}\n" + CHATML
    config = DataConfig(format="messages", chat_template=template)
    (made,) = render(config, tokenizer, {"messages": CHAT[:3]})
    assert bytes(made.ids.astype(np.uint8)).startswith(b"Today is 26 Jul 2024\n<|im_start|>system")
    assert tokenizer.transformers().chat_template is None  # what is exported is as it was


def test_of_a_completion_what_follows_the_prompt_is_predicted(tmp_path):
    tokenizer = build_tokenizer(save_tokenizer(tmp_path, bos=True, template=CHATML))
    config = DataConfig(format="completion")
    (made,) = render(config, tokenizer, {"prompt": "ab", "completion": "cde"})
    assert made.ids.tolist() == [256, *tokenizer.ids(b"abcde"), 257]
    assert made.predicted.tolist() == [False] * 3 + [True] * 4
    (made,) = render(config, tokenizer, {"prompt": CHAT[:4], "completion": CHAT[4:5]})
    ids, _ = expected(tokenizer, by_hand(CHAT[:5]))
    assert made.ids.tolist() == ids
    assert made.ids[made.predicted].tolist() == tokenizer.ids("No 🙂.<|im_end|>".encode()).tolist()
    with pytest.raises(ConfigError, match="both be text"):
        render(config, tokenizer, {"prompt": "a", "completion": CHAT})


def test_a_preference_is_a_pair_with_the_same_prompt(tmp_path):
    tokenizer = build_tokenizer("bytes")
    chosen, rejected = render(
        DataConfig(format="preference"), tokenizer, {"prompt": "p", "chosen": "yes", "rejected": "no"}
    )
    assert (chosen.group, rejected.group) == ("chosen", "rejected")
    assert chosen.ids.tolist() == [*b"pyes", 256]
    assert rejected.predicted.tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("bos", "options", "begin", "end"),
    [
        (True, {}, [256], [257]),
        (False, {}, [], [257]),
        (True, {"add_bos": False}, [], [257]),
        (False, {"add_bos": True, "add_eos": False}, [256], []),
    ],
)
def test_a_document_begins_as_the_tokenizers_own_encoding_does_or_as_configured(tmp_path, bos, options, begin, end):
    tokenizer = build_tokenizer(save_tokenizer(tmp_path, bos=bos))
    (made,) = render(DataConfig(**options), tokenizer, b"text")
    assert made.ids.tolist() == [*begin, *tokenizer.ids(b"text"), *end]


def test_a_beginning_that_there_is_not_is_a_config_error():
    with pytest.raises(ConfigError, match="has no beginning-of-text token"):
        build_renderer(DataConfig(add_bos=True), build_tokenizer("bytes"))


LONG = [b"one line\ntwo\n" * 9, b"words only " * 9, b"x" * 99, b"\n" + b"x" * 50, b" " + b"x" * 50, "字".encode() * 30]


@pytest.mark.parametrize("content", LONG)
def test_a_long_document_is_tokenized_in_pieces(monkeypatch, content):
    whole = render(DataConfig(), build_tokenizer("bytes"), content)[0].ids.tolist()
    monkeypatch.setattr(text_module, "_PIECE", 16)
    pieces = render(DataConfig(), build_tokenizer("bytes"), content)
    assert len(pieces) > 3
    assert [i for piece in pieces for i in piece.ids.tolist()] == whole
    for piece in pieces[:-1]:  # the last one is the mark of the end
        bytes(piece.ids.astype(np.uint8)).decode()  # no character lies in two pieces


def test_the_largest_id_counts_not_the_number_of_tokens(tmp_path):
    tokenizer = build_tokenizer(save_tokenizer(tmp_path, special={"<s>": 256, "</s>": 257, "<tool>": 400}))
    assert tokenizer.vocab_size == 401
    assert tokenizer.ids(b"a<tool>").tolist()[-1] == 400


def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path):
    model = save_tokenizer(tmp_path / "model")
    same = save_tokenizer(tmp_path / "same")
    check_of_model(model, build_tokenizer(model), model)
    check_of_model(same, build_tokenizer(same), model)
    check_of_model("bytes", build_tokenizer("bytes"), str(tmp_path))  # a folder without a tokenizer
    with pytest.raises(ConfigError, match=r"bytes is not the tokenizer of .*allow_other_tokenizer"):
        check_of_model("bytes", build_tokenizer("bytes"), model)
    build_tokenizer("bytes").save(str(tmp_path / "bytes"))
    check_of_model("bytes", build_tokenizer("bytes"), str(tmp_path / "bytes"))  # as an export of this package has it


def test_fingerprints_say_what_tokens_depend_on(tmp_path):
    plain, begins = (build_tokenizer(save_tokenizer(tmp_path / str(bos), bos=bos)) for bos in (False, True))
    again = build_tokenizer(save_tokenizer(tmp_path / "again"))
    assert plain.fingerprint == again.fingerprint != begins.fingerprint
    configs = [DataConfig(), DataConfig(add_eos=False), DataConfig(format="completion")]
    assert len({build_renderer(config, plain).fingerprint for config in configs}) == 3
