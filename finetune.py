# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "tiktoken==0.14.0"]
# ///
"""
Instruction finetuning of GPT-2 under a freeze policy that is proved.

The policy (`--trainable`) is resolved to an exact set of parameters or refused. The set is checked before
the optimizer exists, against the optimizer, after the first two backward passes and at the end, where every
frozen tensor must be bit-identical to what was loaded and every trainable one must have changed. run.json
records that the checks passed; a check that fails ends the run.

The loss of a step is the sum over its supervised tokens divided by their number, whatever the number of
micro-batches. The same seed, data and flags give the same weights on the same machine.

    python finetune.py                                                  # the embedded model, a minute on a laptop
    python finetune.py --trainable last_two_blocks --out runs/last2
    python finetune.py --lora-r 16 --out runs/lora
    python finetune.py --model path/to/gpt2 --data my-records.json
"""

import argparse
import ctypes
import errno
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch says so without numpy, which is not needed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from data import (INSTRUCTIONS, RESPONSES, TEMPLATES, batches, collate, data_file, encode_examples, format_prompt,
                  load_examples, load_tokenizer, prompt_weight, reshape_example, sample_order, save_tokenizer,
                  select_examples, split_examples, split_stages, token_weights)
from evaluate import (drawable, eval_mode, exact_match, example_nlls, first_token_entropies, generate_responses,
                      instruction_following_difficulty, naming, plot_losses, read_records, sparkline, write_records)
from freeze import FreezeError, freeze, whole
from gpt import PUBLISHED, GPT, generate, model_folder, read_config, read_json, read_safetensors, write_json, write_safetensors
from lora import add_lora, load_lora, save_lora

try:
    import fcntl
    import resource
except ImportError:  # Windows: run folders are not locked there, and memory is not measured
    fcntl = resource = None

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEAD_ROWS = 1024  # positions per chunk of logits; each chunk also costs a gradient of the size of the head
FROZEN_HEAD_ROWS = 128  # smaller chunks where the head is frozen and has no gradient
PREFIX_BYTES = 2**30  # of --cache-prefix that stay in memory
CURRICULA = ("none", "length", "level", "ifd", "random")
TAU = 0.05  # a shorter instruction is taken if it costs at most so many more nats per response token
LEAST_RATE, LEAST_CLIP = 1e-20, 1e-6  # below them updates vanish: beside any weight, beside AdamW's epsilon
MAX_SKIPPED = 5  # steps in a row without a finite loss and gradient, after which the run ends


class UsageError(ValueError):
    """A flag whose value cannot be used: exit code 2."""


class Machine(NamedTuple):
    """What a run computes on: the device, the dtype of the matrix products, and which of how many processes this is."""
    device: torch.device
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world: int = 1

    def autocast(self):
        """A context in which matrix products have this dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


@dataclass
class Data:
    """What a run learns from, and what it is tested on."""
    train: list  # of Encoded
    positions: list[int]  # of the training examples in the file
    stages: list[list[int]]  # indices into train, in the order in which the stages are learned
    val: list  # of Encoded
    test: list[dict]  # records to be answered
    account: dict  # run.json's "data"
    # With adaptive instructions: the test records with the long one, the validation records with the short one.
    long_test: list[dict] = field(default_factory=list)
    short_val: list[dict] = field(default_factory=list)
    prefix: "Prefix | None" = None  # with --cache-prefix: what the frozen blocks give for train and val


# ---------------------------------------------------------------------------------------------
# command line


def number(kind, low, high=math.inf, low_ok=True):
    """An argparse type: a finite int or float in [low, high] (above low, unless low_ok)."""
    def parse(text):
        value = kind(text)
        if not (low <= value <= high and value < math.inf) or (value == low and not low_ok):
            bounds = f"{'at least' if low_ok else 'above'} {low}" + (f" and at most {high}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value
    parse.__name__ = kind.__name__
    return parse


def auto(parse):
    """An argparse type: `auto` (as None), or what `parse` takes."""
    def auto_or(text):
        return None if text == "auto" else parse(text)
    auto_or.__name__ = f"auto or {parse.__name__}"
    return auto_or


def nonempty(text):
    """An argparse type: text. Empty, from a shell variable that was never set, it would be taken for the default."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("must not be empty" if not text else "holds a NUL character")
    return text


def parse_args(argv=None):
    """Flags in reading order."""
    count, rate = number(int, 1), number(float, 0)
    parser = argparse.ArgumentParser(
        description="Finetune a GPT-2 on instructions; prove what was frozen and what was trained.",
        epilog="auto: models below 10 M parameters take lr 3e-4, 3 epochs, batches of 16; larger ones lr 5e-5, "
               "2 epochs, batches of 8 (the book's). Adapters learn at ten times the rate of full weights: --lr is the "
               "rate of the full weights, or of the adapters where nothing else trains.")
    parser.error = lambda message: sys.exit(complain(f"{message} (see --help)", code=2))

    add = parser.add_argument_group("what").add_argument
    add("--model", type=nonempty, default="tiny",
        help="a model folder, a run folder, or tiny (embedded, the default), gpt2, gpt2-medium, gpt2-large, gpt2-xl, "
             "distilgpt2 (downloaded once)")
    add("--data", type=nonempty, default="tiny",
        help="a file of records, or tiny (embedded, the default), book, alpaca (downloaded once)")
    add("--out", type=lambda text: Path(nonempty(text)), help="run folder to write (default: runs/MODEL-POLICY)")

    add = parser.add_argument_group("which weights").add_argument
    add("--trainable", type=nonempty,
        help="freeze policy, e.g. all, last_block, lora,norms (default: all; lora with --lora-r)")
    add("--lora-r", type=count, help="rank of the adapters to add (default: none)")
    add("--lora-alpha", type=number(float, 1e-6, 1e38), help="scale times rank (default: 2 r)")
    add("--lora-targets", type=nonempty, help="suffixes or patterns of module names (default: c_attn,c_proj,c_fc)")
    add("--lora-dropout", type=number(float, 0, 0.99), help="on the adapters' input (default: 0)")
    add("--rslora", action="store_true", help="scale by alpha / sqrt(r) in place of alpha / r")
    add("--loraplus-ratio", type=number(float, 0, low_ok=False), help="rate of B over rate of A, LoRA+ (default: 1)")
    add("--untie-head", action="store_true", help="give the head its own copy of the embedding")

    add = parser.add_argument_group("data").add_argument
    add("--template", choices=list(TEMPLATES), default="alpaca", help="prompt format (default: alpaca)")
    add("--loss-on", default="response",
        help="response, all, or a weight 0..1 for the prompt's tokens (default: response)")
    add("--max-length", type=number(int, 2), help="cut examples to so many tokens (default: block_size)")
    add("--max-examples", type=count, help="train on so many records of the training part (default: all)")
    add("--select", choices=["random", "longest", "shortest", "ifd"],
        help="which ones: by chance, by response length, or of largest instruction-following difficulty below 1 "
             "(default: the first)")
    add("--instruction", choices=[*INSTRUCTIONS, "adaptive"], default="short",
        help="the record's own, its long paraphrase, or the shortest that the base model finds no harder "
             "(default: short)")
    add("--response", choices=RESPONSES,
        help="answer alone, worked solution then answer, or wrong draft, correction, answer "
             "(default: the output as it is)")
    add("--curriculum", choices=[*CURRICULA, *("-" + c for c in CURRICULA[1:])], default="none",
        help="train in stages of rising difficulty; with a -, of falling: --curriculum=-length (default: none)")
    add("--stages", type=number(int, 2), help="of a curriculum, each of --epochs passes (default: 3)")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=auto(count), help="passes over the training part (default: auto)")
    add("--batch-size", type=auto(count), help="examples in a micro-batch (default: auto)")
    add("--grad-accum", type=count, default=1, help="micro-batches in a step (default: 1)")
    add("--lr", type=auto(number(float, 0, low_ok=False)), help="peak learning rate (default: auto)")
    add("--lr-decay", type=number(float, 0, 1, low_ok=False), default=1.0,
        help="factor on the rate for each block further from the head (default: 1)")
    add("--dropout", type=number(float, 0, 0.99), default=0.0, help="in the model (default: 0)")
    add("--weight-decay", type=rate, help="on matrices, not on biases and norms (default: 0.1)")
    add("--warmup", type=rate, default=0.05, help="steps, or below 1 a share of them (default: 0.05)")
    add("--schedule", choices=["linear", "cosine", "constant"], default="linear",
        help="how the rate falls to zero after the warm-up (default: linear)")
    add("--clip", type=rate, default=1.0, help="largest gradient norm; 0: do not clip (default: 1)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=123,
        help="of sample order, adapters and dropout (default: 123)")
    add("--max-steps", type=count, help="stop after so many steps")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add("--dtype", choices=["auto", *DTYPES], default="auto",
        help="of the matrix products; weights stay fp32 (default: auto = bf16 on GPUs that have it)")
    add("--compile", action="store_true", help="compile the blocks with torch.compile: slow to start, then faster")
    add("--cache-prefix", action="store_true",
        help="compute what the frozen blocks below the lowest trained one give once for each record, and keep it")
    add("--recompute", action="store_true",
        help="keep only what enters each block and compute the rest again in the backward pass: "
             "less memory, more time")
    add("--fsdp", action="store_true", help="with torchrun: shard weights, gradients and optimizer over the processes")

    add = parser.add_argument_group("output").add_argument
    add("--eval-every", type=count, help="validate every so many steps (default: ten times a run)")
    add("--eval-batches", type=count, default=20, help="batches of a validation while training (default: 20)")
    add("--checkpoint-every", type=count,
        help="write resume state every so many steps (default: only when interrupted)")
    add("--keep", type=count, default=2, help="checkpoints to keep (default: 2)")
    add("--resume", action="store_true", help="go on from the newest intact checkpoint in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--no-responses", action="store_true", help="do not answer the test prompts")
    return check_flags(parser.parse_args(argv), parser)


