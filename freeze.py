"""Which parameters of a GPT-2 train, and the proof that these and no others did.

`freeze(model, policy)` turns a policy such as "last_two_blocks" or "lora,norms" into an exact set of
parameter names, or raises: a term that matches nothing is an error, never a default. The `Plan` it
returns keeps a sha256 of every tensor and checks, whenever asked, that the model, its optimizer, its
gradients and at last its bytes are what the policy says. Every check has been seen to catch planted
violations, under `python -O` too (tests/test_freeze.py).

    plan = freeze(model, "last_two_blocks")                     # the model is complete and on its device
    optimizer = torch.optim.AdamW(plan.parameters(), lr=5e-5)
    plan.check_model(model); plan.check_optimizer(optimizer)    # before training
    loss.backward(); plan.check_gradients(model, step)          # in steps 1 and 2
    plan.check_unchanged(model)                                 # at the end

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
BLOCK_TERM = re.compile("(last|first|blocks|random|rgn|spectrum|gradual|lisa):")
DYNAMIC = re.compile("(gradual|lisa):")
BLOCK = re.compile(r"(?:^|\.)h\.(\d+)\.")
ADAPTER = re.compile(r"(?:^|\.)lora_")
KINDS = {
    "embeddings": re.compile(r"(?:^|\.)wte\.|(?:^|\.)wpe\."),
    "head": re.compile(r"(?:^|\.)lm_head\."),
    "last_layer": re.compile(r"(?:^|\.)lm_head\."),
    "norms": re.compile(r"(?:^|\.)ln_\w+\."),
    "biases": re.compile(r"(?:^|\.)bias$"),
}
FINAL_NORM = re.compile(r"(?:^|\.)ln_f\.")


class FreezeError(RuntimeError):
    """The proof is broken: what trains, or what has changed, is not what the policy says."""


def refuse(wrong, what: str) -> None:
    """Raise FreezeError if there are `wrong` names, with the first five of them."""
    if names := sorted(wrong):
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise FreezeError(f"{what}: {', '.join(names[:5])}{more}")


# ------------------------------------------------------------------------------- from policy to names


def parse_policy(policy: str) -> list[tuple[bool, str]]:
    """(takes away?, term) in order: "all,-blocks:0-1,3" is [(False, "all"), (True, "blocks:0-1,3")]."""
    terms = []
    for text in (part.strip() for part in policy.split(",")):
        if terms and terms[-1][1].startswith("blocks:") and re.fullmatch(r"\d+(-\d+)?", text):
            terms[-1] = (terms[-1][0], f"{terms[-1][1]},{text}")
        else:
            terms.append((text.startswith("-"), text.removeprefix("-").strip()))
    return terms


def chosen_blocks(term: str, n_layer: int, seed: int = 0, when=None, scores=None) -> set[int]:
    """The blocks that a term names in a model of `n_layer`. For gradual:K and lisa:K@N those that train at
    when = (epochs, steps) done, or if that is None at any time; rgn:K and spectrum:K take the K highest of
    scores(), one for each block. What is drawn depends on `seed` and `when` alone."""
    word, _, argument = term.partition(":")
    if word == "blocks":
        ranges = [re.fullmatch(r"(\d+)(?:-(\d+))?", part) for part in argument.split(",")]
        ranges = [(int(m[1]), int(m[2] or m[1])) if m else (1, 0) for m in ranges]
        if any(low > high for low, high in ranges):
            raise ValueError(f"freeze policy: {term!r} is not a list of blocks such as blocks:0-3,7")
        if max(high for _, high in ranges) >= n_layer:
            raise ValueError(f"freeze policy: {term!r}, but the model's {n_layer} blocks are 0 to {n_layer - 1}")
        return {i for low, high in ranges for i in range(low, high + 1)}
    count, at, period = argument.partition("@")
    if not re.fullmatch(r"\d+", count) or not 1 <= int(count) <= n_layer:
        raise ValueError(f"freeze policy: {term!r} needs a number of blocks from 1 to the model's {n_layer}")
    if bool(at) != (word == "lisa") or (at and not re.fullmatch(r"0*[1-9]\d*", period)):
        raise ValueError(f"freeze policy: {term!r} is not of the form {word}:K{'@N' * (word == 'lisa')}")
    k, every = int(count), range(n_layer)
    if word == "random":
        return set(random.Random(f"random {seed}").sample(every, k))
    if word == "lisa":
        return set(random.Random(f"lisa {seed} {when[1] // int(period)}").sample(every, k) if when else every)
    if word == "gradual":
        return set(every[-min(n_layer, k + when[0]):] if when else every)
    if scores:
        values = scores()
        return set(sorted(every, key=lambda i: -values[i])[:k])
    return set(every[:k] if word == "first" else every[-k:])


def by_block(names) -> list[list[str]]:
    """The names of each block's own parameters, adapters left out."""
    blocks = []
    for name in names:
        if (match := BLOCK.search(name)) and not ADAPTER.search(name):
            blocks += [[] for _ in range(len(blocks), int(match[1]) + 1)]
            blocks[int(match[1])].append(name)
    return blocks


