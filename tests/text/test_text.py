"""Tokenizers, streamed text and stop strings, on small tokenizers of every kind that the model families bring."""

import codecs
import logging
import subprocess
import sys

import pytest
import tokenizers as tokenizers_library
from hypothesis import given, settings
from hypothesis import strategies as st

from lychee_jax.errors import UserError
from lychee_jax.text.streaming import StopStrings, StreamDecoder, TextStream, text_of
from lychee_jax.text.tokenizer import Tokenizer
from tests.support import tiny_tokenizers

KINDS = {
    "byte_level": tiny_tokenizers.byte_level,
    "chat_ml": tiny_tokenizers.chat_ml,
    "llama2": tiny_tokenizers.llama2,
    "metaspace": tiny_tokenizers.metaspace,
    "words": tiny_tokenizers.words,
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    def load(kind, template):
        folder = tiny_tokenizers.write_tokenizer(tmp_path_factory.mktemp(kind), KINDS[kind](), chat_template=template)
        return Tokenizer.from_folder(folder)

    return {kind: load(kind, tiny_tokenizers.CHAT_TEMPLATE if kind != "words" else None) for kind in KINDS}


def streamed(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(index) for index in ids), decoder.flush()]


TEXT = st.text(alphabet=st.one_of(st.sampled_from("the dog is→✓ é😀日"), st.characters(exclude_categories=("Cs",))))


@settings(max_examples=150, deadline=None)
@given(text=TEXT, kind=st.sampled_from(["byte_level", "llama2"]))
def test_any_text_comes_back_and_streams_to_the_same(tokenizers, text, kind):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces) or "\N{REPLACEMENT CHARACTER}" in text


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["byte_level", "words"]))
def test_any_ids_stream_to_what_they_decode_to(tokenizers, data, kind):
    """Also broken UTF-8, special tokens, and ids that the tokenizer lacks."""
    tokenizer = tokenizers[kind]
    size = len(tokenizer._backend)
    ids = data.draw(st.lists(st.integers(0, size + 5), max_size=30))
    library = tokenizer._backend.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == library


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["llama2", "metaspace"]))
def test_byte_fallback_streams_to_what_it_decodes_to(tokenizers, data, kind):
    """Tokens in any order, among them whole characters as bytes; special tokens between them do not show."""
    tokenizer = tokenizers[kind]
    size = len(tokenizer._backend)
    characters = st.sampled_from("é😀日\n a").map(lambda char: [3 + byte for byte in char.encode()])
    others = st.one_of(st.integers(0, 2), st.integers(259, size + 5)).map(lambda index: [index])
    ids = [index for part in data.draw(st.lists(st.one_of(characters, others), max_size=20)) for index in part]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["llama2", "metaspace"]))
def test_broken_bytes_never_swallow_text(tokenizers, data, kind):
    """Bytes that begin or continue letters (3 + 128 and up), in any order, between whole tokens."""
    tokenizer = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(3 + 128, len(tokenizer._backend) - 1), max_size=20))
    text = "".join(streamed(tokenizer, ids))
    letters = [char for char in tokenizer.decode(ids) if char.isalpha() and char.isascii()]
    assert [char for char in text if char.isalpha() and char.isascii()] == letters


def test_a_letter_appears_with_its_last_byte(tokenizers):
    emoji = [3 + byte for byte in "é😀".encode()]
    assert streamed(tokenizers["llama2"], emoji) == ["", "é", "", "", "", "😀", ""]
    # é was shown before the bytes after it proved broken; they become one U+FFFD
    assert streamed(tokenizers["llama2"], emoji[:4]) == ["", "é", "", "", "\N{REPLACEMENT CHARACTER}"]
    tokenizer = tokenizers["byte_level"]
    joined = tokenizer.encode("aé")[1:]
    assert len(joined) == 2
    assert streamed(tokenizer, joined) == ["a", "é", ""]


