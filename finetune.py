"""Instruction finetuning of GPT-2 under a freeze policy that is proved.

The policy (`--trainable`) becomes an exact set of parameters, or is refused. The set is checked on
the model, the optimizer, the gradients of the first two steps and, at the end, byte by byte. The
training loop is `train`; `run` is the table of contents. A step's loss is the sum over its
supervised tokens divided by their number. The same seed, data and flags give the same weights on
the same machine, interrupted or not.

    python finetune.py                                           # the embedded model and data
    python finetune.py --lora-r 16 --model gpt2 --data my-records.json
    torchrun --nproc_per_node=2 finetune.py --fsdp
"""

import argparse
import ctypes
import hashlib
import json
import math
import mmap
import os
import platform
import re
import shutil
import signal
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from data import (DATASETS, TEMPLATES, batches, collate, copy_tokenizer, encode_examples,
                  load_parts, load_tokenizer, marker_note)
from evaluate import exact_match, generate_responses, plot_losses, read_records
from freeze import ADAPTER, FreezeError, digests, freeze, resolve, schedule, whole
from gpt import GPT, PUBLISHED, choose_device, locate, read_config, read_json, write_json
from lora import add_lora, load_lora, save_lora

HEAD_ROWS = 1024  # positions whose logits are in memory at one time
EVAL_RECORDS = 200  # of a validation while training; the last one takes all
CHECKPOINT_SECONDS = 600  # between checkpoints, where --checkpoint-every does not say
SETTINGS = ("out", "resume", "overwrite", "eval_every", "checkpoint_every", "no_responses",
            "device", "recompute")  # flags that may differ when a run is resumed
WRITTEN = ("run.json", "metrics.jsonl", "model", "adapter", "responses.jsonl", "scores.json",
           "loss.png", "judge-*.jsonl", "checkpoint.*")  # what --overwrite removes
say = partial(print, flush=True)


@dataclass(frozen=True)
class Machine:
    """What a run computes on, and which of how many processes this is."""
    device: torch.device
    dtype: torch.dtype = torch.float32  # of matrix products; weights are float32
    rank: int = 0
    world: int = 1

    def autocast(self):
        """A context in which matrix products have this dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def total(self, *values: float) -> list[float]:
        """Sums over all processes."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()


@dataclass
class State:
    """How far a run is; a checkpoint holds it."""
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # spent on steps
    losses: list[float] = field(default_factory=list)  # of the latest steps
    val_loss: float | None = None
    proofs: list[dict] = field(default_factory=list)  # of the spans that are finished


@dataclass
class Job:
    """One run: what it learns from, how, on what, and where it writes."""
    out: Path
    record: dict  # the head of run.json: flags, versions, data, weights
    recipe: argparse.Namespace  # those flags, with the defaults filled in
    machine: Machine
    train: list  # of Encoded
    val: list
    positions: list[int]  # of the training examples in their file
    order: list[tuple[int, list[int]]]  # (epoch, indices into train) of every step
    spans: list[tuple[int, str]]  # (first step, policy)
    prefix: "Prefix | None" = None
    state: State = field(default_factory=State)


