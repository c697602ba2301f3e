"""Instruction finetuning of GPT-2 under a freeze policy that is proved.

The training loop is `train`; `run` is the table of contents.

    python finetune.py  # the embedded model and data
    python finetune.py --lora-r 16 --model gpt2 --data my-records.json
"""

import argparse
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import signal
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from inspect import unwrap
from pathlib import Path

warnings.filterwarnings("ignore", "Failed.*NumPy")
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import (DATASETS, TEMPLATES, batches, chunks, collate, copy_tokenizer, encode_examples,
                  load_parts, n_targets, share_beginnings)
from evaluate import exact_match, generate_responses, plot_losses, read_records
from freeze import ADAPTER, FreezeError, digests, freeze, resolve, schedule, whole
from gpt import (PUBLISHED, choose_attention, choose_device, keep_freed_memory, load_model, locate,
                 read_config, read_json, replacing, use_onednn, write_json)
from lora import add_lora, save_lora

HEAD_ROWS = 1024
CHECKPOINT_SECONDS = 600  # without --checkpoint-every
SETTINGS = """out resume overwrite eval_every checkpoint_every no_responses device
    recompute""".split()  # may differ on --resume
WRITTEN = """run.json metrics.jsonl model adapter responses.jsonl scores.json loss.png
    judge-* canaries-* pairs-* checkpoint.*""".split()
STATE = "step tokens seconds losses val_loss proofs logged".split()
say = partial(print, flush=True)

@dataclass(frozen=True)
class Machine:
    """This process, its device."""
    device: torch.device
    dtype: torch.dtype  # of products; weights are float32
    rank: int = 0
    world: int = 1

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

@dataclass
class Job:
    """A run, and how far it is."""
    out: Path
    record: dict  # the head of run.json
    recipe: argparse.Namespace  # its flags
    machine: Machine
    train: list
    val: list
    positions: list  # of train in its file
    order: list  # (epoch, indices) of every step
    spans: list  # (first step, policy)
    prefix: tuple | None = None  # a block, and what enters it
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list = field(default_factory=list)  # of the latest steps
    val_loss: float = math.nan
    proofs: list = field(default_factory=list)
    logged: int = 0  # bytes of metrics.jsonl
    saved: float = field(default_factory=time.monotonic)  # the last checkpoint

def loss_sum(model, batch, job):
    """Cross-entropy in nats, summed over the supervised tokens. The head sees these alone, in
    parts, as logits are large."""
    device, (first, known), tree = job.machine.device, job.prefix or (0, None), None
    x, targets = collate(batch, job.recipe.loss_on)  # (B, T)
    wanted = (targets.flatten() != -100).nonzero()[:, 0]  # (M,); on the CPU no GPU waits
    targets = targets.flatten()[wanted].to(device)
    if device.type == "cpu" and not job.recipe.compile:
        choose_attention(x.shape[1])
        tree = share_beginnings(batch, model.config.n_embd, job.machine.dtype)
    if known:
        x = nn.utils.rnn.pad_sequence([known[id(e)] for e in batch], True)  # (B, T, C)
    if tree:
        x, wanted = x.flatten(0, 1)[tree.kept][None], tree.place[wanted]
    x, wanted = x.to(device), wanted.to(device)
    with job.machine.autocast():
        hidden = model.ln_f(model.run_blocks(x, first, None, tree)) if known else (
            model.features(x, tree))
        hidden = hidden.flatten(0, 1)[wanted]  # (M, C)
        loss = lambda h, t: F.cross_entropy(model.lm_head(h).float(), t, reduction="sum")
        part = partial(checkpoint, loss, use_reentrant=False) if len(wanted) > HEAD_ROWS else loss
        return sum(map(part, hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS)))

@torch.no_grad()
def mean_loss(model, job):
    """Loss per supervised token of the validation part."""
    model.eval()
    total = sum(float(loss_sum(model, chunk, job))
                for chunk in chunks(job.val, job.recipe.batch_size))
    if hasattr(model, "reshard"):
        model.reshard()  # the outermost are whole after forward
    return total / n_targets(job.val, job.recipe.loss_on)

