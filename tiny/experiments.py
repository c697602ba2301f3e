"""
The tables of the README: each row is a command of finetune.py, run with several seeds and then scored.

Rows that are finished are read from their run folders (rows with the same flags share them), so an interrupted
table goes on where it stopped. Mean and standard error over the seeds; every row, also where nothing was found.

    python tiny/experiments.py                       # list the tables
    python tiny/experiments.py layers                # run one and print it as Markdown
    python tiny/experiments.py layers --model path/to/gpt2 --data my-records.json --text story.txt
"""

import argparse
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# name -> what is shown of a row: a function of (run.json with its metrics, scores.json), a factor, digits
COLUMNS = {
    "trainable": (lambda run, scores: run["freeze"]["trainable_parameters"], 1, 0),
    "exact match %": (lambda run, scores: scores["exact_match"], 100, 1),
    "response NLL": (lambda run, scores: scores["response_nll"], 1, 3),
    "forgetting, nats/token": (lambda run, scores: scores["forgetting"], 1, 3),
    "train - val loss": (lambda run, scores: run["train"]["train_loss"] - run["train"]["val_loss"], 1, 3),
    "steps to val loss 0.8": (lambda run, scores: steps_to(0.8, run["metrics"]), 1, 0),
    "seconds": (lambda run, scores: run["train"]["seconds"], 1, 0),
    "peak MiB": (lambda run, scores: run["train"]["peak_memory_bytes"], 2**-20, 0),
    "optimizer MiB": (lambda run, scores: 8 * run["freeze"]["trainable_parameters"], 2**-20, 2),  # two moments in fp32
    "saved MiB": (lambda run, scores: scores["saved_bytes"], 2**-20, 2),
    "steps": (lambda run, scores: run["train"]["steps"], 1, 0),
    "target tokens": (lambda run, scores: trained_targets(run), 1, 0),
    "prompt tokens": (lambda run, scores: run["train"]["prompt_tokens"], 1, 1),
}
QUALITY = ("exact match %", "response NLL", "forgetting, nats/token")
EVERYTHING = ("trainable", *QUALITY, "train - val loss", "seconds", "peak MiB", "saved MiB")