def n_targets(batch: list, loss_on: str) -> int:
    """How many tokens of a batch are supervised."""
    return sum(len(e.ids) - (e.n_prompt if loss_on == "response" else 1) for e in batch)


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of (N, C) hidden states for (N,) targets."""
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def loss_sum(model: GPT, batch: list, loss_on: str, machine: Machine, prefix=None) -> Tensor:
    """Cross-entropy in nats, summed over the supervised tokens of a batch. The head is applied only
    where a loss is wanted (most of an instruction is prompt), and to so many positions at a time:
    all logits would be by far the largest tensor of a step."""
    inputs, targets = collate(batch, loss_on)  # (B, T) each
    wanted = (targets.flatten() != -100).nonzero()[:, 0]  # (N,), on the CPU: no GPU waits
    with machine.autocast():
        hidden = prefix.features(batch) if prefix else model.features(inputs.to(machine.device))
        hidden = hidden.flatten(0, 1)[wanted.to(machine.device)]  # (B, T, C) -> (N, C)
        targets = targets.flatten()[wanted].to(machine.device)
        if len(wanted) <= HEAD_ROWS:
            return head_loss(model.lm_head, hidden, targets)
        part_loss = partial(checkpoint, head_loss, model.lm_head, use_reentrant=False)
        return sum(map(part_loss, hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS)))


@torch.no_grad()
def mean_loss(model: GPT, encoded: list, job: Job) -> float:
    """Loss per supervised token. Every process takes its share, and goes as often as the others."""
    machine, size, total = job.machine, job.recipe.batch_size, 0.0
    order = sorted(encoded, key=lambda e: len(e.ids))
    chunks = [order[i:i + size] for i in range(0, len(order), size)]
    model.eval()
    for first in range(0, len(chunks), machine.world):
        mine = chunks[(first + machine.rank) % len(chunks)]
        loss = float(loss_sum(model, mine, job.recipe.loss_on, machine, job.prefix))
        total += loss if first + machine.rank < len(chunks) else 0.0
    if hasattr(model, "reshard"):
        model.reshard()  # after a forward pass its outermost tensors are still whole
    return machine.total(total)[0] / n_targets(encoded, job.recipe.loss_on)


def rate_at(step: int, total: int, warmup: float, schedule: str) -> float:
    """Share of the peak learning rate at a step from 0, never zero. `warmup`: steps, or a share."""
    warmup = round(warmup if warmup >= 1 else warmup * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    falling = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return falling[schedule]


def lowest_block(names, n_layer: int) -> int:
    """The lowest block that the backward pass enters when these parameters train; n_layer: none."""
    if any(name.startswith(("wte.", "wpe.")) for name in names):
        return 0
    matches = [re.match(r"h\.(\d+)\.", name) for name in names]
    return min([int(match[1]) for match in matches if match], default=n_layer)


def build_optimizer(model: GPT, plan, recipe, before=None) -> torch.optim.AdamW:
    """AdamW over exactly plan.parameters(), in groups of one learning rate and weight decay, with
    the moments that the optimizer `before` has of what goes on training."""
    mixed = len({bool(ADAPTER.search(name)) for name in plan.trainable}) == 2
    groups, top = {}, model.config.n_layer - 1
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = recipe.lr * recipe.lr_decay ** max(0, top - lowest_block([name], top + 1))
            rate *= 10 if mixed and ADAPTER.search(name) else 1  # as adapters beside weights want
            groups.setdefault((rate, recipe.weight_decay if p.dim() > 1 else 0.0), []).append(p)
    optimizer = torch.optim.AdamW([{"params": ps, "lr": rate, "peak": rate, "weight_decay": decay}
                                   for (rate, decay), ps in groups.items()], fused=True)
    goes_on = [p for p in plan.parameters() if before and p in before.state]
    optimizer.state.update({p: before.state[p] for p in goes_on})
    return optimizer


class Prefix:
    """What enters block `layer`, below which all is frozen, for each record: computed once, kept in
    memory (AutoFreeze, arXiv 2102.01386). Groups are fixed, because the last bits of a product
    depend on what else is in a batch: all epochs, resumed or not, find the same."""

    @torch.no_grad()
    def __init__(self, model: GPT, layer: int, records: list, batch_size: int, machine: Machine):
        self.model, self.layer, self.device, self.kept = model.eval(), layer, machine.device, {}
        order = sorted(records, key=lambda e: len(e.ids))
        for group in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
            with machine.autocast():
                x = model.embed(collate(group)[0].to(self.device))
                x = model.run_blocks(x, 0, layer).float().cpu()  # (B, T, C)
            self.kept |= {id(e): row[:len(e.ids) - 1].clone() for e, row in zip(group, x)}

    def features(self, batch: list) -> Tensor:
        """(B, T, C) after ln_f, as model.features would give it."""
        x = pad_sequence([self.kept[id(e)] for e in batch], batch_first=True).to(self.device)
        return self.model.ln_f(self.model.run_blocks(x, self.layer))


def train(model: GPT, plan, optimizer, first: int, end: int, job: Job, noted: list) -> bool:
    """The training loop: what is left of the steps `first` to `end` - 1. False where a signal that
    was `noted` ended it: then a checkpoint has been written."""
    machine, recipe, state, saved = job.machine, job.recipe, job.state, time.monotonic()
    total, parameters = len(job.order), plan.parameters()
    for step in range(state.step, end):
        began = time.perf_counter()
        epoch, indices = job.order[step]
        batch = [job.train[i] for i in indices]

        # The gradient: of this process's share, in micro-batches; then the sum over processes.
        torch.manual_seed(((recipe.seed * 1_000_003 + step) * 1_009 + machine.rank) % 2**63)
        plan.set_modes(model.train())
        share, n, loss = batch[machine.rank::machine.world], n_targets(batch, recipe.loss_on), 0.0
        for i in range(0, math.ceil(len(batch) / machine.world), recipe.batch_size):
            part = share[i:i + recipe.batch_size]  # may be empty: every process goes as often
            part_loss = loss_sum(model, part or batch[:1], recipe.loss_on, machine, job.prefix)
            part_loss = part_loss * (len(part) > 0) / n
            part_loss.backward()
            loss += part_loss.item()
        for p in parameters if machine.world > 1 else ():
            if not hasattr(p, "full_tensor"):  # those of sharded ones are added up already
                dist.all_reduce(p.grad)
        loss = machine.total(loss)[0]

        # The update: clipping, the checks of the first two steps, the rate, the step.
        norm = float(whole(nn.utils.clip_grad_norm_(parameters, recipe.clip or math.inf)))
        if not math.isfinite(loss + norm):
            raise ArithmeticError(f"step {step + 1}: loss {loss}, gradient norm {norm}: lower --lr "
                                  "or use --dtype fp32; an earlier checkpoint is kept")
        if step < first + 2:
            plan.check_gradients(model, step - first + 1)
        rate = rate_at(step, total, recipe.warmup, recipe.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.step()
        optimizer.zero_grad()

        # Log, validate, checkpoint.
        state.step = step + 1
        state.tokens += sum(len(e.ids) for e in batch)
        state.seconds += time.perf_counter() - began
        state.losses = (state.losses + [loss])[-recipe.eval_every:]
        last = state.step == total
        if last or state.step % recipe.eval_every == 0:
            state.val_loss = mean_loss(model, job.val[:None if last else EVAL_RECORDS], job)
        log(job, epoch + 1, loss, rate, norm, indices)
        stop, late = machine.total(len(noted), time.monotonic() - saved > CHECKPOINT_SECONDS)
        due = state.step % recipe.checkpoint_every == 0 if recipe.checkpoint_every else late
        if stop or due and not last:
            plan.check_model(model)
            plan.check_unchanged(model, trained=False)
            save_checkpoint(job, model, plan, optimizer)
            saved = time.monotonic()
        if stop:
            return False
    return True


def train_in_spans(model: GPT, job: Job, saved: dict | None, noted: list) -> bool:
    """Train each span of the schedule under a plan of its own, proved on its own. A resumed run
    goes on in the middle of one, from what its checkpoint `saved`. False as in `train`."""
    optimizer, proofs = None, job.state.proofs
    ends = [first for first, _ in job.spans[1:]] + [len(job.order)]
    for i in range(len(proofs), len(job.spans)):
        (first, policy), end = job.spans[i], ends[i]
        plan = freeze(model, policy)
        optimizer = build_optimizer(model, plan, job.recipe, optimizer)
        if saved:
            put_back(saved, model, plan, optimizer)
            saved = None
        if i == 0:
            say(f"freeze   {plan.summary()}")
        plan.set_modes(model.train())
        plan.check_model(model)
        plan.check_optimizer(optimizer)
        if not train(model, plan, optimizer, first, end, job, noted):
            return False
        plan.check_model(model)
        plan.check_optimizer(optimizer)
        plan.check_unchanged(model, trained=end - first >= 2)
        trains = sum(p.numel() for p in plan.parameters())
        proofs.append({"policy": policy, "steps": end - first, "trainable": plan.trainable,
                       "frozen": plan.frozen, "trainable_parameters": trains,
                       "fingerprint": plan.fingerprint, "checks": dict(plan.checks)})
    return True


def log(job: Job, epoch: int, loss: float, rate: float, norm: float, indices: list) -> None:
    """A line of metrics.jsonl, and the line that the user watches."""
    state, total = job.state, len(job.order)
    validated = state.step == total or state.step % job.recipe.eval_every == 0
    if job.machine.rank == 0:
        line = {"step": state.step, "epoch": epoch, "train_loss": loss,
                "val_loss": state.val_loss if validated else None, "lr": job.recipe.lr * rate,
                "grad_norm": norm, "tokens": state.tokens, "seconds": round(state.seconds, 3),
                "records": [job.positions[i] for i in indices]}
        with open(job.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    left = state.seconds / state.step * (total - state.step)
    text = (f"step {state.step}/{total}  epoch {epoch}  train loss {loss:.3f}  "
            f"val loss {state.val_loss or math.nan:.3f}  "
            f"{state.tokens / state.seconds:,.0f} tokens/s  {left:.0f} s left")
    if sys.stdout.isatty():  # one line that is updated
        width = shutil.get_terminal_size().columns - 1
        say("\r" + text[:width].ljust(width), end="\n" if validated else "")
    elif validated:
        say(text)


def save_checkpoint(job: Job, model: GPT, plan, optimizer) -> None:
    """Write checkpoint.pt whole or not at all, its sha256 at its end; the one before it becomes
    checkpoint.prev.pt. It holds what has trained so far: the rest is in --model. Every process must
    call this; the first one writes."""
    trained = set(plan.trainable).union(*(proof["trainable"] for proof in job.state.proofs))
    named = {name: p for name, p in model.named_parameters() if name in trained}
    gather = lambda tensor: whole(tensor.detach()).cpu()
    content = {"record": job.record, "state": asdict(job.state), "proof": plan.proof,
               "weights": {name: gather(p) for name, p in named.items()},
               "moments": {name: {key: gather(value) for key, value in optimizer.state[p].items()}
                           for name, p in named.items() if p in optimizer.state}}
    if job.machine.rank > 0:
        return
    path, temp = job.out / "checkpoint.pt", job.out / "checkpoint.tmp"
    try:
        torch.save(content, temp)
        with open(temp, "r+b") as file:
            digest = hashlib.sha256(mmap.mmap(file.fileno(), 0)).digest()
            file.seek(0, os.SEEK_END)
            file.write(digest)  # torch.load does not mind what follows
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's own says nothing of a full disk
        temp.unlink(missing_ok=True)
        free = shutil.disk_usage(job.out).free
        raise OSError(f"{path}: not written ({error}); {free:,} bytes are free") from None
    if path.exists():
        os.replace(path, job.out / "checkpoint.prev.pt")
    os.replace(temp, path)


def load_checkpoint(job: Job, model: GPT) -> dict:
    """Put weights and state of the newer intact checkpoint in place, and return all that it holds;
    a damaged one is passed over by name. ValueError where it belongs to another run."""
    for path in (job.out / "checkpoint.pt", job.out / "checkpoint.prev.pt"):
        if path.exists() and path.stat().st_size > 32:
            with open(path, "rb") as file:
                content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            if hashlib.sha256(content[:-32]).digest() == content[-32:]:
                saved = torch.load(path, map_location="cpu", weights_only=True)
                refuse_another_run(saved["record"], job.record, job.out)
                model.load_state_dict(saved["weights"], strict=False)
                job.state = State(**saved["state"])
                return saved
        if path.exists():
            say(f"note     {path} is damaged and passed over")
    raise FileNotFoundError(f"--resume: no intact checkpoint in {job.out}; start anew: --overwrite")


def put_back(saved: dict, model: GPT, plan, optimizer) -> None:
    """Go on with a checkpoint's moments, and with its proof of this span."""
    from torch.distributed.tensor import distribute_tensor
    for name, p in model.named_parameters():
        for key, value in saved["moments"].get(name, {}).items() if p.requires_grad else ():
            value = value.to(p.device)
            if hasattr(p, "full_tensor") and value.dim():  # sharded as p is
                value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
            optimizer.state[p][key] = value
    plan.resume(model, saved["proof"])


