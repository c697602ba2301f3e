"""Prepare data for finetune.py: which records, in which form, in which order.

Reads what finetune.py reads and writes a folder that its --data takes: train.jsonl, val.jsonl and
test.jsonl, or such a folder for each stage. In this order: forms of the instruction and of the
response, in all three parts; selection and stages, in the training part alone. Difficulty is IFD
(arXiv 2308.12032): how much harder a response is after its prompt than after nothing. Stages, as
in arXiv 2406.04371, are runs, each from the last: finetune.py --data NEW/stage2 --model runs/one.

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

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the six files
from data import Encoded, encode_examples, format_prompt, load_parts  # noqa: E402
from evaluate import load_model, nlls  # noqa: E402
from gpt import choose_device  # noqa: E402

TAU = 0.05  # nats per token by which the short instruction may be worse, in adaptive forms


def reshape(example: dict, instruction="short", response=None) -> dict:
    """The record in another form; its other fields stay. instruction: "short" is its own, "long"
    its `instruction_long`. response: None as it is; "answer" alone; "rationale", the worked
    solution before it; "reflection", a wrong `draft` and the solution that corrects it. GSM8K's
    solutions, which end in "#### answer", are taken apart. ValueError for what it lacks."""
    solution, mark, answer = example["output"].rpartition("\n#### ")
    fields = dict(example)
    if mark and "\n" not in answer.strip():  # else it is a heading
        fields |= {"rationale": solution, "output": answer}

    def field(name):
        if not str(fields.get(name) or "").strip():
            raise ValueError(f"no text under {name!r}")
        return fields[name].strip()

    shaped = dict(example)
    if instruction == "long":
        shaped["instruction"] = field("instruction_long")
    if response == "answer":
        shaped["output"] = field("output")
    elif response == "rationale":
        shaped["output"] = f"{field('rationale')}\nAnswer: {field('output')}"
    elif response == "reflection":
        shaped["output"] = (f"{field('draft')}\nThat is wrong. {field('rationale')}\n"
                            f"Answer: {field('output')}")
    return shaped


def reshape_all(parts: dict, instruction: str, response: str | None) -> dict[str, list[dict]]:
    """Every part in this form; ValueError names the record that has not what it takes."""
    shaped = {part: [] for part in parts}
    for part, examples in parts.items():
        for i, example in enumerate(examples, 1):
            try:
                shaped[part].append(reshape(example, instruction, response))
            except ValueError as error:
                begin = textwrap.shorten(example["instruction"], 50)
                raise ValueError(f"{part} record {i} ({begin}): {error}") from None
    return shaped


def nats_per_token(model, tokenizer, examples: list[dict]) -> list[float]:
    """Loss of each response after its prompt; inf where the model has no room for it."""
    losses = [math.inf] * len(examples)
    encoded, kept = encode_examples(examples, tokenizer, max_length=model.config.block_size)
    for i, (nats, n) in zip(kept, nlls(model, encoded)):
        losses[i] = nats / n
    return losses


def difficulties(model, tokenizer, examples: list[dict]) -> list[float]:
    """IFD of each, exp(s(y|x) - s(y)), s in nats per token. Small: the instruction says it all; 1
    and above: it does not help. inf where the model has no room for the response."""
    scores = [math.inf] * len(examples)
    encoded, kept = encode_examples(examples, tokenizer, max_length=model.config.block_size)
    alone = [Encoded([tokenizer.eot_token, *e.ids[e.n_prompt:]], 1) for e in encoded]
    for i, (after, n), (before, _) in zip(kept, nlls(model, encoded), nlls(model, alone)):
        scores[i] = math.exp((after - before) / n)
    return scores


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


def select(scores: list[float], how: str | None, n: int, seed: int) -> list[int]:
    """Indices of n records, in their order. scores: lengths, or difficulties for ifd, which takes
    the largest below 1. None takes the first n. ValueError where there are not so many."""
    chosen = [i for i, score in enumerate(scores) if how != "ifd" or score < 1]
    if n > len(chosen):
        raise ValueError(f"--n {n}: only {len(chosen)} training records can be had")
    if how == "random":
        return sorted(random.Random(f"select {seed}").sample(chosen, n))
    sign = {None: 0, "shortest": 1, "longest": -1, "ifd": -1}[how]
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


def measure(examples: list[dict], by: str | None, model, tokenizer, seed: int) -> list[float]:
    """What records are selected or ordered by, one number each."""
    if by == "ifd":
        return difficulties(model, tokenizer, examples)
    if by == "random":
        rng = random.Random(f"order {seed}")
        return [rng.random() for _ in examples]
    if by == "level":
        for i, example in enumerate(examples, 1):
            if not isinstance(example.get("level"), (int, float)):
                raise ValueError(f"train record {i}: no number under 'level', needed for --by level")
        return [example["level"] for example in examples]
    return [len(tokenizer.encode_ordinary(example["output"])) for example in examples]


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
    out = Path(args.out)
    if out.exists():
        raise FileExistsError(f"--out {out}: is there already; choose another")
    loaded = load_parts(args.data)
    parts = {"train": loaded.train, "val": loaded.val, "test": loaded.test}
    for part, examples in parts.items():
        if not examples:
            raise ValueError(f"{args.data}: too few records, the {part} part is empty")
    model, tokenizer = load_model(args.model, choose_device("auto"))
    if args.instruction == "adaptive":
        forms = (reshape_all(parts, form, args.response) for form in ("short", "long"))
        parts = adapt(model, tokenizer, *forms)
    else:
        parts = reshape_all(parts, args.instruction, args.response)
    train, lengths = parts["train"], measure(parts["train"], "length", model, tokenizer, args.seed)
    if args.n:
        scores = difficulties(model, tokenizer, train) if args.select == "ifd" else lengths
        chosen = select(scores, args.select, args.n, args.seed)
        train, lengths = [train[i] for i in chosen], [lengths[i] for i in chosen]
    stages = {"": list(range(len(train)))}
    if args.stages:
        if args.stages > len(train):
            raise ValueError(f"--stages {args.stages}: there are {len(train)} training records")
        scores = measure(train, args.by, model, tokenizer, args.seed)
        split = split_stages(scores, args.stages, args.reverse, args.seed)
        stages = {f"stage{i}": indices for i, indices in enumerate(split, 1)}
    write_folders(out, {folder: parts | {"train": [train[i] for i in indices]}
                        for folder, indices in stages.items()})
    for folder, indices in stages.items():
        own = [lengths[i] for i in indices]
        scale = f", {args.by} {scores[indices[0]]:.3g} and on" if folder else ""
        print(f"{out / folder}: {len(own)} of {len(parts['train'])} training records{scale}; "
              f"responses of {min(own)} to {max(own)} tokens, {sum(own) / len(own):.1f} on average")


def parse_args(argv=None):
    """The flags; exit code 2 for those that are missing, impossible or without effect."""
    parser = argparse.ArgumentParser(description="Write a data folder for finetune.py.")
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
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
    if args.select and args.n is None:
        parser.error("--select needs --n")
    if (args.stages is None) != (args.by is None) or args.reverse and not args.stages:
        parser.error("--stages and --by need each other, --reverse needs both")
    if min(args.n or 1, args.stages or 1) < 1 or 0 in (args.n, args.stages):
        parser.error("--n and --stages are at least 1")
    return args


def main(argv=None) -> int:
    """Write the folders; what the user gave wrong ends in one line on stderr."""
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    args = parse_args(argv)
    try:
        shape(args)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
