"""Tokenizers built from GGUF metadata against transformers' own, on ten thousand strings.

Where transformers' GGUF reading departs from the family's original tokenizer, the original is the oracle:
NFC for Qwen, whole words and a BOS without a flag for Llama 3, no space in front where the file says so, and no
`<|endoftext|>` added past the end of a Llama 3 vocabulary.
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import subprocess
import sys
import unicodedata

import gguf
import pytest
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from jora.errors import InputError
from jora.models.gguf import gguf_tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
CORPUS = [*list(pydoc_data.topics.topics.values())[:40], "café naïve Ünïcode 日本語 русский текст 12345 0.5 ﬁ" * 5]
BYTES = [f"<0x{number:02X}>" for number in range(256)]
SPACE = "\u2581"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write(path, vocabulary, architecture):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(4096)
    writer.add_block_count(1)
    for name, value in vocabulary.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def train(pre_tokenizer, alphabet=()):
    """Tokens and merges of a BPE learnt from Python's documentation."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=1500, show_progress=False, initial_alphabet=list(alphabet))
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


@pytest.fixture(scope="module")
def pieces():
    """SentencePiece-like pieces in merge order: learnt ones, then single characters."""
    learnt = train(pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first"))
    return [token for token in learnt if len(token) > 1], [token for token in learnt if len(token) == 1]


@pytest.fixture(scope="module")
def llama2(pieces):
    merged, single = pieces
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *merged, *single, "<think>", "[INST]"]
    ordinary = len(merged) + len(single)
    scores = [0.0] * 259 + [-float(rank) for rank in range(ordinary)] + [-1000.0] * 2
    return {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "token_list": tokens,
        "token_scores": scores,
        "token_types": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * ordinary, USER, CONTROL],
        "unk_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@pytest.fixture(scope="module")
def gemma(pieces):
    merged, single = pieces
    # runs of spaces and of line ends are user-defined in Gemma
    merged = [token for token in merged if set(token) != {SPACE} and "\n" not in token]
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<unused7>"]
    user = ["\n" * size for size in range(1, 32)] + [" " * size for size in range(2, 32)] + ["<h1>", "<table>"]
    single = [token for token in single if token != "\n"]
    tokens = [*control, *user, *BYTES, *merged, *single]
    ordinary = len(merged) + len(single)
    return {
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "token_list": tokens,
        # as the real file has it: user-defined tokens score -1000 and single characters come last
        "token_scores": [-1000.0] * (len(control) + len(user)) + [0.0] * 256 + [-float(i) for i in range(ordinary)],
        "token_types": [*[CONTROL] * len(control), *[USER] * len(user), *[BYTE] * 256, *[NORMAL] * ordinary],
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "unk_token_id": 3,
        "add_bos_token": True,
        "add_space_prefix": False,
        "chat_template": "{% for m in messages %}<start_of_turn>{{ m['content'] }}\n{% endfor %}",
    }


def byte_level(pre, specials, **settings):
    splits = pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "" if pre == "qwen2" else "{1,3}")), "isolated")
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splits, byte])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        "token_list": tokens + [token for token, _ in specials],
        "token_types": [NORMAL] * len(tokens) + [kind for _, kind in specials],
        "token_merges": merges,
        **{name: len(tokens) + place for name, place in settings.items()},
    }


@pytest.fixture(scope="module")
def llama3():
    specials = [("<|begin_of_text|>", CONTROL), ("<|end_of_text|>", CONTROL), ("<|eot_id|>", CONTROL)]
    return byte_level("llama-bpe", specials, bos_token_id=0, eos_token_id=1)