def refuse_another_run(then: dict, now: dict, out: Path) -> None:
    """ValueError unless two heads of run.json describe one run."""
    then, now = ({key: value for key, value in record["flags"].items() if key not in SETTINGS} |
                 {"data": record["data"]["sha256"], "weights": record["weights"]}
                 for record in (then, now))
    differ = [f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
              for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    if differ:
        raise ValueError(f"--resume: {out} holds another run: {'; '.join(differ)}")


def keep_freed_memory() -> None:
    """A step frees and takes the same gigabytes again. glibc would give them back to the kernel,
    which clears page after page; oneDNN would keep a workspace for every length of the data."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "24")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")  # torch's own, on top
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None:
        mallopt(-3, 1 << 30) or mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD; old glibc: 32 MiB
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: none


def multiply_with_onednn() -> None:
    """oneDNN uses AVX-512 where MKL, torch's choice, does not: on AMD, up to twice as fast. torch
    takes it for fp32 only where rounding to bf16 is allowed; test products find the CPUs that would
    really round (AMX, Arm)."""
    matmul = torch.backends.mkldnn.matmul
    matmul.fp32_precision = "bf16"
    x = torch.full((256, 256), 1 + 2**-12)  # 1 in bf16
    products = x @ x, x.t() @ x, x[:8] @ x.t(), torch.bmm(x[None], x[None])
    if not all(torch.allclose(y / 256, x[0, 0].square(), rtol=1e-6, atol=0) for y in products):
        matmul.fp32_precision = "none"


def speed_up_blocks(model: GPT, job: Job) -> None:
    """--recompute, --compile, and on the CPU attention over short texts without the flash kernel,
    whose products are small there: 1.75 times as fast up to 256 tokens, half as fast at 1,024."""
    short = max(len(e.ids) for e in job.train + job.val) <= 256
    small = short and job.machine.device.type == "cpu" and job.machine.dtype == torch.float32
    torch.backends.cuda.enable_flash_sdp(not small)
    for block in model.h:
        if job.recipe.recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if job.recipe.compile:
            block.compile(dynamic=True)


def join_processes(device: str, dtype: str) -> Machine:
    """This process among those that torchrun has started, or alone. Only the first one prints."""
    place, world = choose_device(device), int(os.environ.get("WORLD_SIZE", 1))
    cuda = place.type == "cuda"
    fast = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    chosen = torch.bfloat16 if dtype == "bf16" or dtype == "auto" and fast else torch.float32
    if world == 1:
        return Machine(place, chosen)
    if cuda:
        torch.cuda.set_device(place)
    patience = timedelta(days=1)  # with one that downloads; torchrun notices those that died
    dist.init_process_group("nccl" if cuda else "gloo", timeout=patience)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return Machine(place, chosen, dist.get_rank(), world)


def shard(model: GPT, machine: Machine) -> None:
    """Leave each process a part of every tensor; a block's are put together while it runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(machine.device.type, (machine.world,))
    for module in (*model.h, model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # a sum, not a mean
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "features")


def peak_memory(device: torch.device) -> int:
    """Bytes: of the process at its largest, or allocated on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def load_model(folder: Path, adapter: Path | None, flags: dict):
    """(model, tokenizer). A run's adapter is loaded, or the one that the flags ask for added."""
    if flags["untie_head"] and not read_config(folder).tie_word_embeddings:
        raise ValueError("--untie-head: the head of this model has weights of its own already")
    if adapter and flags["lora_r"]:
        raise ValueError("--lora-r: the model has an adapter, which trains on; or merge it first")
    tie = False if flags["untie_head"] else None
    model = GPT.from_pretrained(folder, flags["dropout"], tie_word_embeddings=tie)
    tokenizer = load_tokenizer(folder)
    if tokenizer.n_vocab > model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.n_vocab} ids, the model fewer")
    torch.manual_seed(flags["seed"])
    if adapter:
        load_lora(model, adapter)
    if flags["lora_r"]:
        targets = (flags["lora_targets"] or "c_attn,c_proj,c_fc").split(",")
        add_lora(model, flags["lora_r"], flags["lora_alpha"] or 2 * flags["lora_r"], targets,
                 flags["lora_dropout"] or 0.0, flags["rslora"])
    return model, tokenizer


