"""
The tables of the README: each row is a command of finetune.py, run with several seeds and then scored.

Rows that are finished are read from their run folders, so an interrupted table goes on where it stopped.
Mean and standard error over the seeds; every row, also where nothing was found.

    python tiny/experiments.py                       # list the tables
    python tiny/experiments.py lora                  # run one and print it as Markdown
    python tiny/experiments.py layers --model path/to/gpt2 --data my-records.json --text story.txt
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# table -> (what it asks, rows: name -> flags). A row's command is `python finetune.py FLAGS`.
LORA = "--lora-r 8"
TABLES = {
    "bars": ("How far does the default run get, and is the base needed?", {
        "base (one step at a rate of nothing)": "--max-steps 1 --lr 1e-12", "default": "",
        "random weights, twice the epochs": "--model {random} --lr 1e-3 --epochs {twice}",
    }),
    "random": ("Learning rate from random weights", {
        f"random weights, lr {lr}": f"--model {{random}} --lr {lr} --epochs {{twice}}" for lr in ("3e-4", "1e-3", "3e-3")}),
    "lora": ("Full finetuning, adapters, and both", {
        "full": "", "LoRA r = 4": "--lora-r 4", "LoRA r = 8": "--lora-r 8", "LoRA r = 16": "--lora-r 16",
        "hybrid: LoRA r = 8 and the last block": f"{LORA} --trainable lora,last_block",
    }),
    "layers": ("Which blocks to train, at equal number?", {
        "all": "--trainable all", "last 2": "--trainable last:2", "first 2": "--trainable first:2", "random 2": "--trainable random:2",
        "largest relative gradient norm": "--trainable rgn:2", "spectrum": "--trainable spectrum:2",
        "gradual unfreezing": "--trainable gradual:1", "gradual, rates decayed by depth": "--trainable gradual:1 --lr-decay 0.38",
        "LISA, 2 blocks drawn every 20 steps": "--trainable lisa:2@20,embeddings,norms",
        **{f"block {i} alone": f"--trainable blocks:{i}" for i in range(4)},
    }),
    "freezing": ("What freezing saves, keeps and costs", {
        "all": "--trainable all", "last 3": "--trainable last:3", "last 2": "--trainable last:2", "last 1": "--trainable last:1",
        "norms": "--trainable norms", "biases": "--trainable biases", "LoRA": LORA,
    }),
    "rates": ("Learning rate of full finetuning, LoRA and the hybrid", {
        **{f"full, lr {lr}": f"--lr {lr}" for lr in ("1e-4", "3e-4", "1e-3")},
        **{f"LoRA, lr {lr}": f"{LORA} --lr {lr}" for lr in ("1e-3", "3e-3", "1e-2")},
        **{f"hybrid, lr {lr}": f"{LORA} --trainable lora,last_block --lr {lr}" for lr in ("1e-4", "3e-4", "1e-3")},
    }),
    "ranks": ("Rank of the adapters, and which matrices train fully", {
        **{f"LoRA r = {r}": f"--lora-r {r}" for r in (1, 2, 4, 8, 16, 32)},
        "hybrid, last block full": f"{LORA} --trainable lora,last_block", "hybrid, 10 % full by score": f"{LORA} --trainable hybrid:0.1",
        "hybrid, a random block full": f"{LORA} --trainable lora,random:1",
    }),
    "length": ("How much data, and which, for the same number of steps?", {
        f"{n} {how}": f"--max-examples {n} --select {how} --epochs 999 --max-steps {{steps}}"
        for n in (50, 100, 200, 400) for how in ("random", "longest", "shortest", "ifd")
    } | {"all": "--epochs 999 --max-steps {steps}"}),
    "instructions": ("Length of the instruction, weight on its tokens, kind of response", {
        "short": "", "long": "--instruction long", "adaptive": "--instruction adaptive",
        "weight 0.1": "--loss-on 0.1", "weight 0.5": "--loss-on 0.5", "weight 1": "--loss-on all",
        "worked solution, then answer": "--response rationale", "draft, correction, answer": "--response reflection",
    }),
    "stages": ("Simple before complex?", {
        "shuffled": "--epochs {epochs}",
        **{name: f"--curriculum={kind} --stages 3 --epochs {{epochs}}" for name, kind in (
            ("by length", "length"), ("by level", "level"), ("by IFD", "ifd"), ("by IFD, reversed", "-ifd"), ("random stages", "random"))},
    }),
}
COLUMNS = (  # heading, where it stands in (run.json, scores.json), factor, digits
    ("trainable", lambda run, scores: run["freeze"]["trainable_parameters"], 1, 0),
    ("exact match %", lambda run, scores: scores["exact_match"], 100, 1),
    ("response NLL", lambda run, scores: scores["response_nll"], 1, 3),
    ("forgetting, nats/token", lambda run, scores: scores["forgetting"], 1, 3),
    ("train - val loss", lambda run, scores: run["train"]["train_loss"] - run["train"]["val_loss"], 1, 3),
    ("seconds", lambda run, scores: run["train"]["seconds"], 1, 0),
    ("peak MiB", lambda run, scores: run["train"]["peak_memory_bytes"], 2**-20, 0),
    ("saved MiB", lambda run, scores: scores["saved_bytes"], 2**-20, 2),
)


def run_row(out: Path, flags: list[str], text: str | None) -> tuple[dict, dict]:
    """(run.json, scores.json) of one row and seed; trains and scores it unless that has been done."""
    if not (out / "run.json").exists():
        mode = ["--resume"] if (out / "checkpoints").exists() else ["--overwrite"]
        subprocess.run([sys.executable, str(ROOT / "finetune.py"), *flags, "--out", str(out), *mode], check=True, stdout=sys.stderr)
    if not (out / "scores.json").exists():
        subprocess.run([sys.executable, str(ROOT / "evaluate.py"), str(out), *(["--text", text] if text else [])],
                       check=True, stdout=subprocess.DEVNULL)
    run, scores = (json.loads((out / name).read_text()) for name in ("run.json", "scores.json"))
    weights = [p for part in ("model", "adapter") for p in (out / part).glob("*.safetensors")]
    return run, scores | {"saved_bytes": sum(p.stat().st_size for p in weights)}


def cell(values: list, factor: float, digits: int) -> str:
    """mean +- standard error, or a dash where there is nothing."""
    if any(v is None for v in values):
        return "-"
    values = [v * factor for v in values]
    mean = f"{statistics.fmean(values):,.{digits}f}"
    if len(values) == 1 or max(values) == min(values):
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):,.{digits}f}"


def random_model(folder: Path) -> Path:
    """A model of the embedded one's shape with random weights, its tokenizer beside it."""
    if not (folder / "config.json").exists():
        sys.path.insert(0, str(ROOT))
        import torch

        from data import load_tokenizer, save_tokenizer
        from gpt import GPT

        torch.manual_seed(0)
        GPT(GPT.from_pretrained("tiny").config).save_pretrained(folder)
        save_tokenizer(load_tokenizer("tiny"), folder)
    return folder