@torch.no_grad()
def cache_prefix(model, last, job):
    """What the frozen blocks below `last` give for each example, (T, C): computed once (AutoFreeze,
    arXiv 2102.01386), in fixed groups, as its last bits depend on them."""
    model.eval()
    cached = {}
    for chunk in chunks(job.train + job.val, job.recipe.batch_size):
        with job.machine.autocast():
            x = model.embed(collate(chunk)[0].to(job.machine.device))
            x = model.run_blocks(x, 0, last).float().cpu()  # (B, T, C)
        cached |= {id(e): row[:len(e.ids) - 1].clone() for e, row in zip(chunk, x)}
    return cached

def rate_at(step, total, warmup, schedule):
    """Share of the peak rate at a step from 0; at least 0.01, to survive rounding."""
    warmup = round(warmup if warmup >= 1 else warmup * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (total - warmup)
    rates = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return max(0.01, rates[schedule])

def block_of(name, n_layer):
    """A parameter's block; -1 for the embeddings, n_layer above the blocks."""
    if name.startswith("h."):
        return int(name.split(".")[1])
    return -1 if name.startswith(("wte.", "wpe.")) else n_layer

class AdamW(torch.optim.AdamW):
    """Its wrappers would import torch's compiler: 2 s a start."""
    add_param_group = unwrap(torch.optim.AdamW.add_param_group)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))

def build_optimizer(model, plan, recipe, before):
    """AdamW over plan.parameters(), with the moments that `before` has of them."""
    mixed = len({bool(ADAPTER.search(name)) for name in plan.trainable}) == 2
    groups, n = {}, model.config.n_layer
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = recipe.lr * recipe.lr_decay ** max(0, n - 1 - block_of(name, n))
            rate *= 10 if mixed and ADAPTER.search(name) else 1
            groups.setdefault((rate, recipe.weight_decay if p.dim() > 1 else 0.0), []).append(p)
    optimizer = AdamW([{"params": ps, "peak": rate, "weight_decay": decay}
                       for (rate, decay), ps in groups.items()], fused=True)
    known = before.state if before else {}
    optimizer.state.update({p: known[p] for p in plan.parameters() if p in known})
    return optimizer

