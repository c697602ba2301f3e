# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "tiktoken==0.14.0"]
# ///
"""Which parameters of a GPT-2 train, and the proof that these and no others did.

`freeze(model, policy)` turns a policy such as "last_two_blocks" or "lora,norms" into an exact set of
parameter names, or raises: a term that matches nothing is an error, never a default. The `Plan` it
returns keeps a sha256 of every tensor and checks, whenever asked, that the model, its optimizer, its
gradients and finally its bytes are what the policy says. Every check has been seen to catch planted
violations, under `python -O` too (tests/test_freeze.py).

    plan = freeze(model, "last_two_blocks")                     # the model is complete and on its device
    optimizer = torch.optim.AdamW(plan.parameters(), lr=5e-5)
    plan.check_model(model); plan.check_optimizer(optimizer)    # before training
    loss.backward(); plan.check_gradients(model, step)          # in steps 1 and 2
    plan.check_model(model); plan.check_optimizer(optimizer)    # at the end
    plan.check_unchanged(model)

    python freeze.py --model tiny --trainable last_block        # what a policy would train
"""

import argparse
import ctypes
import hashlib
import json
import os
import random
import re
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch says so without numpy, which is not needed
import torch
from torch import Tensor, nn
from torch.nn import functional as F

TERMS = ("all, none, last_block, last_two_blocks, last:K, first:K, blocks:0-3,7, last_layer, head, "
         "embeddings, norms, biases, lora, rgn:K, spectrum:K, random:K, gradual:K, lisa:K@N, hybrid:SHARE, "
         "or a name pattern with *")
OF_BLOCKS = ("last:", "first:", "blocks:", "random:", "rgn:", "spectrum:", "gradual:", "lisa:")
DYNAMIC = ("gradual:", "lisa:")
BLOCK = re.compile(r"\bh\.(\d+)\.")
ADAPTER = re.compile(r"\blora_")
KINDS = {"embeddings": r"\b(wte|wpe)\.", "head": r"\blm_head\.", "last_layer": r"\blm_head\.",
         "norms": r"\bln_\w+\.", "biases": r"\bbias$|\bparametrizations\.bias\."}


class FreezeError(RuntimeError):
    """The proof is broken: what trains, or what has changed, is not what the policy says."""


def refuse(wrong, what: str) -> None:
    """Raise FreezeError if there are `wrong` names, with the first five of them."""
    if names := sorted(wrong):
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise FreezeError(f"{what}: {', '.join(names[:5])}{more}")


def bad_policy(why: str) -> ValueError:
    """To be raised where the policy, not the model, is wrong."""
    return ValueError(f"freeze policy: {why}")


# ------------------------------------------------------------------------------- from policy to names


def parse_policy(policy: str) -> list[tuple[bool, str]]:
    """(takes away?, term) in order: "all,-blocks:0-1,3" is [(False, "all"), (True, "blocks:0-1,3")]."""
    terms = []
    for text in (part.strip() for part in policy.split(",")):
        if terms and terms[-1][1].startswith("blocks:") and re.fullmatch(r"[0-9]+(-[0-9]+)?", text):
            terms[-1] = (terms[-1][0], f"{terms[-1][1]},{text}")
        else:
            terms.append((text.startswith("-"), text.removeprefix("-").strip()))
    return terms


def chosen_blocks(term: str, n_layer: int, seed: int = 0, when=None) -> set[int]:
    """The blocks that a term names in a model of `n_layer`. For gradual:K and lisa:K@N those that train at
    when = (epochs, steps) done, or if that is None at any time. What is drawn depends on `seed` and `when` alone."""
    word, _, argument = term.partition(":")
    if word == "blocks":
        ranges = [re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part) for part in argument.split(",")]
        ranges = [range(int(m[1]), int(m[2] or m[1]) + 1) if m else () for m in ranges]
        if not all(ranges):
            raise bad_policy(f"{term!r} is not a list of blocks such as blocks:0-3,7")
        if max(blocks.stop for blocks in ranges) > n_layer:
            raise bad_policy(f"{term!r}, but the model's {n_layer} blocks are 0 to {n_layer - 1}")
        return set().union(*ranges)
    count, at, period = argument.partition("@")
    if not re.fullmatch(r"[0-9]+", count) or not 1 <= int(count) <= n_layer:
        raise bad_policy(f"{term!r} needs a number of blocks from 1 to the model's {n_layer}")
    if bool(at) != (word == "lisa") or (at and not re.fullmatch(r"0*[1-9][0-9]*", period)):
        raise bad_policy(f"{term!r} is not of the form {word}:K{'@N' * (word == 'lisa')}")
    if term.startswith(DYNAMIC) and int(count) == n_layer:
        raise bad_policy(f"{term!r} trains all {n_layer} blocks at any time and never changes; take fewer")
    k, every = int(count), range(n_layer)
    if word == "random":
        return set(random.Random(f"random {seed}").sample(every, k))
    if word == "lisa":
        return set(random.Random(f"lisa {seed} {when[1] // int(period)}").sample(every, k) if when else every)
    if word == "gradual":
        return set(every[-(k + when[0]):] if when else every)
    return set(every[:k] if word == "first" else every[-k:])


