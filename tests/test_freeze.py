"""The freeze policy is exact, and its proof fails when it should and only then."""

import ast
import json
import os
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import freeze as freeze_file
from freeze import (FreezeError, digest, freeze, rank_shortfalls, relative_gradient_norms, resolve, signal_to_noise,
                    spectrum_ranks)
from gpt import GPT, Block, GPTConfig
from lora import add_lora

ROOT = Path(__file__).resolve().parents[1]
MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
NORMS = ("ln_1", "ln_2")
VOCAB = 29


def small(lora_r=None, seed=0, **config):
    """A random GPT-2 of three blocks."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{"vocab_size": VOCAB, "block_size": 8, "n_layer": 3, "n_head": 2, "n_embd": 8, **config}))
    if lora_r:
        add_lora(model, r=lora_r)
    return model


def loss_of(model, seed=0):
    ids = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def some_batches(n, seed=0):
    """(inputs, targets) as a collator makes them: the first three targets are the prompt's."""
    ids = torch.randint(VOCAB, (n, 2, 8), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, :, 1:].clone()
    targets[:, :, :3] = -100
    return list(zip(ids[:, :, :-1], targets))


class Run:
    """A model under a plan with its optimizer, as a training script has them."""

    def __init__(self, policy="last_block", lora_r=None, **config):
        self.model = small(lora_r, **config)
        self.plan = freeze(self.model, policy, batches=some_batches(2))
        self.optimizer = torch.optim.AdamW(self.plan.parameters(), lr=1e-2)
        self.steps = 0
        self.model.train()
        self.plan.set_modes(self.model)

    def backward(self):
        self.steps += 1
        self.optimizer.zero_grad()
        loss_of(self.model, seed=self.steps).backward()

    def train(self, steps=2, epoch=0):
        for _ in range(steps):
            if self.plan.advance(epoch, self.steps):
                self.plan.drop_frozen_state(self.optimizer)
                self.plan.set_modes(self.model)
            self.backward()
            self.optimizer.step()

    def check(self, which):
        argument = self.optimizer if which == "check_optimizer" else self.model
        more = {"check_gradients": [self.steps], "resume": [getattr(self, "proof", None)]}.get(which, [])
        if which == "advance":  # the set of these steps, and one that a later epoch or draw brings
            for later in range(1, 9):
                self.plan.advance(later, self.steps + later)
        else:
            getattr(self.plan, which)(argument, *more)


# ---------------------------------------------------------------------------------- the grammar


def block(i, tensors=("weight", "bias"), modules=NORMS + MATRICES):
    return {f"h.{i}.{module}.{tensor}" for module in modules for tensor in tensors}


def blocks(*indices, **kind):
    return set().union(*(block(i, **kind) for i in indices))


def adapters(*indices, modules=MATRICES):
    return {f"h.{i}.{module}.lora_{x}.default" for i in indices for module in modules for x in "AB"}


LN_F = {"ln_f.weight", "ln_f.bias"}
EMBEDDINGS = {"wte.weight", "wpe.weight"}
ALL = blocks(0, 1, 2) | LN_F | EMBEDDINGS
POLICIES = [  # policy, names in a tied model
    ("all", ALL),
    ("none,last_block", block(2) | LN_F),
    ("last_block", block(2) | LN_F),
    ("last_two_blocks", blocks(1, 2) | LN_F),
    ("last:1", block(2) | LN_F),
    ("last:3", blocks(0, 1, 2) | LN_F),
    ("first:1", block(0)),
    ("first:3", blocks(0, 1, 2)),
    ("blocks:0", block(0)),
    ("blocks:0-1", blocks(0, 1)),
    ("blocks:0,2", blocks(0, 2)),
    ("blocks:2,0-1", blocks(0, 1, 2)),
    ("blocks:0,2,norms", blocks(0, 2) | block(1, modules=NORMS) | LN_F),
    ("embeddings", EMBEDDINGS),
    ("norms", blocks(0, 1, 2, modules=NORMS) | LN_F),
    ("biases", blocks(0, 1, 2, tensors=["bias"]) | {"ln_f.bias"}),
    ("norms,biases", blocks(0, 1, 2, modules=NORMS) | blocks(0, 1, 2, tensors=["bias"]) | LN_F),
    ("norms,-biases", blocks(0, 1, 2, modules=NORMS, tensors=["weight"]) | {"ln_f.weight"}),
    ("all,-embeddings", ALL - EMBEDDINGS),
    ("all,-blocks:0,2", block(1) | LN_F | EMBEDDINGS),
    ("all,-last_block", blocks(0, 1) | EMBEDDINGS),
    ("all,-last_block,ln_f.*", blocks(0, 1) | EMBEDDINGS | LN_F),
    ("all, - norms , h.1.ln_2.*", ALL - blocks(0, 1, 2, modules=NORMS) - LN_F | block(1, modules=["ln_2"])),
    ("*.mlp.*", blocks(0, 1, 2, modules=["mlp.c_fc", "mlp.c_proj"])),
    ("h.1.*", block(1)),
    ("*wte*", {"wte.weight"}),
    ("*", ALL),
]


@pytest.mark.parametrize("policy, names", POLICIES, ids=[p for p, _ in POLICIES])
def test_a_policy_trains_exactly_its_names(policy, names):
    model = small()
    plan = freeze(model, policy)
    everything = {n for n, _ in model.named_parameters()}
    assert everything == ALL
    assert resolve(model, policy) == names
    assert plan.trainable == sorted(names) == plan.eligible
    assert plan.frozen == sorted(everything - names)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    assert [id(p) for p in plan.parameters()] == [id(p) for n, p in model.named_parameters() if n in names]


@pytest.mark.parametrize("policy, names", [
    ("head", {"lm_head.weight"}),
    ("last_layer", {"lm_head.weight"}),
    ("all,-head", ALL),
    ("all,-last_layer", ALL),
    ("embeddings", EMBEDDINGS),
    ("lm_head*", {"lm_head.weight"}),
    ("last_block,head", block(2) | LN_F | {"lm_head.weight"}),
])
def test_an_untied_head_is_named_by_itself(policy, names):
    assert resolve(small(tie_word_embeddings=False), policy) == names


@pytest.mark.parametrize("policy, names", [
    ("lora", adapters(0, 1, 2)),
    ("all", ALL | adapters(0, 1, 2)),
    ("all,-lora", ALL),
    ("lora,last_block", adapters(0, 1, 2) | block(2) | LN_F),
    ("last_block", block(2) | LN_F),
    ("blocks:1", block(1)),
    ("lora,-h.0.*", adapters(1, 2)),
    ("lora,norms", adapters(0, 1, 2) | blocks(0, 1, 2, modules=NORMS) | LN_F),
    ("h.1.attn.*", block(1, modules=MATRICES[:2]) | adapters(1, modules=MATRICES[:2])),
])
def test_adapters_train_under_all_lora_and_patterns_only(policy, names):
    assert resolve(small(lora_r=2), policy) == names


WRONG = [  # policy, model, what the message says
    ("head", {}, "--untie-head"),
    ("all,-head", {}, "--untie-head"),
    ("last_layer", {}, "--untie-head"),
    ("lm_head*", {}, "--untie-head"),
    ("l*", {}, "--untie-head"),
    ("all,-lm_head*", {}, "--untie-head"),
    ("lora", {}, "--lora-r"),
    ("last_blok", {}, "unknown term 'last_blok'"),
    ("Last_block", {}, "unknown term"),
    ("ln_f.weight", {}, "needs a *"),
    ("", {}, "unknown term ''"),
    ("norms,", {}, "unknown term ''"),
    ("-", {}, "unknown term ''"),
    ("norms,1", {}, "unknown term '1'"),
    ("blocks:0,x", {}, "unknown term 'x'"),
    ("none", {}, "trains nothing"),
    ("-none", {}, "only come first"),
    ("last_block,none", {}, "only come first"),
    ("all,-all", {}, "trains nothing"),
    ("-norms", {}, "takes nothing away"),
    ("last_block,-first:1", {}, "takes nothing away"),
    ("all,-foo*", {}, "'foo*' matches no parameter"),
    ("foo*", {}, "h.*.attn.c_attn.bias"),
    ("last:4", {}, "the model's 3"),
    ("last_two_blocks", {"n_layer": 1}, "the model's 1"),
    ("first:4", {}, "the model's 3"),
    ("last:0", {}, "'last:0'"),
    ("last:-1", {}, "'last:-1'"),
    ("last:1.5", {}, "'last:1.5'"),
    ("last:", {}, "'last:'"),
    ("last", {}, "unknown term 'last'"),
    ("blocks:3", {}, "0 to 2"),
    ("blocks:0-3", {}, "0 to 2"),
    ("blocks:0-99999999999999999999", {}, "0 to 2"),
    ("blocks:2-1", {}, "not a list of blocks"),
    ("blocks:0,2-1", {}, "not a list of blocks"),
    ("blocks:", {}, "'blocks:'"),
    ("blocks:a", {}, "'blocks:a'"),
    ("blocks:0--1", {}, "'blocks:0--1'"),
    ("random:4", {}, "the model's 3"),
    ("random", {}, "unknown term 'random'"),
    ("random:1@2", {}, "random:K"),
    ("spectrum:0", {}, "'spectrum:0'"),
    ("rgn:4", {}, "the model's 3"),
    ("rgn:1", {}, "need batches"),
    ("hybrid:0.1", {}, "--lora-r"),
    ("hybrid:0.1", {"lora_r": 2}, "need batches"),
    ("hybrid:0", {"lora_r": 2}, "'hybrid:0'"),
    ("hybrid:1.5", {"lora_r": 2}, "'hybrid:1.5'"),
    ("hybrid:nan", {"lora_r": 2}, "'hybrid:nan'"),
    ("hybrid:", {"lora_r": 2}, "'hybrid:'"),
    ("hybrid", {"lora_r": 2}, "unknown term 'hybrid'"),
    ("gradual:4", {}, "the model's 3"),
    ("gradual:x", {}, "'gradual:x'"),
    ("lisa:1", {}, "lisa:K@N"),
    ("lisa:1@", {}, "lisa:K@N"),
    ("lisa:1@0", {}, "lisa:K@N"),
    ("lisa:1@-2", {}, "lisa:K@N"),
    ("lisa:4@2", {}, "the model's 3"),
    ("lisa:@2", {}, "'lisa:@2'"),
    ("all,-lisa:1@2", {}, "cannot be taken away"),
    ("all,-gradual:1", {}, "cannot be taken away"),
    ("all,lisa:1@2", {}, "never changes"),
    ("lisa:1@2,-h.*", {}, "trains nothing"),
    ("gradual:1,last:3", {}, "never changes"),
    ("gradual:3", {}, "never changes"),
    ("lisa:3@2,norms", {}, "never changes"),
]