def fill_in(flags: dict, model: GPT, adapter: Path | None, machine: Machine) -> dict:
    """The flags with the defaults that depend on the model, and with paths that stay valid."""
    weights = [p.numel() for name, p in model.named_parameters() if not ADAPTER.search(name)]
    small, r = sum(weights) < 10_000_000, flags["lora_r"]
    policy = flags["trainable"] or ("lora" if r or adapter else "all")
    data = "" if flags["data"] == "tiny" else Path(flags["data"]).stem
    name = "-".join(filter(None, [Path(flags["model"]).name, policy, f"r{r}" if r else "", data]))
    chosen = {"trainable": policy, "out": "runs/" + re.sub(r"[^\w.,-]+", "_", name),
              "lr": (3e-4 if small else 5e-5) * (10 if policy == "lora" else 1),
              "epochs": 3 if small else 2, "batch_size": 16 if small else 8,
              "max_length": model.config.block_size}
    flags = flags | {key: value for key, value in chosen.items() if flags[key] is None}
    for key, names in (("model", ("tiny", *PUBLISHED)), ("data", ("tiny", *DATASETS))):
        flags[key] = flags[key] if flags[key] in names else str(Path(flags[key]).absolute())
    if flags["max_length"] > model.config.block_size:
        raise ValueError(f"--max-length: the model takes {model.config.block_size} tokens at most")
    return flags | {"dtype": str(machine.dtype).partition(".")[2], "processes": machine.world}


