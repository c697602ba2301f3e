"""The tables of experiments/README.md: each row is a few commands, run with several seeds.

Commands are run as they are printed, in the project's root. What is finished is read from its
folder as it is, so a table that was stopped goes on. A row is one pass over a quarter of the
training part, unless its commands say otherwise: a full pass takes most rows to the ceiling, where
methods do not differ. Forgetting is the loss on plain text (nats per token) after a row's runs,
minus before.

    python experiments/tables.py layers freezing ranks rates --figure methods.png
"""

import argparse
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from choose_layers import batch_size  # which finds the six files, too
from data import format_prompt
from evaluate import read_records, text_nll
from gpt import load_model, read_json
from shape_data import response_tokens

ROOT = Path(__file__).resolve().parents[1]
QUALITY = ["exact match %", "response NLL", "forgetting"]
COLUMNS = {
    "layers": ["trainable", *QUALITY], "rates": ["trainable", *QUALITY],
    "freezing": ["trainable", *QUALITY, "train - val loss", "steps to loss 0.8", "ms a step",
                 "peak MiB"],
    "ranks": ["trainable", *QUALITY, "saved MiB"], "stages": ["steps", *QUALITY],
    "length": ["steps", "response tokens", *QUALITY],
    "instructions": ["prompt tokens", "steps", "response tokens", *QUALITY]}
DIGITS = {"exact match %": 1, "response NLL": 3, "forgetting": 3, "train - val loss": 3,
          "saved MiB": 2}  # of the other columns none
DRAWN = ("rates: full.*(.e-4|1e-3)$", "rates: first.*(3e-4|1e-3)$", r"ranks: LoRA r = \d+$",
         r"freezing: last \d$", "ranks: hybrid, last", "layers: (blocks|2 drawn)")  # a colour each
slug = partial(re.sub, r"[^\w.]+", "-")  # a text as the name of a folder

# The rows. What stands in braces `fill` replaces: {model} and {data} by flags, or nothing for tiny.
FULL, LORA, HYBRID = "--trainable all", "--lora-r 8", "--lora-r 8 --trainable lora,last_block"
STAGES = ["/stage1", "/stage2", "/stage3"]
USUAL, REPEATED = "--max-examples {n} --epochs 1", "--max-examples {quarter} --epochs 4"

def finetune(flags: str, model="{model}", data="{data}", out="{out}", seed="{seed}") -> str:
    """A run; USUAL, where the flags do not say how long."""
    flags += "" if re.search("epochs|steps", flags) else f" {USUAL}"
    return f"python finetune.py {model}{data}{flags} --seed {seed} --out {out}"

def chosen(rule: str) -> str:
    """The policy that a rule chooses, put into a command by the shell."""
    return f'"$(python experiments/choose_layers.py {{model}}{{data}}--by {rule} --seed {{seed}})"'

def shaped(shape: str, flags: str, stages=("",)) -> str:
    """A data folder and a run on it, or on each of its stages, from the last one's model. The seeds
    share the folder unless something is drawn by chance."""
    folder, model = "{out}-data" if "{seed}" in shape else "{name}-data", "{model}"
    line = f"python experiments/shape_data.py {{model}}--data {{source}} {shape} --out {folder}"
    for stage in stages:
        out = "{out}" + ("" if stage == stages[-1] else stage.replace("/", "-"))
        line += " && " + finetune(flags, model, f"--data {folder}{stage} ", out)
        model = f"--model {out} "
    return line

def chain(flags: str) -> str:
    """A run, its adapter merged, and a run from there, with other adapters in another order."""
    merge = "python lora.py merge --base {base} --adapter {out}-first/adapter --out {out}-merged"
    second = finetune(flags, model="--model {out}-merged ", seed="{seed}0")
    return f"{finetune(flags, out='{out}-first')} && {merge} && {second}"

