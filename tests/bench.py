"""Speed and memory, side by side: this project, and the loop that a learner writes first.

The plain loop: our GPT (which is faster than most), records in file order padded to the longest of
a batch, all logits, AdamW as it comes. This project is finetune.py itself, with flags. Variants
take turns, each in a fresh process, one at a time; a row gives the median of the rounds, and
their range. Weights are random, of GPT-2 small's shape; records are made, as long as the book's.

    python tests/bench.py                            # every row, as a Markdown table
    python tests/bench.py --ablate                   # each remedy switched off, one at a time
    python tests/bench.py --quick --layers 1         # does every line run? The numbers say nothing
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if __name__ != "__main__":  # Linux counts a child's peak memory from its parent's size on
    import resource
    import torch
    import torch.nn.functional as F
    from torch.nn.utils.rnn import pad_sequence
    import finetune
    import freeze
    import gpt
    from data import TINY, collate, copy_tokenizer, encode_examples, load_parts, load_tokenizer
    from lora import add_lora

VOCAB, BOOK_STEPS = 50257, 2 * 117  # two epochs of the book's 935 records
# Ids in the book's prompts and answers, at 0, 5, ..., 100 % of its training part; in all 57 and 13.
PROMPTS = [35, 37, 38, 38, 39, 39, 40, 40, 40, 41, 41, 42, 43, 47, 49, 50, 51, 53, 54, 56, 65]
ANSWERS = [2, 6, 7, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 14, 14, 15, 16, 17, 20, 26, 51]
TEMPLATE = 29  # ids around the instruction, by the embedded tokenizer
WORDS = "and one ten day write as in is it or me".split()  # one id each

def clock():
    """Seconds, once a GPU has done what it was given."""
    torch.cuda.is_initialized() and torch.cuda.synchronize()
    return time.perf_counter()

def figures(marks, steps):
    """From marks (seconds, tokens so far) of steps, the last so many; and this process's peak."""
    (began, before), (end, after) = marks[-steps - 1], marks[-1]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else most
    return {"rate": (after - before) / (end - began), "step": (end - began) / steps, "peak": peak}

def write_model(folder, *sizes):
    """A model folder of random weights, with the embedded tokenizer; returns what torch is."""
    torch.manual_seed(0)
    gpt.GPT(gpt.GPTConfig(VOCAB, 1024, *sizes)).save_pretrained(folder)
    copy_tokenizer(TINY / "model", folder)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "gpu": gpu}

def ours(steps, folder, data, policy, flags=(), size=8, device="cpu", without=None):
    """finetune.py with these flags, `without` one of the remedies; with --cache-prefix measured is
    the second epoch. "proof": seconds that freezing and its checks take."""
    epochs, spent, never = "2" if "--cache-prefix" in flags else "1", [], "1000000"
    switch_off(without)

    def timed(check):
        def wrapper(*args, **options):
            began = clock()
            check(*args, **options)
            spent.append(clock() - began)
        return wrapper

    for name in "__init__ check_model check_optimizer check_gradients check_unchanged".split():
        setattr(freeze.Plan, name, timed(getattr(freeze.Plan, name)))
    with tempfile.TemporaryDirectory() as out, redirect_stdout(sys.stderr):
        code = finetune.main([
            "--model", folder, "--data", data, "--out", f"{out}/run", "--trainable", policy,
            "--epochs", epochs, "--batch-size", str(size), "--device", device, "--no-responses",
            "--eval-every", never, *(["--lora-r", "16"] if policy == "lora" else []), *flags])
        if code:
            raise RuntimeError(f"finetune.py ended with exit code {code}, see above")
        lines = map(json.loads, Path(out, "run", "metrics.jsonl").read_text().splitlines())
    return figures([(m["seconds"], m["tokens"]) for m in lines], steps) | {"proof": sum(spent)}