def by_block(names) -> list[list[str]]:
    """The names of each block's own parameters, adapters left out."""
    blocks, stacks = [], set()
    for name in names:
        if (match := BLOCK.search(name)) and not ADAPTER.search(name):
            stacks.add(name[:match.start()] + "h")
            blocks += [[] for _ in range(len(blocks), int(match[1]) + 1)]
            blocks[int(match[1])].append(name)
    if len(stacks) > 1:
        raise bad_policy(f"the model has blocks in {' and in '.join(sorted(stacks))}: say which by patterns with *")
    return blocks


def matching(model: nn.Module, term: str, names: list[str], batches, seed: int, scores: dict) -> set[str]:
    """Those of `names` that one term matches at any time. Adapters are matched only by `all`, `lora`, `hybrid`
    and patterns, so that `lora,last_block` is every adapter and the last block's own weights. The final norm
    goes with every choice of blocks but first:K, blocks: and lisa:K@N. Scores of blocks are put into `scores`."""
    base = [n for n in names if not ADAPTER.search(n)]
    term = {"last_block": "last:1", "last_two_blocks": "last:2"}.get(term, term)
    if "*" in term:
        found = {n for n in names if fnmatchcase(n, term)}
    elif term == "all":
        found = set(names)
    elif term == "lora":
        found = set(names) - set(base)
    elif term in KINDS:
        found = {n for n in base if re.search(KINDS[term], n)}
        if term == "norms":  # by GPT-2's names or by type
            module_of = lambda name: model.get_submodule(name.rpartition(".")[0])
            found |= {n for n in base if isinstance(module_of(n), (nn.LayerNorm, nn.RMSNorm))}
    elif term.startswith(OF_BLOCKS):
        blocks = by_block(names)
        chosen = chosen_blocks(term, len(blocks), seed)
        if term.startswith(("rgn:", "spectrum:")):  # as many, but those of highest score
            values = relative_gradient_norms(model, batches) if term.startswith("rgn:") else spectrum_ranks(model)
            chosen = sorted(range(len(blocks)), key=lambda i: -values[i])[:len(chosen)]
            scores[term] = values
        found = {n for i in chosen for n in blocks[i]}
        if not term.startswith(("first:", "blocks:", "lisa:")):
            found |= {n for n in base if re.search(r"\bln_f\.", n)}
    elif term.startswith("hybrid:"):
        found = hybrid(model, term.removeprefix("hybrid:"), batches)
    else:
        hint = " (a parameter's name needs a *)" if term in names else ""
        raise bad_policy(f"unknown term {term!r}{hint}; known are {TERMS}")
    if not found:
        there = sorted({BLOCK.sub("h.*.", n) for n in names})
        remedy = "add adapters with --lora-r" if term == "lora" else "there are " + ", ".join(there)
        raise bad_policy(f"{term!r} matches no parameter; {remedy}")
    return found


def shared_memory(model: nn.Module) -> list[list[str]]:
    """Groups of parameter names over the same memory: one tensor with two names, or overlapping views."""
    extents = []
    for name, p in model.named_parameters(remove_duplicate=False):
        start, count = p.data_ptr(), 1 + sum((n - 1) * stride for n, stride in zip(p.shape, p.stride()))
        end = start + count * p.element_size()
        if start == 0:  # on the meta device, or empty: only the object can be shared
            start, end = id(p), id(p) + 1
        extents.append((str(p.device), start, end, name))
    groups, reach = [], ("", 0)
    for device, start, end, name in sorted(extents, key=lambda extent: extent[:2]):
        if (device, start) < reach:
            groups[-1].append(name)
        else:
            groups.append([name])
        reach = max(reach, (device, end))
    return [group for group in groups if len(group) > 1]


