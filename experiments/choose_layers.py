"""Choose which blocks, or which matrices, to train: by gradients, by spectrum, or by chance.

Prints one static policy for --trainable of finetune.py. rgn takes the blocks whose gradient is
large beside their weights (Surgical Fine-Tuning, arXiv 2210.11466); spectrum those whose matrices
stand out most from noise, without any data (arXiv 2406.06623); random draws them. shortfall trains
fully the matrices whose gradient an adapter of rank r expresses least, and all other adapters: a
hybrid. Gradients are of the response's loss on the first five batches of a run with this seed.

    python experiments/choose_layers.py --by rgn --k 2        # blocks:0,2
    python finetune.py --trainable "$(python experiments/choose_layers.py --by spectrum --k 2)"
    python experiments/choose_layers.py --by shortfall --share 0.2 --lora-r 8 --verbose
"""

import argparse
import random
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # by import torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the six files
from data import batches, collate, encode_examples, load_parts
from freeze import find_blocks
from gpt import GPT, load_model

def batch_size(model: nn.Module) -> int:
    """That of finetune.py for a model of this size."""
    return 16 if sum(p.numel() for p in model.parameters()) < 10_000_000 else 8

def response_loss(model: GPT, batch: list) -> Tensor:
    """Mean cross-entropy over the response tokens of a batch of Encoded."""
    inputs, targets = collate(batch)  # (B, T) each
    wanted = targets != -100
    return F.cross_entropy(model.lm_head(model.features(inputs)[wanted]), targets[wanted])

def relative_gradient_norms(model: GPT, probe: list[list]) -> list[float]:
    """For each block |gradient| / |weights|, norms over the whole block; the mean over batches."""
    blocks = [list(model.get_submodule(name).parameters()) for name in find_blocks(model)]
    scores = [0.0] * len(blocks)
    for batch in probe:
        model.zero_grad()
        response_loss(model, batch).backward()
        for i, block in enumerate(blocks):
            norm = get_total_norm([p.grad for p in block])
            scores[i] += float(norm / get_total_norm(block)) / len(probe)
    return scores

def signal_to_noise(weight: Tensor) -> float:
    """The sum of the singular values above the edge of pure noise (Marchenko and Pastur's), over
    that of the others, over the largest; inf without others. The noise's standard deviation is
    taken from their interquartile range."""
    s = torch.linalg.svdvals(weight.detach())
    low, high = torch.quantile(s, torch.tensor([0.25, 0.75])).tolist()
    edge = (high - low) / 1.349 * (1 + (min(weight.shape) / max(weight.shape)) ** 0.5)
    above = s > edge
    return float(s[above].sum() / s[~above].sum() / s[0])

def spectrum_ranks(model: nn.Module) -> list[float]:
    """For each block how many blocks its matrices exceed in signal-to-noise, each among those of
    its kind, on average. (Spectrum takes the best of each kind; here whole blocks are chosen.)"""
    ratios = [{kind: signal_to_noise(p) for kind, p in model.get_submodule(name).named_parameters()
               if p.dim() == 2} for name in find_blocks(model)]
    return [sum(other[kind] < snr for kind, snr in own.items() for other in ratios) / len(own)
            for own in ratios]

def rank_shortfalls(model: GPT, probe: list[list], r: int) -> dict[str, float]:
    """For each matrix W of the blocks, all of which get adapters by default, rho |G| / |W|: G is
    the mean over batches of its gradient, rho the share of |G|^2 that no matrix of rank r has."""
    blocks = tuple(f"{name}." for name in find_blocks(model))
    named = {name: p for name, p in model.named_parameters()
             if name.startswith(blocks) and p.dim() == 2}
    means = {name: torch.zeros_like(p) for name, p in named.items()}
    for batch in probe:
        gradients = torch.autograd.grad(response_loss(model, batch), list(named.values()))
        for mean, gradient in zip(means.values(), gradients):
            mean += gradient / len(probe)
    s = {name: torch.linalg.svdvals(mean) for name, mean in means.items()}
    rho = {name: s[name][r:].square().sum() / s[name].square().sum() for name in s}
    return {name: float(rho[name] * s[name].norm() / named[name].detach().norm()) for name in s}