@pytest.mark.parametrize("policy, config, says", WRONG, ids=[f"{p} {c}" for p, c, _ in WRONG])
def test_a_wrong_policy_is_a_value_error_that_names_it_and_leaves_the_model_alone(policy, config, says):
    model = small(**config)
    model.wpe.weight.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=re.escape(says)):
        freeze(model, policy)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


@pytest.mark.parametrize("n_layer, n_embd, closed", [
    (12, 768, {"all": 124_439_808, "last_block": 7_089_408, "last_two_blocks": 14_177_280, "blocks:5": 7_087_872,
               "lora": 2_359_296}),
    (24, 1024, {"all": 354_823_168, "last_block": 12_598_272, "last_two_blocks": 25_194_496, "blocks:5": 12_596_224,
                "lora": 6_291_456}),
])
def test_counts_of_the_published_sizes_equal_their_closed_forms(n_layer, n_embd, closed):
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_embd // 64))
    numel = {n: p.numel() for n, p in model.named_parameters()}
    total = 50257 * n_embd + 1024 * n_embd + n_layer * (12 * n_embd**2 + 13 * n_embd) + 2 * n_embd
    assert sum(numel.values()) == total == closed["all"]
    for policy in closed.keys() - {"lora"}:
        assert sum(numel[n] for n in resolve(model, policy)) == closed[policy], policy
    with torch.device("meta"):
        add_lora(model, r=16)
    numel = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(numel[n] for n in resolve(model, "lora")) == closed["lora"]


def test_names_below_a_prefix_and_norms_of_another_name_are_found():
    model = nn.ModuleDict({"transformer": small()})
    assert resolve(model, "last_block,embeddings") == {f"transformer.{n}" for n in block(2) | LN_F | EMBEDDINGS}
    model["transformer"].h[0].ln_1 = nn.Identity()
    model["transformer"].h[0].before = nn.LayerNorm(8, bias=False)
    norms = {f"transformer.{n}" for n in blocks(1, 2, modules=NORMS) | block(0, modules=["ln_2"]) | LN_F}
    assert resolve(model, "norms") == norms | {"transformer.h.0.before.weight"}


# ------------------------------------------------------------------------------- shared memory


def with_head_over_the_same_memory():
    """Two parameters, so both are listed, over one memory: what `is` would not see."""
    model = small(tie_word_embeddings=False)
    model.lm_head.weight = nn.Parameter(model.wte.weight.data.view(VOCAB, 8))
    return model


@pytest.mark.parametrize("policy", ["head", "embeddings", "all,-head", "lm_head*", "*wte*", "last_block,head"])
def test_parameters_over_the_same_memory_cannot_differ(policy):
    with pytest.raises(ValueError, match="wte.weight, lm_head.weight, which share memory"):
        freeze(with_head_over_the_same_memory(), policy)


def test_parameters_over_the_same_memory_may_be_frozen_together_but_not_train_for_each_would_be_updated():
    assert freeze(with_head_over_the_same_memory(), "last_block").trainable == sorted(block(2) | LN_F)
    with pytest.raises(ValueError, match="lm_head.weight, wte.weight share memory, but are separate parameters|"
                                         "wte.weight, lm_head.weight share memory, but are separate parameters"):
        freeze(with_head_over_the_same_memory(), "head,embeddings")
    assert "wte.weight" in freeze(small(), "embeddings").trainable  # one Parameter with two names


def test_neighbours_in_one_storage_do_not_share_memory_but_overlapping_views_do():
    class Views(nn.Module):
        def __init__(self, *ranges):
            super().__init__()
            flat = torch.randn(12)
            for i, (start, stop) in enumerate(ranges):
                self.register_parameter(f"p{i}", nn.Parameter(flat[start:stop]))

    assert resolve(Views((0, 6), (6, 12)), "p0*") == {"p0"}
    with pytest.raises(ValueError, match="p0, p1"):
        resolve(Views((0, 7), (6, 12)), "p0*")
    with pytest.raises(ValueError, match="p0, p2, p1"):
        resolve(Views((0, 12), (6, 7), (2, 3)), "p0*")
    with torch.device("meta"):
        assert resolve(Views((0, 6), (0, 6)), "p0*") == {"p0"}  # no addresses: objects only


def test_a_tied_head_goes_with_the_embeddings_and_the_summary_says_so():
    assert "wte.weight and lm_head.weight share their memory: they train together" in freeze(
        small(), "embeddings").summary()
    assert "they are frozen together" in freeze(small(), "last_block").summary()
    assert "share" not in freeze(small(tie_word_embeddings=False), "embeddings").summary()


# ---------------------------------------------------------------------------------- clean runs


CLEAN = [(policy, {}) for policy, _ in POLICIES] + [
    ("last_block", {"dropout": 0.2}),
    ("norms", {"dropout": 0.2}),
    ("head", {"tie_word_embeddings": False}),
    ("all,-head", {"tie_word_embeddings": False}),
    ("lora", {"lora_r": 2}),
    ("lora,last_block", {"lora_r": 2, "dropout": 0.2}),
    ("all", {"lora_r": 2}),
    ("rgn:1", {}),
    ("spectrum:2", {}),
    ("random:1,norms", {}),
    ("gradual:1", {"dropout": 0.2}),
    ("lisa:1@5", {}),
    ("lisa:2@5,embeddings,norms", {"dropout": 0.2}),
    ("hybrid:0.2", {"lora_r": 2}),
]


@pytest.mark.parametrize("policy, config", CLEAN, ids=[f"{p} {c}" for p, c in CLEAN])
def test_a_clean_run_raises_no_alarm(policy, config):
    run = Run(policy, **config)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.check("check_model"), run.check("check_optimizer")
    for step in (1, 2, 3):
        run.backward()
        run.check("check_gradients")
        run.optimizer.step()
        run.check("check_optimizer")
    run.check("check_model"), run.check("check_unchanged")
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(run.plan.trainable)  # no dynamic policy above switches within three steps
    assert run.plan.checks == {"check_model": 2, "check_optimizer": 4, "check_gradients": 3, "check_unchanged": 1}
    assert 0 < run.plan.seconds < 5


@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    lambda p: torch.optim.AdamW([{"params": p[:3], "lr": 1e-3}, {"params": p[3:], "weight_decay": 0.0}]),
])
def test_other_optimizers_and_groups_raise_no_alarm(optimizer):
    run = Run("last_block,embeddings")
    run.optimizer = optimizer(run.plan.parameters())
    run.check("check_optimizer")
    run.train()
    run.check("check_optimizer"), run.check("check_unchanged")
    assert run.plan.checks["check_optimizer"] == 2 and run.plan.checks["check_unchanged"] == 1


def test_an_empty_parameter_need_not_change():
    run = Run("all")
    run.model.register_parameter("extra", nn.Parameter(torch.empty(0)))
    run.plan = freeze(run.model, "all")
    run.train()
    run.check("check_gradients"), run.check("check_unchanged")
    assert run.plan.checks["check_unchanged"] == 1