# table -> (what it asks, epochs, columns, rows: name -> flags). A row's command is `python finetune.py FLAGS`. Below 1, epochs is
# the share of the training records over which one pass is made. A row may use {n}: their number; {half}, {quarter} of it;
# {tokens}, {all_tokens}: --epochs and --max-steps for as many response tokens as these records, or all, have; {staged}: the steps
# of three stages over them; " then ": the adapter is merged, and training goes on from there.
LORA = "--lora-r 8"
HYBRID = "--lora-r 8 --trainable lora,last_block"
TABLES = {
    "bars": ("How far does the default run get, and is the base needed?", 3, EVERYTHING, {
        "base (one step at a rate of nothing)": "--max-steps 1 --lr 1e-12", "default": "",
        "random weights, twice the epochs": "--model {random} --lr 1e-3 --epochs {twice}",
    }),
    "random": ("Learning rate from random weights", 3, ("exact match %", "response NLL"), {
        f"random weights, lr {lr}": f"--model {{random}} --lr {lr} --epochs {{twice}}" for lr in ("3e-4", "1e-3", "3e-3")}),
    "lora": ("Full finetuning, adapters, and both", 3, EVERYTHING, {
        "full": "", "LoRA r = 4": "--lora-r 4", "LoRA r = 8": "--lora-r 8", "LoRA r = 16": "--lora-r 16",
        "hybrid: LoRA r = 8 and the last block": HYBRID,
    }),
    "layers": ("Which blocks to train, at equal number?", 0.25, ("trainable", *QUALITY), {
        "all": "--trainable all", "last 2": "--trainable last:2", "first 2": "--trainable first:2", "random 2": "--trainable random:2",
        "2 of largest relative gradient norm": "--trainable rgn:2", "2 of most signal in their spectrum": "--trainable spectrum:2",
        "2 drawn anew every 10 steps (LISA), and embeddings, norms": "--trainable lisa:2@10,embeddings,norms",
        **{f"blocks {i} and {j}": f"--trainable blocks:{i},{j}" for i, j in ((0, 2), (0, 3), (1, 2), (1, 3))},
        **{f"block {i} alone": f"--trainable blocks:{i}" for i in range(4)},
        "all, 4 passes over a quarter of the records": "--trainable all --max-examples {quarter} --epochs 4",
        "the same, unfreezing one block more each pass": "--trainable gradual:1 --max-examples {quarter} --epochs 4",
        "the same, with rates decayed by depth": "--trainable gradual:1 --lr-decay 0.38 --max-examples {quarter} --epochs 4",
    }),
    "freezing": ("What freezing saves, keeps and costs", 0.25,
                 ("trainable", *QUALITY, "train - val loss", "steps to val loss 0.8", "peak MiB", "optimizer MiB"), {
        "all": "--trainable all", "last 3": "--trainable last:3", "last 2": "--trainable last:2", "last 1": "--trainable last:1",
        "last 2, lr 1e-3": "--trainable last:2 --lr 1e-3", "last 1, lr 1e-3": "--trainable last:1 --lr 1e-3",
        "norms, lr 3e-3": "--trainable norms --lr 3e-3", "biases, lr 3e-3": "--trainable biases --lr 3e-3", "LoRA": LORA,
        **{f"{name}, 10 passes over 100 records": f"{flags} --max-examples 100 --epochs 10"
           for name, flags in (("all", "--trainable all"), ("last 1", "--trainable last:1"), ("LoRA", LORA))},
    }),
    "rates": ("Learning rate of full finetuning, LoRA and the hybrid", 0.25, ("trainable", *QUALITY), {
        "full, lr 1e-4": "--trainable all --lr 1e-4", "full, lr 3e-4": "--trainable all", "full, lr 1e-3": "--trainable all --lr 1e-3",
        "full, lr 3e-3": "--trainable all --lr 3e-3",
        "LoRA, lr 1e-3": f"{LORA} --lr 1e-3", "LoRA, lr 3e-3": LORA, "LoRA, lr 1e-2": f"{LORA} --lr 1e-2",
        "LoRA, lr 3e-2": f"{LORA} --lr 3e-2",
        "hybrid, lr 1e-4 and 1e-3": f"{HYBRID} --lr 1e-4", "hybrid, lr 3e-4 and 3e-3": HYBRID,
        "hybrid, lr 1e-3 and 1e-2": f"{HYBRID} --lr 1e-3",
    }),
    "ranks": ("Rank of the adapters, and which matrices train fully", 0.25, ("trainable", *QUALITY, "saved MiB"), {
        "full": "--trainable all", **{f"LoRA r = {r}": f"--lora-r {r}" for r in (1, 4, 8, 32)},
        "hybrid, last block full": HYBRID, "hybrid, a fifth full, by score": f"{LORA} --trainable hybrid:0.2",
        "hybrid, a random block full": f"{LORA} --trainable lora,random:1",
        "LoRA r = 8, 2 passes over half of the records": f"{LORA} --max-examples {{half}} --epochs 2",
        "the same, merged and begun anew after the first":
            f"{LORA} --max-examples {{half}} --epochs 1 then {LORA} --max-examples {{half}} --epochs 1",
    }),
    "length": ("How much data, and which, for the same number of response tokens?", 0.25, ("steps", "target tokens", *QUALITY), {
        f"{n} {how}": f"--max-examples {n} --select {how} {{tokens}}"
        for n in (50, 100, 200, 400) for how in ("random", "longest", "shortest", "ifd")
    } | {"all": "{tokens}"}),
    "instructions": ("Length of the instruction, weight on its tokens, kind of response", 0.25,
                     ("prompt tokens", "steps", "target tokens", *QUALITY), {
        "short": "--trainable all", "long": "--instruction long", "adaptive": "--instruction adaptive",
        "weight 0.1 on the prompt": "--loss-on 0.1", "weight 0.5": "--loss-on 0.5", "weight 1": "--loss-on all",
        "answer alone, one pass over all records": "{all_tokens}",
        "worked solution, then answer; as many response tokens": "--response rationale {all_tokens}",
        "draft, correction, answer; as many response tokens": "--response reflection {all_tokens}",
    }),
    "stages": ("Simple before complex?", 0.25, ("steps", *QUALITY), {
        "shuffled": "--max-examples {n} --epochs 2 --max-steps {staged}",
        **{name: f"--curriculum={kind} --stages 3" for name, kind in (
            ("random stages", "random"), ("by length", "length"), ("by level", "level"), ("by IFD", "ifd"), ("by IFD, reversed", "-ifd"))},
    }),
}