def matching(model: nn.Module, term: str, names: list[str], batches=None, seed: int = 0, scores=None) -> set[str]:
    """Those of `names` that one term matches at any time. Adapters are matched by `all`, `lora`, `hybrid`
    and patterns alone, so that `lora,last_block` is every adapter and the last block's own weights. The
    final norm goes with every choice of blocks but first:K, blocks: and lisa:K@N. The scores of its blocks, by
    which rgn:K or spectrum:K chooses, are put into the dict `scores` under the term."""
    base = [n for n in names if not ADAPTER.search(n)]
    term = {"last_block": "last:1", "last_two_blocks": "last:2"}.get(term, term)
    word, _, argument = term.partition(":")
    if "*" in term:
        found = {n for n in names if fnmatchcase(n, term)}
    elif term == "all":
        found = set(names)
    elif term == "lora":
        found = set(names) - set(base)
    elif term in KINDS:
        found = {n for n in base if KINDS[term].search(n)}
        if term == "norms":  # by GPT-2's names or by type
            module_of = lambda name: model.get_submodule(name.rpartition(".")[0])
            found |= {n for n in base if isinstance(module_of(n), (nn.LayerNorm, nn.RMSNorm))}
    elif BLOCK_TERM.match(term):
        blocks, kept = by_block(names), {} if scores is None else scores
        score = {"rgn": lambda: kept.setdefault(term, relative_gradient_norms(model, batches)),
                 "spectrum": lambda: kept.setdefault(term, spectrum_ranks(model))}.get(word)
        found = {n for i in chosen_blocks(term, len(blocks), seed, scores=score) for n in blocks[i]}
        if word not in ("first", "blocks", "lisa"):
            found |= {n for n in base if FINAL_NORM.search(n)}
    elif word == "hybrid" and term != word:
        found = hybrid(model, argument, batches)
    else:
        hint = " (a parameter's name needs a *)" if term in names else ""
        raise ValueError(f"freeze policy: unknown term {term!r}{hint}; known are {TERMS}")
    if not found:
        there = sorted({BLOCK.sub(".h.*.", n).lstrip(".") for n in names})
        remedy = "add adapters with --lora-r" if term == "lora" else "there are " + ", ".join(there)
        raise ValueError(f"freeze policy: {term!r} matches no parameter; {remedy}")
    return found


def shared_memory(model: nn.Module) -> list[list[str]]:
    """Groups of parameter names over the same memory: one tensor with two names, or overlapping views."""
    extents = []
    for order, (name, p) in enumerate(model.named_parameters(remove_duplicate=False)):
        start, size = p.data_ptr(), p.element_size()
        size *= 1 + sum((n - 1) * stride for n, stride in zip(p.shape, p.stride()))
        if start == 0 or p.numel() == 0:  # on the meta device, or empty: only the object can be shared
            start, size = id(p), 1
        extents.append((str(p.device), start, order, start + size, name))
    groups, reach = [], ("", 0)
    for device, start, _, end, name in sorted(extents):
        if (device, start) < reach and device == reach[0]:
            groups[-1].append(name)
            end = max(end, reach[1])
        else:
            groups.append([name])
        reach = (device, end)
    return [group for group in groups if len(group) > 1]


