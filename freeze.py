"""Which parameters of a model train, and the proof that these and no others did.

A policy ("last:2", "lora,norms") becomes an exact set of parameters, or an error. The plan then
checks model, optimizer, gradients and finally every byte (sha256) against it. Any PyTorch model
will do: blocks, norms, embeddings and head are found by type.

    plan = freeze(model, "last:2")  # loaded, on its device
    optimizer = torch.optim.AdamW(plan.parameters(), lr=5e-5)
    model.train(); plan.set_modes(model)  # after every model.train()
    plan.check_model(model); plan.check_optimizer(optimizer)
    loss.backward(); plan.check_gradients(model, step)  # in steps 1 and 2
    plan.check_model(model); plan.check_unchanged(model)  # at the end
"""

import argparse
import ctypes
import hashlib
import random
import re
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase

warnings.filterwarnings("ignore", "Failed.*NumPy")
import torch
from torch import nn

TERMS = ("all, none (first), last_block, last:K, first:K, blocks:0-3,7, head, embeddings, "
         "norms, biases, lora, a parameter's name, a pattern with *")
SAME = {"all": "*", "last_block": "last:1", "last_two_blocks": "last:2", "last_layer": "head"}
COMMA = re.compile(r",(?!\s*\d+(?:-\d+)?\s*(?:,|$))")  # not the one in blocks:0,2
ADAPTER = re.compile(r"\blora_")  # in parameters' names, ours and PEFT's
SET_MODES = "call plan.set_modes(model) after model.train()"
is_norm = lambda module: "norm" in type(module).__name__.lower()

class FreezeError(RuntimeError):
    """What trains, or what has changed, is not what the policy says."""

def find_stacks(model):
    """The longest list of modules of one class, by names, with those as long or of its class."""
    lists, within = [], ()  # inside the blocks so far
    for name, module in model.named_modules():
        listed = isinstance(module, (nn.ModuleList, nn.Sequential)) and [*module.parameters()]
        alike = len(set(map(type, module.children()))) == 1
        if listed and alike and not f"{name}.".startswith(within):
            lists.append([f"{name}.{leaf}".lstrip(".") for leaf, _ in module.named_children()])
            within += tuple(f"{block}." for block in lists[-1] if len(lists[-1]) > 1)
    kind = lambda names: type(model.get_submodule(names[0]))
    top = max(lists, key=len, default=[])
    return [names for names in lists if len(names) == len(top) or kind(names) is kind(top)]

def find_blocks(model):
    """Names of the blocks, from the input up, or []; ValueError if there are two stacks."""
    blocks, *others = find_stacks(model) or [[]]
    if others:
        raise ValueError(f"blocks like {blocks[0]} and like {others[0][0]}: say which by patterns")
    return blocks

def chosen_blocks(term, blocks):
    """What last:K, first:K or blocks:0-3,7 means, as beginnings of parameters' names."""
    word, _, text = term.partition(":")
    if word != "blocks":
        k, n = int(text) if text.isdecimal() else 0, len(blocks)
        text = f"0-{k - 1}" if word == "first" else f"{n - k}-{n - 1}"
    parts = [re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part) for part in text.split(",")]
    ranges = [range(int(m[1]), int(m[2] or m[1]) + 1) if m else range(0) for m in parts]
    if not all(r.start < r.stop <= len(blocks) for r in ranges):
        raise ValueError(f"{term!r}: {len(blocks)} blocks were found; say last:2, or a pattern")
    return tuple(f"{blocks[i]}." for r in ranges for i in r)

