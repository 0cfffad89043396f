"""CLIP's tokenizer, from the files that checkpoints bring, as transformers' `CLIPTokenizer` reads texts.

Texts are brought to Unicode's form NFC, white space to single blanks, letters to lower case; they are split into runs
of letters, single digits and runs of other symbols, and these into tokens by byte-pair encoding of their UTF-8 bytes.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evodiff_jax.extras import require

_LENGTH = 77  # of CLIP's text encoders
_UNLIMITED = 10**6  # above it, a model_max_length says that none is known
_START, _END = "<|startoftext|>", "<|endoftext|>"
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_ROLES = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}  # with their defaults
_OPTIONS = ("lstrip", "rstrip", "single_word", "normalized")
_SHOWN = 3  # prompts in a warning


class Tokenizer(NamedTuple):
    """A tokenizer and its special tokens, from `load_tokenizer`.

    Attributes:
      encode: from a text to its tokens, without start and end.
      decode: from tokens to text.
      length: of the sequences that the text encoder takes, start and end included.
      start: the token that begins a sequence.
      end: the token that ends the text of one.
      pad: the token that fills it up.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    length: int
    start: int
    end: int
    pad: int


def tokenize(
    tokenizer: Tokenizer, prompts: Sequence[str], *, chunks: bool = False
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The tokens of prompts, each start, text, end, and padding up to the tokenizer's length L.

    Args:
      tokenizer: of `load_tokenizer`.
      prompts: N texts.
      chunks: divide prompts of more than L - 2 tokens into sequences of their own in place of cutting them.

    Returns:
      ids: int32, (N, L); with chunks (N, K, L), K being the number that the longest prompt needs and those beyond a
        prompt's end being empty texts.
      cut: for each prompt the part that was cut, as tokens have it, "" where nothing was. A warning says so too.

    Raises:
      TypeError: prompts is a single text, or holds something else.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts must be a list of texts, got {prompts!r}")
    room = tokenizer.length - 2
    texts = [tokenizer.encode(prompt) for prompt in prompts]
    count = max((-(-len(text) // room) for text in texts), default=1) if chunks else 1
    count = max(count, 1)
    ids = np.full((len(texts), count, tokenizer.length), tokenizer.pad, np.int32)
    ids[:, :, 0] = tokenizer.start
    for row, text in zip(ids, texts, strict=True):
        for i, sequence in enumerate(row):
            part = text[i * room : (i + 1) * room]
            sequence[1 : len(part) + 1] = part
            sequence[len(part) + 1] = tokenizer.end
    if chunks:
        return ids, ("",) * len(texts)
    cut = tuple(tokenizer.decode(text[room:]) if len(text) > room else "" for text in texts)
    if lost := [text for text in cut if text]:
        shown = ", ".join(repr(text) for text in lost[:_SHOWN]) + (", ..." if len(lost) > _SHOWN else "")
        warnings.warn(
            f"{len(lost)} of {len(cut)} prompts have more than {room} tokens and lost {shown}: shorten them, or ask "
            "for chunks",
            stacklevel=2,
        )
    return ids[:, 0], cut


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer of CLIP from the folder that transformers writes.

    Args:
      folder: with vocab.json and merges.txt, or else tokenizer.json, and, as far as they are there,
        special_tokens_map.json and tokenizer_config.json; the first of these two decides about special tokens.

    Raises:
      ModuleNotFoundError: the package `tokenizers` is not installed.
      FileNotFoundError: the folder or one of the files is missing.
      ValueError: a file is damaged, or a special token is not in the vocabulary.
    """
    require("tokenizers", extra="text")
    folder = Path(folder)
    settings = _read(folder / "tokenizer_config.json")
    special = {**settings, **_read(folder / "special_tokens_map.json")}
    roles = {role: _entry(special.get(role) or default) for role, default in _ROLES.items()}
    found = _from_files(folder, roles["unk_token"]["content"])
    length = settings.get("model_max_length", _LENGTH)
    if not isinstance(length, int | float) or length < 3:
        raise ValueError(f"{folder} has the model_max_length {length!r}, at least 3 is needed")
    _add(found, folder, settings, roles)
    start, end, pad = (found.token_to_id(roles[role]["content"]) for role in ("bos_token", "eos_token", "pad_token"))

    def encode(text: str) -> list[int]:
        return found.encode(text, add_special_tokens=False).ids

    def decode(tokens: Sequence[int]) -> str:
        return found.decode(list(tokens), skip_special_tokens=False).replace("</w>", " ").strip()

    return Tokenizer(encode, decode, _LENGTH if length > _UNLIMITED else int(length), start, end, pad)


def _from_files(folder: Path, unknown: str) -> Any:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    vocabulary, merges, whole = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    missing = [path.name for path in (vocabulary, merges) if not path.is_file()]
    try:
        if missing and whole.is_file():
            found = Fast.from_file(str(whole))
            found.no_truncation()
            found.no_padding()
            return found
        if missing:
            raise FileNotFoundError(f"{folder} holds no tokenizer of CLIP: {' and '.join(missing)} missing")
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs: list[Any] = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        if odd := [pair for pair in pairs if len(pair) != 2]:
            raise ValueError(f"merges.txt has the line {' '.join(odd[0])!r}, which are not two parts")
        model = models.BPE(
            vocab=_read(vocabulary),
            merges=pairs,
            unk_token=unknown,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    except OSError:
        raise
    except Exception as error:  # the package raises this class itself
        raise ValueError(f"{folder} holds a damaged tokenizer: {str(error).splitlines()[0]}") from error
    found = Fast(model)
    blanks = normalizers.Replace(Regex(r"\s+"), " ")
    found.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
    pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits again, as GPT-2 does
    found.pre_tokenizer = pre_tokenizers.Sequence([pieces, in_bytes])
    found.decoder = decoders.ByteLevel()
    return found


def _add(found: Any, folder: Path, settings: dict[str, Any], roles: dict[str, dict[str, Any]]) -> None:
    """Makes the special tokens known, which are recognised inside a text too, and those that were added."""
    from tokenizers import AddedToken

    added = {int(token): _entry(entry) for token, entry in settings.get("added_tokens_decoder", {}).items()}
    added |= {token: _entry(text) for text, token in _read(folder / "added_tokens.json").items()}
    for role, entry in roles.items():
        if found.token_to_id(entry["content"]) is None and entry not in added.values():
            raise ValueError(f"{folder} has the {role} {entry['content']!r}, which is not in its vocabulary")
    entries = {entry["content"]: entry for _, entry in sorted(added.items())}
    entries |= {entry["content"]: entry for entry in roles.values()}  # the last role of a text decides, pad_token
    for content, entry in entries.items():
        options = {name: entry[name] for name in _OPTIONS if name in entry}
        found.add_special_tokens([AddedToken(content, special=True, **options)])
    for token, entry in added.items():
        if found.token_to_id(entry["content"]) != token:
            raise ValueError(f"{folder} adds the token {entry['content']!r} as {token}, which is not the next one")


def _entry(value: Any) -> dict[str, Any]:
    """A special token with its options, which is given by its text alone or with them."""
    entry = value if isinstance(value, dict) else {"content": value, "normalized": False}
    if not isinstance(entry.get("content"), str):
        raise ValueError(f"a special token needs a text, got {value!r}")
    return entry


def _read(path: Path) -> dict[str, Any]:
    """The object of a JSON file, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: no object")
    return found
