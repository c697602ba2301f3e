"""
Speed and memory, side by side in one run: this project, and the loop that most people write first.

The plain loop: random batches of 8 padded to the longest, logits everywhere, cross_entropy's ignore_index,
AdamW and allocator as they come; LoRA wrapped around nn.Linear; generation of one prompt at a time, all of
it computed again for each token. It is given this project's model, which is faster than most.

Every variant runs in a process of its own, with its own allocator and its own peak memory. The processes take
turns, step by step, over the same records, so that a noisy machine slows all of them, and what is reported
is the median of the per-step ratios of tokens per second. GPT-2 small's shape, random weights, loss on the
answers of ../shared/data/instruction-data.json, as many threads as torch takes (OMP_NUM_THREADS).

    python tests/bench.py                             # all but the slow ones
    python tests/bench.py --only full,lora --steps 24
    python tests/bench.py --only million,long,xl      # the slow ones
    python tests/bench.py --quick                     # a cut-down shape and few steps: does every line run
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# No torch up here: the kernel counts a child's peak memory from its parent's size on, so the parent stays small.
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
SHAPES = {"quick": (3, 2, 64), "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-xl": (48, 25, 1600)}
BLOCKS = {"last_block": 1, "last_two_blocks": 2}
GiB = 2**30


# ---------------------------------------------------------------------------------------------
# what is measured: each of WORKERS runs in a process of its own and returns a function that answers requests


def make_model(folder, shape):
    """Write a model folder of random weights, with GPT-2's tokenizer."""
    import torch
    from data import load_tokenizer, save_tokenizer
    from gpt import GPT, GPTConfig

    torch.manual_seed(0)
    n_layer, n_head, n_embd = SHAPES[shape]
    GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)).save_pretrained(folder)
    save_tokenizer(load_tokenizer(SHARED / "gpt2"), folder)
    return lambda request: {}


def encoded_records(part):
    """The training (0), validation (1) or test (2) part of the records, encoded."""
    from data import encode_examples, load_examples, load_tokenizer, split_examples

    examples = split_examples(load_examples(SHARED / "instruction-data.json"))[part]
    return encode_examples(examples, load_tokenizer(SHARED / "gpt2"))[0]


def needed_flops(config, batch, policy):
    """
    Of a step's matrix products: 2 per weight and position forward, 2 for the gradient of the input where
    something below trains, 2 for the weight's. Not needed are padding and, where no loss is wanted, the head and,
    in the last block, all but attention's keys and values.
    """
    C, L = config.n_embd, config.n_layer
    positions = sum(len(e.ids) - 1 for e in batch)
    answers = sum(len(e.ids) - e.n_prompt for e in batch)
    attention = sum(2 * (len(e.ids) - 1) ** 2 * C for e in batch)  # scores and values: causal, half of all pairs
    block = 24 * C * C * positions + attention
    last = 4 * C * C * positions + 20 * C * C * answers + attention * answers / positions
    head = 2 * config.vocab_size * C * answers
    if policy in BLOCKS:
        trained = BLOCKS[policy]
        return (L - trained) * block + 3 * ((trained - 1) * block + last) + 2 * head
    return (3 if policy == "all" else 2) * ((L - 1) * block + last + head)


def stepper(step, batches, longest, config, policy, device, prove=lambda: None):
    """The replies of a training loop: to {"step": i} its figures, to {} its peak memory."""
    import finetune
    import torch

    def answer(request):
        if not request:
            step(longest)  # a run's peak is that of its longest batch
            return {"proof": prove(), "peak": finetune.peak_memory(torch.device(device))}
        batch = batches[request["step"] % len(batches)]
        start = time.perf_counter()
        loss = step(batch)
        if device == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - start, "tokens": sum(len(e.ids) for e in batch), "loss": loss,
                "flops": needed_flops(config, batch, policy)}

    return answer


def draw(steps, size):
    """(records enough for so many steps, drawn at random: the same for every loop; the longest batch of all)."""
    records = encoded_records(0)
    return random.Random(0).sample(records, min(size * steps, len(records))), sorted(records, key=lambda e: len(e.ids))[-size:]