def matching(model, term, names):
    """The names that a term means; adapters only by all, lora and patterns."""
    term, base = SAME.get(term, term), [n for n in names if not ADAPTER.search(n)]
    module_of = lambda name: model.get_submodule(name.rpartition(".")[0])
    kinds = {"biases": lambda n: n.endswith("bias"), "norms": lambda n: is_norm(module_of(n)),
             "embeddings": lambda n: isinstance(module_of(n), nn.Embedding), "lora": ADAPTER.search}
    if term in kinds:
        return set(filter(kinds[term], names if term == "lora" else base))
    if term == "head":  # get_output_embeddings(), else the last linear outside the blocks
        output = getattr(model, "get_output_embeddings", lambda: None)()
        blocks = tuple(f"{block}." for stack in find_stacks(model) for block in stack)
        heads = [n for n, m in model.named_modules() if m is output or output is None and not
                 f"{n}.".startswith(blocks) and isinstance(m, nn.Linear) and not ADAPTER.search(n)]
        if output is None and len(heads) > 1:
            find_blocks(model)  # two stacks: an error
        return {n for n in base if heads and n.startswith(f"{heads[-1]}.")}
    if term.startswith(("last:", "first:", "blocks:")):
        chosen = chosen_blocks(term, find_blocks(model))
        end = max(i for i, n in enumerate(base, 1) if n.startswith(chosen))
        after = map(module_of, base[end:end + 1] if term.startswith("last:") else [])
        norm = set(filter(is_norm, after))  # if that follows the blocks
        return {n for n in base if n.startswith(chosen) or module_of(n) in norm}
    if term in names or "*" in term:
        return {n for n in names if fnmatchcase(n, term)}
    raise ValueError(f"{term!r} is unknown; there are {TERMS}; in finetune.py gradual:K, lisa:K@N")

def resolve(model, policy):
    """Names in model.named_parameters() of what `policy` trains; ValueError if it is wrong.
    Shared memory goes by its first name: `embeddings` trains a tied head, `head` is refused."""
    named, trainable = dict(model.named_parameters(remove_duplicate=False)), set()
    memory = {n: p.data_ptr() or id(p) for n, p in named.items()}  # 0: meta, sharded
    first = {memory[n]: n for n in reversed(named)}
    terms = [term.strip() for term in COMMA.split(policy)]
    for term in terms[1:] if terms[0] == "none" else terms:
        minus, term = term.startswith("-"), term.removeprefix("-").strip()
        found = matching(model, term, list(named))
        if not found:
            raise ValueError(f"{term!r} matches no parameter (lora: add adapters first)")
        for name in sorted(found):
            if (other := first[memory[name]]) not in found:
                raise ValueError(f"{term!r} means {name}, which is tied to {other}: name that, or "
                                 "untie them (--untie-head, tie_word_embeddings=False)")
        found = {n for n in named if first[memory[n]] in found}
        if minus and not found & trainable:
            raise ValueError(f"-{term} takes nothing away in {policy!r}; begin with all")
        trainable = trainable - found if minus else trainable | found
    if not trainable:
        raise ValueError(f"{policy!r} trains nothing")
    return trainable & dict(model.named_parameters()).keys()

def schedule(policy, n_blocks, steps, steps_per_epoch, seed):
    """Cut a policy that changes with time into static ones: [(first step, policy), ...].
    gradual:K: the last norm, K blocks from the top, one more each epoch (ULMFiT, arXiv 1801.06146);
    lisa:K@N: K blocks drawn anew every N steps (LISA, arXiv 2403.17919). Or ValueError."""
    terms, spans = COMMA.split(policy), []
    timed = [i for i, term in enumerate(terms) if re.match(r"[\s-]*(gradual|lisa):", term)]
    if not timed:
        return [(0, policy)]
    match = re.fullmatch(r"\s*(?:gradual:(\d+)|lisa:(\d+)@(\d*[1-9]\d*))\s*", terms[timed[0]])
    k = int(match[1] or match[2]) if match else 0
    if len(timed) > 1 or not 1 <= k < n_blocks:
        raise ValueError(f"{policy!r}: say gradual:K or lisa:K@N, once, no -, 0 < K < {n_blocks}")
    for turn, step in enumerate(range(0, max(steps, 1), int(match[3] or steps_per_epoch))):
        drawn = random.Random(f"lisa {seed} {turn}").sample(range(n_blocks), k)
        lisa = "blocks:" + ",".join(map(str, sorted(drawn)))
        terms[timed[0]] = f"last:{min(k + turn, n_blocks)}" if match[1] else lisa
        if not spans or ",".join(terms) != spans[-1][1]:
            spans.append((step, ",".join(terms)))
    return spans