def test_bfloat16_is_proved_like_float32():
    model = small().bfloat16()
    plan = freeze(model, "h.2.mlp.*")
    with torch.no_grad():
        for p in plan.parameters():
            p.add_(0.5)
    plan.check_unchanged(model)
    with torch.no_grad():
        model.wte.weight.view(torch.int16)[3, 3] ^= 1
    with pytest.raises(FreezeError, match="frozen, but changed: wte.weight"):
        plan.check_unchanged(model)


def test_the_first_gradient_of_A_may_be_zero_but_not_the_second():
    run = Run("lora", lora_r=2)
    run.backward()
    assert not run.model.h[0].attn.c_attn.lora_A["default"].grad.any()
    run.check("check_gradients")
    run.backward()  # no update since, so B is still zero
    with pytest.raises(FreezeError, match="zero up to step 2: .*lora_A.default"):
        run.check("check_gradients")


def test_a_gradient_seen_in_step_1_may_be_zero_in_step_2():
    run = Run()
    run.backward(), run.check("check_gradients"), run.optimizer.step(), run.backward()
    run.model.ln_f.bias.grad.zero_()
    run.check("check_gradients")
    assert run.plan.checks["check_gradients"] == 2


def test_gradients_too_large_or_too_small_to_square_are_fine():
    run = Run()
    run.backward(), run.backward()
    run.model.ln_f.bias.grad.fill_(1e30)
    run.model.ln_f.weight.grad.fill_(1e-30)
    run.check("check_gradients")
    assert run.plan.checks["check_gradients"] == 1


def test_a_run_too_short_to_move_is_not_asked_to():
    run = Run("lora", lora_r=2)
    run.train(1)  # A has had no gradient, and AdamW's decay moves it; B is what a rate of 0 leaves alone
    with torch.no_grad():
        run.model.h[0].attn.c_attn.lora_B["default"].zero_()
    run.plan.check_unchanged(run.model, trained=False)
    with pytest.raises(FreezeError, match="did not change: h.0.attn.c_attn.lora_B.default"):
        run.plan.check_unchanged(run.model)


def test_freezing_again_clears_gradients_and_flags_of_before():
    run = Run("all")
    run.backward()
    plan = freeze(run.model, "norms")
    assert all(p.grad is None for p in run.model.parameters())
    assert {n for n, p in run.model.named_parameters() if p.requires_grad} == set(plan.trainable)
    plan = freeze(run.model, "all")
    assert all(p.requires_grad for p in run.model.parameters()) and not plan.frozen


# --------------------------------------------------------------------------- planted violations


VIOLATIONS = {}  # name -> (check that should catch it, what it should say, run's arguments, the deed)


def violation(check, says, **run):
    def add(deed):
        VIOLATIONS[deed.__name__] = (check, says, run, deed)
    return add


@violation("check_model", "frozen under 'last_block', but requires_grad is True: h.0.ln_1.bias")
def a_frozen_flag_flipped_after_the_policy(run):
    run.model.h[0].ln_1.bias.requires_grad_(True)


@violation("check_model", "requires_grad is True: h.0.attn.c_attn.bias, .* and 21 more")
def everything_unfrozen_by_a_later_call(run):
    run.model.requires_grad_(True)


@violation("check_model", "requires_grad is False: ln_f.weight")
def a_trainable_flag_flipped_after_the_policy(run):
    run.model.ln_f.weight.requires_grad_(False)


@violation("check_model", "replaced since freezing: ln_f.weight")
def a_parameter_registered_again(run):
    run.model.ln_f.weight = nn.Parameter(run.model.ln_f.weight.detach().clone())


@violation("check_model", "replaced since freezing: h.1.attn.c_attn.bias")
def a_module_replaced(run):
    run.model.h[1] = Block(run.model.config)


@violation("check_model", "not in the model at freezing: extra")
def a_parameter_added(run):
    run.model.extra = nn.Parameter(torch.zeros(2))


@violation("check_model", "not in the model at freezing: .*lora_A")
def adapters_added(run):
    add_lora(run.model, r=2)


@violation("check_model", "no longer in the model: ln_f.bias")
def a_parameter_removed(run):
    run.model.ln_f.bias = None


@violation("check_model", "replaced since freezing: h.2.ln_1.weight")
def data_of_a_trainable_swapped(run):
    p = run.model.h[2].ln_1.weight
    p.data = p.data.clone()


@violation("check_model", "replaced since freezing: wte.weight, |replaced since freezing: lm_head.weight, wte.weight")
def data_of_a_frozen_tied_tensor_swapped(run):
    run.model.wte.weight.data = run.model.wte.weight.data.clone()


@violation("check_model", "replaced since freezing: .*wte.weight")
def embeddings_resized(run):
    run.model.wte.weight.data = torch.zeros(VOCAB + 1, 8)


@violation("check_model", "replaced since freezing: lm_head.weight")
def a_tied_head_untied(run):
    run.model.lm_head.weight = nn.Parameter(run.model.wte.weight.detach().clone())


@violation("check_model", "replaced since freezing: lm_head.weight", tie_word_embeddings=False)
def an_untied_head_tied(run):
    run.model.lm_head.weight = run.model.wte.weight


@violation("check_model", "replaced since freezing: h.2.ln_1.weight")
def memory_shared_across_the_border(run):
    run.model.h[2].ln_1.weight.data = run.model.h[0].ln_1.weight.data


@violation("check_model", "replaced since freezing: h.0.ln_1.weight")
def a_view_widened_into_its_neighbour(run):
    flat = torch.randn(16)
    run.model.h[0].ln_1.weight.data, run.model.h[0].ln_1.bias.data = flat[:8], flat[8:]
    run.plan = freeze(run.model, "last_block")
    run.model.h[0].ln_1.weight.data = flat[:9]


@violation("check_unchanged", "replaced since freezing: h.2.attn.c_proj.weight")
def a_trainable_transposed_where_it_lies(run):
    run.train()
    run.model.h[2].attn.c_proj.weight.data = run.model.h[2].attn.c_proj.weight.data.t()


@violation("check_model", "frozen, but in train mode .*: drop, h.0$")
def a_frozen_block_whose_adapters_drop(run):
    run.model = small()
    add_lora(run.model, r=2, dropout=0.5)
    run.plan = freeze(run.model, "lora,-h.0.*")
    run.model.train()


@violation("check_model", "buffers changed since freezing: steps")
def a_buffer_changed(run):
    run.model.steps += 1


@violation("check_model", "buffers changed since freezing: steps")
def a_buffer_replaced(run):
    run.model.steps = torch.ones(3)


@violation("check_model", "buffers changed since freezing: more")
def a_buffer_added(run):
    run.model.register_buffer("more", torch.ones(3), persistent=False)


@violation("check_model", "buffers changed since freezing: steps")
def a_buffer_removed(run):
    del run.model.steps


@violation("check_model", "in train mode .*: drop, h.0, h.1", dropout=0.1)
def frozen_blocks_left_in_train_mode(run):
    run.model.train()


@violation("check_model", "in train mode .*: h.1", dropout=0.1)
def one_dropout_of_a_frozen_block_in_train_mode(run):
    run.model.h[1].mlp.dropout.train()


@violation("check_optimizer", "holds what is frozen; give it plan.parameters.*: h.0.attn.c_attn.bias")
def an_optimizer_over_everything(run):
    run.optimizer = torch.optim.AdamW(run.model.parameters())


@violation("check_optimizer", "holds more than once: ln_f.bias")
def a_parameter_listed_twice(run):
    run.optimizer.param_groups[0]["params"].append(run.model.ln_f.bias)


@violation("check_optimizer", "holds more than once: ln_f.bias")
def a_parameter_in_two_groups(run):
    run.optimizer.param_groups.append({"params": [run.model.ln_f.bias]})


@violation("check_optimizer", "lacks what should train: ln_f.weight")
def a_parameter_forgotten(run):
    run.optimizer.param_groups[0]["params"] = [p for p in run.plan.parameters() if p is not run.model.ln_f.weight]


@violation("check_optimizer", "lacks what should train: h.2")
def an_empty_optimizer(run):
    run.optimizer.param_groups[0]["params"] = []


@violation("check_optimizer", r"holds what is frozen.*shape \(8,\) not in the model")
def an_optimizer_over_copies(run):
    run.optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(8)))


@violation("check_optimizer", "state is 928 bytes, expected <= 0: wte.weight")
def state_kept_for_a_frozen_parameter(run):
    run.optimizer.state[run.model.wte.weight]["exp_avg"] = torch.zeros_like(run.model.wte.weight)


@violation("check_optimizer", "state is 132 bytes, expected <= 72: ln_f.bias")
def state_twice_as_large_as_it_should_be(run):
    run.train()
    state = run.optimizer.state[run.model.ln_f.bias]
    state.update({name: value.double() for name, value in state.items() if name != "step"})


@violation("check_gradients", "gradient where None belongs: wte.weight")
def zeros_where_none_belongs(run):
    run.backward()
    run.model.wte.weight.grad = torch.zeros_like(run.model.wte.weight)