def plain_train(folder, policy, steps, size=8):
    """The plain loop, with the usual ways to train less than everything."""
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    from data import collate
    from gpt import GPT

    class WithLoRA(nn.Module):
        def __init__(self, linear, r=16, alpha=32):
            super().__init__()
            self.linear, self.scale = linear, alpha / r
            self.A = nn.Parameter(torch.randn(linear.in_features, r) / r ** 0.5)
            self.B = nn.Parameter(torch.zeros(r, linear.out_features))

        def forward(self, x):
            return self.linear(x) + self.scale * (x @ self.A @ self.B)

    model = GPT.from_pretrained(folder).requires_grad_(policy == "all").train()
    if policy == "lora":
        for block in model.h:
            block.attn.c_attn, block.attn.c_proj = WithLoRA(block.attn.c_attn), WithLoRA(block.attn.c_proj)
            block.mlp.c_fc, block.mlp.c_proj = WithLoRA(block.mlp.c_fc), WithLoRA(block.mlp.c_proj)
    elif policy in BLOCKS:
        for module in (*model.h[-BLOCKS[policy]:], model.ln_f):
            module.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5, weight_decay=0.1)

    def step(batch):
        inputs, targets = collate(batch)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        optimizer.step()
        return loss.item()

    sample, longest = draw(steps, size)
    batches = [sample[i:i + size] for i in range(0, len(sample), size)]
    return stepper(step, batches, longest, model.config, policy, "cpu")


def hf_train(folder, policy, steps, size=8, device="cpu", dtype="fp32"):
    """transformers' model, peft's adapters, and what transformers' Trainer does in a step by default."""
    import torch
    import torch.nn.functional as F
    from data import collate
    from gpt import read_config
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder)
    if policy == "lora":
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True))
    model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, fused=True)

    def step(batch):
        inputs, targets = (t.to(device) for t in collate(batch))
        mask = torch.tensor([[int(i < len(e.ids) - 1) for i in range(inputs.shape[1])] for e in batch], device=device)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            logits = model(input_ids=inputs, attention_mask=mask).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    sample, longest = draw(steps, size)
    batches = [sample[i:i + size] for i in range(0, len(sample), size)]
    return stepper(step, batches, longest, read_config(Path(folder) / "config.json"), policy, device)


def our_train(folder, policy, steps, size=8, device="cpu", dtype="fp32", flags=(), length=None):
    """finetune.py's own functions in the order of its loop. `length`: records of so many ids, loss on all."""
    import finetune
    import torch
    from data import Encoded, batches

    if hasattr(finetune, "keep_memory"):
        finetune.keep_memory()
    args = finetune.parse_args(["--model", folder, "--trainable", policy, "--batch-size", str(size), "--device", device,
                                "--dtype", dtype, *flags, *["--lora-r", "16"] * (policy == "lora"), *["--loss-on", "all"] * bool(length)])
    machine = finetune.join_processes(finetune.choose_device(args.device), args.dtype)
    model, _ = finetune.load_model(args, *finetune.locate(args.model))
    model.to(machine.device)
    sample, longest = draw(steps, size * args.grad_accum)
    if length:
        sample = longest = [Encoded([(7 * i + row) % 50257 for i in range(length)], 1) for row in range(size)]
    plan, optimizer = finetune.prepare_plan(args, model, sample)
    order = [[sample[i] for i in batch] for batch in batches([len(e.ids) for e in sample], size * args.grad_accum, 123, 0)]
    prefix, taken = [], 0
    if "--cache-prefix" in flags:
        known = list({id(e): e for e in sample + longest}.values())
        prefix = [finetune.Prefix(model, plan, known, size, tempfile.gettempdir())]

    def step(batch):
        nonlocal taken
        plan.set_modes(model.train())
        loss, _ = finetune.take_step(model, plan, optimizer, batch, 1.0, taken, args, machine, *prefix)
        taken += 1
        return loss

    def prove():
        plan.check_model(model)
        plan.check_optimizer(optimizer)
        plan.check_unchanged(model, trained=taken > 1)
        return plan.seconds

    for batch in order if prefix else []:  # the first epoch fills the cache
        step(batch)
    return stepper(step, order, longest, model.config, policy, machine.device.type, prove)


