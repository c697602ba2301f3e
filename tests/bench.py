"""Speed and memory, side by side: this project, and the loop that a learner writes first.

The plain loop: our GPT (which is faster than most), records in file order padded to the longest of
a batch, all logits, AdamW as it comes, LoRA by our adapters. This project is finetune.py
itself, with flags. Variants take turns in rounds, one process at a time, each fresh, with its own
allocator and its own peak memory. A row gives the median over the rounds, and their range. Weights
are random, of GPT-2 small's shape; records are made, as long as the book's.

    python tests/bench.py                            # every row, as a Markdown table
    python tests/bench.py --only full,lora --steps 50
    python tests/bench.py --ablate                   # each remedy switched off, one at a time
    python tests/bench.py --quick --layers 1         # does every line run? The numbers say nothing
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if __name__ != "__main__":  # Linux counts a child's peak memory from its parent's size on
    import resource

    import torch
    import torch.nn.functional as F
    from torch import nn

    import finetune
    import freeze
    import gpt
    from data import TINY, collate, copy_tokenizer, encode_examples, load_parts, load_tokenizer
    from lora import add_lora

WARM = 3  # steps before those that are measured
VOCAB, BOOK_STEPS = 50257, 2 * 117  # two epochs of the book's 935 records
# Ids in the book's prompts and answers, at 0, 5, ..., 100 % of its training part; in all 57 and 13.
PROMPTS = [35, 37, 38, 38, 39, 39, 40, 40, 40, 41, 41, 42, 43, 47, 49, 50, 51, 53, 54, 56, 65]
ANSWERS = [2, 6, 7, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 14, 14, 15, 16, 17, 20, 26, 51]
TEMPLATE = 29  # ids around the instruction, by the embedded tokenizer
WORDS = "and one ten day write as in is it or me".split()  # one id each

Row = namedtuple("Row", "name who policy flags least most", defaults=("all", (), (), None))
PLAIN, CACHED = Row("plain loop", "plain"), ("--cache-prefix",)
CPU = {  # least: times the first row, where oneDNN is twice MKL, and where it is not; most: GiB
    "full": [PLAIN, Row("full, fp32", "ours", "all", (), (3.6, 2.3), 2.9),
             Row("full, bf16", "ours", "all", ("--dtype", "bf16"), (4.5, 3.1))],
    "last_block": [PLAIN, Row("last block", "ours", "last_block", (), (9, 6), 1.1),
                   Row("last block, cached, epoch 2", "ours", "last_block", CACHED, (25, 16.7))],
    "lora": [Row("plain loop of LoRA", "plain", "lora"),
             Row("LoRA, r = 16", "ours", "lora", (), (3.4, 2.2), 1.5)]}
HF, FULL = Row("transformers", "transformers"), Row("full", "ours")
GPU = [(8, [HF, FULL]), (64, [HF, FULL._replace(least=(3.5, 3.5))]),
       (256, [HF, FULL, Row("full, --compile", "ours", "all", ("--compile",))]),
       (64, [FULL, Row("last block, cached", "ours", "last_block", CACHED, (3, 3))]),
       (64, [Row("PEFT", "transformers", "lora"), Row("LoRA, r = 16", "ours", "lora")])]
REMEDIES = {
    "mallopt": "freed memory is kept", "caches": "oneDNN's caches are small",
    "products": "oneDNN multiplies in fp32", "flash": "no flash kernel for short texts",
    "flash-tiny": "the same, embedded model", "head": "head only where a loss is wanted",
    "lengths": "batches of similar length", "fused": "fused AdamW",
    "prefix": "--cache-prefix for two blocks, epoch 2",
    "shared": "generation: beginning of prompts shared", "leaving": "generation: ended rows leave"}


# ---- what runs in processes of its own: the functions return figures

class Stopwatch:
    """Seconds and tokens of the measured steps. It also stands in for the list of signals, which
    finetune.train looks at once a step: none ever comes."""

    def __init__(self, steps, skip=WARM, state=None):
        self.marked, self.steps, self.state, self.marks = (skip, skip + steps), steps, state, []

    def after(self, step, tokens):
        """To be told of every step (from 1), and of the tokens so far."""
        if step in self.marked:
            self.marks.append((clock(), tokens))

    def __len__(self):
        self.after(self.state.step, self.state.tokens)
        return 0

    def figures(self):
        """Tokens a second, seconds a step, and bytes of this process, or on the GPU, at most."""
        (began, before), (end, after) = self.marks
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        most = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else most
        return {"rate": (after - before) / (end - began), "step": (end - began) / self.steps,
                "peak": most}


def clock():
    """Seconds, once a GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def write_model(folder, *sizes):
    """A model folder of random weights, with the embedded tokenizer; returns what torch is."""
    torch.manual_seed(0)
    gpt.GPT(gpt.GPTConfig(VOCAB, 1024, *sizes)).save_pretrained(folder)
    copy_tokenizer(TINY / "model", folder)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "gpu": gpu}