def match_terms(model: nn.Module, policy: str, batches, seed: int, scores: dict) -> list[tuple[bool, str, set[str]]]:
    """(takes away?, term, names it matches at any time) in order; ValueError as in `resolve`."""
    named = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in reversed(named.items())}
    untie = "or give it memory of its own (a tied head: --untie-head)"
    terms = []
    for i, (minus, term) in enumerate(parse_policy(policy)):
        if term == "none" and (i or minus):
            raise bad_policy(f"'none' in {policy!r} can only come first")
        if term == "none":
            continue
        found = matching(model, term, list(named), batches, seed, scores)
        for name in sorted(found):
            if (listed := first[id(named[name])]) not in found:
                raise bad_policy(f"{term!r} is {name}, the same tensor as {listed}: name that one for both, {untie}")
        found &= set(first.values())
        if minus and not found & combine(terms):
            raise bad_policy(f"-{term} in {policy!r} takes nothing away from what stands before it; "
                             "to train all but something, begin with all")
        if minus and term.startswith(DYNAMIC):
            raise bad_policy(f"-{term}: what changes as training goes on cannot be taken away")
        terms.append((minus, term, found))
    trainable = combine(terms)
    if not trainable:
        raise bad_policy("it trains nothing")
    refuse_idle_terms(terms, policy, named, seed)
    for group in shared_memory(model):
        trains = [first[id(named[name])] for name in group if first[id(named[name])] in trainable]
        if 0 < len(trains) < len(group):
            raise bad_policy(f"{policy!r} trains only a part of {', '.join(group)}, which share memory: name all, {untie}")
        if len(set(trains)) > 1:
            raise bad_policy(f"{', '.join(group)} share memory, but are separate parameters, and each would be updated: "
                             "make them one (assign the Parameter, not its .data), or give each memory of its own")
    return terms


def refuse_idle_terms(terms: list[tuple[bool, str, set[str]]], policy: str, names, seed: int) -> None:
    """ValueError for terms that choose in vain, or that at some time would leave nothing to train."""
    without = lambda *words: [t for t in terms if not t[1].startswith(words)]
    for word in ("rgn:", "spectrum:", "random:", "hybrid:"):
        if len(without(word)) < len(terms) and set(sum(by_block(names), [])) <= combine(without(word)):
            raise bad_policy(f"{word} in {policy!r} chooses in vain, because the other terms train all blocks")
    if len(without(*DYNAMIC)) == len(terms):
        return
    trainable, n_layer = combine(terms), len(by_block(names))
    always = combine(without("lisa:"), n_layer, seed, (0, 0))  # what is always on, and what gradual:K begins with
    drawn = [i for i, (_, term, _) in enumerate(terms) if term.startswith("lisa:")]
    if combine(without(*DYNAMIC)) == trainable or not drawn and always == trainable:
        raise bad_policy(f"{policy!r} never changes, because the other terms train all its blocks")
    if not always and not drawn:
        raise bad_policy(f"{policy!r} trains nothing at first")
    for i in () if always else drawn:  # what the terms after it leave of all that it may draw
        left = {BLOCK.search(name)[1] for name in combine([terms[i], *(t for t in terms[i:] if t[0])])}
        if n_layer - len(left) >= int(re.findall("[0-9]+", terms[i][1])[0]):
            raise bad_policy(f"{policy!r} trains nothing while {terms[i][1]} draws only blocks that other terms take away")


def combine(terms: list[tuple[bool, str, set[str]]], n_layer: int = 0, seed: int = 0, when=None) -> set[str]:
    """The names that matched terms train at when = (epochs, steps) done, or if that is None at any time."""
    names = set()
    for minus, term, found in terms:
        if when and term.startswith(DYNAMIC):
            blocks = chosen_blocks(term, n_layer, seed, when)
            found = {n for n in found if not (m := BLOCK.search(n)) or int(m[1]) in blocks}
        names = names - found if minus else names | found
    return names


def resolve(model: nn.Module, policy: str, *, batches=None, seed: int = 0) -> set[str]:
    """Names, as in model.named_parameters(), that `policy` trains (at some time, if it is dynamic); ValueError if
    it is wrong. Needs no weights (meta device), unless it chooses by them. A tensor with several names goes by the
    first, which named_parameters() lists: with a tied head `embeddings` trains the head too, `head` is an error."""
    return combine(match_terms(model, policy, batches, seed, {}))


# ------------------------------------------------------------------------------- choosing by the data


def batch_gradients(model: nn.Module, names: list[str], batches):
    """For each batch (inputs, targets), both (B, T), the gradients for `names` of the mean loss over targets
    that are not -100, without dropout. The model's own flags, gradients and modes stay as they are."""
    if not batches:
        raise bad_policy("rgn:K and hybrid:SHARE choose by gradients and need batches of (inputs, targets), "
                         "as finetune.py gives them")
    leaves = {n: p.detach().requires_grad_(n in names) for n, p in model.named_parameters()}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for i, (inputs, targets) in enumerate(batches):
            logits = torch.func.functional_call(model, leaves, (inputs.to(leaves[names[0]].device),))  # (B, T, V)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.to(logits.device).flatten(), ignore_index=-100)
            if not loss.isfinite():
                raise bad_policy(f"the loss of batch {i} is {loss.item()}: is there no target?")
            yield torch.autograd.grad(loss, [leaves[name] for name in names])
    finally:
        for module, mode in modes:
            module.training = mode


