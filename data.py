"""Instruction data: records, prompts, batches, the tokenizer.

A record becomes prompt ids + response ids + the end token. Prompt and response are tokenized
apart: the border between them is exact, and the training prompt is, byte for byte, the prompt in
generation. Text never becomes a control token; code alone adds the end token. Checked against
transformers' GPT-2 tokenizer, and the batches and the split of Raschka's book, chapter 7.

    python data.py --data tiny --model tiny
"""

import argparse
import hashlib
import json
import os
import random
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
from tiktoken_ext.openai_public import r50k_pat_str
from torch import Tensor

TINY = Path(__file__).resolve().parent / "tiny"  # the embedded data and model
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
    before, input_part, after = TEMPLATES[template]
    return (before + (input_part if example.get("input") else "") + after).format_map(example)


@dataclass(frozen=True, slots=True)
class Encoded:
    ids: list[int]  # the prompt's, the response's and, unless cut, the end token
    n_prompt: int


def encode_example(example, tokenizer, template="alpaca", max_length=None) -> Encoded:
    """The first max_length ids; ValueError where none of the response is among them."""
    return encode_examples([example], tokenizer, template, max_length)[0][0]


def encode_examples(examples, tokenizer, template="alpaca", max_length=None):
    """(list[Encoded], index of each one's example), without those cut down to their prompt."""
    encoded, kept = [], []
    for i, example in enumerate(examples):
        prompt = tokenizer.encode_ordinary(format_prompt(example, template))
        response = tokenizer.encode_ordinary(example["output"]) + [tokenizer.eot_token]
        ids = (prompt + response)[:max_length]
        if len(ids) > len(prompt):
            encoded.append(Encoded(ids, len(prompt)))
            kept.append(i)
    if not encoded:
        raise ValueError(f"max_length {max_length} leaves no response to {len(examples)} prompts")
    return encoded, kept


def marker_note(tokenizer, template) -> str | None:
    """A line on markers of the template that are control tokens of the tokenizer, else None."""
    text = "".join(TEMPLATES[template])
    own = ", ".join(token for token in sorted(tokenizer.special_tokens_set) if token in text)
    return f"in template {template}, {own} stays text" if own else None


def collate(encoded, loss_on="response", ignore_index=-100) -> tuple[Tensor, Tensor]:
    """Inputs ids[:-1] and targets ids[1:], (B, T) int64 each, padded to the longest of the batch.

    With loss_on "response" targets in the prompt are ignore_index, with "all" they are its ids.
    Padding repeats the row's last id, with ignore_index as target: the book's batches.
    """
    width = max(len(e.ids) for e in encoded)
    inputs, targets = [], []
    for e in encoded:
        padding = width - len(e.ids)
        first = {"response": e.n_prompt, "all": 1}[loss_on]  # the first id with a loss
        inputs.append(e.ids[:-1] + e.ids[-1:] * padding)
        targets.append([ignore_index] * (first - 1) + e.ids[first:] + [ignore_index] * padding)
    return torch.tensor(inputs), torch.tensor(targets)


