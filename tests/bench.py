"""Speed and memory, side by side: this project, and the loop that a learner writes first.

The plain loop: our model, records in file order padded to the longest of 8, all logits,
cross_entropy over all positions, AdamW as it comes; for LoRA a wrapper around nn.Linear; generation
of one prompt at a time without a cache. It gets this project's GPT, which is faster than most.
This project is finetune.py itself, with flags. Every variant runs in a process of its own, with its
own allocator and peak memory, and they take turns step by step: one computes, the others wait. So a
noisy machine slows all of them. Weights are random, of GPT-2 small's shape; records are made, as
long as the book's. Tokens a second are those of all measured steps together.

    python tests/bench.py                     # everything, as a Markdown table
    python tests/bench.py --only full,lora --steps 50
    python tests/bench.py --ablate            # each remedy switched off, one at a time
    python tests/bench.py --quick --layers 1  # does every line run? The numbers mean nothing
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

# No torch up here: Linux counts a child's peak memory from its parent's size on.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SPAWN = multiprocessing.get_context("spawn")
WARM = 2  # steps before the first that is measured
BOOK_STEPS = 2 * 117  # two epochs of the book's 935 records in batches of 8
VOCAB, POSITIONS, ANSWER = 50257, 57, 13  # a record of the book has about 57 ids, 13 of them answer
# Lengths of the book's prompts and answers in ids, at 0, 5, ..., 100 % of its training part.
PROMPTS = [35, 37, 38, 38, 39, 39, 40, 40, 40, 41, 41, 42, 43, 47, 49, 50, 51, 53, 54, 56, 65]
ANSWERS = [2, 6, 7, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 14, 14, 15, 16, 17, 20, 26, 51]
TEMPLATE = 29  # ids of the prompt around the instruction, by the embedded tokenizer
WORDS = ["and", "one", "ten", "day", "write", "as", "in", "to", "is", "it", "or", "me"]  # an id each


# ---- processes that take turns

class Failed(RuntimeError):
    """A process did not give its figures; the message says why."""


class Turns:
    """The child's end: after each measured step it sends what the step took, and waits."""

    def __init__(self, pipe, steps):
        self.pipe, self.steps, self.skip, self.began, self.tokens = pipe, steps, WARM, 0.0, 0

    def after(self, step: int, tokens: int) -> None:
        """To be called after every step (from 1), with the tokens so far."""
        if self.skip <= step <= self.skip + self.steps:
            self.pipe.send((clock() - self.began, tokens - self.tokens))
            self.pipe.recv()
            self.began, self.tokens = clock(), tokens


@dataclass
class Measured:
    """What a variant's turns took, and its figures at the end."""
    turns: list  # (seconds, tokens) each
    figures: dict

    @property
    def rate(self) -> float:
        """Tokens a second."""
        seconds, tokens = map(sum, zip(*self.turns))
        return tokens / seconds


def child(pipe, steps, function, options):
    """Runs in a process of its own; its last message is what the function returns, or an error."""
    sys.stdout = open(os.devnull, "w")
    try:
        last = function(Turns(pipe, steps), **options)
    except Exception as error:
        traceback.print_exc()
        last = f"{type(error).__name__}: {error}"
    pipe.send(last)


def receive(pipe):
    """The next message of a child; Failed if it is an error, or if there is none."""
    try:
        message = pipe.recv()
    except EOFError:
        message = "its process has died (of memory?)"
    if isinstance(message, str):
        raise Failed(" ".join(message.split()))
    return message


