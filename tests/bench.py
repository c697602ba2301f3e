"""
Speed and memory, side by side in one run: this project, and the loop that most people write first.

The plain loop: random batches of 8 padded to the longest, logits everywhere, cross_entropy's ignore_index,
AdamW and allocator as they come; LoRA wrapped around nn.Linear; generation of one prompt at a time, all of
it computed again for each token. It is given this project's model, which is faster than most. This project
is finetune.py itself, with the flags that are named; only the clock is put around its `take_step`.

Every variant runs in a process of its own, with its own allocator and its own peak memory. The processes take
turns, step by step, over the same records, so that a noisy machine slows all of them, and what is reported
is the median of the per-step ratios of tokens per second. GPT-2 small's shape, random weights, loss on the
answers of ../shared/data/instruction-data.json, as many threads as torch takes (OMP_NUM_THREADS).

    python tests/bench.py                             # every bar: a quarter of an hour on two cores
    python tests/bench.py --only full,lora --steps 24
    python tests/bench.py --quick                     # a cut-down shape and few steps: does every line run
"""

import argparse
import inspect
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

# No torch up here: the kernel counts a child's peak memory from its parent's size on, so the parent stays small.
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
SHAPES = {"quick": (3, 2, 64), "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-xl": (48, 25, 1600)}
BLOCKS = {"last_block": 1, "last_two_blocks": 2}
GiB = 2**30


# ---------------------------------------------------------------------------------------------
# what is measured: each worker is a function that runs in a process of its own and returns its figures; those that take turns
# wait for turn() before each step and reply() with the step's figures


def turn() -> dict | None:
    """The parent's next request, or None when there are no more."""
    return json.loads(sys.stdin.readline() or "null")


def reply(figures: dict) -> None:
    """Send figures to the parent."""
    print(json.dumps(figures), file=REPLIES, flush=True)


def make_model(folder, shape):
    """Write a model folder of random weights, with GPT-2's tokenizer; "narrow": with the embedded model's, small and fast."""
    import torch
    from data import load_tokenizer, save_tokenizer
    from gpt import GPT, GPTConfig

    torch.manual_seed(0)
    tokenizer = load_tokenizer("tiny" if shape == "narrow" else SHARED / "gpt2")
    n_layer, n_head, n_embd = SHAPES.get(shape, (1, 2, 32))
    GPT(GPTConfig(tokenizer.n_vocab, 1024, n_layer, n_head, n_embd)).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def training_part(file, folder):
    """The records of the file's training part, encoded."""
    from data import encode_examples, load_examples, load_tokenizer, split_examples

    return encode_examples(split_examples(load_examples(file))[0], load_tokenizer(folder))[0]


def clock(device) -> float:
    """Seconds, once the device has done what it was given."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(device) -> int:
    """Bytes of this process, or on the GPU, at their most."""
    import finetune
    import torch

    return finetune.peak_memory(torch.device(device))


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


def step_figures(seconds, config, batch, policy):
    """What is replied after a step."""
    return {"seconds": seconds, "tokens": sum(len(e.ids) for e in batch), "flops": needed_flops(config, batch, policy)}


def our_train(folder, file, policy, size=8, device="cpu", flags=(), skip=0):
    """finetune.py with these flags. It takes turns from its step number `skip` on, and ends by itself."""
    import finetune

    take_step, mean_loss = finetune.take_step, finetune.mean_loss
    signature, steps, validations, plans, over = inspect.signature(take_step), 0, [], [], False

    def timed_step(*args, **more):
        nonlocal steps, over
        given = signature.bind(*args, **more).arguments
        over = over or steps >= skip and turn() is None
        begin = clock(device)
        result = take_step(*args, **more)
        if steps >= skip and not over:
            reply(step_figures(clock(device) - begin, given["model"].config, given["batch"], policy))
        steps += 1
        plans[:] = [given["plan"]]
        return result

    def timed_validation(*args, **more):
        begin = clock(device)
        result = mean_loss(*args, **more)
        validations.append(clock(device) - begin)
        return result

    finetune.take_step, finetune.mean_loss = timed_step, timed_validation
    with tempfile.TemporaryDirectory() as out:
        lora = ["--lora-r", "16"] * (policy == "lora")
        argv = ["--model", folder, "--data", file, "--out", f"{out}/run", "--trainable", policy, *lora, "--batch-size", str(size),
                "--device", device, "--epochs", "1", "--no-responses", "--eval-every", "1000000", *flags]
        if code := finetune.main(argv):
            sys.exit(code)
    return {"peak": peak(device), "proof": plans[0].seconds, "validations": validations}


def plain_train(folder, file, policy, size=8):
    """The plain loop, with the usual ways to train less than everything."""
    import torch
    import torch.nn as nn
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
    return other_train(model, model.config, lambda inputs, mask: model(inputs), folder, file, policy, size)


def hf_train(folder, file, policy, size=8, device="cpu", bf16=False):
    """transformers' model, peft's adapters, and what transformers' Trainer does in a step by default."""
    from gpt import read_config
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder)
    if policy == "lora":
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True))
    logits = lambda inputs, mask: model(input_ids=inputs, attention_mask=mask).logits
    return other_train(model.to(device).train(), read_config(Path(folder) / "config.json"), logits, folder, file, policy, size,
                       device, bf16, fused=True, clip=1.0)