def encoded(folder, data, part):
    """The records of a part of the data, encoded."""
    return encode_examples(getattr(load_parts(data), part), load_tokenizer(folder))[0]


def ours(steps, folder, data, policy, flags=(), size=8, device="cpu", without=None):
    """finetune.py with these flags, `without` one of the remedies. With --cache-prefix measured is
    the second epoch. "proof": seconds that freezing and its checks take."""
    switch_off(without)
    epochs = 2 if "--cache-prefix" in flags else 1
    flags = [flag for flag in flags if flag != "--cache-prefix" or without != "prefix"]
    watch = Stopwatch(steps, WARM + (steps + WARM + 1) * (epochs - 1))
    spent, train, never = [], finetune.train, "1000000"

    def train_watched(model, plan, optimizer, first, end, job, noted):
        watch.state = job.state
        return train(model, plan, optimizer, first, end, job, watch)

    def timed(check):
        def wrapper(*args, **options):
            began = clock()
            check(*args, **options)
            spent.append(clock() - began)
        return wrapper

    finetune.train = train_watched
    for name in "__init__ check_model check_optimizer check_gradients check_unchanged".split():
        setattr(freeze.Plan, name, timed(getattr(freeze.Plan, name)))
    with tempfile.TemporaryDirectory() as out:
        code = finetune.main([
            "--model", folder, "--data", data, "--out", f"{out}/run", "--trainable", policy,
            "--epochs", str(epochs), "--batch-size", str(size), "--device", device,
            "--eval-every", never, "--checkpoint-every", never, "--no-responses",
            *(["--lora-r", "16"] if policy == "lora" else []), *flags])
    if code:
        raise RuntimeError(f"finetune.py ended with exit code {code}, see above")
    return watch.figures() | {"proof": sum(spent)}


def switch_off(remedy):
    """Do without a remedy; an error where its function has another name now."""
    speed_up, adamw, keep = finetune.speed_up_blocks, torch.optim.AdamW, finetune.keep_freed_memory

    def all_logits(model, batch, loss_on, machine, prefix=None):
        inputs, targets = collate(batch, loss_on)
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")

    with_flash = lambda *args: speed_up(*args) or torch.backends.cuda.enable_flash_sdp(True)
    file_order = lambda lengths, size, seed, epoch: [
        list(range(len(lengths)))[i:i + size] for i in range(0, len(lengths), size)]
    caches_alone = mock.patch("ctypes.CDLL", lambda name: None)(keep)
    patches = {"mallopt": (finetune, "keep_freed_memory", caches_alone),
               "products": (finetune, "multiply_with_onednn", lambda: None),
               "flash": (finetune, "speed_up_blocks", with_flash),
               "head": (finetune, "loss_sum", all_logits),
               "lengths": (finetune, "batches", file_order),
               "fused": (torch.optim, "AdamW", lambda groups, fused: adamw(groups))}
    if remedy == "caches":  # oneDNN's default, and torch's
        os.environ |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}
    elif remedy in patches:
        mock.patch.object(*patches[remedy]).start()


def make_rival(folder, policy, library):
    """Our GPT, for LoRA with our adapters; or transformers' with PEFT's."""
    if library == "transformers":
        from transformers import GPT2LMHeadModel
        model = GPT2LMHeadModel.from_pretrained(folder)
        if policy == "lora":
            from peft import LoraConfig, get_peft_model
            model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, fan_in_fan_out=True,
                                                     target_modules=["c_attn", "c_proj", "c_fc"]))
        return model
    model = gpt.GPT.from_pretrained(folder).requires_grad_(policy == "all")
    if policy == "lora":
        add_lora(model, r=16, alpha=32)
    return model


