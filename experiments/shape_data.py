"""Prepare data for finetune.py: which records, in which form, in which order.

Reads what finetune.py reads and writes a folder that its --data takes: train.jsonl, val.jsonl and
test.jsonl, or such a folder for each stage. First it changes the form of instruction and response,
in all three parts; then it selects and splits into stages, in the training part alone. Stages
(arXiv 2406.04371) are runs, each from the last: finetune.py --data new/stage2 --model runs/first.

    python experiments/shape_data.py --data tiny --out short --select shortest --n 100
    python experiments/shape_data.py --data gsm8k.jsonl --model gpt2 --out new --response rationale
    python experiments/shape_data.py --data tiny --out staged --stages 3 --by length
"""

import argparse
import json
import math
import os
import random
import sys
import textwrap
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # by import torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the six files
from data import Encoded, encode_examples, format_prompt, load_parts
from evaluate import nlls
from gpt import choose_device, load_model

TAU = 0.05  # nats per token by which the short instruction may be worse, in adaptive forms

def reshape(example: dict, instruction="short", response=None) -> dict:
    """The record in another form; its other fields stay. instruction: "short" is its own, "long"
    its `instruction_long`. response: None as it is; "answer" alone; "rationale", the worked
    solution before it; "reflection", a wrong `draft` and the solution that corrects it. GSM8K's
    solutions, which end in "#### answer", are taken apart. ValueError for what it lacks."""
    shaped, fields = dict(example), dict(example)
    solution, mark, answer = example["output"].rpartition("\n#### ")
    if mark and "\n" not in answer.strip():  # else it is a heading
        fields |= {"rationale": solution, "output": answer}

    def field(name):
        text = fields.get(name)
        if not isinstance(text, str) or not text.strip():
            begin = textwrap.shorten(example["instruction"], 60)
            raise ValueError(f"the record {begin!r} has no text as {name}")
        return text.strip()

    if instruction == "long":
        shaped["instruction"] = field("instruction_long")
    if response == "answer":
        shaped["output"] = field("output")
    elif response:
        draft = f"{field('draft')}\nThat is wrong. " if response == "reflection" else ""
        shaped["output"] = f"{draft}{field('rationale')}\nAnswer: {field('output')}"
    return shaped

def response_tokens(tokenizer, max_length: int, data: str) -> dict[int, int]:
    """Those of each training record, by its position in its file, with the end token."""
    parts = load_parts(data)
    encoded, kept = encode_examples(parts.train, tokenizer, max_length=max_length)
    return {parts.positions[i]: len(e.ids) - e.n_prompt for i, e in zip(kept, encoded)}

def nats_per_token(model, tokenizer, examples: list[dict], alone=False) -> list[float]:
    """Loss of each response after its prompt, or alone, after nothing but an end token; inf where
    the model has no room for it."""
    losses = [math.inf] * len(examples)
    encoded, kept = encode_examples(examples, tokenizer, max_length=model.config.block_size)
    if alone:
        encoded = [Encoded([tokenizer.eot_token, *e.ids[e.n_prompt:]], 1) for e in encoded]
    for i, e, (nats, n) in zip(kept, encoded, nlls(model, encoded)):
        if e.ids[-1] == tokenizer.eot_token:  # else it is cut
            losses[i] = nats / n
    return losses

@torch.no_grad()
def entropies(model, tokenizer, examples: list[dict]) -> list[float]:
    """How unsure the model is of the first token of each answer, in nats: no reference is read."""
    result, device = [], next(model.parameters()).device
    for example in examples:
        ids = tokenizer.encode_ordinary(format_prompt(example))[:model.config.block_size]
        hidden = model.features(torch.tensor([ids], device=device))[0, -1]  # (C,)
        logits = model.lm_head(hidden).float()
        result.append(torch.distributions.Categorical(logits=logits).entropy().item())
    return result

def adapt(model, tokenizer, short: dict, long: dict) -> dict[str, list[dict]]:
    """Each record with its long instruction where the short one is not enough for the model, which
    is not yet tuned. Of training and validation records the reference decides; of test records
    alone how unsure the model is: more than of three quarters of the validation records."""
    takes_long = {}
    for part in ("train", "val"):
        losses = (nats_per_token(model, tokenizer, form[part]) for form in (short, long))
        takes_long[part] = [a > b + TAU for a, b in zip(*losses)]
    known = sorted(entropies(model, tokenizer, short["val"]))
    threshold = known[int(0.75 * len(known))]
    takes_long["test"] = [h > threshold for h in entropies(model, tokenizer, short["test"])]
    for part, flags in takes_long.items():
        print(f"{part}: {sum(flags)} of {len(flags)} records take the long instruction")
    return {part: [b if flag else a for flag, a, b in zip(flags, short[part], long[part])]
            for part, flags in takes_long.items()}