def steps_to(loss: float, metrics: list[dict]) -> float | None:
    """The step at which the validation loss first was `loss`, on the line between two validations; None: never."""
    points = [(m["step"], m["val_loss"]) for m in metrics if m.get("val_loss") is not None]
    for (a, before), (b, after) in zip(points, points[1:]):
        if after <= loss < before:
            return a + (b - a) * (before - loss) / (before - after)
    return None


def spearman(x: list[float], y: list[float]) -> float | None:
    """Spearman's rank correlation, ties with their mean rank; None where all are equal."""
    ranks = [[sum(w < v for w in values) + sum(w == v for w in values) / 2 for v in values] for values in (x, y)]
    try:
        return statistics.correlation(*ranks)
    except statistics.StatisticsError:
        return None


def undominated(points: list[tuple]) -> list[bool]:
    """For each point whether no other is as low everywhere and lower somewhere."""
    return [not any(all(a <= b for a, b in zip(other, point)) and other != point for other in points) for point in points]


class Base:
    """What the tables need of the model to be finetuned and of its data, loaded when first asked for."""

    def __init__(self, model: str, data: str):
        from data import load_examples, load_tokenizer, split_examples
        from finetune import is_small
        from gpt import GPT

        self.model, self.tokenizer = GPT.from_pretrained(model).eval(), load_tokenizer(model)
        self.train, _, self.test = split_examples(load_examples(data))
        self.batch_size = 16 if is_small(self.model) else 8  # what finetune.py takes
        self.encoded, self.difficulties = {}, None

    def encode(self, records, response=None):
        """Records as finetune.py encodes them."""
        from data import encode_examples, reshape_example

        return encode_examples([reshape_example(r, "short", response) for r in records], self.tokenizer)[0]

    def training(self, response) -> list:
        """The training records with this kind of response, encoded once."""
        if response not in self.encoded:
            self.encoded[response] = self.encode(self.train, response)
        return self.encoded[response]

    def difficulty(self, encoded) -> list[float]:
        """Instruction-following difficulty under this model."""
        from evaluate import instruction_following_difficulty

        return instruction_following_difficulty(self.model, encoded, self.tokenizer.eot_token)

    def steps_for(self, tokens: float, flags: list[str]) -> int:
        """Steps in which a run with these flags trains on about so many response tokens."""
        from data import select_examples
        from finetune import parse_args

        args = parse_args(flags)
        encoded = self.training(args.response)
        if args.select == "ifd" and self.difficulties is None:
            self.difficulties = self.difficulty(encoded)
        if args.select:
            chosen = select_examples(encoded, args.select, args.max_examples, 1, lambda: self.difficulties)
            encoded = [encoded[i] for i in chosen]
        return max(1, round(tokens / count_targets(encoded) * math.ceil(len(encoded) / self.batch_size)))

    def staged(self, n: int) -> int:
        """Steps of one pass over n records in three stages."""
        from data import split_stages

        return sum(math.ceil(len(part) / self.batch_size) for part in split_stages([0.0] * n, 3, False, 1))


def count_targets(encoded) -> int:
    """Response tokens, each example's end token included."""
    return sum(len(e.ids) - e.n_prompt for e in encoded)


