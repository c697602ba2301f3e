"""lora.py against closed forms, against itself merged and unmerged, and against peft in both directions."""

import inspect
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import gpt
import lora
from gpt import GPT, GPTConfig, generate, read_safetensors, write_safetensors
from lora import (LoRAConfig, LoRALinear, add_lora, load_lora, lora_state_dict, main, merge_lora, read_adapter,
                  save_lora, use_lora)

ROOT = Path(__file__).resolve().parents[1]
TINY = GPTConfig(vocab_size=61, block_size=24, n_layer=2, n_head=2, n_embd=16)
IDS = torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(7))


def random_model(config=TINY, seed=0):
    """Weights far from their init, so that no term of the forward pass is invisible."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture
def model():
    return random_model()


def trained(model, name="default", seed=1, **options):
    """Add an adapter whose B is not zero."""
    torch.manual_seed(seed)
    add_lora(model, name=name, **{"r": 3, "alpha": 6, **options})
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(f".lora_B.{name}"):
                p.normal_(std=0.2)
    return model


def alone(name, **options):
    """A fresh copy of the base with this adapter only."""
    return trained(random_model(), name, **options)


def digest(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" not in n}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def adapted(model):
    return {n for n, m in model.named_modules() if isinstance(m, LoRALinear)}


# ---------------------------------------------------------------------------------------------
# adding


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_its_formula_for_inputs_of_any_dimensions(shape, dtype):
    torch.manual_seed(0)
    layer = LoRALinear.of(torch.nn.Linear(6, 4).to(dtype))
    A, B = torch.randn(2, 6), torch.randn(4, 2)
    layer.add_adapter("a", lora.LoRAConfig(2, 3.0), A, B)
    layer.active = "a"
    x = torch.randn(*shape, 6).to(dtype)
    W, b, wide = layer.weight.detach().double(), layer.bias.detach().double(), x.double()
    expected = wide @ W.T + b + 3.0 / 2 * wide @ A.double().T @ B.double().T
    y = layer(x)
    assert y.shape == (*shape, 4) and y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5 if dtype == torch.float32 else 4e-2)


def test_a_new_adapter_is_active_and_changes_no_logit(model):
    before = model(IDS)
    add_lora(model, name="new")
    assert torch.equal(model(IDS), before)
    assert {m.active for m in model.modules() if isinstance(m, LoRALinear)} == {"new"} and len(adapted(model)) == 8


def test_the_base_keeps_its_modules_parameters_and_names(model):
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    add_lora(model)
    after = dict(model.named_parameters())
    assert all(after[n] is p for n, p in parameters.items())
    assert all(model.get_submodule(n) is m for n, m in modules.items())
    assert model.lm_head.weight is model.wte.weight
    new = {n for n in after if n not in parameters}
    assert new == {f"{n}.lora_{k}.default" for n in adapted(model) for k in "AB"} and len(new) == 16


def test_a_is_kaiming_uniform_and_b_is_zero():
    layer = nn.Sequential(nn.Linear(400, 30))
    add_lora(layer, r=50, targets=["0"])
    A, B = layer[0].lora_A["default"], layer[0].lora_B["default"]
    assert A.shape == (50, 400) and B.shape == (30, 50) and not B.any()
    assert A.abs().max() <= 1 / math.sqrt(400)
    assert A.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02) and abs(A.mean().item()) < 1e-3


def test_a_is_drawn_in_the_models_order_however_targets_are_ordered(model):
    torch.manual_seed(1)
    add_lora(model, r=3, targets=["c_fc", "*.c_proj", "c_attn"])
    torch.manual_seed(1)
    for block in model.h:
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            expected = nn.init.kaiming_uniform_(torch.empty(3, layer.in_features), a=math.sqrt(5))
            assert torch.equal(layer.lora_A["default"], expected)


@pytest.mark.parametrize("rslora, scale", [(False, 8 / 4), (True, 8 / 2)])
def test_the_delta_is_alpha_over_r_or_over_its_root_times_b_a(rslora, scale):
    layer = nn.Sequential(nn.Linear(6, 5))
    x = torch.randn(2, 3, 6)
    base = layer(x)
    trained(layer, r=4, alpha=8, rslora=rslora, targets=["0"])
    A, B = layer[0].lora_A["default"], layer[0].lora_B["default"]
    torch.testing.assert_close(layer(x), base + scale * (x @ A.T @ B.T))
    assert (layer(x) - base).abs().max() > 0.1


def test_dropout_acts_on_the_input_of_a_and_only_while_training():
    layer = nn.Sequential(nn.Linear(6, 5))
    trained(layer, r=4, alpha=8, dropout=0.5, targets=["0"])
    x, A, B = torch.randn(3, 6), layer[0].lora_A["default"], layer[0].lora_B["default"]
    base = F.linear(x, layer[0].weight, layer[0].bias)
    layer.train()
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    torch.testing.assert_close(y, base + 2 * (F.dropout(x, 0.5) @ A.T @ B.T))
    torch.testing.assert_close(layer.eval()(x), base + 2 * (x @ A.T @ B.T))


def test_gradients_are_those_of_the_merged_weight():
    layer = nn.Sequential(nn.Linear(6, 5)).double()
    trained(layer, r=2, targets=["0"])
    x, A, B = torch.randn(3, 6, dtype=torch.double), layer[0].lora_A["default"], layer[0].lora_B["default"]
    assert A.dtype == torch.double
    got = torch.autograd.grad(layer(x).pow(2).sum(), (A, B))
    expected = torch.autograd.grad(F.linear(x, layer[0].weight + 3 * B @ A, layer[0].bias).pow(2).sum(), (A, B))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("targets, hits", [
    (("c_attn", "c_proj", "c_fc"), 8), (["attn.c_proj"], 2), (["c_proj"], 4), ("c_fc", 2),
    (["h.1.attn.c_attn"], 1), (["h.0.*"], 4), (["*.mlp.*", "c_attn"], 6), (["c_attn", "h.*.c_attn"], 2),
])
def test_targets_are_suffixes_or_patterns(model, targets, hits):
    add_lora(model, targets=targets)
    assert len(adapted(model)) == hits
    assert targets != ["attn.c_proj"] or adapted(model) == {"h.0.attn.c_proj", "h.1.attn.c_proj"}


def test_a_suffix_begins_at_a_dot():
    model = nn.ModuleDict({"c_proj": nn.Linear(2, 2), "xc_proj": nn.Linear(2, 2)})
    add_lora(model, targets=["c_proj"])
    assert adapted(model) == {"c_proj"}


@pytest.mark.parametrize("options, words", [
    ({"targets": ["c_attn", "q_proj"]}, "'q_proj' hits no linear layer"),
    ({"targets": ["*.q"]}, "'*.q' hits no"),
    ({"targets": ["wte"]}, "'wte' hits no linear layer"), ({"targets": ["proj"]}, "'proj' hits no"),
    ({"targets": []}, "no targets"), ({"targets": ["lm_head"]}, "untie"), ({"targets": ["*"]}, "untie"),
    ({"r": 0}, "r must be"),
    ({"r": 2.0}, "r must be"),
    ({"r": True}, "r must be"),
    ({"alpha": 0}, "alpha must be"),
    ({"alpha": math.nan}, "alpha must be"),
    ({"alpha": math.inf}, "alpha must be"),
    ({"alpha": "8"}, "alpha must be"),
    ({"dropout": 1.0}, "dropout must be"),
    ({"dropout": -0.1}, "dropout must be"),
    ({"rslora": "no"}, "rslora must be"),
    ({"name": "a.b"}, "cannot name"), ({"name": ""}, "cannot name"), ({"name": "keys"}, "cannot name"),
])
def test_what_cannot_be_added_is_a_value_error_and_leaves_the_model_as_it_was(model, options, words):
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=words.replace("*", r"\*").replace(".", r"\.")):
        add_lora(model, **options)
    assert list(model.state_dict()) == names and not adapted(model)


def test_a_name_can_be_added_once(model):
    add_lora(model, name="a", targets=["c_attn"])
    with pytest.raises(ValueError, match="already has an adapter 'a'"):
        add_lora(model, name="a", targets=["c_fc"])
    assert len(adapted(model)) == 2


def test_a_weight_over_memory_that_another_module_uses_too_is_not_adapted():
    model = random_model(replace(TINY, tie_word_embeddings=False))
    model.lm_head.weight = torch.nn.Parameter(model.wte.weight.data)
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        add_lora(model, targets=["lm_head"])


def test_an_untied_head_can_be_adapted_and_merged_without_touching_the_embedding():
    model = random_model(replace(TINY, tie_word_embeddings=False))
    wte = model.wte.weight.clone()
    trained(model, targets=["lm_head"])
    logits = model(IDS)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), logits, rtol=0, atol=1e-5)
    assert torch.equal(model.wte.weight, wte)


@pytest.mark.parametrize("sizes, count", [((12, 12, 768), 2_359_296), ((24, 16, 1024), 6_291_456)])
def test_rank_16_on_gpt2_has_the_closed_form_number_of_parameters(sizes, count):
    n_layer, n_head, n_embd = sizes
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    add_lora(model, r=16)
    assert sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n) == count == 16 * n_layer * 16 * n_embd


# ---------------------------------------------------------------------------------------------
# several adapters


def test_training_two_adapters_leaves_the_base_bit_identical_and_changes_every_matrix(model):
    before = digest(model)
    for p in model.parameters():
        p.requires_grad_(False)
    for name in ("a", "b"):
        add_lora(model, r=2, name=name)
        start = {n: t.clone() for n, t in lora_state_dict(model, name).items()}
        other = {n: t.clone() for n, t in lora_state_dict(model, "a").items()}
        optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if n.endswith("." + name)], lr=0.01)
        for _ in range(2):  # A has no gradient before B has moved
            optimizer.zero_grad()
            model(IDS).logsumexp(-1).sum().backward()
            optimizer.step()
        after = lora_state_dict(model, name)
        assert all(not torch.equal(after[n], start[n]) for n in start)
        assert name == "a" or same(lora_state_dict(model, "a"), other)
    assert same(digest(model), before)


def test_each_adapter_is_what_it_is_alone_and_none_is_the_base(model):
    base, before = model(IDS), digest(model)
    trained(model, "a", seed=1)
    trained(model, "b", seed=2, r=5, rslora=True, targets=["mlp.c_proj", "h.0.*"])
    for name, expected in (("a", alone("a", seed=1)), (None, None),
                           ("b", alone("b", seed=2, r=5, rslora=True, targets=["mlp.c_proj", "h.0.*"]))):
        use_lora(model, name)
        assert torch.equal(model(IDS), base if expected is None else expected(IDS))
    assert same(digest(model), before)
    assert (model(IDS) - base).abs().max() > 0.1


def test_each_row_of_a_mixed_batch_equals_the_single_adapter_forward(model):
    trained(model, "a", seed=1)
    trained(model, "b", seed=2, r=5, targets=["mlp.c_proj", "h.0.*"])
    rows = ["b", None, "a", "b"]
    singles = {}
    for name in ("a", "b", None):
        use_lora(model, name)
        singles[name] = model(IDS)
    use_lora(model, rows)
    mixed = model(IDS)
    for i, name in enumerate(rows):
        torch.testing.assert_close(mixed[i], singles[name][i], rtol=0, atol=2e-6)
        assert all((mixed[i] - singles[o][i]).abs().max() > 0.05 for o in singles if o != name)


def test_adapters_of_a_mixed_batch_draw_their_dropout_in_the_order_they_were_added(model, monkeypatch):
    names, drawn = [f"adapter{i}" for i in range(8)], []
    for name in names:
        add_lora(model, name=name, targets=["h.0.attn.c_attn"])
    true = lora.LoRALinear._adapt
    monkeypatch.setattr(lora.LoRALinear, "_adapt", lambda self, name, x, y: (drawn.append(name), true(self, name, x, y))[1])
    use_lora(model, names[::-1])
    model(IDS[:1].repeat(8, 1))
    assert drawn == names


def test_the_rows_of_one_adapter_alone_reach_its_gradient(model):
    trained(model, "a", seed=1)
    trained(model, "b", seed=2)
    rows = ["a", None, "b", None]
    use_lora(model, rows)
    model(IDS).logsumexp(-1).sum().backward()
    mixed = {n: p.grad.clone() for n, p in model.named_parameters() if ".lora_" in n}
    for name in ("a", "b"):
        model.zero_grad()
        use_lora(model, name)
        model(IDS[[rows.index(name)]]).logsumexp(-1).sum().backward()
        for n, p in model.named_parameters():
            if n.endswith(".lora_A." + name) or n.endswith(".lora_B." + name):
                torch.testing.assert_close(mixed[n], p.grad, rtol=1e-4, atol=1e-5)


def test_a_list_of_another_length_than_the_batch_is_a_value_error(model):
    trained(model, "a")
    use_lora(model, ["a", None])
    with pytest.raises(ValueError, match="2 rows, but the batch has 4"):
        model(IDS)


@pytest.mark.parametrize("name", ["b", ["a", "b", None]])
def test_an_unknown_adapter_is_a_value_error_and_switches_nothing(model, name):
    trained(model, "a")
    with pytest.raises(ValueError, match="no adapter 'b'; it has a"):
        use_lora(model, name)
    assert model.h[0].attn.c_attn.active == "a"


def test_using_none_is_fine_in_a_model_without_adapters(model):
    use_lora(model, None)
    with pytest.raises(ValueError, match="no adapter 'default'; it has none"):
        use_lora(model, "default")


def test_nothing_but_a_new_matrix_is_made_trainable_and_nothing_is_frozen(model, tmp_path):
    trained(model, "a")
    trained(model, "b")
    save_lora(model, tmp_path, "b")
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 == 0)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    for name in ("a", None, "b", ["a", "b", None, "a"]):
        use_lora(model, name)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    add_lora(model, name="c")
    load_lora(model, tmp_path, "d")
    after = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: after[n] for n in flags} == flags
    assert all(after[n] for n in set(after) - set(flags)) and len(after) == len(flags) + 32


def test_generation_is_the_same_with_adapters_mixed_alone_and_merged(model):
    trained(model, "a", seed=1, alpha=20)
    trained(model, "b", seed=2, alpha=20)
    prompts, rows = [[5, 6, 7], [5, 6, 7], [5, 8], [5, 6, 7, 9, 10]], ["a", None, "b", "b"]
    singles = []
    for prompt, name in zip(prompts, rows):
        use_lora(model, name)
        singles += generate(model, [prompt], 8)
    assert singles[0] != singles[1] != singles[2]
    use_lora(model, rows)
    eos = singles[0][2]  # some rows end early, and the others must keep their own adapter
    assert generate(model, prompts, 8, eos_id=eos) == [s[:s.index(eos)] if eos in s else s for s in singles]
    assert generate(model, prompts, 8) == singles
    merged = alone("b", seed=2, alpha=20)
    merge_lora(merged, "b")
    assert generate(merged, prompts[2:], 8) == singles[2:]


# ---------------------------------------------------------------------------------------------
# dtypes


def test_adapters_of_a_bfloat16_model_are_float32_and_its_output_is_bfloat16():
    model = nn.Sequential(nn.Linear(6, 5)).bfloat16()
    trained(model, targets=["0"])
    layer, x = model[0], torch.randn(2, 6).bfloat16()
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    assert A.dtype == B.dtype == torch.float32 and model(x).dtype == torch.bfloat16
    y = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(model(x), (y + F.linear(F.linear(x.float(), A) * 2, B)).bfloat16())
    add_lora(model, targets=["0"], name="other")
    use_lora(model, ["default", "other"])
    assert model(x).dtype == torch.bfloat16
    model(x).sum().backward()
    assert A.grad.dtype == torch.float32


@pytest.mark.parametrize("active", ["default", ["default", None, "default", None]])
def test_autocast_runs_and_agrees_with_float32(model, active):
    trained(model)
    use_lora(model, active)
    expected = model(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IDS)
        logits.float().sum().backward()
    assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()


# ---------------------------------------------------------------------------------------------
# merging


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"targets": ["attn.c_proj", "h.1.*"]}, {"dropout": 0.5}])
def test_merged_logits_equal_unmerged_ones_and_the_layers_are_plain(model, options):
    names, weight = list(model.state_dict()), model.h[1].attn.c_attn.weight
    weight.requires_grad_(False)
    before = digest(model)
    trained(model, **options)
    logits = model(IDS)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), logits, rtol=0, atol=1e-5)
    assert list(model.state_dict()) == names and not same(digest(model), before)
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    assert model.h[1].attn.c_attn.weight is weight and not weight.requires_grad
    assert set(vars(model.h[1].attn.c_attn)) == set(vars(nn.Linear(1, 1)))
    add_lora(model)  # and again, as in Chain of LoRA
    torch.testing.assert_close(model(IDS), logits, rtol=0, atol=1e-5)


def test_merged_logits_equal_unmerged_ones_on_the_shape_of_gpt2_small():
    torch.manual_seed(0)
    model = GPT(GPTConfig()).eval()
    trained(model, r=16, alpha=16)
    ids = torch.randint(0, 50257, (1, 12))
    with torch.no_grad():
        use_lora(model, None)
        base = model(ids)
        use_lora(model, "default")
        logits = model(ids)
        merge_lora(model)
        assert (model(ids) - logits).abs().max() < 1e-4 < 0.1 < (logits - base).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merging_sums_in_float32_and_rounds_once_also_under_autocast(dtype):
    model = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    trained(model, r=8, targets=["0"])
    layer = model[0]
    A, B = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
    exact = layer.weight.detach().double() + 0.75 * B.double() @ A.double()
    with torch.autocast("cpu", torch.bfloat16):
        merge_lora(model)
    assert layer.weight.dtype == dtype
    ulp = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
    assert ((layer.weight.double() - exact).abs() <= ulp * 0.52 + 1e-7).all()


def test_a_float64_weight_is_not_rounded_to_float32_by_merging():
    model = nn.Sequential(nn.Linear(6, 5)).double()
    trained(model, targets=["0"])
    x = torch.randn(2, 6).double()
    y = model(x)
    merge_lora(model)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-13)


def test_merging_twice_and_saving_after_merging_are_errors_in_one_line(model, tmp_path):
    trained(model)
    merge_lora(model)
    after = digest(model)
    for action in (lambda: merge_lora(model), lambda: save_lora(model, tmp_path / "a"), lambda: lora_state_dict(model)):
        with pytest.raises(ValueError, match="no adapter 'default'; it has none .a merged adapter is part") as error:
            action()
        assert "\n" not in str(error.value)
    assert same(digest(model), after) and not (tmp_path / "a").exists()


def test_merging_beside_another_adapter_is_refused_by_its_name(model):
    trained(model, "a", targets=["c_fc"])
    trained(model, "b", targets=["c_attn"])
    before = digest(model)
    with pytest.raises(ValueError, match="also holds b"):
        merge_lora(model, "a")
    assert same(digest(model), before) and len(adapted(model)) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["h.1.mlp.c_fc.lora_A.default", "h.1.mlp.c_fc.lora_B.default", "h.1.mlp.c_fc.weight"])
def test_merging_or_saving_what_is_not_finite_is_refused_and_changes_nothing(model, tmp_path, where, bad):
    trained(model)
    with torch.no_grad():
        model.get_parameter(where)[0, 0] = bad
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n != where}
    with pytest.raises(ValueError, match="h.1.mlp.c_fc.weight NaN or inf"):
        merge_lora(model)
    assert same({n: p.detach() for n, p in model.named_parameters() if n != where}, before)
    if ".lora_" in where:
        with pytest.raises(ValueError, match="h.1.mlp.c_fc holds NaN or inf"):
            save_lora(model, tmp_path / "a")
        assert not (tmp_path / "a").exists()


def test_an_overflow_in_the_weights_dtype_is_refused():
    model = nn.Sequential(nn.Linear(4, 4)).half()
    trained(model, targets=["0"], alpha=1e8)
    with pytest.raises(ValueError, match="0.weight NaN or inf"):
        merge_lora(model)


# ---------------------------------------------------------------------------------------------
# folders


def test_lora_state_dict_is_the_part_of_the_state_dict_that_is_one_adapters(model):
    trained(model, "a")
    trained(model, "b")
    state, full = lora_state_dict(model, "a"), model.state_dict()
    assert set(state) == {n for n in full if n.endswith(".lora_A.a") or n.endswith(".lora_B.a")} and len(state) == 16
    assert all(torch.equal(full[n], t) and not t.requires_grad for n, t in state.items())


@pytest.mark.parametrize("options", [
    {}, {"rslora": True}, {"dropout": 0.25}, {"targets": ["attn.c_proj"]}, {"targets": ["h.1.*", "c_fc"]}, {"alpha": 2.5},
])
def test_a_saved_adapter_is_loaded_with_its_settings_and_not_initialized_anew(model, tmp_path, options):
    trained(model, **options)
    save_lora(model, tmp_path / "a")
    other = random_model()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    load_lora(other, tmp_path / "a", "second")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(other(IDS), model(IDS)) and adapted(other) == adapted(model)
    assert {n: other.get_submodule(n).configs["second"] for n in adapted(other)} == {
        n: model.get_submodule(n).configs["default"] for n in adapted(model)}
    save_lora(other, tmp_path / "b", "second")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_target_modules_are_the_shortest_suffixes_that_hit_nothing_else(model, tmp_path):
    add_lora(model, targets=["c_attn", "mlp.c_proj", "h.1.mlp.c_fc"])
    save_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["1.mlp.c_fc", "c_attn", "mlp.c_proj"]


def test_the_config_says_what_peft_would_otherwise_guess(model, tmp_path):
    add_lora(model, r=4, alpha=8, dropout=0.1, rslora=True)
    save_lora(model, tmp_path, base="gpt2")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.items() >= {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "gpt2", "r": 4, "lora_alpha": 8,
        "lora_dropout": 0.1, "use_rslora": True, "fan_in_fan_out": True, "bias": "none", "inference_mode": True}.items()


def test_a_folder_as_base_is_recorded_so_that_it_is_found_from_anywhere(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("base")
    add_lora(model)
    for base, recorded in (("base", str(tmp_path / "base")), (Path("base"), str(tmp_path / "base")), ("gpt2", "gpt2"),
                           (Path("gpt2"), "gpt2")):
        save_lora(model, "a", base=base)
        assert read_adapter("a")[0]["base_model_name_or_path"] == recorded


def test_a_run_folder_stands_for_the_adapter_in_it(model, tmp_path):
    trained(model)
    save_lora(model, tmp_path / "run" / "adapter")
    other = random_model()
    load_lora(other, tmp_path / "run")
    assert torch.equal(other(IDS), model(IDS))


def test_an_interrupted_save_leaves_no_config_beside_other_weights(model, tmp_path, monkeypatch):
    trained(model)
    save_lora(model, tmp_path / "a")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(lora, "write_json", fail)
    with pytest.raises(OSError):
        save_lora(model, tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter_model.safetensors"]


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(model, tmp_path, missing):
    save_lora(trained(model), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing + ": no such file .an adapter is a folder"):
        load_lora(random_model(), tmp_path)


P = "base_model.model.transformer.h.0.attn.c_attn.lora_"


def edit(folder, config=None, tensors=None):
    """Change a saved adapter: config keys (... deletes), tensors (None deletes)."""
    path = folder / "adapter_config.json"
    changed = {**json.loads(path.read_text()), **(config or {})}
    path.write_text(json.dumps({k: v for k, v in changed.items() if v is not ...}))
    path = folder / "adapter_model.safetensors"
    changed = {**read_safetensors(path), **(tensors or {})}
    write_safetensors(path, {k: v for k, v in changed.items() if v is not None})


@pytest.mark.parametrize("config, tensors, words", [
    ({}, {P + "A.weight": None}, "h.0.attn.c_attn has lora_B only"),
    ({}, {P + "B.weight": None}, "h.0.attn.c_attn has lora_A only"),
    ({}, {P + "A.weight": None, P + "B.weight": None},
     "1 layers are targets but have no tensors: h.0.attn.c_attn"),
    ({}, {"base_model.model.transformer.h.7.mlp.c_fc.lora_A.weight": torch.ones(3, 16),
          "base_model.model.transformer.h.7.mlp.c_fc.lora_B.weight": torch.ones(64, 3)}, "no targets in this model: h.7.mlp.c_fc"),
    ({}, {"base_model.model.transformer.h.0.ln_1.weight": torch.ones(16)},
     "unexpected tensor base_model.model.transformer.h.0.ln_1"),
    ({}, {"h.0.attn.c_attn.lora_A.weight": torch.ones(3, 16)}, "unexpected tensor h.0"),
    ({}, {P + "A.default.weight": torch.ones(3, 16)}, "unexpected tensor"),
    ({}, {"base_model.model.transformer.lm_head.lora_A.weight": torch.ones(3, 16)}, "unexpected tensor base_model.model.transformer.lm_head"),
    ({}, {"base_model.model.h.0.attn.c_attn.lora_A.weight": torch.ones(3, 16)},
     "unexpected tensor base_model.model.h.0"),
    ({}, {P + "A.weight": torch.full((3, 16), math.nan)}, "A.weight is not a finite matrix"),
    ({}, {P + "B.weight": torch.full((48, 3), math.inf)}, "B.weight is not a finite matrix"),
    ({}, {P + "A.weight": torch.ones(3, 16, dtype=torch.int64)}, "A.weight is not a finite matrix"),
    ({}, {P + "A.weight": torch.ones(48)}, "A.weight is not a finite matrix"),
    ({}, {P + "A.weight": torch.ones(2, 16), P + "B.weight": torch.ones(48, 2)},
     "rank 2 in A, 2 in B, 3 in the config"),
    ({}, {P + "B.weight": torch.ones(48, 2)}, "rank 3 in A, 2 in B"),
    ({}, {P + "A.weight": torch.ones(3, 17)}, "(48, 17), the model's (48, 16)"),
    ({}, {P + "B.weight": torch.ones(16, 3)}, "(16, 16), the model's (48, 16)"),
    ({"r": 4}, {}, "4 in the config"), ({"r": 3.0}, {}, "r must be"), ({"r": ...}, {}, "lacks r"),
    ({"lora_alpha": ...}, {}, "lacks lora_alpha"), ({"lora_alpha": None}, {}, "alpha must be"),
    ({"lora_dropout": 2}, {}, "dropout must be"), ({"use_rslora": "yes"}, {}, "rslora must be"),
    ({"target_modules": ...}, {}, "lacks target_modules"),
    ({"target_modules": None}, {}, "target_modules must be"),
    ({"target_modules": ["c_attn", 3]}, {}, "target_modules must be"),
    ({"target_modules": ["c_attn"]}, {}, "6 layers have tensors but are no targets"),
    ({"target_modules": ["c_attn", "c_proj", "c_fc", "q_proj"]}, {}, "'q_proj' hits no linear layer"),
    ({"target_modules": r".*\.c_(attn|fc)"}, {}, "4 layers have tensors but are no targets"),
    ({"target_modules": "(c_attn"}, {}, "target_modules: missing )"),
    ({"rank_pattern": {"(": 3}}, {}, "missing )"),
    ({"rank_pattern": ["c_attn"]}, {}, "has no attribute 'items'"),
    ({"rank_pattern": {"c_attn": 2}}, {}, "2 in the config"),
    ({"peft_type": ...}, {}, "lacks peft_type"), ({"peft_type": "IA3"}, {}, "peft_type 'IA3' is not supported"),
    ({"use_dora": True}, {}, "use_dora is not supported"), ({"bias": "all"}, {}, "bias 'all' is not supported"),
    ({"lora_bias": True}, {}, "lora_bias is not"),
    ({"layer_replication": [[0, 1]]}, {}, "layer_replication is not"),
    ({"target_parameters": ["x"]}, {}, "target_parameters is not"),
    ({"exclude_modules": ["x"]}, {}, "exclude_modules is not"),
    ({"trainable_token_indices": [1]}, {}, "trainable_token_indices is not"),
    ({"layers_to_transform": [0]}, {}, "layers_to_transform is not"),
    ({"modules_to_save": ["ln_f"]}, {}, "modules_to_save is not"),
    ({"init_lora_weights": "pissa"}, {}, "init_lora_weights 'pissa' is not supported"),
    ({"an_option_of_tomorrow": 1}, {}, "an_option_of_tomorrow is not supported"),
])
def test_a_malformed_adapter_is_refused_in_one_line_and_leaves_the_model_as_it_was(tmp_path, config, tensors, words):
    save_lora(alone("default"), tmp_path)
    edit(tmp_path, config, tensors)
    model = random_model()
    with pytest.raises(ValueError) as error:
        load_lora(model, tmp_path)
    assert words in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert not adapted(model)


def header(text):
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize("file, content", [
    ("adapter_model.safetensors", header(b'{"a": {"dtype": "F32", "shape": [0, 4611686018427387904, 4611686018427387904], "data_offsets": [0, 0]}}')),
    ("adapter_model.safetensors", header(b'{"a": {"dtype": "F32", "shape": [0, 1180591620717411303424], "data_offsets": [0, 0]}}')),
    ("adapter_model.safetensors", header(b'{"a\\u001b[2J": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}') + bytes(4)),
    ("adapter_config.json", b"{"), ("adapter_config.json", b"[]"), ("adapter_model.safetensors", b"version https://git-lfs"),
    ("adapter_model.safetensors", b"\x02" + bytes(7) + b"{}"),
])
def test_a_broken_file_is_refused_by_name(tmp_path, file, content):
    save_lora(alone("default"), tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=tmp_path.name) as error:
        load_lora(random_model(), tmp_path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("n_layer", [1, 3])
def test_an_adapter_of_another_depth_is_refused(tmp_path, n_layer):
    save_lora(alone("default"), tmp_path)
    other = GPT(replace(TINY, n_layer=n_layer))
    with pytest.raises(ValueError, match="h.1.attn.c_attn" if n_layer == 1 else "h.2.attn.c_attn"):
        load_lora(other, tmp_path)


def test_loading_under_a_name_that_is_taken_is_refused(model, tmp_path):
    save_lora(trained(model), tmp_path)
    before = lora_state_dict(model)
    with pytest.raises(ValueError, match="already has an adapter 'default'"):
        load_lora(model, tmp_path)
    assert same(lora_state_dict(model), before)


def test_the_file_functions_are_the_same_as_in_gpt():
    for name in ("read_json", "_replacing", "write_json", "_unique", "read_header", "_read_entry", "read_safetensors", "write_safetensors"):
        assert inspect.getsource(getattr(lora, name)) == inspect.getsource(getattr(gpt, name)), name
    assert lora.DTYPES == gpt.DTYPES


# ---------------------------------------------------------------------------------------------
# peft


@pytest.fixture
def hf_model(tmp_path):
    """The random model as transformers has it, anew at each call."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    pytest.importorskip("peft", reason="peft is the oracle")

    def load(model=None):
        (model or random_model()).save_pretrained(tmp_path / "hf")
        return transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()

    return load


