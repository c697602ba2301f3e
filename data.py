"""Instruction data: records, prompt templates, batches, the tokenizer.

A record becomes prompt ids + response ids + the end token. Prompt and response are tokenized
apart, so the border between them is exact, and the prompt in training is, byte for byte, the
prompt in generation. Text never becomes a control token; code alone adds the end token.

Checked in tests/test_data.py against transformers' GPT-2 tokenizer and against the batches and
the split of "Build a Large Language Model (From Scratch)", chapter 7.

    python data.py --data tiny --model tiny     # lengths, truncation, padding, one example
    python data.py --data book --model gpt2     # the book's records, downloaded the first time
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import sys
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

TINY = Path(__file__).resolve().parent / "tiny"  # the embedded data and model
DATASETS = {  # name: place on raw.githubusercontent.com, number of records, sha256 where known
    "book": ("rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/instruction-data.json", 1100,
             "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944"),
    "alpaca": ("tatsu-lab/stanford_alpaca/main/alpaca_data.json", 52002, None),
}
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
END_OF_TEXT = "<|endoftext|>"
TEMPLATES = {  # before the input; its part, left out where there is no input; after it
    "alpaca": ("Below is an instruction that describes a task. Write a response that "
               "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n",
               "### Input:\n{input}\n\n", "### Response:\n"),
    "phi3": ("<|user|>\n{instruction}", "\n{input}", "\n<|assistant|>:\n"),
    "chatml": ("<|im_start|>user\n{instruction}", "\n{input}",
               "<|im_end|>\n<|im_start|>assistant\n"),
    "plain": ("{instruction}", "\n{input}", "\n"),
}


def format_prompt(example, template="alpaca") -> str:
    """The text up to and including the response header."""
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
    """The first max_length ids; ValueError where nothing of the response is among them."""
    return encode_examples([example], tokenizer, template, max_length)[0][0]


def encode_examples(examples, tokenizer, template="alpaca", max_length=None):
    """(list[Encoded], the index of each one's example): only those that leave something to learn.

    Raises ValueError where none does.
    """
    encoded, kept = [], []
    for i, example in enumerate(examples):
        prompt = tokenizer.encode_ordinary(format_prompt(example, template))
        response = tokenizer.encode_ordinary(example["output"]) + [tokenizer.eot_token]
        ids = (prompt + response)[:max_length]
        if len(ids) > len(prompt):
            encoded.append(Encoded(ids, len(prompt)))
            kept.append(i)
    if not encoded:
        raise ValueError(f"none of {len(examples)} examples has a response token within "
                         f"max_length {max_length}; raise it, or shorten the prompts")
    return encoded, kept


def marker_note(tokenizer, template) -> str | None:
    """A line on markers of the template that are control tokens of the tokenizer, else None."""
    markers = re.findall(r"<\|\w+\|>", "".join(TEMPLATES[template]))
    own = ", ".join(sorted(tokenizer.special_tokens_set.intersection(markers)))
    return f"{own}: control tokens of this tokenizer, text in {template}" if own else None


def collate(encoded, loss_on="response", ignore_index=-100) -> tuple[Tensor, Tensor]:
    """Inputs ids[:-1] and targets ids[1:], (B, T) int64 each, padded to the longest of the batch.

    With loss_on "response" the prompt's own tokens are ignore_index among the targets; its last
    position predicts the response's first token. With "all" they are targets too. Padding repeats
    the row's last id, the end token, with ignore_index as target: the book's batches.
    """
    if loss_on not in ("response", "all"):
        raise ValueError(f"loss_on {loss_on!r}: it is response or all")
    width = max(len(example.ids) for example in encoded)
    inputs, targets = [], []
    for example in encoded:
        ids, padding = example.ids, width - len(example.ids)
        first = example.n_prompt if loss_on == "response" else 1  # the first id with a loss
        inputs.append(ids[:-1] + ids[-1:] * padding)
        targets.append([ignore_index] * (first - 1) + ids[first:] + [ignore_index] * padding)
    return torch.tensor(inputs), torch.tensor(targets)


def batches(lengths, batch_size, seed, epoch) -> list[list[int]]:
    """Indices in batches of similar length, each index once, drawn from (seed, epoch) alone.

    Sorted by length they need almost no padding. From epoch to epoch ties fall otherwise, the batch
    that is not full stands elsewhere and shifts the cuts, and the order is another.
    """
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


# ---- records

CHATS = ("messages", "conversations")
QUESTIONS = ("instruction", "prompt", "question", *(f"user in {chat}" for chat in CHATS))
ANSWERS = ("output", "completion", "answer", "response",
           *(f"assistant in {chat}" for chat in CHATS))
SYSTEMS = ("system", "system_prompt", *(f"system in {chat}" for chat in CHATS))
MARKS = ("label", "train", "training", "weight")  # false or 0: not to be learned
NEEDED = ("history", "choices", "options", "documents", "tools", "tool_calls", "function_call",
          "image", "images", "audio", "video", "videos")  # the answer may need it; not read here
USED = {"instruction", "input", "output", "task", "level", "instruction_long", "rationale", "draft"}


def to_example(record) -> dict:
    """A record of any accepted form as instruction, input, output and its other fields.

    `context` is an input; a system text goes before the question, with a blank line between.
    Raises ValueError with the remedy.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a record is an object with named fields, not {type(record).__name__}")
    json.dumps(record, ensure_ascii=False).encode()  # ValueError: half a character (surrogate)
    fields = dict(record)
    for chat in CHATS:
        if not _is_empty(fields.get(chat)):
            fields |= _one_turn(fields.pop(chat), chat)
    for name, value in fields.items():
        word = name.split(" in ")[0]
        if word in MARKS and (value is False or word == "weight" and value == 0):
            raise ValueError(f"{name} says that it is not to be learned; remove the record")
        if word in NEEDED and not _is_empty(value):
            raise ValueError(f"{name} is not read; write it into the instruction, or remove it")
    question, answer = _take(fields, QUESTIONS), _take(fields, ANSWERS)
    system, given = _take(fields, SYSTEMS, ""), _take(fields, ("input", "context"), "")
    instruction = f"{system}\n\n{question}" if system else question
    return {"instruction": instruction, "input": given, "output": answer} | fields


def _one_turn(messages, chat) -> dict:
    """A conversation of one question and one answer as fields: {"user in messages": text, ...}."""
    if not (isinstance(messages, list) and all(isinstance(m, dict) for m in messages)):
        raise ValueError(f"{chat} must be a list of objects with role and content")
    roles, texts, others = [], {}, {}
    for message in messages:
        role = str(message.get("role", message.get("from")))
        roles.append({"human": "user", "gpt": "assistant"}.get(role, role))
        texts[f"{roles[-1]} in {chat}"] = message.get("content", message.get("value"))
        for key in message.keys() - {"role", "from", "content", "value"}:
            if key not in MARKS or message is messages[-1]:  # no prompt is learned
                others[f"{key} in {chat}"] = message[key]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(f"{chat} of {', '.join(roles)}; needed: (system,) user, assistant; split "
                         "longer conversations into records")
    return others | texts


def _is_empty(value):
    """Whether a field holds nothing: null, NaN, blanks, an empty list."""
    blank = isinstance(value, str) and not value.strip()
    return blank or value in (None, [], {}) or value != value


def _take(fields, names, default=None) -> str:
    """Take these fields out; the text of the one that is filled, else the default."""
    found = {name: fields.pop(name) for name in names if name in fields}
    filled = [name for name in found if not _is_empty(found[name])]
    if not filled and default is None:
        raise ValueError(f"no text in {' or '.join(found or names)}; fill it in, or remove it")
    if len(filled) > 1:
        raise ValueError(f"both {' and '.join(filled)} are given; remove one")
    text = found[filled[0]] if filled else default
    if not isinstance(text, str):
        chat = "; a whole conversation belongs under messages" if isinstance(text, list) else ""
        raise ValueError(f"{filled[0]} must be text, not {type(text).__name__}{chat}")
    return text


def split_examples(examples, train=0.85, test=0.10, shuffle=None) -> tuple[list, list, list]:
    """(train, val, test): int(n * train) records, behind the int(n * test) for test the rest.

    In file order as the book, where 1,100 make 935, 55 and 110; shuffled where a seed is given.
    """
    examples = list(examples)
    if shuffle is not None:
        random.Random(shuffle).shuffle(examples)
    a = int(len(examples) * train)
    b = a + int(len(examples) * test)
    return examples[:a], examples[b:], examples[a:b]


# ---- files

SPLIT_SEED = 123
TO_JSON = "pandas can convert it: to_json(PATH, orient='records', lines=True)"
NOT_JSON = {  # how files begin that are brought as data, what they are and what to do
    b"\x1f\x8b": "gzip: unpack it", b"\xfd7zXZ": "xz: unpack it", b"BZh": "bzip2: unpack it",
    b"\x28\xb5\x2f\xfd": "zstd: unpack it", b"PK\x03\x04": "zip or xlsx: unpack or convert it",
    b"PAR1": f"parquet: {TO_JSON}", b"\x80": f"a pickle: {TO_JSON}",
    b"ARROW1": f"arrow: {TO_JSON}", b"\xff\xff\xff\xff": f"arrow: {TO_JSON}",
    b"\xff\xfe": "UTF-16: save it as UTF-8", b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"version https://git-lfs": "a git-lfs pointer: run git lfs pull",
    b"<": "a web page: download the raw file",
}


@dataclass(frozen=True)
class Parts:
    """Data as a run uses it: records, and what there is to say of them."""

    train: list[dict]
    val: list[dict]
    test: list[dict]
    positions: list[int]  # of the training records in their file, from 0
    split: str  # "file order", "shuffled" or "folder"
    sha256: str  # of the file, or of a folder's files one after another
    rows: int  # records in it, those left out too
    notes: list[str]


def load_parts(path_or_name, split=None) -> Parts:
    """Read and split. A user's file is shuffled, for files sorted by kind are common.

    `split` forces "file order" or "shuffled" upon a file. Raises FileNotFoundError, or ValueError
    that names file, record (from 1), line and remedy.
    """
    name, rows, loaded, notes = str(path_or_name), 0, {"test": []}, []
    files = _files(name)
    sha256 = hashlib.sha256(b"".join(path.read_bytes() for path in files.values())).hexdigest()
    for part, path in files.items():
        records = _records(path)
        rows += len(records)
        loaded[part] = _examples(path, records, leave_out_empty=name == "alpaca")
    if "all" in files:
        split = split or ("file order" if name in ("tiny", *DATASETS) else "shuffled")
        seed = SPLIT_SEED if split == "shuffled" else None
        parts = split_examples(loaded["all"], shuffle=seed)
    else:
        split, parts = "folder", [loaded[part] for part in ("train", "val", "test")]
    positions = [position for position, _ in parts[0]]
    train, val, test = ([example for _, example in part] for part in parts)
    used = train + val + test
    if len(used) < rows:
        notes.append(f"{rows - len(used)} of {rows} records have no output and are left out")
    unused = {key for example in used for key in example if not _is_empty(example[key])} - USED
    if unused:
        notes.append(f"fields that nothing uses: {', '.join(sorted(unused))}")
    prompts = {(example["instruction"], example["input"]) for example in train}
    seen = sum((example["instruction"], example["input"]) in prompts for example in test)
    if seen:
        notes.append(f"{seen} of {len(test)} test prompts also stand in the training part")
    return Parts(train, val, test, positions, split, sha256, rows, notes)


def load_examples(path_or_name) -> list[dict]:
    """All records in the order of the file (of a folder: train, test, val). Raises as load_parts."""
    parts = load_parts(path_or_name, split="file order")
    return parts.train + parts.test + parts.val


def _files(name) -> dict[str, Path]:
    """The file as "all", or those of a data folder as "train", "val" and, unless missing, "test"."""
    path = TINY / "instructions.json" if name == "tiny" else Path(name)
    if name in DATASETS:
        path = _download(name)
    if path.is_file():
        return {"all": path}
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such data; give a .json or .jsonl file, a folder, "
                                f"or one of {', '.join(['tiny', *DATASETS])}")
    files = {}
    for part in ("train", "val", "test"):
        found = [file for file in (path / f"{part}.jsonl", path / f"{part}.json") if file.is_file()]
        if len(found) > 1 or not found and part != "test":
            raise ValueError(f"{path} holds {len(found)} of {part}.jsonl and {part}.json; needed "
                             "are train, val and (to be scored) test, one file each")
        files |= {part: file for file in found}
    return files


