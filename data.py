"""Instruction data: records, prompts, batches, the tokenizer.

A record becomes prompt ids + response ids + the end token. Prompt and response are tokenized
apart: the border between them is exact, and the training prompt is, byte for byte, the prompt in
generation. Text never becomes a control token. Checked against transformers' tokenizer and the
batches of Raschka's book, chapter 7.

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
TEMPLATES = {  # before the input; its part, if there is one; after it
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
    ids: list[int]  # of the prompt, the response and, unless cut, the end token
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
    """A line on markers of the template that are control tokens of the tokenizer."""
    own = sorted(t for t in tokenizer.special_tokens_set if t in "".join(TEMPLATES[template]))
    return f"in template {template}, {', '.join(own)} stays text" if own else None


def collate(encoded, loss_on="response", ignore_index=-100) -> tuple[Tensor, Tensor]:
    """Inputs ids[:-1] and targets ids[1:], (B, T) int64 each; loss_on is "response" or "all"."""
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
    order.sort(key=lambda i: lengths[i])
    full, rest = divmod(len(order), batch_size)
    sizes = [batch_size] * full + [rest] * (rest > 0)
    rng.shuffle(sizes)
    queue = iter(order)
    result = [[next(queue) for _ in range(size)] for size in sizes]
    rng.shuffle(result)
    return result


READ = {  # an example's texts: names in records
    "system": ("system", "system_prompt", "system message"),
    "instruction": ("instruction", "prompt", "question", "user message"),
    "input": ("input", "context"),
    "output": ("output", "completion", "answer", "response", "assistant message"),
}
MARKS = ("train", "training", "trainable", "weight", "loss_mask")
NEEDED = ("history", "choices", "options", "tools", "tool_calls", "images", "conversations")
USED = {"instruction", "input", "output", "task", "level", "instruction_long", "rationale", "draft"}


def to_example(record) -> dict:
    """Any accepted record as instruction (below a system text), input, output and other fields."""
    if not isinstance(record, dict):
        raise ValueError("not an object with named fields")
    json.dumps(record, ensure_ascii=False).encode()  # ValueError: half a character
    fields, example = dict(record), {}
    chat = "conversations" if _is_empty(fields.get("messages")) else "messages"
    if not _is_empty(fields.get(chat)):
        fields |= _one_turn(fields.pop(chat))
    if fields.get("label") is False or 0 in map(fields.get, MARKS):
        raise ValueError("marked not to be learned (label, weight, ...); remove it")
    if unread := [name for name in NEEDED if not _is_empty(fields.get(name))]:
        raise ValueError(f"{unread[0]} is not read; write it into the instruction, or remove it")
    for key, names in READ.items():
        found = {name: fields.pop(name) for name in names if name in fields}
        texts = [text for text in found.values() if not _is_empty(text)]
        if len(texts) > 1 or not texts and key in ("instruction", "output"):
            raise ValueError(f"{len(texts)} texts, not 1, as {list(found or names)} in {[*record]}")
        if texts and not isinstance(texts[0], str):
            raise ValueError(f"{[*found]} is no text; chats go in messages, tables by rows")
        example[key] = "".join(texts)
    if system := example.pop("system"):
        example["instruction"] = f"{system}\n\n{example['instruction']}"
    return example | fields


def _is_empty(value):
    return value in (None, [], {}) or value != value or not str(value).strip()  # NaN is not itself


def _one_turn(messages):
    if not (isinstance(messages, list) and all(isinstance(m, dict) for m in messages)):
        raise ValueError("messages must be a list of objects")
    roles = [str(m.get("role", m.get("from"))) for m in messages]
    roles = [{"human": "user", "gpt": "assistant"}.get(role, role) for role in roles]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(f"messages of {', '.join(roles)}; split them into one user, one assistant")
    others = {k: m[k] for m in messages for k in m if k not in ("role", "from", "content", "value")}
    texts = [m.get("content", m.get("value")) for m in messages]
    return others | {f"{role} message": text for role, text in zip(roles, texts)}


def split_examples(examples, train=0.85, test=0.10, shuffle=None) -> tuple[list, list, list]:
    """(train, val, test) in file order, as the book, or shuffled by a seed."""
    if shuffle is not None:
        examples = random.Random(shuffle).sample(examples, len(examples))
    a = int(len(examples) * train)
    b = a + int(len(examples) * test)
    return examples[:a], examples[b:], examples[a:b]


DATASETS = {  # place on raw.githubusercontent.com, sha256
    "book": ("rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/instruction-data.json",
             "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944"),
    "alpaca": ("tatsu-lab/stanford_alpaca/main/alpaca_data.json", None),
}
WANTED = "needed is UTF-8 JSON: an array or lines (pandas: to_json(PATH, orient='records'))"
KINDS = {  # how files begin
    b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip or xlsx", b"\xfd7zXZ": "xz", b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff": "arrow",
    b"\x80": "a pickle", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"<": "a web page", b"[": "",
    b"{": "", b"version https://git-lfs": "a pointer (git lfs pull)", b"": "empty, csv or text",
}


@dataclass(frozen=True)
class Parts:
    train: list[dict]
    val: list[dict]
    test: list[dict]
    positions: list[int]  # of train in its file, from 0
    split: str  # "file order", "shuffled" or "folder"
    sha256: str
    rows: int
    notes: list[str]


def load_parts(path_or_name, split=None) -> Parts:
    """Read and split. A user's file is shuffled, for files sorted by kind are common.

    `split` forces "file order" or "shuffled" upon a file. Errors name file and record (from 1).
    """
    name, files = str(path_or_name), _files(str(path_or_name))
    parts, counts = zip(*(_read(path, leave_out_empty=name == "alpaca") for path in files))
    left_out = sum(counts) - sum(map(len, parts))
    usual = "file order" if name in ("tiny", *DATASETS) else "shuffled"
    split = "folder" if len(files) > 1 else usual if split in (None, "folder") else split
    if len(files) == 1:
        parts = split_examples(parts[0], shuffle=123 if split == "shuffled" else None)
    train, val, test = ([e for _, e in part] for part in parts)
    unused = {key for e in train for key in e if not _is_empty(e[key])} - USED
    prompts = set(map(format_prompt, train))
    seen = sum(format_prompt(e) in prompts for e in test)
    notes = {f"{left_out} records have no output and are left out": left_out,
             f"fields that nothing uses: {', '.join(sorted(unused))}": unused,
             f"{seen} of {len(test)} test prompts also stand in the training part": seen}
    sha256 = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return Parts(train, val, test, [n for n, _ in parts[0]], split, sha256, sum(counts),
                 [note for note, there in notes.items() if there])


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
            raise FileNotFoundError(f"{url}: {error}; or put it into {path}")
    folder = ("train.jsonl", "val.jsonl", "test.jsonl") if path.is_dir() else ()
    files = [path / part for part in folder] or [path]
    files = [f.with_suffix(".json") if folder and not f.is_file() else f for f in files]
    if absent := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"no {absent[0]}: give JSON, a folder, or tiny, book, alpaca")
    return files


def _read(path, leave_out_empty):
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
            raise ValueError(f"{path}: line {n}: not JSON ({error}); {WANTED}")
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


# In GPT-2's files a byte is its own character where that prints, else one from U+0100 on.
PRINTS = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
OTHERS = [b for b in range(256) if b not in PRINTS]
CHAR_TO_BYTE = {chr(b): b for b in PRINTS} | {chr(256 + n): b for n, b in enumerate(OTHERS)}


def load_tokenizer(name_or_folder) -> tiktoken.Encoding:
    """GPT-2's byte-level BPE by name, or from tokenizer.json, else vocab.json and merges.txt."""
    if name_or_folder in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"):
        return tiktoken.get_encoding("gpt2")
    folder = TINY / "model" if name_or_folder == "tiny" else Path(name_or_folder)
    if (folder / "tokenizer.json").is_file():
        spec = json.loads((folder / "tokenizer.json").read_bytes())
        model, cut = spec["model"], {"use_regex": True, **(spec.get("pre_tokenizer") or {})}
        vocab, merges = model["vocab"], model.get("merges", [])
        special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        others = [token["content"] for token in spec["added_tokens"] if not token["special"]]
        kind = [cut.get(key) for key in ("type", "use_regex", "add_prefix_space")]
        usual = kind == ["ByteLevel", True, False] and not spec.get("normalizer")
    else:
        vocab, usual = json.loads((folder / "vocab.json").read_bytes()), True
        merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line for line in merges if not line.startswith("#version")]
        special = {"<|endoftext|>": vocab.get("<|endoftext|>")}
        others = [path.name for path in folder.glob("added_tokens.json")]
    tokens = sorted(vocab.keys() - special, key=vocab.get)
    ids = {*map(vocab.get, tokens), *special.values()}
    usual &= tokens[256:] == ["".join(merge).replace(" ", "") for merge in merges]
    usual &= {*tokens[:256]} == {*CHAR_TO_BYTE} and ids == {*range(len(tokens) + len(special))}
    if others or not usual or "<|endoftext|>" not in special:
        raise ValueError(f"{folder}: not like GPT-2's in ids, merges or added tokens {others}")
    ranks = {bytes(CHAR_TO_BYTE[char] for char in token): vocab[token] for token in tokens}
    return tiktoken.Encoding(str(folder), pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens=special)