def trained_targets(run: dict) -> int:
    """Response tokens that a run trained on, those of repeated records each time."""
    encoded = run["base"].training(run["flags"]["response"])
    return sum(len(encoded[i].ids) - encoded[i].n_prompt for m in run["metrics"] for i in m.get("records", []))


def fill(template: str, base: Base, epochs: float, out: Path) -> str:
    """The flags that a row's template stands for with this model and data."""
    n = round(len(base.train) * min(epochs, 1))
    values = {"twice": 2 * epochs, "n": n, "half": n // 2, "quarter": n // 4}
    if "{random}" in template:
        values["random"] = random_model(out / "random-model")
    if "{staged}" in template:
        values["staged"] = base.staged(n)
    for name, share in (("{tokens}", epochs), ("{all_tokens}", max(1, epochs))):
        if name in template:
            steps = base.steps_for(share * count_targets(base.training(None)), template.replace(name, "").split())
            values[name[1:-1]] = f"--epochs 999 --max-steps {steps}"
    flags = template.format(**values)
    if epochs < 1 and "--max-" not in flags:
        flags += f" --max-examples {n}"
    return flags if "--epochs" in flags else f"{flags} --epochs {math.ceil(epochs)}".strip()


def commands(flags: str, model: str, common: list[str], out: str, seed: int) -> list[list[str]]:
    """What is run for a row, in order: one command, or for `A then B` one for A, the merge of its adapter, and one for B."""
    *earlier, last = [part.split() for part in flags.split(" then ")]
    lines, named = [], lambda part, model: ["--model", model] if model != "tiny" and "--model" not in part else []
    for i, part in enumerate(earlier, 1):
        lines.append(["finetune.py", *named(part, model), *part, *common, "--seed", str(seed), "--out", f"{out}.part{i}"])
        lines.append(["lora.py", "merge", "--base", model, "--adapter", f"{out}.part{i}/adapter", "--out", f"{out}.merged{i}"])
        model, seed = f"{out}.merged{i}", 10 * seed  # another order, other adapters
    return [*lines, ["finetune.py", *named(last, model), *last, *common, "--seed", str(seed), "--out", out]]


def run_row(lines: list[list[str]], text: str | None, base: Base) -> tuple[dict, dict] | None:
    """
    (run.json with its metrics, scores.json) after these commands; trains and scores what has not been. None if a
    command failed, which has said why: the row may be trained by another process just now.
    """
    forgetting = []
    for script, *line in lines:
        out = Path(line[line.index("--out") + 1])
        done = out / ("run.json" if script == "finetune.py" else "config.json")
        mode = [] if script == "lora.py" else ["--resume"] if (out / "checkpoints").exists() else ["--overwrite"]
        if not done.exists() and subprocess.run([sys.executable, ROOT / script, *line, *mode], stdout=sys.stderr).returncode:
            return None
        if script == "finetune.py":
            scoring = [sys.executable, ROOT / "evaluate.py", out, *(["--text", text] if text else [])]
            if not (out / "scores.json").exists() and subprocess.run(scoring, stdout=subprocess.DEVNULL).returncode:
                return None
            forgetting.append(json.loads((out / "scores.json").read_text())["forgetting"])
    run, scores = (json.loads((out / name).read_text()) for name in ("run.json", "scores.json"))
    run["base"], run["metrics"] = base, [json.loads(m) for m in (out / "metrics.jsonl").read_text().splitlines()]
    weights = [p for part in ("model", "adapter") for p in (out / part).glob("*.safetensors")]
    scores["saved_bytes"] = sum(p.stat().st_size for p in weights)
    scores["forgetting"] = None if None in forgetting else sum(forgetting)  # each from where its part began
    run["responses"] = [json.loads(r) for r in (out / "responses.jsonl").read_text(encoding="utf-8").splitlines()]
    return run, scores


def cell(values: list, factor: float, digits: int) -> str:
    """mean ± standard error, or a dash where there is nothing."""
    if not values or any(v is None for v in values):
        return "-"
    values = [v * factor for v in values]
    mean = f"{statistics.fmean(values):,.{digits}f}"
    if len(values) == 1 or max(values) == min(values):
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):,.{digits}f}"