def match_terms(model: nn.Module, policy: str, batches=None, seed: int = 0, scores=None) -> list[tuple[bool, str, set[str]]]:
    """(takes away?, term, names it matches at any time) in order; ValueError as in `resolve`."""
    named = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in reversed(named.items())}
    untie = "or give it memory of its own (a tied head: --untie-head)"
    terms, trainable = [], set()
    for i, (minus, term) in enumerate(parse_policy(policy)):
        if term == "none":
            if i or minus:
                raise ValueError(f"freeze policy: 'none' in {policy!r} can only come first")
            continue
        found = matching(model, term, list(named), batches, seed, scores)
        for name in sorted(found):
            if (listed := first[id(named[name])]) not in found:
                raise ValueError(f"freeze policy: {term!r} is {name}, the same tensor as {listed}: "
                                 f"name that one for both, {untie}")
        found &= set(first.values())
        if minus and not found & trainable:
            raise ValueError(f"freeze policy: -{term} in {policy!r} takes nothing away from what stands before "
                             "it; to train all but something, begin with all")
        if minus and DYNAMIC.match(term):
            raise ValueError(f"freeze policy: -{term}: what changes as training goes on cannot be taken away")
        terms.append((minus, term, found))
        trainable = trainable - found if minus else trainable | found
    static = [t for t in terms if not DYNAMIC.match(t[1])]
    if 0 < len(static) < len(terms) and combine(static) == trainable:
        raise ValueError(f"freeze policy: {policy!r} never changes, for the other terms train all its blocks")
    for group in shared_memory(model):
        if 0 < sum(first[id(named[name])] in trainable for name in group) < len(group):
            raise ValueError(f"freeze policy: {policy!r} trains only a part of {', '.join(group)}, which share "
                             f"memory: name all, {untie}")
    return terms


def combine(terms: list[tuple[bool, str, set[str]]], n_layer: int = 0, seed: int = 0, when=None) -> set[str]:
    """The names that matched terms train at when = (epochs, steps) done; if that is None, at any time.
    ValueError if there are none."""
    names = set()
    for minus, term, found in terms:
        if when and DYNAMIC.match(term):
            blocks = chosen_blocks(term, n_layer, seed, when)
            found = {n for n in found if not (m := BLOCK.search(n)) or int(m[1]) in blocks}
        names = names - found if minus else names | found
    if not names:
        raise ValueError("freeze policy: it trains nothing" + (f" after {when[1]} steps" if when else ""))
    return names


def resolve(model: nn.Module, policy: str, *, batches=None, seed: int = 0) -> set[str]:
    """Names, as in model.named_parameters(), that `policy` trains (at some time, if it is dynamic). Needs
    no weights (meta device), unless it chooses by them.

    Terms are taken from left to right. A tensor with several names goes by the first, which is the one
    that named_parameters() lists: with a tied head `embeddings` trains the head too, and `head` is a
    ValueError, as is a policy under which parameters over the same memory would differ. Also a
    ValueError: an unknown term, one that matches nothing or takes nothing away, an empty result.
    """
    return combine(match_terms(model, policy, batches, seed))


# ------------------------------------------------------------------------------- choosing by the data


def batch_gradients(model: nn.Module, names: list[str], batches):
    """For each batch (inputs, targets), both (B, T), the gradients for `names` of the mean loss over targets
    that are not -100, without dropout. Modes and flags of the model are put back afterwards."""
    if not batches:
        raise ValueError("freeze policy: rgn:K and hybrid:SHARE choose by gradients and need batches of "
                         "(inputs, targets), as finetune.py gives them")
    modes, flags = [(m, m.training) for m in model.modules()], [(p, p.requires_grad) for p in model.parameters()]
    named = dict(model.named_parameters())
    model.eval().requires_grad_(False)
    try:
        for name in names:
            named[name].requires_grad_(True)
        for i, (inputs, targets) in enumerate(batches):
            device = named[names[0]].device
            logits = model(inputs.to(device)).flatten(0, 1).float()  # (B * T, V)
            loss = F.cross_entropy(logits, targets.to(device).flatten(), ignore_index=-100)
            if not loss.isfinite():
                raise ValueError(f"freeze policy: the loss of batch {i} is {loss.item()}: is there no target?")
            yield torch.autograd.grad(loss, [named[name] for name in names])
    finally:
        for module, mode in modes:
            module.training = mode
        for p, flag in flags:
            p.requires_grad_(flag)


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
    named, noise = dict(model.named_parameters()), []
    for block in by_block(named):
        for n in block:
            if not named[n].isfinite().all():
                raise ValueError(f"freeze policy: spectrum:K ranks by the weights, and {n} holds NaN or inf")
        noise.append({BLOCK.sub("", n): signal_to_noise(named[n]) for n in block if named[n].dim() == 2})
    above = lambda kind, snr: sum(other[kind] < snr for other in noise)
    return [sum(above(kind, snr) for kind, snr in own.items()) / len(own) for own in noise]