def relative_gradient_norms(model: nn.Module, batches) -> list[float]:
    """For each block the mean over batches of |gradient| / |weights|, each over the block as one vector
    (Surgical Fine-Tuning, arXiv:2210.11466)."""
    norm = lambda tensors: torch.stack([t.float().norm() for t in tensors]).norm().item()
    named = dict(model.named_parameters())
    blocks = by_block(named)
    names, scores = sum(blocks, []), [0.0] * len(blocks)
    for gradients in batch_gradients(model, names, batches):
        of = dict(zip(names, gradients))
        for i, block in enumerate(blocks):
            scores[i] += norm([of[n] for n in block]) / norm([named[n].detach() for n in block]) / len(batches)
    return scores


def signal_to_noise(weight: Tensor) -> float:
    """Sum of the singular values above what noise alone would give (Marchenko-Pastur, its sigma taken from
    their interquartile range), over the sum of those below, over the largest (Spectrum, arXiv:2406.06623)."""
    s = torch.linalg.svdvals(weight.detach().float())
    low, high = torch.quantile(s, torch.tensor([0.25, 0.75], device=s.device)).tolist()
    threshold = (high - low) / 1.349 * (1 + (min(weight.shape) / max(weight.shape)) ** 0.5)
    noise = s[s <= threshold].sum().item()
    return s[s > threshold].sum().item() / noise / s[0].item() if noise else float("inf")


def spectrum_ranks(model: nn.Module) -> list[float]:
    """For each block the mean rank of its matrices by signal-to-noise, among those of the same kind: how many
    blocks a matrix exceeds. (Spectrum takes the best of each kind; here whole blocks are chosen.)"""
    named, ratios = dict(model.named_parameters()), []
    for block in by_block(named):
        for n in block:
            if not named[n].isfinite().all():
                raise bad_policy(f"spectrum:K ranks by the weights, and {n} holds NaN or inf")
        ratios.append({BLOCK.sub("", n): signal_to_noise(named[n]) for n in block if named[n].dim() == 2})
    return [sum(other[kind] < snr for kind, snr in own.items() for other in ratios) / len(own) for own in ratios]


def rank_shortfalls(model: nn.Module, batches) -> dict[str, float]:
    """For each weight W with an adapter of rank r: rho |G| / |W|, where G is W's gradient, averaged over
    batches, and rho the share of |G|^2 that no matrix of rank r can express."""
    named, rank = dict(model.named_parameters()), {}
    for name, p in named.items():
        if match := re.fullmatch(r"(.*)\.lora_A\..*", name):
            weight = match[1] + ".weight"
            rank[weight] = max(rank.get(weight, 0), len(p))
    if not rank:
        raise bad_policy("hybrid:SHARE on a model without adapters; add them with --lora-r")
    mean = [torch.zeros_like(named[n], dtype=torch.float32) for n in rank]
    for gradients in batch_gradients(model, list(rank), batches):
        for sum_, gradient in zip(mean, gradients):
            sum_ += gradient / len(batches)
    scores = {}
    for (name, r), gradient in zip(rank.items(), mean):
        s = torch.linalg.svdvals(gradient)
        rho = (s[r:].square().sum() / s.square().sum().clamp(min=1e-38)).item()
        scores[name] = rho * s.norm().item() / max(named[name].detach().float().norm().item(), 1e-38)
    return scores


def hybrid(model: nn.Module, share: str, batches) -> set[str]:
    """The adapted weights of largest `rank_shortfalls`, as many as fit into `share` of the model's parameters
    (one that does not fit is passed over), and the adapters of all the others."""
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", share) or not 0 < float(share) <= 1:
        raise bad_policy(f"'hybrid:{share}' needs a share above 0, at most 1, such as hybrid:0.1")
    scores = rank_shortfalls(model, batches)
    numel = {n: p.numel() for n, p in model.named_parameters()}
    room = float(share) * sum(size for n, size in numel.items() if not ADAPTER.search(n))
    full = set()
    for name in sorted(scores, key=lambda n: -scores[n]):
        if numel[name] <= room:
            room -= numel[name]
            full.add(name)
    if not full:
        raise bad_policy(f"no adapted matrix fits into hybrid:{share} of the parameters")
    return full | {n for n in numel if ADAPTER.search(n) and ADAPTER.split(n)[0] + "weight" not in full}


# ----------------------------------------------------------------------------------------- the proof


def whole(tensor: Tensor) -> Tensor:
    """The tensor; of one that is sharded over processes (a DTensor) all parts together, on the CPU: for that, every
    process must call this."""
    return tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor


def digest(tensor: Tensor) -> str:
    """sha256 of dtype, shape and bytes: equal for bit-identical tensors alone (NaN and -0.0 too)."""
    tensor = whole(tensor.detach()).cpu().contiguous()
    sha = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if size := tensor.numel() * tensor.element_size():
        sha.update((ctypes.c_char * size).from_address(tensor.data_ptr()))  # any dtype, no copy
    return sha.hexdigest()