def copy_tokenizer(source, target) -> None:
    """Copy the tokenizer's files byte for byte."""
    for path in Path(source).iterdir():
        if path.name in ("vocab.json", "merges.txt") or "token" in path.name:
            (Path(target) / path.name).write_bytes(path.read_bytes())


def main(argv=None) -> int:
    """Show data as the model sees it."""
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    parser.add_argument("--data", default="tiny", help="file, folder, tiny, book or alpaca")
    parser.add_argument("--model", default="tiny", help="folder, tiny or gpt2")
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
    lengths, n = [len(e.ids) for e in encoded], encoded[0].n_prompt
    cut = sum(e.ids[-1] != tokenizer.eot_token for e in encoded)
    width = sum(len(b) * max(lengths[i] for i in b) for b in batches(lengths, 8, 0, 0))
    print(f"{parts.split}: {len(parts.train)} train, {len(parts.val)} val, {len(parts.test)} test",
          *parts.notes, marker_note(tokenizer, args.template) or "", sep="\n")
    print(f"{min(lengths)} to {max(lengths)} ids; {cut} cut, {len(examples) - len(kept)} dropped")
    print(f"padding in batches of 8: {1 - sum(lengths) / width:.1%}\n")
    print(*map(tokenizer.decode, (encoded[0].ids[:n], encoded[0].ids[n:])), sep=">>>", end="<<<\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