def rival(steps, folder, data, policy, library="plain", size=8, device="cpu"):
    """The plain loop; or a step as transformers' Trainer has it, on GPUs in bf16."""
    plain, watch, tokens = library == "plain", Stopwatch(steps), 0
    model = make_rival(folder, policy, library).to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.1, fused=None if plain else True)
    records = encoded(folder, data, "train")
    for step, first in enumerate(range(0, len(records), size), 1):
        batch = records[first:first + size]
        inputs, targets = (t.to(device) for t in collate(batch))  # (B, T) each
        lengths = torch.tensor([[len(e.ids) - 1] for e in batch])
        mask = (torch.arange(inputs.shape[1]) < lengths).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(inputs) if plain else model(inputs, attention_mask=mask).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        if not plain:
            nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        loss.item()
        tokens += sum(len(e.ids) for e in batch)
        watch.after(step, tokens)
    return watch.figures()


def answer(model, batch, new, how):
    """Continue prompts by `new` ids; random weights do not end. Or until the record's own answer
    ends, and the row is then "leaving", or "staying" until all have ended."""
    prompts, left = [e.ids[:e.n_prompt] for e in batch], [len(e.ids) - e.n_prompt for e in batch]
    sample, width = gpt.sample, max(map(len, prompts))

    def sample_ends(*args):
        ids = sample(*args).clamp(max=VOCAB - 2)
        left[:] = [n - 1 for n in left if n > 0]
        return torch.where(torch.tensor(left, device=ids.device) == 0, VOCAB - 1, ids)

    if how == "transformers":
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        model.generate(ids, attention_mask=seen.to(model.device), do_sample=False, pad_token_id=0,
                       max_new_tokens=new, min_new_tokens=new)
    elif how == "leaving":
        with mock.patch.object(gpt, "sample", sample_ends):
            gpt.generate(model, prompts, max(left), eos_id=VOCAB - 1)
    else:  # where rows have adapters of their own, nothing is shared
        model.active = [None] * len(batch) if how == "unshared" else None
        gpt.generate(model, prompts, max(left) if how == "staying" else new)


def generation(steps, folder, data, how="ours", new=32, device="cpu"):
    """Answers to all test prompts, longest first: that is a step."""
    records, watch = encoded(folder, data, "test"), Stopwatch(steps, skip=1)
    records.sort(key=lambda e: -e.n_prompt)
    size = 16 if how == "transformers" else 64  # its best; what generate_responses takes
    model = make_rival(folder, "all", how).to(device).eval()
    if size == 64:
        finetune.keep_freed_memory()
        finetune.multiply_with_onednn()
    for step in range(1, steps + 2):
        for first in range(0, len(records), size):
            answer(model, records[first:first + size], new, how)
        watch.after(step, step * new * len(records))
    return watch.figures()


def products(C, size, device) -> dict:
    """Operations a second in a block's matrix products, by library or type."""
    def rate(dtype):
        work = seconds = 0.0
        for M, K, N in [(57 * size, C, n * C) for n in (3, 1, 4)] + [(57 * size, 4 * C, C)]:
            x, w, g = (torch.randn(s, device=device).to(dtype) for s in ((M, K), (N, K), (M, N)))
            for product in (lambda: x @ w.T, lambda: g @ w, lambda: g.T @ x):
                marks = [product() is None or clock() for _ in range(7)]
                seconds += min(b - a for a, b in zip(marks, marks[1:]))
                work += 2 * M * K * N
        return work / seconds

    rates = {"MKL": rate(torch.float32), "bf16": rate(torch.bfloat16)}
    finetune.multiply_with_onednn()
    if torch.backends.mkldnn.matmul.fp32_precision == "bf16":  # else it would really round
        rates["oneDNN"] = rate(torch.float32)
    return rates


# ---- who takes turns with whom, and what is printed

def once(function, *args, **options):
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **options).result()