def digests(named: dict[str, Tensor]) -> dict[str, str]:
    """The digest of each tensor; in two threads, because hashlib releases the GIL meanwhile."""
    if any(hasattr(tensor, "full_tensor") for tensor in named.values()):  # the same order in all processes
        return {name: digest(tensor) for name, tensor in named.items()}
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(named, pool.map(digest, named.values())))


def places(model: nn.Module) -> dict[str, tuple]:
    """What each name stands for, a tied tensor's second one too: the parameter, and where and how it lies in memory."""
    return {n: (id(p), p.data_ptr(), p.dtype, p.shape, p.stride()) for n, p in model.named_parameters(remove_duplicate=False)}


def owner(model: nn.Module, name: str) -> nn.Module:
    """The module of that name, or the nearest around it that has parameters."""
    module = model.get_submodule(name)
    return module if not name or next(module.parameters(), None) is not None else owner(model, name.rpartition(".")[0])


def has_dropout(module: nn.Module) -> bool:
    """Whether a module has dropout: one of torch's kinds, attention with a rate in `dropout`, or an adapter with one."""
    rates = [module.p] if isinstance(module, nn.modules.dropout._DropoutNd) else [getattr(module, "dropout", 0)]
    configs = getattr(module, "configs", {}) if hasattr(module, "lora_A") else {}
    rates += [config.dropout for config in configs.values()]
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


def largest_magnitude(tensor: Tensor) -> float:
    """The maximum norm, which can neither overflow nor underflow, and is NaN if a value is."""
    values = tensor.detach().coalesce().values() if tensor.is_sparse else whole(tensor.detach())
    return torch.linalg.vector_norm(values, torch.inf).item() if values.numel() else 0.0


def freeze(model: nn.Module, policy: str, *, batches=None, seed: int = 0) -> "Plan":
    """Set requires_grad to what `policy` says and nothing else, clear gradients, and record the proof. Call it when
    the model is complete: adapters added, weights loaded, on its device. A policy that is wrong is a ValueError.
    `batches`, as in `batch_gradients`, are for rgn:K and hybrid:SHARE; `seed` is for random:K and lisa:K@N."""
    return Plan(model, policy, batches, seed)