@violation("check_gradients", "gradient where None belongs: h.0.ln_1.bias")
def a_gradient_through_a_flipped_flag(run):
    run.model.h[0].ln_1.bias.requires_grad_(True)
    run.backward()


@violation("check_gradients", "has no gradient: h.2.attn.c_attn.bias")
def no_backward_pass(run):
    run.steps = 1


@violation("check_gradients", "has no gradient: h.2.attn.c_attn.bias, .*")
def a_graph_cut_above_the_trained_block(run):
    run.model.h[2].register_forward_hook(lambda module, inputs, output: output.detach())
    run.backward()


@violation("check_gradients", "not finite: ln_f.weight")
def a_nan_in_a_gradient(run):
    run.backward()
    run.model.ln_f.weight.grad[3] = float("nan")


@violation("check_gradients", "not finite: ln_f.weight")
def an_infinite_gradient(run):
    run.backward()
    run.model.ln_f.weight.grad[3] = -float("inf")


@violation("check_gradients", "zero up to step 2: h.2.mlp.c_fc.bias, h.2.mlp.c_fc.weight")
def a_gradient_masked_to_zero(run):
    for p in run.model.h[2].mlp.c_fc.parameters():
        p.register_hook(torch.zeros_like)
    for _ in range(2):
        run.backward()
        run.plan.check_gradients(run.model, 1)


@violation("check_gradients", "replaced since freezing: h.2.ln_1.weight")
def gradients_of_a_parameter_registered_again(run):
    run.model.h[2].ln_1.weight = nn.Parameter(run.model.h[2].ln_1.weight.detach().clone())
    run.backward()


@violation("check_unchanged", "frozen, but changed: wpe.weight")
def a_frozen_weight_moved_by_one_ulp(run):
    run.train()
    with torch.no_grad():
        w = run.model.wpe.weight
        w[2, 3] = torch.nextafter(w[2, 3], torch.tensor(9.0))


@violation("check_unchanged", "frozen, but changed: h.1.ln_2.bias")
def a_frozen_zero_that_became_minus_zero(run):
    run.train()
    with torch.no_grad():
        run.model.h[1].ln_2.bias[0] = -0.0


@violation("check_unchanged", "frozen, but changed: wte.weight")
def a_frozen_tensor_changed_through_its_second_name(run):
    run.train()
    with torch.no_grad():
        run.model.lm_head.weight[0, 0] += 1


@violation("check_unchanged", "frozen, but changed: h.0.attn.c_attn.bias, .* and 21 more")
def weight_decay_on_frozen_parameters_with_zero_gradients(run):
    run.model.requires_grad_(True)
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-2, weight_decay=0.1)
    run.backward()
    for name in run.plan.frozen:
        run.plan.named[name].grad.zero_()
    with torch.no_grad():
        for name in run.plan.frozen:
            run.plan.named[name].add_(0.01)  # so that biases of zero decay visibly too
    run.optimizer.step()


@violation("check_unchanged", "did not change: ln_f.bias")
def a_trainable_that_never_moved(run):
    run.optimizer.param_groups[0]["params"] = [p for p in run.plan.parameters() if p is not run.model.ln_f.bias]
    run.train()


@violation("check_unchanged", "did not change: h.2.attn.c_attn.bias, .* and 9 more")
def a_learning_rate_of_zero(run):
    run.optimizer.param_groups[0].update(lr=0.0)
    run.train()


@violation("check_unchanged", "did not change: h.0.attn.c_attn.lora_B.default", policy="lora", lora_r=2)
def an_adapter_that_never_moved(run):
    run.model.h[0].attn.c_attn.lora_B["default"].requires_grad_(False)
    run.train()


@violation("check_unchanged", "frozen, but changed: h.0.attn.c_attn.weight", policy="lora", lora_r=2)
def a_delta_merged_into_its_frozen_base(run):
    run.train()
    layer = run.model.h[0].attn.c_attn
    with torch.no_grad():
        layer.weight += layer.lora_B["default"] @ layer.lora_A["default"]


@violation("check_unchanged", "replaced since freezing: ")
def frozen_weights_converted_to_half_and_back(run):
    run.train()
    run.model.half().float()


@violation("advance", "frozen, but changed: h.0.ln_1.bias", policy="gradual:2")
def a_block_that_moved_before_it_was_unfrozen(run):
    run.train()
    with torch.no_grad():
        run.model.h[0].ln_1.bias[0] += 1e-6


@violation("check_unchanged", "did not change: h.1.attn.c_attn.bias, .* and 7 more", policy="lisa:1@2")
def a_drawn_block_that_never_moved(run):
    block = {id(p) for p in run.model.h[1].parameters()}
    run.optimizer.param_groups[0]["params"] = [p for p in run.plan.parameters() if id(p) not in block]
    run.train(20)


@violation("check_unchanged", "did not change: h.0.attn.c_attn.bias, .* and 7 more", policy="gradual:2")
def an_unfrozen_block_that_never_moved(run):
    run.train(2)
    run.optimizer.param_groups[0]["params"] = [p for p in run.plan.parameters() if p.requires_grad]
    run.train(2, epoch=1)


@violation("check_optimizer", "lacks what should train: h.0", policy="gradual:2")
def an_optimizer_over_what_trains_first_only(run):
    run.optimizer = torch.optim.AdamW([p for p in run.plan.parameters() if p.requires_grad])


@violation("check_optimizer", "expected <= 0: h.[012]", policy="lisa:1@2")
def state_of_blocks_that_were_frozen_again(run):
    run.plan.drop_frozen_state = lambda optimizer: None
    run.train(20)


@violation("check_model", "requires_grad is True: h.[012]", policy="lisa:1@2")
def blocks_unfrozen_by_hand_after_a_switch(run):
    run.train(20)
    run.model.h.requires_grad_(True)


@violation("check_model", "in train mode .*: h.[012]", policy="lisa:1@2", dropout=0.1)
def a_switch_without_set_modes(run):
    run.plan.set_modes = lambda model: None
    run.train(20)


@violation("check_unchanged", "frozen, but changed: h.[012].ln_2.bias", policy="lisa:1@2")
def a_block_moved_after_it_was_frozen_again(run):
    run.train(21)
    with torch.no_grad():
        next(h for h in run.model.h if not h.ln_2.bias.requires_grad).ln_2.bias[3] += 1e-6


@violation("resume", "trained 'lisa:1@2', which on this model is not 'lisa:1@3'", policy="lisa:1@3")
def a_resume_under_another_period(run):
    run.proof = freeze(small(), "lisa:1@2").proof


@violation("resume", "trained 'lisa:1@2'", policy="lisa:1@2")
def a_resume_under_another_seed(run):
    run.proof = freeze(small(), "lisa:1@2", seed=1).proof


@violation("resume", "trained 'last_two_blocks', which on this model is not 'last_block'")
def a_resume_under_another_policy(run):
    run.proof = freeze(small(), "last_two_blocks").proof


@violation("resume", "other names, shapes or trainables", policy="lora", lora_r=2)
def a_resume_with_another_rank(run):
    run.proof = freeze(small(lora_r=3), "lora").proof


@violation("resume", "frozen, but changed: h.0")
def a_resume_over_another_base(run):
    other = small(seed=1)
    other.register_buffer("steps", torch.zeros(3))
    run.proof = freeze(other, "last_block").proof


@violation("resume", "frozen, but changed: h.1.ln_1.bias")
def a_resume_from_a_checkpoint_with_a_changed_frozen_tensor(run):
    run.proof = run.plan.proof
    with torch.no_grad():
        run.model.h[1].ln_1.bias[7] = 1e-30


@violation("resume", "buffers changed since freezing: steps")
def a_resume_with_another_buffer(run):
    run.proof = run.plan.proof
    run.model.steps += 1
    run.plan = freeze(run.model, "last_block")


@violation("resume", "not 'lisa:1@2,ln_f.")
def a_resume_under_a_policy_that_draws_from_the_same_parameters(run):
    run.proof = freeze(run.model, "lisa:1@2,norms").proof
    run.plan = freeze(run.model, "lisa:1@2,ln_f.*")


@violation("resume", "requires_grad is True: wpe.weight")
def a_resume_that_does_not_freeze(run):
    run.proof = run.plan.proof
    run.model.wpe.weight.requires_grad_(True)


@violation("rebind", "changed by sharding: h.0.ln_1.bias")
def values_that_changed_while_they_were_sharded(run):
    run.model.h[0].ln_1.bias = nn.Parameter(run.model.h[0].ln_1.bias.detach() + 1e-6)


def caught(name):
    """What the check said to a planted violation: "" if it did not notice it."""
    check, _, arguments, deed = VIOLATIONS[name]
    run = Run(**arguments)
    run.model.register_buffer("steps", torch.zeros(3))
    run.plan = freeze(run.model, run.plan.policy)
    run.check("check_model"), run.check("check_optimizer")
    deed(run)
    try:
        run.check(check)
    except FreezeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_planted_violation_is_caught(name):
    assert re.search(VIOLATIONS[name][1], caught(name)), caught(name)