def untied():
    return random_model(replace(TINY, tie_word_embeddings=False))


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize("options, make", [
    ({}, random_model), ({"rslora": True}, random_model), ({"targets": ["attn.c_proj", "h.1.mlp.*"]}, random_model),
    ({"alpha": 2.5, "dropout": 0.1}, random_model), ({"targets": ["lm_head", "c_attn"]}, untied),
])
def test_what_we_save_loads_in_peft_with_identical_logits(hf_model, tmp_path, options, make):
    model = make()
    theirs = hf_model(model)
    base = model(IDS)
    save_lora(trained(model, **options), tmp_path / "a", base=str(tmp_path / "hf"))
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    assert (theirs(IDS).logits - model(IDS)).abs().max() < 1e-5 < 0.05 < (model(IDS) - base).abs().max()
    merged = theirs.merge_and_unload()
    merge_lora(model)
    assert (merged(IDS).logits - model(IDS)).abs().max() < 1e-5


@pytest.mark.parametrize("options", [
    {"target_modules": ["c_attn", "c_proj", "c_fc"]}, {"target_modules": ["attn.c_proj"], "use_rslora": True},
    {"target_modules": r"transformer\.h\.1\.(attn|mlp)\.c_(attn|fc)"}, {"target_modules": "all-linear"},
    {"target_modules": ["lm_head", "c_fc"]},
    {"target_modules": ["c_attn", "c_proj"], "rank_pattern": {"attn.c_proj": 2}, "alpha_pattern": {r"h\.1\..*c_attn": 9}},
    {"target_modules": ["c_fc"], "init_lora_weights": "gaussian", "lora_dropout": 0.1},
])
def test_what_peft_saved_loads_here_with_identical_logits(hf_model, tmp_path, options):
    from peft import LoraConfig, get_peft_model

    model = untied() if "lm_head" in options["target_modules"] else random_model()
    base, theirs = model(IDS), hf_model(model)
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", fan_in_fan_out=True, **options))
    torch.manual_seed(0)
    for n, p in theirs.named_parameters():
        if ".lora_B." in n:
            nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    load_lora(model, tmp_path / "a")
    assert (theirs.eval()(IDS).logits - model(IDS)).abs().max() < 1e-5 < 0.05 < (model(IDS) - base).abs().max()