def _download(name) -> Path:
    """A published data set in HF_HOME's cache, fetched the first time, whole or not at all."""
    place, count, sha256 = DATASETS[name]
    server = os.environ.get("DATA_ENDPOINT") or "https://raw.githubusercontent.com"
    url = f"{server.rstrip('/')}/{place}"
    cache = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    path = cache / "gpt2-finetune" / "data" / f"{name}.json"
    part = path.with_name(f"{name}.{os.getpid()}.part")
    if path.is_file():
        return path
    try:
        print(f"fetching {url}", file=sys.stderr)
        with urllib.request.urlopen(url, timeout=30) as answer:
            content = answer.read()
        right = sha256 in (None, hashlib.sha256(content).hexdigest())
        if not right or len(json.loads(content)) != count:
            raise ValueError("another file than was published came")
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except Exception as error:  # of network, server or disk
        raise FileNotFoundError(f"{url}: {error!r}; or put the file into {path}") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def _examples(path, records, leave_out_empty):
    """[(position, example)]. Bad records are counted and the first ones named in a ValueError."""
    pairs, bad = [], []
    for position, (place, record) in enumerate(records):
        if leave_out_empty and _is_empty(record.get("output")):
            continue
        try:
            pairs.append((position, to_example(record)))
        except ValueError as error:
            bad.append(f"{place}: {error}")
    if bad:
        raise ValueError(f"{path}: {len(bad)} of {len(records)} records are bad: "
                         f"{'; '.join(bad[:3])}")
    if not pairs:
        raise ValueError(f"{path} holds no records")
    return pairs