def check_flags(args, parser):
    """Refuse flags that the others would make meaningless, and fill in the defaults that depend on them."""
    try:
        prompt_weight(args.loss_on)
    except ValueError as error:
        parser.error(f"--loss-on: {error}")
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    if args.fsdp and args.cache_prefix:
        parser.error("--fsdp and --cache-prefix exclude each other: a sharded block runs in all processes at once, "
                     "the cache when one asks")
    if args.warmup > 1 and args.warmup % 1:
        parser.error(f"--warmup {args.warmup:g}: must be a number of steps, or below 1 a share of them")
    if 0 < args.clip < LEAST_CLIP:
        parser.error(f"--clip {args.clip:g}: must be 0 (do not clip) or at least {LEAST_CLIP:g}, or the updates vanish")
    if args.select and not args.max_examples:
        parser.error("--select has no effect without --max-examples")
    if args.curriculum == "none" and args.stages:
        parser.error("--stages has no effect without --curriculum")
    args.stages = args.stages or (1 if args.curriculum == "none" else 3)
    if args.lora_r is None:
        for name in ("lora_alpha", "lora_targets", "lora_dropout", "rslora"):
            if getattr(args, name) is not parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} has no effect without --lora-r")
    else:
        args.lora_alpha = args.lora_alpha or 2.0 * args.lora_r
        args.lora_targets = args.lora_targets or "c_attn,c_proj,c_fc"
        args.lora_dropout = args.lora_dropout or 0.0
    return args


# ---------------------------------------------------------------------------------------------
# the machine: its memory, its devices, and several processes, one per device, which torchrun starts


def keep_memory() -> None:
    """Let glibc keep what is freed. A step frees and takes again the same gigabytes, which the kernel would otherwise
    take back, clear and hand out page by page each time. Elsewhere (musl, macOS, Windows) nothing happens."""
    # oneDNN keeps a compiled kernel and its workspace for each of the last 1,024 shapes, thus for all lengths of the
    # data. Such long-lived blocks fragment the heap, and the process grows. One step's are enough.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "24")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")  # torch's own, on top
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-3, 1 << 30) or mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD; before glibc 2.35 at most 32 MiB
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: none


@contextmanager
def multiply_with_onednn(compiled: bool = False):
    """Inside `with`, oneDNN multiplies fp32 matrices where the CPU has AVX-512. torch's choice, MKL, uses only AVX2 on
    AMD's CPUs: half as fast on Zen 5. torch uses it only where rounding the factors to bf16 is allowed. A few CPUs
    (with AMX, or Arm's) would then really round: the test products detect that, and the setting is undone."""
    if compiled and torch.cuda.is_available():  # torch's compiler insists on the setting's old name, which GPUs obey too
        yield
        return
    matmul = torch.backends.mkldnn.matmul
    set_by_old_name = torch.set_float32_matmul_precision if compiled else lambda precision: None
    before = matmul.fp32_precision

    def undo():
        set_by_old_name("highest")
        matmul.fp32_precision = before

    set_by_old_name("medium")
    matmul.fp32_precision = "bf16"
    x = torch.full((256, 256), 1 + 2**-12)  # 1 in bf16
    products = x @ x, x.t() @ x, x[:8] @ x.t(), torch.bmm(x[None], x[None])
    if not all(torch.allclose(product / 256, x[0, 0].square(), rtol=1e-6, atol=0) for product in products):
        undo()
    try:
        yield
    finally:
        undo()


def choose_device(name: str, world: int = 1) -> torch.device:
    """Resolve `auto`, and `cuda` for one of several processes; UsageError for what this machine does not have."""
    if name == "auto":
        mps = torch.backends.mps.is_available() and world == 1  # gloo cannot sum over it
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if world > 1 and name not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: each of several processes takes its own; say cpu or cuda")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun numbers the processes of a machine
    try:
        torch.zeros(1, device=name)
        known = torch.device(name).type in ("cpu", "cuda", "mps")
    except (RuntimeError, AssertionError, NotImplementedError):
        known = False
    if not known:
        raise UsageError(f"--device {name}: not on this machine (auto, cpu, cuda, cuda:1, mps)")
    return torch.device(name)


def join_processes(args) -> Machine:
    """This process among those that torchrun has started, or alone. Only the first one prints."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.fsdp and world == 1:
        raise UsageError("--fsdp: there is one process, and nothing to shard over; start several with "
                         "torchrun --nproc_per_node=N finetune.py")
    device = choose_device(args.device, world)
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = DTYPES["bf16" if fast else "fp32"] if args.dtype == "auto" else DTYPES[args.dtype]
    if world == 1:
        return Machine(device, dtype)
    nccl = device.type == "cuda"
    if nccl:
        torch.cuda.set_device(device)
    patience = timedelta(days=1)  # with one process that downloads; torchrun notices those that have died
    dist.init_process_group("nccl" if nccl else "gloo", timeout=patience, device_id=device if nccl else None)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return Machine(device, dtype, dist.get_rank(), world)


def wait_for_all() -> None:
    """Let the slowest process catch up."""
    if dist.is_initialized():
        dist.barrier()


def leave_processes() -> None:
    """When all have come so far, this process is one alone."""
    wait_for_all()
    if dist.is_initialized():
        dist.destroy_process_group()


def in_turn(fetch):
    """fetch() in the first process of all, then in the first of each other machine, then in the rest, which find it."""
    mine = 0 if os.environ.get("RANK", "0") == "0" else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for turn in range(3):
        if turn == mine:
            result = fetch()
        wait_for_all()
    return result


def total_over_processes(values: list[float], device) -> list[float]:
    """Sums over all processes."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def shard(model, plan) -> None:
    """Leave each process a part of every tensor. Those of a block are put together while it runs."""
    from torch.distributed.device_mesh import init_device_mesh  # takes a second
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(model.wte.weight.device.type, (dist.get_world_size(),))
    for module in (*model.h, model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # their sum, as in `gradients`; gloo and NCCL have it
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "features")
    reshard(model)
    plan.rebind(model)


def unshard(model) -> None:
    """Put a sharded model together, in all processes. Until `reshard` each can use it as if it were not sharded."""
    for module in model.modules():
        if hasattr(module, "unshard"):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()


def reshard(model) -> None:
    """Leave each process its part again. What is outside the blocks stays together after `features`, for the head."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def cut_as(p, tensor):
    """A whole tensor of p's shape, on p's device and, if p is sharded, sharded alike."""
    tensor = tensor.to(p.device)
    if not hasattr(p, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


# ---------------------------------------------------------------------------------------------
# the model at hand


def is_name(model: str) -> bool:
    """Whether --model names a model; else it is a path."""
    return model in ("tiny", *PUBLISHED)


def model_path(model: str) -> str:
    """What --model means from any working directory."""
    return model if is_name(model) else str(Path(model).absolute())


def locate(model: str) -> tuple[Path, Path | None]:
    """The model folder that --model means, and its adapter if that is a run."""
    run = Path(model)
    if not (run / "run.json").is_file():
        return model_folder(model), None
    info = read_json(run / "run.json")
    try:
        given, trained = info["flags"]["model"], info.get("freeze", {}).get("trainable", [])
        needed = {"adapter" if is_adapter(name) else "model" for name in trained}
        if not isinstance(given, str):
            raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{run / 'run.json'}: not what finetune.py writes (flags.model, freeze.trainable)") from None
    adapter = run / "adapter" if (run / "adapter").is_dir() else None
    needed = needed or {"adapter" if adapter else "model"}
    if missing := [folder for folder in sorted(needed) if not (run / folder).is_dir()]:
        raise FileNotFoundError(f"{run / missing[0]}: no such folder, but the run trained what belongs there")
    if (run / "model").is_dir():
        return run / "model", adapter
    # The adapter names its base by an absolute path; a name is valid on other machines too.
    base = given if is_name(given) else read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or given
    try:
        return model_folder(base), adapter
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{run}: its base model is gone: {error}") from None


def load_model(args, folder: Path, adapter: Path | None):
    """Model and tokenizer; the run's adapter is loaded, a new one is added where --lora-r asks for it."""
    overrides = {"dropout": args.dropout} | ({"tie_word_embeddings": False} if args.untie_head else {})
    if args.untie_head and not read_config(folder / "config.json", args.dropout).tie_word_embeddings:
        raise UsageError(f"--untie-head: the head of {args.model} has weights of its own already; leave the flag out")
    model, tokenizer = GPT.from_pretrained(folder, **overrides), load_tokenizer(folder)
    width = model.config.n_embd
    if tokenizer.n_vocab > model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.n_vocab} ids, the model {model.config.vocab_size}")
    if adapter and args.lora_r:
        raise UsageError(f"--lora-r {args.lora_r}: {args.model} has an adapter, which is loaded and trained on; "
                         "to start a new one, merge it first (lora.py merge)")
    if args.lora_r and args.lora_r > width:
        raise UsageError(f"--lora-r {args.lora_r}: the model is {width} wide, its matrices have no higher rank")
    torch.manual_seed(args.seed)
    if adapter:
        load_lora(model, adapter)
    elif args.lora_r:
        try:
            add_lora(model, args.lora_r, args.lora_alpha, args.lora_targets.split(","), args.lora_dropout, args.rslora)
        except ValueError as error:
            raise UsageError(f"--lora-targets {args.lora_targets}: {error}") from None
    return model, tokenizer


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of an adapter's, by its name."""
    return ".lora_A." in name or ".lora_B." in name


