"""The files of a tokenizer, checked before transformers opens them.

The library below transformers raises bare `Exception` for a file that it cannot read, without the file's
name; and transformers makes a vocabulary of two tokens where there is no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mingle.io.files import CheckpointError, contained, naming, read_json, refuse_lfs_pointer
from mingle.options import shown

#: of a ``tokenizer.json``: those of a quarter of a million tokens have half of either
MAX_BYTES, MAX_VALUES = 80_000_000, 4_000_000


def _plain(*kinds: str) -> dict[str, dict[str, Any]]:
    """Kinds that need no fields."""
    return {kind: {} for kind in kinds}


#: the parts of ``tokenizer.json`` → the kinds that exist of each, and the fields that a kind needs
_PARTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "normalizer": {
        "Sequence": {"normalizers": list},
        "BertNormalizer": {"clean_text": bool, "handle_chinese_chars": bool, "lowercase": bool},
        "Strip": {"strip_left": bool, "strip_right": bool},
        "Precompiled": {"precompiled_charsmap": str},
        "Replace": {"pattern": dict, "content": str},
        "Prepend": {"prepend": str},
        **_plain("StripAccents", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Nmt", "ByteLevel"),
    },
    "pre_tokenizer": {
        "Sequence": {"pretokenizers": list},
        "ByteLevel": {"add_prefix_space": bool, "trim_offsets": bool},
        "CharDelimiterSplit": {"delimiter": str},
        "Digits": {"individual_digits": bool},
        "Metaspace": {"replacement": str},
        "Split": {"pattern": dict, "behavior": str, "invert": bool},
        **_plain("BertPreTokenizer", "FixedLength", "Punctuation"),
        **_plain("UnicodeScripts", "Whitespace", "WhitespaceSplit"),
    },
    "post_processor": {
        "Sequence": {"processors": list},
        "BertProcessing": {"sep": list, "cls": list},
        "ByteLevel": {"add_prefix_space": bool, "trim_offsets": bool},
        "RobertaProcessing": {"sep": list, "cls": list, "trim_offsets": bool, "add_prefix_space": bool},
        "TemplateProcessing": {"single": list, "pair": list, "special_tokens": dict},
    },
    "decoder": {
        "Sequence": {"decoders": list},
        "BPEDecoder": {"suffix": str},
        "ByteLevel": {"add_prefix_space": bool, "trim_offsets": bool},
        "CTC": {"pad_token": str, "word_delimiter_token": str, "cleanup": bool},
        "Metaspace": {"replacement": str},
        "Replace": {"pattern": dict, "content": str},
        "Strip": {"content": str, "start": int, "stop": int},
        "WordPiece": {"prefix": str, "cleanup": bool},
        **_plain("ByteFallback", "Fuse"),
    },
}
_KEYS = {"version", "truncation", "padding", "added_tokens", "model", *_PARTS}
_TOKEN = {"id": int, "content": str} | dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized", "special"), bool
)
_TRUNCATION = {"max_length": int, "strategy": str, "stride": int}
_PADDING = {"strategy": (str, dict), "direction": str, "pad_id": int, "pad_type_id": int, "pad_token": str}
_OPTIONAL = {
    "dropout": (int, float),
    "unk_token": str,
    "continuing_subword_prefix": str,
    "end_of_word_suffix": str,
    "fuse_unk": bool,
    "byte_fallback": bool,
    "ignore_merges": bool,
}
_WORDS = {"unk_token": str}
_PIECES = _WORDS | {"continuing_subword_prefix": str, "max_input_chars_per_word": int}
#: settings beside the vocabulary, which transformers reads where they exist
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def check_tokenizer_files(folder: Path, *alternatives: Sequence[str]) -> list[Path]:
    """The files that hold a folder's vocabulary: the first of the alternatives that is there.

    Raises:
        CheckpointError: none of the alternatives is complete, or a file of the tokenizer is broken; the
            message names the file and what is wrong in it.
    """
    chosen = next((names for names in alternatives if all(_exists(folder / name) for name in names)), None)
    if chosen is None:
        expected = ", or ".join(" and ".join(names) for names in alternatives)
        raise CheckpointError(f"{folder}: no tokenizer ({expected})")
    paths = [contained(folder, name) for name in chosen]
    for name in _SETTINGS:
        if _exists(folder / name):
            _check_settings(contained(folder, name))
    for path in paths:
        if path.name == "tokenizer.json":
            _check_whole(path, read_json(path, max_bytes=MAX_BYTES, max_values=MAX_VALUES))
        elif path.name == "merges.txt":
            _check_merges(path, "it", _merge_lines(path), read_json(paths[0]), "")
        elif path.suffix == ".json":
            _check_vocabulary(path, "it", read_json(path))
        else:
            _content(path)
    return paths


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _refuse(path: Path, where: str, problem: str) -> NoReturn:
    raise CheckpointError(f"{path}: {where} {problem}")


def _require(path: Path, where: str, value: Any, kinds: Any) -> None:
    """Raise `CheckpointError` unless the value is of one of the kinds; truth values are not numbers."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        _refuse(path, where, f"is {shown(value)}, expected {expected}")


def _require_fields(path: Path, where: str, value: Any, fields: Mapping[str, Any]) -> None:
    _require(path, where, value, dict)
    for key, kinds in fields.items():
        if key not in value:
            _refuse(path, where, f"has no {key!r}")
        _require(path, f"{where}: {key}", value[key], kinds)