def test_all_linear_and_patterns_are_read_as_peft_reads_them(tmp_path):
    model = alone("default")
    save_lora(model, tmp_path)
    edit(tmp_path, {"target_modules": "all-linear", "alpha_pattern": {"attn.c_proj": 1, "c_proj": 2, r"h\.0\.mlp.c_fc": 3}})
    loaded = untied()
    load_lora(loaded, tmp_path)
    assert {n: loaded.get_submodule(n).configs["default"].alpha for n in adapted(loaded)} == {
        f"h.{i}.{n}": a if i == 0 or n != "mlp.c_fc" else 6
        for i in (0, 1) for n, a in (("attn.c_attn", 6), ("attn.c_proj", 1), ("mlp.c_fc", 3), ("mlp.c_proj", 2))}


# ---------------------------------------------------------------------------------------------
# command line


@pytest.fixture
def two(tmp_path):
    """Two adapters on the disk, and the logits of the base and of each."""
    logits = [random_model()(IDS)]
    for name, options in (("a", {"seed": 1}), ("b", {"seed": 2, "r": 5, "rslora": True, "targets": ["c_fc", "attn.c_proj"]})):
        model = alone(name, **options)
        save_lora(model, tmp_path / name, name)
        logits.append(model(IDS))
    return tmp_path