def is_small(model) -> bool:
    """Below 10 M parameters: such a model wants a higher rate and more epochs."""
    return sum(p.numel() for name, p in model.named_parameters() if not is_adapter(name)) < 10_000_000


def choose_how_blocks_run(args, model, plan, machine) -> None:
    """--compile and --recompute: the function that runs a block is replaced, modules and names stay as they are."""
    if args.compile:
        try:  # something new each time, or what was compiled on an earlier day would be found
            factor = random.random()
            torch.compile(lambda x: x * factor)(torch.ones(2, device=machine.device))
        except Exception as error:  # torch._dynamo's, torch._inductor's, triton's, the compiler's: all mean the same
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UsageError(f"--compile: torch.compile does not work on this machine ({reason}); install a C++ "
                             "compiler (on a GPU triton too), or leave the flag out") from None
        # One function for all blocks and lengths, compiled anew for each pattern of what trains and what drops.
        model.run_block = torch.compile(model.run_block, dynamic=True, recompile_limit=64)
    if args.recompute:
        if lowest_block(plan.eligible, model.config.n_layer) == model.config.n_layer:
            raise UsageError(f"--recompute: under --trainable {args.trainable} the backward pass enters no block; "
                             "leave the flag out")
        model.run_block = functools.partial(checkpoint, model.run_block, use_reentrant=False)


# ---------------------------------------------------------------------------------------------
# the data


def prepare_data(args, model, tokenizer) -> Data:
    """Load, split, reshape, encode, select and order the records; ValueError names the record that does not do."""
    examples, path = load_examples(args.data), data_file(args.data)
    train_part, val_part, test_part = split_examples(list(enumerate(examples)))  # of (position in the file, record)
    if not train_part:
        raise ValueError(f"{args.data}: {len(examples)} records leave none to train on: at least 2 are needed")
    if not args.select:
        train_part = train_part[:args.max_examples]
    train_set, kept = encode_part(args, "training", train_part, model, tokenizer)
    val_set, _ = encode_part(args, "validation", val_part, model, tokenizer)
    dropped = len(train_part) + len(val_part) - len(train_set) - len(val_set)

    ifd = lambda: instruction_following_difficulty(model, train_set, tokenizer.eot_token, args.batch_size)
    if args.select:
        chosen = select_examples(train_set, args.select, args.max_examples, args.seed, ifd)
        if not chosen:
            raise ValueError(f"--select ifd: no record of {args.data} has a difficulty below 1")
        train_set, kept = [train_set[i] for i in chosen], [kept[i] for i in chosen]
    if args.max_examples and len(train_set) < args.max_examples:
        say(f"note     --max-examples {args.max_examples}: only {len(train_set)} training records can be had")
    stages = order_by_difficulty(args, train_set, kept, [examples[i].get("level") for i in kept], ifd)

    account = {"path": str(path), "sha256": sha256(path), "rows": len(examples), "used": len(train_set) + len(val_set),
               "dropped": dropped, "truncated": sum(e.ids[-1] != tokenizer.eot_token for e in train_set + val_set)}
    if args.instruction != "adaptive":
        return Data(train_set, kept, stages, val_set, reshape_all(args, test_part, args.instruction), account)
    short, long = INSTRUCTIONS
    return Data(train_set, kept, stages, val_set, reshape_all(args, test_part, short), account,
                long_test=reshape_all(args, test_part, long), short_val=reshape_all(args, val_part, short))


def order_by_difficulty(args, train_set, kept, levels, ifd) -> list[list[int]]:
    """The stages of --curriculum as lists of indices into train_set; without it one stage of all."""
    if len(train_set) < args.stages:
        raise UsageError(f"--stages {args.stages}: there are only {len(train_set)} training examples")
    kind = args.curriculum.removeprefix("-")
    for i, level in zip(kept, levels):
        if kind == "level" and not (type(level) in (int, float) and -math.inf < level < math.inf):
            raise ValueError(f"{args.data}: record {i + 1} has no number under 'level', which --curriculum level needs")
    difficulty = ifd() if kind == "ifd" else {
        "none": [0] * len(kept), "length": [len(e.ids) for e in train_set], "level": levels,
        "random": [random.Random(f"{args.seed}/{i}").random() for i in kept]}[kind]
    return split_stages(difficulty, args.stages, args.curriculum.startswith("-"), args.seed)


def encode_part(args, label, part, model, tokenizer):
    """The (position, record) pairs of a part as (list of Encoded, their positions), noting what is dropped or cut."""
    if args.instruction == "adaptive":
        records = shortest_instructions(args, label, part, model, tokenizer)
    else:
        records = reshape_all(args, part, args.instruction)
    encoded, report = encode(args, label, records, tokenizer)
    for what, reason in (("dropped", f"nothing of the response is left within {args.max_length} tokens"),
                         ("truncated", f"longer than {args.max_length} tokens"),
                         ("special_text", "a control token is spelled in them and stays text")):
        if report[what]:
            first, _ = part[report[what][0]]
            say(f"note     {len(report[what])} {label} records {what.replace('_', ' ')}: {reason}; "
                f"the first is record {first + 1}")
    return encoded, [part[i][0] for i in report["kept"]]


def shortest_instructions(args, label, part, model, tokenizer) -> list[dict]:
    """Each record with the shortest instruction that, to the model not yet tuned, makes the response no harder."""
    variants, losses = [reshape_all(args, part, kind) for kind in INSTRUCTIONS], []
    for records in variants:
        encoded, report = encode(args, label, records, tokenizer)
        nlls = dict(zip(report["kept"], example_nlls(model, encoded, args.batch_size)))
        losses.append([nlls[i][0] / nlls[i][1] if i in nlls else math.inf for i in range(len(part))])
    pick = [next(k for k, loss in enumerate(row) if loss <= min(row) + TAU) for row in zip(*losses)]
    say(f"note     of {len(part)} {label} records {sum(pick)} take the long instruction")
    return [variants[k][i] for i, k in enumerate(pick)]


def encode(args, label, records, tokenizer):
    """encode_examples with the flags; its error names the file and a remedy."""
    try:
        return encode_examples(records, tokenizer, args.template, args.max_length)
    except ValueError as error:
        raise ValueError(f"{args.data}: {label} records: {error}; raise --max-length if it is below what the model takes, "
                         "or shorten the records") from None


def reshape_all(args, part, instruction) -> list[dict]:
    """A part's records with the instruction and response asked for; ValueError names the record without them."""
    shaped = []
    for position, example in part:
        try:
            shaped.append(reshape_example(example, instruction, args.response))
        except ValueError as error:
            raise ValueError(f"{args.data}: record {position + 1}: {error}") from None
    return shaped