def test_the_first_space_goes_and_all_others_stay(tokenizers):
    for kind in ("llama2", "metaspace"):
        tokenizer = tokenizers[kind]
        the, space = tokenizer.encode("the")[-1], 259
        assert streamed(tokenizer, [the, the, space, the]) == ["the", " the", " ", " the", ""]
        assert streamed(tokenizer, [1, the, 1, the]) == ["", "the", "", " the", ""]
        assert streamed(tokenizer, [space, the]) == ["", " the", ""]
    assert streamed(tokenizers["words"], [1, 2, 3]) == ["a", " b", " c", ""]


def test_special_tokens_are_silent_and_added_ones_are_not(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("the<think>→✓</s>dog")
    assert len(ids) == 6
    assert tokenizer.decode(ids) == "".join(streamed(tokenizer, ids)) == "the<think>→✓dog"


@pytest.mark.parametrize("label", ["PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer"])
@pytest.mark.parametrize("kind", ["byte_level", "llama2", "metaspace"])
def test_ids_are_those_of_the_file_whatever_class_it_is_labelled_with(tmp_path, kind, label):
    folder = tiny_tokenizers.write_tokenizer(tmp_path, KINDS[kind](), tokenizer_class=label)
    tokenizer, file = (
        Tokenizer.from_folder(folder),
        tokenizers_library.Tokenizer.from_file(str(folder / "tokenizer.json")),
    )
    assert tokenizer is not None
    for text in ("hi", " hi", "the dog", "hi</s>there", "<s>[no] q", "<s> is", "", " ", "a\nb", "é  the", "<think>no"):
        assert tokenizer.encode(text) == file.encode(text).ids
        plain = file.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode_plain(text) == plain
        assert tokenizer.decode(plain) == file.decode(plain)


def test_added_tokens_beyond_ascii_are_written_as_they_are(tmp_path):
    """The letters of byte-level names are not their bytes: "õ" is no byte 0xF5."""
    known, words = tiny_tokenizers.byte_level(), ["õ", "Straße", "č", "ġ", "naïve", "ð"]
    known.add_tokens(words)
    tokenizer = Tokenizer.from_folder(tiny_tokenizers.write_tokenizer(tmp_path, known))
    assert tokenizer is not None
    for word in words:
        ids = tokenizer.encode_plain(f"the {word} dog")
        assert known.token_to_id(word) in ids
        assert tokenizer.decode(ids) == "".join(streamed(tokenizer, ids)) == f"the {word} dog"
        assert word in map(tokenizer.token_text, ids)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_byte_order_marks_of_a_tokenizers_files_are_dropped(tmp_path, name):
    template = tiny_tokenizers.CHAT_TEMPLATE
    folder = tiny_tokenizers.write_tokenizer(tmp_path, tiny_tokenizers.byte_level(), chat_template=template)
    if name.endswith("jinja"):
        (folder / name).write_text(template)
    plain = Tokenizer.from_folder(folder)
    (folder / name).write_bytes(codecs.BOM_UTF8 + (folder / name).read_bytes())
    marked = Tokenizer.from_folder(folder)
    assert plain is not None
    assert marked is not None
    assert marked.encode("the dog") == plain.encode("the dog")
    assert marked.encode_messages("the dog") == plain.encode_messages("the dog")


def test_encode_is_the_tokenizers_default_and_long_texts_are_not_cut(tokenizers):
    for kind, begin in (("byte_level", 0), ("llama2", 1)):
        ids = tokenizers[kind].encode("the dog " * 50)
        assert ids[0] == begin
        assert len(ids) > 100  # the folder's model_max_length is 16
    assert tokenizers["words"].encode("a b c") == [1, 2, 3]


def test_chat_writes_one_bos_and_opens_the_answer(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode_messages("the dog")
    assert ids.count(0) == 1
    assert ids[0] == 0
    assert tokenizer.decode(ids) == "user the dog assistant "
    turns = [
        {"role": "user", "content": "is"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "stop"},
    ]
    assert tokenizer.decode(tokenizer.encode_messages(turns)) == "user is assistant no user stop assistant "


def test_chat_without_template_or_against_it_is_refused(tokenizers):
    with pytest.raises(UserError, match="no chat template"):
        tokenizers["words"].encode_messages("a")
    with pytest.raises(UserError, match="only user and assistant speak here"):
        tokenizers["llama2"].encode_messages([{"role": "system", "content": "a"}])


def test_text_that_is_no_unicode_is_refused(tokenizers):
    with pytest.raises(UserError, match=r"not valid Unicode: .* character 3"):
        tokenizers["byte_level"].encode("abc\udc80")


def test_a_folder_without_tokenizer_and_one_with_a_broken_one(tmp_path):
    assert Tokenizer.from_folder(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{]")
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_loading_is_quiet_and_leaves_logging_as_it_was(tmp_path):
    folder = tiny_tokenizers.write_tokenizer(tmp_path, tiny_tokenizers.llama2())
    program = (
        "import sys; from lychee_jax.text.tokenizer import Tokenizer; assert 'transformers' not in sys.modules\n"
        f"tokenizer = Tokenizer.from_folder({str(folder)!r})\n"
        "print(tokenizer.decode(tokenizer.encode('the dog'))); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the dog\nFalse\n", "")
    Tokenizer.from_folder(folder)
    assert logging.root.manager.disable == logging.NOTSET


def chat_ml(tokenizers, text):
    return tokenizers["chat_ml"].encode_plain(text)


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("the dog<|im_end|> is", ["<|im_end|>"], "the dog"),
        ("the dog<|im_end|>\nuser is", ["<|im_end|>\n"], "the dog"),
        ("the dog<|im_end|> is", ["<|im_end|>\n"], "the dog is"),
        ("the dog<|im_end|> is", ["dog<|im_end|>"], "the "),
        ("the dog</s><|im_end|> is", ["</s><|im_end|>"], "the dog"),
        ("the dog<|im_end|>no", ["dogno"], "the "),  # what does not show is not between
        ("the dog<|im_end|>", ["<|im_start|>"], "the dog"),
        ("the<|im_end|> dog", ["og", "<|im_end|>"], "the"),
        ("the<|im_end|> dog", ["he", "<|im_end|>"], "t"),
        ("the<|eot|> dog", ["<|eot|>"], "the"),
    ],
)
def test_special_tokens_are_stops_by_their_names(tokenizers, text, stops, shown):
    ids = chat_ml(tokenizers, text)
    row = TextStream(tokenizers["chat_ml"], stops)
    pieces = [row.push(index) for index in ids]
    pieces.append(row.finish())
    assert "".join(pieces) == row.text == shown
    assert row.stopped == (text.replace("<|im_end|>", "").replace("</s>", "") != shown)
    assert text_of(tokenizers["chat_ml"], ids, stops=stops) == shown


def test_a_stop_that_is_spelled_out_counts_too(tokenizers):
    tokenizer = tokenizers["chat_ml"]
    ids = [index for char in "the <|im_end|> dog" for index in tokenizer.encode_plain(char)]
    assert text_of(tokenizer, ids, stops="<|im_end|>") == "the "


@settings(max_examples=150, deadline=None)
@given(
    words=st.lists(st.sampled_from(["the", "dog", "<|im_end|>", "</s>", "<|eot|>", "é", " "]), max_size=12),
    stops=st.lists(
        st.lists(st.sampled_from(["a", "g", "th", "é", "<|im_end|>", "</s>"]), min_size=1, max_size=3).map("".join),
        max_size=3,
    ),
)
def test_stops_with_special_tokens_agree_with_a_search_in_the_whole_text(tokenizers, words, stops):
    """A stop with a special token is looked for among all characters, any other in what shows."""
    tokenizer, special = tokenizers["chat_ml"], ("<|im_end|>", "</s>")
    full = [(char, word not in special) for word in words for char in word]
    shown, hit = [], False
    for end in range(1, len(full) + 1):
        starts = []
        for stop in stops:
            where = range(end) if any(name in stop for name in special) else [i for i in range(end) if full[i][1]]
            tail = list(where)[-len(stop) :]
            if "".join(full[i][0] for i in tail) == stop and tail[-1] == end - 1:
                starts.append(tail[0])
        if starts:
            hit, full = True, full[: min(starts)]
            break
    shown = "".join(char for char, visible in full if visible)
    row = TextStream(tokenizer, stops)
    pieces = [row.push(index) for word in words for index in tokenizer.encode_plain(word)]
    assert ("".join([*pieces, row.finish()]), row.stopped) == (shown, hit)


def test_the_token_that_ends_a_row_is_never_text(tokenizers):
    tokenizer = tokenizers["chat_ml"]
    ids = chat_ml(tokenizers, "the dog<|eot|>no")
    eot = chat_ml(tokenizers, "<|eot|>")[0]
    assert text_of(tokenizer, ids) == "the dog<|eot|>no"  # --ignore-eos: it ended nothing
    row = TextStream(tokenizer, (), [eot])
    pieces = [row.push(index) for index in ids]
    assert row.stopped
    assert "".join(pieces) + row.finish() == row.text == "the dog"
    # What was held back for a stop that does not come appears all the same, and a stop may end in the eos.
    assert text_of(tokenizer, ids, stops=["dog!"], eos_ids=[eot]) == "the dog"
    assert text_of(tokenizer, ids, stops=["dog<|eot|>"], eos_ids=[eot]) == "the "
    # Half a character in front of it is told.
    half = tokenizer.encode_plain("é")[:1]
    assert text_of(tokenizer, [*half, eot], eos_ids=[eot]) == "\N{REPLACEMENT CHARACTER}"


def naive_stop(text, stops):
    """Text before the stop string that is complete first (the longest of several), read letter by letter."""
    for end in range(1, len(text) + 1):
        ends = [stop for stop in stops if text[:end].endswith(stop)]
        if ends:
            return text[: end - len(max(ends, key=len))], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("abé", max_size=4), max_size=12),
    stops=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_do_not_depend_on_the_pieces(pieces, stops):
    stream = StopStrings(stops)
    out, text = [], ""
    for piece in pieces:
        out.append(stream.push(piece))
        text += piece
        wanted, hit = naive_stop(text, stops)
        assert stream.hit == hit
        assert wanted.startswith("".join(out))
        if hit:
            assert "".join(out) == wanted
        else:  # nothing is held back without need
            held = text[len("".join(out)) :]
            assert held == "" or any(stop.startswith(held) for stop in stops)
    assert "".join(out) + stream.flush() == naive_stop(text, stops)[0]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="must not be empty"):
        StopStrings(["a", ""])


