"""CLIP's tokenizer against tokens of transformers, made with the vocabulary beside them."""

import importlib.util
import json
import shutil

import networks
import numpy as np
import pytest

from evodiff_jax.pretrained.text.tokenizer import load_tokenizer, tokenize

SOURCE = networks.DATA / "clip_tokenizer"
FACTS = json.loads((SOURCE / "cases.json").read_text())
START, END = FACTS["bos"], FACTS["eos"]
LONG = "painting, " * 60


def written(text):
    """A special token as old checkpoints write it."""
    return {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


NAMES = {"bos_token": written("<|startoftext|>"), "eos_token": written("<|endoftext|>")}


@pytest.fixture
def folder(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(SOURCE / name, tmp_path)
    return tmp_path


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("case", FACTS["cases"], ids=[case["prompt"][:20] for case in FACTS["cases"]])
@pytest.mark.filterwarnings("ignore:1 of 1 prompts")
def test_tokens_of_transformers(case):
    ids, cut = tokenize(load_tokenizer(SOURCE), [case["prompt"]])
    assert ids.dtype == np.int32
    expected = case["ids"] + [END] * (FACTS["max_length"] - len(case["ids"]))
    assert ids.tolist() == [expected]
    assert (cut == ("",)) == (case["prompt"] not in (LONG, "x" * 300))


def test_the_texts_that_were_cut_are_named():
    tokenizer = load_tokenizer(SOURCE)
    with pytest.warns(UserWarning, match=r"2 of 3 prompts have more than 75 tokens and lost '.*x'") as told:
        ids, cut = tokenize(tokenizer, [LONG, "a cat", "x" * 80])
    assert len(told) == 1
    assert told[0].filename == __file__
    assert ids.shape == (3, 77)
    assert (ids[:, 0] == START).all()
    assert ids[0, -1] == ids[2, -1] == END
    assert cut[0].split() == ([","] + ["painting", ","] * 22)
    assert cut[1:] == ("", "xxxxx")


def test_long_prompts_in_parts():
    tokenizer = load_tokenizer(SOURCE)
    prompts = [LONG, "a cat", "x" * 75, ""]
    ids, cut = tokenize(tokenizer, prompts, chunks=True)
    assert cut == ("",) * 4
    assert ids.shape == (4, 2, 77)
    assert ids.dtype == np.int32
    assert (ids[:, :, 0] == START).all()
    assert [*ids[0, 0, 1:-1], *ids[0, 1, 1:46]] == tokenizer.encode(LONG)
    np.testing.assert_array_equal(ids[0, 0, 76:], [END])
    np.testing.assert_array_equal(ids[0, 1, 46:], END)
    np.testing.assert_array_equal(ids[1:3, 0], tokenize(tokenizer, prompts[1:3])[0])
    np.testing.assert_array_equal(ids[1:, 1], tokenize(tokenizer, [""] * 3)[0])
    assert tokenize(tokenizer, ["a", "b"], chunks=True)[0].shape == (2, 1, 77)
    assert tokenize(tokenizer, [], chunks=True)[0].shape == (0, 1, 77)
    assert tokenize(tokenizer, [])[0].shape == (0, 77)


@pytest.mark.parametrize(
    ("settings", "special", "pad"),
    [
        ({}, None, END),
        ({"pad_token": "!"}, None, 0),
        ({"pad_token": "!"}, {"pad_token": "<|endoftext|>"}, END),
        ({"pad_token": "<|endoftext|>"}, {"pad_token": "!"}, 0),
        ({"pad_token": "<|endoftext|>"}, {"pad_token": written("!")}, 0),
        ({"pad_token": {"__type": "AddedToken", **written("!")}}, {}, 0),
    ],
)
def test_padding(folder, settings, special, pad):
    write(folder, "tokenizer_config.json", {**NAMES, **settings, "model_max_length": 12})
    if special is not None:
        write(folder, "special_tokens_map.json", {**NAMES, **special})
    tokenizer = load_tokenizer(folder)
    assert tokenizer[2:] == (12, START, END, pad)
    ids, _ = tokenize(tokenizer, ["a photo of a cat"])
    assert ids.tolist() == [[START, 320, 553, 515, 320, 66, 541, END, pad, pad, pad, pad]]


def test_the_padding_token_inside_a_text_is_one_as_in_transformers(folder):
    assert load_tokenizer(folder).encode("a cat!! x <|EndOfText|> y") == (
        [320, 66, 541, 0, 256, 343, 27, 347, 68, 77, 67, 78, 69, 83, 68, 87, 339, 91, 285, 344]
    )
    write(folder, "special_tokens_map.json", {**NAMES, "pad_token": "!", "unk_token": written("<|endoftext|>")})
    assert load_tokenizer(folder).encode("a cat!! x <|EndOfText|> y") == [320, 66, 541, 0, 0, 343, END, 344]


def test_names_of_special_tokens_in_capitals_are_split_off_as_in_transformers():
    first = [343, 27, 347, 68, 77, 67, 78, 69, 83, 68, 87, 339, 91, 285, 0, 256]
    second = [12, 27, 347, 82, 519, 81, 83, 78, 69, 83, 68, 87, 339, 91, 29, 268]
    assert load_tokenizer(SOURCE).encode("x <|EndOfText|>!! -<|startofText|>-") == first + second


def test_a_length_that_is_not_known_is_77(folder):
    write(folder, "tokenizer_config.json", {"model_max_length": 10**30})
    assert load_tokenizer(folder).length == 77
    write(folder, "tokenizer_config.json", {"model_max_length": 2})
    with pytest.raises(ValueError, match="has the model_max_length 2, at least 3 is needed"):
        load_tokenizer(folder)


def test_tokens_that_were_added(folder):
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": {"573": {**written("<toy>"), "special": True}}})
    assert load_tokenizer(folder).encode("a <TOY>!") == [320, 573, 256]
    write(folder, "tokenizer_config.json", {})
    write(folder, "added_tokens.json", {"<toy>": 573})
    assert load_tokenizer(folder).encode("a <toy>!") == [320, 573, 256]
    write(folder, "added_tokens.json", {"<toy>": 600})
    with pytest.raises(ValueError, match="adds the token '<toy>' as 600, which is not the next one"):
        load_tokenizer(folder)


def test_a_tokenizer_in_one_file(folder, tmp_path_factory):
    from tokenizers import Tokenizer, models

    vocabulary = json.loads((folder / "vocab.json").read_text())
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    whole.enable_truncation(4)
    whole.enable_padding(length=20)
    other = tmp_path_factory.mktemp("other")
    whole.save(str(other / "tokenizer.json"))
    tokenizer = load_tokenizer(other)
    assert tokenizer[2:] == (77, START, END, END)
    assert tokenizer.encode("photo</w>") == [553]
    whole.save(str(folder / "tokenizer.json"))  # the other two files come first
    assert load_tokenizer(folder).encode("a photo") == [320, 553]


def test_files_that_are_missing_or_damaged(folder):
    (folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{folder} holds no tokenizer of CLIP: merges\.txt missing"):
        load_tokenizer(folder)
    with pytest.raises(FileNotFoundError, match=r"of CLIP: vocab\.json and merges\.txt missing"):
        load_tokenizer(folder / "none")
    for name, content, message in (
        (
            "merges.txt",
            "#version: 0.2\nt h\nt\n",
            r"damaged tokenizer: merges\.txt has the line 't', which are not two",
        ),
        ("merges.txt", "t 語\n", "holds a damaged tokenizer: .*語"),
        ("vocab.json", "[1, 2]", r"vocab\.json is damaged: no object"),
        ("vocab.json", '{"a": 1', r"vocab\.json is damaged: Expecting ',' delimiter"),
        ("vocab.json", {"a": "b"}, "holds a damaged tokenizer: "),
        ("vocab.json", {"a": 0}, "has the bos_token '<|startoftext|>', which is not in its vocabulary"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is damaged: Expecting property name"),
        ("tokenizer_config.json", {"pad_token": {"normalized": True}}, "a special token needs a text, got {'norm"),
        ("tokenizer_config.json", {"pad_token": "[PAD]"}, r"has the pad_token '\[PAD\]', which is not in its vocab"),
    ):
        shutil.copy(SOURCE / "vocab.json", folder)
        write(folder, "merges.txt", "#version: 0.2\n")
        write(folder, name, content)
        with pytest.raises(ValueError, match=message) as raised:
            load_tokenizer(folder)
        assert "\n" not in str(raised.value)


def test_the_package_is_asked_for_when_it_is_needed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"tokenizers is not installed .*: pip install 'evodiff-jax\[text\]'"):
        load_tokenizer(SOURCE)


def test_a_single_text_is_no_list_of_texts():
    tokenizer = load_tokenizer(SOURCE)
    for prompts in ("a cat", ["a", 1]):
        with pytest.raises(TypeError, match="prompts must be a list of texts, got"):
            tokenize(tokenizer, prompts)