def take_turns(steps: int, variants: dict) -> dict[str, Measured]:
    """Measure variants, name -> (function, its options), over so many turns each."""
    workers, results = {}, {}
    try:
        for name, (function, options) in variants.items():
            pipe, theirs = SPAWN.Pipe()
            process = SPAWN.Process(target=child, args=(theirs, steps, function, options))
            process.start()
            theirs.close()
            workers[name], results[name] = (process, pipe), Measured([], {})
            receive(pipe)  # it is warm, and waits
        for _ in range(steps):
            for name, (_, pipe) in workers.items():
                pipe.send("go")
                results[name].turns.append(receive(pipe))
        for name, (process, pipe) in workers.items():
            pipe.send("finish")
            results[name].figures = receive(pipe)
            process.join()
        return results
    finally:
        for process, _ in workers.values():
            process.kill()


def once(function, *args):
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        return pool.submit(function, *args).result()


# ---- what runs in those processes

def clock() -> float:
    """Seconds, once a GPU has done what it was given."""
    import torch
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak() -> int:
    """Bytes of this process at its largest, or on the GPU."""
    import resource
    import torch
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def write_model(folder, n_layer, n_head, n_embd):
    """A model folder of random weights, with the embedded tokenizer, which has fewer ids."""
    import torch
    from data import TINY, copy_tokenizer
    from gpt import GPT, GPTConfig
    torch.manual_seed(0)
    GPT(GPTConfig(VOCAB, 1024, n_layer, n_head, n_embd)).save_pretrained(folder, eos_id=2047)
    copy_tokenizer(TINY / "model", folder)


def encoded(folder, data, part):
    """The records of a part of the data, encoded."""
    from data import encode_examples, load_parts, load_tokenizer
    return encode_examples(getattr(load_parts(data), part), load_tokenizer(folder))[0]


class Signals:
    """In place of finetune.train's list of signals, which it looks at once a step: none comes."""

    def __init__(self, state, turns):
        self.state, self.turns = state, turns

    def __len__(self):
        self.turns.after(self.state.step, self.state.tokens)
        return 0


def clock_the_proof() -> list[float]:
    """A list in which the seconds that freezing and its checks take add up."""
    from freeze import Plan
    spent = [0.0]

    def timed(method):
        def wrapper(*args, **options):
            began = clock()
            method(*args, **options)
            spent[0] += clock() - began
        return wrapper

    for name in ("__init__", "check_model", "check_optimizer", "check_gradients",
                 "check_unchanged"):
        setattr(Plan, name, timed(getattr(Plan, name)))
    return spent


def ours(turns, folder, data, policy, flags=(), size=8, device="cpu", without=None):
    """finetune.py with these flags; `without` one of the remedies. With --cache-prefix it takes
    turns from the second epoch on."""
    import finetune
    if "--cache-prefix" in flags:
        turns.skip += turns.steps + WARM + 1
        flags = [f for f in flags if f != "--cache-prefix" or without != "prefix"]
    switch_off(without, finetune)
    proof, train = clock_the_proof(), finetune.train

    def timed_train(model, plan, optimizer, first, end, job, noted):
        return train(model, plan, optimizer, first, end, job, Signals(job.state, turns))

    finetune.train, never = timed_train, "1000000"
    with tempfile.TemporaryDirectory() as out:
        code = finetune.main([
            "--model", folder, "--data", data, "--out", f"{out}/run", "--trainable", policy,
            "--epochs", "2" if turns.skip > WARM else "1", "--batch-size", str(size), "--device",
            device, "--no-responses", "--eval-every", never, "--checkpoint-every", never,
            *(["--lora-r", "16"] if policy == "lora" else []), *flags])
    if code:
        raise Failed(f"finetune.py ended with exit code {code}, see above")
    return {"peak": peak(), "proof": proof[0]}