def sha256(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------
# loss, schedule, plan and optimizer


class Prefix:
    """What enters block `layer`, below which all is frozen, for each of `records`: computed when it is first asked for
    and kept, in memory up to PREFIX_BYTES, then in a nameless file in `folder`.

    The last bits of a matrix product depend on what else is in the batch. So records are computed in fixed groups, of
    neighbours in length, whichever batch asks: all epochs, in any order, resumed or not, find the same bits."""

    def __init__(self, model, layer: int, records: list, group_size: int, machine: Machine, folder: Path):
        self.model, self.layer, self.machine, self.folder = model, layer, machine, folder
        order = sorted(records, key=lambda e: len(e.ids))
        groups = [order[i:i + group_size] for i in range(0, len(order), group_size)]
        self.group = {id(e): group for group in groups for e in group}
        self.kept, self.bytes, self.file = {}, 0, None  # id(record) -> (T, C) in memory, or its position in the file

    def __call__(self, batch: list) -> Tensor:
        """(B, T, C) for some of the records, rows padded with zeros: nothing looks at them."""
        for e in batch:
            if id(e) not in self.kept:
                self.compute(self.group[id(e)])
        return pad_sequence([self.read(e) for e in batch], batch_first=True).to(self.machine.device)

    @torch.no_grad()
    def compute(self, group: list) -> None:
        """Run the frozen blocks, which are in eval mode, on a group and keep what they give."""
        inputs = collate(group)[0].to(self.machine.device)
        with self.machine.autocast():
            hidden = self.model.hidden_states(inputs, self.layer).float().cpu()  # (B, T, C)
        for e, row in zip(group, hidden):
            row = row[:len(e.ids) - 1].clone()
            if self.bytes + row.nbytes <= PREFIX_BYTES:
                self.kept[id(e)], self.bytes = row, self.bytes + row.nbytes
            else:
                self.kept[id(e)] = self.write(row)

    def write(self, row: Tensor) -> int:
        """Append to the file; returns the position."""
        try:
            self.file = self.file or tempfile.TemporaryFile(dir=self.folder, buffering=0)
            position = self.file.seek(0, os.SEEK_END)
            if self.file.write(as_bytes(row)) < row.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(f"--cache-prefix: what does not fit into memory could not be written to {self.folder} "
                          f"({error.strerror}); make room there, or leave the flag out") from None
        return position

    def read(self, e) -> Tensor:
        """(T, C) of a record, from memory or the file."""
        if isinstance(kept := self.kept[id(e)], Tensor):
            return kept
        row = torch.empty(len(e.ids) - 1, self.model.config.n_embd)
        self.file.seek(kept)
        if self.file.readinto(as_bytes(row)) < row.nbytes:
            raise OSError(f"--cache-prefix: the cache in {self.folder} was cut short")
        return row


def as_bytes(tensor: Tensor):
    """The memory of a contiguous tensor on the CPU, to be read from or written to."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


def prepare_prefix(args, model, plan, data, machine) -> Prefix | None:
    """For --cache-prefix: the cache below the lowest block that trains at any time; UsageError if there is none."""
    if not args.cache_prefix:
        return None
    n_layer, epochs = model.config.n_layer, args.epochs * len(data.stages)
    names = plan.eligible
    if "lisa:" not in args.trainable:  # which draws at any step; what else changes does so with the epochs
        names = set().union(*(plan.due(epoch, 0) for epoch in range(epochs)))
    layer = lowest_block(names, n_layer)
    if layer == 0:
        first = min(names, key=lambda name: (block_of(name, n_layer), name))
        raise UsageError(f"--cache-prefix: under --trainable {args.trainable} {first} trains in the course of the run, "
                         "so no block lies below what trains; leave the flag out")
    return Prefix(model, layer, data.train + data.val, args.batch_size, machine, args.out)


class CrossEntropy(torch.autograd.Function):
    """Cross-entropy (N,) in nats of logits (N, V) for targets (N,). F.cross_entropy holds four tensors as large as the
    logits in the course of a step; here the logits themselves become their gradient, so backward can run only once."""

    @staticmethod
    def forward(ctx, logits, targets):
        highest = logits.amax(1, keepdim=True)  # (N, 1)
        sums = torch.cat([(part - most).exp_().sum(1, keepdim=True)  # in parts, as the subtraction allocates a copy
                          for part, most in zip(logits.split(64), highest.split(64))])
        ctx.save_for_backward(logits, targets[:, None], highest, sums)
        return (sums.log() + (highest - logits.gather(1, targets[:, None])))[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        logits, targets, highest, sums = ctx.saved_tensors
        gradient = gradient[:, None]
        return logits.sub_(highest).exp_().mul_(gradient / sums).scatter_add_(1, targets, -gradient), None


class LossInParts(torch.autograd.Function):
    """The loss of `token_losses(hidden, targets)` summed by `weights`, all (N, ...), over parts of `rows` positions at a
    time: the gradients of a part, for hidden and `parameters`, are computed at once, and its logits forgotten."""

    @staticmethod
    def forward(ctx, token_losses, rows, targets, weights, hidden, *parameters):
        total, of_hidden, of_parameters = 0.0, [], []
        for h, t, w in zip(hidden.split(rows), targets.split(rows), weights.split(rows)):
            with torch.enable_grad():
                h = h.detach().requires_grad_()
                loss = (token_losses(h, t) * w).sum()
                first, *rest = torch.autograd.grad(loss, (h, *parameters))
            of_hidden.append(first)
            of_parameters = [a.add_(b) for a, b in zip(of_parameters, rest)] if of_parameters else rest
            total = total + loss.detach()
        ctx.save_for_backward(torch.cat(of_hidden), *of_parameters)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return None, None, None, None, *(saved.mul_(gradient) for saved in ctx.saved_tensors)


def loss_sum(model, batch, loss_on, machine, prefix=None) -> tuple[Tensor, float]:
    """Summed cross-entropy (nats) over the supervised tokens of a batch, and their total weight. The head is applied
    only where a loss is wanted: most positions of an instruction are prompt."""
    inputs, targets = collate(batch, "all")  # (B, T) each
    weights = token_weights(batch, loss_on).flatten()  # (B T,)
    n = float(weights.sum())  # on the CPU: reading it from the GPU would force a sync
    wanted = weights.nonzero()[:, 0]  # (N,)
    hidden, first = (prefix(batch), prefix.layer) if prefix else (None, 0)
    device = machine.device
    with machine.autocast():
        hidden = model.features(inputs.to(device), wanted=wanted.to(device), hidden=hidden, first=first)  # (N, C)
        targets, weights = targets.flatten()[wanted].to(device), weights[wanted].to(device)
        token_losses = lambda h, t: CrossEntropy.apply(model.lm_head(h).float(), t)
        parameters = [p for p in model.lm_head.parameters() if p.requires_grad]  # unsharded by now
        rows = HEAD_ROWS if parameters else FROZEN_HEAD_ROWS
        if torch.is_grad_enabled() and len(wanted) > rows:
            return LossInParts.apply(token_losses, rows, targets, weights, hidden, *parameters), n
        losses = torch.cat([token_losses(h, t) for h, t in zip(hidden.split(rows), targets.split(rows))])
    return losses @ weights, n  # out here, or autocast would round this product, and with it the whole gradient, to bf16


def mean_loss(model, encoded, batch_size, loss_on, machine, limit=None, prefix=None) -> float:
    """Loss per supervised token over a data part, or about `limit` batches of it."""
    order = sorted(encoded, key=lambda e: len(e.ids))
    chunks = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    if limit:
        chunks = chunks[::math.ceil(len(chunks) / limit)]  # spread over the lengths
    total, count = 0.0, 0.0
    with eval_mode(model):
        for first in range(0, len(chunks), machine.world):  # each process as often: a sharded model needs them all
            mine = first + machine.rank
            loss, n = loss_sum(model, chunks[min(mine, len(chunks) - 1)], loss_on, machine, prefix)
            if mine < len(chunks):
                total, count = total + float(loss), count + n
    reshard(model)
    total, count = total_over_processes([total, count], machine.device)
    return total / count


def rate_at(step: int, total: int, warmup: int, schedule: str) -> float:
    """Share of the peak learning rate at a step counted from 0: never zero before the last step is done."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]


def block_of(name: str, n_layer: int) -> int:
    """The block that a parameter belongs to: -1 for the embeddings, n_layer for ln_f and the head."""
    if block := re.search(r"(?:^|\.)h\.(\d+)\.", name):
        return int(block[1])
    return -1 if name.startswith(("wte.", "wpe.")) else n_layer


def lowest_block(names, n_layer: int) -> int:
    """The lowest block into which the backward pass goes when these parameters train; n_layer: none."""
    return max(0, min(block_of(name, n_layer) for name in names))


def depth_factor(name: str, n_layer: int, decay: float) -> float:
    """decay ** (blocks between a parameter and the head): 1 for ln_f and the head, least for the embeddings."""
    return decay ** max(0, n_layer - 1 - block_of(name, n_layer))


def only_adapters(plan) -> bool:
    """Whether all that trains belongs to adapters."""
    return all(map(is_adapter, plan.eligible))


def adapter_lr(args, plan) -> float:
    """--lr where only adapters train; ten times that where full weights train beside them."""
    return args.lr if only_adapters(plan) else 10 * args.lr


class AdamW(torch.optim.AdamW):
    """torch's own, without the decorators that import torch's compiler, which takes 0.9 s and 70 MB."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)

    @torch.no_grad()
    def step(self):
        inspect.unwrap(torch.optim.AdamW.step)(self)


def build_optimizer(model, plan, args):
    """AdamW over exactly plan.parameters(), in groups by learning rate and weight decay."""
    groups = {}
    for name, p in plan.named.items():
        if name in plan.eligible:
            rate = adapter_lr(args, plan) if is_adapter(name) else args.lr
            rate *= (args.loraplus_ratio or 1.0) if ".lora_B." in name else 1
            rate *= depth_factor(name, model.config.n_layer, args.lr_decay)
            groups.setdefault((rate, args.weight_decay if p.dim() > 1 else 0.0), []).append(p)
    return AdamW([{"params": params, "lr": rate, "peak": rate, "weight_decay": decay}
                  for (rate, decay), params in groups.items()], fused=True)


def refuse_idle_flags(args, model, plan) -> None:
    """UsageError for a flag without effect on what trains; fills in --weight-decay."""
    train = f"under --trainable {args.trainable}"
    if args.weight_decay and all(plan.named[name].dim() < 2 for name in plan.eligible):
        raise UsageError(f"--weight-decay {args.weight_decay:g}: no matrix trains {train}, and nothing else decays; "
                         "leave it out")
    args.weight_decay = 0.1 if args.weight_decay is None else args.weight_decay
    if args.lr_decay != 1 and all(depth_factor(name, model.config.n_layer, 0.5) == 1 for name in plan.eligible):
        raise UsageError(f"--lr-decay {args.lr_decay:g}: {train} all lies in or above the last block, where it is 1; "
                         "leave it out")
    if args.dropout and not any(module.training for module in model.modules() if isinstance(module, torch.nn.Dropout)):
        raise UsageError(f"--dropout {args.dropout:g}: {train} every part that has it is frozen, and drops nothing; "
                         "leave it out")


def prepare_plan(args, model, train_set):
    """(plan, optimizer): freeze by the policy, both checked; fills in --lr."""
    if re.search("rgn:|hybrid:", args.trainable) and args.loss_on not in ("response", "all"):
        raise UsageError(f"--loss-on {args.loss_on}: under --trainable {args.trainable} gradients choose what trains, and "
                         "they are those of the response's tokens or of all; take one of the two")
    order = batches([len(e.ids) for e in train_set], args.batch_size, args.seed, 0)
    # For policies that choose by gradients.
    probe = [collate([train_set[i] for i in indices], args.loss_on) for indices in order[:5]]
    try:
        plan = freeze(model, args.trainable, batches=probe, seed=args.seed)
    except ValueError as error:
        raise UsageError(f"--trainable {args.trainable}: {error}") from None
    for flag, value, matrix in (("--lora-r", args.lora_r, ".lora_"), ("--loraplus-ratio", args.loraplus_ratio, ".lora_B.")):
        if value is not None and not any(matrix in name for name in plan.eligible):
            raise UsageError(f"{flag} {value:g}: no adapter trains under --trainable {args.trainable}; add lora to it")
    plan.set_modes(model.train())
    refuse_idle_flags(args, model, plan)
    args.lr = args.lr or (3e-4 if is_small(model) else 5e-5) * (10 if only_adapters(plan) else 1)
    if args.fsdp:
        if all(name.startswith("lm_head.") for name in plan.eligible):
            raise UsageError(f"--fsdp: under --trainable {args.trainable} the backward pass stays in the head, and a "
                             "sharded model sums gradients only where it passes a block; leave the flag out")
        shard(model, plan)
    plan.check_model(model)
    optimizer = build_optimizer(model, plan, args)
    plan.check_optimizer(optimizer)
    if (least := min(group["peak"] for group in optimizer.param_groups)) < LEAST_RATE:
        raise UsageError(f"--lr {args.lr:g} with --lr-decay {args.lr_decay:g} and --loraplus-ratio "
                         f"{args.loraplus_ratio or 1:g} makes a learning rate of {least:g}, with which nothing moves: "
                         f"it must be at least {LEAST_RATE:g}")
    tied = model.lm_head.weight is model.wte.weight
    # The gradient that a tied embedding gets from the head has all rows, the lookup's only a few. Adding these few
    # to it is cheaper than adding two of full size.
    model.wte.sparse = tied and model.wte.weight.device.type == "cpu" and not args.fsdp
    return plan, optimizer


# ---------------------------------------------------------------------------------------------
# checkpoints: state.safetensors (what trains, AdamW's moments) and manifest.json, renamed into place together

# Network file systems may have no locks, or no sync of folders.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
# The flags that a resumed run may change.
SETTINGS = ("out", "resume", "overwrite", "eval_every", "eval_batches", "checkpoint_every", "keep", "no_responses",
            "device", "recompute")


def fingerprint(args, machine, model, data) -> dict:
    """What a resumed run must have in common with the interrupted one."""
    ids = hashlib.sha256(repr(data.stages).encode())
    for example in data.train + data.val:
        ids.update(repr(example).encode())
    return ({key: value for key, value in vars(args).items() if key not in SETTINGS}
            | {f"model {key}": value for key, value in asdict(model.config).items()}
            | {f"adapter {name}": repr(m.configs) for name, m in model.named_modules() if hasattr(m, "configs")}
            | {"data sha256": data.account["sha256"], "token ids": ids.hexdigest(), "processes": machine.world,
               "dtype": str(machine.dtype)})


def saved_checkpoints(out: Path) -> list[Path]:
    """The checkpoint folders, oldest first. They got their names when complete, but may have been damaged since."""
    folders = [folder for folder in (out / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", folder.name)]
    return sorted(folders, key=lambda folder: int(folder.name[5:]))


def sync(*paths: Path) -> None:
    """Wait until the files' contents, and the folders' lists of names, are on the disk and survive a power cut."""
    for path in paths if os.name != "nt" else ():  # there a folder cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        finally:
            os.close(descriptor)


def manifest_sha256(manifest: dict) -> str:
    """Hash of what a manifest says beside it."""
    text = json.dumps({key: value for key, value in manifest.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def trained_tensors(plan, optimizer, machine) -> dict:
    """What trains, and the optimizer's state of it. All processes must ask; the first one gets them."""
    tensors = {}
    for name in plan.eligible:
        p = plan.named[name]
        for key, value in ({"weight": p} | optimizer.state.get(p, {})).items():
            value = whole(value.detach())
            if machine.rank == 0:
                tensors[f"{key}.{name}"] = value
    return tensors


def save_checkpoint(out: Path, state: dict, run: dict, tensors: dict, plan, keep: int) -> None:
    """Write checkpoints/step-N whole or not at all, then remove all but the newest `keep`. What is frozen is not in it:
    it is read from --model again, and the digests in the proof show that it is the same."""
    folder = out / "checkpoints" / f"step-{state['step']:06d}"
    temp = folder.with_suffix(".tmp")
    try:
        for torn in folder.parent.glob("step-*.tmp"):  # a killed process left it
            shutil.rmtree(torn)
        temp.mkdir(parents=True)
        file = temp / "state.safetensors"
        write_safetensors(file, tensors)
        manifest = {"state": state, "run": run, "proof": plan.proof, "checks": plan.checks,
                    "file": [file.stat().st_size, sha256(file)]}
        write_json(temp / "manifest.json", manifest | {"sha256": manifest_sha256(manifest)})
        sync(temp / "manifest.json", temp, out / "metrics.jsonl")
        shutil.rmtree(folder, ignore_errors=True)  # damaged, or the run would not have come from before it
        os.replace(temp, folder)
        sync(folder.parent, out)
    except OSError as error:
        shutil.rmtree(temp, ignore_errors=True)
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise OSError(f"{temp}: the checkpoint of {size:,} bytes could not be written ({error.strerror or error}); "
                      f"{shutil.disk_usage(out).free:,} bytes are free, earlier checkpoints are intact") from None
    folders = saved_checkpoints(out)
    last = folders.index(folder) + 1
    for other in folders[:max(0, last - keep)] + folders[last:]:  # the later ones are damaged: the run passed them over
        shutil.rmtree(other)


def find_checkpoint(out: Path) -> tuple[Path, dict]:
    """The newest checkpoint whose manifest and files are intact, saying what was passed over."""
    for folder in reversed(saved_checkpoints(out)):
        try:
            manifest = read_json(folder / "manifest.json")
            if manifest.get("sha256") != manifest_sha256(manifest):
                raise ValueError("manifest.json is not what its sha256 says")
            file, (size, digest) = folder / "state.safetensors", manifest["file"]
            if file.stat().st_size != size or sha256(file) != digest:
                raise ValueError(f"{file.name} is not what its size and sha256 in the manifest say")
            return folder, manifest
        except (ValueError, OSError) as error:
            say(f"note     skipped {folder}: {error}")
    raise FileNotFoundError(f"--resume: no intact checkpoint in {out / 'checkpoints'}; "
                            "start anew with --overwrite or another --out")


def load_checkpoint(args, machine, run: dict, model, plan, optimizer) -> dict:
    """Put the newest intact checkpoint into model and optimizer; ValueError if it belongs to another run."""
    folder, manifest = find_checkpoint(args.out)
    then, now = manifest["run"], json.loads(json.dumps(run))
    differ = [f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
              for key in now | then if then.get(key) != now.get(key)]
    if differ:
        more = f"; and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise ValueError(f"--resume: {folder} belongs to another run: " + "; ".join(differ[:5]) + more)
    tensors = read_safetensors(folder / "state.safetensors")
    with torch.no_grad():
        for name in plan.eligible:
            p = plan.named[name]
            p.copy_(cut_as(p, tensors[f"weight.{name}"]))
            if f"step.{name}" in tensors:
                moments = {key: cut_as(p, tensors[f"{key}.{name}"]) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": tensors[f"step.{name}"].to(p.device)} | moments
    try:
        plan.resume(model, manifest["proof"])
    except FreezeError as error:
        raise FreezeError(f"--resume: {folder}: {error}; has --model {args.model} changed since?") from None
    plan.checks.update(manifest["checks"])  # a Counter's update adds
    plan.check_optimizer(optimizer)
    if machine.rank == 0:
        cut_metrics(args.out / "metrics.jsonl", manifest["state"]["step"])
    say(f"resume   from {folder}")
    return manifest["state"]


def cut_metrics(path: Path, step: int) -> None:
    """Remove the lines of steps after this one, which will be taken again."""
    lines = read_records(path)
    for i, line in enumerate(lines, 1):
        if type(line.get("step")) is not int or not {"train_loss", "val_loss"} <= line.keys():
            raise ValueError(f"{path}, line {i}: no step, train_loss and val_loss; repair or remove the line")
    write_records(path, [line for line in lines if line["step"] <= step])


# ---------------------------------------------------------------------------------------------
# what the user sees


def say(text="", end="\n"):
    """Print; when the reader has gone (`| head`) or its disk is full, go on without: the run is worth more."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        sys.stdout = open(os.devnull, "w")
        if not isinstance(error, BrokenPipeError):
            print(f"note: standard output: {error.strerror}; the run goes on without it", file=sys.stderr)


def in_place() -> bool:
    """Whether the standard output is a terminal on which a line can be updated."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def status(line: str, keep: bool) -> None:
    """One line that updates in place on a terminal; in a log, only the lines worth keeping."""
    if in_place():
        width = shutil.get_terminal_size().columns - 1
        say("\r" + line[:width].ljust(width), end="\n" if keep else "")
    elif keep:
        say(line)


def mean(values: list[float]) -> float:
    """The average, or NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def minutes(seconds: float) -> str:
    """Seconds as minutes:seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def peak_memory(device: torch.device) -> int:
    """Bytes: of the process at its largest, or allocated on the GPU; 0 where the system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not resource:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def excerpt(text: str, width: int = 70) -> str:
    """The beginning of a text, on one line, without what would steer a terminal."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return text if len(text) <= width else text[:width - 3] + "..."


def draw_losses(out: Path) -> str:
    """Draw metrics.jsonl: into loss.png where matplotlib is installed, else as a line of text, which is returned."""
    metrics = read_records(out / "metrics.jsonl")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"{sparkline(metrics)} (with matplotlib installed: loss.png)"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(title=drawable(out.name))
    plot_losses(axes, metrics)
    axes.legend()
    with naming(out / "loss.png") as path:
        figure.savefig(path, dpi=150)
    return str(path)


# ---------------------------------------------------------------------------------------------
# training


def gradients(model, batch, n, args, machine, prefix=None) -> float:
    """Accumulate the gradients of a global batch's loss, the sum over supervised tokens divided by their weight n;
    returns that loss. Every process takes its share of the batch, in micro-batches of --batch-size."""
    mine, loss = batch[machine.rank::machine.world], 0.0
    for i in range(0, math.ceil(len(batch) / machine.world), args.batch_size):  # each process as often
        part = mine[i:i + args.batch_size]
        total, _ = loss_sum(model, part or batch[:1], args.loss_on, machine, prefix)
        total = total / n if part else 0 * total
        total.backward()
        loss += float(total.detach())
    if dist.is_initialized():
        for p in model.parameters():
            if p.grad is not None and not hasattr(p, "full_tensor"):  # those of sharded ones are added up already
                dist.all_reduce(p.grad)
    return total_over_processes([loss], machine.device)[0]


def take_step(model, plan, optimizer, batch, share, taken, args, machine, prefix=None) -> tuple[float, float]:
    """One step on a global batch at `share` of the peak learning rates; `taken` steps went before. Returns the loss and
    the norm of the gradients before clipping; unless both are finite, nothing has moved."""
    n = float(token_weights(batch, args.loss_on).sum())
    loss = gradients(model, batch, n, args, machine, prefix)
    norm = float(torch.nn.utils.clip_grad_norm_(plan.parameters(), args.clip or math.inf))
    if math.isfinite(loss) and math.isfinite(norm):
        if taken < 2:
            plan.check_gradients(model, taken + 1)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        optimizer.step()
    model.zero_grad()
    return loss, norm


def total_steps(args, stages, world) -> int:
    """Steps of the whole run, a resumed one's earlier ones too."""
    per_step = args.batch_size * args.grad_accum * world
    return min(args.max_steps or math.inf, args.epochs * sum(math.ceil(len(part) / per_step) for part in stages))


def train(args, machine, model, plan, optimizer, data, state, signals, save_state) -> dict:
    """Take the steps that `state` says are left and return the run's figures, or {"stopped": signal number} if there
    was a signal. `save_state()` writes a checkpoint of `state`, which is kept up to date here."""
    per_step, total = args.batch_size * args.grad_accum * machine.world, total_steps(args, data.stages, machine.world)
    order = sample_order([len(e.ids) for e in data.train], data.stages, per_step, args.epochs, args.seed)
    warmup = round(args.warmup if args.warmup >= 1 else args.warmup * total)
    eval_every = args.eval_every or max(1, total // 10)
    validate = lambda limit: mean_loss(model, data.val, args.batch_size, args.loss_on, machine, limit, data.prefix)

    def log(**figures):
        if machine.rank == 0:
            for key, value in figures.items():
                if isinstance(value, float) and not math.isfinite(value):
                    figures[key] = None  # JSON has no NaN
            with naming(args.out / "metrics.jsonl") as path, open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state["step"]} | figures) + "\n")

    val_loss = validate(args.eval_batches)
    if state["step"] == 0:
        log(epoch=0, train_loss=None, val_loss=val_loss, lr=0.0, tokens=0)
    status(f"step {state['step']}/{total}  val loss {val_loss:.3f}", keep=True)
    begin, before, tokens_before, validating = time.perf_counter(), state["seconds"], state["tokens"], 0.0
    for step, (epoch, indices) in enumerate(itertools.islice(order, total)):
        if step < state["step"]:  # taken before the run was resumed
            continue
        # The dropout masks too are drawn from (seed, step, process) alone.
        torch.manual_seed(((args.seed * 1_000_003 + step) * 1_009 + machine.rank) % 2**63)
        switched = plan.advance(epoch, step)
        plan.set_modes(model.train())
        if switched:
            plan.drop_frozen_state(optimizer)
            plan.check_model(model)
            plan.check_optimizer(optimizer)
        batch, share = [data.train[i] for i in indices], rate_at(step, total, warmup, args.schedule)
        loss, norm = take_step(model, plan, optimizer, batch, share, state["taken"], args, machine, data.prefix)
        state["step"] = step = step + 1
        state["tokens"] += sum(len(e.ids) for e in batch)
        if math.isfinite(loss) and math.isfinite(norm):
            state["taken"] += 1
            state["skipped in a row"] = 0
            state["recent"] = (state["recent"] + [loss])[-eval_every:]
        else:
            state["skipped in a row"] += 1
            plan.skip()
            status(f"note     step {step} skipped: loss {loss}, gradient norm {norm}", keep=True)
            if state["skipped in a row"] == MAX_SKIPPED:
                raise ArithmeticError(f"{MAX_SKIPPED} steps in a row without a finite loss and gradient, the last is "
                                      f"step {step}: lower --lr or --lora-alpha, or use --dtype fp32")

        last = step == total
        due = step % eval_every == 0 and not last
        if due:
            pause = time.perf_counter()
            val_loss = validate(args.eval_batches)
            validating += time.perf_counter() - pause
        seconds = time.perf_counter() - begin
        state["seconds"], state["rate"] = before + seconds, (state["tokens"] - tokens_before) / (seconds - validating)
        log(epoch=epoch + 1, train_loss=loss, val_loss=val_loss if due else None,
            lr=args.lr * share, grad_norm=norm, tokens=state["tokens"],
            seconds=round(state["seconds"], 3), records=[data.positions[i] for i in indices])
        status(f"step {step}/{total}  epoch {epoch + 1}  train loss {mean(state['recent']):.3f}  val loss {val_loss:.3f}  "
               f"{state['rate']:,.0f} tok/s  ETA {minutes(state['seconds'] / step * (total - step))}", keep=due or last)

        stop = signals.on_any_process(machine.device)
        if stop or (args.checkpoint_every and step % args.checkpoint_every == 0 and not last):
            plan.check_model(model)
            plan.check_unchanged(model, trained=False)
            save_state()
        if stop:
            return {"stopped": stop}
    val_loss = validate(None)
    log(epoch=epoch + 1, train_loss=None, val_loss=val_loss, lr=0.0, tokens=state["tokens"])
    return {"steps": state["step"], "train_loss": mean(state["recent"]), "val_loss": val_loss,
            "seconds": round(state["seconds"], 3), "tokens_per_second": round(state["rate"], 1),
            "skipped_steps": state["step"] - state["taken"]}