def hybrid(model: nn.Module, scores: dict[str, float], share: float) -> str:
    """The policy that trains fully the matrices of largest score, as many as fit into this share of
    the parameters (one that does not fit is passed over), and the adapters of all others."""
    sizes, full = {name: p.numel() for name, p in model.named_parameters()}, []
    room = share * sum(sizes.values())
    for name in sorted(scores, key=lambda name: -scores[name]):
        if scores[name] > 0 and sizes[name] <= room:
            room -= sizes[name]
            full.append(name)
    if not full:
        raise ValueError(f"--share {share:g}: no matrix with a shortfall fits into it")
    frozen = [f"-{name.removesuffix('weight')}lora_*" for name in full]  # B stays 0: no effect
    return ",".join(["lora", *full, *frozen])

def first_batches(model: GPT, tokenizer, data: str, seed: int, n=5) -> list[list]:
    """The first n batches of Encoded that a run of finetune.py with this seed would see."""
    limit = model.config.block_size
    encoded, _ = encode_examples(load_parts(data).train, tokenizer, max_length=limit)
    order = batches([len(e.ids) for e in encoded], batch_size(model), seed, epoch=0)
    return [[encoded[i] for i in indices] for indices in order[:n]]

def choose(args) -> str:
    """The policy that the flags ask for; ValueError for more blocks than there are."""
    model, tokenizer = load_model(args.model)
    n_layer = len(find_blocks(model))
    if args.k and args.k > n_layer:
        raise ValueError(f"--k {args.k}: the model has {n_layer} blocks")

    if args.by == "random":
        order = random.Random(f"random {args.seed}").sample(range(n_layer), n_layer)
        scores = dict(zip(order, range(n_layer, 0, -1)))
    elif args.by == "spectrum":
        scores = dict(enumerate(spectrum_ranks(model)))
    else:
        probe = first_batches(model, tokenizer, args.data, args.seed)
        scores = (rank_shortfalls(model, probe, args.lora_r) if args.by == "shortfall" else
                  dict(enumerate(relative_gradient_norms(model, probe))))
    if args.verbose:
        for name, score in scores.items():
            print(f"{name}: {score:.4f}", file=sys.stderr)

    if args.by == "shortfall":
        return hybrid(model, scores, args.share)
    best = sorted(scores, key=lambda i: -scores[i])[:args.k]
    return "blocks:" + ",".join(map(str, sorted(best)))

def parse_args(argv=None):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--by", required=True, choices=["rgn", "spectrum", "random", "shortfall"], help="the rule")
    add("--k", type=int, help="number of blocks")
    add("--share", type=float, help="shortfall: share of the parameters that trains fully")
    add("--lora-r", type=int, help="shortfall: rank of the adapters")
    add("--model", default="tiny", help="a model folder or name (tiny)")
    add("--data", default="tiny", help="rgn, shortfall: what finetune.py takes (tiny)")
    add("--seed", type=int, default=123, help="of their batches, or of chance (123)")
    add("--verbose", action="store_true", help="print the scores on stderr")
    args = parser.parse_args(argv)
    taken, others = [args.k], [args.share, args.lora_r]
    if args.by == "shortfall":
        taken, others = others, taken
    if None in taken or any(number is not None for number in others):
        parser.error("--by shortfall takes --share and --lora-r, the others take --k")
    if min(taken) <= 0 or (args.share or 1) > 1:
        parser.error("--k and --lora-r are at least 1, --share is above 0, at most 1")
    return args

def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        policy = choose(args)
    except (ValueError, OSError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 1
    print(policy)
    return 0

if __name__ == "__main__":
    sys.exit(main())