def test_planted_violations_are_caught_under_python_O_too():
    code = ("import re, test_freeze as t\n"
            "missed = [n for n, v in t.VIOLATIONS.items() if not re.search(v[1], t.caught(n))]\n"
            "print(__debug__, len(t.VIOLATIONS), missed)")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run([sys.executable, "-O", "-c", code], env=os.environ | {"PYTHONPATH": paths}, text=True,
                            capture_output=True)
    assert result.stdout.strip() == f"False {len(VIOLATIONS)} []", result.stdout + result.stderr


def test_the_file_holds_no_assert():
    tree = ast.parse((ROOT / "freeze.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def test_a_failed_check_is_not_counted_as_passed():
    run = Run()
    run.model.wte.weight.requires_grad_(True)
    with pytest.raises(FreezeError):
        run.check("check_model")
    assert run.plan.checks == {}


# ------------------------------------------------------------------- digest, fingerprint, resume


@pytest.mark.parametrize("tensor", [
    torch.arange(6.0), torch.arange(6.0).reshape(2, 3), torch.arange(6.0).double(), torch.arange(6.0).half(),
    torch.arange(6.0).bfloat16(), torch.arange(6), torch.tensor([True, False]), torch.tensor(1.0), torch.empty(0),
    torch.empty(3, 0), torch.tensor([float("nan")]), torch.arange(6.0).reshape(2, 3).T, torch.zeros(1).expand(4),
], ids=str)
def test_equal_tensors_have_equal_digests_and_one_bit_makes_another(tensor):
    copy = tensor.clone().contiguous()
    assert digest(copy) == digest(tensor)
    for i in range(copy.numel() * copy.element_size()):
        copy.view(-1).view(torch.uint8)[i] ^= 1
        assert digest(copy) != digest(tensor)
        copy.view(-1).view(torch.uint8)[i] ^= 1
    assert digest(copy) == digest(tensor)


def test_digests_tell_dtypes_shapes_and_signs_of_zero_apart():
    zeros = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(2, dtype=torch.float64), -torch.zeros(4), torch.zeros(4, 0),
             torch.zeros(8, dtype=torch.half), torch.zeros(8, dtype=torch.bfloat16), torch.empty(0)]
    assert len({digest(z) for z in zeros}) == len(zeros)


def test_the_fingerprint_is_of_what_trains_and_not_of_how_it_was_said():
    fingerprint = lambda policy, **config: freeze(small(**config), policy).fingerprint
    assert fingerprint("last_block") == fingerprint("last:1") == fingerprint("blocks:2,ln_f.*", seed=1)
    others = [fingerprint("last_block"), fingerprint("last:2"), fingerprint("last_block", n_embd=4),
              fingerprint("last_block", vocab_size=30), fingerprint("last_block", tie_word_embeddings=False),
              fingerprint("last_block", lora_r=2)]
    assert len(set(others)) == len(others)
    seeded = lambda policy: {freeze(small(), policy, seed=seed).fingerprint for seed in range(5)}
    assert len(seeded("lisa:1@2")) == 5 and len(seeded("last_block")) == 1


@pytest.mark.parametrize("policy, lora_r", [("last_block", None), ("lora,norms", 2)])
def test_a_resumed_run_goes_on_proving_against_the_first_digests(policy, lora_r):
    first = Run(policy, lora_r)
    first.train()
    proof, weights = json.loads(json.dumps(first.plan.proof)), first.model.state_dict()

    second = Run(policy, lora_r)
    second.model.load_state_dict(weights)
    second.plan.resume(second.model, proof)
    second.check("check_unchanged")  # its trainables differ from the first run's beginning
    assert second.plan.checks["resume"] == 1

    third = Run(policy, lora_r)  # frozen only after the checkpoint was loaded
    third.model.load_state_dict(weights)
    third.plan = freeze(third.model, policy)
    with pytest.raises(FreezeError, match="did not change"):
        third.check("check_unchanged")
    third.plan.resume(third.model, proof)
    third.check("check_unchanged")
    with torch.no_grad():
        third.model.wte.weight[0, 0] += 1
    with pytest.raises(FreezeError, match="frozen, but changed: wte.weight"):
        third.check("check_unchanged")


# ------------------------------------------------------------- choosing by data, spectrum and chance


@pytest.mark.parametrize("lora_r", [None, 2])
def test_rgn_is_the_mean_over_batches_of_gradient_over_weight_norm_of_each_block(lora_r):
    batches, expected = some_batches(3), [0.0] * 3
    model = small()
    for inputs, targets in batches:
        model.zero_grad()
        F.cross_entropy(model(inputs).transpose(1, 2), targets, ignore_index=-100).backward()
        for i, h in enumerate(model.h):
            flat = lambda tensors: torch.cat([t.flatten() for t in tensors])
            expected[i] += (flat(p.grad for p in h.parameters()).norm() / flat(h.parameters()).norm()).item() / 3
    model = small(lora_r=lora_r, dropout=0.5)
    scores = relative_gradient_norms(model, batches)
    assert scores == pytest.approx(expected, rel=1e-5) and len(set(scores)) == 3
    ranked = sorted(range(3), key=lambda i: -expected[i])
    assert resolve(model, "rgn:1", batches=batches) == block(ranked[0]) | LN_F
    assert resolve(model, "rgn:2,wpe*", batches=batches) == blocks(*ranked[:2]) | LN_F | {"wpe.weight"}


def test_rgn_finds_the_block_whose_weights_are_small_for_its_gradients():
    model = small()
    with torch.no_grad():
        for p in model.h[1].parameters():
            p.mul_(0.05)
    assert resolve(model, "rgn:1", batches=some_batches(2)) == block(1) | LN_F


def test_choosing_by_gradients_leaves_flags_modes_and_gradients_as_they_were():
    model = small(dropout=0.5)
    model.wpe.weight.requires_grad_(False)
    model.h[1].eval()
    before = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    relative_gradient_norms(model, some_batches(1))
    assert before == ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()])
    assert all(p.grad is None for p in model.parameters())


def test_a_batch_without_targets_is_refused():
    inputs, targets = some_batches(1)[0]
    with pytest.raises(ValueError, match="loss of batch 1 is nan"):
        freeze(small(), "rgn:1", batches=[(inputs, targets), (inputs, torch.full_like(targets, -100))])


def test_signal_to_noise_is_that_of_the_singular_values():
    s = torch.tensor([9.0, 3.0, 2.0, 1.0, 0.0])
    # quartiles 1 and 3: sigma = 2 / 1.349; of a square matrix the threshold is 2 sigma = 2.965: 9 and 3 are signal
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0))).Q
    assert signal_to_noise(turn @ s.diag()) == pytest.approx(12 / 3 / 9, rel=1e-5)
    # 5 x 20: the threshold is 1.5 sigma = 2.224, the same split; with 2.5 for 2 it is sigma 2 / 1.349 again
    s[2] = 2.5
    assert signal_to_noise(F.pad(s.diag(), (0, 15))) == pytest.approx(14.5 / 1 / 9, rel=1e-5)
    assert signal_to_noise(torch.ones(1, 4)) == float("inf")


def test_spectrum_takes_the_blocks_whose_matrices_rank_highest_among_their_kind():
    model = small()
    noise = {0: 0.5, 1: 0.2, 2: 0.9}  # the less noise around one direction, the more signal
    with torch.no_grad():
        for i, h in enumerate(model.h):
            for m in (h.attn.c_attn, h.attn.c_proj, h.mlp.c_fc, h.mlp.c_proj):
                s = noise[i] * torch.tensor([0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0])
                s[0] = 5
                u, _, v = torch.linalg.svd(m.weight, full_matrices=False)
                m.weight.copy_(u @ s.diag() @ v)
    assert spectrum_ranks(model) == [1.0, 2.0, 0.0]
    assert resolve(model, "spectrum:1") == block(1) | LN_F
    assert resolve(model, "spectrum:2") == blocks(0, 1) | LN_F


def test_the_plan_tells_the_scores_by_which_blocks_were_chosen():
    batches, model = some_batches(2), small()
    plan = freeze(model, "rgn:1,spectrum:1", batches=batches)
    assert plan.scores == {"rgn:1": relative_gradient_norms(small(), batches), "spectrum:1": spectrum_ranks(small())}
    highest = max(range(3), key=lambda i: plan.scores["rgn:1"][i])
    assert block(highest) <= set(plan.trainable)
    assert "rgn:1: the blocks score " + ", ".join(f"{v:.3g}" for v in plan.scores["rgn:1"]) in plan.summary().splitlines()
    assert freeze(small(), "last:1").scores == {}


def test_chance_depends_on_the_seed_alone_and_reaches_every_block():
    draws = [resolve(small(seed=s), "random:1", seed=s) for s in range(20)]
    assert draws == [resolve(small(), "random:1", seed=s) for s in range(20)]
    assert {frozenset(d) for d in draws} == {frozenset(block(i) | LN_F) for i in range(3)}
    assert all(len(resolve(small(), "random:2", seed=s)) == 26 for s in range(5))