def _records(path):
    """[(place, record)] of a JSON array or of JSON lines, told by content."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    start = content.lstrip()[:40]
    for magic, kind in NOT_JSON.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is {kind}")
    if not start.startswith((b"[", b"{")):
        raise ValueError(f"{path} is empty, or csv or text that begins with {start!r}: {TO_JSON}")
    try:
        whole = _parse(content, path)
    except ValueError:
        if start.startswith(b"["):
            raise
        lines = [(n, line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
        places = [f"record {i} (line {n})" for i, (n, _) in enumerate(lines, 1)]
        return [(p, _parse(line, f"{path}: {p}")) for p, (_, line) in zip(places, lines)]
    if isinstance(whole, dict):  # JSON lines of one record, or a table
        lists = [name for name in whole if isinstance(whole[name], (list, dict))]
        if len(lists) == len(whole) and not whole.keys() & set(CHATS):
            raise ValueError(f"{path} is one object with lists or objects under {', '.join(lists)};"
                             " write the list of records alone, one object each")
        whole = [whole]
    return [(f"record {n}", record) for n, record in enumerate(whole, 1)]


def _parse(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = str(error).replace("line 1 column", "column")
        raise ValueError(f"{where}: not JSON in UTF-8 ({why}); a file is one array of records, or "
                         "one record a line") from None


# ---- the tokenizer

# How GPT-2 cuts text before it merges bytes; possessive quantifiers keep long runs linear.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# GPT-2's files spell a byte as itself where that prints, else as the next character from U+0100.
PRINTS = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTS]
CHAR_TO_BYTE = {chr(b): b for b in PRINTS} | {chr(256 + n): b for n, b in enumerate(OTHERS)}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json",
                   "special_tokens_map.json", "tokenizer_config.json")


def load_tokenizer(name_or_folder) -> tiktoken.Encoding:
    """GPT-2's byte-level BPE from a model folder, or by name: `tiny`, `gpt2`, `gpt2-medium`, ...

    A folder's tokenizer.json is read first, then vocab.json + merges.txt. Raises FileNotFoundError,
    or ValueError where tiktoken would give other ids than the files mean, or panic.
    """
    if name_or_folder in GPT2_NAMES:  # all five have the same
        try:
            return tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise FileNotFoundError(f"{name_or_folder}: {type(error).__name__}; give a folder with "
                                    "vocab.json and merges.txt, or TIKTOKEN_CACHE_DIR") from None
    folder = TINY / "model" if name_or_folder == "tiny" else Path(name_or_folder)
    try:
        vocab, merges, special, ordinary = _read_tokenizer(folder)
        ranks = {bytes(CHAR_TO_BYTE[char] for char in token): n
                 for token, n in vocab.items() if token not in special}
        longer = sorted((t for t in vocab if len(t) > 1 and t not in special), key=vocab.get)
        ids = sorted([*ranks.values(), *special.values()])
        if ordinary:
            raise ValueError(f"{ordinary} are added as ordinary tokens, which tiktoken has not")
        if longer != merges or ids != list(range(256 + len(merges) + len(special))):
            raise ValueError("ids must be 0, 1, ...: 256 bytes, and tokens in the order of merges")
        special[END_OF_TEXT]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: no tokenizer of GPT-2's kind: {error!r}") from None
    return tiktoken.Encoding(str(folder), pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                             special_tokens=special)


def _read_tokenizer(folder):
    """(vocabulary, what each merge makes, special tokens, added tokens that are not special)."""
    def read(name):
        return json.loads((folder / name).read_text(encoding="utf-8"))

    if (folder / "tokenizer.json").is_file():
        spec = read("tokenizer.json")
        model, cut, added = spec["model"], spec["pre_tokenizer"], spec["added_tokens"]
        kind = (model.get("type", "BPE"), cut["type"], cut["add_prefix_space"],
                cut.get("use_regex", True), spec["normalizer"])
        if kind != ("BPE", "ByteLevel", False, True, None):
            raise ValueError(f"tokenizer.json is {kind}")
        special = {token["content"]: token["id"] for token in added}
        ordinary = [token["content"] for token in added if not token["special"]]
        vocab, merges = model["vocab"], model["merges"]
    else:
        if not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
            raise FileNotFoundError(f"{folder}: no tokenizer.json, nor vocab.json with merges.txt")
        vocab = read("vocab.json")
        special = read("added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
        known = folder / "special_tokens_map.json"
        known = known.read_text(encoding="utf-8") if known.is_file() else ""
        ordinary = [token for token in special if json.dumps(token) not in known]
        special[END_OF_TEXT] = vocab[END_OF_TEXT]
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    return vocab, ["".join(merge).replace(" ", "") for merge in merges], special, ordinary


def copy_tokenizer(source_folder, target_folder) -> None:
    """Copy the tokenizer's files byte for byte."""
    names = [name for name in TOKENIZER_FILES if (Path(source_folder) / name).is_file()]
    for name in names:
        shutil.copyfile(Path(source_folder) / name, Path(target_folder) / name)


