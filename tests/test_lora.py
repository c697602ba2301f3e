"""lora.py against closed forms, against itself merged and unmerged, and against peft both ways."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations, prune

from gpt import GPT, GPTConfig, read_safetensors, write_safetensors
from lora import (LoRALinear, add_lora, load_lora, lora_state_dict, main, merge_lora, save_lora,
                  use_lora)

TINY = GPTConfig(vocab_size=61, block_size=24, n_layer=2, n_head=2, n_embd=16)
IDS = torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(7))
ALL = ["c_attn", "c_proj", "c_fc"]

def random_model(seed=0, tied=True):  # far from the init: each term of the pass is visible
    torch.manual_seed(seed)
    model = GPT(replace(TINY, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model

def trained(model, name="default", seed=1, **options):
    """Add an adapter whose B is not zero."""
    torch.manual_seed(seed)
    add_lora(model, name=name, **{"r": 3, "alpha": 6, **options})
    for n, tensor in lora_state_dict(model, name).items():
        if "lora_B" in n:
            tensor.normal_(std=0.2)
    return model

def one_layer(dtype=torch.float32, **options):
    """A model of one adapted layer, 6 -> 5, its plain layer, A and B."""
    plain = nn.Linear(6, 5).to(dtype)
    model = nn.Sequential(nn.Linear(6, 5).to(dtype))
    model.load_state_dict({"0." + n: t for n, t in plain.state_dict().items()})
    trained(model, targets=["0"], **options)
    return model, plain, model[0].lora_A["default"], model[0].lora_B["default"]

def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}

def adapted(model):
    return {n for n, m in model.named_modules() if isinstance(m, LoRALinear)}

@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0, 3)])
@pytest.mark.parametrize("rslora, scale", [(False, 8 / 4), (True, 8 / 2)])
def test_the_delta_is_alpha_over_r_or_over_its_root_times_b_a(shape, rslora, scale):
    model, plain, A, B = one_layer(torch.float64, r=4, alpha=8, rslora=rslora)
    x = torch.randn(*shape, 6).double()
    y = F.linear(x, plain.weight + scale * B @ A, plain.bias)
    torch.testing.assert_close(model(x), y)
    expected = torch.autograd.grad(y.pow(2).sum(), (A, B))
    torch.testing.assert_close(torch.autograd.grad(model(x).pow(2).sum(), (A, B)), expected)
    assert A.dtype == B.dtype == torch.float64 and B.any()

def test_a_new_adapter_is_active_kaiming_uniform_times_zero_and_leaves_the_base_where_it_was():
    model = random_model()
    model.wte.weight.requires_grad_(False)
    before, modules, base = model(IDS), dict(model.named_modules()), dict(model.named_parameters())
    torch.manual_seed(1)
    add_lora(model, r=3, targets=["c_fc", "*.c_proj", "c_attn"], name="new")
    after = dict(model.named_parameters())
    assert torch.equal(model(IDS), before) and len(adapted(model)) == 8
    assert all(after[n] is p for n, p in base.items())
    assert all(model.get_submodule(n) is m for n, m in modules.items())
    new = {f"{n}.lora_{kind}.new" for n in adapted(model) for kind in "AB"}
    assert after.keys() - base.keys() == new == lora_state_dict(model, "new").keys()
    assert {n for n, p in after.items() if not p.requires_grad} == {"wte.weight"}
    torch.manual_seed(1)
    for block in model.h:  # drawn in the model's order
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            A = nn.init.kaiming_uniform_(torch.empty(3, layer.in_features), a=math.sqrt(5))
            assert torch.equal(layer.lora_A["new"], A)
            assert torch.equal(layer.lora_B["new"], torch.zeros(layer.out_features, 3))
    with torch.device("meta"):
        model = GPT(GPTConfig())
    add_lora(model, r=16)
    assert sum(p.numel() for p in lora_state_dict(model).values()) == 16 * 16 * 12 * 768

@pytest.mark.parametrize("targets, hits", [
    (ALL, 8), (["attn.c_proj"], 2), (["h.1.attn.c_attn"], 1), (["*.attn.c_*", "h.0.*"], 6)])
def test_targets_are_suffixes_or_patterns(targets, hits):
    model = random_model()
    add_lora(model, targets=targets)
    assert len(adapted(model)) == hits

def changed(change):
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(8, 8)}), "a_b": nn.Linear(8, 8)})
    change(model)
    return model

def conv1d():
    transformers = pytest.importorskip("transformers", reason="transformers has Conv1D")
    return nn.Sequential(transformers.pytorch_utils.Conv1D(8, 8))

@pytest.mark.parametrize("make, target, words", [
    (random_model, "wte", "target wte hits no"), (random_model, "proj", "target proj hits no"),
    (lambda: changed(nn.Module.eval), "a.c", "target a\\.c hits no linear layer of a.b, a_b"),
    (random_model, "lm_head", "lm_head shares its weight: untie it (tie_word_embeddings=False)"),
    (random_model, "*", "lm_head shares its weight"), (conv1d, "0", "0 is Conv1D, not nn.Linear"),
    (lambda: changed(lambda m: setattr(m.a.b.weight, "data", m.a_b.weight.data)), "b", "untie it"),
    (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), "linear1", "1: its weight is"),
    (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), "out_proj", "not nn.Linear"),
    (lambda: changed(lambda m: parametrizations.weight_norm(m.a.b)), "b", "b is ParametrizedLin"),
    (lambda: changed(lambda m: prune.random_unstructured(m.a.b, "weight", 0.5)), "b", "its weigh"),
    (lambda: changed(lambda m: vars(m.a.b).update(forward=m.a.b.forward)), "b", "a.b: its weigh")])
def test_a_layer_that_would_pass_its_adapter_by_is_a_value_error(make, target, words):
    model = make()
    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError) as error:
        add_lora(model, targets=["*c_attn", target] if make is random_model else [target])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert [n for n, _ in model.named_parameters()] == names and not adapted(model)

def test_each_row_of_a_mixed_batch_has_the_logits_and_gradients_of_its_adapter_alone():
    b = {"name": "b", "seed": 2, "r": 5, "rslora": True, "targets": ["mlp.c_proj", "h.0.*"]}
    model = trained(trained(random_model(), "a"), **b)
    rows = ["b", None, "a", "b"]
    use_lora(model, rows)
    mixed = model(IDS)
    mixed.logsumexp(-1).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if "lora_" in n}
    alone = {"a": trained(random_model(), "a"), "b": trained(random_model(), **b),
             None: random_model()}
    for name, single in alone.items():
        use_lora(model, name)
        assert torch.equal(model(IDS), single(IDS))
        mine = [i for i, n in enumerate(rows) if n == name]
        logits = single(IDS[mine])
        torch.testing.assert_close(mixed[mine], logits, rtol=0, atol=2e-6)
        logits.logsumexp(-1).sum().backward()
        for n, p in single.named_parameters():
            if "lora_" in n:
                torch.testing.assert_close(grads[n], p.grad, rtol=1e-4, atol=1e-5)

def test_a_wrong_name_or_number_of_rows_is_a_value_error_and_switches_nothing():
    model = random_model()
    use_lora(model, None)
    add_lora(model, name="a", targets=["c_attn"])
    for name in ("b", ["a", "b", None]):
        with pytest.raises(ValueError, match="no adapter 'b'"):
            use_lora(model, name)
        assert model.h[0].attn.c_attn.active == "a"
    with pytest.raises(ValueError, match="adapter 'a' is there already"):
        add_lora(model, name="a", targets=["c_fc"])
    assert len(adapted(model)) == 2
    use_lora(model, ["a", None])
    with pytest.raises(ValueError, match="2 rows, the batch has 4"):
        model(IDS)

@pytest.mark.parametrize("options", [
    {"rslora": True, "dropout": 0.5}, {"targets": ["lm_head", "attn.c_proj"]}])
def test_merged_logits_equal_unmerged_ones_and_the_layers_are_plain(options):
    model = random_model(tied="lm_head" not in options.get("targets", []))
    names, weight = list(model.state_dict()), model.h[1].attn.c_proj.weight.requires_grad_(False)
    logits = trained(model, **options)(IDS)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no adapter 'default'"):
        merge_lora(model)
    assert list(model.state_dict()) == names and not adapted(model)
    assert model.h[1].attn.c_proj.weight is weight and not weight.requires_grad
    assert set(vars(model.h[1].attn.c_proj)) == set(vars(nn.Linear(1, 1)))
    add_lora(model)  # and again, as in Chain of LoRA
    torch.testing.assert_close(model(IDS), logits, rtol=0, atol=1e-5)

def test_merging_one_adapter_leaves_the_others_on_the_new_base():
    model = trained(random_model(), "a", targets=["c_attn", "mlp.c_proj"])
    before = weights(trained(model, "b", seed=2, targets=["c_attn", "c_fc"]))
    merge_lora(model, "a", weight=-0.5)
    after = weights(model)
    assert after.keys() == {n for n in before if not n.endswith(".a")}
    for layer in (n.removesuffix(".lora_A.a") for n in before if n.endswith(".lora_A.a")):
        delta = -0.5 * 2 * before[f"{layer}.lora_B.a"] @ before[f"{layer}.lora_A.a"]
        W = before[f"{layer}.weight"] + delta
        torch.testing.assert_close(after.pop(f"{layer}.weight"), W)
    assert all(torch.equal(tensor, before[n]) for n, tensor in after.items())
    assert type(model.h[0].mlp.c_proj) is nn.Linear
    use_lora(model, "b")
    logits = model(IDS)
    merge_lora(model, "b")
    torch.testing.assert_close(model(IDS), logits, rtol=0, atol=1e-5)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_adapters_are_float32_or_wider_output_keeps_its_dtype_and_merging_rounds_once(dtype):
    model, plain, A, B = one_layer(dtype, r=8)
    x = torch.randn(2, 6).to(dtype)
    for active in ("default", ["default", "default"]):
        use_lora(model, active)
        assert torch.equal(model(x), (plain(x) + 0.75 * (x.to(A.dtype) @ A.T) @ B.T).to(dtype))
    model(x).sum().backward()
    assert A.grad.dtype == B.grad.dtype == torch.promote_types(dtype, torch.float32)
    exact = plain.weight.double() + 0.75 * B.double() @ A.double()
    with torch.autocast("cpu", torch.bfloat16):
        merge_lora(model)
    assert model[0].weight.dtype == dtype
    error = (model[0].weight.double() - exact).abs()
    assert (error <= torch.finfo(dtype).eps * exact.abs() * 0.52 + 1e-9).all()

@pytest.mark.parametrize("base, recorded", [("base", "{}/base"), ("gpt2", "gpt2")])
def test_the_config_says_what_peft_would_otherwise_guess(tmp_path, monkeypatch, base, recorded):
    monkeypatch.chdir(tmp_path)
    random_model().save_pretrained("base")
    options = {"r": 4, "alpha": 8, "dropout": 0.1, "rslora": True, "targets": ["c_fc"]}
    save_lora(trained(random_model(), **options), "a", base=base)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text()) == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8,
        "base_model_name_or_path": recorded.format(tmp_path), "lora_dropout": 0.1,
        "use_rslora": True, "target_modules": ["h.0.mlp.c_fc", "h.1.mlp.c_fc"],
        "fan_in_fan_out": True}
    model, state = random_model(), torch.get_rng_state()
    load_lora(model, "a", "2nd")
    assert torch.equal(torch.get_rng_state(), state)
    save_lora(model, "b", "2nd", base)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()

A, B = (f"base_model.model.transformer.h.0.attn.c_attn.lora_{kind}.weight" for kind in "AB")
ODD = "is missing, extra, misshapen or not finite"

@pytest.mark.parametrize("config, tensors, words", [
    ({}, {A: None}, "lora_A.default " + ODD), ({}, {B: torch.ones(16, 3)}, "lora_B.default " + ODD),
    ({}, {A: torch.ones(3, 17)}, "lora_A.default " + ODD), ({"r": 4}, {}, "lora_A.default " + ODD),
    ({}, {A: torch.full((3, 16), math.nan)}, "c_attn.lora_A.default " + ODD),
    ({}, {A.replace("h.0", "h.7"): torch.ones(3, 16)}, "h.7.attn.c_attn.lora_A.default " + ODD),
    ({}, {A.removeprefix("base_model.model."): torch.ones(3, 16)}, "transformer.h.0.attn"),
    ({}, {"base_model.model.transformer.h.0.ln_1.weight": torch.ones(16)}, "h.0.ln_1.default"),
    ({"target_modules": [*ALL, "q_proj"]}, {}, "target q_proj hits no linear layer"),
    ({"target_modules": r".*\.c_(attn|fc)"}, {}, "c_proj.lora_A.default " + ODD),
    *(({key: None}, {}, f"lacks {key}") for key in "r lora_alpha peft_type target_modules".split()),
    *(({key: value}, {}, f"{key} {value!r} is not supported") for key, value in [
        ("use_dora", True), ("bias", "all"), ("init_lora_weights", "pissa"), ("peft_type", "IA3"),
        ("rank_pattern", {"x": 2}), ("modules_to_save", ["ln_f"]), ("new", 1)])])
def test_what_peft_passes_over_is_refused_and_changes_nothing(tmp_path, config, tensors, words):
    save_lora(trained(random_model()), tmp_path)
    path, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    edited = read_safetensors(weights) | tensors
    write_safetensors(weights, {n: t for n, t in edited.items() if t is not None})
    model = random_model()
    with pytest.raises(ValueError) as error:
        load_lora(model, tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value) and not adapted(model)

@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize("options", [
    {"target_modules": ["attn.c_proj", "c_fc"], "use_rslora": True},
    {"target_modules": r"transformer\.h\.1\.(attn|mlp)\.c_(attn|fc)"},
    {"target_modules": "all-linear", "task_type": None}, {"target_modules": ALL},
    {"target_modules": ["lm_head"], "init_lora_weights": "gaussian", "lora_dropout": 0.1}])
def test_peft_and_lora_load_and_merge_what_the_other_has_saved(tmp_path, options):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    peft = pytest.importorskip("peft", reason="peft is the oracle")
    model = random_model(tied="lm_head" not in options["target_modules"])
    model.save_pretrained(tmp_path / "hf")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    options = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "fan_in_fan_out": True, **options}
    base, theirs = model(IDS), peft.get_peft_model(theirs, peft.LoraConfig(**options)).eval()
    for n, p in theirs.named_parameters():
        if ".lora_B." in n:
            nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    path = tmp_path / "a" / "adapter_config.json"  # shorter, and all-linear not as a list
    config = {k: v for k, v in json.loads(path.read_text()).items() if v}
    path.write_text(json.dumps(config | {"target_modules": options["target_modules"]}))
    load_lora(model, tmp_path / "a")
    logits = theirs(IDS).logits
    assert (logits - model(IDS)).abs().max() < 1e-5 < 0.05 < (model(IDS) - base).abs().max()
    save_lora(model, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(theirs.unload(), tmp_path / "b").eval()
    assert (again(IDS).logits - logits).abs().max() < 1e-5
    merge_lora(model)
    assert (again.merge_and_unload()(IDS).logits - model(IDS)).abs().max() < 1e-5

@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A base with a tokenizer and an end token, another base, and two adapters, one in a run."""
    monkeypatch.chdir(tmp_path)
    random_model().save_pretrained("base", eos_id=7)
    random_model(seed=1).save_pretrained("other")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "base" / name).write_text(name)
    save_lora(trained(random_model(), r=2), "a/adapter", base="base")
    for name in ("b", "pickle"):
        save_lora(trained(random_model(), seed=2, rslora=True, targets=["c_fc"]), name)
    (tmp_path / "pickle/adapter_model.safetensors").rename("pickle/adapter_model.bin")
    return tmp_path

