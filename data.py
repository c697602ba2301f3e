"""Instruction data: records, prompts, batches, the tokenizer.

A record becomes prompt ids + response ids + the end token. Prompt and response are tokenized
apart: their border is exact, the training prompt is byte for byte that of generation.
Text never becomes a control token.

    python data.py --data tiny
"""

import argparse
import hashlib
import json
import os
import random
import re
import sys
import warnings
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

warnings.filterwarnings("ignore", "Failed.*NumPy")
import tiktoken
import torch
from tiktoken_ext.openai_public import r50k_pat_str

TINY = Path(__file__).resolve().parent / "tiny"  # the embedded data and model
TEMPLATES = {  # before the input; its part; after it
    "alpaca": ("Below is an instruction that describes a task. Write a response that "
               "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n",
               "### Input:\n{input}\n\n", "### Response:\n"),
    "phi3": ("<|user|>\n{instruction}", "\n{input}", "\n<|assistant|>:\n"),
    "chatml": ("<|im_start|>user\n{instruction}", "\n{input}",
               "<|im_end|>\n<|im_start|>assistant\n"),
    "plain": ("{instruction}", "\n{input}", "\n"),
}

def format_prompt(example, template="alpaca"):
    """The text up to and including the response header."""
    before, input_part, after = TEMPLATES[template]
    return (before + (input_part if example.get("input") else "") + after).format_map(example)

# An example; ids: of prompt, response and, unless cut, the end token.
Encoded = namedtuple("Encoded", "ids n_prompt")
def encode_example(example, tokenizer, template="alpaca", max_length=None):
    """The first max_length ids; ValueError if none is of the response."""
    return encode_examples([example], tokenizer, template, max_length)[0][0]

def encode_examples(examples, tokenizer, template="alpaca", max_length=None):
    """(list[Encoded], index of each one's example), without those cut to their prompt."""
    encoded, kept = [], []
    for i, e in enumerate(examples):
        prompt = tokenizer.encode_ordinary(format_prompt(e, template))
        response = tokenizer.encode_ordinary(e["output"]) + [tokenizer.eot_token]
        ids = (prompt + response)[:max_length]
        if len(ids) > len(prompt):
            encoded.append(Encoded(ids, len(prompt)))
            kept.append(i)
    if not encoded or (max_length or 1) < 1:
        raise ValueError(f"max_length {max_length} leaves no response to {len(examples)} prompts")
    return encoded, kept

def collate(encoded, loss_on="response", ignore_index=-100):
    """Inputs ids[:-1] and targets ids[1:], (B, T) int64 each; loss_on is "response" or "all"."""
    width = max(len(e.ids) for e in encoded)
    inputs, targets = [], []
    for e in encoded:
        padding = width - len(e.ids)
        first = {"response": e.n_prompt, "all": 1}[loss_on]  # the first id with a loss
        inputs.append(e.ids[:-1] + e.ids[-1:] * padding)
        targets.append([ignore_index] * (first - 1) + e.ids[first:] + [ignore_index] * padding)
    return torch.tensor(inputs), torch.tensor(targets)

def n_targets(encoded, loss_on):
    """Supervised tokens."""
    return sum(len(e.ids) - (e.n_prompt if loss_on == "response" else 1) for e in encoded)