class Plan:
    """What trains, and the checks that it does. Made by `freeze`; every check raises FreezeError.

    trainable, frozen   sorted names as of now; eligible: all that train at some time
    fingerprint         sha256 over names, shapes and what trains
    changed             names seen to have changed while they trained: of a static policy, when check_unchanged has
                        passed, all that train; of a dynamic one those that had their turn
    checks, seconds     how often each check has passed; the time that the proof has taken
    scores              {term: score of each block} of rgn:K and spectrum:K
    """

    def __init__(self, model: nn.Module, policy: str, batches, seed: int):
        self.policy, self.scores, self.checks = policy, {}, Counter()
        terms = match_terms(model, policy, batches, seed, self.scores)
        start = time.perf_counter()
        self._hold(model)
        self.trainable = []
        self.eligible = sorted(combine(terms))
        dynamic = [term for _, term, _ in terms if term.startswith(DYNAMIC)]
        self._schedule = (terms, len(by_block(self.named)), seed) if dynamic else None
        self._switch(combine(*self._schedule, when=(0, 0)) if dynamic else set(self.eligible))
        resolved = [(name, list(p.shape), name in self.eligible) for name, p in sorted(self.named.items())]
        resolved += [seed, *((minus, term, sorted(found)) for minus, term, found in terms)] if dynamic else []
        self.fingerprint = hashlib.sha256(json.dumps(resolved).encode()).hexdigest()
        self._digests = digests(self.named)
        self._buffers = digests(self._constants(model))
        # Steps done; under a dynamic policy, in how many a parameter has trained since it was last seen to change.
        self._step, self._steps = 0, dict.fromkeys(self.eligible, 0) if dynamic else {}
        self._idle = set()  # had time to change, was frozen again, and had not changed
        self.changed = set()
        self._alive = set()  # trainables whose gradient was seen to be non-zero
        self.seconds = time.perf_counter() - start

    def rebind(self, model: nn.Module) -> None:
        """Go on with the tensors that fully_shard has put in the place of the model's: they must hold the same values."""
        with self._passing("rebind"):
            self._hold(model)
            now = digests(self.named)
            refuse((n for n in now.keys() | self._digests if now.get(n) != self._digests.get(n)), "changed by sharding")

    def parameters(self) -> list[nn.Parameter]:
        """Exactly what the optimizer should be given, in the model's order."""
        eligible = set(self.eligible)  # asked in every step
        return [p for name, p in self.named.items() if name in eligible]

    def due(self, epoch: int, step: int) -> set[str]:
        """The names that train after so many epochs and optimizer steps: always the same, unless the policy is dynamic."""
        return combine(*self._schedule, when=(epoch, step)) if self._schedule else set(self.trainable)

    def advance(self, epoch: int, step: int) -> bool:
        """Before the forward pass of each step, with the epochs and optimizer steps done: switch to the set that is due
        (by these and the seed alone). True if it changed: then call `drop_frozen_state` and `set_modes`. What ceases to
        be frozen must not have changed; what is frozen again must have, which `check_unchanged` asks later."""
        self._train_for(step - self._step)
        self._step = step
        due = self.due(epoch, step)
        thawed, switched = due - set(self.trainable), due ^ set(self.trainable)
        if not switched:
            return False
        with self._passing("advance"):
            now = digests({n: self.named[n] for n in sorted(switched)})
            same = {n for n in switched if now[n] == self._digests[n]}
            refuse(thawed - same, "frozen, but changed")
            self._idle |= {n for n in same - thawed if self._had_time(n)}
            changed = switched - thawed - same
            self.changed |= changed
            self._digests |= now
            self._steps |= dict.fromkeys(changed, 0)
            self._switch(due)
        return True

    def skip(self) -> None:
        """The step that `advance` began moved nothing: what trains has had one step less in which to change."""
        self._train_for(-1)

    def drop_frozen_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Free the optimizer's state of what is frozen now; it starts anew when it trains again."""
        for p in [self.named[n] for n in self.frozen]:
            optimizer.state.pop(p, None)

    def set_modes(self, model: nn.Module) -> None:
        """After model.train(): wholly frozen parts back to eval, so that nothing drops out in them."""
        for _, module, rests in self._parts(model):
            module.train(model.training and not rests)

    def check_model(self, model: nn.Module) -> None:
        """The model is the one that was frozen: the same parameters over the same memory, requires_grad as
        the policy says, frozen modules' buffers unchanged and, where there is dropout, frozen blocks in eval mode."""
        with self._passing("check_model"):
            self._check_objects(model)
            refuse((n for n in self.frozen if self.named[n].requires_grad),
                   f"frozen under {self.policy!r}, but requires_grad is True")
            refuse((n for n in self.trainable if not self.named[n].requires_grad),
                   f"trained under {self.policy!r}, but requires_grad is False")
            self._check_buffers(model)
            if any(has_dropout(module) for module in model.modules()):
                active = [n for n, part, rests in self._parts(model) if rests and any(m.training for m in part.modules())]
                refuse(active, "frozen, but in train mode (call plan.set_modes(model) after model.train())")

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer holds the eligible parameters, each once, and nothing else. Its state is for what
        trains now, and at most AdamW's: two moments and a step count for each."""
        with self._passing("check_optimizer"):
            names = {id(p): name for name, p in self.named.items()}
            name_of = lambda p: names.get(id(p), f"a tensor of shape {tuple(p.shape)} not in the model")
            held = Counter(name_of(p) for group in optimizer.param_groups for p in group["params"])
            refuse(held.keys() - set(self.eligible), "the optimizer holds what is frozen; give it plan.parameters()")
            refuse((n for n in held if held[n] > 1), "the optimizer holds more than once")
            refuse(set(self.eligible) - held.keys(), "the optimizer lacks what should train")
            moments = 3 if any(group.get("amsgrad") for group in optimizer.param_groups) else 2
            for p, state in optimizer.state.items():
                size = sum(s.numel() * s.element_size() for s in state.values() if isinstance(s, Tensor))
                bound = moments * p.numel() * p.element_size() + 8 if name_of(p) in self.trainable else 0
                refuse([name_of(p)] * (size > bound), f"the optimizer's state is {size} bytes, expected <= {bound}")

    def check_gradients(self, model: nn.Module, step: int) -> None:
        """After backward, `step` from 1. Frozen: no gradient, not even zeros, to which an optimizer would still
        apply decay and momentum. Trained: a finite one, non-zero by step 2 (in step 1 LoRA's A has none, for B is
        zero: count from the first step with a rate above zero). Only whole tensors are asked: an embedding has unused
        rows."""
        with self._passing("check_gradients"):
            self._check_objects(model)
            refuse((n for n in self.frozen if self.named[n].grad is not None),
                   "frozen, but with a gradient where None belongs")
            grads = {n: self.named[n].grad for n in self.trainable if self.named[n].numel()}
            refuse((n for n in grads if grads[n] is None), "should train, but has no gradient")
            largest = {n: largest_magnitude(g) for n, g in grads.items()}
            refuse((n for n in grads if not largest[n] < torch.inf), "the gradient is not finite")
            self._alive |= {n for n in grads if largest[n] > 0}
            if step >= 2:
                refuse(grads.keys() - self._alive, f"should train, but the gradient is zero up to step {step}")

    def check_unchanged(self, model: nn.Module, trained: bool = True) -> None:
        """Frozen tensors are bit-identical to what they were when they were frozen, frozen modules' buffers too, and every
        trainable one has changed (trained=False: not asked, after fewer than two steps with a rate above zero)."""
        with self._passing("check_unchanged"):
            self._check_objects(model)
            self._check_buffers(model)
            now = digests(self.named if trained else {n: self.named[n] for n in self.frozen})
            same = {n for n in now if now[n] == self._digests[n]}
            refuse(set(self.frozen) - same, "frozen, but changed")
            if trained:
                idle = {n for n in same & set(self.trainable) if self._had_time(n, 1)}  # the step that advance began
                refuse(idle | self._idle, "should have trained, but did not change")
                self.changed |= set(self.trainable) - same

    @property
    def proof(self) -> dict:
        """For `resume`, JSON-able: the digest of each tensor is from when it was last frozen or unfrozen."""
        return {"policy": self.policy, "fingerprint": self.fingerprint, "trainable": list(self.trainable),
                "digests": dict(self._digests), "step": self._step, "steps": dict(self._steps), "idle": sorted(self._idle),
                "changed": sorted(self.changed), "buffers": self._buffers}

    def resume(self, model: nn.Module, proof: dict) -> None:
        """Go on with the `proof` of an interrupted run, whose weights `model` now has: the policy must be the same,
        and what is frozen must be what that run began with."""
        with self._passing("resume"):
            if proof["fingerprint"] != self.fingerprint:
                raise FreezeError(f"the checkpoint trained {proof['policy']!r}, which on this model is not "
                                  f"{self.policy!r}: other names, shapes or trainables")
            self._digests, self._steps, self._buffers = dict(proof["digests"]), dict(proof["steps"]), proof["buffers"]
            self._step, self._idle, self.changed = proof["step"], set(proof["idle"]), set(proof["changed"])
            if self._schedule:
                self._switch(set(proof["trainable"]))
                self.set_modes(model)
        self.check_model(model)
        self.check_unchanged(model, trained=False)

    def summary(self) -> str:
        """What trains, in parameters and bytes, and which tensors have two names."""
        count = lambda names: sum(self.named[n].numel() for n in names)
        megabytes = lambda names: sum(self.named[n].numel() * self.named[n].element_size() for n in names) / 1e6
        trains, total = count(self.trainable), count(self.named)
        weights, trained = megabytes(self.named), megabytes(self.trainable)
        lines = [f"{self.policy}: trains {trains:,} of {total:,} parameters ({trains / total:.2%}), "
                 f"{len(self.trainable)} of {len(self.named)} tensors",
                 f"memory: weights {weights:,.1f} MB, gradients {trained:,.1f} MB, "
                 f"AdamW state {2 * trained:,.1f} MB (all: {weights:,.1f} and {2 * weights:,.1f})"]
        if self._schedule:
            lines.append(f"dynamic: these figures are of now; {count(self.eligible):,} parameters train at some time")
        for term, values in self.scores.items():
            lines.append(f"{term}: the blocks score " + ", ".join(f"{value:.3g}" for value in values))
        for group in self._shared:
            fate = "train" if set(group) & set(self.trainable) else "are frozen"
            lines.append(f"{' and '.join(group)} share their memory: they {fate} together")
        return "\n".join(lines)

    def _hold(self, model: nn.Module) -> None:
        """Note each name, a tied tensor's second one too, with the object and the address it stands for."""
        self.named = dict(model.named_parameters())
        self._places = places(model)
        self._shared = shared_memory(model)

    def _switch(self, trainable: set[str]) -> None:
        """Let exactly these train; the gradients of others are cleared, because optimizers skip None, but not zeros."""
        stays = trainable & set(self.trainable)
        self.trainable, self.frozen = sorted(trainable), sorted(self.named.keys() - trainable)
        for name, p in self.named.items():
            p.requires_grad_(name in trainable)
            p.grad = p.grad if name in stays else None

    def _train_for(self, steps: int) -> None:
        """Under a dynamic policy, count so many more steps for what trains now."""
        if self._schedule:
            self._steps |= {n: self._steps[n] + steps for n in self.trainable}

    def _had_time(self, name: str, more: int = 0) -> bool:
        """Whether a parameter has had time to change: not if it is empty, or has trained for a single step, whose rate
        may have been zero. `more`: steps that are not counted yet."""
        return self.named[name].numel() > 0 and (not self._schedule or self._steps[name] + more >= 2)

    @contextmanager
    def _passing(self, check: str):
        """Time a check, and count it if it ends without an error."""
        start = time.perf_counter()
        try:
            yield
            self.checks[check] += 1
        finally:
            self.seconds += time.perf_counter() - start

    def _check_objects(self, model: nn.Module) -> None:
        """Every name stands for the parameter, over the memory, for which it stood at freezing."""
        now = places(model)
        refuse(self._places.keys() - now.keys(), "no longer in the model")
        refuse(now.keys() - self._places.keys(), "not in the model at freezing")
        refuse((n for n in now if now[n] != self._places[n]), "replaced since freezing")

    def _check_buffers(self, model: nn.Module) -> None:
        """Buffers hold what they did, but for those of modules that train."""
        now, then = digests(self._constants(model)), self._buffers
        refuse((n for n in now | then if now.get(n) != then.get(n)), "buffers changed since freezing")

    def _constants(self, model: nn.Module) -> dict[str, Tensor]:
        """The buffers but those of modules with a parameter that trains at some time: these may keep statistics."""
        module_of = lambda name: name.rpartition(".")[0].partition(".parametrizations.")[0]
        training = set(map(module_of, self.eligible))
        return {name: buffer for name, buffer in model.named_buffers() if module_of(name) not in training}

    def _parts(self, model: nn.Module):
        """(name, module, rests?) of each block, and of each module with dropout outside the blocks. What belongs to no
        trainable parameter rests; what drops the embeddings' output rests with them. So what lies below the lowest
        trainable parameter is a fixed function of its input."""
        embeddings = any(re.search(KINDS["embeddings"], n) for n in self.trainable)
        for name, module in model.named_modules():
            block = BLOCK.search(name + ".")
            if block and block.end() > len(name):
                yield name, module, not any(p.requires_grad for p in module.parameters())
            elif not block and (isinstance(module, nn.Dropout) or has_dropout(module)):
                part = owner(model, name)
                trains = embeddings if hasattr(part, "wte") else any(p.requires_grad for p in part.parameters())
                yield name, module, not trains