def whole(tensor):
    """A sharded tensor as one; all its processes must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

def digests(named):
    """{name: sha256 of dtype, shape and bytes}: equal for bit-identical tensors alone."""
    def digest(t):
        t = whole(t.detach()).cpu().contiguous()
        sha = hashlib.sha256(f"{t.dtype} {tuple(t.shape)} ".encode())
        sha.update((ctypes.c_char * t.nbytes).from_address(t.data_ptr()))  # no copy
        return sha.hexdigest()

    with ThreadPoolExecutor(4) as pool:  # but where processes must keep step
        sharded = any(hasattr(t, "full_tensor") for t in named.values())
        return dict(zip(named, (map if sharded else pool.map)(digest, named.values())))

def resting_modules(model):
    """Names of the wholly frozen modules, which belong in eval mode. One without parameters, as a
    Dropout, rests with the module around it, and where nothing at or before it trains."""
    rests, before = set(), False
    for name, module in model.named_modules():
        flags = [p.requires_grad for p in module.parameters()]
        below = not (flags or before or ADAPTER.search(name))  # PEFT's lora_dropout
        if below or name.rpartition(".")[0] in rests or flags and not any(flags):
            rests.add(name)
        before |= any(p.requires_grad for p in module.parameters(recurse=False))
    return rests

def depends_on_mode(module):
    """Whether train mode changes what a module itself does: dropout, statistics."""
    drops = any(isinstance(rate, float) and rate > 0 for name, rate in vars(module).items()
                if "drop" in (type(module).__name__ + name).lower())
    return drops or hasattr(module, "running_mean") or hasattr(module, "lora_A")

def refuse(names, what, remedy):
    """FreezeError with the first five names, if any."""
    if names := sorted(names):
        more = f" and {len(names) - 5} more" * (len(names) > 5)
        raise FreezeError(f"{what}: {', '.join(names[:5])}{more}; {remedy}")

def freeze(model, policy):
    """Set requires_grad as `policy` says, clear gradients, record a sha256 of every tensor. The
    model must be complete: adapters, weights, device. ValueError for a wrong policy."""
    return Plan(model, policy, resolve(model, policy))

class Plan:
    """What trains (trainable, frozen: sorted names; fingerprint: sha256 of them, with shapes), and
    the checks, which raise FreezeError; `checks` counts those passed."""
    def __init__(self, model, policy, trainable):
        self.policy, self.checks, self._trains = policy, Counter(), trainable
        self._named, self._alive = dict(model.named_parameters()), set()  # gradients seen
        self._moves = {n for n in trainable if self._named[n].numel()}
        self.trainable, self.frozen = sorted(trainable), sorted(self._named.keys() - trainable)
        for n, p in self._named.items():
            p.requires_grad_(n in trainable)
            p.grad = None  # optimizers skip None, but not zeros
        what = [(n, [*p.shape], n in trainable) for n, p in sorted(self._named.items())]
        self.fingerprint = hashlib.sha256(str(what).encode()).hexdigest()
        self._places, self._resting = self._where(model), resting_modules(model)
        self._digests = digests(self._named | self._constants(model))

    def parameters(self):
        """For the optimizer, in the model's order."""
        return [p for n, p in self._named.items() if n in self._trains]

    def set_modes(self, model):
        """After model.train(): wholly frozen parts back to eval (dropout off, BatchNorm still)."""
        for n, module in model.named_modules():
            module.training &= n not in self._resting

    def check_model(self, model):
        """Parameters and their memory, buffers, requires_grad and modes are as planned."""
        self._check_objects(model)
        asked = {n for n, p in self._named.items() if p.requires_grad}
        refuse((f"{n} is {n in asked}" for n in asked ^ self._trains),
               "requires_grad is not as planned", "it was set since freeze()")
        refuse((n for n, m in model.named_modules()
                if n in self._resting and m.training and depends_on_mode(m)),
               "frozen, but in train mode", SET_MODES)
        self.checks["check_model"] += 1

    def check_optimizer(self, optimizer):
        """It holds what trains, each once, and nothing else, not even as state."""
        names, remedy = {p: n for n, p in self._named.items()}, "give it plan.parameters()"
        name_of = lambda p: names.get(p, f"a tensor {tuple(p.shape)} not in the model")
        held = Counter(name_of(p) for g in optimizer.param_groups for p in g["params"])
        once, state = Counter(self.trainable), set(map(name_of, optimizer.state))
        refuse(held - once, "the optimizer holds what does not train, or holds it twice", remedy)
        refuse(once - held, "the optimizer lacks what should train", remedy)
        refuse(state - self._trains, "the optimizer has state of what does not train", remedy)
        self.checks["check_optimizer"] += 1

    def check_gradients(self, model, step):
        """After backward, `step` from 1. Frozen: None, for zeros let weights decay. Trainable:
        finite, non-zero by step 2 (LoRA's A has zeros in step 1)."""
        self._check_objects(model)
        grads = {n: p.grad for n, p in self._named.items() if p.grad is not None}
        cut = "is it left out of the forward pass, or the graph cut?"
        refuse(grads.keys() - self._trains, "frozen, but with a gradient where None belongs",
               "only backward() may set .grad")
        refuse(self._moves - grads.keys(), "trainable, but no gradient", cut)
        size = {n: whole(g).to_dense().norm(torch.inf) for n, g in grads.items() if g.numel()}
        refuse((n for n in size if not size[n].isfinite()), "the gradient is not finite",
               "lower the rate")
        self._alive |= {n for n in size if size[n] > 0}
        refuse(self._moves - self._alive if step > 1 else (), "zero gradients", cut)
        self.checks["check_gradients"] += 1

    def check_unchanged(self, model, trained=True):
        """Frozen tensors and buffers are bit-identical; every trainable tensor has changed (unless
        trained=False, as after fewer than two steps)."""
        self._check_objects(model)
        asked = self._named if trained else {n: self._named[n] for n in self.frozen}
        same = dict(digests(asked).items() & self._digests.items())
        refuse(set(self.frozen) - same.keys(), "frozen, but changed", "find what else writes to it")
        refuse(self._moves & same.keys(),
               "should have trained, but did not change", "too low a rate, or bf16 too coarse?")
        self.checks["check_unchanged"] += 1

    @property
    def proof(self):
        """What `resume` needs of a checkpoint, JSON-able."""
        return dict(policy=self.policy, fingerprint=self.fingerprint, digests=self._digests,
                    checks=dict(self.checks))

    def resume(self, model, proof):
        """Go on with an interrupted run's proof; the model has its weights."""
        if proof["fingerprint"] != self.fingerprint:
            raise FreezeError(f"the checkpoint trained {proof['policy']!r}, here {self.policy!r}: "
                              "take its policy and model")
        self._digests = proof["digests"]
        self.checks += Counter(proof["checks"])
        self.check_unchanged(model, trained=False)

    def summary(self):
        """What trains, in parameters and bytes."""
        total = sum(p.numel() for p in self._named.values())
        trains = sum(p.numel() for p in self.parameters())
        size = 3 * sum(p.nbytes for p in self.parameters()) / 1e6
        return (f"{self.policy}: trains {trains:,} of {total:,} parameters ({trains / total:.2%}), "
                f"{size:,.1f} MB for gradients, moments")

    def _where(self, model):
        return {n: (id(p), p.data_ptr(), p.dtype, p.shape, p.stride())
                for n, p in model.named_parameters(remove_duplicate=False)}

    def _constants(self, model):
        """The buffers, but those of what trains and of norms without parameters within it."""
        moving = {n for n, m in model.named_modules() if n not in self._resting and
                  (is_norm(m) or any(p.requires_grad for p in m.parameters(recurse=False)))}
        return {n: b for n, b in model.named_buffers() if n.rpartition(".")[0] not in moving}

    def _check_objects(self, model):
        moved = dict(self._where(model).items() ^ self._places.items())  # what differs, by name
        refuse(moved, "added, removed or replaced", "freeze() the complete model")
        changed = dict(digests(self._constants(model)).items() ^ self._digests.items())
        refuse(changed.keys() - self._named, "buffers changed", SET_MODES)

def table(plan):
    """How much trains of each block, and of each module outside the blocks."""
    total, trains = Counter(), Counter()
    for name, p in plan._named.items():
        unit = re.match(r"(?:\w+\.)*?\d+(?=\.)|.*(?=\.)|", name)[0]  # down to the first number
        total[unit] += p.numel()
        trains[unit] += p.numel() * (name in plan._trains)
    return "\n".join(f"{unit:24} {trains[unit]:13,} of {total[unit]:13,}" for unit in total)

def main(argv=None):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    flag = parser.add_argument
    flag("--model", default="tiny", help="model folder or name")
    flag("--trainable", default="all", help=f"terms, with commas: {TERMS}")
    flag("--lora-r", type=int, help="add adapters of this rank")
    args = parser.parse_args(argv)
    try:
        from gpt import GPT
        from lora import add_lora
        model = GPT.from_pretrained(args.model)
        if args.lora_r is not None:
            add_lora(model, r=args.lora_r)
        plan = freeze(model, args.trainable)
    except (ImportError, OSError, ValueError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 1
    print(table(plan), plan.summary(), sep="\n\n")
    return 0

if __name__ == "__main__":
    sys.exit(main())