class Signals:
    """Inside `with`, SIGINT and SIGTERM are only noted: a step, a checkpoint or the result is finished first."""

    def __enter__(self):
        self.noted, self.before = 0, {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, _frame):
        """The handler."""
        self.noted = self.noted or number

    def on_any_process(self, device) -> int:
        """The signal noted here, SIGTERM if only another process has one, or 0: all must stop after the same step."""
        noted = self.noted  # once: a signal that comes meanwhile is for the next step, here as elsewhere
        return (noted or int(signal.SIGTERM)) if total_over_processes([noted], device)[0] else 0


# ---------------------------------------------------------------------------------------------
# the run

# What a run and its evaluation write; removed in this order, so that an interrupted --overwrite can be repeated.
WRITTEN = ("run.json", "responses.jsonl", "scores.json", "loss.png", "compare.png",
           "judge-*.jsonl", "canaries-*.jsonl", "pairwise-*.jsonl", "model", "adapter", "checkpoints", "metrics.jsonl")


def check_out(args) -> None:
    """FileExistsError unless --out is free, or holds a run that may be replaced or resumed."""
    out = args.out
    if args.resume and not (out / "metrics.jsonl").exists():
        raise FileNotFoundError(f"--resume: no run in {out}")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out}: a file is in the way")
    if out.is_dir() and any(path.name != ".lock" for path in out.iterdir()):
        if not any((out / name).exists() for name in ("run.json", "metrics.jsonl")):
            raise FileExistsError(f"--out {out}: the folder is not empty and holds no run; choose another")
        if not (args.overwrite or args.resume):
            raise FileExistsError(f"--out {out}: holds a run; --resume goes on with it, --overwrite replaces it")