ROWS = {  # table: label: flags of finetune.py, or all commands
    "layers": {label: f"--trainable {policy}" for label, policy in {
        "all": "all", "last 2": "last:2", "first 2": "first:2", "random 2": chosen("random --k 2"),
        "2 of largest relative gradient norm": chosen("rgn --k 2"),
        "2 of most signal in their spectrum": chosen("spectrum --k 2"),
        "2 drawn every 10 steps (LISA), and embeddings, norms": "lisa:2@10,embeddings,norms",
        "all, 4 passes over a quarter of these": f"all {REPEATED}",
        "the same, unfreezing one block more each pass": f"gradual:1 {REPEATED}",
        "the same, with rates decayed by depth": f"gradual:1 --lr-decay 0.38 {REPEATED}"}.items()},
    "freezing": {
        "all": FULL, **{f"last {k}": f"--trainable last:{k}" for k in (3, 2, 1)},
        "first 2": "--trainable first:2",
        **{f"last {k}, lr 1e-3": f"--trainable last:{k} --lr 1e-3" for k in (2, 1)},
        **{f"{kind}, lr 3e-3": f"--trainable {kind} --lr 3e-3" for kind in ("norms", "biases")},
        "LoRA": LORA,
        **{f"{label}, 10 passes over 100 records": f"{flags} --max-examples 100 --epochs 10" for
           label, flags in {"all": FULL, "last 1": "--trainable last:1", "LoRA": LORA}.items()}},
    "ranks": {
        "full": FULL, **{f"LoRA r = {r}": f"--lora-r {r}" for r in (1, 4, 8, 32)},
        "hybrid, last block full": HYBRID,
        "hybrid, a fifth full, by score":
            f"{LORA} --trainable {chosen('shortfall --share 0.2 --lora-r 8')}",
        "hybrid, a random block full": f"{LORA} --trainable lora,{chosen('random --k 1')}",
        "LoRA r = 8, 2 passes over half of these": f"{LORA} --max-examples {{half}} --epochs 2",
        "the same, merged and begun anew": chain(f"{LORA} --max-examples {{half}} --epochs 1")},
    "rates": {  # in a hybrid the adapters' rate is ten times this
        f"{label}, lr {lr}": f"{flags} --lr {lr}" for label, flags, rates in (
            ("full", FULL, "1e-4 2e-4 3e-4 1e-3 3e-3"), ("LoRA", LORA, "1e-3 3e-3 1e-2 3e-2"),
            ("hybrid", HYBRID, "1e-4 3e-4 1e-3"),
            ("first 2", "--trainable first:2", "1e-4 3e-4 1e-3")) for lr in rates.split()},
    "length": {"all": "{steps}", **{
        f"{n} {how}": shaped(f"--n {n} --select {how}{drawn}", "{steps}")
        for n in (50, 100, 200, 400) for how, drawn in (
            ("random", " --seed {seed}"), ("longest", ""), ("shortest", ""), ("ifd", ""))}},
    "instructions": {
        "short": FULL, "long": shaped("--instruction long", USUAL),
        "adaptive": shaped("--instruction adaptive", USUAL),
        "loss on the prompt too": "--loss-on all",
        "answer alone, all records": "--epochs 1",
        "worked solution, answer": shaped("--response rationale", "{all_steps}"),
        "draft, correction, answer": shaped("--response reflection", "{all_steps}")},
    "stages": {"shuffled": "--max-examples {n} --epochs 2 --max-steps {staged}", **{
        label: shaped(f"--n {{n}} --stages 3 --by {by} --seed {{seed}}", "--epochs 1", STAGES)
        for label, by in {"random stages": "random", "by length": "length", "by level": "level",
                          "by IFD": "ifd", "by IFD, reversed": "ifd --reverse"}.items()}}}

def rows_of(table: str, n_layer: int) -> dict[str, list[str]]:
    """{label: commands}. To `layers` each block alone is added, and the other pairs; of more than
    four blocks those with the first and those of neighbours, and the lower and the upper half."""
    rows = dict(ROWS[table])
    if table == "layers":
        rows |= {f"block {i} alone": f"--trainable blocks:{i}" for i in range(n_layer)}
        rows |= {f"blocks {i} and {j}": f"--trainable blocks:{i},{j}"
                 for i in range(n_layer - 2) for j in range(max(i + 1, 2), n_layer)
                 if n_layer <= 4 or i == 0 or j == i + 1}
        rows |= {f"{end} half": f"--trainable {end}:{n_layer // 2}" for end in ("first", "last")
                 if n_layer > 4}
    return {label: [*(line if line.startswith("python") else finetune(line)).split(" && "),
                    "python evaluate.py {text}{out}"] for label, line in rows.items()}