def test_a_rank_shortfall_is_the_part_of_the_mean_gradient_that_rank_r_cannot_express():
    batches, plain, model = some_batches(3), small(), small(lora_r=2)
    for inputs, targets in batches:
        (F.cross_entropy(plain(inputs).transpose(1, 2), targets, ignore_index=-100) / 3).backward()
    scores = rank_shortfalls(model, batches)
    assert scores.keys() == {f"h.{i}.{m}.weight" for i in range(3) for m in MATRICES}
    for name, score in scores.items():
        weight = plain.get_parameter(name)
        u, s, v = torch.linalg.svd(weight.grad, full_matrices=False)
        rest = weight.grad - u[:, :2] @ s[:2].diag() @ v[:2]
        rho = (rest.norm() / weight.grad.norm()) ** 2
        assert score == pytest.approx((rho * weight.grad.norm() / weight.norm()).item(), rel=1e-3), name


def test_hybrid_trains_the_worst_expressed_matrices_fully_and_adapts_the_others():
    model = small(lora_r=2)
    batches, numel = some_batches(2), {n: p.numel() for n, p in model.named_parameters()}
    scores = rank_shortfalls(model, batches)
    base = sum(n for name, n in numel.items() if ".lora_" not in name)
    for share in (0.05, 0.1, 0.3, 1):
        room, full = share * base, set()
        for name in sorted(scores, key=scores.get, reverse=True):
            if numel[name] <= room:
                room, full = room - numel[name], full | {name}
        others = {(int(n.split(".")[1]), n.split(".", 2)[2].removesuffix(".weight")) for n in scores.keys() - full}
        expected = full | set().union(*(adapters(i, modules=[m]) for i, m in others))
        assert full and resolve(model, f"hybrid:{share}", batches=batches) == expected
    with pytest.raises(ValueError, match="no adapted matrix fits into hybrid:0.001"):
        resolve(model, "hybrid:0.001", batches=batches)


# -------------------------------------------------------------------------------- dynamic policies


def test_gradual_unfreezes_one_more_block_each_epoch_from_the_top():
    plan = freeze(small(), "gradual:1,wpe*")
    assert plan.eligible == sorted(ALL - {"wte.weight"})
    for epoch, expected in enumerate([block(2), blocks(1, 2), blocks(0, 1, 2), blocks(0, 1, 2)]):
        switched = plan.advance(epoch, 10 * epoch)
        assert switched == (epoch in (1, 2)) and plan.trainable == sorted(expected | LN_F | {"wpe.weight"})
        assert plan.frozen == sorted(ALL - set(plan.trainable))
        assert not plan.advance(epoch, 10 * epoch + 9)


def lisa_run(policy="lisa:1@3", steps=30, **config):
    """Train; returns for each period of 3 steps the blocks that the plan said and those that moved."""
    run, said, moved = Run(policy, **config), [], []
    for _ in range(steps // 3):
        before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        run.train(1), run.check("check_optimizer"), run.check("check_model")
        run.train(2)
        changed = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == set(run.plan.trainable)
        said.append({n.split(".")[1] for n in run.plan.trainable if n.startswith("h.")})
        moved.append({n.split(".")[1] for n in changed if n.startswith("h.")})
    run.check("check_unchanged")
    return run, said, moved


def test_lisa_draws_k_blocks_every_n_steps_and_exactly_these_move():
    run, said, moved = lisa_run()
    assert said == moved and all(len(s) == 1 for s in said)
    assert set().union(*said) == {"0", "1", "2"}
    assert run.plan.checks["advance"] == sum(a != b for a, b in zip(said, said[1:]))
    assert run.plan.eligible == sorted(blocks(0, 1, 2))


def test_what_stands_beside_lisa_is_always_on():
    run, _, _ = lisa_run("lisa:1@3,embeddings,norms", dropout=0.1)
    always = EMBEDDINGS | LN_F | blocks(0, 1, 2, modules=NORMS)
    assert set(run.plan.trainable) in [always | block(i) for i in range(3)]
    assert all(run.optimizer.state[run.plan.named[n]]["step"] == run.steps for n in always)


def test_lisa_is_a_function_of_seed_and_step():
    def sets(seed, steps):
        plan = freeze(small(), "lisa:1@2", seed=seed)
        return [(plan.advance(0, step), plan.trainable)[1] for step in steps]

    assert sets(0, range(20)) == sets(0, range(20)) != sets(1, range(20))
    assert sets(0, [0, 13, 19]) == [sets(0, range(20))[i] for i in (0, 13, 19)]
    in_order = sets(0, range(20))
    assert in_order[::2] == in_order[1::2]


@pytest.mark.parametrize("policy", ["lisa:1@1,-h.1.*", "lisa:1@1,-blocks:0", "lisa:2@5,-h.0.*,-h.1.*", "norms,lisa:1@1,-blocks:0,-norms"])
def test_a_draw_that_would_leave_nothing_to_train_is_refused_beforehand(policy):
    with pytest.raises(ValueError, match="trains nothing while lisa:[12]@[15] draws only blocks that other terms take away"):
        freeze(small(), policy)


@pytest.mark.parametrize("policy", ["lisa:2@1,-blocks:0", "lisa:1@1,norms,-blocks:0", "gradual:1,lisa:1@1,-blocks:0"])
def test_something_is_left_of_every_draw(policy):
    plan = freeze(small(), policy)
    for step in range(20):
        plan.advance(0, step)
        assert plan.trainable and not any(n.startswith("h.0.") for n in plan.trainable)
    assert freeze(small(), "blocks:0,-blocks:0,lisa:1@1").eligible == sorted(blocks(0, 1, 2))  # what was taken away before comes again


@pytest.mark.parametrize("policy, says", [
    ("all,rgn:1", "rgn: in 'all,rgn:1' chooses in vain"), ("spectrum:1,all", "chooses in vain"), ("random:1,blocks:0-2", "chooses in vain"),
    ("gradual:1,blocks:0-1", "never changes"), ("gradual:1,-blocks:2,-ln_f.*", "trains nothing at first"), ("last:\u0663", "needs a number of blocks"),
    ("blocks:\u0661", "is not a list of blocks"), ("lisa:1@\u0665", "is not of the form")])
def test_what_has_no_effect_or_is_no_number_is_refused(policy, says):
    with pytest.raises(ValueError, match=says):
        freeze(small(), policy, batches=some_batches(2))


def test_biases_are_found_under_a_parametrization_too():
    class Same(nn.Module):
        def forward(self, x):
            return x

    model = small()
    nn.utils.parametrize.register_parametrization(model.h[0].mlp.c_fc, "bias", Same())
    original = "h.0.mlp.c_fc.parametrizations.bias.original"
    assert original in freeze(model, "biases").trainable and original not in freeze(model, "all,-biases").trainable


@pytest.mark.parametrize("policy, away", [("lisa:1@2,-norms", "ln_"), ("gradual:1,-ln_f.*", "ln_f"), ("gradual:1,embeddings,-wpe*", "wpe")])
def test_something_can_be_taken_away_from_what_changes(policy, away):
    plan = freeze(small(), policy)
    for step in range(6):
        plan.advance(step, step)
        assert plan.trainable and not any(away in n for n in plan.trainable)


def test_a_first_step_without_an_update_is_no_alarm_where_the_set_changes_after_it():
    draw = lambda seed, step: random.Random(f"lisa {seed} {step}").sample(range(3), 1)
    seed = next(seed for seed in range(99) if draw(seed, 0) not in (draw(seed, 1), draw(seed, 2)))
    run = Run("lisa:1@1")
    run.plan = freeze(run.model, "lisa:1@1", seed=seed)
    run.backward()  # its optimizer step was skipped
    run.train(2)
    run.check("check_unchanged")
    assert run.plan.checks["check_unchanged"] == 1


def draws(seed, steps):
    return [random.Random(f"lisa {seed} {step}").sample(range(3), 1)[0] for step in range(steps)]


def test_one_step_at_a_time_is_time_to_change_when_there_were_two():
    """lisa:1@1 seldom draws a block twice in a row; an optimizer that never steps is noticed all the same."""
    seed = next(seed for seed in range(999) if draws(seed, 4) == [0, 1, 0, 2])
    run = Run()
    run.plan = freeze(run.model, "lisa:1@1", seed=seed)
    for step in range(4):
        run.plan.advance(0, step)
        run.backward()
        if step < 2:  # block 0 has trained for a single step
            run.check("check_unchanged")
    with pytest.raises(FreezeError, match=r"should have trained, but did not change: h\.0\..* and 7 more$"):
        run.check("check_unchanged")


def test_steps_that_were_skipped_or_lie_before_a_change_are_not_counted():
    seed = next(seed for seed in range(999) if draws(seed, 5) == [0, 1, 0, 0, 2])
    model = small()
    plan = freeze(model, "lisa:1@1", seed=seed)
    plan.advance(0, 0)
    with torch.no_grad():
        for p in model.h[0].parameters():
            p.add_(1)
    plan.advance(0, 1)  # block 0 has changed in its first turn
    with torch.no_grad():
        for p in model.h[1].parameters():
            p.add_(1)
    plan.advance(0, 2), plan.advance(0, 3)
    plan.skip()  # of its second turn of two steps one moved nothing
    plan.advance(0, 4)
    plan.check_unchanged(model)
    assert plan.changed == block(0) | block(1)


def test_the_steps_that_a_block_has_had_survive_a_resume():
    seed = next(seed for seed in range(999) if draws(seed, 4) == [0, 1, 0, 2])
    plan, model = freeze(small(), "lisa:1@1", seed=seed), small()
    for step in range(2):
        plan.advance(0, step)
    again = freeze(model, "lisa:1@1", seed=seed)
    again.resume(model, json.loads(json.dumps(plan.proof)))
    for step in range(2, 4):
        again.advance(0, step)
    with pytest.raises(FreezeError, match="should have trained, but did not change: h.0"):
        again.check_unchanged(model)


def test_a_run_with_dropout_resumes_where_another_block_trains_than_at_the_start():
    seed = next(seed for seed in range(99) if draws(seed, 2) == [0, 1])
    model = small(dropout=0.1).train()
    plan = freeze(model, "lisa:1@1", seed=seed)
    plan.set_modes(model), plan.advance(0, 0), plan.advance(0, 1)
    other = small(dropout=0.1).train()
    again = freeze(other, "lisa:1@1", seed=seed)
    again.set_modes(other)
    again.resume(other, plan.proof)
    assert other.h[1].training and not other.h[0].training
    again.check_model(other)


def test_a_switch_after_the_backward_pass_leaves_the_gradients_of_what_trains_all_along():
    seed = next(seed for seed in range(99) if draws(seed, 2) == [0, 1])
    model = small()
    plan = freeze(model, "lisa:1@1,embeddings", seed=seed)
    loss_of(model).backward()
    assert plan.advance(0, 1)
    assert {n for n, p in plan.named.items() if p.grad is not None} == {"wte.weight", "wpe.weight"}


class Classifier(nn.Module):
    """A GPT-2, a frozen or trained normalization with statistics, and a head that drops."""

    def __init__(self):
        super().__init__()
        self.body, self.norm = small(dropout=0.1), nn.BatchNorm1d(8)
        self.score = nn.Sequential(nn.Sequential(nn.Dropout(0.3), nn.ReLU()), nn.Linear(8, 2))

    def forward(self, idx):
        return self.score(self.norm(self.body.features(idx)[:, -1]))


@pytest.mark.parametrize("policy, drops", [("score.*", {"score"}), ("body.wte*", {"body.drop"}), ("body.h.2.*", {"body.h.2"})])
def test_dropout_rests_with_the_part_that_it_belongs_to(policy, drops):
    model = Classifier()
    plan = freeze(model, policy)
    model.train()
    with pytest.raises(FreezeError, match="in train mode"):
        plan.check_model(model)
    plan.set_modes(model)
    plan.check_model(model)
    active = {n for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.training}
    assert active and all(any(n.startswith(d) for d in drops) for n in active)


def test_where_all_of_another_model_trains_no_dropout_is_taken_for_the_embeddings():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2), 2, enable_nested_tensor=False)
    plan = freeze(model.train(), "all")
    plan.check_model(model)
    plan = freeze(model, "layers.1.*")
    with pytest.raises(FreezeError, match="in train mode .*: layers.0.dropout"):
        plan.check_model(model)
    plan.set_modes(model)
    plan.check_model(model)
    assert model.layers[1].dropout.training and model.layers[1].self_attn.training and not model.layers[0].self_attn.training