def batches(lengths, batch_size, seed, epoch) -> list[list[int]]:
    """Indices in batches of similar length, each index once, drawn from (seed, epoch) alone."""
    rng = random.Random(f"{seed}/{epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    order.sort(key=lambda i: lengths[i])  # ties fall otherwise in every epoch
    full, rest = divmod(len(order), batch_size)
    sizes = [batch_size] * full + [rest] * (rest > 0)
    rng.shuffle(sizes)  # the batch that is not full shifts the cuts
    queue = iter(order)
    result = [[next(queue) for _ in range(size)] for size in sizes]
    rng.shuffle(result)
    return result


READ = {  # what an example is made of, and the names under which records have it
    "system": ("system", "system_prompt", "system message"),
    "instruction": ("instruction", "prompt", "question", "user message"),
    "input": ("input", "context"),
    "output": ("output", "completion", "answer", "response", "assistant message"),
}
NEEDED = ("history", "choices", "options", "documents", "tools", "tool_calls", "function_call",
          "image", "images")  # not read, but the answer may need it
USED = {"instruction", "input", "output", "task", "level", "instruction_long", "rationale", "draft"}


def to_example(record) -> dict:
    """Any accepted record as instruction (below a system text), input, output and other fields."""
    if not isinstance(record, dict):
        raise ValueError("it is not an object with named fields")
    json.dumps(record, ensure_ascii=False).encode()  # half a character: a ValueError that says so
    fields, example = dict(record), {}
    for chat in ("messages", "conversations"):
        if not _is_empty(fields.get(chat)):
            fields |= _one_turn(fields.pop(chat))
    if fields.get("label") is False or fields.get("train") is False or fields.get("weight") == 0:
        raise ValueError("marked not to be learned (label, train or weight); remove it")
    if unread := [name for name in NEEDED if not _is_empty(fields.get(name))]:
        raise ValueError(f"{unread[0]} is not read; write it into the instruction, or remove it")
    for key, names in READ.items():
        found = {name: fields.pop(name) for name in names if name in fields}
        filled = [text for text in found.values() if not _is_empty(text)]
        if len(filled) > 1 or not filled and key in ("instruction", "output"):
            raise ValueError(f"{len(filled) or 'no'} texts as {', '.join(found or names)}, one is "
                             f"needed; other fields: {', '.join(fields)}")
        example[key] = filled[0] if filled else ""
        if not isinstance(example[key], str):
            raise ValueError(f"{', '.join(found)} is no text but a {type(filled[0]).__name__}; put "
                             "chats under messages, rows of a table into one object each")
    if system := example.pop("system"):
        example["instruction"] = f"{system}\n\n{example['instruction']}"
    return example | fields


def _is_empty(value):
    return value in (None, [], {}) or value != value or not str(value).strip()  # NaN is not itself


def _one_turn(messages):
    """A conversation as fields: {"user message": text, "assistant message": text, ...}."""
    if not (isinstance(messages, list) and all(isinstance(m, dict) for m in messages)):
        raise ValueError("messages are a list of objects with role and content")
    roles = [str(m.get("role", m.get("from"))) for m in messages]
    roles = [{"human": "user", "gpt": "assistant"}.get(role, role) for role in roles]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(f"messages of {', '.join(roles)}; split them into records of (system,) "
                         "user, assistant")
    texts = [m.get("content", m.get("value")) for m in messages]
    read = {"role", "from", "content", "value"}
    others = {key: m[key] for m in messages for key in m.keys() - read}
    return others | {f"{role} message": text for role, text in zip(roles, texts)}


def split_examples(examples, train=0.85, test=0.10, shuffle=None) -> tuple[list, list, list]:
    """(train, val, test) in file order, as the book, or shuffled by a seed; val is what is left."""
    examples = list(examples)
    if shuffle is not None:
        random.Random(shuffle).shuffle(examples)
    a = int(len(examples) * train)
    b = a + int(len(examples) * test)
    return examples[:a], examples[b:], examples[a:b]


DATASETS = {  # name: place on raw.githubusercontent.com, sha256 where known
    "book": ("rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/instruction-data.json",
             "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944"),
    "alpaca": ("tatsu-lab/stanford_alpaca/main/alpaca_data.json", None),
}
WANTED = ("needed is a JSON array or JSON lines (one record a line), in UTF-8; for tables: pandas' "
          "to_json(path, orient='records', lines=True)")
KINDS = {  # how files begin that are brought as data, and what they are
    b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip or xlsx", b"\xfd7zXZ": "xz", b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff": "arrow",
    b"\x80": "a pickle", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"<": "a web page",
    b"version https://git-lfs": "a git-lfs pointer (git lfs pull)", b"[": "", b"{": "",
    b"": "empty, csv or text",
}


@dataclass(frozen=True)
class Parts:
    train: list[dict]
    val: list[dict]
    test: list[dict]
    positions: list[int]  # of the training records in their file, from 0
    split: str  # "file order", "shuffled" or "folder"
    sha256: str  # of the file, or of a folder's files one after another
    rows: int
    notes: list[str]


def load_parts(path_or_name, split=None) -> Parts:
    """Read and split; a user's file is shuffled, as files sorted by kind are common.

    `split` forces "file order" or "shuffled" upon a file. Raises FileNotFoundError, or ValueError
    naming file, record (from 1), line and remedy.
    """
    name, files = str(path_or_name), _files(str(path_or_name))
    parts, counts = zip(*(_read(path, leave_out_empty=name == "alpaca") for path in files))
    left_out = sum(counts) - sum(map(len, parts))
    if len(files) > 1:
        split = "folder"
    else:
        split = split or ("file order" if name in ("tiny", *DATASETS) else "shuffled")
        parts = split_examples(parts[0], shuffle=123 if split == "shuffled" else None)
    positions = [position for position, _ in parts[0]]
    train, val, test = ([e for _, e in part] for part in parts)
    unused = {key for e in train for key in e if not _is_empty(e[key])} - USED
    prompts = set(map(format_prompt, train))
    seen = sum(format_prompt(e) in prompts for e in test)
    notes = {f"{left_out} of {sum(counts)} records have no output and are left out": left_out,
             f"fields that nothing uses: {', '.join(sorted(unused))}": unused,
             f"{seen} of {len(test)} test prompts also stand in the training part": seen}
    notes = [note for note, there in notes.items() if there]
    sha256 = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return Parts(train, val, test, positions, split, sha256, sum(counts), notes)


def load_examples(path_or_name) -> list[dict]:
    """All records in the order of the file; of a folder: train, test, val."""
    parts = load_parts(path_or_name, split="file order")
    return parts.train + parts.test + parts.val


def _files(name):
    path = TINY / "instructions.json" if name == "tiny" else Path(name)
    if name in DATASETS:
        place, sha256 = DATASETS[name]
        url = f"{os.environ.get('DATA_ENDPOINT') or 'https://raw.githubusercontent.com'}/{place}"
        cache = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
        path = cache / "gpt2-finetune" / "data" / f"{name}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():  # fetched whole or not at all
                torch.hub.download_url_to_file(url, path, sha256, progress=False)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"{url}: {error}; or put it into {path}") from None
    files = [path]
    if path.is_dir():
        files = [path / f"{part}.jsonl" for part in ("train", "val", "test")]
        files = [file if file.is_file() else file.with_suffix(".json") for file in files]
    if absent := [str(file) for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{absent[0]}: no such file; give a JSON file, a folder of train, "
                                f"val and test, or {', '.join(['tiny', *DATASETS])}")
    return files


