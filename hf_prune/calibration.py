"""Calibration: whatever the user has, as sequences of token ids.

A list of strings or chats, token ids, a DataLoader, a Dataset of `datasets` or torch, a DataFrame, a .txt, .jsonl or .parquet file, or
the name of a data set on the Hub. Padding is cut off here and never enters the model, so no statistic has to know of it.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging


logger = logging.get_logger(__name__)

_FILES = (".txt", ".jsonl", ".json", ".parquet")
_TEXTS = ("text", "content")
_CHATS = ("messages", "conversations")
_SHARE_GPT = {"human": "user", "gpt": "assistant"}  # its turns are {"from": "human", "value": "..."}
_ROWS = (list, tuple, numpy.ndarray)
_ROLES = ("user", "assistant", "system", "tool", *_SHARE_GPT)
_LONGEST_WORD = 50  # in characters; longer strings without a space are texts of languages that write none
_ONE_SEQUENCE = 10_000_000  # ids of one sequence that come one by one, perhaps without end
_PAPER_TRIES = 10_000
_CHARACTERS = 8  # a token, more than most have
_MARGIN = 4096  # tokens between those that are used of a long text and the place where it is cut
_TO_A_SPACE = re.compile(r".*\S(?=\s)", re.DOTALL)


def calibration_sequences(
    source: Any,
    tokenizer: Any = None,
    *,
    n_samples: int = 128,
    sequence_length: int = 2048,
    seed: int = 0,
    sampling: str = "packed",
    vocab_size: int | None = None,
) -> list[Tensor]:
    """`n_samples` sequences of ids, each int64 (length,), on the CPU.

    Text gives sequences of exactly `sequence_length`: documents are shuffled and joined, with the end-of-sequence token
    between them ("packed"), or one random window is taken of each document that is long enough ("paper", as in the code of
    arXiv 2306.11695). Ids are taken as they are, without padding, the first `n_samples` of them; with "paper" a random window of
    each that is longer.

    A processor stands for its tokenizer. Of an example with columns "text", "content", "messages" or "conversations" counts, or
    else the only one that is a string.

    Raises:
        ValueError: too little text, ids outside the vocabulary, an empty or unknown source; says how much there was.
        TypeError: something that is neither text nor ids.
    """
    if isinstance(source, str):
        source = _named(source, seed)
    elif isinstance(source, Path):
        source = _read_file(source)
    elif isinstance(source, (bytes, bytearray)):
        raise TypeError("calibration is bytes: give a list of texts, or token ids as a list, a tensor or an array.")
    elif hasattr(source, "columns") and hasattr(source, "to_dict"):  # a DataFrame
        source = _columns(source.columns, lambda index: source[source.columns[index]].to_list())
    elif hasattr(source, "column_names") and hasattr(source, "to_pydict"):  # a Table of pyarrow
        source = _columns(source.column_names, lambda index: source.column(index).to_pylist())
    if isinstance(source, Mapping) and any(hasattr(part, "column_names") for part in source.values()):  # a DatasetDict
        raise ValueError(f"calibration holds data sets by split: give one of {', '.join(source)}.")
    if isinstance(source, Mapping):  # columns
        source = next((source[key] for key in _TEXTS if isinstance(source.get(key), _ROWS)), source)
    if isinstance(source, Tensor) and source.dim() == 1:
        source = source[None]
    if isinstance(source, torch.utils.data.Dataset) and not isinstance(source, Iterable):
        source = map(source.__getitem__, range(len(source))) if hasattr(source, "__len__") else iter(source)
    items = iter(source) if isinstance(source, Iterable) and not isinstance(source, Mapping) else iter([source])
    try:
        first = next(items)
    except StopIteration:
        raise ValueError("the calibration data is empty: not one text or sequence was found in it.") from None
    items = itertools.chain([first], items)
    if _is_id(first):
        first = list(itertools.islice(items, _ONE_SEQUENCE))
        if wrong := [type(item).__name__ for item in first if not _is_id(item)]:
            raise TypeError(f"calibration has a {wrong[0]} among token ids: give one list of ids, or a list of such lists.")
        items = iter([first])
    if _is_ids(first):
        sequences = list(itertools.islice(_unpadded(items), n_samples))
        if sampling == "paper":
            rng = random.Random(seed)
            sequences = [ids[rng.randrange(max(1, len(ids) - sequence_length + 1)) :][:sequence_length] for ids in sequences]
        _check_ids(sequences, sequence_length, n_samples, vocab_size)
        return sequences
    if tokenizer is None:
        raise ValueError("calibration text needs a tokenizer: model.prune(config, calibration=texts, tokenizer=tokenizer).")
    tokenizer = tokenizer_of(tokenizer)
    documents = (text for item in items for text in _texts(item, tokenizer))
    take = _paper_windows if sampling == "paper" else _packed_windows
    sequences = take(documents, tokenizer, n_samples, sequence_length, random.Random(seed))
    _check_ids(sequences, sequence_length, n_samples, vocab_size)
    return sequences


def tokenizer_of(given: Any) -> Any:
    """`given`, or the tokenizer of a processor; None stays None.

    Raises:
        TypeError: a model, or something else that is no tokenizer.
    """
    inner = getattr(given, "tokenizer", None)
    if isinstance(inner, PreTrainedTokenizerBase) and not isinstance(given, PreTrainedTokenizerBase):
        return inner
    if given is not None and (isinstance(given, nn.Module) or not callable(given)):
        what = repr(given) if isinstance(given, str) else f"a {type(given).__name__}"
        raise TypeError(f"tokenizer must be such as AutoTokenizer.from_pretrained gives; got {what}.")
    return given


def positions_of(config: Any) -> int | None:
    """The longest sequence that a model of this config takes; None where it does not say."""
    text = config.get_text_config()
    known = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))  # the latter is MPT's
    return next((positions for positions in known if positions and positions > 0), None)  # XLNet's -1 is no bound


def batches_of(sequences: list[Tensor], tokens_per_batch: int) -> list[Tensor]:
    """The sequences as ids (sequences, length) of equal length each, at most about `tokens_per_batch` tokens a batch."""
    by_length: dict[int, list[Tensor]] = {}
    for ids in sequences:
        by_length.setdefault(len(ids), []).append(ids)
    batches = []
    for length, equal in by_length.items():
        batches += torch.stack(equal).split(int(max(1, tokens_per_batch // length)))
    return batches


def _named(source: str, seed: int) -> Iterable:
    path = Path(source)
    if path.suffix in _FILES or os.path.exists(source):  # where Path.exists() fails on a name of a text's length
        return _read_file(path)
    if any(character.isspace() for character in source) or not source:
        raise ValueError("calibration is one string: give a list of texts, a .txt, .jsonl or .parquet file, or a Hub data set.")
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    try:
        return load_dataset(name, configuration or None, split="train", streaming=True).shuffle(seed=seed, buffer_size=1000)
    except Exception as error:
        raise ValueError(f"calibration {source!r} is no file, nor a Hub data set with a train split: {error}") from error


def _read_file(path: Path) -> Iterable:
    if not os.path.isfile(path):
        raise ValueError(f"the calibration file {path} {'is a folder' if os.path.isdir(path) else 'does not exist'}.")
    if path.suffix == ".parquet":
        from datasets import Dataset

        return Dataset.from_parquet(str(path))
    if path.suffix == ".jsonl":
        return _json_lines(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the calibration file {path} is not text in UTF-8: {error}.") from error
    if not text.strip():
        raise ValueError(f"the calibration file {path} is empty.")
    return _from_json(text, path) if path.suffix == ".json" else [text]


def _json_lines(path: Path) -> Iterator:
    """The values in a file, one at a time. A JSON string may hold U+2028 and other characters that `splitlines` takes for ends."""
    found = 0
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _from_json(line, path, number)
                    found += 1
    except UnicodeDecodeError as error:
        raise ValueError(f"the calibration file {path} is not text in UTF-8: {error.reason}.") from error
    if not found:
        raise ValueError(f"the calibration file {path} is empty.")


def _from_json(text: str, path: Path, line: int = 1) -> Any:
    """The value of `text`, which begins in this line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the calibration {path} is not JSON in line {max(line, error.lineno)}: {error.msg}.") from error