# ---------------------------------------------------------------------------------------- the script


def table(plan: Plan) -> str:
    """A line for each block and each module outside, a letter for each tensor: w(eight), b(ias) or an
    adapter's A and B where it trains, - where it is frozen."""
    rows, widths = {}, {}
    for name, p in plan.named.items():
        path, leaf = re.fullmatch(r"(.*?)\.?(lora_.*|[^.]+)", name).groups()
        block, trains = BLOCK.search(path + "."), name in plan.trainable
        unit = path[: block.end() - 1] if block else path
        row, module = rows.setdefault(unit, {"trainable": 0}), path[len(unit) + 1:]
        row["trainable"] += p.numel() * trains
        row[module] = row.get(module, "") + (leaf.removeprefix("lora_")[0] if trains else "-")
        widths[module] = max(len(module), len(row[module]), widths.get(module, 0))
    left = max(map(len, rows))
    lines = [f"{'':{left}}{'trainable':>14}  " + "  ".join(f"{m:{w}}" for m, w in widths.items())]
    for unit, row in rows.items():
        cells = "  ".join(f"{row.get(m, ''):{w}}" for m, w in widths.items())
        lines.append(f"{unit:{left}}{row['trainable']:14,}  {cells}".rstrip())
    return "\n".join(lines)


