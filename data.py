# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "tiktoken==0.14.0"]
# ///
"""Instruction data: read records, write prompts, tokenize, batch.

A record becomes prompt ids + response ids + the end token. Prompt and response are tokenized
apart: the border between them is exact, and the prompt in training is, byte for byte, the prompt in
generation. Text never becomes a control token: `<|endoftext|>` in a record, and the markers of the
phi3 and chatml templates whatever the tokenizer, are ordinary text. Code alone adds the end token.

Checked against transformers' GPT-2 tokenizer (ids, and files in both directions) and against the
batches of "Build a Large Language Model (From Scratch)", chapter 7 (tests/test_data.py).

    python data.py --data tiny --model tiny     # lengths, truncation, padding, one example
    python data.py --data book --model gpt2     # the book's records, downloaded the first time
"""

import argparse
import base64
import hashlib
import http.client
import json
import os
import random
import re
import sys
import urllib.request
import warnings
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch without numpy says so
import tiktoken
import torch
from torch import Tensor

TINY = Path(__file__).parent / "tiny"  # what the name `tiny` means
IGNORE_INDEX = -100  # cross_entropy's own default: a target without a loss
END_OF_TEXT = "<|endoftext|>"
TEMPLATES = {  # before the input, its part (left out where there is no input), after it
    "alpaca": ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
               "### Instruction:\n{instruction}\n\n", "### Input:\n{input}\n\n", "### Response:\n"),
    "phi3": ("<|user|>\n{instruction}", "\n{input}", "\n<|assistant|>:\n"),
    "chatml": ("<|im_start|>user\n{instruction}", "\n{input}", "<|im_end|>\n<|im_start|>assistant\n"),
    "plain": ("{instruction}", "\n{input}", "\n"),
}
FORMS = (("instruction", "output"), ("prompt", "completion"), ("question", "answer"), ("messages",), ("conversations",))
NOT_JSON = {  # how files begin that are often mistaken for data
    b"\x1f\x8b": "compressed with gzip; run gunzip on it",
    b"version https://git-lfs": "a git-lfs pointer; run git lfs pull to get the data",
    b"<": "a web page; download the raw file",
}
DATASETS = {  # name: (where on raw.githubusercontent.com, records in it, sha256 where it is known)
    "book": ("rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/instruction-data.json", 1100,
             "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944"),
    "alpaca": ("tatsu-lab/stanford_alpaca/main/alpaca_data.json", 52002, None),
}
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
# How GPT-2 cuts text before it merges bytes; possessive quantifiers keep long runs linear.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# GPT-2's files spell a byte as itself where that prints, else as the next character from U+0100.
PRINTS = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTS]
BYTE_TO_CHAR = {b: chr(b) for b in PRINTS} | {b: chr(256 + n) for n, b in enumerate(OTHERS)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def download(url: str, path: Path, sha256: str | None = None) -> None:
    """Fetch a JSON file, whole or not at all. Raises OSError where network, server or disk fail, ValueError where
    something else than the file comes."""
    print(f"fetching {url}", file=sys.stderr)
    request = urllib.request.Request(url, headers={"User-Agent": "gpt2-finetune"})  # some servers refuse urllib's own
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            if url.startswith("https:") and not answer.url.startswith("https:"):
                raise ValueError(f"{url}: redirected to {answer.url}")
            content = answer.read()
    except http.client.HTTPException as error:  # the connection broke
        raise OSError(f"{url}: {error!r}") from None
    except OSError as error:
        raise OSError(f"{url}: {getattr(error, 'reason', error)}") from None
    _parse(content, url)
    found = hashlib.sha256(content).hexdigest()
    if found != (sha256 or found):
        raise ValueError(f"{url}: sha256 {found} came, expected {sha256}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f"{path.name}.{os.urandom(4).hex()}.part")  # others may fetch it too
    try:
        temp.write_bytes(content)
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where downloads are kept: below HF_HOME."""
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "gpt2-finetune"


def data_file(path_or_name) -> Path:
    """The file that `--data` means; `book` and `alpaca` are downloaded into HF_HOME the first time.

    Raises FileNotFoundError, or ValueError for a folder.
    """
    name = str(path_or_name)
    if name in DATASETS:
        source, _, sha256 = DATASETS[name]
        server = os.environ.get("DATA_ENDPOINT") or "https://raw.githubusercontent.com"
        url = f"{server.rstrip('/')}/{source}"
        path = cache_folder() / "data" / f"{name}.json"
        try:
            if not path.is_file():
                download(url, path, sha256)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"{name}: {error}; or put {url} into {path}") from None
        return path
    path = TINY / "instructions.json" if name == "tiny" else Path(path_or_name)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such data; give a .json or .jsonl file, or one of {', '.join(['tiny', *DATASETS])}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the .json or .jsonl file in it")
    if not path.is_file():  # what a pipe gives cannot be read and hashed again
        raise ValueError(f"{path} is a pipe or a device; give a file")
    return path


def load_examples(path_or_name) -> list[dict]:
    """Read a JSON array or JSON lines, told by content, into dicts of instruction, input, output.

    A record is Alpaca's, prompt/completion, question/answer, or a conversation of one question and
    one answer (`messages`, or ShareGPT's `conversations`), whose system message is put before the
    question with a blank line between. A missing input becomes ""; other keys stay as they are.
    Of `alpaca` 28 records have no output: they are left out, and stderr says so.

    Raises FileNotFoundError, or ValueError naming file, record (from 1) and remedy.
    """
    path, expected = data_file(path_or_name), DATASETS.get(str(path_or_name), (None, None))[1]
    examples, empty, n = [], [], 0
    for n, (where, record) in enumerate(_records(path), 1):
        if str(path_or_name) == "alpaca" and isinstance(record, dict) and not str(record.get("output")).strip():
            empty.append(n)
            continue
        try:
            examples.append(_to_example(record))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not examples:
        raise ValueError(f"{path} holds no records; at least one is needed")
    if n != (expected or n):
        raise ValueError(f"{path}: {n} records, {expected} expected; delete it to download it again")
    if empty:
        print(f"note     {len(empty)} of {n} records of {path_or_name} have no output and are left out; "
              f"the first is record {empty[0]}", file=sys.stderr)
    return examples


def _records(path):
    """(place for messages, record) of every record in a JSON array, or in JSON lines: those one at a time."""
    with open(path, "rb") as file:
        head = file.peek(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
        if head.startswith(b"["):
            for n, record in enumerate(_parse(file.read(), path), 1):
                yield f"{path}: record {n}", record
        elif head.startswith(b"{"):
            rows = ((line, row) for line, row in enumerate(file, 1) if row.removeprefix(b"\xef\xbb\xbf").strip())
            for n, (line, row) in enumerate(rows, 1):
                where = f"{path}: record {n} (line {line})"
                yield where, _parse(row, where)
        else:
            known = [text for start, text in NOT_JSON.items() if head.startswith(start)]
            reason = known[0] if known else f"it begins with {head[:16]!r}" if head else "empty"
            raise ValueError(f"{path} is neither a JSON array nor JSON lines: {reason}")


def _unique(pairs):
    """The fields of a JSON object, of which json.loads would otherwise drop all but the last of one name."""
    if len(fields := dict(pairs)) < len(pairs):
        raise ValueError(f"the fields {[name for name, _ in pairs]} are not unique")
    return fields


def _parse(text, where):
    """JSON from bytes; any failure is a ValueError that names the place."""
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        why = str(error).replace("line 1 column", "column")
        raise ValueError(f"{where}: not JSON in UTF-8 ({why}); a file is one array, or one record per line") from None


def _to_example(record) -> dict:
    """A record of any accepted form, checked: instruction, input, output and its other keys."""
    if not isinstance(record, dict):
        raise ValueError(f"a record is an object with named fields, not {type(record).__name__}")
    forms = [form for form in FORMS if record.keys() >= set(form)]
    if not forms:
        raise ValueError(f"fields {list(record)}; needed: instruction and output, prompt and completion, "
                         "question and answer, messages, or conversations")
    filled = [form for form in forms if any(record[name] is not None for name in form)]
    if len(filled) > 1:
        raise ValueError(f"both {filled[0][0]} and {filled[1][0]} are given; remove one")
    names = (filled or forms)[0]
    others = set(sum(FORMS, ())) - set(names)  # where data sets are merged, the fields of one are null in the other's records
    rest = {name: value for name, value in record.items() if name not in others or value is not None}
    if len(names) == 2:
        question, answer = (rest.pop(name) for name in names)
    else:
        system = [{"role": "system", "content": rest.pop("system")}] if rest.get("system") else []  # ShareGPT's other place for it
        question, answer = _one_turn(rest.pop(names[0]), system)
        names = f"question in {names[0]}", f"answer in {names[0]}"
    given = rest.pop("input", None)
    example = {"instruction": question, "input": "" if given is None else given, "output": answer}
    for name, text in zip((names[0], "input", names[1]), example.values()):
        if not isinstance(text, str):
            raise ValueError(f"{name} must be text, not {type(text).__name__}; write it in quotes")
        if name != "input" and not text.strip():
            raise ValueError(f"{name} is empty; fill it in or remove the record")
    if clash := example.keys() & rest.keys():
        raise ValueError(f"both {names[0]} and {min(clash)} are given; remove one")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate (half a character); repair the text") from None
    return example | rest


def _one_turn(messages, system: list) -> tuple[str, str]:
    """(question, answer) of a conversation of one turn, which `system` may open."""
    try:
        turns = [(m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in [*system, *messages]]
        roles = [{"human": "user", "gpt": "assistant"}.get(role, role) for role, _ in turns]
        texts = [text + "" for _, text in turns]
    except (AttributeError, TypeError):
        raise ValueError("messages must be a list of objects with role and content, both text") from None
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(f"messages of {', '.join(map(str, roles)) or 'nobody'}; needed: one of user, one of assistant "
                         "(and one of system before them): split multi-turn conversations")
    return "\n\n".join(text for text in texts[:-1] if text.strip()) if texts[-2].strip() else "", texts[-1]


def split_examples(examples, train=0.85, test=0.10) -> tuple[list, list, list]:
    """The book's split, returned as (train, val, test); 1,100 records give 935, 55 and 110.

    In file order: the first int(n * train) train, the next int(n * test) test, the rest validate.
    Raises ValueError unless both shares are at least 0 and together at most 1.
    """
    if not (train >= 0 and test >= 0 and train + test <= 1):
        raise ValueError(f"shares train={train}, test={test}: each at least 0, together at most 1")
    a = int(len(examples) * train)
    b = a + int(len(examples) * test)
    return examples[:a], examples[b:], examples[a:b]


INSTRUCTIONS = ("short", "long")
RESPONSES = ("answer", "rationale", "reflection")


def reshape_example(example, instruction="short", response=None) -> dict:
    """The record with another instruction or response; its other keys stay.

    instruction: "short" the record's own, "long" its `instruction_long`. response: None the output as it
    is; "answer" the answer alone; "rationale" the worked solution (`rationale`), then the answer;
    "reflection" a wrong draft (`draft`), the worked solution that corrects it, then the answer. In the
    last two the answer stands on a line of its own after "Answer:". The worked solutions of GSM8K, which
    end in "#### answer", are taken apart. Raises ValueError for a record that lacks what is asked for.
    """
    if instruction not in INSTRUCTIONS or response not in (None, *RESPONSES):
        raise ValueError(f"instruction {instruction!r} or response {response!r} is unknown; there are "
                         f"{', '.join(INSTRUCTIONS)} and {', '.join(RESPONSES)}")
    solution, mark, answer = example["output"].rpartition("\n#### ")
    gsm8k = mark and "\n" not in answer.strip()  # else it is a heading
    fields = {**example, "rationale": solution, "output": answer} if gsm8k else example

    def field(name):
        if not isinstance(fields.get(name), str) or not fields[name].strip():
            raise ValueError(f"no text under {name!r}, which --instruction {instruction}"
                             f"{f' --response {response}' if response else ''} needs")
        return fields[name].strip()

    shaped = dict(example)
    if instruction == "long":
        shaped["instruction"] = field("instruction_long")
    if response:
        draft = f"{field('draft')}\nThat is wrong. " if response == "reflection" else ""
        worked = f"{draft}{field('rationale')}\nAnswer: " if response != "answer" else ""
        shaped["output"] = worked + field("output")
    return shaped


def _folder(name_or_folder) -> tuple[str | None, Path]:
    """(name, folder) of a model given by name or by its folder."""
    name = name_or_folder if isinstance(name_or_folder, str) else None
    return name, cache_folder() / name if name in GPT2_NAMES else TINY / "model" if name == "tiny" else Path(name_or_folder)


def block_size(name_or_folder) -> int | None:
    """How many ids a model takes, as its config.json says; None where no config.json says it."""
    name, folder = _folder(name_or_folder)
    if name in GPT2_NAMES:
        return 1024
    path = folder / "config.json"
    config = _parse(path.read_bytes(), path) if path.is_file() else None
    size = config.get("n_positions", 1024) if isinstance(config, dict) else None
    return size if type(size) is int and size > 1 else None


def load_tokenizer(name_or_folder) -> tiktoken.Encoding:
    """GPT-2's byte-level BPE from a model folder, or by name: `tiny`, `gpt2`, `gpt2-medium`, ...

    A folder's tokenizer.json is read first, then vocab.json + merges.txt, then its *.tiktoken. All
    is checked before tiktoken sees it, whose panics `except Exception` would miss. A name takes
    precedence over a folder of that name (`./gpt2`, or a Path, is the folder). Raises FileNotFoundError
    where there is no tokenizer, ValueError where it is broken or would not split text as GPT-2's does.
    """
    name, folder = _folder(name_or_folder)
    if name in GPT2_NAMES and not (folder / "merges.txt").is_file():  # all five have the same
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise FileNotFoundError(
                f"{name_or_folder}: the tokenizer cannot be fetched ({type(error).__name__}); give a folder with "
                "vocab.json and merges.txt, or set TIKTOKEN_CACHE_DIR to a filled cache") from None
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such model folder, nor one of the names {', '.join(('tiny', *GPT2_NAMES))}")
    try:
        vocab, special, merges = _read_bpe(folder)
        ranks = {bytes(CHAR_TO_BYTE[char] for char in token): rank for token, rank in vocab.items() if token not in special}
        _check_bpe(ranks, special, merges)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = error if isinstance(error, ValueError) else f"not the format expected ({error!r})"
        raise ValueError(f"{folder}: broken tokenizer: {why}") from None
    return tiktoken.Encoding(str(folder), pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def _read_bpe(folder):
    """(vocabulary, special tokens, merges) in GPT-2's spelling; merges None if no file has them."""
    if (path := folder / "tokenizer_config.json").exists():
        if _parse(path.read_bytes(), path.name).get("add_prefix_space"):
            raise ValueError(f"{path.name} says add_prefix_space, which GPT-2's tokenizer does not do")
    if (path := folder / "tokenizer.json").exists():
        spec = _parse(path.read_bytes(), path.name)
        model, cut = spec["model"], spec.get("pre_tokenizer") or {}
        kind = model.get("type", "BPE"), cut.get("type"), cut.get("use_regex", True)
        unusual = [model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")]
        if kind != ("BPE", "ByteLevel", True) or cut["add_prefix_space"] or spec["normalizer"] or any(unusual):
            raise ValueError("tokenizer.json is not of GPT-2's kind (byte-level BPE, its pattern)")
        special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        merges = [m.split() if isinstance(m, str) else m for m in model["merges"]]
        return model["vocab"], special, merges
    if (path := folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        vocab = _parse(path.read_bytes(), path.name)
        added = folder / "added_tokens.json"
        special = _parse(added.read_bytes(), added.name) if added.exists() else {}
        special |= {token: vocab[token] for token in [END_OF_TEXT] if token in vocab}
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        lines = lines[lines[0].startswith("#version") :]
        return vocab, special, [line.split() for line in lines if line.strip()]
    if files := sorted(folder.glob("*.tiktoken")):
        rows = [line.split() for line in files[0].read_bytes().splitlines()]
        tokens = [(base64.b64decode(token), int(rank)) for token, rank in rows]
        return {_spell(token): rank for token, rank in tokens}, {END_OF_TEXT: len(rows)}, None
    raise FileNotFoundError(f"{folder}: no tokenizer.json, no vocab.json with merges.txt, no *.tiktoken; "
                            "copy the model's tokenizer files into the folder")


def _check_bpe(ranks, special, merges):
    """Raise ValueError unless tiktoken takes these ranks and merges as the given merges would."""
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{len(missing)} of the 256 single bytes missing, first {missing[0]:#04x}")
    if b"" in ranks:
        raise ValueError("a token is empty")
    if END_OF_TEXT not in special:
        raise ValueError(f"no {END_OF_TEXT}; without it no answer can end")
    ids = sorted([*ranks.values(), *special.values()])
    if wrong := [i for n, i in enumerate(ids) if type(i) is not int or i != n]:
        raise ValueError(f"ids must be 0 to {len(ids) - 1}, each once; wrong at {wrong[0]!r}")
    implied = [[_spell(part) for part in pair] for pair in _merges(ranks)]
    merges = implied if merges is None else merges
    for n, (pair, line) in enumerate(zip_longest(implied, merges), 1):
        if pair != line:
            raise ValueError(f"merge {n} is {line}, the ids imply {pair}; vocabulary and merges must belong "
                             "together, and ids increase in merge order")


def _spell(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def _merges(ranks) -> list[tuple[bytes, bytes]]:
    """The pair of tokens that every longer token is merged from, in the order of the ids.

    tiktoken keeps ids only: the pair is where BPE on the token's own bytes, with lower ids alone,
    has two parts left. Raises ValueError for a token that cannot be reached so.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = pairs.index(min(pairs))
            if pairs[i] == rank:
                raise ValueError(f"token {token!r} cannot be merged from ids below its own, {rank}")
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def save_tokenizer(tokenizer: tiktoken.Encoding, folder) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, for transformers and load_tokenizer.

    Raises ValueError for a tokenizer not of GPT-2's kind: read back, it would cut text otherwise.
    """
    if tokenizer._pat_str != GPT2_PATTERN:
        raise ValueError(f"{tokenizer.name}: only tokenizers with GPT-2's pattern can be saved")
    ranks, special = tokenizer._mergeable_ranks, dict(tokenizer._special_tokens)
    vocab = {_spell(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])}
    vocab[END_OF_TEXT] = special.pop(END_OF_TEXT)
    merges = ["#version: 0.2", *(f"{_spell(a)} {_spell(b)}" for a, b in _merges(ranks)), ""]
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    files = {"vocab.json": vocab, "added_tokens.json": special, "tokenizer_config.json": config}
    texts = {"merges.txt": "\n".join(merges)}
    texts |= {name: json.dumps(value, ensure_ascii=False) + "\n" for name, value in files.items() if value}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "added_tokens.json"):  # another tokenizer's, which would be read with or before ours
        (Path(folder) / name).unlink(missing_ok=True)
    for name, text in texts.items():
        (Path(folder) / name).write_text(text, encoding="utf-8", newline="\n")


def format_prompt(example, template="alpaca") -> str:
    """The text up to and including the response header. Raises ValueError: unknown template."""
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is unknown; there are {', '.join(TEMPLATES)}")
    before, input_part, after = TEMPLATES[template]
    return (before + (input_part if example.get("input") else "") + after).format_map(example)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids of an example: n_prompt of the prompt, the response's and, unless cut, the end token."""

    ids: list[int]
    n_prompt: int


def encode_example(example, tokenizer, template="alpaca", max_length=None) -> Encoded:
    """The example's first max_length ids; one that is cut has no end token.

    Raises ValueError when nothing of the response is left, or max_length is below 2.
    """
    return encode_examples([example], tokenizer, template, max_length)[0][0]


def encode_examples(examples, tokenizer, template="alpaca", max_length=None):
    """Every example as ids: (list[Encoded], report).

    The report holds lists of indices into `examples`: `kept` (one for each Encoded, in its order),
    `dropped` (nothing supervised within max_length), `truncated` (kept, but cut), `special_text`
    (the text spells a control token; it stays text). Raises ValueError when none is kept.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length {max_length}: at least 2 ids are needed")
    encoded, report = [], {"kept": [], "dropped": [], "truncated": [], "special_text": []}
    known, special = {}, tokenizer.special_tokens_set  # known: one int for each id; the tokenizer makes one for every token
    for i, example in enumerate(examples):
        # Not encode_ordinary_batch: handing short texts to its threads costs more than encoding them.
        prompt = tokenizer.encode_ordinary(format_prompt(example, template))
        ids = [known.setdefault(t, t) for t in prompt + tokenizer.encode_ordinary(example["output"])] + [tokenizer.eot_token]
        cut = ids[:max_length]
        if len(cut) > len(prompt):
            encoded.append(Encoded(cut, len(prompt)))
        report["kept" if len(cut) > len(prompt) else "dropped"].append(i)
        if len(prompt) < len(cut) < len(ids):
            report["truncated"].append(i)
        texts = example["instruction"], example.get("input") or "", example["output"]
        if any(token in text for token in special for text in texts):
            report["special_text"].append(i)
    if not encoded:
        prompts = (tokenizer.encode_ordinary(format_prompt(example, template)) for example in examples)
        raise ValueError(f"none of {len(examples)} examples has a response token within max_length {max_length};"
                         f" the shortest prompt has {min(map(len, prompts), default=0)} ids")
    return encoded, report


def prompt_weight(loss_on) -> float:
    """What a prompt token weighs in the loss: "response" 0, "all" 1, else the number itself.

    Raises ValueError for anything that is not one of the words or a number from 0 to 1.
    """
    try:
        weight = float({"response": 0, "all": 1}.get(loss_on, loss_on))
    except (TypeError, ValueError):
        weight = float("nan")
    if not 0 <= weight <= 1:
        raise ValueError(f"loss_on {loss_on!r}: give response, all, or a weight between 0 and 1")
    return weight


def collate(encoded, loss_on="response", ignore_index=IGNORE_INDEX) -> tuple[Tensor, Tensor]:
    """Inputs ids[:-1] and targets ids[1:], (B, T) int64 each, padded to the longest of the batch.

    With loss_on "response" the prompt's own tokens are ignore_index among the targets; its last
    position predicts the response's first token. With "all", or a weight (see token_weights), all
    are targets. Padding repeats the row's last id, the end token, with ignore_index as target: the
    book's batches. Raises ValueError for an empty batch.
    """
    if not encoded:
        raise ValueError("an empty batch; at least one example is needed")
    prompt_counts = prompt_weight(loss_on) > 0
    width = max(len(example.ids) for example in encoded)
    inputs, targets = [], []
    for example in encoded:
        ids, padding = example.ids, width - len(example.ids)
        first = 1 if prompt_counts else max(1, example.n_prompt)
        inputs.append(ids[:-1] + ids[-1:] * padding)
        targets.append([ignore_index] * (first - 1) + ids[first:] + [ignore_index] * padding)
    return torch.tensor(inputs), torch.tensor(targets)


def token_weights(encoded, loss_on) -> Tensor:
    """Weights of collate's targets, (B, T) float32.

    1 for the response and the end token, prompt_weight(loss_on) for the prompt, 0 for padding.
    """
    response, every = (collate(encoded, which)[1] != IGNORE_INDEX for which in ("response", "all"))
    return every.float() * prompt_weight(loss_on) + response.float() * (1 - prompt_weight(loss_on))


def batches(lengths, batch_size, seed, epoch) -> list[list[int]]:
    """Indices in batches of similar length, each index once, drawn from (seed, epoch) alone.

    Sorted by length they need almost no padding. From epoch to epoch ties fall otherwise, the batch
    that is not full stands elsewhere and shifts the cuts, and the order is another; the number of
    batches, ceil(n / batch_size), stays. Raises ValueError for a batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: at least 1 is needed")
    rng = random.Random(f"{seed}/{epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    order.sort(key=lambda i: lengths[i])
    full, rest = divmod(len(order), batch_size)
    sizes = [batch_size] * full + [rest] * (rest > 0)
    rng.shuffle(sizes)
    queue = iter(order)
    result = [[next(queue) for _ in range(size)] for size in sizes]
    rng.shuffle(result)
    return result


def select_examples(encoded, how: str | None, n: int, seed: int, ifd) -> list[int]:
    """Indices of at most n examples, in file order. `ifd()` gives the difficulties where they are needed."""
    everything = range(len(encoded))
    if how == "ifd":
        scores = ifd()
        chosen = sorted((i for i in everything if scores[i] < 1), key=lambda i: -scores[i])[:n]
    elif how == "random":
        chosen = random.Random(f"select {seed}").sample(everything, min(n, len(encoded)))
    else:
        sign = {None: 0, "longest": -1, "shortest": 1}[how]
        chosen = sorted(everything, key=lambda i: sign * (len(encoded[i].ids) - encoded[i].n_prompt))[:n]
    return sorted(chosen)


def split_stages(difficulty: list[float], n_stages: int, reverse: bool, seed: int) -> list[list[int]]:
    """
    Parts of equal size from easy to hard (or hard to easy); a tenth of the earlier examples comes again in
    the last, so that they are not forgotten (staged tuning as in arXiv 2406.04371).
    """
    order = sorted(range(len(difficulty)), key=lambda i: (-difficulty[i] if reverse else difficulty[i], i))
    bounds = [len(order) * s // n_stages for s in range(n_stages + 1)]
    stages = [order[a:b] for a, b in zip(bounds, bounds[1:])]
    earlier = sum(stages[:-1], [])
    stages[-1] = stages[-1] + random.Random(f"stages {seed}").sample(earlier, len(earlier) // 10)
    return stages


def sample_order(lengths, stages, per_step: int, epochs: int, seed: int):
    """(epoch, indices) of every step of the run, from these alone: a resumed run continues it."""
    for stage, part in enumerate(stages):
        for epoch in range(stage * epochs, (stage + 1) * epochs):
            for indices in batches([lengths[i] for i in part], per_step, seed, epoch):
                yield epoch, [part[i] for i in indices]


def parse_args(argv=None):
    """The flags; a wrong one ends in one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(description="Show data as the model sees it: lengths, truncation, padding, one example.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    add = parser.add_argument
    add("--data", default="tiny", help="a JSON or JSON lines file, or tiny, book, alpaca")
    add("--model", default="tiny", help="a folder with a tokenizer, or a name such as gpt2")
    add("--template", default="alpaca", choices=TEMPLATES, help="prompt template")
    add("--max-length", type=int, help="cut examples after so many ids; None: after as many as the model takes")
    add("--loss-on", default="response", help="response, all, or the weight of prompt tokens")
    args = parser.parse_args(argv)
    for flag in ("data", "model"):  # from a shell variable that was never set; a path would take it for the working directory
        if not getattr(args, flag):
            parser.error(f"--{flag}: must not be empty")
    if args.max_length is not None and args.max_length < 2:
        parser.error(f"--max-length {args.max_length}: at least 2 is needed")
    try:
        prompt_weight(args.loss_on)
    except ValueError as error:
        parser.error(f"--loss-on: {error}")
    return args


def describe(args):
    """Print what `python data.py` shows."""
    examples, tokenizer, longest = load_examples(args.data), load_tokenizer(args.model), block_size(args.model)
    if args.max_length and longest and args.max_length > longest:
        print(f"error: --max-length {args.max_length}: the model takes at most {longest} ids", file=sys.stderr)
        sys.exit(2)
    longest = args.max_length or longest
    try:
        encoded, report = encode_examples(examples, tokenizer, args.template, longest)
    except ValueError as error:
        raise ValueError(f"{args.data}: {error}; raise --max-length if it is below what the model takes") from None
    print(f"{len(examples)} records, {len(encoded)} used; template {args.template}")
    print(f"{'cut after':12s} {longest} ids" if longest else "not cut")
    known = {"instruction", "input", "output", "level", "task", "instruction_long", "rationale", "draft"}
    if ignored := sorted(set().union(*examples) - known):
        print(f"fields that nothing here uses: {', '.join(ignored)}")
    for what in ("truncated", "dropped", "special_text"):
        first = f" (first: record {report[what][0] + 1})" if report[what] else ""
        print(f"{what.replace('_', ' '):12s} {len(report[what])}{first}")
    lengths = [len(example.ids) for example in encoded]
    prompts = [example.n_prompt for example in encoded]
    responses = [total - prompt for total, prompt in zip(lengths, prompts)]
    print(f"\n{'ids':12s}" + "".join(f"{name:>8s}" for name in ("min", "median", "p95", "max")))
    for name, values in (("prompt", prompts), ("response", responses), ("both", lengths)):
        values = sorted(values)
        picked = (values[int(share * (len(values) - 1))] for share in (0, 0.5, 0.95, 1))
        print(f"{name:12s}" + "".join(f"{value:8d}" for value in picked))
    drawn = random.Random(0).sample(lengths, len(lengths))
    at_random = [drawn[i : i + 8] for i in range(0, len(drawn), 8)]
    grouped = [[lengths[i] for i in batch] for batch in batches(lengths, 8, seed=0, epoch=0)]
    for name, rows in (("at random", at_random), ("by length", grouped)):
        padding = 1 - sum(lengths) / sum(len(row) * max(row) for row in rows)
        print(f"padding in batches of 8, {name}: {padding:.1%}")
    ids, n_prompt = encoded[0].ids, encoded[0].n_prompt
    prompt, response = tokenizer.decode(ids[:n_prompt]), tokenizer.decode(ids[n_prompt:])
    weight = prompt_weight(args.loss_on)
    print(f"\nrecord {report['kept'][0] + 1}, supervised between >>> and <<<; a prompt token weighs {weight:g}\n")
    print(f">>>{prompt}{response}<<<" if weight else f"{prompt}>>>{response}<<<", flush=True)


def main(argv=None):
    """Describe the data; what was given wrong ends in one line on stderr and exit code 1."""
    args = parse_args(argv)
    try:
        describe(args)
    except BrokenPipeError:  # `| head` has seen enough; at exit Python would flush into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


if __name__ == "__main__":
    if sys.stdout:  # None when closed (>&-)
        sys.stdout.reconfigure(errors="backslashreplace")
    main()