def delta(folder, name):
    config, A, B = read_adapter(folder)[1].get(name, (LoRAConfig(1, 1), torch.zeros(1), torch.zeros(1)))
    return config.scale * B @ A


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1, -0.25), (0, 2)])
def test_combine_is_the_weighted_sum_of_the_deltas(two, capsys, weights):
    argv = ["combine", "--adapter", f"{two}/a={weights[0]}", "--adapter", f"{two}/b={weights[1]}", "--out", str(two / "c")]
    assert main(argv) == 0
    model = random_model()
    load_lora(model, two / "c")
    for name in adapted(model):
        expected = weights[0] * delta(two / "a", name) + weights[1] * delta(two / "b", name)
        torch.testing.assert_close(delta(two / "c", name), expected, rtol=1e-5, atol=1e-6)
    settings = {n: c for n, (c, _, _) in read_adapter(two / "c")[1].items()}
    assert settings["h.0.attn.c_attn"] == LoRAConfig(3, 3) and settings["h.0.mlp.c_fc"] == LoRAConfig(8, 8)


def test_a_base_that_is_not_recorded_is_not_the_working_directory(two, monkeypatch):
    for name in "ab":
        edit(two / name, {"base_model_name_or_path": None})
    random_model().save_pretrained(two / "model")
    monkeypatch.chdir(two / "model")
    assert main(["combine", "--adapter", f"{two}/a=1", f"{two}/b=1", "--out", str(two / "c")]) == 0
    assert json.loads((two / "c" / "adapter_config.json").read_text())["base_model_name_or_path"] == ""