def rank_shortfalls(model: nn.Module, batches) -> dict[str, float]:
    """For each weight W with an adapter of rank r: rho |G| / |W|, where G is W's gradient, averaged over
    batches, and rho the share of |G|^2 that no matrix of rank r can express."""
    named = dict(model.named_parameters())
    rank = {}
    for name, p in named.items():
        if match := re.fullmatch(r"(.*)\.lora_A\..*", name):
            weight = match[1] + ".weight"
            rank[weight] = max(rank.get(weight, 0), len(p))
    if not rank:
        raise ValueError("freeze policy: hybrid:SHARE on a model without adapters; add them with --lora-r")
    total = [torch.zeros_like(named[n], dtype=torch.float32) for n in rank]
    for gradients in batch_gradients(model, list(rank), batches):
        for sum_, gradient in zip(total, gradients):
            sum_ += gradient
    scores = {}
    for (name, r), gradient in zip(rank.items(), total):
        s = torch.linalg.svdvals(gradient / len(batches))
        rho = (s[r:].square().sum() / s.square().sum().clamp(min=1e-38)).item()
        scores[name] = rho * s.norm().item() / max(named[name].detach().float().norm().item(), 1e-38)
    return scores


def hybrid(model: nn.Module, share: str, batches) -> set[str]:
    """The adapted weights of largest `rank_shortfalls`, as many as fit into `share` of the model's parameters
    (one that does not fit is passed over), and the adapters of all the others."""
    if not re.fullmatch(r"\d*\.?\d+", share) or not 0 < float(share) <= 1:
        raise ValueError(f"freeze policy: 'hybrid:{share}' needs a share above 0, at most 1, such as hybrid:0.1")
    scores = rank_shortfalls(model, batches)
    numel = {n: p.numel() for n, p in model.named_parameters()}
    room = float(share) * sum(size for n, size in numel.items() if not ADAPTER.search(n))
    full = set()
    for name in sorted(scores, key=lambda n: -scores[n]):
        if numel[name] <= room:
            room -= numel[name]
            full.add(name)
    if not full:
        raise ValueError(f"freeze policy: no adapted matrix fits into hybrid:{share} of the parameters")
    return full | {n for n in numel if ADAPTER.search(n) and ADAPTER.split(n)[0] + ".weight" not in full}


# ----------------------------------------------------------------------------------------- the proof


def digest(tensor: Tensor) -> str:
    """sha256 of dtype, shape and bytes: equal for bit-identical tensors alone (NaN and -0.0 too)."""
    tensor = tensor.detach().cpu().contiguous()
    sha = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if size := tensor.numel() * tensor.element_size():
        sha.update((ctypes.c_char * size).from_address(tensor.data_ptr()))  # any dtype, no copy
    return sha.hexdigest()