def _columns(names: Iterable, values: Callable[[int], list]) -> dict[Any, list]:
    names = list(names)
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"the calibration table has {names.count(twice[0])} columns {twice[0]!r}: give one of them.")
    return {name: values(index) for index, name in enumerate(names)}


def _is_id(item: Any) -> bool:
    return isinstance(item, Integral) and not isinstance(item, bool)


def _is_ids(item: Any) -> bool:
    if isinstance(item, Mapping) or hasattr(item, "input_ids"):
        return "input_ids" in item
    if isinstance(item, (list, tuple)):
        return bool(item) and (_is_id(item[0]) or isinstance(item[0], (Tensor, numpy.ndarray)) and _is_ids(item[0]))
    return isinstance(item, Tensor) or isinstance(item, numpy.ndarray) and item.dtype.kind in "biuf"


def _unpadded(items: Iterable) -> Iterator[Tensor]:
    for item in items:
        mask = None
        if not isinstance(item, (Tensor, numpy.ndarray, list, tuple)):
            mask = item.get("attention_mask")
            item = item["input_ids"]
            several = isinstance(item, list) and len(item) > 1 and isinstance(item[0], Tensor)
            if several and len({row.shape for row in item}) == 1:  # torch's collate function makes lists a tensor per position
                raise ValueError(
                    f"input_ids is a list of {len(item)} tensors of one shape, by sequence or by position: give one (n, length)."
                )
        elif isinstance(item, (list, tuple)) and item:  # (inputs, targets) of a torch Dataset, [inputs, targets] of a loader
            if isinstance(item[0], Tensor) or isinstance(item, tuple) and isinstance(item[0], numpy.ndarray):
                item = item[0]
        if isinstance(item, (list, tuple)) and item and isinstance(item[0], (*_ROWS, Tensor)):  # perhaps of unequal length
            masks = [None] * len(item) if mask is None else mask
            rows = [{"input_ids": row, "attention_mask": kept} for row, kept in zip(item, masks, strict=True) if len(row)]
            yield from _unpadded(rows)
            continue
        ids = torch.as_tensor(item).cpu()
        if ids.is_floating_point() or ids.dim() not in (1, 2):
            raise ValueError(f"token ids must be whole numbers, (length,) or (n, length), got {tuple(ids.shape)} {ids.dtype}.")
        rows = ids.reshape(-1, ids.shape[-1]).long()
        keep = torch.ones_like(rows) if mask is None else torch.as_tensor(mask).cpu().reshape(rows.shape)
        for row, kept in zip(rows, keep):
            if len(row := row[kept.bool()]):
                yield row