def test_merge_writes_the_weighted_sum_as_a_model_folder_with_its_tokenizer(folders, capsys):
    argv = "merge --base base --adapter a=0.5 --adapter b=-2e0 a/adapter --out out".split()
    assert main(argv) == 0
    files = {"config.json", "merges.txt", "model.safetensors", "vocab.json"}
    assert {p.name for p in (folders / "out").iterdir()} == files
    assert (folders / "out" / "vocab.json").read_text() == "vocab.json"
    assert json.loads((folders / "out" / "config.json").read_text())["eos_token_id"] == 7
    model = random_model()
    for folder, weight in (("a", 1.5), ("b", -2)):
        load_lora(model, folder, folder)
        merge_lora(model, folder, weight)
    torch.testing.assert_close(GPT.from_pretrained("out").eval()(IDS), model(IDS))
    assert main(argv) == 1 and "--out out is there already" in capsys.readouterr().err
    assert main(["show", "a"]) == 0 and "('r', 2)\n" in capsys.readouterr().out

@pytest.mark.parametrize("argv, code, words", [
    ("show nowhere", 1, "nowhere/adapter_config.json"),
    ("show pickle", 1, "no pickle/adapter_model.safetensors (load adapter_model.bin with peft"),
    ("merge --base nowhere --adapter a --out out", 1, "nowhere"),
    ("merge --base base --adapter a=x --out out", 1, "'x'"),
    ("merge --base other --adapter a --out out", 1, "base: give that as --base"),
    ("merge --base base --out out", 2, "--adapter"), ("", 2, "command")])
def test_an_error_is_one_line_and_writes_nothing(folders, capsys, argv, code, words):
    before = sorted(folders.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main(argv.split()))
    out, err = capsys.readouterr()
    assert "error: " in err and err.count("\n") == 1 and words in err and not out
    assert stop.value.code == code and sorted(folders.rglob("*")) == before