def switch_off(remedy):
    """Do without a remedy; an error where what does it has another name now."""
    def all_logits(model, batch, job):
        inputs, targets = collate(batch, job.recipe.loss_on)
        finetune.choose_attention(inputs.shape[1])
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")

    file_order = lambda lengths, size, *_: [
        [*range(i, i + size)] for i in range(0, len(lengths), size)]  # none is left over
    AdamW = finetune.AdamW
    defaults = dict.fromkeys(["ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"], "1024")
    patches = {"mallopt": mock.patch("ctypes.pythonapi", None),
               "caches": mock.patch.dict(os.environ, defaults),
               "products": mock.patch("finetune.use_onednn", lambda: None),
               "flash": mock.patch("finetune.choose_attention", lambda *args: None),
               "head": mock.patch("finetune.loss_sum", all_logits),
               "tree": mock.patch("finetune.share_beginnings", lambda *args: None),
               "lengths": mock.patch("finetune.batches", file_order),
               "fused": mock.patch("finetune.AdamW", lambda groups, fused: AdamW(groups))}
    if remedy in patches:
        patches[remedy].start()

def make_rival(folder, policy, library):
    """Our GPT, for LoRA with our adapters; or transformers' with PEFT's."""
    if library != "transformers":
        model = gpt.GPT.from_pretrained(folder).requires_grad_(policy == "all")
        if policy == "lora":
            add_lora(model, r=16, alpha=32)
        return model
    from transformers import GPT2LMHeadModel
    model = GPT2LMHeadModel.from_pretrained(folder)
    if policy == "lora":
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, fan_in_fan_out=True,
                                                 target_modules=["c_attn", "c_proj", "c_fc"]))
    return model

def rival(steps, folder, data, policy, library="plain", size=8, device="cpu"):
    """The plain loop; or a step as transformers' Trainer has it, on GPUs in bf16."""
    plain, marks, tokens = library == "plain", [], 0
    model = make_rival(folder, policy, library).to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.1, fused=None if plain else True)
    records, _ = encode_examples(load_parts(data).train, load_tokenizer(folder))
    for first in range(0, len(records), size):
        batch = records[first:first + size]
        inputs, targets = (t.to(device) for t in collate(batch))  # (B, T) each
        mask = pad_sequence([torch.ones(len(e.ids) - 1) for e in batch], True).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(inputs) if plain else model(inputs, attention_mask=mask).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        if not plain:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        loss.item()
        tokens += sum(len(e.ids) for e in batch)
        marks.append((clock(), tokens))
    return figures(marks, steps)

def answer(model, batch, new, how):
    """Continue prompts by `new` ids: random weights do not end. Or until the record's own answer
    ends, and the row is then "leaving", or "staying" until all have ended."""
    prompts, left = [e.ids[:e.n_prompt] for e in batch], [len(e.ids) - e.n_prompt for e in batch]

    def sample_ends(*args, sample=gpt.sample):
        ids = sample(*args).clamp(max=VOCAB - 2)
        left[:] = [n - 1 for n in left if n > 0]
        return torch.where(torch.tensor(left, device=ids.device) == 0, VOCAB - 1, ids)

    if how == "transformers":
        padded = [pad_sequence(rows, True, 0, "left").to(model.device) for rows in (
            [torch.tensor(p) for p in prompts], [torch.ones(len(p)) for p in prompts])]
        model.generate(padded[0], attention_mask=padded[1], do_sample=False, pad_token_id=0,
                       max_new_tokens=new, min_new_tokens=new)
    elif how == "leaving":
        with mock.patch("gpt.sample", sample_ends):
            gpt.generate(model, prompts, max(left), eos_id=VOCAB - 1)
    else:  # where rows have adapters of their own, nothing is shared
        model.active = [None] * len(batch) if how == "unshared" else None
        gpt.generate(model, prompts, max(left) if how == "staying" else new)

def generation(steps, folder, data, how="ours", new=32, size=64, device="cpu"):
    """Answers to all test prompts, longest first: that is a step, and two are measured."""
    records, _ = encode_examples(load_parts(data).test, load_tokenizer(folder))
    records.sort(key=lambda e: -e.n_prompt)
    model = make_rival(folder, "all", how).to(device).eval()
    if how != "transformers":
        finetune.keep_freed_memory()
        finetune.use_onednn()
    marks, steps = [], min(steps, 2)
    for step in range(steps + 1):
        for first in range(0, len(records), size):
            answer(model, records[first:first + size], new, how)
        marks.append((clock(), step * new * len(records)))
    return figures(marks, steps)