def load_base(name: str, data: str, text: str | None, out: str | None) -> SimpleNamespace:
    """What all rows start from, and what the commands need to know of it."""
    model, tokenizer = load_model(name, "cpu")
    names = ["tables", *(own for own in (name, data, text) if own not in ("tiny", None))]
    base = SimpleNamespace(
        model=name, data=data, text=text or ("tiny/heldout.txt" if name == "tiny" else None),
        out=out or f"runs/{slug(' '.join(names))}", n_layer=model.config.n_layer,
        batch_size=batch_size(model), tokenizer=tokenizer, text_nll=None,
        tokens_of=cache(partial(response_tokens, tokenizer, model.config.block_size)))
    if base.text:
        plain = Path(base.text).read_text(encoding="utf-8")
        base.text_nll = text_nll(model, tokenizer.encode_ordinary(plain))
    return base

def fill(command: str, base, name: str, seed: int) -> str:
    """The command with what stood in braces. {steps} and {all_steps}: as many as it takes, on the
    data of the command, to train on as many response tokens as a quarter of the records has, or as
    all have."""
    values, size, path = {}, base.batch_size, shlex.quote(f"{base.out}/{slug(name)}")
    for key, given in ("model", base.model), ("data", base.data), ("text", base.text):
        values[key] = f"--{key} {shlex.quote(given)} " if given not in ("tiny", None) else ""
    tokens = base.tokens_of(base.data)
    n = round(len(tokens) / 4)
    values |= {"base": shlex.quote(base.model), "source": shlex.quote(base.data),
               "seed": seed, "name": path, "out": f"{path}-seed{seed}", "n": n, "half": n // 2,
               "quarter": n // 4, "staged": math.ceil(16 / 15 * n / size)}  # a tenth comes twice
    if "steps}" in command:
        folder = re.search(r"--data (\S+)", command)
        own = base.tokens_of(shlex.split(folder[1].format(**values))[0] if folder else base.data)
        per_pass = math.ceil(len(own) / size)
        share = sum(tokens.values()) / sum(own.values())
        steps = round((share if "{all" in command else share * n / len(tokens)) * per_pass) or 1
        values["steps"] = values["all_steps"] = (
            f"--batch-size {size} --epochs {math.ceil(steps / per_pass)} --max-steps {steps}")
    return command.format(**values)

def execute(command: str) -> int:
    """Run a command with this Python, output on stderr. Ctrl-C reaches it too; it is waited for."""
    here = shlex.quote(sys.executable) + " "
    command = re.sub(r"\bpython (?=\S+\.py)", lambda match: here, command)
    process = subprocess.Popen(command, shell=True, stdout=2)
    try:
        return process.wait()
    finally:
        process.wait()

def run_row(templates: list[str], base, name: str, seed: int) -> tuple[list[str], list[Path]]:
    """Run what is not finished: the commands, and the folders of runs, none where one failed."""
    print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
    commands, runs = [], []
    for template in templates:
        commands.append(command := fill(template, base, name, seed))
        script, out = command.split()[1], Path(shlex.split(command)[-1])  # folders come last
        done = out / {"finetune.py": "run.json", "evaluate.py": "scores.json"}.get(script, "")
        if script == "finetune.py":
            runs.append(out)
            command += " --resume" if (out / "checkpoint.pt").exists() else " --overwrite"
        if not done.exists() and execute(command):
            print(f"error: not finished: {name}, seed {seed}", file=sys.stderr)
            return commands, []
    return commands, runs

def measure(runs: list[Path], base) -> dict[str, float | None]:
    """What the columns show of a row under one seed: its last run; of steps and tokens the sum."""
    infos = [read_json(run / "run.json") for run in runs]
    metrics = [read_records(run / "metrics.jsonl") for run in runs]
    scores, info, last = read_json(runs[-1] / "scores.json"), infos[-1], metrics[-1]
    losses, times = ([line[key] for line in last] for key in ("train_loss", "seconds"))
    low = [i for i in range(5, len(losses) + 1) if statistics.fmean(losses[i - 5:i]) <= 0.8]
    prompts = [format_prompt(r) for r in read_records(runs[-1] / "responses.jsonl")]
    sizes = [base.tokens_of(info["flags"]["data"]) for info in infos]
    return {
        "trainable": max(span["trainable_parameters"] for span in info["freeze"]),
        "exact match %": 100 * scores["exact_match"], "response NLL": scores["response_nll"],
        "forgetting": scores["text_nll"] - base.text_nll if base.text else None,
        "train - val loss": info["train"]["train_loss"] - info["train"]["val_loss"],
        "steps to loss 0.8": low[0] if low else None,  # in training, the mean of five steps
        "ms a step": 1000 * statistics.median(b - a for a, b in zip([0, *times], times)),
        "saved MiB": sum(p.stat().st_size for p in runs[-1].glob("*/*.safetensors")) / 2**20,
        "steps": sum(map(len, metrics)), "peak MiB": info["train"]["peak_memory_bytes"] / 2**20,
        "response tokens": sum(size[position] for size, lines in zip(sizes, metrics)
                             for line in lines for position in line["records"]),
        "prompt tokens": statistics.fmean(len(base.tokenizer.encode_ordinary(p)) for p in prompts)}

def mean_and_error(values: list[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0
    return statistics.fmean(values), error

def cell(values: list[float | None], digits: int) -> str:
    """Mean ± standard error, or a dash where there is nothing."""
    if not values or None in values:
        return "-"
    mean, error = mean_and_error(values)
    return f"{mean:,.{digits}f}" + (f" ± {error:,.{digits}f}" if error else "")

def print_table(table: str, base, n_seeds: int) -> dict[str, list[dict]]:
    """Run and print a table row by row, and below it the commands: {"table: label": what `measure`
    gave for each seed, nothing where a row could not be finished}."""
    columns, measured, shown = COLUMNS[table], {}, ""
    print(f"| `{table}`, {n_seeds} seeds | {' | '.join(columns)} |")
    print("|" + " --- |" * (len(columns) + 1), flush=True)
    for label, templates in rows_of(table, base.n_layer).items():
        name = f"{table}: {label}"
        rows = [run_row(templates, base, name, seed) for seed in range(1, n_seeds + 1)]
        results = [measure(runs, base) for _, runs in rows] if all(runs for _, runs in rows) else []
        cells = [cell([r[column] for r in results], DIGITS.get(column, 0)) for column in columns]
        print("| " + " | ".join([label, *cells]) + " |", flush=True)
        measured[name] = results
        shown += "\n".join([f"# {label}", *rows[0][0], ""])
    print("\n<details><summary>The commands, with seed 1</summary>\n")
    print(f"```\n{shown}```\n\n</details>\n")
    return measured

def draw(measured: dict[str, list[dict]], path: str) -> None:
    """Exact match against forgetting: a point for each row of DRAWN, with its standard errors."""
    from matplotlib.figure import Figure
    axes = (figure := Figure(figsize=(12, 8))).subplots()
    for i, family in enumerate(DRAWN):
        side, offset = ("right", (-4, 4)) if i > 3 else ("left", (4, -9))  # of the names
        for name in filter(re.compile(family).match, measured):
            (x, dx), (y, dy) = (mean_and_error([r[column] for r in measured[name]])
                                for column in ("forgetting", "exact match %"))
            axes.errorbar(x, y, dy, dx, "o", color=f"C{i}", markersize=4)
            label = name.partition(": ")[2].partition(" (")[0]
            axes.annotate(label, (x, y), offset, textcoords="offset points", ha=side, fontsize=8)
    axes.set(xscale="log", xmargin=0.1, xlabel="forgetting, nats/token", ylabel="exact match %")
    figure.savefig(path, bbox_inches="tight")

def parse_args(argv=None):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("tables", nargs="+", metavar="NAME", choices=list(COLUMNS), help=", ".join(COLUMNS))
    add("--model", default="tiny", help="a model folder or name (tiny)")
    add("--data", default="tiny", help="what finetune.py takes (tiny)")
    add("--text", metavar="FILE", help="plain text that measures forgetting (for tiny: its own)")
    add("--seeds", type=int, default=3, help="runs of each row, with --seed 1, 2, ... (3)")
    add("--out", metavar="FOLDER", help="of all runs (runs/tables, or a name for model and data)")
    add("--figure", metavar="FILE", help="draw exact match against forgetting (needs matplotlib)")
    args = parser.parse_args(argv)
    can_draw = find_spec("matplotlib") and (args.text or args.model == "tiny")
    if args.seeds < 1 or args.figure and not can_draw:
        parser.error("--seeds is at least 1, --figure needs matplotlib and --text")
    return args

def main(argv=None) -> int:
    os.chdir(ROOT)
    args, measured = parse_args(argv), {}
    try:
        base = load_base(args.model, args.data, args.text, args.out)
        for table in args.tables:
            measured |= print_table(table, base, args.seeds)
        if args.figure:
            draw({name: results for name, results in measured.items() if results}, args.figure)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 1
    return 0 if all(measured.values()) else 1

if __name__ == "__main__":
    sys.exit(main())