def train(model, plan, optimizer, first, end, job, noted):
    """What is left of steps `first` to `end` - 1. A signal that is `noted` ends it with a
    checkpoint and InterruptedError."""
    machine, recipe = job.machine, job.recipe
    total, parameters = len(job.order), plan.parameters()
    for step in range(job.step, end):
        began = time.perf_counter()
        epoch, indices = job.order[step]
        batch = [job.train[i] for i in indices]

        # The gradient: of this process's share, in micro-batches; then summed over processes.
        torch.manual_seed(((recipe.seed * 1_000_003 + step) * 1_009 + machine.rank) % 2**63)
        plan.set_modes(model.train())
        share, n, loss = batch[machine.rank::machine.world], n_targets(batch, recipe.loss_on), 0.0
        for i in range(0, math.ceil(len(batch) / machine.world), recipe.batch_size):
            part = share[i:i + recipe.batch_size]  # empty: a row times 0, to join the sums
            part_loss = loss_sum(model, part or batch[:1], job) * bool(part) / n
            part_loss.backward()
            loss = loss + part_loss.detach()
        late = time.monotonic() - job.saved > CHECKPOINT_SECONDS
        sums = torch.stack([loss, loss.new_full((), len(noted)), loss.new_full((), late)])
        for tensor in [sums, *(p.grad for p in parameters)] if machine.world > 1 else []:
            if not (tensor is None or hasattr(tensor, "full_tensor")):  # FSDP's are sums
                dist.all_reduce(tensor)

        # The update: clip, check the first two, set the rate, step.
        norm = whole(nn.utils.clip_grad_norm_(parameters, recipe.clip or math.inf))
        if step < first + 2:
            plan.check_gradients(model, step - first + 1)
        rate = rate_at(step, total, recipe.warmup, recipe.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.step()
        model.zero_grad()
        loss, stop, late, norm = torch.stack([*sums, norm]).tolist()  # waits for the GPU

        # Log, validate, checkpoint.
        job.step = step + 1
        job.tokens += sum(len(e.ids) for e in batch)
        job.seconds += time.perf_counter() - began
        job.losses = (job.losses + [loss])[-recipe.eval_every:]
        validated = job.step == total or job.step % recipe.eval_every == 0
        found = {"loss": loss, "gradient": norm}
        if validated:
            job.val_loss = found["val loss"] = mean_loss(model, job)
        if not math.isfinite(sum(found.values())):
            raise ArithmeticError(f"step {job.step}: {found}; lower --lr")
        log(job, epoch + 1, loss, rate, norm, indices, validated)
        due = job.step % recipe.checkpoint_every == 0 if recipe.checkpoint_every else late
        if stop or due and job.step < total:
            plan.check_model(model)
            plan.check_unchanged(model, trained=False)
            save_checkpoint(job, model, plan, optimizer)
            job.saved = time.monotonic()
        if stop:
            raise InterruptedError

def compile_training(block):
    """For training alone: validation, answers, single rows would be compiled anew."""
    plain, fast = block.forward, torch.compile(block.forward, dynamic=True)
    block.forward = lambda x, cache=None: (
        fast(x) if torch.is_grad_enabled() and len(x) > 1 else plain(x, cache))

def train_in_spans(model, job, saved, noted):
    """Train and prove each span under its own plan; the first goes on from checkpoint `saved`."""
    optimizer, ends = None, [first for first, _ in job.spans[1:]] + [len(job.order)]
    for (first, policy), end in list(zip(job.spans, ends))[len(job.proofs):]:
        plan = freeze(model, policy)
        if model.wte.weight.requires_grad:  # its gradient is large
            keep_freed_memory()
        optimizer = build_optimizer(model, plan, job.recipe, optimizer)
        if saved:
            put_back(saved, model, plan, optimizer)
        saved = None
        if first == 0:
            say(f"freeze   {plan.summary()}")
        plan.set_modes(model.train())
        plan.check_model(model)
        plan.check_optimizer(optimizer)
        train(model, plan, optimizer, first, end, job, noted)
        plan.check_model(model)
        plan.check_optimizer(optimizer)
        plan.check_unchanged(model, trained=end - first >= 2)
        job.proofs.append({"policy": policy, "steps": end - first, "trainable": plan.trainable,
                           "frozen": plan.frozen, "fingerprint": plan.fingerprint,
                           "trainable_parameters": sum(p.numel() for p in plan.parameters()),
                           "checks": dict(plan.checks)})

def log(job, epoch, loss, rate, norm, indices, validated):
    """A line for metrics.jsonl, and one for the user."""
    left = len(job.order) - job.step
    line = {"step": job.step, "epoch": epoch, "train_loss": loss,
            "val_loss": job.val_loss if validated else None, "lr": job.recipe.lr * rate,
            "grad_norm": norm, "tokens": job.tokens, "seconds": round(job.seconds, 3),
            "records": [job.positions[i] for i in indices]}
    if job.machine.rank == 0:
        with open(job.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
            job.logged = file.tell()
    text = (f"step {job.step}/{len(job.order)}: loss {loss:.3f}, val {job.val_loss:.3f}, "
            f"{job.tokens / job.seconds:,.0f} tokens/s, ETA {job.seconds / job.step * left:.0f} s")
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        say("\r" + text[:width].ljust(width), end="\n" * validated)
    elif validated:
        say(text)

def save_checkpoint(job, model, plan, optimizer):
    """Write what has trained, then its sha256, whole or not at all; the checkpoint before becomes
    checkpoint.prev.pt. Every process calls this."""
    trained = set(plan.trainable).union(*(proof["trainable"] for proof in job.proofs))
    named = {name: p for name, p in model.named_parameters() if name in trained}
    gather = lambda tensors: {key: whole(t.detach()).cpu() for key, t in tensors.items()}
    content = {"record": job.record, "state": {key: vars(job)[key] for key in STATE},
               "proof": plan.proof, "weights": gather(named),
               "moments": {name: gather(optimizer.state.get(p, {})) for name, p in named.items()}}
    if job.machine.rank > 0:
        return
    path = job.out / "checkpoint.pt"
    with replacing(path) as file:
        torch.save(content, file)
        file.flush()
        file.write(hashlib.sha256(mmap.mmap(file.fileno(), 0)).digest())  # ignored by torch.load
        file.flush()
        os.fsync(file.fileno())
        if path.exists():
            path.replace(job.out / "checkpoint.prev.pt")

def load_checkpoint(job, model):
    """Restore weights and state of the newest intact checkpoint; returns it."""
    for path in filter(Path.exists, (job.out / "checkpoint.pt", job.out / "checkpoint.prev.pt")):
        content = path.read_bytes()
        if hashlib.sha256(memoryview(content)[:-32]).digest() == content[-32:]:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            refuse_another_run(saved["record"], job)
            model.load_state_dict(saved["weights"], strict=False)
            vars(job).update(saved["state"])
            os.truncate(job.out / "metrics.jsonl", job.logged)  # later steps are taken again
            return saved
        say(f"note     {path} is damaged, passed over")
        path.unlink(missing_ok=True)
    raise FileNotFoundError(f"--resume: no intact checkpoint in {job.out}; start anew: --overwrite")

def put_back(saved, model, plan, optimizer):
    """Go on with a checkpoint's moments and proof."""
    from torch.distributed.tensor import distribute_tensor
    for name, p in model.named_parameters():
        for key, value in saved["moments"].get(name, {}).items():
            value = value.to(p.device)
            if hasattr(p, "full_tensor") and value.dim():
                value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
            optimizer.state[p][key] = value
    plan.resume(model, saved["proof"])

def refuse_another_run(then, job):
    """ValueError unless a run.json or its head describes this run."""
    then, now = ({**r["flags"], "data": r["data"]["sha256"], "weights": r.get("weights")}
                 for r in (then, job.record))
    for key in sorted((then | now).keys() - SETTINGS):
        if (was := then.get(key)) != (here := now.get(key)):
            raise ValueError(f"--resume: {job.out} is another run: {key} was {was}, is {here}")

def join_processes(device, dtype):
    """This process among those of torchrun, or alone. Only the first prints."""
    place, world = choose_device(device), int(os.environ.get("WORLD_SIZE", 1))
    cuda = place.type == "cuda"
    fast = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    chosen = torch.bfloat16 if dtype == "bf16" or dtype == "auto" and fast else torch.float32
    if world == 1:
        return Machine(place, chosen)
    if cuda:
        torch.cuda.set_device(place)
    dist.init_process_group()
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return Machine(place, chosen, dist.get_rank(), world)

def shard(model, machine):
    """Leave each process a part of every tensor; a block is whole while it runs."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = dist.init_device_mesh(machine.device.type, (machine.world,))
    for module in (*model.h, model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # a sum, not a mean
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "features")

def fill_in(flags, model, machine):
    """The flags, with defaults that depend on the model and lasting paths."""
    named = dict(model.named_parameters())
    small = sum(p.numel() for name, p in named.items() if not ADAPTER.search(name)) < 10_000_000
    policy = flags["trainable"] or ("lora" if any(map(ADAPTER.search, named)) else "all")
    adapters = all("lora" in term for term in policy.split(","))
    rank = flags["lora_r"] and f"r{flags['lora_r']}"
    data = flags["data"] != "tiny" and Path(flags["data"]).stem
    names = [Path(flags["model"]).name, policy, rank, data]
    chosen = {"trainable": policy, "epochs": 3 if small else 2, "batch_size": 16 if small else 8,
              "lr": (3e-4 if small else 5e-5) * (10 if adapters else 1),
              "max_length": model.config.block_size,
              "out": "runs/" + re.sub(r"[^\w.,-]+", "_", "-".join(filter(None, names)))}
    flags = flags | {key: value for key, value in chosen.items() if flags[key] is None}
    for key, known in (("model", PUBLISHED), ("data", DATASETS)):
        if flags[key] not in ("tiny", *known):
            flags[key] = str(Path(flags[key]).resolve())
    return flags | {"dtype": str(machine.dtype).partition(".")[2], "processes": machine.world}

def prepare(flags, parts, model, tokenizer, machine):
    """The run's examples, the order of its steps, its spans."""
    recipe = argparse.Namespace(**flags)
    if recipe.max_length > model.config.block_size:
        raise ValueError(f"--max-length: at most {model.config.block_size}")
    records, how = parts.train[:recipe.max_examples], (recipe.template, recipe.max_length)
    train_set, kept = encode_examples(records, tokenizer, *how)
    val_set, _ = encode_examples(parts.val, tokenizer, *how)
    dropped = len(records + parts.val) - len(train_set + val_set)
    cut = sum(e.ids[-1] != tokenizer.eot_token for e in train_set + val_set)
    lost = f"at --max-length {how[1]} {dropped} records lose their answer, {cut} are cut"
    for note in filter(None, [*parts.notes, (dropped or cut) and lost]):
        say(f"note     {note}")
    data = {"name": recipe.data, "sha256": parts.sha256, "split": parts.split,
            "rows": parts.rows, "used": len(train_set), "dropped": dropped, "truncated": cut}
    lengths = [len(e.ids) for e in train_set]
    per_step = recipe.batch_size * recipe.grad_accum * machine.world
    epochs = [batches(lengths, per_step, recipe.seed, i) for i in range(recipe.epochs)]
    order = [(i, step) for i, steps in enumerate(epochs) for step in steps][:recipe.max_steps]
    recipe.eval_every = recipe.eval_every or max(1, len(order) // 10)
    spans = schedule(recipe.trainable, model.config.n_layer, len(order), len(epochs[0]),
                     recipe.seed)
    weights = digests(dict(model.named_parameters())), model.config, train_set, val_set
    weights = hashlib.sha256(repr(weights).encode()).hexdigest()
    record = {"flags": flags, "data": data, "weights": weights,
              "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__)}}
    return Job(Path(recipe.out), record, recipe, machine, train_set, val_set,
               [parts.positions[i] for i in kept], order, spans)

def lowest_trained(model, job):
    """The lowest block that trains in any span; ValueError for a flag without effect."""
    recipe, policies = job.recipe, {policy for _, policy in job.spans}
    names = set().union(*(resolve(model, policy) for policy in policies))
    layer = max(0, min(block_of(name, model.config.n_layer) for name in names))
    idle = {"lora-r": recipe.lora_r and not any(map(ADAPTER.search, names)),
            "cache-prefix": recipe.cache_prefix and layer == 0,
            "fsdp": recipe.fsdp and len(job.spans) > 1}
    for flag in filter(idle.get, idle):
        raise ValueError(f"--{flag} does not go with --trainable {recipe.trainable}")
    return layer

def claim(out, resume, overwrite, sources, machine):
    """Make the folder, emptied of a run that is not resumed; OSError if it holds anything else."""
    held = (out / "metrics.jsonl").exists() or (out / "run.json").exists()
    if resume and not held:
        raise FileNotFoundError(f"--resume: no run in {out}")
    if held and not (resume or overwrite):
        raise FileExistsError(f"{out} holds a run: --resume, --overwrite, or another --out")
    foreign = out.exists() and not held and (not out.is_dir() or any(out.iterdir()))
    if foreign or any(path and path.resolve().is_relative_to(out.resolve()) for path in sources):
        raise FileExistsError(f"{out} holds what is no run, or the model: take another --out")
    if machine.world > 1:
        dist.barrier()  # all have seen it
    if machine.rank == 0 and not resume:
        out.mkdir(parents=True, exist_ok=True)
        for path in [path for name in WRITTEN for path in out.glob(name)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

def run(args):
    """Load, freeze, prove, train, prove again, save, answer; returns the exit code."""
    machine = join_processes(args.device, args.dtype)
    if args.fsdp and machine.world == 1:
        raise ValueError("--fsdp: one process; torchrun starts several")
    (folder, adapter), parts = locate(args.model), load_parts(args.data)
    if args.untie_head and not read_config(folder).tie_word_embeddings:
        raise ValueError("--untie-head: the head is not tied")
    model, tokenizer = load_model(args.model, "cpu", args.dropout, args.untie_head)
    torch.manual_seed(args.seed)
    if args.lora_r:
        add_lora(model, args.lora_r, args.lora_alpha or 2 * args.lora_r,
                 args.lora_targets.split(","), args.lora_dropout, args.rslora)
    job = prepare(fill_in(vars(args), model, machine), parts, model, tokenizer, machine)
    layer, out = lowest_trained(model, job), job.out
    claim(out, args.resume, args.overwrite, [folder, adapter], machine)
    if args.resume and (out / "run.json").exists():
        refuse_another_run(read_json(out / "run.json"), job)
        say(f"the run is complete; evaluate.py {out} scores it")
        return 0
    saved = load_checkpoint(job, model) if args.resume else None
    say(f"data     {args.data}: {parts.rows} records ({parts.split}); {len(job.train)} train, "
        f"{len(job.val)} validate, {len(parts.test)} test\n"
        f"model    {args.model} on {machine.device} in {job.recipe.dtype}, lr {job.recipe.lr:g}")

    cpu = machine.device.type == "cpu"
    if cpu and not args.compile:  # it wants the setting's old name
        use_onednn()
    model.to(machine.device)
    model.wte.sparse = cpu and model.config.tie_word_embeddings  # few rows, added to the head's
    for block in model.h:
        if args.recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if args.compile:
            compile_training(block)
    if args.fsdp:
        shard(model, machine)
    if args.cache_prefix:
        job.prefix = layer, cache_prefix(model, layer, job)
    noted = []  # signals, heeded after the step
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: noted.append(number))
    try:
        train_in_spans(model, job, saved, noted)
    except InterruptedError:
        say(f"\nstopped after step {job.step}; --resume goes on")
        return 128 + (noted or [signal.SIGTERM])[0]
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for module in (*model.h, model) if args.fsdp else ():
        module.set_reshard_after_forward(False)
        module.unshard()
    if machine.world > 1:
        dist.barrier()
    if machine.rank == 0:
        finish(job, model, folder, tokenizer, [] if args.no_responses or noted else parts.test)
    return 128 + noted[0] if noted else 0

def finish(job, model, folder, tokenizer, test):
    """Save the model and run.json, then answer the test records."""
    out, memory = job.out, 0
    base = job.recipe.model if job.recipe.model in PUBLISHED else folder
    with suppress(ImportError):  # on Windows
        from resource import RUSAGE_SELF, getrusage
        memory = getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if job.machine.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(job.machine.device)
    limit = min(model.config.block_size, 2 * max(len(e.ids) - e.n_prompt for e in job.train))
    figures = {"steps": job.step, "train_loss": sum(job.losses) / len(job.losses),
               "val_loss": job.val_loss, "exact_match": None, "seconds": round(job.seconds, 3),
               "tokens_per_second": round(job.tokens / job.seconds, 1),
               "peak_memory_bytes": memory, "max_new_tokens": limit}
    record = job.record | {"freeze": job.proofs, "train": figures}
    trained = {name for proof in job.proofs for name in proof["trainable"]}
    if job.recipe.untie_head or not all(map(ADAPTER.search, trained)):
        base = out / "model"
        model.save_pretrained(base, base_only=True, eos_id=tokenizer.eot_token)
        copy_tokenizer(folder, base)
    if any(map(ADAPTER.search, dict(model.named_parameters()))):
        save_lora(model, out / "adapter", base=base)
    write_json(out / "run.json", record)
    for path in out.glob("checkpoint.*"):
        path.unlink()
    with suppress(ImportError):
        plot_losses(read_records(out / "metrics.jsonl"), out / "loss.png")
    say(f"trained  {job.step} steps in {job.seconds:.0f} s, val loss {job.val_loss:.3f}, "
        f"{memory / 2**30:.2f} GiB\nproved   {len(job.proofs[-1]['frozen'])} frozen tensors are "
        f"bit-identical, {len(trained)} have trained")
    if test:
        answers = generate_responses(model, tokenizer, test, job.recipe.template, limit,
                                     out / "responses.jsonl")
        right = [r["ended"] and exact_match(r["model_response"], r["output"]) for r in answers]
        figures["exact_match"] = sum(right) / len(right)
        write_json(out / "run.json", record)
        say(f"test     {figures['exact_match']:.1%} of {len(right)} answers are exactly right")
    say(f"saved    {out}")

def parse_args(argv=None):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, epilog=
        "auto: lr 3e-4, 3 epochs, batches of 16; from 10 M parameters on: 5e-5, 2, 8. "
        "Adapters alone: tenfold lr; beside weights, ten times theirs.")
    group, switch = parser.add_argument_group, {"action": "store_true"}
    add = group("what").add_argument
    add("--model", default="tiny", help="a model, a run, tiny, gpt2, ...")
    add("--data", default="tiny", help="a file, a folder, tiny, book, alpaca")
    add("--out", help="run folder (runs/MODEL-POLICY)")
    add("--template", choices=TEMPLATES, default="alpaca", help="of prompts (alpaca)")
    add("--loss-on", choices=["response", "all"], default="response", help="(response)")
    add("--max-length", type=int, help="tokens an example (all that fit)")
    add("--max-examples", type=int, help="the first so many")
    add = group("which weights").add_argument
    add("--trainable", help="policy: all, last_block, lora,norms, ... (all)")
    add("--lora-r", type=int, help="rank of adapters")
    add("--lora-alpha", type=float, help="scale times rank (2 r)")
    add("--lora-targets", default="c_attn,c_proj,c_fc", help="suffixes (%(default)s)")
    add("--lora-dropout", type=float, default=0.0, help="on the adapters' input (0)")
    add("--rslora", **switch, help="alpha / sqrt(r)")
    add("--untie-head", **switch, help="give the head its own copy")
    add = group("optimization").add_argument
    add("--epochs", type=int, help="passes (auto)")
    add("--batch-size", type=int, help="of a micro-batch (auto)")
    add("--grad-accum", type=int, default=1, help="micro-batches a step (1)")
    add("--lr", type=float, help="peak learning rate (auto)")
    add("--lr-decay", type=float, default=1.0, help="factor per block below the last (1)")
    add("--dropout", type=float, default=0.0, help="in the model (0)")
    add("--weight-decay", type=float, default=0.1, help="of matrices (0.1)")
    add("--warmup", type=float, default=0.05, help="steps, or below 1 a share (0.05)")
    add("--schedule", choices=["linear", "cosine", "constant"], default="linear", help="(linear)")
    add("--clip", type=float, default=1.0, help="gradient norm; 0: no limit (1)")
    add("--seed", type=int, default=123, help="of order, adapters, dropout (123)")
    add("--max-steps", type=int, help="stop after so many")
    add = group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda:1, mps")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="of matrix products")
    add("--compile", **switch, help="slow start, then faster")
    add("--cache-prefix", **switch, help="run the frozen lower blocks once")
    add("--recompute", **switch, help="activations, for less memory")
    add("--fsdp", **switch, help="under torchrun: shard")
    add = group("output").add_argument
    add("--eval-every", type=int, help="steps (a tenth of the run)")
    add("--checkpoint-every", type=int, help="steps (ten minutes)")
    add("--resume", **switch, help="go on from the checkpoint")
    add("--overwrite", **switch, help="replace the run in --out")
    add("--no-responses", **switch, help="skip the test prompts")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        flag, zero = "--" + name.replace("_", "-"), re.search("drop|weight|warm|clip|seed", name)
        top = 1 if "dropout" in name else 2**62
        if type(value) in (int, float) and not (0 < value < top or value == 0 and zero):
            parser.error(f"{flag} {value}: out of range")
        if value == "" or "lora" in name and not args.lora_r and value != parser.get_default(name):
            parser.error(f"{flag}: is empty, or has no effect without --lora-r")
    if args.resume and args.overwrite or args.fsdp and args.cache_prefix:
        parser.error("--resume and --overwrite, --fsdp and --cache-prefix exclude each other")
    return args

def main(argv=None):
    args = parse_args(argv)
    try:
        return run(args)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError, FreezeError, torch.OutOfMemoryError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 1

if __name__ == "__main__":
    sys.exit(main())