def share_beginnings(encoded, n_embd, dtype):
    """A batch as one row of N tokens, where what records begin with alike stands once (prefix
    sharing, arXiv 2410.20305). As its cache it shows a model of each token what it saw before:
    features are the same; dropout draws once. kept: (N,), the row's places in the flat (B, T);
    place: (B T,), those in the row. None if this saves less than a quarter."""
    ids = [torch.tensor(e.ids[:-1]) for e in encoded]
    ids = torch.nn.utils.rnn.pad_sequence(ids, True, -1)  # (B, T)
    alike = (ids[:, None] == ids).cumprod(-1)  # (B, B, T): to here
    first = alike.argmax(1)  # (B, T): the first record that begins so
    own = (first == torch.arange(len(ids))[:, None]) & (ids >= 0)
    kept, T, C = own.flatten().nonzero()[:, 0], ids.shape[1], n_embd
    n, N = len(kept), -(-len(kept) // 16) * 16  # whole tiles
    if N * (6 * C + N) > 0.75 * ids.numel() * (6 * C + T):
        return None
    kept = torch.nn.functional.pad(kept, (0, N - n))
    row, time = kept // T, kept % T
    seen = alike.bool()[row[:, None], row, time] & (time <= time[:, None])
    seen[:, n:] = 0
    mask = torch.where(seen, 0.0, -torch.inf).to(dtype)
    place = (own.flatten().cumsum(0) - 1).view_as(ids).gather(0, first).flatten()
    return SimpleNamespace(kept=kept, place=place, advance=lambda T: time[None],
                           append=lambda layer, k, v: (k, v, mask))

def chunks(encoded, size):
    """Batches, the shortest first."""
    order = sorted(encoded, key=lambda e: len(e.ids))
    return [order[i:i + size] for i in range(0, len(order), size)]

def batches(lengths, batch_size, seed, epoch):
    """Indices in batches of similar length, each once; a function of seed and epoch."""
    rng, n = random.Random(f"{seed}/{epoch}"), len(lengths)
    order = sorted(rng.sample(range(n), n), key=lengths.__getitem__)
    sizes = [min(batch_size, n - i) for i in range(0, n, batch_size)]
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

def to_example(record):
    """Any accepted record as instruction (after a system text), input, output, other fields."""
    if not isinstance(record, dict):
        raise ValueError("not an object with named fields")
    json.dumps(record, ensure_ascii=False).encode()  # ValueError: half a character
    rest, example = dict(record), {}
    chat = "conversations" if _is_empty(rest.get("messages")) else "messages"
    if not _is_empty(rest.get(chat)):
        rest |= _one_turn(rest.pop(chat))
    for name, value in rest.items():
        mark = name.removeprefix("assistant ")
        if mark in MARKS and value == 0 or mark == "label" and value is False:
            raise ValueError(f"marked not to be learned ({name}); remove it")
        if name.rpartition(" ")[2] in NEEDED and not _is_empty(value):
            raise ValueError(f"{name} is not read; put it into the instruction, or remove it")
    for key, names in READ.items():
        found = {name: rest.pop(name) for name in names if name in rest}
        texts = [text for text in found.values() if not _is_empty(text)]
        if len(texts) > 1 or not texts and key in ("instruction", "output"):
            raise ValueError(f"{len(texts)} texts, not 1, as {list(found or names)} in {[*record]}")
        if texts and not isinstance(texts[0], str):
            raise ValueError(f"{[*found]} is no text; chats go in messages, tables by rows")
        example[key] = "".join(texts)
    if system := example.pop("system"):
        example["instruction"] = f"{system}\n\n{example['instruction']}"
    return example | rest

def _is_empty(value):
    return value in (None, [], {}) or value != value or not str(value).strip()  # NaN is not itself

def _one_turn(messages):
    if not isinstance(messages, list) or {*map(type, messages)} != {dict}:
        raise ValueError("messages must be a list of objects")
    fields, roles = {}, []
    for m in map(dict, messages):
        role = str(m.pop("role", m.pop("from", None)))
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        roles.append(role)
        fields[f"{role} message"] = m.pop("content", m.pop("value", None))
        fields |= {f"{role} {key}": value for key, value in m.items()}
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(f"messages of {', '.join(roles)}; split them into one user, one assistant")
    return fields

def split_examples(examples, train=0.85, test=0.10, shuffle=None):
    """(train, val, test) in file order, as in the book, or shuffled by a seed."""
    if shuffle is not None:
        examples = random.Random(shuffle).sample(examples, len(examples))
    a = int(len(examples) * train)
    b = a + int(len(examples) * test)
    return examples[:a], examples[b:], examples[a:b]

GITHUB = "https://raw.githubusercontent.com"
DATASETS = {  # place, sha256
    "book": ("rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/instruction-data.json",
             "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944"),
    "alpaca": ("tatsu-lab/stanford_alpaca/main/alpaca_data.json", None),
}
WANTED = "needed is UTF-8 JSON: an array or lines (pandas: to_json(PATH, orient='records'))"
KINDS = {  # how files begin
    b"\x1f\x8b": "gzip", b"PK": "zip or xlsx", b"\xfd7zXZ": "xz", b"PAR1": "parquet",
    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"<": "a web page", b"[": "", b"{": "",
    b"version https://git-lfs": "a pointer (git lfs pull)", b"": "empty, csv, text or binary",
}

# positions: of train in its file, from 0; split: "file order", "shuffled" or "folder".
Parts = namedtuple("Parts", "train val test positions split sha256 rows notes")
def load_parts(path_or_name, split=None):
    """Read and split. A user's file is shuffled, as it may be sorted by kind, unless split is "file
    order". Errors name file and record (from 1)."""
    name = str(path_or_name)
    files = _files(name)
    parts, counts = zip(*(_read(path, name == "alpaca") for path in files))
    left_out = sum(counts) - sum(map(len, parts))
    if len(files) > 1:
        split = "folder"
    else:
        if split in (None, "folder"):
            split = "file order" if name in ("tiny", *DATASETS) else "shuffled"
        parts = split_examples(parts[0], shuffle=123 if split == "shuffled" else None)
    train, val, test = ([e for _, e in part] for part in parts)
    if not train:
        raise ValueError(f"{files[0]}: at least 2 records are needed")
    unused = {key for e in train for key in e if not _is_empty(e[key])} - USED
    prompts = set(map(format_prompt, train))
    seen = sum(format_prompt(e) in prompts for e in test)
    notes = [left_out and f"{left_out} records have no output and are left out",
             unused and f"fields that nothing uses: {', '.join(sorted(unused))}",
             seen and f"{seen} of {len(test)} test prompts also stand in the training part"]
    sha256 = hashlib.sha256(b"\0".join(map(Path.read_bytes, files))).hexdigest()
    positions = [n for n, _ in parts[0]]
    return Parts(train, val, test, positions, split, sha256, sum(counts), [*filter(None, notes)])

def load_examples(path_or_name):
    """All records in file order; of a folder: train, val, test."""
    name = str(path_or_name)
    return [e for path in _files(name) for _, e in _read(path, name == "alpaca")[0]]

def _files(name):
    path = TINY / "instructions.json" if name == "tiny" else Path(name)
    if name in DATASETS:
        place, sha256 = DATASETS[name]
        url = f"{GITHUB}/{place}"
        cache = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
        path = cache / f"gpt2-finetune/data/{name}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                torch.hub.download_url_to_file(url, path, sha256, progress=False)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"{url}: {error}; or put it into {path}")
    files = [path]
    if path.is_dir():
        files = [path / f"{part}.jsonl" for part in ("train", "val", "test")]
        files = [f if f.is_file() else f.with_suffix(".json") for f in files]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no {file}: give JSON, a folder, or tiny, book, alpaca")
    return files

def _read(path, skip_bad):
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip()
    start = content.lstrip().partition(b"\n")[0].rstrip()
    if kind := next(kind for first, kind in KINDS.items() if start.startswith(first)):
        raise ValueError(f"{path} is {kind}; {WANTED}")
    lines = content.split(b"\n") if start.startswith(b"{") and start.endswith(b"}") else [content]
    examples, rows, bad = [], 0, []
    for n, line in enumerate(lines, 1):
        try:
            values = json.loads(line.strip() or b"[]")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {n}: not JSON ({error}); {WANTED}")
        for record in values if isinstance(values, list) else [values]:
            rows += 1
            try:
                examples.append((rows - 1, to_example(record)))
            except ValueError as error:
                bad.append(f"record {rows} (line {n}): {error}")
    if bad and not skip_bad or not rows:
        raise ValueError(f"{path}: {len(bad)} of {rows} records are bad: {'; '.join(bad[:3])}")
    return examples, rows

END = "<|endoftext|>"
# In GPT-2's files a byte is its own character where that prints, else one from U+0100 on.
PRINTS = [b for b in range(33, 256) if chr(b).isprintable()]
OTHERS = [b for b in range(256) if b not in PRINTS]
CHAR_TO_BYTE = {chr(b): b for b in PRINTS} | {chr(256 + i): b for i, b in enumerate(OTHERS)}

def load_tokenizer(name_or_folder):
    """GPT-2's byte-level BPE by name, or from tokenizer.json, else vocab.json and merges.txt."""
    if name_or_folder in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"):
        return tiktoken.get_encoding("gpt2")
    folder = TINY / "model" if name_or_folder == "tiny" else Path(name_or_folder)
    file = folder / "tokenizer.json"
    if file.is_file():
        spec = json.loads(file.read_bytes())
        model, added = spec.get("model", {}), spec.get("added_tokens", [])
        vocab, merges = dict(model.get("vocab", {})), model.get("merges", [])
        special = {t["content"]: t["id"] for t in added}
        others = [t["content"] for t in added if not t["special"]]
        cut = spec.get("pre_tokenizer") or {}
        kind = cut.get("type"), cut.get("use_regex", True), cut.get("add_prefix_space")
        usual = kind == ("ByteLevel", True, False) and not spec.get("normalizer")
    else:
        vocab, usual = json.loads((folder / "vocab.json").read_bytes()), True
        lines = (folder / "merges.txt").read_text("utf-8").splitlines()
        merges = [line for line in lines if not line.startswith("#version")]
        special = {END: vocab.get(END)}
        others = [path.name for path in folder.glob("added_tokens.json")]
    for path in folder.glob("tokenizer_config.json"):  # transformers obeys it
        odd = r'"add_prefix_space": *true|"special": *false'
        usual &= not re.search(odd, path.read_text("utf-8"))
    tokens = sorted(vocab.keys() - special, key=vocab.get)
    ids = {*map(vocab.get, tokens), *special.values()}
    usual &= tokens[256:] == ["".join(merge).replace(" ", "") for merge in merges]
    usual &= {*tokens[:256]} == {*CHAR_TO_BYTE} and ids == {*range(len(tokens) + len(special))}
    if others or not usual or END not in special:
        raise ValueError(f"{folder}: not like GPT-2's in kind, ids, merges, added tokens {others}")
    ranks = {bytes(map(CHAR_TO_BYTE.get, token)): vocab[token] for token in tokens}
    return tiktoken.Encoding(
        str(folder), pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)

def copy_tokenizer(source, target):
    """Copy the tokenizer's files byte for byte."""
    for path in Path(source).iterdir():
        named = path.name in ("vocab.json", "merges.txt", "chat_template.jinja")
        if path.is_file() and (named or "token" in path.name):
            Path(target, path.name).write_bytes(path.read_bytes())

def main(argv=None):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    flag = parser.add_argument
    flag("--data", default="tiny", help="file, folder, tiny, book or alpaca")
    flag("--model", default="tiny", help="folder, tiny or gpt2")
    flag("--template", default="alpaca", choices=TEMPLATES)
    flag("--max-length", type=int)
    args = parser.parse_args(argv)
    try:
        parts, tokenizer = load_parts(args.data), load_tokenizer(args.model)
        examples = parts.train + parts.val + parts.test
        encoded, kept = encode_examples(examples, tokenizer, args.template, args.max_length)
    except (ValueError, OSError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 1
    lengths = [len(e.ids) for e in encoded]
    first, n = encoded[0]
    cut = sum(e.ids[-1] != tokenizer.eot_token for e in encoded)
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches(lengths, 8, 0, 0))
    print(f"{parts.split}: {len(parts.train)} train, {len(parts.val)} val, {len(parts.test)} test",
          *parts.notes, "", sep="\n")
    print(f"{min(lengths)} to {max(lengths)} ids; {cut} cut, {len(examples) - len(kept)} dropped")
    print(f"padding in batches of 8: {1 - sum(lengths) / padded:.1%}\n")
    print(f"{tokenizer.decode(first[:n])}>>>{tokenizer.decode(first[n:])}<<<")
    return 0

if __name__ == "__main__":
    sys.exit(main())