def test_a_combined_adapter_loads_in_peft_with_identical_logits(two, hf_model):
    theirs = hf_model()
    assert main(["combine", "--adapter", f"{two}/a=0.5", f"{two}/b=-2", "--out", str(two / "c")]) == 0
    from peft import PeftModel

    model = random_model()
    load_lora(model, two / "c")
    assert (PeftModel.from_pretrained(theirs, two / "c").eval()(IDS).logits - model(IDS)).abs().max() < 1e-5


@pytest.mark.parametrize("change, words", [
    ({"config": {"base_model_name_or_path": "gpt2-xl"}}, "different bases"),
    ({"tensors": {"base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight": torch.ones(5, 8)}}, "different shapes in h.0.mlp.c_fc"),
])
def test_adapters_that_do_not_fit_one_base_are_not_combined(two, capsys, change, words):
    edit(two / "b", **change)
    assert main(["combine", "--adapter", f"{two}/a=1", f"{two}/b=1", "--out", str(two / "c")]) == 1
    assert words in capsys.readouterr().err and not (two / "c").exists()


@pytest.mark.parametrize("text", ["a", "a=", "=1", "a=nan", "a=inf", "a=x"])
def test_a_weight_that_is_no_finite_number_is_a_flag_error(capsys, text):
    with pytest.raises(SystemExit) as error:
        main(["combine", "--adapter", text, "--out", "c"])
    assert error.value.code == 2 and "is not FOLDER=WEIGHT" in capsys.readouterr().err