def switch_off(remedy, finetune):
    """Do without one of the remedies. A name that finetune.py no longer has is an error."""
    import torch
    import torch.nn.functional as F
    replace = lambda name, new: mock.patch.object(finetune, name, new).start()
    if remedy == "mallopt":
        keep = finetune.keep_freed_memory
        replace("keep_freed_memory", mock.patch("ctypes.CDLL", lambda name: None)(keep))
    if remedy == "caches":  # the defaults of oneDNN and torch
        os.environ |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}
    if remedy == "products":
        replace("multiply_with_onednn", lambda: None)
    if remedy in ("flash", "flash-tiny"):
        speed_up = finetune.speed_up_blocks
        replace("speed_up_blocks", lambda *args: (
            speed_up(*args), torch.backends.cuda.enable_flash_sdp(True)))
    if remedy == "head":
        def loss_sum(model, batch, loss_on, machine, prefix=None):
            inputs, targets = finetune.collate(batch, loss_on)
            logits = model(inputs).float()
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        replace("loss_sum", loss_sum)
    if remedy == "lengths":
        replace("batches", lambda lengths, size, seed, epoch: [
            list(range(len(lengths)))[i:i + size] for i in range(0, len(lengths), size)])
    if remedy == "fused":
        build = finetune.build_optimizer

        def build_unfused(*args):
            optimizer = build(*args)
            for group in optimizer.param_groups:
                group["fused"] = False
            return optimizer
        replace("build_optimizer", build_unfused)


def plain_model(folder, policy):
    """Our GPT; for LoRA with the wrapper that everybody writes."""
    import torch
    from gpt import GPT
    from torch import nn

    class WithLoRA(nn.Module):
        def __init__(self, linear, r=16, alpha=32):
            super().__init__()
            self.linear, self.scale = linear, alpha / r
            self.A = nn.Parameter(torch.randn(linear.in_features, r) / r**0.5)
            self.B = nn.Parameter(torch.zeros(r, linear.out_features))

        def forward(self, x):
            return self.linear(x) + self.scale * (x @ self.A @ self.B)

    model = GPT.from_pretrained(folder)
    if policy == "lora":
        model.requires_grad_(False)
        for module in [m for block in model.h for m in (block.attn, block.mlp)]:
            for name, linear in list(module.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(module, name, WithLoRA(linear))
    return model


def transformers_model(folder, policy):
    """transformers' GPT-2, for LoRA with peft's adapters."""
    from transformers import GPT2LMHeadModel
    model = GPT2LMHeadModel.from_pretrained(folder)
    if policy == "lora":
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, fan_in_fan_out=True,
                                                 target_modules=["c_attn", "c_proj", "c_fc"]))
    return model


def rival(turns, folder, data, policy, library="plain", size=8, device="cpu"):
    """The plain loop; or transformers' model in what its Trainer does by default, on GPUs bf16."""
    import torch
    import torch.nn.functional as F
    from data import collate
    from torch.nn.utils.rnn import pad_sequence
    plain = library == "plain"
    model = (plain_model if plain else transformers_model)(folder, policy).to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.1, fused=None if plain else True)
    records, tokens = encoded(folder, data, "train"), 0
    for step, first in enumerate(range(0, len(records), size), 1):
        batch = records[first:first + size]
        inputs, targets = (t.to(device) for t in collate(batch))  # (B, T) each
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            if plain:
                logits = model(inputs)
            else:
                mask = pad_sequence([torch.ones(len(e.ids) - 1) for e in batch], batch_first=True)
                logits = model(input_ids=inputs, attention_mask=mask.to(device)).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        if not plain:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        loss.item()
        tokens += sum(len(e.ids) for e in batch)
        turns.after(step, tokens)
    return {"peak": peak()}


def answer_plain(model, batch, new):
    """What most write first: all is computed again for every token."""
    import torch
    idx = torch.tensor([e.ids[:e.n_prompt] for e in batch], device=model.wte.weight.device)
    for _ in range(new):
        idx = torch.cat([idx, model(idx)[:, -1:].argmax(-1)], dim=1)


def answer_transformers(model, batch, new):
    """transformers' generate, padded on the left."""
    import torch
    width = max(e.n_prompt for e in batch)
    ids = [[0] * (width - e.n_prompt) + e.ids[:e.n_prompt] for e in batch]
    seen = [[0] * (width - e.n_prompt) + [1] * e.n_prompt for e in batch]
    ids, seen = torch.tensor(ids, device=model.device), torch.tensor(seen, device=model.device)
    model.generate(ids, attention_mask=seen, do_sample=False, max_new_tokens=new,
                   min_new_tokens=new, pad_token_id=0)