def other_train(model, config, logits, folder, file, policy, size, device="cpu", bf16=False, fused=None, clip=None):
    """Take turns on random batches, and then one step on the longest records, which a run's peak comes from."""
    import torch
    import torch.nn.functional as F
    from data import collate

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.1, fused=fused)

    def step(batch):
        inputs, targets = (t.to(device) for t in collate(batch))
        mask = torch.tensor([[int(i < len(e.ids) - 1) for i in range(inputs.shape[1])] for e in batch], device=device)
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            predicted = logits(inputs, mask)
        loss = F.cross_entropy(predicted.float().flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        return loss.item()

    records = training_part(file, folder)
    longest = sorted(records, key=lambda e: len(e.ids))[-size:]
    random.Random(0).shuffle(records)
    batches = [records[i:i + size] for i in range(0, len(records), size)]
    while turn() is not None:
        batches.append(batch := batches.pop(0))
        begin = clock(device)
        step(batch)
        reply(step_figures(clock(device) - begin, config, batch, policy))
    step(longest)
    return {"peak": peak(device)}


def generation(folder, kind, device="cpu"):
    """`new` tokens for each of some test prompts, longest first: "ours", "plain" (one prompt of each request) or "hf"."""
    import finetune
    import torch
    from data import encode_examples, load_examples, load_tokenizer, split_examples
    from gpt import GPT, generate

    if kind == "hf":
        from transformers import GPT2LMHeadModel
        model = GPT2LMHeadModel.from_pretrained(folder).eval().to(device)
    else:
        model = GPT.from_pretrained(folder).eval().to(device)
    if kind == "ours":
        finetune.keep_memory()
    test = split_examples(load_examples(SHARED / "instruction-data.json"))[2]
    prompts = sorted((e.ids[:e.n_prompt] for e in encode_examples(test, load_tokenizer(folder))[0]), key=lambda ids: -len(ids))

    @torch.no_grad()
    def run(batch, new):
        if kind == "ours":  # random weights never end an answer: all rows go the whole way
            with finetune.multiply_with_onednn():
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

    while request := turn():
        start, end = request["prompts"]
        chosen = prompts[start:end]
        chosen = chosen[len(chosen) // 2:][:1] if kind == "plain" else chosen
        size = 16 if kind == "hf" else 64  # its best; what evaluate.generate_responses takes
        begin = clock(device)
        for i in range(0, len(chosen), size):
            run(chosen[i:i + size], request["new"])
        reply({"seconds": clock(device) - begin, "tokens": len(chosen) * request["new"]})
    return {"peak": peak(device)}


def machine(n_layer, n_embd, device="cpu", size=8):
    """
    GFLOP/s of the matrix products of a step of `size` records of 57 ids: forward, for the input, for the weight. "best":
    of the fastest one; "mixed": of all of a step, each alone at its best.
    """
    import finetune
    import torch

    def rate(f, flops):
        times = []
        for _ in range(10):
            start = clock(device)
            f()
            times.append(clock(device) - start)
        return flops / min(times) / 1e9

    finetune.keep_memory()
    rows, C, table = 57 * size, n_embd, {}
    shapes = ((rows, C, 3 * C), (rows, C, C), (rows, C, 4 * C), (rows, 4 * C, C), (rows // 4, C, 50257))
    for name, dtype in (("fp32", torch.float32), ("fp32 as here", torch.float32), ("bf16", torch.bfloat16)):
        with finetune.multiply_with_onednn() if name == "fp32 as here" else nullcontext():
            for M, K, N in shapes:
                x, w, g = (torch.randn(*shape, device=device).to(dtype) for shape in ((M, K), (N, K), (M, N)))
                table[f"{name} {M} x {K} x {N}"] = [rate(f, 2 * M * K * N) for f in (lambda: x @ w.T, lambda: g @ w, lambda: g.T @ x)]
    best, mixed = {}, {}
    for name in ("fp32", "bf16"):
        best[name] = max(max(rates) for shape, rates in table.items() if shape.startswith(name))
        work = seconds = 0.0
        for M, K, N in shapes:  # each as often as in a step, at the better library's rate
            flops = 2 * M * K * N * (1 if N == 50257 else n_layer)
            for kind in zip(*(rates for shape, rates in table.items() if shape.startswith(name) and shape.endswith(f" {M} x {K} x {N}"))):
                work, seconds = work + flops, seconds + flops / max(kind)
        mixed[name] = work / seconds
    return {"table": table, "best": best, "mixed": mixed, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def padding():
    """Share of a run's positions that are padding: in this project's batches of 8, and in random ones."""
    from data import batches

    lengths = [len(e.ids) - 1 for e in training_part(SHARED / "instruction-data.json", SHARED / "gpt2")]
    drawn = random.Random(0).sample(lengths, len(lengths))
    share = lambda rows: 1 - sum(lengths) / sum(len(row) * max(row) for row in rows)
    return {"ours": share([[lengths[i] for i in b] for b in batches(lengths, 8, 123, 0)]),
            "random": share([drawn[i:i + 8] for i in range(0, len(drawn), 8)])}


def numbered_records(path, n):
    """Write n records as JSON lines: those at hand, numbered so that no two are alike."""
    examples = json.loads((SHARED / "instruction-data.json").read_text(encoding="utf-8"))
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n):
            example = examples[i % len(examples)]
            file.write(json.dumps(example | {"instruction": f"{example['instruction']} ({i})"}) + "\n")


def tokenize(n):
    """Read n records from JSON lines, encode them, put them in batches."""
    from data import batches, encode_examples, load_examples, load_tokenizer

    tokenizer, before = load_tokenizer(SHARED / "gpt2"), peak("cpu")
    with tempfile.TemporaryDirectory() as folder:
        numbered_records(f"{folder}/records.jsonl", n)
        begin = time.perf_counter()
        examples = load_examples(f"{folder}/records.jsonl")
        read = time.perf_counter()
    encoded, _ = encode_examples(examples, tokenizer)
    tokenized = time.perf_counter()
    batches([len(e.ids) for e in encoded], 8, 123, 0)
    return {"read": read - begin, "tokenize": tokenized - read, "batch": time.perf_counter() - tokenized, "bytes": peak("cpu") - before}


def whole_run(folder, n):
    """finetune.py on n records for one epoch: how long it takes, and how the time for a token grows during the run."""
    with tempfile.TemporaryDirectory() as temp:
        numbered_records(f"{temp}/records.jsonl", n)
        begin = time.perf_counter()
        command = [sys.executable, ROOT / "finetune.py", "--model", folder, "--data", f"{temp}/records.jsonl", "--out", f"{temp}/run",
                   "--epochs", "1", "--batch-size", "128", "--eval-every", "1000000", "--no-responses"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begin
        lines = [json.loads(text) for text in Path(temp, "run", "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["train_loss"] is not None]
    pairs = [(a, b) for a, b in zip(steps, steps[1:]) if b["val_loss"] is None]
    lasted = [(b["seconds"] - a["seconds"]) / (b["tokens"] - a["tokens"]) for a, b in pairs]
    quarter = max(1, len(lasted) // 4)
    return {"seconds": seconds, "steps": len(steps), "growth": statistics.median(lasted[-quarter:]) / statistics.median(lasted[:quarter])}


def start_up():
    """Seconds from the command to the line of the first step, on the embedded model."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        command = [sys.executable, ROOT / "finetune.py", "--out", f"{folder}/run", "--max-steps", "1", "--no-responses"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            seconds = next(time.perf_counter() - begin for text in process.stdout if text.startswith("step 1/"))
            process.stdout.read()
    return {"seconds": seconds}


# ---------------------------------------------------------------------------------------------
# the parent: who takes turns with whom, and what is printed


class Failed(RuntimeError):
    """A worker ended without a reply; the message is the last line it wrote."""


class Worker:
    """A child process that runs one of the functions above."""

    def __init__(self, name, **options):
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([sys.executable, __file__, "--worker", name, json.dumps(options)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)

    def ask(self, request):
        """Send a request, or None for the last one, and wait for the figures; Failed if the process has ended."""
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
        self.process.kill()
        self.process.communicate()


def once(name, **options):
    """The figures of a worker that takes no turns."""
    return take_turns({name: (name, options)}, [])[name][-1]


def take_turns(variants, requests):
    """
    Start the variants, name -> (worker, options), and send each request to all of them in turn, the first one twice
    to warm up. Returns {name: list of figures}, the last of which are those of the whole. Says which failed; Failed if all did.
    """
    workers, replies = {}, {}
    try:
        for name, (worker, options) in variants.items():
            workers[name], replies[name] = Worker(worker, **options), []
        for i, request in enumerate([*requests[:1], *requests, None]):
            for name in list(replies):
                try:
                    replies[name] += [workers[name].ask(request)][i == 0 and request is not None:]
                except Failed as error:
                    del replies[name]
                    if not replies:
                        raise
                    report(name, f"not measured: {error}")
    finally:
        for worker in workers.values():
            worker.close()
    return replies


def report(name, measured, bar="", met=None):
    """One line; a cut-down shape says nothing about the bars."""
    met = None if "--quick" in sys.argv else met
    print(f"{name:58} {measured:32} {bar:22} {'' if met is None else 'met' if met else 'NOT MET'}".rstrip(), flush=True)


def compare(replies, bars, beside="plain loop"):
    """
    A line for each variant beside the one whose name ends in `beside`: the median over the steps of how many times as
    many tokens it does in a second. `bars`: name -> least ratio.
    """
    other = next((own for name, own in replies.items() if name.endswith(beside)), None)
    for name, own in replies.items():
        if other and (own is not other or beside == "plain loop"):
            speed = sum(r["tokens"] for r in own[:-1]) / sum(r["seconds"] for r in own[:-1])
            times = statistics.median(a["tokens"] / a["seconds"] * b["seconds"] / b["tokens"] for a, b in zip(own[:-1], other[:-1]))
            bar = bars.get(name)
            report(name, f"{times:.2f} x {beside}, {speed:,.0f} tok/s", f"at least {bar} x" if bar else "", times >= bar if bar else None)


def report_memory(replies, bars):
    """A line for each variant's peak; `bars`: name -> most GiB."""
    for name, own in replies.items():
        most, bar = own[-1]["peak"] / GiB, bars.get(name)
        report(f"{name}: peak memory", f"{most:.2f} GiB", f"at most {bar} GiB" if bar else "", most <= bar if bar else None)


def share_of_peak(name, own, rate, of_what, bar=None):
    """A line: needed GFLOP/s, as a share of what the machine's matrix products reach."""
    done = sum(r["flops"] for r in own[:-1]) / sum(r["seconds"] for r in own[:-1]) / 1e9
    report(f"{name}: of {rate:,.0f} GFLOP/s {of_what}", f"{done:,.0f} = {done / rate:.0%}", f"at least {bar:.0%}" if bar else "",
           done / rate >= bar if bar else None)


def some_records(args, steps, size=8):
    """A file whose training part is so many batches of the training records, the longest batch among them."""
    examples = json.loads((SHARED / "instruction-data.json").read_text(encoding="utf-8"))[:935]
    longest = sorted(examples, key=lambda e: -len("".join(e.values())))[:size]
    chosen = longest + random.Random(0).sample([e for e in examples if e not in longest], min(size * (steps - 1), 935 - size))
    path = Path(args.folder) / f"{steps} x {size}.json"
    path.write_text(json.dumps((chosen * 2)[:math.ceil(len(chosen) / 0.85)]), encoding="utf-8")
    return str(path)


def bench_full(args):
    """Bar 1, the machine, and of bars 5 and 6 the memory and the proof."""
    n_layer, _, n_embd = SHAPES[args.shape]
    figures = once("machine", n_layer=n_layer, n_embd=n_embd)
    print(f"{platform.processor() or platform.machine()}, {figures['threads']} threads, torch {figures['torch']}")
    for name, rates in figures["table"].items():
        report(f"GFLOP/s, {name}", "".join(f"{rate:8,.0f}" for rate in rates), "forward, input, weight")
    share = once("padding")
    report("padding, share of positions", f"{share['ours']:.2%}, at random {share['random']:.1%}", "under 1 %", share["ours"] < 0.01)
    train = {"folder": args.folder, "file": args.file, "policy": "all"}
    replies = take_turns({"full, plain loop": ("plain_train", train), "full, transformers": ("hf_train", train),
                          "full, fp32": ("our_train", train), "full, bf16": ("our_train", train | {"flags": ["--dtype", "bf16"]})},
                         args.requests)
    compare(replies, {"full, fp32": 2.6, "full, bf16": 3.8})
    # Alone and in the 2nd epoch, as the peak: with memory at hand. The optimizer moves the same bytes for a batch of any
    # size, so the bar is for batches that fill the machine.
    for dtype, size, bar in (("fp32", 8, None), ("bf16", 8, None), ("fp32", 32, 0.72)):
        name, steps = f"full, {dtype}, batches of {size}", args.steps + 1
        figures = figures if size == 8 else once("machine", n_layer=n_layer, n_embd=n_embd, size=size)
        alone = train | {"file": some_records(args, steps, size), "size": size, "flags": ["--dtype", dtype, "--epochs", "2"], "skip": steps}
        own = take_turns({name: ("our_train", alone)}, args.requests)[name]
        share_of_peak(name, own, figures["mixed"][dtype], "which a step's products reach alone", bar)
        share_of_peak(name, own, figures["best"][dtype], "which the fastest product reaches alone")
    report_memory(replies, {"full, fp32": 2.9})
    if own := replies.get("full, fp32"):
        run, proof = 2 * 117 * statistics.median(r["seconds"] for r in own[:-1]), own[-1]["proof"]
        report("freeze proof, of 2 epochs of 117 steps", f"{proof:.2f} of {run:.0f} s = {proof / run:.2%}", "under 2 %", proof < 0.02 * run)


def bench_blocks(args):
    """Bar 2, beside the plain loop of full finetuning, and of bar 5 the memory."""
    for policy in BLOCKS:
        train = {"folder": args.folder, "file": args.file, "policy": policy}
        kept = train | {"flags": ["--cache-prefix", "--epochs", "2"], "skip": args.steps + 1}
        full, cached = "full, plain loop", f"{policy}, --cache-prefix, 2nd epoch"
        replies = take_turns({full: ("plain_train", train | {"policy": "all"}), f"{policy}, plain loop": ("plain_train", train),
                              f"{policy}, fp32": ("our_train", train),
                              f"{policy}, bf16": ("our_train", train | {"flags": ["--dtype", "bf16"]}), cached: ("our_train", kept)},
                             args.requests)
        compare(replies, {f"{policy}, fp32": 4, cached: 12}, full)
        del replies[full]
        if cached in replies:
            first, *_, last = replies[cached][-1]["validations"]
            report(f"{policy}, --cache-prefix, last validation", f"{first / last:.1f} x the first")
        report_memory(replies, {"last_block, fp32": 1.2})


def bench_lora(args):
    """Bar 3, and of bar 5 the memory."""
    train, bf16 = {"folder": args.folder, "file": args.file, "policy": "lora"}, {"flags": ["--dtype", "bf16"]}
    full = train | {"policy": "all"}
    replies = take_turns({"LoRA, plain loop": ("plain_train", train), "LoRA, peft": ("hf_train", train), "LoRA, fp32": ("our_train", train),
                          "LoRA, fp32, --recompute": ("our_train", train | {"flags": ["--recompute"]}),
                          "full, fp32": ("our_train", full), "LoRA, bf16": ("our_train", train | bf16),
                          "full, bf16": ("our_train", full | bf16)}, args.requests)
    adapters = {name: own for name, own in replies.items() if "LoRA" in name}
    compare(adapters, {"LoRA, fp32": 2.8})
    for dtype in ("fp32", "bf16"):
        pair = {name: own for name, own in replies.items() if name in (f"LoRA, {dtype}", f"full, {dtype}")}
        compare(pair, {f"LoRA, {dtype}": 1}, f"full, {dtype}")
    report_memory(adapters, {"LoRA, fp32": 1.4, "LoRA, fp32, --recompute": 1.4})


def bench_generate(args):
    """Bar 4."""
    new = 4 if args.quick else 32
    print(f"110 test prompts in two batches, {new} new tokens each (the plain loop: one prompt of each batch)")
    kinds = {"generate, plain loop": "plain", "generate, transformers": "hf", "generate": "ours"}
    replies = take_turns({name: ("generation", {"folder": args.folder, "kind": kind}) for name, kind in kinds.items()},
                         [{"prompts": [i, i + 64], "new": new} for i in (0, 64)])
    compare(replies, {"generate": 40})
    compare({name: own for name, own in replies.items() if "plain" not in name}, {"generate": 1.5}, "transformers")
    report_memory(replies, {"generate": 2.9})


def bench_data(args):
    """Of bar 6: start-up, tokenizing, and a million records in no more than 2 KiB for each."""
    seconds = statistics.median(once("start_up")["seconds"] for _ in range(3))
    report("start-up to the first step, tiny", f"{seconds:.1f} s", "under 4 s", seconds < 4)
    few, many = (500, 5000) if args.quick else (50_000, 1_000_000)
    figures = once("tokenize", n=few)
    report(f"tokenizing {few:,} records", f"{figures['tokenize']:.1f} s", "under 15 s", figures["tokenize"] < 15)
    figures = once("tokenize", n=many)
    report(f"reading and encoding {many:,} records", f"{figures['read'] + figures['tokenize']:.0f} s, {figures['bytes'] / many:,.0f} bytes for each",
           "at most 2,048", figures["bytes"] <= 2048 * many)


def bench_scaling(args):
    """Bar 7: two straight lines through three sizes have the same slope, whatever the start-up takes."""
    sizes = (200, 400, 800) if args.quick else (1000, 4000, 16_000, 64_000)
    total, growth = {}, 0.0
    with tempfile.TemporaryDirectory() as folder:
        once("make_model", folder=folder, shape="narrow")
        print(" records  read s  tokenize s  batches s  |  one epoch of a narrow model:  steps  seconds  time for a token, last/first quarter")
        for n in sizes:
            data, run = once("tokenize", n=n), once("whole_run", folder=folder, n=n)
            total[n], growth = data["read"] + data["tokenize"] + data["batch"] + run["seconds"], run["growth"]
            print(f"{n:8} {data['read']:7.2f} {data['tokenize']:11.2f} {data['batch']:10.3f} {run['steps']:38} {run['seconds']:8.1f} {growth:8.2f}", flush=True)
    low, middle, high = sizes[0], sizes[len(sizes) // 2], sizes[-1]
    curve = (total[high] - total[middle]) / (high - middle) / ((total[middle] - total[low]) / (middle - low))
    report("seconds for each further record, many over few", f"{curve:.2f} x", "at most 1.1 x", curve <= 1.1)
    report("seconds for a token, end of the longest run over start", f"{growth:.2f} x", "at most 1.1 x", growth <= 1.1)


def bench_long(args):
    """Of bar 5: one step on 8 records of 1,024 ids, loss on all of them."""
    path = Path(args.folder) / "long.json"
    path.write_text(json.dumps([{"instruction": "Count.", "output": f"{i} " * 1100} for i in range(10)]))
    for flags in ([], ["--recompute"]):
        name = " ".join(["full, 8 x 1,024 ids", *flags])
        train = {"folder": args.folder, "file": str(path), "policy": "all", "flags": ["--max-length", "1024", "--loss-on", "all", *flags]}
        report_memory(take_turns({name: ("our_train", train)}, []), {})


def bench_xl(args):
    """Of bar 5: GPT-2 XL's shape steps. (In full, weights, gradients and moments are 16 bytes a parameter: 23.2 GiB.)"""
    with tempfile.TemporaryDirectory() as folder:
        once("make_model", folder=folder, shape="quick" if args.quick else "gpt2-xl")
        for policy in ("lora", "last_two_blocks"):
            train = {"folder": folder, "file": some_records(args, 2, 2), "policy": policy, "size": 2, "flags": ["--recompute", "--grad-accum", "2"]}
            name = f"XL, {policy}, --recompute"
            report_memory(take_turns({name: ("our_train", train)}, []), {name: 24})


def bench_gpu(args):
    """Bar 8."""
    gpu = once("machine", n_layer=1, n_embd=64)["gpu"]
    if not gpu:
        for name, bar in (("medium, full, bf16: share of peak", "at least 45%"), ("medium, full, beside transformers", "at least 2 x"),
                          ("the book's run", "(the book, A100: 0.86)"), ("the 110 answers", "under 3 s")):
            report(f"GPU: {name}", "not measured: no GPU", bar)
        return
    print(gpu)
    with tempfile.TemporaryDirectory() as folder:
        once("make_model", folder=folder, shape="gpt2-medium")
        rate = once("machine", n_layer=24, n_embd=1024, device="cuda", size=64)["best"]["bf16"]
        train = {"folder": folder, "file": some_records(args, 14, 64), "policy": "all", "size": 64, "device": "cuda"}
        replies = take_turns({"GPU: medium, transformers": ("hf_train", train | {"bf16": True}), "GPU: medium, full": ("our_train", train),
                              "GPU: medium, full, --compile": ("our_train", train | {"flags": ["--compile"]})}, [{}] * 12)
        compare(replies, {"GPU: medium, full": 2}, "transformers")
        for name, own in replies.items():
            share_of_peak(name, own, rate, "which the fastest product reaches", 0.45 if name == "GPU: medium, full" else None)
        report_memory(replies, {})
        book = train | {"file": str(SHARED / "instruction-data.json"), "size": 8}
        own = take_turns({"": ("our_train", book)}, [{}] * 116)[""]
        report("GPU: the book's run, 2 x 935 records, medium", f"{2 * 117 * statistics.mean(r['seconds'] for r in own[:-1]) / 60:.2f} min", "(the book, A100: 0.86)")
        own = take_turns({"": ("generation", {"folder": folder, "kind": "ours", "device": "cuda"})}, [{"prompts": [0, 110], "new": 64}])[""]
        report("GPU: 110 answers of 64 tokens, medium", f"{own[0]['seconds']:.1f} s", "under 3 s", own[0]["seconds"] < 3)


BENCHES = {name.removeprefix("bench_"): f for name, f in list(globals().items()) if name.startswith("bench_")}


def parse_args():
    """The flags."""
    parser = argparse.ArgumentParser(description="Measure speed and memory against the bars.")
    parser.add_argument("--only", default=",".join(BENCHES), help="names of %(default)s (default: all)")
    parser.add_argument("--steps", type=int, default=8, help="training steps of each variant (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a shape of three blocks, three steps: does every line run")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(BENCHES):
        parser.error(f"--only {','.join(sorted(unknown))}: there are {', '.join(BENCHES)}")
    if not 1 <= args.steps <= 100:
        parser.error(f"--steps {args.steps}: 1 to 100, of the 117 in an epoch")
    args.shape, args.steps = ("quick", 3) if args.quick else ("gpt2", args.steps)
    return args


def main():
    """Run the benches that were asked for."""
    args = parse_args()
    if not (SHARED / "instruction-data.json").is_file():
        sys.exit(f"nothing is measured: {SHARED} is not there")
    with tempfile.TemporaryDirectory() as args.folder:
        once("make_model", folder=args.folder, shape=args.shape)
        args.file, args.requests = some_records(args, args.steps + 1), [{}] * args.steps
        for name in args.only:
            print(f"\n{name}: {time.strftime('%F %H:%M')}", flush=True)
            try:
                BENCHES[name](args)
            except Failed as error:
                report(name, f"not measured: {error}")


if __name__ == "__main__":
    if "--worker" in sys.argv:  # a child: requests come as lines of JSON, figures go the same way
        name, options = parse_args().worker
        REPLIES = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever else prints
        sys.path.insert(0, str(ROOT))
        reply(globals()[name](**json.loads(options)))
    else:
        main()