def _read(path, leave_out_empty):
    """([(position, example)], number of records) of a JSON array or JSON lines, by content."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip()
    start = content.lstrip().partition(b"\n")[0].rstrip()
    if kind := next(kind for magic, kind in KINDS.items() if start.startswith(magic)):
        raise ValueError(f"{path} is {kind}; {WANTED}")
    lines = content.split(b"\n") if start.startswith(b"{") and start.endswith(b"}") else [content]
    examples, rows, bad = [], 0, []
    for n, line in enumerate(lines, 1):
        try:
            values = json.loads(line) if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {n}: not JSON ({error}); {WANTED}") from None
        for record in values if isinstance(values, list) else [values]:
            rows += 1
            try:
                if not (leave_out_empty and _is_empty(record["output"])):
                    examples.append((rows - 1, to_example(record)))
            except ValueError as error:
                bad.append(f"record {rows} (line {n}): {error}")
    if bad or not rows:
        raise ValueError(f"{path}: {len(bad)} of {rows} records are bad: {'; '.join(bad[:3])}")
    return examples, rows


# GPT-2's files spell a byte as itself where that prints, else as the next character from U+0100.
PRINTS = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
OTHERS = [b for b in range(256) if b not in PRINTS]
CHAR_TO_BYTE = {chr(b): b for b in PRINTS} | {chr(256 + n): b for n, b in enumerate(OTHERS)}


def load_tokenizer(name_or_folder) -> tiktoken.Encoding:
    """GPT-2's byte-level BPE by name (`tiny`, `gpt2`, ...) or from a model folder's tokenizer.json,
    else vocab.json and merges.txt. Raises ValueError where tiktoken would make other ids."""
    if name_or_folder in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"):
        return tiktoken.get_encoding("gpt2")  # all have the same
    folder = TINY / "model" if name_or_folder == "tiny" else Path(name_or_folder)
    if (folder / "tokenizer.json").is_file():
        spec = json.loads((folder / "tokenizer.json").read_bytes())
        vocab, merges, cut = spec["model"]["vocab"], spec["model"]["merges"], spec["pre_tokenizer"]
        special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        wrong = [token["content"] for token in spec["added_tokens"] if not token["special"]]
        if not cut or cut["type"] != "ByteLevel" or cut["add_prefix_space"]:
            wrong.append("its way to cut text")
    else:
        vocab = json.loads((folder / "vocab.json").read_bytes())
        merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line for line in merges if not line.startswith("#version")]
        special = {"<|endoftext|>": vocab.get("<|endoftext|>")}
        wrong = [path.name for path in folder.glob("added_tokens.json")]
    tokens = sorted(vocab.keys() - special, key=vocab.get)
    ids = [*map(vocab.get, tokens), *special.values()]
    if ({*tokens[:256]} != {*CHAR_TO_BYTE} or {*ids} != {*range(len(ids))}
            or tokens[256:] != ["".join(merge).replace(" ", "") for merge in merges]):
        wrong.append("its ids, which are not 0, 1, 2, ... in the order of merges")
    if wrong or "<|endoftext|>" not in special:
        raise ValueError(f"{folder}: the tokenizer is not like GPT-2's in {', '.join(wrong)}")
    ranks = {bytes(CHAR_TO_BYTE[char] for char in token): vocab[token] for token in tokens}
    return tiktoken.Encoding(str(folder), pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens=special)


def copy_tokenizer(source_folder, target_folder) -> None:
    """Copy the tokenizer's files byte for byte."""
    for path in Path(source_folder).iterdir():
        if path.name in ("vocab.json", "merges.txt") or "token" in path.name:
            (Path(target_folder) / path.name).write_bytes(path.read_bytes())


