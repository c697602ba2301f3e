"""Which parameters of a model train, and the proof that these and no others did.

`freeze` turns a policy such as "last:2" or "lora,norms" into an exact set of parameters, or raises.
The `Plan` it returns keeps a sha256 of every tensor and checks that the model, its optimizer, its
gradients and finally its bytes are what the policy says. It works on any PyTorch model: blocks,
norms, embeddings and head are found by type. tests/test_freeze.py violates every check.

    plan = freeze(model, "last:2")                        # the model is loaded and on its device
    optimizer = torch.optim.AdamW(plan.parameters(), lr=5e-5)
    model.train(); plan.set_modes(model)                  # after every model.train()
    plan.check_model(model); plan.check_optimizer(optimizer)
    loss.backward(); plan.check_gradients(model, step)    # in steps 1 and 2
    plan.check_model(model); plan.check_unchanged(model)  # at the end
"""

import argparse
import ctypes
import hashlib
import json
import random
import re
import sys
import warnings
from collections import Counter
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

TERMS = ("all, none (first), last_block, last_two_blocks, last:K, first:K, blocks:0-3,7, head, "
         "last_layer, embeddings, norms, biases, lora, a parameter's name, a pattern with *")
SYNONYMS = {"all": "*", "last_block": "last:1", "last_two_blocks": "last:2", "last_layer": "head"}
COMMA = re.compile(r",(?!\s*\d+(?:-\d+)?\s*(?:,|$))")  # between terms; blocks:0,2 holds another
ADAPTER = re.compile(r"\blora_")  # in the names of our adapters' parameters, and of PEFT's
is_norm = lambda module: "norm" in type(module).__name__.lower()  # LayerNorm, RMSNorm, ...


class FreezeError(RuntimeError):
    """The proof is broken: what trains, or what has changed, is not what the policy says."""


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks, from the input up: the longest list of modules of one class, [] without
    one. ValueError if another list is as long, or of the same class."""
    lists = []  # not those inside of blocks
    for name, module in model.named_modules():
        listed = isinstance(module, (nn.ModuleList, nn.Sequential)) and list(module.parameters())
        nested = any(f"{name}.".startswith(f"{b}.") for names in lists if names[1:] for b in names)
        if listed and not nested and len({type(child) for child in module.children()}) == 1:
            lists.append([f"{name}.{leaf}".lstrip(".") for leaf, _ in module.named_children()])
    *others, blocks = sorted(lists, key=len) or [[]]
    kind = lambda names: type(model.get_submodule(names[0]))
    for other in others:
        if len(other) == len(blocks) or kind(other) is kind(blocks):
            raise ValueError(f"blocks like {blocks[0]} and like {other[0]}: say which by patterns, "
                             f"for example {blocks[0]}.*")
    return blocks


def chosen_blocks(term: str, blocks: list[str]) -> tuple[str, ...]:
    """What last:K, first:K or blocks:0-3,7 means: beginnings of parameters' names."""
    word, _, text = term.partition(":")
    if word != "blocks":
        k = int(text) if text.isdecimal() else 0
        text = f"0-{k - 1}" if word == "first" else f"{len(blocks) - k}-{len(blocks) - 1}"
    parts = [re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part) for part in text.split(",")]
    ranges = [range(int(m[1]), int(m[2] or m[1]) + 1) if m else range(0) for m in parts]
    if not all(r.start < r.stop <= len(blocks) for r in ranges):
        raise ValueError(f"{term!r}: {len(blocks)} blocks were found; say last:2, or a pattern")
    return tuple(f"{blocks[i]}." for r in ranges for i in r)


def matching(model: nn.Module, term: str, names: list[str]) -> set[str]:
    """Those of `names` that a term means; adapters only by `all`, `lora` and patterns."""
    term, base = SYNONYMS.get(term, term), [n for n in names if not ADAPTER.search(n)]
    module_of = lambda name: model.get_submodule(name.rpartition(".")[0])
    kinds = {"biases": lambda n: n.endswith("bias"), "norms": lambda n: is_norm(module_of(n)),
             "embeddings": lambda n: isinstance(module_of(n), nn.Embedding), "lora": ADAPTER.search}
    if term in kinds:
        return set(filter(kinds[term], names if term == "lora" else base))
    if term == "head":  # what get_output_embeddings gives, else the last linear outside the blocks
        output = getattr(model, "get_output_embeddings", lambda: None)()
        blocks = tuple(f"{block}." for block in find_blocks(model)) if output is None else ()
        heads = [n for n, m in model.named_modules() if m is output or output is None and not
                 f"{n}.".startswith(blocks) and isinstance(m, nn.Linear) and not ADAPTER.search(n)]
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