def random_model(folder: Path) -> Path:
    """A model of the embedded one's shape with random weights, its tokenizer beside it."""
    if not (folder / "config.json").exists():
        import torch

        from data import load_tokenizer, save_tokenizer
        from gpt import GPT

        torch.manual_seed(0)
        GPT(GPT.from_pretrained("tiny").config).save_pretrained(folder)
        save_tokenizer(load_tokenizer("tiny"), folder)
    return folder


def print_table(lines: list[list[str]]) -> None:
    """Rows of cells as Markdown, the first one the heading."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")


# ---------------------------------------------------------------------------------------------
# what stands below some tables


def after_layers(results: dict, base: Base) -> None:
    """Whether the relative gradient norms tell which block alone would reach the lowest loss."""
    alone = [results.get(f"block {i} alone") for i in range(base.model.config.n_layer)]
    scored = results.get("2 of largest relative gradient norm")
    if scored and all(alone):
        pairs = [(run["freeze"]["scores"]["rgn:2"], [-block[seed][1]["response_nll"] for block in alone])
                 for seed, (run, _) in enumerate(scored)]
        scores = ", ".join(cell(list(of), 1, 4) for of in zip(*(scores for scores, _ in pairs)))
        print(f"Relative gradient norms of the blocks: {scores}. Spearman's rank correlation with how low the response NLL is after "
              f"training each block alone (1: the norms tell the best block): {cell([spearman(*pair) for pair in pairs], 1, 2)}.\n")


def mark_undominated(results: dict, base: Base) -> None:
    """Which rows no other row beats in all three: trainable parameters, response NLL, forgetting."""
    names = [name for name, of in results.items() if of]
    mean = lambda get, of: statistics.fmean(get(*result) for result in of)
    points = [tuple(mean(COLUMNS[column][0], results[name]) for column in ("trainable", "response NLL", "forgetting, nats/token"))
              for name in names]
    print("Not dominated (no row has as few trainables, as low an NLL and as little forgetting): "
          + "; ".join(name for name, good in zip(names, undominated(points)) if good) + ".\n")


def after_instructions(results: dict, base: Base) -> None:
    """Exact match by quartile of difficulty, and whether adaptive instructions help."""
    from evaluate import exact_match

    kinds = [name for name in ("short", "long", "adaptive") if results.get(name)]
    if len(kinds) < 3:
        return
    difficulty = base.difficulty(base.encode(base.test))
    order = sorted(range(len(difficulty)), key=lambda i: difficulty[i])
    quartiles = [order[len(order) * q // 4:len(order) * (q + 1) // 4] for q in range(4)]
    right = lambda r: r["ended"] and exact_match(r["model_response"], r["output"])
    shares = {name: [[statistics.fmean(right(run["responses"][i]) for i in quartile) for run, _ in results[name]]
                     for quartile in quartiles] for name in kinds}  # (4, seeds)
    print_table([["exact match %", *(f"quartile {q} of difficulty" for q in range(1, 5)), "prompt tokens"],
                 *([name, *(cell(of, 100, 1) for of in shares[name]), cell([run["train"]["prompt_tokens"] for run, _ in results[name]], 1, 1)]
                   for name in kinds)])
    fixed, adaptive = (statistics.fmean(run["train"]["prompt_tokens"] for run, _ in results[name]) for name in ("long", "adaptive"))
    worse = []
    for q, (a, b) in enumerate(zip(shares["adaptive"], shares["long"]), 1):
        gains = [x - y for x, y in zip(a, b)]
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0
        worse += [str(q)] * (statistics.fmean(gains) < -error)
    saved = 1 - adaptive / fixed
    verdict = "help" if saved >= 0.25 and not worse else "do not help"
    print(f"Adaptive instructions {verdict}: {saved:.0%} fewer prompt tokens than the long ones (at least 25% are asked for), "
          + (f"worse by more than a standard error in quartile {', '.join(worse)}.\n" if worse else "in no quartile worse by more than a standard error.\n"))


# ---------------------------------------------------------------------------------------------
# what a step costs


def needed(model, plan, head_share: float) -> float:
    """
    Multiplications of a step's matrix products per token, to a constant factor: one per weight forward, one for the
    gradient of the input from the lowest module with something to train upwards, one for the gradient of a weight that trains.
    The head is needed on `head_share` of the positions.
    """
    low = min((-1 if "wte" in n or "wpe" in n else int(n.split(".")[1]) if n.startswith("h.") else math.inf) for n in plan.trainable)
    total = 0.0
    for name, p in model.named_parameters():
        if p.dim() == 2 and not name.startswith("wpe"):
            block = int(name.split(".")[1]) if name.startswith("h.") else math.inf
            share = 1.0 if name.startswith("h.") else head_share  # the tied wte is the head
            total += share * p.numel() * (1 + (block >= low) + (name in plan.trainable))
    return total


def step_costs(rows: dict, base: Base, model_name: str, steps: int) -> None:
    """Print what a step of each row takes: all rows take turns on the same batches, so that a busy machine slows all of them."""
    import time

    import torch
    from torch.autograd.graph import saved_tensors_hooks

    import finetune
    from data import batches

    encoded = base.training(None)
    order = batches([len(e.ids) for e in encoded], base.batch_size, 1, 0)[:steps]
    head_share = sum(len(e.ids) - e.n_prompt for e in encoded) / sum(len(e.ids) - 1 for e in encoded)
    machine, runs, seconds, kept = finetune.Machine(torch.device("cpu")), {}, {}, {}
    for name, flags in rows.items():
        args = finetune.parse_args(["--model", model_name, *flags.split()])
        args.trainable = args.trainable or ("lora" if args.lora_r else "all")
        model, _ = finetune.load_model(args, *finetune.locate(model_name))
        finetune.choose_sizes(args, model)
        runs[name], seconds[name] = (model, *finetune.prepare_plan(args, model, encoded), args), []
    for step, indices in enumerate(order):
        batch = [encoded[i] for i in indices]
        for name, (model, plan, optimizer, args) in runs.items():
            plan.set_modes(model.train())
            begin = time.perf_counter()
            finetune.take_step(model, plan, optimizer, batch, 1.0, step, args, machine)
            seconds[name].append(time.perf_counter() - begin)
    batch = sorted(encoded, key=lambda e: -len(e.ids))[:base.batch_size]  # the largest: it decides about memory
    for name, (model, plan, optimizer, args) in runs.items():
        own, storages = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def note(tensor):
            if (storage := tensor.untyped_storage()).data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            finetune.take_step(model, plan, optimizer, batch, 1.0, steps, args, machine)
        kept[name] = sum(storages.values())
    first = next(iter(rows))
    costs = {name: needed(model, plan, head_share) for name, (model, plan, _, _) in runs.items()}
    lines = [["", "step time", "predicted", "trainable", "gradients MiB", "AdamW MiB", "kept for backward MiB"]]
    for name, (model, plan, optimizer, _) in runs.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[name][2:], seconds[first][2:]))
        state = sum(t.numel() * t.element_size() for of in optimizer.state.values() for t in of.values())
        trained = sum(p.numel() for p in plan.parameters())
        lines.append([name, f"{ratio:.2f}", f"{costs[name] / costs[first]:.2f}", f"{trained:,}", f"{4 * trained / 2**20:.2f}",
                      f"{state / 2**20:.2f}", f"{kept[name] / 2**20:.1f}"])
    print(f"A step of each row relative to the first one's ({1000 * statistics.median(seconds[first][2:]):.0f} ms): median over {steps - 2} "
          f"batches of {base.batch_size}, all rows in turn, {torch.get_num_threads()} thread(s); predicted from the matrix products.\n")
    print_table(lines)


AFTER = {"layers": after_layers, "lora": mark_undominated, "rates": mark_undominated, "ranks": mark_undominated,
         "instructions": after_instructions}


def main(argv=None) -> int:
    """Run the rows of one table and print it; returns the exit code: 1 if a row could not be finished."""
    parser = argparse.ArgumentParser(description="Run one of the README's tables.")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("table", nargs="?", choices=TABLES, help="which (default: list them)")
    parser.add_argument("--model", default="tiny", help="a model folder or name (default: tiny)")
    parser.add_argument("--data", default="tiny", help="a file of records or a name (default: tiny)")
    parser.add_argument("--text", help="plain text on which forgetting is measured (default: the embedded one, for tiny)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row, with --seed 1, 2, ... (default: 3)")
    parser.add_argument("--epochs", type=float, help="passes over the training records, or below 1 the share of them over which one pass is made "
                        "(default: 3 in bars, random and lora, else 0.25: below the embedded model's ceiling, where methods differ more)")
    parser.add_argument("--time", type=int, metavar="STEPS", help="do not finetune: let the table's policies take turns at so many steps, and "
                        "print what a step takes (rows on fewer records left out)")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), help="where the run folders go (default: runs/experiments)")
    args = parser.parse_args(argv)
    if args.table is None:
        for name, (question, _, _, rows) in TABLES.items():
            print(f"{name:13} {question} ({len(rows)} rows)")
        return 0
    if args.seeds < 1 or (args.time or 3) < 3:
        parser.error("--seeds must be at least 1, --time at least 3")
    if args.epochs is not None and not (0 < args.epochs < 1 or args.epochs >= 1 and args.epochs.is_integer()):
        parser.error(f"--epochs {args.epochs:g}: must be a whole number, or a share between 0 and 1")

    question, epochs, columns, rows = TABLES[args.table]
    epochs, base = args.epochs or epochs, Base(args.model, args.data)
    epochs = int(epochs) if epochs >= 1 else epochs
    if args.time:
        policies = {re.sub(" --lr .*", "", flags): name for name, flags in reversed(rows.items()) if not re.search("{|--max-", flags)}
        step_costs({name: flags for flags, name in reversed(policies.items())}, base, args.model, args.time)
        return 0
    text = args.text or (str(ROOT / "tiny" / "heldout.txt") if args.model == "tiny" else None)
    lines, results = [["", *columns, "command"]], {}
    for name, template in rows.items():
        flags = fill(template, base, epochs, args.out)
        common = ["--data", args.data] if args.data != "tiny" else []
        results[name] = []
        for seed in range(1, args.seeds + 1):
            print(f"{args.table}: {name}, seed {seed}", file=sys.stderr, flush=True)
            folder = "_".join(c.replace("/", "-") for c in [*flags.split(), *([] if args.model == "tiny" else [args.model]), *common])
            row = commands(flags, args.model, common, str(args.out / f"{folder}-{seed}"), seed)
            results[name].append(run_row(row, None if "--model" in flags else text, base))
        results[name] = [] if None in results[name] else results[name]
        shown = " && ".join(shlex.join(["python", *line]) for line in commands(flags, args.model, common, f"runs/{args.table}-{len(lines)}", 1))
        lines.append([name, *(cell([get(*result) for result in results[name]], factor, digits)
                              for get, factor, digits in (COLUMNS[column] for column in columns)), f"`{shown}`"])
    seeds = "1 seed" if args.seeds == 1 else f"{args.seeds} seeds (--seed 1 to {args.seeds}), mean ± standard error"
    passes = f"{epochs} passes over all records" if epochs > 1 else f"One pass over {round(len(base.train) * epochs):,} records"
    print(f"{question} {passes} unless the row says otherwise; {seeds}; scored by `python evaluate.py FOLDER`.\n")
    print_table(lines)
    AFTER.get(args.table, lambda *_: None)(results, base)
    if unfinished := [name for name, of in results.items() if not of]:
        print(f"error: not finished: {', '.join(unfinished)}; run the table again", file=sys.stderr)
    return 1 if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