@pytest.mark.parametrize("policy, check", [("score.*", "check_model"), ("score.*", "check_unchanged"), ("score.*,norm.*", None)])
def test_statistics_may_change_where_they_belong_to_what_trains(policy, check):
    model = Classifier()
    plan = freeze(model, policy)
    plan.set_modes(model.train())
    for name in plan.trainable:
        plan.named[name].data += 1
    model(torch.randint(VOCAB, (4, 5)))  # moves the mean and the variance
    if check:
        with pytest.raises(FreezeError, match="buffers changed since freezing: norm.num_batches_tracked, norm.running_mean"):
            getattr(plan, check)(model)
    else:
        plan.check_model(model), plan.check_unchanged(model)


def test_what_a_trained_parametrization_keeps_beside_its_weight_may_change():
    model = small()
    nn.utils.parametrizations.spectral_norm(model.h[2].mlp.c_fc)
    plan = freeze(model, "last_block")
    model.train()
    loss_of(model).backward()
    plan.check_model(model)
    frozen = freeze(model, "embeddings")
    loss_of(model).backward()
    with pytest.raises(FreezeError, match="buffers changed since freezing: h.2.mlp.c_fc.parametrizations.weight.0._u"):
        frozen.check_model(model)


def test_gradients_of_rows_and_modules_with_configs_of_their_own_are_no_obstacle():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.out, self.configs = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2), [1]

    model = Words()
    plan = freeze(model, "all")
    plan.check_model(model)
    model.out(model.wte(torch.tensor([1, 1, 3]))).sum().backward()
    plan.check_gradients(model, 1)
    model.wte.weight.grad = model.wte.weight.grad * torch.nan
    with pytest.raises(FreezeError, match="not finite: wte.weight"):
        plan.check_gradients(model, 2)
    model.wte.weight.grad = torch.sparse_coo_tensor(torch.zeros(1, 0), torch.zeros(0, 4), (9, 4), check_invariants=True)
    plan.check_gradients(model, 2)  # it was seen to be alive


def test_lisa_keeps_optimizer_state_for_what_trains_only():
    run, _, _ = lisa_run()
    assert {id(p) for p in run.optimizer.state} == {id(run.plan.named[n]) for n in run.plan.trainable}
    assert {int(s["step"]) for s in run.optimizer.state.values()} <= set(range(3, 31, 3))


def test_what_was_unfrozen_for_a_single_step_is_not_asked_to_have_moved_but_for_two_it_is():
    model = small()
    plan = freeze(model, "gradual:1")
    with torch.no_grad():
        for p in [*model.h[2].parameters(), *model.ln_f.parameters()]:
            p.add_(1)
    assert plan.advance(1, 5)
    plan.check_unchanged(model)
    assert not plan.advance(1, 6)
    with pytest.raises(FreezeError, match="did not change: h.1"):
        plan.check_unchanged(model)


def test_a_resumed_plan_remembers_what_had_not_moved():
    plan, again = freeze(small(), "gradual:1"), freeze(model := small(), "gradual:1")
    with torch.no_grad():
        for p in [*model.h[2].parameters(), *model.ln_f.parameters()]:
            p.add_(1)
    plan.advance(1, 5), plan.advance(1, 6)
    again.resume(model, plan.proof)  # block 1 has had two steps
    with pytest.raises(FreezeError, match="did not change: h.1"):
        again.check_unchanged(model)
    plan, again = freeze(small(), "lisa:1@1"), freeze(model := small(), "lisa:1@1")
    for step in range(9):
        plan.advance(0, step)
    model.load_state_dict({n: p + 1 if n in plan.trainable else p for n, p in model.state_dict().items()})
    assert plan.proof["idle"]
    again.resume(model, plan.proof)
    with pytest.raises(FreezeError, match="did not change: h"):
        again.check_unchanged(model)


@pytest.mark.parametrize("policy", ["lisa:1@3", "gradual:1"])
def test_a_resumed_dynamic_run_continues_with_the_set_and_the_proof_it_had(policy):
    whole = Run(policy)
    first = Run(policy)
    for run in (whole, first):
        for epoch in range(2):
            run.train(4, epoch)
    proof = json.loads(json.dumps(first.plan.proof))
    second = Run(policy)
    second.model.load_state_dict(first.model.state_dict())
    second.plan.resume(second.model, proof)
    second.plan.drop_frozen_state(second.optimizer)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.steps = first.steps
    assert second.plan.trainable == first.plan.trainable
    for run in (whole, second):
        run.train(8, epoch=2)
        run.check("check_model"), run.check("check_optimizer"), run.check("check_unchanged")
    assert second.plan.trainable == whole.plan.trainable
    for (name, p), q in zip(whole.model.named_parameters(), second.model.parameters()):
        assert torch.equal(p, q), name


# ----------------------------------------------------------------------- what freezing is good for


@pytest.mark.parametrize("policy, below", [("last_block", 2), ("last:2", 1), ("last:3", 0), ("blocks:1", 1)])
def test_backward_does_not_enter_the_frozen_prefix(policy, below):
    model = small()
    freeze(model, policy)
    entered = {}
    for i, module in enumerate(model.h):
        module.register_forward_hook(lambda m, inputs, output, i=i: entered.update({i: output.requires_grad}))
    loss_of(model).backward()
    assert entered == {i: i >= below for i in range(3)}