def resolve(model: nn.Module, policy: str) -> set[str]:
    """The names, as in model.named_parameters(), that `policy` trains; ValueError if it is wrong.
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
                raise ValueError(f"{term!r} means {name}, which is tied to {other}: name both, or "
                                 "untie them (--untie-head, tie_word_embeddings=False)")
        found = {n for n in named if first[memory[n]] in found}
        if minus and not found & trainable:
            raise ValueError(f"-{term} takes nothing away in {policy!r}; begin with all")
        trainable = trainable - found if minus else trainable | found
    if not trainable:
        raise ValueError(f"{policy!r} trains nothing")
    return trainable & dict(model.named_parameters()).keys()


def schedule(policy: str, n_blocks: int, steps: int, steps_per_epoch: int, seed: int) -> list:
    """Cut a policy that changes with time into static ones: [(first step, policy), ...].
    gradual:K trains the last norm, K blocks from the top, and one more each epoch (ULMFiT, arXiv
    1801.06146); lisa:K@N draws K blocks anew every N steps (LISA, arXiv 2403.17919). ValueError
    unless 1 <= K < n_blocks and N >= 1."""
    terms, spans = COMMA.split(policy), []
    timed = [i for i, term in enumerate(terms) if re.match(r"[\s-]*(gradual|lisa):", term)]
    if not timed:
        return [(0, policy)]
    match = re.fullmatch(r"\s*(?:gradual:(\d+)|lisa:(\d+)@(\d*[1-9]\d*))\s*", terms[timed[0]])
    k = int(match[1] or match[2]) if match else 0
    if len(timed) > 1 or not 1 <= k < n_blocks:
        raise ValueError(f"{policy!r}: say gradual:K or lisa:K@N, once, no -, 0 < K < {n_blocks}")
    for turn, step in enumerate(range(0, max(steps, 1), int(match[3] or steps_per_epoch))):
        draw = sorted(random.Random(f"lisa {seed} {turn}").sample(range(n_blocks), k))
        drawn = "blocks:" + ",".join(map(str, draw))
        terms[timed[0]] = f"last:{min(k + turn, n_blocks)}" if match[1] else drawn
        if not spans or ",".join(terms) != spans[-1][1]:
            spans.append((step, ",".join(terms)))
    return spans


def whole(tensor: Tensor) -> Tensor:
    """Of a tensor sharded over processes all parts together: every process must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def digests(named: dict[str, Tensor]) -> dict[str, str]:
    """sha256 of dtype, shape and bytes: equal for bit-identical tensors alone (NaN, -0.0 too)."""
    result = {}
    for name, tensor in named.items():
        tensor = whole(tensor.detach()).cpu().contiguous()
        sha = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        sha.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))  # no copy
        result[name] = sha.hexdigest()
    return result


def resting_modules(model: nn.Module) -> set[str]:
    """Names of the modules that belong in eval mode: wholly frozen ones. One without parameters,
    such as a Dropout, rests with the module around it, and where nothing at or before it trains."""
    rests, trains_before = set(), False
    for name, module in model.named_modules():
        flags = [p.requires_grad for p in module.parameters()]
        below = not flags and not trains_before and not ADAPTER.search(name)  # PEFT's lora_dropout
        if below or name.rpartition(".")[0] in rests or flags and not any(flags):
            rests.add(name)
        trains_before |= any(p.requires_grad for p in module.parameters(recurse=False))
    return rests


def depends_on_mode(module: nn.Module) -> bool:
    """Whether train mode changes what a module itself does: it drops out, or keeps statistics."""
    rates = [v for n, v in vars(module).items() if "drop" in (type(module).__name__ + n).lower()]
    keeps = hasattr(module, "running_mean") or hasattr(module, "lora_A")  # may drop
    return keeps or any(isinstance(rate, float) and rate > 0 for rate in rates)