def prepare(flags: dict, parts, model: GPT, tokenizer, machine: Machine) -> Job:
    """What the run will do, from its flags and records: examples, the order of steps, spans."""
    recipe, notes, kept = argparse.Namespace(**flags), list(parts.notes), []
    notes += filter(None, [marker_note(tokenizer, recipe.template)])
    parts_used, dropped, cut = [], 0, 0
    for records in (parts.train[:recipe.max_examples], parts.val):
        encoded, kept_here = encode_examples(records, tokenizer, recipe.template, recipe.max_length)
        dropped += len(records) - len(encoded)
        cut += sum(e.ids[-1] != tokenizer.eot_token for e in encoded)
        parts_used.append(encoded)
        kept = kept or kept_here
    if dropped or cut:
        notes.append(f"{dropped} records are dropped, with no answer within {recipe.max_length} "
                     f"tokens; {cut} are cut")
    for note in notes:
        say(f"note     {note}")
    train_set, val_set = parts_used
    account = {"name": flags["data"], "sha256": parts.sha256, "split": parts.split,
               "rows": parts.rows, "used": len(train_set), "dropped": dropped, "truncated": cut}
    per_step = recipe.batch_size * recipe.grad_accum * machine.world
    epochs = [batches([len(e.ids) for e in train_set], per_step, recipe.seed, epoch)
              for epoch in range(recipe.epochs)]
    order = [(epoch, step) for epoch, steps in enumerate(epochs) for step in steps]
    order = order[:recipe.max_steps]
    recipe.eval_every = recipe.eval_every or max(1, len(order) // 10)
    n_layer = model.config.n_layer
    spans = schedule(recipe.trainable, n_layer, len(order), len(epochs[0]), recipe.seed)
    weights = json.dumps(digests(dict(model.named_parameters()))).encode()
    record = {"flags": flags, "data": account, "weights": hashlib.sha256(weights).hexdigest(),
              "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    return Job(Path(flags["out"]), record, recipe, machine, train_set, val_set,
               [parts.positions[i] for i in kept], order, spans)


def lowest_trained(model: GPT, job: Job) -> int:
    """The lowest block that trains in any span; ValueError for a flag that has no effect then."""
    names = set().union(*(resolve(model, policy) for policy in {p for _, p in job.spans}))
    layer, policy = lowest_block(names, model.config.n_layer), job.recipe.trainable
    if job.recipe.lora_r and not any(map(ADAPTER.search, names)):
        raise ValueError(f"--lora-r: no adapter trains under --trainable {policy}; add lora to it")
    if job.recipe.cache_prefix and layer == 0:
        raise ValueError(f"--cache-prefix: no block lies below what trains in {policy}")
    if job.recipe.fsdp and len(job.spans) > 1:
        raise ValueError(f"--fsdp: what trains under {policy} changes, what is sharded cannot")
    return layer


def take_folder(out: Path, resume: bool, overwrite: bool, sources: list) -> None:
    """OSError unless the run folder is free, or holds a run that may be replaced or resumed."""
    held = (out / "metrics.jsonl").exists() or (out / "run.json").exists()
    if resume and not held:
        raise FileNotFoundError(f"--resume: no run in {out}")
    if out.exists() and not held and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out {out}: holds something that is no run; choose another")
    if held and not (resume or overwrite):
        raise FileExistsError(f"--out {out}: holds a run; --resume goes on with it, --overwrite "
                              "replaces it, another --out keeps it")
    for path in sources:
        if path and path.resolve().is_relative_to(out.resolve()):
            raise FileExistsError(f"--out {out}: holds {path}, from which this run starts")


def begin_folder(out: Path, step: int) -> None:
    """Empty the run folder (what others put there stays), or cut what a resumed run repeats."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [line for line in read_records(out / "metrics.jsonl") if line["step"] <= step]
    for path in [path for name in WRITTEN for path in out.glob(name)] if step == 0 else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with open(out / "metrics.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines if step)


def run(args) -> int:
    """Load, freeze, prove, train, prove again, save, answer; returns the exit code."""
    machine = join_processes(args.device, args.dtype)
    if args.fsdp and machine.world == 1:
        raise ValueError("--fsdp: there is one process; start several with torchrun")
    if machine.rank > 0:
        dist.barrier()  # the first one downloads, the others find what it got
    (folder, adapter), parts = locate(args.model), load_parts(args.data)
    if machine.rank == 0 and machine.world > 1:
        dist.barrier()
    model, tokenizer = load_model(folder, adapter, vars(args))
    job = prepare(fill_in(vars(args), model, adapter, machine), parts, model, tokenizer, machine)
    layer, out = lowest_trained(model, job), job.out
    take_folder(out, args.resume, args.overwrite, [folder, adapter])
    if args.resume and (out / "run.json").exists():
        refuse_another_run(read_json(out / "run.json"), job.record, out)
        say(f"{out}: the run is complete; evaluate.py {out} scores it")
        return 0
    saved = load_checkpoint(job, model) if args.resume else None
    if machine.rank == 0:
        begin_folder(out, job.state.step)
    say(f"data     {args.data}: {parts.rows} records ({parts.split}); {len(job.train)} train, "
        f"{len(job.val)} validate, {len(parts.test)} test")
    say(f"model    {args.model} on {machine.device} in {job.recipe.dtype}; steps {job.state.step} to "
        f"{len(job.order)}, lr {job.recipe.lr:g}")

    model.to(machine.device)
    speed_up_blocks(model, job)
    if args.fsdp:
        shard(model, machine)
    if args.cache_prefix:
        job.prefix = Prefix(model, layer, job.train + job.val, job.recipe.batch_size, machine)
    noted = []  # signals: the step at hand is finished first
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: noted.append(number))
    finished = train_in_spans(model, job, saved, noted)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not finished:
        say(f"\nstopped after step {job.state.step}; the same command with --resume goes on")
        return 128 + (noted or [signal.SIGTERM])[0]
    finish(job, model, folder, tokenizer, [] if args.no_responses else parts.test)
    return 0


def finish(job: Job, model: GPT, folder: Path, tokenizer, test: list) -> None:
    """Save what was trained and run.json, then answer the test records."""
    for module in model.modules() if hasattr(model, "unshard") else ():
        if hasattr(module, "unshard"):
            module.unshard()  # put together again, in every process
    if job.machine.world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if job.machine.rank > 0:
        return
    out, state = job.out, job.state
    limit = min(model.config.block_size, 2 * max(len(e.ids) - e.n_prompt for e in job.train))
    figures = {"steps": state.step, "train_loss": sum(state.losses) / len(state.losses),
               "val_loss": state.val_loss, "exact_match": None, "seconds": round(state.seconds, 3),
               "tokens_per_second": round(state.tokens / state.seconds, 1),
               "peak_memory_bytes": peak_memory(job.machine.device), "max_new_tokens": limit}
    record = job.record | {"freeze": state.proofs, "train": figures}
    trained = {name for proof in state.proofs for name in proof["trainable"]}
    if job.recipe.untie_head or not all(map(ADAPTER.search, trained)):
        model.save_pretrained(out / "model", base_only=True, eos_id=tokenizer.eot_token)
        copy_tokenizer(folder, out / "model")
        folder = out / "model"
    if any(ADAPTER.search(name) for name, _ in model.named_parameters()):
        save_lora(model, out / "adapter", base=str(folder.resolve()))
    write_json(out / "run.json", record)
    for path in out.glob("checkpoint.*"):
        path.unlink()
    plot_losses(read_records(out / "metrics.jsonl"), out / "loss.png")
    say(f"trained  {state.step} steps in {state.seconds:.0f} s, {figures['tokens_per_second']:,.0f} "
        f"tokens/s, val loss {state.val_loss:.3f}, {figures['peak_memory_bytes'] / 2**30:.2f} GiB")
    say(f"proved   {len(state.proofs[-1]['frozen'])} frozen tensors are bit-identical, "
        f"{len(state.proofs[-1]['trainable'])} trainable ones have changed")
    if test:
        answers = generate_responses(model, tokenizer, test, job.recipe.template, limit,
                                     out / "responses.jsonl")
        for r in answers[:3]:
            say(f"prompt   {textwrap.shorten(r['instruction'] + ' ' + r['input'], 80)}")
            say(f"answer   {textwrap.shorten(r['model_response'], 80)}")
        right = [r["ended"] and exact_match(r["model_response"], r["output"]) for r in answers]
        figures["exact_match"] = sum(right) / len(right)
        write_json(out / "run.json", record)
        say(f"test     {figures['exact_match']:.1%} of {len(right)} answers are exactly right")
    say(f"saved    {out}")


def number(kind, low, high=math.inf):
    """An argparse type: a number from low to high."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return kind(text)
    parse.__name__ = kind.__name__
    return parse


def parse_args(argv=None):
    """The flags, in reading order."""
    parser = argparse.ArgumentParser(
        description="Finetune a GPT-2 on instructions; prove what was frozen and what trained.",
        epilog="auto: models below 10 M parameters take lr 3e-4, 3 epochs, batches of 16; larger "
        "ones lr 5e-5, 2 epochs, batches of 8. Adapters learn ten times as fast as full weights.")
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    count, share = number(int, 1), number(float, 0, 0.99)
    add = parser.add_argument_group("what").add_argument
    add("--model", default="tiny", help="a model or run folder, tiny, gpt2, gpt2-medium, ...")
    add("--data", default="tiny", help="a file of records, a folder of parts, tiny, book, alpaca")
    add("--out", help="run folder to write (default: runs/MODEL-POLICY)")
    add = parser.add_argument_group("which weights").add_argument
    add("--trainable", help="freeze policy: all, last_block, lora,norms, ... (default: all)")
    add("--lora-r", type=count, help="rank of the adapters to add")
    add("--lora-alpha", type=number(float, 1e-6, 1e9), help="scale times rank (default: 2 r)")
    add("--lora-targets", help="suffixes of module names (default: c_attn,c_proj,c_fc)")
    add("--lora-dropout", type=share, help="on the adapters' input (default: 0)")
    add("--rslora", action="store_true", help="scale by alpha / sqrt(r) in place of alpha / r")
    add("--untie-head", action="store_true", help="give the head its own copy of the embedding")
    add = parser.add_argument_group("data").add_argument
    add("--template", choices=list(TEMPLATES), default="alpaca", help="prompt format")
    add("--loss-on", choices=["response", "all"], default="response", help="which tokens count")
    add("--max-length", type=number(int, 2), help="tokens of an example (default: all that fit)")
    add("--max-examples", type=count, help="train on the first so many records")
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=count, help="passes over the training part (default: auto)")
    add("--batch-size", type=count, help="examples in a micro-batch (default: auto)")
    add("--grad-accum", type=count, default=1, help="micro-batches in a step")
    add("--lr", type=number(float, 1e-12), help="peak learning rate (default: auto)")
    add("--lr-decay", type=number(float, 1e-3, 1), default=1.0, help="factor for each block down")
    add("--dropout", type=share, default=0.0, help="in the model")
    add("--weight-decay", type=number(float, 0), default=0.1, help="on matrices alone")
    add("--warmup", type=number(float, 0), default=0.05, help="steps, or below 1 a share of them")
    add("--schedule", choices=["linear", "cosine", "constant"], default="linear",
        help="how the rate falls after the warm-up")
    add("--clip", type=number(float, 0), default=1.0, help="largest gradient norm; 0: do not clip")
    add("--seed", type=number(int, 0, 2**40), default=123, help="of order, adapters and dropout")
    add("--max-steps", type=count, help="stop after so many steps")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto",
        help="of matrix products; weights stay fp32 (auto: bf16 on GPUs that have it)")
    add("--compile", action="store_true", help="compile the blocks: slow to start, then faster")
    add("--cache-prefix", action="store_true", help="run the frozen lower blocks once per record")
    add("--recompute", action="store_true", help="activations again in backward: less memory")
    add("--fsdp", action="store_true", help="with torchrun: shard the model over the processes")
    add = parser.add_argument_group("output").add_argument
    add("--eval-every", type=count, help="validate every so many steps (default: ten times)")
    add("--checkpoint-every", type=count, help="in steps (default: every ten minutes)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--no-responses", action="store_true", help="do not answer the test prompts")
    args = parser.parse_args(argv)
    for name in ("lora_alpha", "lora_targets", "lora_dropout", "rslora"):
        if getattr(args, name) not in (None, False) and not args.lora_r:
            parser.error(f"--{name.replace('_', '-')} has no effect without --lora-r")
    if args.resume and args.overwrite or args.fsdp and args.cache_prefix:
        parser.error("--resume and --overwrite, --fsdp and --cache-prefix exclude each other")
    return args


def main(argv=None) -> int:
    """Run the command line; what the user gave wrong ends in one line on stderr."""
    args = parse_args(argv)
    keep_freed_memory()
    try:
        if not args.compile:  # the compiler insists on the setting's old name
            multiply_with_onednn()
        return run(args)
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except (ValueError, OSError, ArithmeticError, FreezeError, torch.OutOfMemoryError) as error:
        message, code = " ".join(str(error).split()), 1
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)  # what ends one process mostly ends all: the first one speaks for them
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