def main(argv=None) -> int:
    """Run the rows of one table and print it; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run one of the README's tables.")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("table", nargs="?", choices=TABLES, help="which (default: list them)")
    parser.add_argument("--model", default="tiny", help="a model folder or name")
    parser.add_argument("--data", default="tiny", help="a file of records or a name")
    parser.add_argument("--text", help="plain text on which forgetting is measured (default: the embedded one, for tiny)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default: 3)")
    parser.add_argument("--epochs", type=int, default=3, help="of a run whose row does not say (default: 3)")
    parser.add_argument("--steps", type=int, default=400, help="of every run in table length (default: 400)")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), help="where the run folders go")
    args = parser.parse_args(argv)
    if args.table is None:
        for name, (question, rows) in TABLES.items():
            print(f"{name:13} {question} ({len(rows)} rows)")
        return 0

    values = {"twice": 2 * args.epochs, "epochs": args.epochs, "steps": args.steps}
    if args.table in ("bars", "random"):
        values["random"] = random_model(args.out / "random-model")
    question, rows = TABLES[args.table]
    lines = [["", "flags", *(column[0] for column in COLUMNS)]]
    for name, template in rows.items():
        flags = template.format(**values).split()
        common = [] if "--model" in flags else ["--model", args.model]
        common += ["--data", args.data] + ([] if "--epochs" in flags else ["--epochs", str(args.epochs)])
        results = []
        for seed in range(1, args.seeds + 1):
            folder = "_".join(c.replace("/", "-") for c in [*flags, *common]) or "default"
            print(f"{args.table}: {name}, seed {seed}", file=sys.stderr, flush=True)
            results.append(run_row(args.out / f"{folder}-{seed}", [*flags, *common, "--seed", str(seed)], args.text))
        cells = [cell([get(*result) for result in results], factor, digits) for _, get, factor, digits in COLUMNS]
        lines.append([name, f"`{' '.join(flags)}`" if flags else "", *cells])
    print(f"{question} {args.seeds} seeds, mean ± standard error.\n")
    lines.insert(1, ["---"] * len(lines[0]))
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