def refuse(names, what: str, remedy: str) -> None:
    """Raise FreezeError if there are any `names`, with the first five of them."""
    if names := sorted(names):
        more = f" and {len(names) - 5} more" * (len(names) > 5)
        raise FreezeError(f"{what}: {', '.join(names[:5])}{more}; {remedy}")


def freeze(model: nn.Module, policy: str) -> "Plan":
    """Set requires_grad as `policy` says, clear gradients, record a sha256 of every tensor. The
    model must be complete: with adapters, loaded, on its device. ValueError for a wrong policy."""
    return Plan(model, policy, resolve(model, policy))


class Plan:
    """What trains (trainable, frozen: sorted names; fingerprint: sha256 of names, shapes and what
    trains), and the checks, which raise FreezeError; `checks` counts those passed."""

    def __init__(self, model: nn.Module, policy: str, trainable: set[str]):
        self.policy, self.checks, self._trains = policy, Counter(), trainable
        self._named, self._alive = dict(model.named_parameters()), set()  # gradients seen
        self.trainable, self.frozen = sorted(trainable), sorted(self._named.keys() - trainable)
        for name, p in self._named.items():
            p.requires_grad_(name in trainable)
            p.grad = None  # optimizers skip None, but not zeros
        what = [(name, list(p.shape), name in trainable) for name, p in sorted(self._named.items())]
        self.fingerprint = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        self._places, self._resting = self._where(model), resting_modules(model)
        self._digests = digests(self._named | self._constants(model))

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer should be given, in the model's order."""
        return [p for name, p in self._named.items() if name in self._trains]

    def set_modes(self, model: nn.Module) -> None:
        """After model.train(): wholly frozen parts back to eval (dropout off, BatchNorm still)."""
        for module in [m for name, m in model.named_modules() if name in self._resting]:
            module.training = False

    def check_model(self, model: nn.Module) -> None:
        """Same parameters in the same memory, requires_grad exactly as planned, same buffers,
        frozen parts in eval mode where that makes a difference."""
        self._check_objects(model)
        refuse((f"{n} is {p.requires_grad}" for n, p in self._named.items()
                if p.requires_grad != (n in self._trains)),
               "requires_grad is not as planned", "it was set since freeze()")
        refuse((n for n, module in model.named_modules()
                if n in self._resting and module.training and depends_on_mode(module)),
               "frozen, but in train mode", "call plan.set_modes(model) after model.train()")
        self.checks["check_model"] += 1

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """It holds what trains, each once, and nothing else, nor state of it."""
        names, remedy = {id(p): n for n, p in self._named.items()}, "give it plan.parameters()"
        name_of = lambda p: names.get(id(p), f"a tensor {tuple(p.shape)} not in the model")
        held = Counter(name_of(p) for group in optimizer.param_groups for p in group["params"])
        once, state = Counter(self.trainable), {name_of(p) for p in optimizer.state}
        refuse(held - once, "the optimizer holds what does not train, or holds it twice", remedy)
        refuse(once - held, "the optimizer lacks what should train", remedy)
        refuse(state - self._trains, "the optimizer has state of what does not train", remedy)
        self.checks["check_optimizer"] += 1

    def check_gradients(self, model: nn.Module, step: int) -> None:
        """After backward, `step` from 1. Frozen: no gradient, not even zeros, to which an optimizer
        would apply decay. Trainable: finite, non-zero by step 2 (LoRA's A has zeros in step 1)."""
        self._check_objects(model)
        refuse((n for n in self.frozen if self._named[n].grad is not None),
               "frozen, but with a gradient where None belongs", "only backward() may set .grad")
        gradients = {n: self._named[n].grad for n in self.trainable if self._named[n].numel()}
        cut = "is it left out of the forward pass, or the graph cut?"
        refuse((n for n in gradients if gradients[n] is None), "trainable, but no gradient", cut)
        largest = {n: float(torch.linalg.vector_norm(whole(gradients[n]).to_dense(), torch.inf))
                   for n in gradients}  # NaN if a value is
        refuse((n for n in largest if not largest[n] < torch.inf), "the gradient is not finite",
               "lower the rate, or use fp32")
        self._alive |= {n for n in largest if largest[n] > 0}
        refuse((n for n in largest if step > 1 and n not in self._alive), "zero gradients", cut)
        self.checks["check_gradients"] += 1

    def check_unchanged(self, model: nn.Module, trained: bool = True) -> None:
        """Frozen tensors and buffers are bit-identical to what they were in freeze(), and every
        trainable tensor has changed (trained=False: not asked, as after fewer than two steps)."""
        self._check_objects(model)
        asked = self._named if trained else {n: self._named[n] for n in self.frozen}
        same = {n for n, value in digests(asked).items() if value == self._digests[n]}
        refuse(set(self.frozen) - same, "frozen, but changed", "find what else writes to it")
        refuse((n for n in same - set(self.frozen) if self._named[n].numel()),
               "should have trained, but did not change", "is the learning rate too low?")
        self.checks["check_unchanged"] += 1

    @property
    def proof(self) -> dict:
        """For a checkpoint, JSON-able: what `resume` needs."""
        return {"policy": self.policy, "fingerprint": self.fingerprint, "digests": self._digests,
                "checks": dict(self.checks)}

    def resume(self, model: nn.Module, proof: dict) -> None:
        """Go on with the proof of an interrupted run, whose weights `model` has now."""
        if proof["fingerprint"] != self.fingerprint:
            raise FreezeError(f"the checkpoint trained {proof['policy']!r}, here {self.policy!r}: "
                              "take its policy and model")
        self._digests = proof["digests"]
        self.checks.update(proof["checks"])  # a Counter's update adds
        self.check_unchanged(model, trained=False)

    def summary(self) -> str:
        """What trains, in parameters and bytes."""
        total = sum(p.numel() for p in self._named.values())
        trains = sum(p.numel() for p in self.parameters())
        return (f"{self.policy}: trains {trains:,} of {total:,} parameters ({trains / total:.2%}), "
                f"{3e-6 * sum(p.nbytes for p in self.parameters()):,.1f} MB for gradients, moments")

    def _where(self, model: nn.Module) -> dict[str, tuple]:
        return {name: (id(p), p.data_ptr(), p.dtype, p.shape, p.stride())
                for name, p in model.named_parameters(remove_duplicate=False)}

    def _constants(self, model: nn.Module) -> dict[str, Tensor]:
        """The buffers, but those of what trains and of norms without parameters within it."""
        moving = {n for n, m in model.named_modules() if n not in self._resting and
                  (is_norm(m) or any(p.requires_grad for p in m.parameters(recurse=False)))}
        return {n: b for n, b in model.named_buffers() if n.rpartition(".")[0] not in moving}

    def _check_objects(self, model: nn.Module) -> None:
        then, now = self._places, self._where(model)
        refuse((n for n in then | now if then.get(n) != now.get(n)), "added, removed or replaced",
               "freeze() the complete model")
        then = {n: value for n, value in self._digests.items() if n not in self._named}
        now = digests(self._constants(model))
        refuse((n for n in then | now if then.get(n) != now.get(n)), "buffers changed",
               "call plan.set_modes(model) after model.train()")