def answer(model, batch, new):
    """gpt.generate: random weights do not end, so all rows go the whole way."""
    import gpt
    gpt.generate(model, [e.ids[:e.n_prompt] for e in batch], new)


def answer_unshared(model, batch, new):
    """The same, the beginning of all prompts computed for each, as where rows have adapters."""
    model.active = [None] * len(batch)
    answer(model, batch, new)


def answer_ending(model, batch, new, leave=True):
    """Every row ends when the record's own answer does, and leaves, or stays to the last end."""
    import gpt
    sample, end, left = gpt.sample, VOCAB - 1, [len(e.ids) - e.n_prompt for e in batch]

    def sample_ends(logits, *how):
        ids = sample(logits, *how).clamp(max=end - 1)
        left[:] = [n - 1 for n in left if n > 0 or not leave]
        ids[[i for i, n in enumerate(left) if n == 0]] = end
        return ids

    with mock.patch.object(gpt, "sample", sample_ends):
        gpt.generate(model, [e.ids[:e.n_prompt] for e in batch], max(left),
                     eos_id=end if leave else None)


def answer_staying(model, batch, new):
    """answer_ending without leaving."""
    answer_ending(model, batch, new, leave=False)


def generation(turns, folder, data, how, new=32, device="cpu"):
    """Answers of `new` tokens to the test prompts, longest first: a turn is all of them."""
    import finetune
    from gpt import GPT
    records, size = sorted(encoded(folder, data, "test"), key=lambda e: -e.n_prompt), 64
    if how is answer_transformers:
        model, size = transformers_model(folder, "all"), 16  # its best
    else:
        model = GPT.from_pretrained(folder)
    if how is answer_plain:
        records, size = records[::10], 1
    elif how is not answer_transformers:
        finetune.keep_freed_memory()
        finetune.multiply_with_onednn()
    model.to(device).eval()
    turns.skip = 1
    for turn in range(1, turns.steps + 2):
        for first in range(0, len(records), size):
            how(model, records[first:first + size], new)
        turns.after(turn, turn * new * len(records))
    return {"peak": peak()}


def products(n_layer, n_embd, size=8, device="cpu") -> dict[str, float]:
    """Operations a second of a step's matrix products, name of the library or type -> rate."""
    import finetune
    import torch
    rows, answers, C = POSITIONS * size, ANSWER * size, n_embd
    shapes = [(n_layer, rows, C, 3 * C), (n_layer, rows, C, C), (n_layer, rows, C, 4 * C),
              (n_layer, rows, 4 * C, C), (1, answers, C, VOCAB)]  # times, and x (M, K), W (N, K)

    def rate(dtype):
        work = seconds = 0.0
        for times, M, K, N in shapes:
            x, w, g = (torch.randn(s, device=device).to(dtype) for s in ((M, K), (N, K), (M, N)))
            for product in (lambda: x @ w.T, lambda: g @ w, lambda: g.T @ x):
                tries = []
                for _ in range(6):
                    began = clock()
                    product()
                    tries.append(clock() - began)
                work, seconds = work + 2 * M * K * N * times, seconds + min(tries) * times
        return work / seconds

    if device == "cuda":
        return {"bf16": rate(torch.bfloat16)}
    finetune.keep_freed_memory()
    rates = {"MKL": rate(torch.float32)}
    finetune.multiply_with_onednn()
    if torch.backends.mkldnn.matmul.fp32_precision == "bf16":  # else it would really round
        rates["oneDNN"] = rate(torch.float32)
    return rates | {"bf16": rate(torch.bfloat16)}


def about() -> dict:
    """What the table's head says."""
    import torch
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "gpu": gpu}