def parse_args(argv=None):
    """Command line of `python freeze.py`."""
    parser = argparse.ArgumentParser(description="Print what a freeze policy trains, with counts and memory.")
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    parser.add_argument("--model", default="tiny", help="a model folder or a name (default: tiny)")
    parser.add_argument("--trainable", help=f"terms joined by commas, a leading - takes away: {TERMS} (default: all; lora "
                        "with --lora-r; rgn:K and hybrid:SHARE choose by the data, which finetune.py alone has)")
    parser.add_argument("--lora-r", type=int, help="rank of adapters to add first")
    parser.add_argument("--untie-head", action="store_true", help="give the head its own copy of the embedding")
    args = parser.parse_args(argv)
    if not args.model:  # from a shell variable that was never set; a path would take it for the working directory
        parser.error("--model: must not be empty")
    return args


def main(argv=None) -> int:
    """Print what the policy does to the model; returns the exit code: 1 for the model, 2 for the policy."""
    args = parse_args(argv)
    from gpt import GPT
    from lora import add_lora

    code = 1
    try:
        model = GPT.from_pretrained(args.model)
        code = 2
        if args.untie_head:
            if not model.config.tie_word_embeddings:
                raise ValueError(f"--untie-head: the head of {args.model} has weights of its own already; leave the flag out")
            model = GPT.from_pretrained(args.model, tie_word_embeddings=False)
        if args.lora_r is not None:
            if args.lora_r > model.config.n_embd:
                raise ValueError(f"--lora-r {args.lora_r}: above the model's width of {model.config.n_embd}")
            add_lora(model, r=args.lora_r)
        if args.trainable is None:
            args.trainable = "all" if args.lora_r is None else "lora"
        plan = freeze(model, args.trainable)
        if args.lora_r is not None and not any(map(ADAPTER.search, plan.eligible)):
            raise ValueError(f"--lora-r {args.lora_r}: no adapter trains under --trainable {args.trainable}; add lora to it")
        code = 1
        print(table(plan), plan.summary(), sep="\n\n", flush=True)
    except BrokenPipeError:  # `| head` has seen enough; at exit Python would flush into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    if sys.stdout:  # None when closed (>&-)
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