def digests(named: dict[str, Tensor]) -> dict[str, str]:
    """The digest of each tensor; in two threads, for hashlib lets go of the interpreter meanwhile."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(named, pool.map(digest, named.values())))


def freeze(model: nn.Module, policy: str, *, batches=None, seed: int = 0) -> "Plan":
    """Set requires_grad to what `policy` says and nothing else, clear gradients, and record the proof.

    Call it when the model is complete: adapters added, weights loaded, on its device. A policy that is
    wrong is a ValueError. `batches`, a list of (inputs, targets) as in `batch_gradients`, are for rgn:K and
    hybrid:SHARE; `seed` is for random:K and lisa:K@N.
    """
    scores = {}
    return Plan(model, policy, match_terms(model, policy, batches, seed, scores), seed, scores)


class Plan:
    """What trains, and the checks that it does. Made by `freeze`; every check raises FreezeError.

    trainable, frozen   sorted names as of now; eligible: all that train at some time
    fingerprint         sha256 over names, shapes and what trains
    checks, seconds     how often each check has passed; the time that the proof has taken
    scores              {term: score of each block} of rgn:K and spectrum:K
    """

    def __init__(self, model: nn.Module, policy: str, terms: list[tuple[bool, str, set[str]]], seed: int, scores: dict):
        start = time.perf_counter()
        self.policy, self.checks, self.scores = policy, {}, scores
        self.named = dict(model.named_parameters())
        eligible = combine(terms)
        self.eligible = sorted(eligible)
        dynamic = [term for _, term, _ in terms if DYNAMIC.match(term)]
        self._schedule = (terms, len(by_block(self.named)), seed) if dynamic else None
        self._step, self._since = 0, {}  # steps done; those done when a parameter was last unfrozen
        self._idle = set()  # trained for a while, frozen again, and not changed in between
        self._switch(combine(*self._schedule, when=(0, 0)) if dynamic else eligible)
        resolved = [(name, list(p.shape), name in eligible) for name, p in sorted(self.named.items())]
        if dynamic:
            resolved.append((*dynamic, seed))
        self.fingerprint = hashlib.sha256(json.dumps(resolved).encode()).hexdigest()
        # Each name, a tied tensor's second one too, with the object and the address it stands for.
        self._objects = {n: (p, p.data_ptr()) for n, p in model.named_parameters(remove_duplicate=False)}
        self._shared = shared_memory(model)
        self._digests = digests(self.named)
        self._buffers = digests(dict(model.named_buffers()))
        self._alive = set()  # trainables whose gradient was seen to be non-zero
        self.seconds = time.perf_counter() - start

    def parameters(self) -> list[nn.Parameter]:
        """Exactly what the optimizer should be given, in the model's order."""
        eligible = set(self.eligible)
        return [p for name, p in self.named.items() if name in eligible]

    def advance(self, epoch: int, step: int) -> bool:
        """Call it before each step, with the epochs and optimizer steps done. Switch to the set that is due
        (it depends on these and the seed alone); True if it changed: then call `drop_frozen_state` and
        `set_modes`. What ceases to be frozen must not have changed; what is frozen again must have, which
        `check_unchanged` asks later. A static policy never switches."""
        self._step = step
        due = set(self.trainable) if self._schedule is None else combine(*self._schedule, when=(epoch, step))
        thawed, chilled = due - set(self.trainable), set(self.trainable) - due
        if not thawed and not chilled:
            return False
        with self._passing("advance"):
            now = digests({n: self.named[n] for n in sorted(thawed | chilled)})
            refuse((n for n in thawed if now[n] != self._digests[n]), "frozen, but changed")
            self._idle |= {n for n in chilled if now[n] == self._digests[n] and self._had_time(n, step)}
            self._digests.update(now)
            self._since.update(dict.fromkeys(thawed, step))
            self._switch(due)
        return True

    def drop_frozen_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Free the optimizer's state of what is frozen now; it starts anew when it trains again."""
        kept = {id(self.named[n]) for n in self.trainable}
        for p in [p for p in optimizer.state if id(p) not in kept]:
            del optimizer.state[p]

    def set_modes(self, model: nn.Module) -> None:
        """After model.train(): wholly frozen parts back to eval, so that nothing drops out in them."""
        for _, module, rests in self._parts(model):
            module.train(model.training and not rests)

    def check_model(self, model: nn.Module) -> None:
        """The model is the one that was frozen: the same parameters over the same memory, requires_grad as
        the policy says, buffers unchanged and, where there is dropout, frozen blocks in eval mode."""
        with self._passing("check_model"):
            self._check_objects(model)
            refuse((n for n in self.frozen if self.named[n].requires_grad),
                   f"frozen under {self.policy!r}, but requires_grad is True")
            refuse((n for n in self.trainable if not self.named[n].requires_grad),
                   f"trained under {self.policy!r}, but requires_grad is False")
            now, then = shared_memory(model), self._shared
            refuse((" and ".join(group) for group in now + then if group not in now or group not in then),
                   "memory became shared, or ceased to be, since freezing")
            now, then = digests(dict(model.named_buffers())), self._buffers
            refuse((n for n in now | then if now.get(n) != then.get(n)), "buffers changed since freezing")
            if any(drops(module) for module in model.modules()):
                refuse((name for name, module, rests in self._parts(model)
                        if rests and any(m.training for m in module.modules())),
                       "frozen, but in train mode (call plan.set_modes(model) after model.train())")

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
        """After backward, `step` from 1. Frozen: no gradient, not even zeros, to which an optimizer would
        still apply decay and momentum. Trained: a finite one, non-zero by step 2 (in step 1 LoRA's A
        has none, for B is zero). Only whole tensors are asked: an embedding has unused rows."""
        with self._passing("check_gradients"):
            self._check_objects(model)
            refuse((n for n in self.frozen if self.named[n].grad is not None),
                   "frozen, but with a gradient where None belongs")
            grads = {n: self.named[n].grad for n in self.trainable if self.named[n].numel()}
            refuse((n for n in grads if grads[n] is None), "should train, but has no gradient")
            # The largest magnitude can neither overflow nor underflow, and NaN stays NaN in it.
            largest = [torch.linalg.vector_norm(g, torch.inf).float() for g in grads.values()]
            largest = dict(zip(grads, torch.stack(largest).tolist()))
            refuse((n for n in grads if not largest[n] < torch.inf), "the gradient is not finite")
            self._alive |= {n for n in grads if largest[n] > 0}
            if step >= 2:
                refuse(grads.keys() - self._alive, f"should train, but the gradient is zero up to step {step}")

    def check_unchanged(self, model: nn.Module, trained: bool = True) -> None:
        """Frozen tensors are bit-identical to what they were when they were frozen, and every trainable one
        has changed (trained=False: not asked, after fewer than two steps with a rate above zero)."""
        with self._passing("check_unchanged"):
            self._check_objects(model)
            now = digests(self.named if trained else {n: self.named[n] for n in self.frozen})
            refuse((n for n in self.frozen if now[n] != self._digests[n]), "frozen, but changed")
            if trained:
                idle = {n for n in self.trainable if now[n] == self._digests[n] and self._had_time(n, self._step + 1)}
                refuse(idle | self._idle, "should have trained, but did not change")

    @property
    def proof(self) -> dict:
        """What a checkpoint keeps for `resume`: JSON-able, with the digest of each tensor from when it was
        last frozen or unfrozen."""
        return {"policy": self.policy, "fingerprint": self.fingerprint, "digests": dict(self._digests),
                "trainable": list(self.trainable), "step": self._step, "since": dict(self._since),
                "idle": sorted(self._idle)}

    def resume(self, model: nn.Module, proof: dict) -> None:
        """Go on with the `proof` of an interrupted run, whose weights `model` now has: the policy must be
        the same, and what is frozen must be what that run began with."""
        with self._passing("resume"):
            if proof["fingerprint"] != self.fingerprint:
                raise FreezeError(f"the checkpoint trained {proof['policy']!r}, which on this model is not "
                                  f"{self.policy!r}: other names, shapes or trainables")
            self._digests, self._since = dict(proof["digests"]), dict(proof["since"])
            self._step, self._idle = proof["step"], set(proof["idle"])
            if self._schedule:
                self._switch(set(proof["trainable"]))
        self.check_model(model)
        self.check_unchanged(model, trained=False)

    def summary(self) -> str:
        """What trains, in parameters and bytes, and which tensors have two names."""
        numel = {n: p.numel() for n, p in self.named.items()}
        count, total = sum(numel[n] for n in self.trainable), sum(numel.values())
        weights = sum(numel[n] * p.element_size() for n, p in self.named.items()) / 1e6
        trained = sum(numel[n] * self.named[n].element_size() for n in self.trainable) / 1e6
        lines = [f"{self.policy}: trains {count:,} of {total:,} parameters ({count / total:.2%}), "
                 f"{len(self.trainable)} of {len(numel)} tensors",
                 f"memory: weights {weights:,.1f} MB, gradients {trained:,.1f} MB, "
                 f"AdamW state {2 * trained:,.1f} MB (all: {weights:,.1f} and {2 * weights:,.1f})"]
        if self._schedule:
            most = sum(numel[n] for n in self.eligible)
            lines.append(f"dynamic: these figures are of now; {most:,} parameters train at some time")
        for term, values in self.scores.items():
            lines.append(f"{term}: the blocks score " + ", ".join(f"{value:.3g}" for value in values))
        for group in self._shared:
            fate = "train" if set(group) & set(self.trainable) else "are frozen"
            lines.append(f"{' and '.join(group)} share their memory: they {fate} together")
        return "\n".join(lines)

    def _switch(self, trainable: set[str]) -> None:
        """Let exactly these train; gradients are cleared, for no optimizer skips a gradient of zeros."""
        self.trainable, self.frozen = sorted(trainable), sorted(self.named.keys() - trainable)
        for name, p in self.named.items():
            p.requires_grad_(name in trainable)
            p.grad = None

    def _had_time(self, name: str, step: int) -> bool:
        """To change: not if it is empty, or was unfrozen a single step ago, whose rate may have been zero."""
        return self.named[name].numel() > 0 and (name not in self._since or step - self._since[name] >= 2)

    @contextmanager
    def _passing(self, check: str):
        """Time a check, and count it if it ends without an error."""
        start = time.perf_counter()
        try:
            yield
            self.checks[check] = self.checks.get(check, 0) + 1
        finally:
            self.seconds += time.perf_counter() - start

    def _check_objects(self, model: nn.Module) -> None:
        """Every name stands for the parameter, over the memory, for which it stood at freezing."""
        now = dict(model.named_parameters(remove_duplicate=False))
        refuse(self._objects.keys() - now.keys(), "no longer in the model")
        refuse(now.keys() - self._objects.keys(), "not in the model at freezing")
        refuse((n for n, (p, address) in self._objects.items() if now[n] is not p or p.data_ptr() != address),
               "replaced since freezing")

    def _parts(self, model: nn.Module):
        """(name, module, rests?) of each block, which rests if nothing in it trains, and of dropout outside
        the blocks: it drops the embeddings' output, and rests with them. So what lies below the lowest
        trainable parameter is a fixed function of its input."""
        embeddings = any(KINDS["embeddings"].search(n) for n in self.trainable)
        for name, module in model.named_modules():
            block = BLOCK.search(name + ".")
            if block and block.end() > len(name):
                yield name, module, not any(n.startswith(name + ".") for n in self.trainable)
            elif not block and isinstance(module, nn.Dropout):
                yield name, module, not embeddings