def test_dropout_acts_in_what_trains_and_not_below_it():
    model = small(dropout=0.5)
    plan = freeze(model, "last_block")
    model.train()
    plan.set_modes(model)
    outputs = {}
    for i, module in enumerate(model.h):
        module.register_forward_hook(lambda m, inputs, output, i=i: outputs.setdefault(i, []).append(output.detach()))
    ids = torch.arange(8)[None]
    model(ids), model(ids)
    assert torch.equal(*outputs[0]) and torch.equal(*outputs[1]) and not torch.equal(*outputs[2])


def test_set_modes_follows_train_and_eval():
    model = small(dropout=0.5)
    plan = freeze(model, "last_block")
    model.train()
    plan.set_modes(model)
    assert [m.training for m in model.h] == [False, False, True] and not model.drop.training
    model.eval()
    plan.set_modes(model)
    assert not any(m.training for m in model.modules())
    plan = freeze(model, "embeddings,blocks:1")
    model.train()
    plan.set_modes(model)
    assert [m.training for m in model.h] == [False, True, False] and model.drop.training
    plan.check_model(model)


def test_train_mode_of_frozen_blocks_is_no_matter_without_dropout_or_in_evaluation():
    run = Run()
    run.model.train()
    run.check("check_model")
    assert run.plan.checks["check_model"] == 1
    run = Run(dropout=0.5)
    run.model.eval()
    run.check("check_model")
    assert run.plan.checks["check_model"] == 1


# ---------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small().save_pretrained(path)
    return str(path)


def test_the_script_prints_what_a_policy_trains(folder, capsys):
    assert freeze_file.main(["--model", folder, "--trainable", "last_block,biases"]) == 0
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert ["wte", "0", "-"] in lines and ["ln_f", "16", "wb"] in lines
    assert ["h.0", "88", "-b", "-b", "-b", "-b", "-b", "-b"] in lines
    assert ["h.2", "872", "wb", "wb", "wb", "wb", "wb", "wb"] in lines
    assert f"last_block,biases: trains 1,064 of {sum(p.numel() for p in small().parameters()):,} parameters" in out
    assert "wte.weight and lm_head.weight share their memory: they are frozen together" in out and err == ""


def test_the_script_adds_adapters_and_unties_the_head(folder, capsys):
    assert freeze_file.main(["--model", folder, "--lora-r", "2"]) == 0
    assert ["h.1", "256", "--", "--AB", "--AB", "--", "--AB", "--AB"] in [
        line.split() for line in capsys.readouterr().out.splitlines()]
    assert freeze_file.main(["--model", folder, "--trainable", "head", "--untie-head"]) == 0
    assert ["lm_head", "232", "w"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_blocks_of_two_stacks_are_not_taken_for_one():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = small(), small()

    with pytest.raises(ValueError, match=r"blocks in student.h and in teacher.h: say which by patterns"):
        freeze(Pair(), "last_block")
    assert freeze(Pair(), "student.h.2.*").trainable == sorted(f"student.{n}" for n in block(2))


def test_a_block_that_holds_second_names_only_stays_in_train_mode():
    model = small(dropout=0.1)
    for shared in model.h[1:]:  # one set of weights for all blocks
        for (_, mine), (name, _) in zip(model.h[0].named_modules(), shared.named_modules()):
            for leaf, p in mine.named_parameters(recurse=False):
                setattr(shared.get_submodule(name), leaf, p)
    plan = freeze(model, "all")
    plan.set_modes(model.train())
    plan.check_model(model)
    assert [h.training for h in model.h] == [True] * 3


@pytest.mark.parametrize("size", [1e100, 1e-100])
def test_gradients_in_double_precision_are_neither_infinite_nor_zero(size):
    model = nn.Linear(2, 2).double()
    plan = freeze(model, "all")
    (model(torch.ones(1, 2).double()).sum() * size).backward()
    plan.check_gradients(model, 2)
    model.weight.grad[0, 0] = float("inf")
    with pytest.raises(FreezeError, match="not finite"):
        plan.check_gradients(model, 2)


def test_an_empty_tensor_alone_has_no_gradient_to_check():
    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(0, 3))
    plan = freeze(model, "all")
    plan.check_gradients(model, 1)
    plan.check_unchanged(model)
    assert plan.checks["check_gradients"] == plan.checks["check_unchanged"] == 1


@pytest.mark.parametrize("flags, code, says", [
    (["--trainable", "head"], 2, "--untie-head"),
    (["--trainable", "last:9"], 2, "'last:9'"),
    (["--trainable", ""], 2, "unknown term ''"),
    (["--lora-r", "0"], 2, "0"),
    (["--lora-r", "2", "--trainable", "last_block"], 2, "no adapter trains under --trainable last_block"),
    (["--model", "no/such/folder"], 1, "no/such/folder"),
])
def test_the_script_says_what_is_wrong_in_one_line(folder, capsys, flags, code, says):
    assert freeze_file.main(["--model", folder, *flags]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_the_script_survives_a_reader_that_leaves(folder):
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, str(ROOT / "freeze.py"), "--model", folder], stdout=write,
                            stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_script_meets_an_output_that_is_closed_full_or_ascii(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "stdout", None)
    assert freeze_file.main(["--model", folder]) == 0
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    assert freeze_file.main(["--model", folder]) == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
    with open(tmp_path / "log", "w", encoding="ascii") as log:
        monkeypatch.setattr(sys, "stdout", log)
        monkeypatch.setattr(sys, "argv", ["freeze.py", "--model", str(folder), "--trainable", "[!☃]*"])
        with pytest.raises(SystemExit, match="^0$"):
            runpy.run_path(freeze_file.__file__, run_name="__main__")
    assert r"[!\u2603]*: trains" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("flags", [["--nonsense"], ["--lora-r", "many"], ["--lora-r", "193"], ["--lora-r", "0"], ["--trainable", "last\nblock"]])
def test_a_wrong_flag_of_the_script_is_one_line_and_exit_code_2(capsys, flags):
    try:
        code = freeze_file.main(flags)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1) and error.startswith("error: ")


def test_a_view_with_gaps_shares_memory_with_what_lies_at_its_far_end():
    model, flat = nn.Module(), torch.randn(12)
    model.p0, model.p1, model.p2 = (nn.Parameter(view) for view in (flat[::2], flat[10:11], flat[11:]))
    with pytest.raises(ValueError, match="p0, p1"):
        resolve(model, "p0*")
    assert resolve(model, "p2*") == {"p2"}


def test_noise_reaches_less_far_in_a_matrix_that_is_not_square():
    s = torch.tensor([9.0, 3.0, 2.0, 1.0, 0.0])  # sigma = 2 / 1.349; 5 x 20: the threshold is 1.5 sigma = 2.224
    assert signal_to_noise(F.pad(s.diag(), (0, 15))) == pytest.approx(12 / 3 / 9, rel=1e-5)
    s[2] = 2.3  # sigma stays: now above the threshold
    assert signal_to_noise(F.pad(s.diag(), (0, 15))) == pytest.approx(14.3 / 1 / 9, rel=1e-5)


def test_every_matrix_of_a_block_has_its_rank_among_those_of_its_kind():
    model = small()
    of = {m: [signal_to_noise(h.get_submodule(m).weight) for h in model.h] for m in MATRICES}
    expected = [sum(sum(other < of[m][i] for other in of[m]) for m in MATRICES) / 4 for i in range(3)]
    assert spectrum_ranks(model) == expected and len(set(expected)) > 1


def test_of_two_adapters_on_a_matrix_the_higher_rank_is_what_can_be_expressed():
    batches, model = some_batches(2), small(lora_r=3)
    add_lora(model, r=1, name="other")
    assert rank_shortfalls(model, batches) == pytest.approx(rank_shortfalls(small(lora_r=3), batches), rel=1e-5)


@pytest.mark.parametrize("module", [nn.Dropout(0.1), nn.Dropout1d(0.1), nn.AlphaDropout(0.1), nn.TransformerEncoderLayer(4, 1, dropout=0.1).self_attn])
def test_every_kind_of_dropout_is_known(module):
    assert freeze_file.has_dropout(module) and not freeze_file.has_dropout(nn.Linear(2, 2))
    for rate in ("p", "dropout"):
        if isinstance(getattr(module, rate, None), float):
            setattr(module, rate, 0.0)
    assert not freeze_file.has_dropout(module)


def test_the_summary_counts_two_moments_for_what_trains():
    plan = freeze(small(n_embd=256, n_layer=2), "last_block")
    sizes = [4 * sum(plan.named[n].numel() for n in names) / 1e6 for names in (plan.named, plan.trainable)]
    assert (f"memory: weights {sizes[0]:.1f} MB, gradients {sizes[1]:.1f} MB, AdamW state {2 * sizes[1]:.1f} MB "
            f"(all: {sizes[0]:.1f} and {2 * sizes[0]:.1f})") in plan.summary().splitlines()