def _texts(item: Any, tokenizer: Any, named: bool = False) -> Iterator[tuple[str, bool]]:
    """The texts of an example or a batch, each with whether a chat template has put its special tokens in already."""
    if isinstance(item, numpy.ndarray):
        item = item.tolist()
    if isinstance(item, str):
        yield item, False
    elif isinstance(item, Mapping):
        key = _text_column(item)
        yield from _texts(item[key], tokenizer, key in _TEXTS)
    elif not isinstance(item, (list, tuple)):
        raise TypeError(f"calibration must hold texts, chats or token ids, found a {type(item).__name__}.")
    elif item and isinstance(item[0], Mapping):
        yield tokenizer.apply_chat_template([_turn(turn) for turn in item], tokenize=False), True
    elif not named and _are_words(item):
        raise TypeError(
            f"calibration has a list that is no batch of texts: {str(item)[:60]}. Join words to a text; chats are lists of turns "
            "with 'role' and 'content'."
        )
    else:
        for part in item:
            yield from _texts(part, tokenizer, named)


def _text_column(item: Mapping) -> Any:
    """The key of the texts: a known name, or else of the only string, or of the only strings of a batch of a DataLoader."""
    if named := [key for key in (*_TEXTS, *_CHATS) if key in item]:
        return named[0]
    strings = [key for key, value in item.items() if isinstance(value, str)]
    rows = (isinstance(value, (*_ROWS, Tensor)) and getattr(value, "ndim", 1) for value in item.values())
    lengths = {len(value) if many else 0 for value, many in zip(item.values(), rows)}
    if not strings and len(lengths) == 1 and lengths != {0}:
        strings = [key for key, value in item.items() if isinstance(value[0], str)]
    if len(strings) == 1:
        return strings[0]
    raise TypeError(
        f"a calibration example has {len(strings) or 'no'} texts: its columns are {', '.join(map(str, item))}. Name the one that "
        f"counts {' or '.join(map(repr, _TEXTS))}, or chats {' or '.join(map(repr, _CHATS))}, or give a list of texts."
    )


def _are_words(strings: list | tuple) -> bool:
    """Whether those are the words of one text, or the role and the content of a turn, and not texts."""
    if not all(isinstance(string, str) for string in strings):
        return False
    words = [string for string in strings if string]
    some = len(words) > 1 and not any(len(word.split()) > 1 or len(word) > _LONGEST_WORD for word in words)
    return some or len(words) == 2 and words[0] in _ROLES