def refuse_within(out: Path, flag: str, path: Path | None) -> None:
    """UsageError if --out holds what the run begins from, which --overwrite would remove."""
    if path and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out)):
        raise UsageError(f"--out {out}: holds what {flag} goes on from ({path}); choose another")


def choose_out(args, folder: Path, adapter: Path | None) -> None:
    """Fill in --trainable and --out, and refuse one that is taken or holds what the run starts from."""
    args.trainable = args.trainable or ("lora" if args.lora_r or adapter else "all")
    name = Path(args.model).resolve().name if Path(args.model).is_dir() else args.model
    args.out = args.out or Path("runs") / re.sub(r"[^\w.,-]+", "_", f"{name}-{args.trainable}")
    for path in (folder, adapter):
        refuse_within(args.out, "--model", path)
    check_out(args)


def lock_folder(out: Path):
    """Make the run folder and lock it; returns the lock. OSError if that fails, or another run holds it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not fcntl:
            return None
        lock = open(out / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        raise FileExistsError(f"--out {out}: another run is writing there now; choose another") from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise OSError(f"--out {out}: cannot be written ({error.strerror}); choose another") from None
        say(f"note     {out} cannot be locked there: see to it that no other run writes to it")
        return None


def occupy(args, machine):
    """Take --out for this run, emptied of an earlier one unless that is resumed; returns the lock. What others put
    there stays."""
    wait_for_all()  # every process has seen that --out is free, or resumable
    if machine.rank > 0:
        return None
    lock = lock_folder(args.out)
    check_out(args)  # again: another run may have come and gone meanwhile
    for name in () if args.resume else WRITTEN:
        for path in args.out.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return lock


def choose_sizes(args, model) -> None:
    """Fill in --epochs, --batch-size and --max-length by the model at hand."""
    epochs, batch_size = (3, 16) if is_small(model) else (2, 8)
    args.epochs = args.epochs or epochs
    args.batch_size = args.batch_size or batch_size
    block_size = model.config.block_size
    args.max_length = args.max_length or block_size
    if args.max_length > block_size:
        raise UsageError(f"--max-length {args.max_length}: the model takes at most {block_size} tokens")


def encode_prompts(tokenizer, examples, template) -> list[list[int]]:
    """The prompts of examples as ids, as in training."""
    return [tokenizer.encode_ordinary(format_prompt(e, template)) for e in examples]


def answer(model, tokenizer, examples, template, limit, path=None):
    """Greedy answers to examples, as `generate_responses` gives them."""
    prompts = encode_prompts(tokenizer, examples, template)
    return generate_responses(model, tokenizer, examples, prompts, generate, max_new_tokens=limit, path=path)


def lengthen(model, tokenizer, template, batch_size, short_val, short_test, long_test) -> list[dict]:
    """The test records with their long instruction where the model is unsure how to begin its answer to the short one:
    where the entropy is above the 75th percentile of the validation records."""
    block_size = model.config.block_size  # a prompt that does not fit has no answer, and its entropy no meaning
    unsure = lambda records: first_token_entropies(
        model, [p[:block_size] for p in encode_prompts(tokenizer, records, template)], batch_size)
    known = sorted(unsure(short_val))
    threshold = known[int(0.75 * len(known))]
    return [long if entropy > threshold else short
            for short, long, entropy in zip(short_test, long_test, unsure(short_test))]


def answer_test(args, model, tokenizer, data, before, limit) -> dict:
    """Answer the test records into responses.jsonl and show some beside what was answered `before`; the figures."""
    asked = data.test
    if args.instruction == "adaptive":
        asked = lengthen(model, tokenizer, args.template, args.batch_size, data.short_val, data.test, data.long_test)
    with naming(args.out / "responses.jsonl") as path:
        responses = answer(model, tokenizer, asked, args.template, limit, path)
    lengths = [len(p) for p in encode_prompts(tokenizer, asked, args.template)]
    if unanswered := [i for i, n in enumerate(lengths) if n >= model.config.block_size]:
        say(f"note     {len(unanswered)} test prompts leave no room for an answer and count as wrong; the first is test "
            f"record {unanswered[0] + 1}")
    for old, new in zip(before, responses):
        say(f"\nprompt   {excerpt(old['instruction'] + ' ' + old['input'])}")
        say(f"before   {excerpt(old['model_response'])}")
        say(f"after    {excerpt(new['model_response'])}")
    return {"prompt_tokens": mean(lengths),
            "exact_match": mean([r["ended"] and exact_match(r["model_response"], r["output"]) for r in responses])}


def announce(args, machine, model, plan, data) -> None:
    """What is about to happen, in a few lines."""
    config, account = model.config, data.account
    size = sum(p.numel() for p in model.parameters())
    dtype = next(name for name, dtype in DTYPES.items() if dtype == machine.dtype)
    say(f"model    {args.model}: {size:,} parameters, {config.n_layer} blocks of width {config.n_embd}, "
        f"on {machine.device} in {dtype}")
    say(f"data     {args.data}: {account['rows']} records, {account['used']} to train and validate on, "
        f"{len(data.test)} to test")
    say("freeze   " + plan.summary().replace("\n", "\n         "))
    accumulated = f" x {args.grad_accum}" if args.grad_accum > 1 else ""
    processes = f" x {machine.world} processes" if machine.world > 1 else ""
    mixed = any(map(is_adapter, plan.eligible)) and not only_adapters(plan)
    adapters = f", adapters {adapter_lr(args, plan):g}" if mixed else ""
    say(f"train    {args.epochs} epochs in batches of {args.batch_size}{accumulated}{processes}, "
        f"lr {args.lr:g}{adapters}, loss on {args.loss_on}")
    if data.prefix:
        size = sum(len(e.ids) - 1 for e in data.train + data.val) * config.n_embd * 4
        disk = f", all but {PREFIX_BYTES / 2**30:g} GiB of it on the disk" if size > PREFIX_BYTES else ""
        say(f"prefix   {data.prefix.layer} frozen blocks are run once for each record; what they give, "
            f"{size / 2**30:.2f} GiB at most, is kept{disk}")


def conclude(args, plan, figures, n_test, seconds) -> None:
    """What came of it."""
    say(f"\ntrained  {figures['steps']} steps in {minutes(figures['seconds'])}, "
        f"{figures['tokens_per_second']:,.0f} tokens/s, train loss {figures['train_loss']:.3f}, "
        f"val loss {figures['val_loss']:.3f}, peak memory {figures['peak_memory_bytes'] / 2**30:.2f} GiB")
    trained, changed = len(plan.changed), "have changed"
    if figures["steps"] - figures["skipped_steps"] < 2:
        trained, changed = len(plan.trainable), "(too few steps to ask them to have changed)"
    elif waiting := len(plan.eligible) - trained:
        changed += f", {waiting} others have had one step at most"
    say(f"proved   {len(plan.named) - trained} frozen tensors are bit-identical, {trained} trainable ones {changed}; "
        f"{sum(plan.checks.values())} checks in {plan.seconds:.2f} s ({plan.seconds / seconds:.1%} of the run)")
    say(f"loss     {draw_losses(args.out)}")
    if figures["exact_match"] is not None:
        say(f"test     {figures['exact_match']:.1%} of {n_test} answers are exactly right")
    say(f"saved    {args.out}  ({minutes(seconds)} in all)")


def prove(model, plan, optimizer, state) -> None:
    """The last checks: what was frozen has not moved, what was to train has, and the result can be used."""
    plan.check_model(model)
    plan.check_optimizer(optimizer)
    if not state["taken"]:
        raise ArithmeticError(f"none of the {state['step']} steps had a finite loss and gradient, nothing is saved: "
                              "lower --lr or --lora-alpha, or use --dtype fp32")
    try:
        plan.check_unchanged(model, trained=state["taken"] > 1)
    except FreezeError:  # if only something trainable has not changed, a tiny rate may be to blame, not the proof
        plan.check_unchanged(model, trained=False)
        refuse_lost_updates(model, optimizer)
        raise
    for name, p in model.named_parameters():
        if not all(map(math.isfinite, whole(p.detach()).aminmax())):
            raise ArithmeticError(f"{name} holds NaN or inf after step {state['step']}, nothing is saved: "
                                  "lower --lr or --weight-decay")


@torch.no_grad()
def refuse_lost_updates(model, optimizer) -> None:
    """ArithmeticError for a tensor whose values would all round away a quarter of AdamW's last update, at peak rate."""
    names = {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            value = whole(p.detach())
            state = {key: whole(tensor) for key, tensor in optimizer.state.get(p, {}).items()}
            update = torch.ones_like(value)
            if state:
                first, second = (1 - beta ** float(state["step"]) for beta in group["betas"])
                update = state["exp_avg"] / first / ((state["exp_avg_sq"] / second).sqrt() + group["eps"])
            if update.any() and bool((value + group["peak"] / 4 * update == value).all()):
                raise ArithmeticError(f"{names[p]} did not change: at a rate of {group['peak']:g} its updates vanish "
                                      "beside its values, nothing is saved: raise --lr (or --lr-decay, "
                                      "--loraplus-ratio, --clip)")


def describe(args, plan, data, figures) -> dict:
    """run.json."""
    return {
        "flags": vars(args) | {"out": str(args.out), "model": model_path(args.model)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "data": data.account,
        "freeze": {"policy": args.trainable, "trainable": plan.eligible,
                   "frozen": sorted(plan.named.keys() - set(plan.eligible)), "changed": sorted(plan.changed),
                   "trainable_parameters": sum(p.numel() for p in plan.parameters()),
                   "fingerprint": plan.fingerprint, "checks": plan.checks, "scores": plan.scores},
        "train": figures,
    }


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: on the CPU torch has no class for that, only these messages."""
    failed = "can't allocate memory|not enough memory|out of memory"
    return isinstance(error, MemoryError) or re.search(failed, str(error)) is not None


def keep_result(args, folder, model, tokenizer, plan, data, figures) -> None:
    """Write model/ if full weights trained (or the head was untied), adapter/ if there is an adapter, and run.json; remove
    the checkpoints once all that is on the disk."""
    with naming(args.out / "model"):
        if args.untie_head or not only_adapters(plan):
            folder = args.out / "model"
            model.save_pretrained(folder, base_only=True, eos_id=tokenizer.eot_token)
            save_tokenizer(tokenizer, folder)
        if any(is_adapter(name) for name, _ in model.named_parameters()):
            save_lora(model, args.out / "adapter", base=str(folder.resolve()))
    write_json(args.out / "run.json", describe(args, plan, data, figures))
    written = ("run.json", "metrics.jsonl", "model", "model/*", "adapter", "adapter/*")
    sync(*(path for name in written for path in args.out.glob(name)), args.out)
    shutil.rmtree(args.out / "checkpoints", ignore_errors=True)


def already_complete(out: Path) -> int:
    """Say that --resume has found a finished run; the exit code."""
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # it may have been killed before it did that itself
    leave_processes()
    answered = read_json(out / "run.json").get("train", {}).get("exact_match") is not None
    left = "nothing is left to do" if answered else "but for its answers: evaluate.py gives them"
    say(f"{out}: the run is complete, {left}")
    return 0


def run(args) -> int:
    """Load, freeze, prove, train, prove again, save, answer; returns the exit code."""
    started = time.perf_counter()
    machine = join_processes(args)
    folder, adapter = in_turn(lambda: locate(args.model))
    choose_out(args, folder, adapter)
    if args.resume and (args.out / "run.json").exists():
        return already_complete(args.out)
    refuse_within(args.out, "--data", in_turn(lambda: data_file(args.data)))
    model, tokenizer = load_model(args, folder, adapter)
    model.to(machine.device)
    choose_sizes(args, model)
    data = prepare_data(args, model, tokenizer)
    if args.warmup > (total := total_steps(args, data.stages, machine.world)):
        raise UsageError(f"--warmup {args.warmup:g}: the run has only {total} steps")
    plan, optimizer = prepare_plan(args, model, data.train)
    choose_how_blocks_run(args, model, plan, machine)
    data.prefix = prepare_prefix(args, model, plan, data, machine)

    lock = occupy(args, machine)  # held until this function returns
    announce(args, machine, model, plan, data)
    asked = [] if args.no_responses or machine.rank > 0 else data.test
    limit = min(model.config.block_size, 2 * max(len(e.ids) - e.n_prompt for e in data.train))
    unshard(model)
    before = answer(model, tokenizer, asked[:3], args.template, limit)
    reshard(model)

    identity = fingerprint(args, machine, model, data)
    state = {"step": 0, "taken": 0, "skipped in a row": 0, "tokens": 0, "seconds": 0.0, "rate": 0.0, "recent": []}
    if args.resume:
        state = load_checkpoint(args, machine, identity, model, plan, optimizer)

    def save_state():
        tensors = trained_tensors(plan, optimizer, machine)
        if machine.rank == 0:
            save_checkpoint(args.out, state, identity, tensors, plan, args.keep)
        wait_for_all()

    with Signals() as signals:
        try:
            figures = train(args, machine, model, plan, optimizer, data, state, signals, save_state)
        except Exception as error:
            if in_place():
                say()  # what follows stands on a line of its own
            if not is_out_of_memory(error):
                raise
            longest = max(len(e.ids) for e in data.train + data.val)
            raise MemoryError(f"--batch-size {args.batch_size} with examples of up to {longest} tokens does not fit on "
                              f"{machine.device}: lower --batch-size (and raise --grad-accum to keep the steps as "
                              "they are) or --max-length, or take --recompute") from None
        if "stopped" in figures:
            leave_processes()
            say(f"\nstopped after step {state['step']}; the same command with --resume goes on from there")
            return 128 + figures["stopped"]
        prove(model, plan, optimizer, state)
        if not math.isfinite(figures["val_loss"]):
            raise ArithmeticError(f"the validation loss is {figures['val_loss']} after step {state['step']}, nothing is "
                                  "saved: lower --lr or --lora-alpha, or use --dtype fp32")
        unshard(model)
        leave_processes()  # each has proved its own copy; from here on the first one is alone
        if machine.rank > 0:
            return 0
        figures |= {"peak_memory_bytes": peak_memory(machine.device), "exact_match": None, "max_new_tokens": limit}
        keep_result(args, folder, model, tokenizer, plan, data, figures)

    if asked and signals.noted:
        say("\nstopped before the test prompts were answered; the run is complete, "
            f"and evaluate.py {args.out} answers them")
        return 128 + signals.noted
    if asked:
        figures |= answer_test(args, model, tokenizer, data, before, limit)
        write_json(args.out / "run.json", describe(args, plan, data, figures))
    conclude(args, plan, figures, len(data.test), time.perf_counter() - started)
    return 0


def complain(message: str, code: int = 1, wait: bool = False) -> int:
    """One line on stderr; returns the exit code. What ends one process mostly ends all: on each machine the first one
    speaks at once. The others, and those that `wait`, speak only if torchrun has not ended them after some seconds."""
    if wait or int(os.environ.get("LOCAL_RANK", 0)) > 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        time.sleep(5)
    place = f"process {os.environ['RANK']}: " if int(os.environ.get("RANK", 0)) > 0 else ""
    print(f"error: {place}{excerpt(message, 10_000)}", file=sys.stderr)
    return code


def lost_another(error: Exception) -> bool:
    """Whether the connection to another process broke, as it does when that one ends."""
    broken = "Connection (closed|reset|refused)|Broken pipe|ncclRemoteError|Socket closed"
    return dist.is_initialized() and re.search(broken, str(error), re.IGNORECASE) is not None


def main(argv=None) -> int:
    """Run the command line; what the user gave wrong ends in one line on stderr."""
    args = parse_args(argv)
    keep_memory()
    try:
        with multiply_with_onednn(args.compile):
            return run(args)
    except KeyboardInterrupt:
        return complain("interrupted", code=130)
    except (ValueError, OSError, ArithmeticError) as error:
        return complain(str(error), code=2 if isinstance(error, UsageError) else 1)
    except FreezeError as error:
        return complain(f"freeze proof broken: {error}")
    except (MemoryError, RuntimeError) as error:
        if lost_another(error):
            return complain("another process has ended", wait=True)
        if not is_out_of_memory(error):
            raise
        text = str(error)
        if "--batch-size" not in text:  # it did not happen in training, then
            text = f"--model {args.model} is too large for this machine. {text}"
        return complain(f"out of memory: {text}")


if __name__ == "__main__":
    if sys.stdout:  # None when closed (>&-)
        sys.stdout.reconfigure(errors="backslashreplace")
    code = main()
    if int(os.environ.get("RANK", 0)) > 0:  # nothing is left to do, and gloo's threads may still let go of tensors,
        os._exit(code)  # for which they would need the interpreter that is about to end
    sys.exit(code)