def test_one_text_is_one_stop_string():
    for stops, shown in (("Az", "a A b "), (["A", "z"], "a "), (None, "a A b Az c")):
        stream = StopStrings(stops)
        assert stream.push("a A b Az c") + stream.flush() == shown


def test_a_row_of_text_ends_at_its_stop_string(tokenizers):
    tokenizer = tokenizers["llama2"]
    ids = tokenizer.encode("the dog is é. no")[1:]
    row = TextStream(tokenizer, ["is é", "never"])
    pieces = []
    for index in ids:
        pieces.append(row.push(index))
        if row.stopped:
            break
    assert row.stopped
    assert "".join(pieces) + row.finish() == row.text == "the dog "
    row = TextStream(tokenizer, ["gone"])
    assert "".join([*map(row.push, tokenizer.encode("the dog")[1:]), row.finish()]) == row.text == "the dog"
    assert not row.stopped


def test_a_tokenizer_is_told_from_others_by_what_it_does_and_not_by_its_template(tmp_path):
    made = [
        tiny_tokenizers.write_tokenizer(tmp_path / "plain", tiny_tokenizers.byte_level()),
        tiny_tokenizers.write_tokenizer(
            tmp_path / "chat", tiny_tokenizers.byte_level(), chat_template="{{ messages }}"
        ),
        tiny_tokenizers.write_tokenizer(tmp_path / "other", tiny_tokenizers.chat_ml()),
    ]
    plain, chat, other = (Tokenizer.from_folder(folder) for folder in made)
    assert plain is not None
    assert chat is not None
    assert other is not None
    before = plain.digest()
    plain.encode("the dog")
    assert plain.digest() == chat.digest() == before != other.digest()
    assert (plain.chat_template, chat.chat_template) == (None, "{{ messages }}")
    assert plain.prefix_ids == plain.encode("")