def _check_whole(path: Path, content: Any) -> None:
    """Check the content of a ``tokenizer.json``."""
    _require_fields(path, "it", content, {"model": dict, "added_tokens": list})
    unknown = [key for key in content if key not in _KEYS]
    if unknown:
        _refuse(path, "it", f"has an unknown key {unknown[0]!r}")
    if content.get("version", "1.0") != "1.0":
        _refuse(path, "version", f"is {content['version']!r}, expected '1.0'")
    for number, token in enumerate(content["added_tokens"]):
        _require_fields(path, f"added_tokens[{number}]", token, _TOKEN)
    for key, fields in (("truncation", _TRUNCATION), ("padding", _PADDING)):
        if content.get(key) is not None:
            _require_fields(path, key, content[key], fields)
    for part in _PARTS:
        if content.get(part) is not None:
            _check_part(path, part, content[part], part)
    _check_model(path, content["model"])


def _check_part(path: Path, where: str, value: Any, part: str) -> None:
    _require_fields(path, where, value, {"type": str})
    kind = value["type"]
    if kind not in _PARTS[part]:
        _refuse(path, f"{where}: type", f"is {kind!r}, expected one of {', '.join(_PARTS[part])}")
    _require_fields(path, where, value, _PARTS[part][kind])
    if kind == "Sequence":
        (inner,) = _PARTS[part][kind]
        for number, each in enumerate(value[inner]):
            _check_part(path, f"{where}[{number}]", each, part)


def _check_model(path: Path, model: Mapping[str, Any]) -> None:
    """Check vocabulary and merges; models of an early version have no type."""
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind == "Unigram":
        _check_pieces(path, model)
        return
    if kind not in ("BPE", "WordLevel", "WordPiece"):
        _refuse(path, "model: type", f"is {kind!r}, expected BPE, Unigram, WordLevel or WordPiece")
    vocabulary = model.get("vocab")
    _check_vocabulary(path, "model: vocab", vocabulary)
    assert isinstance(vocabulary, dict)
    if kind == "BPE":
        given = {key: kinds for key, kinds in _OPTIONAL.items() if model.get(key) is not None}
        _require_fields(path, "model", model, {"merges": list, **given})
        prefix = model.get("continuing_subword_prefix") or ""
        _check_merges(path, "model: merges", model["merges"], vocabulary, prefix)
    else:
        _require_fields(path, "model", model, _WORDS if kind == "WordLevel" else _PIECES)
    unknown = model.get("unk_token")
    if unknown is not None and unknown not in vocabulary:
        _refuse(path, "model: unk_token", f"is {unknown!r}, which is not in its vocabulary")


def _check_vocabulary(path: Path, where: str, vocabulary: Any) -> None:
    _require(path, where, vocabulary, dict)
    if not vocabulary:
        _refuse(path, where, "is empty")
    tokens: dict[int, str] = {}
    for token, number in vocabulary.items():
        _require(path, f"{where}: {token!r}", number, int)
        if not 0 <= number < 2**32:
            _refuse(path, f"{where}: {token!r}", f"is {number}, expected 0 or more")
        if number in tokens:
            _refuse(path, where, f"has the number {number} twice: {tokens[number]!r} and {token!r}")
        tokens[number] = token


def _check_merges(
    path: Path, where: str, merges: Sequence[Any], vocabulary: Mapping[str, int], prefix: str
) -> None:
    """Every merge joins two tokens, and all three are in the vocabulary."""
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            _refuse(path, f"{where}[{number}]", f"is {shown(merge)}, expected two tokens")
        for token in (*pair, pair[0] + pair[1].removeprefix(prefix)):
            if token not in vocabulary:
                _refuse(path, f"{where}[{number}]", f"needs {token!r}, which is not in the vocabulary")


def _check_pieces(path: Path, model: Mapping[str, Any]) -> None:
    """Check the vocabulary of a Unigram model: pairs of a piece and its score."""
    _require_fields(path, "model", model, {"vocab": list})
    pieces, unknown = model["vocab"], model.get("unk_id")
    if not pieces:
        _refuse(path, "model: vocab", "is empty")
    for number, piece in enumerate(pieces):
        pair = isinstance(piece, list) and len(piece) == 2 and isinstance(piece[0], str)
        if not pair or not isinstance(piece[1], int | float) or isinstance(piece[1], bool):
            _refuse(path, f"model: vocab[{number}]", f"is {shown(piece)}, expected a piece and its score")
    if unknown is not None:
        _require(path, "model: unk_id", unknown, int)
        if not 0 <= unknown < len(pieces):
            _refuse(path, "model: unk_id", f"is {unknown}, and there are {len(pieces)} pieces")


def _check_settings(path: Path) -> None:
    settings = read_json(path)
    _require(path, "it", settings, dict)
    length = settings.get("model_max_length")
    if length is not None:
        _require(path, "model_max_length", length, (int, float))
        if not length >= 1:
            _refuse(path, "model_max_length", f"is {length}, expected 1 or more")


def _merge_lines(path: Path) -> list[str]:
    try:
        lines = _content(path).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        _refuse(path, "it", f"is not UTF-8 text ({error.reason} at byte {error.start})")
    return [line for line in lines if not line.startswith("#version")]


def _content(path: Path) -> bytes:
    """The bytes of a file that is neither empty nor a Git LFS pointer."""
    with naming(path):
        content = path.read_bytes()
    if not content:
        _refuse(path, "it", "is empty")
    refuse_lfs_pointer(content, str(path))
    return content