def test_show_lists_the_settings_the_size_and_the_norm_of_each_delta(two, capsys):
    assert main(["show", str(two / "b")]) == 0
    out = capsys.readouterr().out
    count = sum(t.numel() for t in read_safetensors(two / "b" / "adapter_model.safetensors").values())
    assert "base     gpt2\n" in out and "targets  attn.c_proj, c_fc\n" in out
    assert f"size     4 layers, {count:,} parameters, {4 * count:,} bytes\n" in out
    rows = {row[0]: row for row in map(str.split, out.splitlines()[5:])}
    assert list(rows) == ["h.0.attn.c_proj", "h.0.mlp.c_fc", "h.1.attn.c_proj", "h.1.mlp.c_fc"]
    assert rows["h.1.mlp.c_fc"][1:7] == ["64", "x", "16", "5", "6", "2.683"]
    for name, row in rows.items():
        assert float(row[-1]) == pytest.approx(delta(two / "b", name).norm().item(), rel=1e-3)


def test_merge_writes_a_plain_model_folder_with_its_tokenizer(two, capsys):
    random_model().save_pretrained(two / "base")
    for name in ("vocab.json", "merges.txt"):
        (two / "base" / name).write_text(name)
    before = (two / "base" / "model.safetensors").read_bytes()
    (two / "out").mkdir()  # an empty folder is not occupied
    argv = ["merge", "--base", str(two / "base"), "--adapter", str(two / "a"), "--out", str(two / "out")]
    assert main(argv) == 0
    assert sorted(p.name for p in (two / "out").iterdir()) == ["config.json", "merges.txt", "model.safetensors", "vocab.json"]
    assert (two / "out" / "vocab.json").read_text() == "vocab.json"
    assert (two / "base" / "model.safetensors").read_bytes() == before
    torch.testing.assert_close(GPT.from_pretrained(two / "out").eval()(IDS), alone("a", seed=1)(IDS), rtol=0, atol=1e-5)
    assert sorted(p.name for p in two.iterdir()) == ["a", "b", "base", "out"]
    assert main(argv) == 1 and "out is there already" in capsys.readouterr().err