def products(C, size, device) -> dict:
    """Operations a second in a block's matrix products, by library or type."""
    def rate(dtype):
        work = seconds = 0.0
        for M, K, N in [(57 * size, C, n * C) for n in (3, 1, 4)] + [(57 * size, 4 * C, C)]:
            x, w, g = (torch.randn(s, device=device).to(dtype) for s in ((M, K), (N, K), (M, N)))
            for product in (lambda: x @ w.T, lambda: g @ w, lambda: g.T @ x):
                seconds += min(timeit.repeat(lambda: (product(), clock()), number=1, repeat=7))
                work += 2 * M * K * N
        return work / seconds
    rates = {"MKL": rate(torch.float32), "bf16": rate(torch.bfloat16)}
    finetune.use_onednn()
    if torch.backends.mkldnn.matmul.fp32_precision == "bf16":  # else it would really round
        rates["oneDNN"] = rate(torch.float32)
    return rates

# least: times the first row of the group, where oneDNN is twice MKL, and where not; most: GiB;
# share: of the rate of products, in operations that full finetuning needs
Row = namedtuple("Row", "name function options least most share", defaults=((), None, 0))
ALL, LORA, LAST = {"policy": "all"}, {"policy": "lora"}, {"policy": "last_block"}
CACHED, HF = {"flags": ["--cache-prefix"]}, {"library": "transformers"}
PLAIN, THEIRS = Row("plain loop", rival, ALL), Row("transformers", rival, ALL | HF)
CPU = {
    "full": [PLAIN, Row("full, fp32", ours, ALL, (3.6, 2.3), 2.9),
             Row("full, bf16", ours, ALL | {"flags": ["--dtype", "bf16"]}, (4.5, 3.1))],
    "last_block": [PLAIN, Row("last block", ours, LAST, (9, 6), 1.1),
                   Row("last block, cached, epoch 2", ours, LAST | CACHED, (25, 16.7))],
    "lora": [Row("plain loop of LoRA", rival, LORA), Row("LoRA", ours, LORA, (3.4, 2.2), 1.5)],
    "generation": [Row("answers by transformers", generation, {"how": "transformers", "size": 16}),
                   Row("answers", generation, {"size": 64}, (2.5, 2.5))]}  # 16: its best
GPU = [  # size of batches, rows
    (8, [THEIRS, Row("full", ours, ALL)]), (64, [THEIRS, Row("full", ours, ALL, (3.5, 3.5))]),
    (256, [THEIRS, Row("full", ours, ALL, share=0.45),
           Row("full, --compile", ours, ALL | {"flags": ["--compile"]}, share=0.52)]),
    (64, [Row("full", ours, ALL), Row("last block, cached", ours, LAST | CACHED, (3, 3))]),
    (64, [Row("PEFT", rival, LORA | HF), Row("LoRA", ours, LORA)])]
MET = {True: "yes", False: "**no**"}

def pair(name, function, options, without) -> list[Row]:
    """Rows without and with a remedy."""
    return [Row(f"without {name}", function, options | without),
            Row(f"with {name}", function, options)]

TWO_BLOCKS, HOW = {"policy": "last_two_blocks"} | CACHED, {"how": "ours", "size": 64}
REMEDIES = {name: pair(name, ours, ALL, {"without": name}) for name in (
    "mallopt", "caches", "products", "flash", "tree", "head", "lengths", "fused")} | {
    "prefix": pair("--cache-prefix, two blocks", ours, TWO_BLOCKS, {"flags": []}),
    "shared": pair("shared beginning of prompts", generation, HOW, {"how": "unshared"}),
    "leaving": pair("leaving", generation, HOW | {"how": "leaving"}, {"how": "staying"})}

def once(function, *args, **options):
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **options).result()

def make_data(folder, n_batches, size) -> str:
    """A data folder of records as long as the book's: so many batches to train on."""
    draws, path = random.Random(0), Path(folder, f"{n_batches} x {size}")
    path.mkdir(exist_ok=True)

    def text(quantiles, without):
        i = draws.randrange(len(quantiles) - 1)
        return " ".join(draws.choices(WORDS, k=draws.randint(*quantiles[i:i + 2]) - without))

    for name, n in (("train", n_batches * size), ("val", 8), ("test", 110)):
        records = [{"instruction": text(PROMPTS, TEMPLATE), "output": text(ANSWERS, 1)}
                   for _ in range(n)]
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return str(path)