def generation(folder, kind, device="cpu"):
    """`new` tokens for each of some test prompts, longest first: "plain" (one prompt of each request), "ours" or "hf"."""
    import finetune
    import torch
    from gpt import GPT, generate

    if kind == "hf":
        from transformers import GPT2LMHeadModel
        model = GPT2LMHeadModel.from_pretrained(folder).eval().to(device)
    else:
        model = GPT.from_pretrained(folder).eval().to(device)
    if kind == "ours" and hasattr(finetune, "keep_memory"):
        finetune.keep_memory()
    prompts = sorted((e.ids[:e.n_prompt] for e in encoded_records(2)), key=lambda ids: -len(ids))

    @torch.no_grad()
    def run(batch, new):
        if kind == "ours":  # random weights never end an answer: all rows go the whole way
            generate(model, batch, new)
        elif kind == "plain":
            idx = torch.tensor(batch, device=device)
            for _ in range(new):
                idx = torch.cat([idx, model(idx)[:, -1:].argmax(-1)], dim=1)
        else:
            width = max(map(len, batch))
            idx = torch.tensor([[0] * (width - len(ids)) + ids for ids in batch], device=device)
            mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch], device=device)
            model.generate(idx, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)

    def answer(request):
        if not request:
            return {"peak": finetune.peak_memory(torch.device(device))}
        start, end = request["prompts"]
        chosen = prompts[start:end]
        chosen = chosen[len(chosen) // 2:][:1] if kind == "plain" else chosen
        size = 16 if kind == "hf" else 32  # what evaluate.generate_responses takes
        begin = time.perf_counter()
        for i in range(0, len(chosen), size):
            run(chosen[i:i + size], request["new"])
        if device == "cuda":
            torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - begin, "tokens": len(chosen) * request["new"]}

    return answer