@pytest.fixture(scope="module")
def qwen():
    specials = [("<|endoftext|>", CONTROL), ("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL), ("<think>", USER)]
    return byte_level("qwen2", specials, eos_token_id=2, pad_token_id=0) | {"add_bos_token": False}


def both(path, vocabulary, architecture):
    write(path, vocabulary, architecture)
    return gguf_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def assert_same(ours, oracle, strings):
    found, expected = ours(strings)["input_ids"], oracle(strings)["input_ids"]
    for text, left, right in zip(strings, found, expected, strict=True):
        assert left == right, (text, ours.convert_ids_to_tokens(left), oracle.convert_ids_to_tokens(right))
    assert max(map(max, filter(None, found))) < len(ours)
    sample = found[::10]
    for skip in (False, True):
        assert ours.batch_decode(sample, skip_special_tokens=skip) == oracle.batch_decode(
            sample, skip_special_tokens=skip
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(oracle, name)
    assert ours.chat_template == oracle.chat_template


def test_llama2(tmp_path, llama2, strings):
    ours, oracle = both(tmp_path / "m.gguf", llama2, "llama")
    assert_same(ours, oracle, strings)
    assert len(ours) == len(llama2["token_list"])
    assert ours("Hello")["input_ids"][0] == 1  # no flag in the file: SentencePiece models take a BOS


def test_gemma(tmp_path, gemma, strings):
    ours, oracle = both(tmp_path / "m.gguf", gemma, "gemma3")
    assert_same(ours, oracle, strings)
    run = ours("a" + " " * 17 + "b", add_special_tokens=False)["input_ids"]
    assert ours.convert_ids_to_tokens(run)[1] == SPACE * 17
    assert ours.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<start_of_turn>x\n"


def test_llama3(tmp_path, llama3, strings):
    # every token of this vocabulary is reached by merges, and the flag is set: nothing to differ in
    ours, oracle = both(tmp_path / "m.gguf", llama3 | {"add_bos_token": True}, "llama")
    assert_same(ours, oracle, strings)
    assert len(ours) == len(llama3["token_list"])


def test_llama3_takes_whole_words_and_a_bos(tmp_path, llama3):
    # "Ġunmergeable" is a token that no merge makes: `ignore_merges` of the original tokenizer.json
    word = {"token_list": [*llama3["token_list"], "Ġunmergeable"], "token_types": [*llama3["token_types"], NORMAL]}
    ours = gguf_tokenizer(write(tmp_path / "m.gguf", llama3 | word, "llama"))
    assert ours(" unmergeable")["input_ids"] == [ours.bos_token_id, len(ours) - 1]


def test_qwen(tmp_path, qwen, strings):
    ours, oracle = both(tmp_path / "m.gguf", qwen, "qwen2")
    vocabulary = {token: number for number, token in enumerate(qwen["token_list"])}
    merges = [tuple(merge.split(" ")) for merge in qwen["token_merges"]]
    original = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token="<|im_end|>")
    original.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    original.add_tokens(["<think>"])
    assert ours(strings)["input_ids"] == original(strings)["input_ids"]
    assert_same(ours, oracle, [unicodedata.normalize("NFC", text) for text in strings])


@pytest.mark.parametrize("family", ["llama2", "gemma", "llama3", "qwen"])
def test_saved_tokenizer_is_the_same(tmp_path, request, strings, family):
    vocabulary = request.getfixturevalue(family)
    architecture, kind = {
        "llama2": ("llama", "llama"), "gemma": ("gemma3", "gemma3_text"), "llama3": ("llama", "llama"),
        "qwen": ("qwen2", "qwen2"),
    }[family]  # fmt: skip
    ours = gguf_tokenizer(write(tmp_path / "m.gguf", vocabulary, architecture))
    ours.save_pretrained(tmp_path / "hf")
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path / "hf")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert_same(ours, loaded, strings[:2000])


def test_reading_needs_no_torch(tmp_path, gemma):
    path = write(tmp_path / "m.gguf", gemma, "gemma3")
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from jora.models.gguf import GGUFSource, gguf_tokenizer\n"
        "print(gguf_tokenizer(sys.argv[1])('the')['input_ids'])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[2, ")


def test_no_space_in_front_where_the_file_says_so(tmp_path, llama2):
    ours = gguf_tokenizer(write(tmp_path / "m.gguf", llama2 | {"add_space_prefix": False}, "llama"))
    ids = ours("the", add_special_tokens=False)["input_ids"]
    assert not ours.convert_ids_to_tokens(ids)[0].startswith(SPACE)
    assert ours.decode(ours(" the", add_special_tokens=False)["input_ids"]) == " the"


def test_refusals_name_what_is_wrong(tmp_path, llama3, llama2):
    cases = [
        (llama3 | {"tokenizer_pre": "gpt-4o"}, "pre-tokenizer 'gpt-4o' is not supported; supported are llama-bpe"),
        (llama3 | {"tokenizer_model": "bert"}, "tokenizer model 'bert'"),
        (llama3 | {"token_merges": ["a b c"]}, "'a b c'"),
        (llama3 | {"token_merges": ["zz qq"]}, "'zz qq', which does not join"),
        (llama2 | {"bos_token_id": 10**6}, "bos_token_id is 1000000"),
        (llama2 | {"token_list": ["<s>", *llama2["token_list"][1:]]}, "'<s>' occurs twice"),
        (llama2 | {"token_scores": [0.0]}, "scores has 1 entries"),
    ]
    for number, (vocabulary, message) in enumerate(cases):
        path = write(tmp_path / f"{number}.gguf", vocabulary, "llama")
        with pytest.raises(InputError, match=message) as raised:
            gguf_tokenizer(path)
        assert "\n" not in str(raised.value)