# ---- python data.py


def main(argv=None) -> int:
    """Show data as the model sees it."""
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    parser.add_argument("--data", default="tiny", help="file, folder, tiny, book or alpaca")
    parser.add_argument("--model", default="tiny", help="folder with a tokenizer, or a name")
    parser.add_argument("--template", default="alpaca", choices=TEMPLATES)
    parser.add_argument("--max-length", type=int, help="cut examples after so many ids")
    args = parser.parse_args(argv)
    try:
        describe(load_parts(args.data), load_tokenizer(args.model), args.template, args.max_length)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


def describe(parts, tokenizer, template, max_length):
    """Print lengths, truncation, padding, and one example with what is learned marked."""
    examples = parts.train + parts.val + parts.test
    encoded, kept = encode_examples(examples, tokenizer, template, max_length)
    print(f"{parts.rows} records, {parts.split}: {len(parts.train)} train, {len(parts.val)} val, "
          f"{len(parts.test)} test")
    for note in [*parts.notes, marker_note(tokenizer, template)]:
        if note:
            print(f"note: {note}")
    lengths = [len(example.ids) for example in encoded]
    prompts = [example.n_prompt for example in encoded]
    cut = sum(example.ids[-1] != tokenizer.eot_token for example in encoded)
    print(f"cut after {max_length}: {cut}; with nothing left to learn: {len(examples) - len(kept)}")
    print("ids          min  median     max")
    responses = [length - prompt for length, prompt in zip(lengths, prompts)]
    for name, values in (("prompt", prompts), ("response", responses), ("both", lengths)):
        values = sorted(values)
        print(f"{name:8s}{values[0]:8d}{values[len(values) // 2]:8d}{values[-1]:8d}")
    rows = [[lengths[i] for i in batch] for batch in batches(lengths, 8, seed=0, epoch=0)]
    padding = 1 - sum(lengths) / sum(len(row) * max(row) for row in rows)
    print(f"padding in batches of 8: {padding:.1%}")
    ids, n = encoded[0].ids, encoded[0].n_prompt
    print(f"\nthe first one; what is learned stands between >>> and <<<\n")
    print(f"{tokenizer.decode(ids[:n])}>>>{tokenizer.decode(ids[n:])}<<<")


if __name__ == "__main__":
    sys.exit(main())