def report(*cells) -> None:
    """One row of the table."""
    print("|", " | ".join(cells + ("",) * (7 - len(cells))), "|", flush=True)

def print_head(args) -> None:
    """Write the model, and print what this machine is, and its rates of products."""
    machine = once(write_model, args.folder, args.layers, 12, 768)
    args.gpu = args.gpu or machine["gpu"] and "cuda"
    rates = once(products, 768, 8, "cpu")
    args.strong = rates.get("oneDNN", 0) > 1.75 * rates["MKL"]
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = [*re.findall(r"model name\s*: (.*)", info), os.uname().machine][0]
    print(f"{time.strftime('%F')}, {cpu}, {machine['threads']} threads, {machine['gpu']} torch "
          f"{machine['torch']}; GPT-2 of {args.layers} blocks; GFLOP/s of products:",
          ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in rates.items()),
          f"(targets: oneDNN's {'are' if args.strong else 'are not'} twice MKL's)\n")
    report("what", "times the first", "tokens/s", "GiB", "proof (full: 1 %)", "target", "met")
    report(*["---"] * 7)

def compare(args, rows, size=8, device="cpu") -> None:
    """Measure the rows in rounds, and report each beside the first."""
    data = make_data(args.folder, args.steps + 3, size)
    common, rounds = {"folder": args.folder, "data": data, "size": size, "device": device}, []
    if not find_spec("peft"):  # it needs transformers
        rows = [row._replace(least=()) for row in rows if "transformers" not in str(row.options)]
    for i in range(args.rounds):  # every other one backwards
        rounds.append({row.name: once(row.function, args.steps, **common | row.options)
                       for row in rows[::-1 if i % 2 else 1]})
    for row in rows:
        own, first = ([figures[name] for figures in rounds] for name in (row.name, rows[0].name))
        ratios = [a["rate"] / b["rate"] for a, b in zip(own, first)]
        times, peak = statistics.median(ratios), max(f["peak"] for f in own) / 2**30
        proof = max(f.get("proof", 0) / f["step"] / BOOK_STEPS for f in own)
        rate = statistics.median(f["rate"] for f in own)
        share = rate * args.needed / args.chip if row.share else 0
        least, most = row.least[not args.strong] if row.least else 0, row.most or 1e9
        target = [f"{least} x"] * bool(row.least) + [f"{most} GiB"] * bool(row.most)
        target += [f"{row.share:.0%} of the products"] * bool(row.share)
        report(f"{row.name}, {device} {size}",
               f"{times:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
               f"{rate:,.0f}" + f" ({share:.0%})" * bool(share), f"{peak:.2f}",
               f"{proof:.2%}" if proof else "", ", ".join(target),
               MET[times >= least and peak <= most and share >= row.share] if target else "")

def bench_tiny(args) -> None:
    """The embedded model: one step, from start to end of the process, and the default run."""
    def seconds(script, *argv):
        began = time.perf_counter()
        subprocess.run([sys.executable, ROOT / script, *argv], check=True, stdout=sys.stderr)
        return time.perf_counter() - began
    out, once_only = f"{args.folder}/tiny", ("--max-steps", "1", "--no-responses", "--overwrite")
    start = min(seconds("finetune.py", "--out", out, *once_only) for _ in range(3))
    report("tiny, one step", f"{start:.1f} s", "", "", "", "4 s", MET[start < 4])
    run = seconds("finetune.py", "--out", out, "--overwrite", *["--max-steps=20"] * args.quick)
    seconds("evaluate.py", out)
    scores = json.loads(Path(out, "scores.json").read_text())
    exact, lost = scores["exact_match"], scores["forgetting"]
    report("tiny, default run", f"{run:.0f} s, {exact:.1%} exact, forgets {lost:.2f} nats", "", "",
           "", "60 s, 96 %, 0.4", MET[run < 60 and exact >= 0.96 and lost < 0.4])