def main(argv=None) -> int:
    """Show data as the model sees it."""
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    parser.add_argument("--data", default="tiny", help="a file, a folder, tiny, book or alpaca")
    parser.add_argument("--model", default="tiny", help="a folder with a tokenizer, tiny or gpt2")
    parser.add_argument("--template", default="alpaca", choices=TEMPLATES)
    parser.add_argument("--max-length", type=int)
    args = parser.parse_args(argv)
    try:
        parts, tokenizer = load_parts(args.data), load_tokenizer(args.model)
        examples = parts.train + parts.val + parts.test
        encoded, kept = encode_examples(examples, tokenizer, args.template, args.max_length)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    lengths = [len(e.ids) for e in encoded]
    cut = sum(e.ids[-1] != tokenizer.eot_token for e in encoded)
    width = sum(len(b) * max(lengths[i] for i in b) for b in batches(lengths, 8, 0, 0))
    ids, n = encoded[0].ids, encoded[0].n_prompt
    print(f"{parts.split}: {len(parts.train)} train, {len(parts.val)} val, {len(parts.test)} test")
    print(*parts.notes, marker_note(tokenizer, args.template) or "", sep="\n")
    print(f"{min(lengths)} to {max(lengths)} ids; cut: {cut}, down to the prompt and left out: "
          f"{len(examples) - len(kept)}; padding in batches of 8: {1 - sum(lengths) / width:.1%}")
    print(f"\n{tokenizer.decode(ids[:n])}>>>{tokenizer.decode(ids[n:])}<<<")
    return 0


if __name__ == "__main__":
    sys.exit(main())