def measure(args, variants: dict) -> dict[str, dict]:
    """name -> (function, options): name -> the figures of its rounds, each a list."""
    rounds = []
    for i in range(args.rounds):  # every other one backwards
        names = list(variants)[::-1 if i % 2 else 1]
        rounds.append({n: once(variants[n][0], args.steps, **variants[n][1]) for n in names})
    return {n: {key: [figures[n][key] for figures in rounds] for key in rounds[0][n]}
            for n in variants}


def make_data(folder, n_batches, size) -> str:
    """A data folder of records as long as the book's: so many batches to train on."""
    draws, path = random.Random(0), Path(folder, f"{n_batches} x {size}")
    path.mkdir(exist_ok=True)

    def text(quantiles, without):
        place, part = divmod(draws.random() * (len(quantiles) - 1), 1)
        low, high = quantiles[int(place):int(place) + 2]
        return " ".join(draws.choices(WORDS, k=round(low + part * (high - low)) - without))

    for name, n in (("train", n_batches * size), ("val", 8), ("test", 110)):
        records = [{"instruction": text(PROMPTS, TEMPLATE), "output": text(ANSWERS, 1)}
                   for _ in range(n)]
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return str(path)


def report(what, measured, own=None, target="", met=None):
    """One row of the table; `own`: figures, whose rate and peak are shown."""
    speed = f"{statistics.median(own['rate']):,.0f}" if own else ""
    peak = f"{max(own['peak']) / 2**30:.2f}" if own else ""
    verdict = "" if met is None else "met" if met else "**not met**"
    print("|", " | ".join((what, measured, speed, peak, target, verdict)), "|", flush=True)


def ratio(own, other) -> tuple[float, str]:
    """Median over the rounds of how many times as fast, and the text with the range."""
    times = [a / b for a, b in zip(own["rate"], other["rate"])]
    middle = statistics.median(times)
    return middle, f"{middle:.2f} x ({min(times):.2f} to {max(times):.2f})"


def compare(args, size, rows, device="cpu"):
    """Measure rows, report each beside the first, and the share of the proof."""
    options = {"folder": args.folder, "data": make_data(args.folder, args.steps + WARM + 1, size),
               "size": size, "device": device}
    rows = [row for row in rows if row.who != "transformers" or find_spec("peft")]
    kind = lambda row: (ours, {"flags": row.flags}) if row.who == "ours" else \
        (rival, {"library": row.who})
    results = measure(args, {row.name: (kind(row)[0], options | kind(row)[1] |
                                        {"policy": row.policy}) for row in rows})
    for row in rows:
        own, least = results[row.name], row.least[not args.strong] if row.least else 0
        times, text = ratio(own, results[rows[0].name])
        target = [f"{least} x"] * bool(least) + [f"{row.most} GiB"] * bool(row.most)
        met = times >= least and max(own["peak"]) <= (row.most or 1e9) * 2**30 if target else None
        report(f"{row.name}, {device}, batches of {size}", f"{text} {rows[0].name}", own,
               ", ".join(target), met)
    for row in rows[:2]:
        if row.name.startswith("full"):
            own = results[row.name]
            share = statistics.median(p / (p + 234 * s) for p, s in zip(own["proof"], own["step"]))
            report("proof, of two epochs of the book", f"{share:.2%}", target="1 %", met=share < 0.01)


def bench_generation(args):
    """110 answers of 32 ids each."""
    options = {"folder": args.folder, "data": make_data(args.folder, 1, 8)}
    hows = ["ours", *["transformers"] * bool(find_spec("transformers"))]
    results = measure(args, {how: (generation, options | {"how": how}) for how in hows})
    times, text = ratio(results["ours"], results[hows[-1]])
    report("generation, 110 prompts", f"{text} {hows[-1]}", results["ours"], "2.5 x", times >= 2.5)


def bench_tiny(args):
    """Start to the first step, and the default run."""
    with tempfile.TemporaryDirectory() as folder:
        run = lambda script, *flags: subprocess.run(
            [sys.executable, ROOT / script, *flags], check=True, stdout=subprocess.DEVNULL)
        began = time.perf_counter()
        run("finetune.py", "--out", f"{folder}/short", "--max-steps", "1", "--no-responses")
        report("tiny: one step, whole process", f"{time.perf_counter() - began:.1f} s", target="4 s")