def prove(blocks) -> tuple:
    """GB of a model in bf16, seconds of freeze and check_unchanged on one core, GiB beyond it."""
    os.sched_setaffinity(0, [0])
    model = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096, dtype=torch.bfloat16)
                                  for _ in range(blocks)))
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    before, began = peak(), clock()
    plan = freeze.freeze(model, "last:1")
    for p in plan.parameters():
        p.data += 1
    plan.check_unchanged(model)
    seconds = clock() - began
    return sum(p.nbytes for p in model.parameters()) / 1e9, seconds, peak() - before

def bench_proof(args) -> None:
    """Proofs of growing models; the last has 1 B parameters."""
    for blocks in (2,) if args.quick else (8, 15, 30, 60):
        size, seconds, more = once(prove, blocks)
        report(f"proof of {size:.2f} GB, one core", f"{seconds / size:.2f} s a GB", "",
               f"+{more:.2f}", "", "3 s a GB, 0.1 GiB", MET[seconds < 3 * size and more < 0.1])

def bench_gpu(args) -> None:
    """GPT-2 medium's shape on a GPU, beside transformers and PEFT."""
    args = argparse.Namespace(**vars(args) | {"folder": f"{args.folder}/medium"})
    if args.gpu:
        layers = min(args.layers * 2, 24)
        once(write_model, args.folder, layers, 16, 1024)
        args.chip = once(products, 1024, 64, args.gpu)["bf16"]
        args.needed = 6 * 1024 * (12 * layers * 1024 + VOCAB * 13 / 57)  # the head: of answers
        report(f"bf16 products, {args.gpu} 64", f"{args.chip / 1e12:,.1f} TFLOP/s")
        for size, rows in GPU:
            compare(args, rows, size, args.gpu)
        steps = 2 if args.quick else BOOK_STEPS
        where = dict(folder=args.folder, data=make_data(args.folder, steps, 8), device=args.gpu)
        began = time.perf_counter()
        once(ours, 1, policy="all", flags=["--max-steps", "2"], **where)
        report(f"start and two steps, {args.gpu}", f"{time.perf_counter() - began:.0f} s")
        book = once(ours, steps - 1, policy="all", **where)
        minutes, proof = book["step"] * steps / 60, book["proof"] / book["step"] / steps
        report(f"the book's run, {args.gpu}", f"{minutes:.2f} min", f"{book['rate']:,.0f}", "",
               f"{proof:.2%}", "0.15 min, 2 %", MET[minutes < 0.15 and proof < 0.02])
        answers = once(generation, 1, **where)["step"]
        report(f"110 answers, {args.gpu}", f"{answers:.1f} s", "", "", "", "2 s", MET[answers < 2])
    for size, row in [(size, row) for size, rows in GPU for row in rows if not args.gpu]:
        report(f"{row.name}, cuda {size}", "not measured here: no GPU")

OTHERS = {"tiny": bench_tiny, "proof": bench_proof, "gpu": bench_gpu}

def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Speed and memory as a Markdown table.")
    add = parser.add_argument
    add("--only", default=",".join(CPU | OTHERS), help="rows: of %(default)s")
    add("--ablate", nargs="?", const=",".join(REMEDIES), metavar="NAMES",
        help=f"with and without each remedy: {', '.join(REMEDIES)}")
    add("--steps", type=int, default=12, help="measured, in a round")
    add("--rounds", type=int, default=3, help="in which the variants take turns")
    add("--layers", type=int, default=12, help="fewer: a test of this file")
    add("--quick", action="store_true", help="two steps, one round")
    add("--gpu", help=argparse.SUPPRESS)  # a device for its rows: cpu tests them
    args = parser.parse_args()
    if args.quick:
        args.steps, args.rounds = 2, 1
    with tempfile.TemporaryDirectory() as args.folder:
        print_head(args)
        for name in (args.ablate or args.only).split(","):
            try:
                rows = (CPU | REMEDIES | OTHERS)[name]
                rows(args) if callable(rows) else compare(args, rows)
            except Exception as error:
                report(name, f"not measured: {type(error).__name__}: {error}")

if __name__ == "__main__":
    main()
