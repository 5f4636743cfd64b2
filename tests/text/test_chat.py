"""Conversations through chat templates: messages, keywords, system messages, thoughts that a template opens."""

import inspect

import pytest
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from lychee_jax.errors import UserError
from lychee_jax.text.chat import RESERVED, ChatOptions, check_messages, make_chat_options, parse_messages
from lychee_jax.text.prompts import encode_prompts
from lychee_jax.text.tokenizer import Tokenizer
from tests.support import tiny_tokenizers

USER = {"role": "user", "content": "is"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("chat_ml")
    template = tiny_tokenizers.THINKING_TEMPLATE
    found = Tokenizer.from_folder(
        tiny_tokenizers.write_tokenizer(folder, tiny_tokenizers.chat_ml(), chat_template=template)
    )
    assert found is not None
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Tokenizer:
    """With a BOS of the tokenizer's and one of the template's."""
    folder = tmp_path_factory.mktemp("llama")
    template = tiny_tokenizers.CHAT_TEMPLATE
    found = Tokenizer.from_folder(
        tiny_tokenizers.write_tokenizer(folder, tiny_tokenizers.llama2(), chat_template=template)
    )
    assert found is not None
    return found


def written(tokenizer, ids):
    """A text with its special tokens."""
    return "".join(map(tokenizer.token_text, ids))


def test_keywords_reach_the_template(tokenizer):
    thinking = written(tokenizer, tokenizer.encode_messages([USER]))
    assert thinking == "<|im_start|>user\nis<|im_end|>\n<|im_start|>assistant\n<think>\n"
    silent = written(tokenizer, tokenizer.encode_messages([USER], {"enable_thinking": False}))
    assert silent == thinking + "\n</think>\n\n"


def test_an_answer_that_has_begun_is_no_thought(tokenizer):
    begun = tokenizer.encode_messages([USER], answer=" Answer: the")
    assert begun == tokenizer.encode_messages([USER], {"enable_thinking": False}, answer=" Answer: the")
    assert written(tokenizer, begun).endswith("<think>\n\n</think>\n\n Answer: the")


def test_a_template_that_opens_no_thoughts_is_left_as_it_is(llama):
    assert llama.decode(llama.encode_messages([USER], answer="no")) == "user is assistant no"


def test_system_messages_and_turns_stand_in_front(tokenizer):
    turns = [USER, {"role": "assistant", "content": "no"}]
    options = make_chat_options(chat=False, system="stop", messages=turns)
    assert options is not None
    conversation = options.conversation("the dog")
    assert [message["role"] for message in conversation] == ["system", "user", "assistant", "user"]
    ids = encode_prompts(tokenizer, "the dog", chat=True, system="stop")
    assert ids == encode_prompts(
        tokenizer, messages=[{"role": "system", "content": "stop"}, {"role": "user", "content": "the dog"}]
    )
    assert written(tokenizer, ids[0]).startswith("<|im_start|>system\nstop<|im_end|>\n<|im_start|>user\nthe dog")
    assert encode_prompts(tokenizer, messages=[conversation, [USER]]) == [
        tokenizer.encode_messages(conversation), tokenizer.encode_messages([USER])
    ]  # fmt: skip


def test_a_chat_has_the_templates_bos_alone(llama):
    assert llama.encode("is")[0] == 1
    (ids,) = encode_prompts(llama, messages=[USER])
    assert (ids[0], ids.count(1)) == (1, 1)


def test_contents_may_be_parts_of_text(tokenizer):
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "dog"}]
    assert check_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "the\ndog"}]
    wanted = tokenizer.encode_messages("the\ndog")
    assert tokenizer.encode_messages([{"role": "user", "content": parts}]) == wanted


@pytest.mark.parametrize(
    ("messages", "culprit"),
    [
        ([], "at least one"),
        ("hello", "must be a list"),
        (USER, "must be a list"),
        ([USER, "hello"], "message 1 is 'hello'"),
        ([{"content": "a"}], "message 0 has role None"),
        ([{"role": 3, "content": "a"}], "message 0 has role 3"),
        ([{"role": "user"}], "message 0 has content None"),
        ([{"role": "user", "content": 7}], "message 0 has content 7"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "message 0 has a part .*image_url"),
        ([{"role": "user", "content": ["a"]}], "message 0 has a part 'a'"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_messages_that_no_template_takes_are_refused_by_number(tokenizer, messages, culprit):
    with pytest.raises(UserError, match=culprit):
        check_messages(messages)
    with pytest.raises(UserError):
        encode_prompts(tokenizer, messages=messages)


def test_messages_of_a_file(tokenizer):
    assert parse_messages('\ufeff[{"role": "user", "content": "is"}]', "F") == [USER]
    with pytest.raises(UserError, match=r"F: message 0 has role"):
        parse_messages("[{}]", "F")
    with pytest.raises(UserError, match="F is not valid JSON"):
        parse_messages("[", "F")


def test_reserved_keywords_cover_transformers_own():
    own = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    own |= set(inspect.signature(chat_template_utils.render_jinja_template).parameters)
    assert own | set(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES) <= RESERVED


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "tokenize", "chat_template", "bos_token", "conversation"]
)
def test_keywords_that_are_not_the_users_are_refused_by_name(tokenizer, name):
    with pytest.raises(UserError, match=repr(name)):
        ChatOptions(template_kwargs={name: "x"})
    with pytest.raises(UserError, match=repr(name)):
        tokenizer.encode_messages([USER], {name: "x"})


@pytest.mark.usefixtures("without_type_checks")
def test_keywords_are_names_with_values():
    for bad in ([1], "enable_thinking", {1: 2}):
        with pytest.raises(UserError, match="template keywords"):
            ChatOptions(template_kwargs=bad)  # pyright: ignore[reportArgumentType]


def test_chat_arguments_without_a_chat_or_twice_are_refused(tokenizer):
    with pytest.raises(UserError, match="system message without a chat"):
        encode_prompts(tokenizer, "a", system="s")
    with pytest.raises(UserError, match="template keywords without a chat"):
        encode_prompts(tokenizer, "a", template_kwargs={})
    with pytest.raises(UserError, match="two system messages"):
        encode_prompts(tokenizer, system="s", messages=[{"role": "system", "content": "t"}, USER])
    with pytest.raises(UserError, match="not both"):
        encode_prompts(tokenizer, "a", messages=[USER])
    with pytest.raises(UserError, match="no prompt"):
        encode_prompts(tokenizer)
    with pytest.raises(UserError, match="ids are used as they are"):
        encode_prompts(tokenizer, [1, 2], chat=True)
    with pytest.raises(UserError, match="the model has no tokenizer"):
        encode_prompts(None, messages=[USER])