def table(plan: Plan) -> str:
    """A line for each block, or module outside the blocks: how much of it trains."""
    total, trains = Counter(), Counter()
    for name, p in plan._named.items():
        unit = re.match(r"(?:\w+\.)*?\d+(?=\.)|.*(?=\.)|", name)[0]  # down to the first number
        total[unit] += p.numel()
        trains[unit] += p.numel() * (name in plan._trains)
    return "\n".join(f"{unit:24} {trains[unit]:13,} of {total[unit]:13,}" for unit in total)


def main(argv=None) -> int:
    """python freeze.py --model tiny --trainable last_block: print what a policy would train."""
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    parser = argparse.ArgumentParser(description="Print what a freeze policy trains.")
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    parser.add_argument("--model", default="tiny", help="model folder or name")
    parser.add_argument("--trainable", default="all", help=f"terms, with commas: {TERMS}")
    parser.add_argument("--lora-r", type=int, help="add adapters of this rank")
    args = parser.parse_args(argv)
    try:
        from gpt import GPT
        from lora import add_lora
        model = GPT.from_pretrained(args.model)
        if args.lora_r is not None:
            add_lora(model, r=args.lora_r)
        plan = freeze(model, args.trainable)
    except (ImportError, OSError, ValueError) as error:  # ImportError: this file was copied alone
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(table(plan), plan.summary(), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