def _turn(turn: Mapping) -> Mapping:
    """A turn of a chat with the names that templates know; they take one without content for an empty one."""
    if "from" in turn and "value" in turn:
        turn = {"role": _SHARE_GPT.get(turn["from"], turn["from"]), "content": turn["value"]}
    if turn.get("content") is None and not turn.get("tool_calls"):
        raise ValueError(
            f"a turn of a calibration chat has no content: its keys are {', '.join(map(str, turn))}. Allowed are turns of "
            "'role' and 'content', or of 'from' and 'value'."
        )
    return turn


def _encode(tokenizer: Any, text: str, templated: bool) -> list[int]:
    special = {"add_special_tokens": False} if templated else {}
    return tokenizer(text, verbose=False, **special)["input_ids"]


def _encode_head(tokenizer: Any, text: str, templated: bool, most: int) -> list[int]:
    """The first `most` ids of `text` or more, all if it has fewer; of a long text only a head is encoded.

    The head ends before a space, and far behind those ids, so that they are the same as of the whole text.
    """
    size = _CHARACTERS * (most + _MARGIN)
    while size < len(text):
        if head := _TO_A_SPACE.match(text, 0, size):
            ids = _encode(tokenizer, head[0], templated)
            if len(ids) >= most + _MARGIN:
                return ids[:most]
        size *= 2
    return _encode(tokenizer, text, templated)


def _packed_windows(documents, tokenizer, n_samples: int, length: int, rng: random.Random) -> list[Tensor]:
    needed, stream, found = n_samples * length, [], 0
    pool: list[list[int]] = []
    ahead: list[tuple[str, bool]] = []
    while document := ahead.pop() if ahead else next(documents, None):
        most = max(needed, 4 * needed - found)  # so many fill the pool
        if len(document[0]) > _CHARACTERS * needed:
            ahead += itertools.islice(documents, 1)
            most = most if ahead else needed  # and no more are used of any document
        ids = _encode_head(tokenizer, *document, most)
        if tokenizer.eos_token_id is not None and ids and ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        pool.append(ids)
        found += len(ids)
        if found >= 4 * needed:  # an endless source: a pool of four times the need is shuffled
            break
    rng.shuffle(pool)
    for ids in pool:
        stream += ids
        if len(stream) >= needed:
            break
    if len(stream) < needed:
        raise ValueError(
            f"too little calibration text: {len(stream)} tokens in {len(pool)} documents, but {n_samples} sequences of {length} "
            f"need {needed}. Give more text, or a config with n_samples={max(1, len(stream) // length)}"
            + (f" and sequence_length={max(1, len(stream))}." if len(stream) < length else ".")
        )
    return list(torch.tensor(stream[:needed]).view(n_samples, length))


def _paper_windows(documents, tokenizer, n_samples: int, length: int, rng: random.Random) -> list[Tensor]:
    pool = [document for document in itertools.islice(documents, 100_000) if document[0]]
    encoded: dict[int, list[int]] = {}
    windows: list[Tensor] = []
    for _ in range(_PAPER_TRIES if pool else 0):
        index = rng.randrange(len(pool))
        if index not in encoded:
            ids = _encode(tokenizer, *pool[index])
            encoded[index] = ids if len(ids) > length else []
        if ids := encoded[index]:
            start = rng.randrange(len(ids) - length)
            windows.append(torch.tensor(ids[start : start + length]))
            if len(windows) == n_samples:
                return windows
    raise ValueError(
        f"sampling='paper' needs documents of more than {length} tokens: {_PAPER_TRIES} draws from {len(pool)} documents gave "
        f"{len(windows)} of {n_samples} sequences. Use sampling='packed' or a shorter sequence_length."
    )


def _check_ids(sequences: list[Tensor], length: int, n_samples: int, vocab_size: int | None) -> None:
    if not sequences:
        raise ValueError("the calibration data is empty: not one token was found in it.")
    if len(sequences) < n_samples:
        logger.warning(f"calibration has {len(sequences)} sequences, the config asks for n_samples={n_samples}: all are used.")
    longest = max(map(len, sequences))
    if longest > length:
        raise ValueError(f"a calibration sequence has {longest} tokens, more than sequence_length={length}: cut or raise it.")
    low, high = min(int(ids.min()) for ids in sequences), max(int(ids.max()) for ids in sequences)
    if vocab_size is not None and (low < 0 or high >= vocab_size):
        raise ValueError(f"calibration ids run from {low} to {high}, the vocabulary to {vocab_size - 1}: take its tokenizer.")