def measure(examples: list[dict], by: str | None, model, tokenizer, seed: int) -> list[float]:
    """What records are selected or ordered by: chance, level, length of the response in tokens, or
    IFD (arXiv 2308.12032), exp(s(y|x) - s(y)) with s in nats per token. Small: the instruction says
    it all; 1 and above: it does not help."""
    if by == "ifd":
        after, alone = (nats_per_token(model, tokenizer, examples, kind) for kind in (False, True))
        return [math.exp(a - b) if a < math.inf else a for a, b in zip(after, alone)]
    if by == "random":
        rng = random.Random(f"order {seed}")
        return [rng.random() for _ in examples]
    if by == "level":
        levels = [example.get("level") for example in examples]
        if not all(isinstance(level, (int, float)) for level in levels):
            raise ValueError("--by level: a training record has no number as level")
        return levels
    # Longest, shortest, None and the stages by length: tokens of the response.
    return [len(tokenizer.encode_ordinary(example["output"])) for example in examples]

def select(scores: list[float], how: str | None, n: int) -> list[int]:
    """Indices of n records, in their order, by what `measure` gives: for longest those of largest
    score, for ifd of these below 1, for shortest and random of smallest; None takes the first n.
    ValueError where there are not so many."""
    chosen = [i for i, score in enumerate(scores) if how != "ifd" or score < 1]
    if n > len(chosen):
        raise ValueError(f"--n {n}: only {len(chosen)} training records can be had")
    sign = {None: 0, "shortest": 1, "random": 1, "longest": -1, "ifd": -1}[how]
    return sorted(sorted(chosen, key=lambda i: sign * scores[i])[:n])  # ties: the first ones

def split_stages(scores: list[float], n_stages: int, reverse: bool, seed: int) -> list[list[int]]:
    """Indices in parts of equal size, from easy to hard or the reverse. A tenth of the earlier ones
    comes again in the last part, so that they are not forgotten."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i] if reverse else scores[i], i))
    bounds = [len(order) * stage // n_stages for stage in range(n_stages + 1)]
    stages = [order[a:b] for a, b in zip(bounds, bounds[1:])]
    earlier = order[:bounds[-2]]
    stages[-1] += random.Random(f"stages {seed}").sample(earlier, len(earlier) // 10)
    return stages

def write_folders(out: Path, folders: dict[str, dict[str, list[dict]]]) -> None:
    """Write {folder: {part: records}} below out, whole or not at all."""
    temp = Path(f"{out}.{os.getpid()}.tmp")
    for folder, parts in folders.items():
        (temp / folder).mkdir(parents=True)
        for part, examples in parts.items():
            lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
            (temp / folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    os.rename(temp, out)

def shape(args) -> None:
    """Forms, selection, stages; then the folders are written, and what was chosen is printed."""
    if Path(args.out).exists():
        raise FileExistsError(f"--out {args.out}: is there already; choose another")
    loaded = load_parts(args.data)
    parts = {"train": loaded.train, "val": loaded.val, "test": loaded.test}
    if not all(parts.values()):
        raise ValueError(f"{args.data}: too few records, a part is empty")
    model, tokenizer = load_model(args.model, choose_device("auto"))

    forms = ["short", "long"] if args.instruction == "adaptive" else [args.instruction]
    shaped = [{part: [reshape(example, form, args.response) for example in examples]
               for part, examples in parts.items()} for form in forms]
    parts = adapt(model, tokenizer, *shaped) if len(shaped) > 1 else shaped[0]

    train = parts["train"]
    if args.n:
        scores = measure(train, args.select, model, tokenizer, args.seed)
        train = [train[i] for i in select(scores, args.select, args.n)]
    folders = {"": train}
    if args.stages:
        if args.stages > len(train):
            raise ValueError(f"--stages {args.stages}: there are {len(train)} training records")
        scores = measure(train, args.by, model, tokenizer, args.seed)
        stages = split_stages(scores, args.stages, args.reverse, args.seed)
        folders = {f"stage{i}": [train[j] for j in stage] for i, stage in enumerate(stages, 1)}

    write_folders(Path(args.out), {name: parts | {"train": own} for name, own in folders.items()})
    for name, own in folders.items():
        lengths = measure(own, "length", model, tokenizer, args.seed)
        print(f"{Path(args.out, name)}: {len(own)} of {len(loaded.train)} training records, "
              f"responses of {min(lengths)} to {max(lengths)} tokens")

def parse_args(argv=None):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--data", required=True, help="what finetune.py takes: a file, a folder or a name")
    add("--out", required=True, help="folder to write")
    add("--model", default="tiny", help="measures lengths, IFD and what is enough (tiny)")
    add("--seed", type=int, default=123, help="of what is drawn by chance (123)")
    add("--instruction", choices=["short", "long", "adaptive"], default="short", help="(short)")
    add("--response", choices=["answer", "rationale", "reflection"], help="(as it is)")
    add("--select", choices=["random", "longest", "shortest", "ifd"], help="which --n records")
    add("--n", type=int, help="number of training records (all); without --select the first ones")
    add("--stages", type=int, help="number of stages")
    add("--by", choices=["length", "level", "ifd", "random"], help="what orders the stages")
    add("--reverse", action="store_true", help="from hard to easy")
    args = parser.parse_args(argv)
    if (args.select and args.n is None or (args.stages is None) != (args.by is None)
            or args.reverse and not args.stages):
        parser.error("--select needs --n, --stages and --by need each other, --reverse needs both")
    if any(number is not None and number < 1 for number in (args.n, args.stages)):
        parser.error("--n and --stages are at least 1")
    return args

def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        shape(args)
    except (ValueError, OSError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 1
    return 0

if __name__ == "__main__":
    sys.exit(main())