def drops(module: nn.Module) -> bool:
    """Whether a module has dropout: nn.Dropout, or attention with a rate in its attribute `dropout`."""
    rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "dropout", 0.0)
    return isinstance(rate, float) and rate > 0


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
    parser.add_argument("--trainable", help=f"terms joined by commas, a leading - takes away: {TERMS} "
                        "(default: all; lora with --lora-r)")
    parser.add_argument("--lora-r", type=int, help="rank of adapters to add first")
    parser.add_argument("--untie-head", action="store_true", help="give the head its own copy of the embedding")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Print what the policy does to the model; returns the exit code: 1 for the model, 2 for the policy."""
    args = parse_args(argv)
    from gpt import GPT
    from lora import add_lora

    code = 1
    try:
        model = GPT.from_pretrained(args.model, **({"tie_word_embeddings": False} if args.untie_head else {}))
        code = 2
        if args.lora_r is not None:
            if args.lora_r > model.config.n_embd:
                raise ValueError(f"--lora-r {args.lora_r}: above the model's width of {model.config.n_embd}")
            add_lora(model, r=args.lora_r)
        if args.trainable is None:
            args.trainable = "all" if args.lora_r is None else "lora"
        plan = freeze(model, args.trainable)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return code
    try:
        print(table(plan), plan.summary(), sep="\n\n", flush=True)
    except BrokenPipeError:  # `| head` has seen enough: leave nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