def machine(n_embd, device="cpu", size=8):
    """GFLOP/s of the matrix products of a step of `size` records of 57 ids: forward, for the input, for the weight."""
    import torch

    def rate(f, flops):
        times = []
        for _ in range(10):
            start = time.perf_counter()
            f()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return flops / min(times) / 1e9

    rows, C, table = 57 * size, n_embd, {}
    for dtype in (torch.float32, torch.bfloat16):
        for M, K, N in ((rows, C, 3 * C), (rows, C, C), (rows, C, 4 * C), (rows, 4 * C, C), (rows // 4, C, 50257)):
            x, w, g = (torch.randn(*shape, device=device).to(dtype) for shape in ((M, K), (N, K), (M, N)))
            table[f"{'fp32' if dtype == torch.float32 else 'bf16'} {M} x {K} x {N}"] = [
                rate(f, 2 * M * K * N) for f in (lambda: x @ w.T, lambda: g @ w, lambda: g.T @ x)]
    return lambda request: {"table": table, "threads": torch.get_num_threads(), "torch": torch.__version__,
                            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def padding():
    """Share of a run's positions that are padding: in this project's batches of 8, and in random ones."""
    from data import batches

    lengths = [len(e.ids) - 1 for e in encoded_records(0)]
    drawn = random.Random(0).sample(lengths, len(lengths))
    share = lambda rows: 1 - sum(lengths) / sum(len(row) * max(row) for row in rows)
    return lambda request: {"ours": share([[lengths[i] for i in b] for b in batches(lengths, 8, 123, 0)]),
                            "random": share([drawn[i:i + 8] for i in range(0, len(drawn), 8)])}


def records_file(path, n):
    """Write n records as JSON lines: those at hand, numbered so that no two are alike."""
    examples = json.loads((SHARED / "instruction-data.json").read_text(encoding="utf-8"))
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n):
            example = examples[i % len(examples)]
            file.write(json.dumps(example | {"instruction": f"{example['instruction']} ({i})"}) + "\n")


def tokenize(n):
    """Read n records from JSON lines, encode them, put them in batches."""
    import finetune
    import torch
    from data import batches, encode_examples, load_examples, load_tokenizer

    tokenizer = load_tokenizer(SHARED / "gpt2")
    with tempfile.TemporaryDirectory() as folder:
        records_file(Path(folder) / "records.jsonl", n)
        begin = time.perf_counter()
        examples = load_examples(Path(folder) / "records.jsonl")
        read = time.perf_counter()
    encoded, _ = encode_examples(examples, tokenizer)
    tokenized = time.perf_counter()
    batches([len(e.ids) for e in encoded], 8, 123, 0)
    figures = {"read": read - begin, "tokenize": tokenized - read, "batch": time.perf_counter() - tokenized,
               "tokens": sum(len(e.ids) for e in encoded), "peak": finetune.peak_memory(torch.device("cpu"))}
    return lambda request: figures


def whole_run(n):
    """finetune.py on n records for one epoch of the embedded model's last block: how long, and how its steps last."""
    with tempfile.TemporaryDirectory() as folder:
        records_file(Path(folder) / "records.jsonl", n)
        begin = time.perf_counter()
        subprocess.run([sys.executable, ROOT / "finetune.py", "--data", f"{folder}/records.jsonl", "--out", f"{folder}/run",
                        "--trainable", "last_block", "--epochs", "1", "--batch-size", "32", "--no-responses"],
                       check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begin
        lines = [json.loads(text) for text in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in lines if entry["train_loss"] is not None]
    lasted = [(b["seconds"] - a["seconds"]) / (b["tokens"] - a["tokens"]) for a, b in zip(steps, steps[1:]) if b["val_loss"] is None]
    quarter = max(1, len(lasted) // 4)
    figures = {"seconds": seconds, "steps": len(steps),
               "growth": statistics.median(lasted[-quarter:]) / statistics.median(lasted[:quarter])}
    return lambda request: figures


def start_up():
    """Seconds from the command to the line of the first step, on the embedded model."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        command = [sys.executable, ROOT / "finetune.py", "--out", f"{folder}/run", "--max-steps", "1", "--no-responses"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            seconds = next(time.perf_counter() - begin for text in process.stdout if text.startswith("step 1/"))
            process.stdout.read()
    return lambda request: {"seconds": seconds}


WORKERS = {f.__name__: f for f in (make_model, plain_train, hf_train, our_train, generation, machine, padding, tokenize,
                                   whole_run, start_up)}


def serve(name, options):
    """In the child: requests come as lines of JSON, replies go the same way."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    sys.path.insert(0, str(ROOT))
    answer = WORKERS[name](**options)
    for text in sys.stdin:
        print(json.dumps(answer(json.loads(text))), file=replies, flush=True)


# ---------------------------------------------------------------------------------------------
# the parent: who takes turns with whom, and what is printed


class Failed(RuntimeError):
    """A worker ended without a reply; the message is the last line it wrote."""


class Worker:
    """A child process that runs one of WORKERS; `ask` sends it a request and waits for the reply."""

    def __init__(self, name, **options):
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([sys.executable, __file__, "--worker", name, json.dumps(options)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)

    def ask(self, **request):
        """The reply; Failed if the process has ended."""
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass
        if not (text := self.process.stdout.readline()):
            code = self.process.wait()
            self.log.seek(0)
            raise Failed(([f"exit code {code}"] + self.log.read().split("\n")[:-1])[-1])
        return json.loads(text)

    def close(self):
        """End the process."""
        self.process.communicate()


def once(name, **options):
    """The one reply of a worker."""
    worker = Worker(name, **options)
    try:
        return worker.ask()
    finally:
        worker.close()


def take_turns(variants, requests):
    """
    Start the variants, name -> (worker, options), and send each request to all of them in turn, the first
    one twice to warm up. Returns {name: replies}, the last of which is the one to {}; says which failed.
    """
    workers, replies = {}, {}
    try:
        for name, (worker, options) in variants.items():
            workers[name], replies[name] = Worker(worker, **options), []
        for i, request in enumerate([requests[0], *requests, {}]):
            for name in list(replies):
                try:
                    replies[name] += [workers[name].ask(**request)][not i:]
                except Failed as error:
                    del replies[name]
                    report(name, f"not measured: {error}")
    finally:
        for worker in workers.values():
            worker.close()
    return replies


def report(name, measured, bar="", met=None):
    """One line; a cut-down shape says nothing about the bars."""
    met = None if "--quick" in sys.argv else met
    print(f"{name:52} {measured:28} {bar:22} {'' if met is None else 'met' if met else 'NOT MET'}".rstrip(), flush=True)


def ratio(ours, theirs):
    """Median over the steps of how many times as many tokens per second `ours` are as `theirs`."""
    return statistics.median(a["tokens"] / a["seconds"] / (b["tokens"] / b["seconds"]) for a, b in zip(ours[:-1], theirs[:-1]))


def compare(replies, bars, beside="plain loop"):
    """A line for each variant beside the one whose name ends in `beside`; `bars`: name -> least ratio."""
    other = next(own for name, own in replies.items() if name.endswith(beside))
    for name, own in replies.items():
        if own is other and beside != "plain loop":
            continue
        speed = sum(r["tokens"] for r in own[:-1]) / sum(r["seconds"] for r in own[:-1])
        times, bar = ratio(own, other), bars.get(name)
        report(name, f"{times:.2f} x {beside}, {speed:,.0f} tok/s", f"at least {bar} x" if bar else "", times >= bar if bar else None)


def report_memory(replies, bars):
    """A line for each variant's peak; `bars`: name -> most GiB."""
    for name, own in replies.items():
        peak, bar = own[-1]["peak"] / GiB, bars.get(name)
        report(f"{name}: peak memory", f"{peak:.2f} GiB", f"at most {bar} GiB" if bar else "", peak <= bar if bar else None)


def share_of_peak(name, own, peak, bar=None):
    """A line: needed GFLOP/s, as a share of what the machine's matrix products reach."""
    done = sum(r["flops"] for r in own[:-1]) / sum(r["seconds"] for r in own[:-1]) / 1e9
    report(f"{name}: needed GFLOP/s of {peak:,.0f}", f"{done:,.0f} = {done / peak:.0%}", f"at least {bar:.0%}" if bar else "",
           done / peak >= bar if bar else None)


def peaks(figures):
    """The best rate of any shape, for each dtype."""
    return {dtype: max(max(rates) for name, rates in figures["table"].items() if name.startswith(dtype)) for dtype in ("fp32", "bf16")}


def bench_full(args):
    """Bar 1, the machine, and of bars 5 and 6 the memory and the proof."""
    figures = once("machine", n_embd=SHAPES[args.shape][2])
    print(f"{platform.processor() or platform.machine()}, {figures['threads']} threads, torch {figures['torch']}")
    for name, rates in figures["table"].items():
        report(f"GFLOP/s, {name}", "".join(f"{rate:8,.0f}" for rate in rates), "forward, input, weight")
    share = once("padding")
    report("padding, share of positions", f"{share['ours']:.2%}, at random {share['random']:.1%}", "under 1 %", share["ours"] < 0.01)
    train = {"folder": args.folder, "policy": "all", "steps": args.steps}
    replies = take_turns({"full, plain loop": ("plain_train", train), "full, fp32": ("our_train", train),
                          "full, bf16": ("our_train", train | {"dtype": "bf16"}),
                          "full, transformers": ("hf_train", train)}, args.requests)
    compare(replies, {"full, fp32": 2.6, "full, bf16": 3.8})
    for name, own in replies.items():
        share_of_peak(name, own, peaks(figures)["bf16" if "bf16" in name else "fp32"], 0.72 if name == "full, fp32" else None)
    report_memory(replies, {"full, fp32": 2.9})
    own = replies["full, fp32"]
    run, proof = 2 * 117 * statistics.median(r["seconds"] for r in own[:-1]), own[-1]["proof"]
    report("freeze proof, of 2 epochs of 117 steps", f"{proof:.2f} of {run:.0f} s = {proof / run:.2%}", "under 2 %", proof < 0.02 * run)


def bench_blocks(args):
    """Bar 2."""
    for policy in BLOCKS:
        train = {"folder": args.folder, "policy": policy, "steps": args.steps}
        cached = f"{policy}, fp32, --cache-prefix, 2nd epoch"
        replies = take_turns({f"{policy}, plain loop": ("plain_train", train), f"{policy}, fp32": ("our_train", train),
                              f"{policy}, bf16": ("our_train", train | {"dtype": "bf16"}),
                              cached: ("our_train", train | {"flags": ["--cache-prefix"]})}, args.requests)
        compare(replies, {f"{policy}, fp32": 4, cached: 12})
        report_memory(replies, {"last_block, fp32": 1.2})


def bench_lora(args):
    """Bar 3."""
    train = {"folder": args.folder, "policy": "lora", "steps": args.steps}
    full = train | {"policy": "all"}
    replies = take_turns({"LoRA, plain loop": ("plain_train", train), "LoRA, fp32": ("our_train", train),
                          "full, fp32": ("our_train", full), "LoRA, bf16": ("our_train", train | {"dtype": "bf16"}),
                          "full, bf16": ("our_train", full | {"dtype": "bf16"}), "LoRA, peft": ("hf_train", train)}, args.requests)
    compare({name: own for name, own in replies.items() if "LoRA" in name}, {"LoRA, fp32": 2.8})
    for dtype in ("fp32", "bf16"):
        pair = {name: own for name, own in replies.items() if name in (f"LoRA, {dtype}", f"full, {dtype}")}
        compare(pair, {f"LoRA, {dtype}": 1}, f"full, {dtype}")
    report_memory({name: own for name, own in replies.items() if "LoRA" in name}, {"LoRA, fp32": 1.4})


def bench_generate(args):
    """Bar 4."""
    new = 4 if args.quick else 32
    print(f"110 test prompts in batches of 32, {new} new tokens each (the plain loop: one prompt of each batch)")
    variants = {"generate, plain loop": "plain", "generate, transformers": "hf", "generate": "ours"}
    replies = take_turns({name: ("generation", {"folder": args.folder, "kind": kind}) for name, kind in variants.items()},
                         [{"prompts": [i, i + 32], "new": new} for i in range(0, 110, 32)])
    compare(replies, {"generate": 40})
    if "generate, transformers" in replies:
        compare(dict(list(replies.items())[1:]), {"generate": 1.5}, "transformers")
    report_memory(replies, {"generate": 2.9})


def bench_data(args):
    """Of bar 6: start-up and tokenizing."""
    seconds = statistics.median(once("start_up")["seconds"] for _ in range(3))
    report("start-up to the first step, tiny", f"{seconds:.1f} s", "under 4 s", seconds < 4)
    n = 500 if args.quick else 50_000
    figures = once("tokenize", n=n)
    report(f"tokenizing {n:,} records", f"{figures['tokenize']:.1f} s", "under 15 s", figures["tokenize"] < 15)


def bench_million(args):
    """Of bar 6: a million records, bounded by 2 KiB for each."""
    n = 10_000 if args.quick else 1_000_000
    figures = once("tokenize", n=n)
    report(f"reading and encoding {n:,} records", f"{figures['read'] + figures['tokenize']:.0f} s, {figures['peak'] / GiB:.2f} GiB",
           "at most 2 KiB each", figures["peak"] <= 2048 * n + GiB)


def bench_scaling(args):
    """Bar 7: two straight lines through three sizes have the same slope, whatever the start-up takes."""
    sizes = (200, 400, 800) if args.quick else (1000, 2000, 4000, 8000, 16000, 32000, 64000)
    seconds, growth = {}, 0.0
    print(" records  read  tokenize  batches  |  one epoch of tiny's last block:  steps  seconds  a token, last/first quarter")
    for n in sizes:
        data, run = once("tokenize", n=n), once("whole_run", n=n)
        seconds[n], growth = data["read"] + data["tokenize"] + data["batch"] + run["seconds"], run["growth"]
        print(f"{n:8} {data['read']:5.2f} {data['tokenize']:9.2f} {data['batch']:8.2f} {run['steps']:42} {run['seconds']:8.1f} {growth:8.2f}", flush=True)
    low, middle, high = sizes[0], sizes[len(sizes) // 2], sizes[-1]
    curve = (seconds[high] - seconds[middle]) / (high - middle) / ((seconds[middle] - seconds[low]) / (middle - low))
    report("seconds for each further record, many over few", f"{curve:.2f} x", "at most 1.1 x", curve <= 1.1)
    report("seconds for a token, end of the longest run over start", f"{growth:.2f} x", "at most 1.1 x", growth <= 1.1)


def bench_long(args):
    """Of bar 5: batches of 8 records of 1,024 ids, loss on all."""
    train = {"folder": args.folder, "policy": "all", "steps": 1, "length": 1024}
    for flags in ([], ["--recompute"]):
        name = " ".join(["full, 8 x 1,024 ids, loss on all", *flags])
        replies = take_turns({name: ("our_train", train | {"flags": flags})}, [{"step": 0}])
        report_memory(replies, {})


def bench_xl(args):
    """Of bar 5: GPT-2 XL's shape. (In full, weights, gradients and moments are 16 bytes a parameter: 23.2 GiB.)"""
    with tempfile.TemporaryDirectory() as folder:
        once("make_model", folder=folder, shape="quick" if args.quick else "gpt2-xl")
        for policy in ("lora", "last_two_blocks"):
            train = {"folder": folder, "policy": policy, "steps": 1, "size": 4, "flags": ["--recompute", "--grad-accum", "2"]}
            name = f"XL, {policy}, --recompute --grad-accum 2"
            replies = take_turns({name: ("our_train", train)}, [{"step": 0}])
            report_memory(replies, {name: 24})


def bench_gpu(args):
    """Bar 8."""
    gpu = once("machine", n_embd=64)["gpu"]
    if not gpu:
        for name in ("medium, full, bf16: share of peak", "medium beside transformers", "the book's run", "the 110 answers"):
            report(f"GPU: {name}", "not measured: no GPU")
        return
    print(gpu)
    with tempfile.TemporaryDirectory() as folder:
        once("make_model", folder=folder, shape="gpt2-medium")
        peak = peaks(once("machine", n_embd=1024, device="cuda", size=64))["bf16"]
        train = {"folder": folder, "policy": "all", "steps": 14, "size": 64, "device": "cuda", "dtype": "bf16"}
        replies = take_turns({"GPU: medium, transformers": ("hf_train", train), "GPU: medium, full": ("our_train", train),
                              "GPU: medium, full, --compile": ("our_train", train | {"flags": ["--compile"]})}, [{"step": i} for i in range(14)])
        compare(replies, {"GPU: medium, full": 2}, "transformers")
        for name, own in replies.items():
            share_of_peak(name, own, peak, 0.45 if name == "GPU: medium, full" else None)
        train |= {"size": 8, "steps": 117}
        own = take_turns({"the book's run": ("our_train", train)}, [{"step": i} for i in range(117)])["the book's run"]
        report("GPU: the book's run, 2 x 935 records, medium", f"{2 * sum(r['seconds'] for r in own[:-1]) / 60:.2f} min", "(the book, A100: 0.86)")
        replies = take_turns({"": ("generation", {"folder": folder, "kind": "ours", "device": "cuda"})}, [{"prompts": [0, 110], "new": 64}])
        report("GPU: 110 answers of 64 tokens, medium", f"{replies[''][0]['seconds']:.1f} s", "under 3 s", replies[""][0]["seconds"] < 3)


BENCHES = {name.removeprefix("bench_"): f for name, f in list(globals().items()) if name.startswith("bench_")}
SLOW = ("million", "long", "xl")


def parse_args():
    """The flags."""
    parser = argparse.ArgumentParser(description="Measure speed and memory against the bars.")
    parser.add_argument("--only", default=",".join(n for n in BENCHES if n not in SLOW), help=f"names of {', '.join(BENCHES)} (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="training steps of each variant (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a shape of two blocks, three steps: does every line run")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(BENCHES):
        parser.error(f"--only {','.join(sorted(unknown))}: there are {', '.join(BENCHES)}")
    args.shape, args.steps = ("quick", 3) if args.quick else ("gpt2", args.steps)
    args.requests = [{"step": i} for i in range(args.steps)]
    return args


def main():
    """Run the benches that were asked for; in a child, be a worker."""
    args = parse_args()
    if args.worker:
        return serve(args.worker[0], json.loads(args.worker[1]))
    if not (SHARED / "instruction-data.json").is_file():
        sys.exit(f"nothing is measured: {SHARED} is not there")
    with tempfile.TemporaryDirectory() as args.folder:
        once("make_model", folder=args.folder, shape=args.shape)
        for name in args.only:
            print(f"\n{name}: {time.strftime('%F %H:%M')}", flush=True)
            try:
                BENCHES[name](args)
            except Failed as error:
                report(name, f"not measured: {error}")


if __name__ == "__main__":
    main()