@pytest.mark.parametrize("argv, words", [
    ("show nowhere", "nowhere"), ("merge --base nowhere --adapter a --out out", "nowhere"),
    ("merge --base base --adapter nowhere --out out", "nowhere"), ("merge --base base --adapter a --out base", "is there already"),
    ("merge --base other --adapter a --out out", "no targets in this model"),
    ("combine --adapter a=1 nowhere=1 --out out", "nowhere"), ("combine --adapter a=1 --out b", "is there already"),
    ("combine --adapter a=1e300 --out out", "NaN or inf"), ("show a/adapter_config.json", "no such file"),
])
def test_an_error_is_one_line_and_leaves_nothing_half_written(two, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(two)
    random_model().save_pretrained("base")
    GPT(replace(TINY, n_layer=1)).save_pretrained("other")
    before = sorted(p.name for p in two.rglob("*"))
    assert main(argv.split()) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err and not out
    assert sorted(p.name for p in two.rglob("*")) == before


def test_a_reader_that_stops_early_sees_no_traceback(two):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, str(ROOT / "lora.py"), "show", str(two / "a")], stdout=write,
                          stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr and done.returncode == 0


def test_a_pattern_of_a_rank_begins_at_a_dot(model, tmp_path):
    save_lora(trained(model), tmp_path / "a")
    before = read_adapter(tmp_path / "a")[1]
    edit(tmp_path / "a", {"rank_pattern": {"proj": 99}, "alpha_pattern": {"fc": 99.0, "mlp.c_fc": 12}})
    after = read_adapter(tmp_path / "a")[1]
    assert {n: (c.r, c.alpha) for n, (c, _, _) in after.items()} == {n: (c.r, 12 if "c_fc" in n else c.alpha) for n, (c, _, _) in before.items()}


@pytest.mark.parametrize("given, written", [(7, 7), ([7, 8], 60), (None, 60)])
def test_a_merged_model_keeps_the_end_token_of_its_base(two, given, written):
    random_model().save_pretrained(two / "base")
    path = two / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": given}))
    assert main(["merge", "--base", str(two / "base"), "--adapter", str(two / "a"), "--out", str(two / "out")]) == 0
    assert json.loads((two / "out" / "config.json").read_text())["eos_token_id"] == written


def test_show_lists_block_10_after_block_9(tmp_path, capsys):
    save_lora(trained(random_model(replace(TINY, n_layer=11)), targets="c_fc"), tmp_path / "a")
    assert main(["show", str(tmp_path / "a")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[5:]] == [f"h.{i}.mlp.c_fc" for i in range(11)]
