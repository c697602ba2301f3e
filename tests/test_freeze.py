"""A policy trains exactly its names on any model; the proof fails when it should, only then."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import freeze as freeze_file
from freeze import FreezeError, digests, find_blocks, freeze, resolve, schedule, whole
from gpt import GPT, GPTConfig
from lora import add_lora

M, O, G, U = "check_model", "check_optimizer", "check_gradients", "check_unchanged"
ROOT = Path(__file__).resolve().parents[1]
VOCAB = 29

def small(lora_r=None, seed=0, **config):  # a random GPT-2 of three blocks, with a buffer
    torch.manual_seed(seed)
    sizes = dict(vocab_size=VOCAB, block_size=8, n_layer=3, n_head=2, n_embd=8)
    model = GPT(GPTConfig(**{**sizes, **config}))
    model.register_buffer("steps", torch.zeros(3))
    if lora_r:
        add_lora(model, r=lora_r)
    return model

def loss_of(model, seed=0):
    ids = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

class Run:
    """A model under a plan with its optimizer, as a training script has them."""

    def __init__(self, policy="last_block", lora_r=None, **config):
        self.model, self.steps = small(lora_r, **config), 0
        self.start(policy)

    def start(self, policy):
        self.plan = freeze(self.model, policy)
        self.optimizer = torch.optim.AdamW(self.plan.parameters(), lr=1e-2)
        self.plan.set_modes(self.model.train())

    def backward(self):
        self.steps += 1
        self.optimizer.zero_grad()
        loss_of(self.model, seed=self.steps).backward()

    def train(self, steps=2):
        for _ in range(steps):
            self.backward()
            self.optimizer.step()

    def check(self, which):
        more = [self.steps] if which == G else [self.proof] if which == "resume" else []
        getattr(self.plan, which)(self.optimizer if which == O else self.model, *more)

NORMS, MATRICES = "ln_1 ln_2", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"
of = lambda prefix, modules, leaves="weight bias": {
    f"{prefix}{module}.{leaf}" for module in modules.split() for leaf in leaves.split()}
blocks = lambda *indices, modules=f"{NORMS} {MATRICES}", leaves="weight bias": {
    name for i in indices for name in of(f"h.{i}.", modules, leaves)}
adapters = lambda *indices: blocks(
    *indices, modules=MATRICES, leaves="lora_A.default lora_B.default")
LN_F, EMBEDDINGS, HEAD = of("", "ln_f"), {"wte.weight", "wpe.weight"}, {"lm_head.weight"}
ALL = blocks(0, 1, 2) | LN_F | EMBEDDINGS
BIASES = blocks(0, 1, 2, leaves="bias") | {"ln_f.bias"}
ALL_NORMS = blocks(0, 1, 2, modules=NORMS) | LN_F
UNTIED, ADAPTED = {"tie_word_embeddings": False}, {"lora_r": 2}
POLICIES = [  # policies that mean the same, the model, what trains
    ("all; *", {}, ALL),
    ("last_block; last:1; none,last_block;  none , last_block ", {}, blocks(2) | LN_F),
    ("last_two_blocks; last:2", {}, blocks(1, 2) | LN_F),
    ("first:1; blocks:0; blocks:00-0", {}, blocks(0)),
    ("first:3; blocks:2,0-1; blocks:0-2", {}, blocks(0, 1, 2)),
    ("blocks:0,2; blocks: 0 , 2 ; blocks:2,0", {}, blocks(0, 2)),
    ("blocks:0,2,norms; norms,blocks:0,2", {}, blocks(0, 2) | ALL_NORMS),
    ("embeddings; *w?e.weight", {}, EMBEDDINGS), ("norms; *ln_*", {}, ALL_NORMS),
    ("biases; *.bias", {}, BIASES), ("norms,-biases", {}, ALL_NORMS - BIASES),
    ("all,-blocks:0,2", {}, blocks(1) | LN_F | EMBEDDINGS),
    ("all,-last_block", {}, blocks(0, 1) | EMBEDDINGS),
    ("all, - norms , h.1.ln_2.*", {}, ALL - ALL_NORMS | blocks(1, modules="ln_2")),
    ("head; last_layer; lm_head*; lm_head.weight", UNTIED, HEAD),
    ("all,-head; all,-last_layer", UNTIED, ALL), ("lora; *lora_*", ADAPTED, adapters(0, 1, 2)),
    ("all,-lora", ADAPTED, ALL),
    ("lora,last_block", {"lora_r": 2, "dropout": 0.2}, adapters(0, 1, 2) | blocks(2) | LN_F),
    ("blocks:1", ADAPTED, blocks(1)), ("lora,-h.0.*", ADAPTED, adapters(1, 2)),
    ("head", {"lora_r": 2, **UNTIED}, HEAD)]
POLICIES = [(policy, *rest) for policies, *rest in POLICIES for policy in policies.split(";")]

@pytest.mark.parametrize("policy, config, names", POLICIES, ids=str)
def test_a_policy_trains_exactly_its_names_raises_no_alarm_and_leaves_nothing_to_the_next(
        policy, config, names):
    run = Run(policy, **config)
    model, plan, everything = run.model, run.plan, dict(run.model.named_parameters())
    assert resolve(model, policy) == names and plan.policy == policy
    assert plan.trainable == sorted(names) and plan.frozen == sorted(everything.keys() - names)
    assert {n for n, p in everything.items() if p.requires_grad} == names
    assert list(map(id, plan.parameters())) == [id(p) for n, p in everything.items() if n in names]
    before = {n: p.detach().clone() for n, p in everything.items()}
    run.check(M), run.check(O)
    for _ in range(3):
        run.backward(), run.check(G), run.optimizer.step(), run.check(O)
    run.check(M), run.check(U)
    assert {n for n, p in everything.items() if not torch.equal(p, before[n])} == names
    assert plan.checks == {M: 2, O: 4, G: 3, U: 1}
    freeze(model, "biases")  # clears gradients and flags
    assert {n for n, p in everything.items() if p.requires_grad} == BIASES
    assert all(p.grad is None for p in everything.values())

WRONG = [  # policies (";" between them), the model, what the message says
    ("head;all,-head;last_layer;lm_head*;l*;all,-lm_head*;lm_head.weight", {},
     "lm_head.weight, which is tied to wte.weight: name that, or untie them (--untie-head"),
    ("lora", {}, "'lora' matches no parameter (lora: add adapters first)"),
    ("last_blok;Last_block;ln_f;last;none ,all,none", {}, " is unknown; there are all, none"),
    (";norms,;,norms;all,,norms;all, ;-;all,-;none,", {}, "'' is unknown; there are all, none"),
    ("--norms", {}, "'-norms' is unknown"), ("norms,1", {}, "'norms,1' is unknown"),
    ("blocks:0,x", {}, "'x' is unknown"), ("last_block,none", {}, "'none' is unknown"),
    ("none;all,-all;norms,-ln*,-*ln*", {}, "trains nothing"),
    ("-norms;last_block,-first:1;norms,-norms,-norms", {}, "takes nothing away in '"),
    ("last:4;first:4;first:0;last:0;last:-1;last:1.5;last:;last:1,2;first:1-2;first:-1;"
     "blocks:3;blocks:0-3;blocks:2-1;blocks:0,2-1;blocks:;blocks:a;blocks:0--1;blocks:1-;"
     "blocks:0-99999999999999999999", {}, ": 3 blocks were found; say last:2"),
    ("gradual:1;lisa:1@2", {}, "in finetune.py gradual:K, lisa:K@N")]
WRONG = [(policy, *rest) for policies, *rest in WRONG for policy in policies.split(";")]

@pytest.mark.parametrize("policy, config, says", WRONG, ids=str)
def test_a_wrong_policy_is_a_value_error_that_names_it_and_leaves_the_model_alone(
        policy, config, says):
    model = small(**config)
    model.wpe.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=re.escape(says)):
        freeze(model, policy)
    assert [p.requires_grad for p in model.parameters()] == before

def test_counts_of_the_published_size_equal_their_closed_forms():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    count = lambda policy: sum(model.get_parameter(n).numel() for n in resolve(model, policy))
    assert (count("all"), count("last:1"), count("h.5.*")) == (124_439_808, 7_089_408, 7_087_872)

def build(kind, task="ForCausalLM", **more):  # a tiny random model of transformers
    T = pytest.importorskip("transformers", "5", reason="transformers >= 5 is not installed")
    sizes = dict(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12)
    if kind == "ViT":
        sizes |= dict(image_size=8, patch_size=4)
    elif kind in ("CLIP", "T5"):
        sizes = {}
    else:
        sizes |= dict(vocab_size=31, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return getattr(T, kind + task)(getattr(T, f"{kind}Config")(**{**sizes, **more}))

def vision(name, **sizes):
    """A model of torchvision with five classes."""
    models = pytest.importorskip("torchvision.models", exc_type=Exception,
                                 reason="torchvision is not installed, or not for this torch")
    return getattr(models, name)(num_classes=5, **sizes)

gpt2 = lambda **more: build("GPT2", "LMHeadModel", n_positions=16, **more)
encoder = lambda: nn.TransformerEncoder(
    nn.TransformerEncoderLayer(8, 2, 12), 3, nn.LayerNorm(8), enable_nested_tensor=False)
sequential = lambda: nn.Sequential(
    *(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3)))
LLAMA = "mlp.gate_proj mlp.up_proj mlp.down_proj " + " ".join(f"self_attn.{x}_proj" for x in "qkvo")
LLAMA_NORMS = "input_layernorm post_attention_layernorm"
BERT = " ".join(["attention.self.query attention.self.key attention.self.value",
                 "attention.output.dense intermediate.dense output.dense"])
VIT = "mlp.fc1 mlp.fc2 " + " ".join(f"attention.{x}_proj" for x in "qkvo")
NO, BOTH = "matches no parameter", "weight bias"
OTHERS = {  # build; blocks, their matrices, norms and tensors; the norm after them; other terms
    "GPT-2": (gpt2, "transformer.h.", MATRICES, NORMS, BOTH, "transformer.ln_f",
              {"embeddings": of("transformer.", "wte wpe", "weight"), "head": "tied"}),
    "GPT-2 compiled": (lambda: torch.compile(gpt2(tie_word_embeddings=False)),
                       "_orig_mod.transformer.h.", MATRICES, NORMS, BOTH,
                       "_orig_mod.transformer.ln_f", {"head": {"_orig_mod.lm_head.weight"}}),
    "BERT": (lambda: build("Bert", "ForSequenceClassification"), "bert.encoder.layer.", BERT,
             "attention.output.LayerNorm output.LayerNorm", BOTH, None,
             {"embeddings": of("bert.embeddings.", "word_embeddings position_embeddings "
                               "token_type_embeddings", "weight"), "head": of("", "classifier"),
              "more norms": of("bert.embeddings.", "LayerNorm"),
              "more biases": {"bert.pooler.dense.bias", "classifier.bias"}}),
    "ViT": (lambda: build("ViT", "ForImageClassification"), "vit.layers.", VIT,
            "layernorm_before layernorm_after", BOTH, "vit.layernorm",
            {"embeddings": NO, "head": of("", "classifier"), "more biases": {
                "classifier.bias", "vit.embeddings.patch_embeddings.projection.bias"}}),
    "ViT of torchvision": (
        lambda: vision("VisionTransformer", image_size=8, patch_size=4, num_layers=3, num_heads=2,
                       hidden_dim=8, mlp_dim=12),
        "encoder.layers.encoder_layer_", "self_attention.out_proj mlp.0 mlp.3", "ln_1 ln_2", BOTH,
        "encoder.ln", {"embeddings": NO, "head": of("", "heads.head"), "more in": "self_attention",
                       "more biases": {"conv_proj.bias", "heads.head.bias"}}),
    "nn.TransformerEncoder": (encoder, "layers.", "linear1 linear2 self_attn.out_proj",
                              "norm1 norm2", BOTH, "norm",
                              {"embeddings": NO, "head": NO, "more in": "self_attn"}),
    "nn.Sequential": (sequential, "", "0", "1", BOTH, None, {"embeddings": NO, "head": NO})}
for kind, task, norms, head in (
        ("Llama", "ForCausalLM", "", HEAD), ("Mistral", "ForCausalLM", "", HEAD),
        ("Llama", "ForSequenceClassification", "", {"score.weight"}),
        ("Gemma", "ForCausalLM", "", "tied"),
        ("Qwen3", "ForCausalLM", " self_attn.q_norm self_attn.k_norm", HEAD),
        ("Gemma2", "ForCausalLM", " pre_feedforward_layernorm post_feedforward_layernorm", "tied")):
    OTHERS[kind + task] = (
        lambda kind=kind, task=task: build(kind, task, num_key_value_heads=1, head_dim=4),
        "model.layers.", LLAMA, LLAMA_NORMS + norms, "weight", "model.norm",
        {"embeddings": {"model.embed_tokens.weight"}, "head": head})

def agrees(model, expected):
    """Whether each term means these names, or an error with this text; prints one that does not."""
    for term, names in expected.items():
        try:
            found = resolve(model, term)
        except ValueError as error:
            found = names if isinstance(names, str) and re.search(names, str(error)) else error
        if found != names:
            return print(term, found)
    return True

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_terms_mean_the_same_on_other_models(name):
    make, prefix, matrices, norms, leaves, last_norm, terms = OTHERS[name]

    def block(*indices, modules=f"{matrices} {norms}"):
        found = set().union(*(of(f"{prefix}{i}.", modules, leaves) for i in indices))
        attention = "more in" in terms and modules != norms  # query, key and value in one
        return found | {f"{prefix}{i}.{terms['more in']}.in_proj_{leaf}"
                        for i in indices for leaf in leaves.split() if attention}

    final = of("", last_norm, leaves) if last_norm else set()
    all_norms = final | block(0, 1, 2, modules=norms) | terms.get("more norms", set())
    biases = {n for n in block(0, 1, 2) | all_norms if n.endswith("bias")}
    assert agrees(make(), {"last:2": block(1, 2) | final, "first:1": block(0),
                           "blocks:0,2": block(0, 2), "norms": all_norms, "lora": NO,
                           "biases": biases | terms.get("more biases", set()) or NO,
                           **{term: names for term, names in terms.items() if "more" not in term}})

@pytest.mark.filterwarnings("ignore")
def test_terms_on_mamba_and_on_models_of_two_stacks_which_ask_for_patterns():
    mamba = build("Mamba", state_size=4, tie_word_embeddings=False)
    under = lambda model, name: {n for n, _ in model.named_parameters() if n.startswith(f"{name}.")}
    assert agrees(mamba, {"last:1": under(mamba, "backbone.layers.2") | {"backbone.norm_f.weight"},
                          "head": HEAD, "embeddings": {"backbone.embeddings.weight"}})
    sizes = dict(hidden_size=8, intermediate_size=12, num_attention_heads=2)
    text = dict(vocab_size=31, num_hidden_layers=3, bos_token_id=1, eos_token_id=2, **sizes)
    vision = dict(image_size=8, patch_size=4, num_hidden_layers=2, **sizes)  # shorter, same class
    clip = build("CLIP", "Model", text_config=text, vision_config=vision)
    t5 = build("T5", "ForConditionalGeneration", vocab_size=31, d_model=8, d_kv=4, d_ff=12,
               num_layers=2, num_heads=2)
    t5.lm_head = nn.Linear(8, 31, bias=False)
    assert agrees(t5, {"head": HEAD})  # the model says which
    for model, name in (clip, "text_model.encoder.layers.0"), (t5, "encoder.block.0"):
        which = f"blocks like .*{name}.*: say which by patterns"
        assert agrees(model, {"last:1": which, "blocks:0": which, f"{name}.*": under(model, name)})
    assert agrees(clip, {"head": "blocks like .*: say which by patterns"})

def test_terms_on_a_resnet_whose_stages_are_stacks_of_one_class():
    model = vision("resnet18")
    norms = of("", "bn1").union(*(of(f"layer{i}.{j}.", "bn1 bn2") for i in (1, 2, 3, 4)
                                  for j in (0, 1)), *(of(f"layer{i}.0.downsample.", "1")
                                                      for i in (2, 3, 4)))
    convolutions = [f"{i}.conv{j}.weight" for i in (0, 1) for j in (1, 2)]
    last = {n for n in norms if n.startswith("layer4.")} | {"layer4.0.downsample.0.weight"}
    assert agrees(model, {"head": of("", "fc"), "norms": norms, "embeddings": NO,
                          "last:1": "blocks like layer1.0 and like layer2.0: say which by patterns",
                          "layer4.*": last | {f"layer4.{name}" for name in convolutions}})

class Part(nn.Module):
    """A block with a longer list of modules in it."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))

Unlike = type("Unlike", (Part,), {})
lists = lambda **kinds: nn.ModuleDict({
    name: nn.ModuleList(kind() for _ in range(n)) for name, (kind, n) in kinds.items()})
TWO = "blocks like [ab].0 and like [ab].0: say which by patterns"
NAMED = nn.Sequential()
NAMED.add_module("low", nn.Linear(2, 2)), NAMED.add_module("high", nn.Linear(2, 2))

@pytest.mark.parametrize("model, names", [
    (nn.Sequential(Part(), Part()), ["0", "1"]),
    (nn.Sequential(small()), ["0.h.0", "0.h.1", "0.h.2"]), (NAMED, ["low", "high"]),
    (lists(a=(Part, 3), b=(Unlike, 2)), ["a.0", "a.1", "a.2"]),
    (lists(a=(Unlike, 2), b=(Part, 3)), ["b.0", "b.1", "b.2"]),
    (lists(a=(Part, 3), b=(nn.Dropout, 4)), ["a.0", "a.1", "a.2"]),
    (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "0 blocks were found; say last:2, or a pattern"),
    (lists(a=(Part, 3), b=(Part, 2)), TWO), (lists(a=(Part, 2), b=(Unlike, 2)), TWO),
], ids=range(9))
def test_the_blocks_are_the_longest_list_of_modules_of_one_class(model, names):
    if isinstance(names, str):
        assert agrees(model, {"last:1": names})
    else:
        assert find_blocks(model) == names

def test_terms_mean_no_more_than_they_say():
    model = nn.ModuleDict({"before": nn.LayerNorm(2), "h": nn.ModuleList([nn.Linear(2, 2)]),
                           "pool": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    model["h"].append(nn.Linear(2, 2))  # the norm does not follow the blocks
    assert agrees(small(n_layer=11), {"blocks:1": blocks(1)}) and agrees(model, {
        "last:1": of("h.", "1"), "head": of("", "pool"), "norms": of("", "before norm")})
    assert agrees(nn.ModuleDict({"a": encoder(), "b": encoder(), "out": nn.Linear(8, 2)}), {
        "head": of("", "out"), "last:1": "blocks like a.layers.0 and like b.layers.0: say which"})
    adapted = {"low": nn.Linear(2, 2), "lora_A": nn.Linear(2, 2), "lora_norm": nn.LayerNorm(2)}
    assert agrees(nn.ModuleDict(adapted), {"biases": {"low.bias"}, "norms": NO,
        "head": of("", "low"), "lora": of("", "lora_A lora_norm")})

@pytest.mark.filterwarnings("ignore")
def test_on_a_model_with_peft_adapters_lora_means_these_and_the_other_terms_the_base():
    base = build("Llama", num_key_value_heads=1)
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(base, peft.LoraConfig(
        r=2, target_modules=["q_proj", "lm_head"], lora_dropout=0.5))
    root, adapter = "base_model.model.", "lora_A.default.weight lora_B.default.weight"
    queries = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    block = of(f"{root}model.layers.2.", f"{LLAMA} {LLAMA_NORMS}", "weight")
    block = block - {f"{root}{queries[2]}.weight"} | {f"{root}{queries[2]}.base_layer.weight"}
    assert agrees(model, {"lora": of(root, " ".join(["lm_head", *queries]), adapter),
                          "head": {f"{root}lm_head.base_layer.weight"},
                          "last:1": block | {f"{root}model.norm.weight"}})
    plan = freeze(model, "lora")
    plan.set_modes(model.train())
    drops = [m for n, m in model.named_modules() if n.endswith("lora_dropout.default")]
    assert len(drops) == 4 and all(m.training for m in drops)  # those of adapters that train act
    plan.check_model(model)
    freeze(model, "lora,-*layers.0.*").set_modes(model.train())
    assert [m.training for m in drops] == [False, True, True, True]

def test_parameters_over_the_same_memory_share_a_fate_and_neighbours_in_a_storage_do_not():
    model = small(**UNTIED)  # two parameters, so both are listed: what `is` would not see
    model.lm_head.weight = nn.Parameter(model.wte.weight.data.view(VOCAB, 8))
    tied = "lm_head.weight, which is tied to wte.weight: name that"
    assert agrees(model, {"head": tied, "all,-head": tied, "last_block": blocks(2) | LN_F,
                          "embeddings": EMBEDDINGS | HEAD, "all,-embeddings": ALL - EMBEDDINGS})
    flat, model = torch.randn(12), nn.Module()
    model.p0, model.p1 = nn.Parameter(flat[:6]), nn.Parameter(flat[6:])
    model.p2, model.p3 = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))
    assert agrees(model, {"p1,p3": {"p1", "p3"}})
    with torch.device("meta"):
        assert agrees(small(**UNTIED), {"head": HEAD})
        assert agrees(small(), {"head": "tied to wte.weight", "embeddings": EMBEDDINGS})

def test_other_optimizers_and_dtypes_are_proved_like_adamw_and_float32():
    run = Run()
    run.model.extra = nn.Parameter(torch.empty(0))
    run.start("last_block,extra")
    p = run.plan.parameters()
    run.optimizer = torch.optim.SGD([{"params": p[:3]}, {"params": p[3:]}], lr=0.1, momentum=0.9)
    run.train(), run.check(O), run.check(G), run.check(U)
    run.model.codes = nn.Parameter(torch.arange(5), requires_grad=False)  # of quantized weights
    plan = freeze(run.model.bfloat16(), "h.2.mlp.*")
    for p in plan.parameters():
        p.data += 0.5
    plan.check_unchanged(run.model)
    run.model.wte.weight.data.view(torch.int16)[3, 3] ^= 1
    run.model.codes.data[2] += 1
    with pytest.raises(FreezeError, match="frozen, but changed: codes, wte.weight"):
        plan.check_unchanged(run.model)

def test_a_gradient_may_be_zero_in_step_1_or_in_step_2():
    run = Run("lora", lora_r=2)
    run.backward(), run.check(G)  # of A zero, because B is zero
    assert not run.model.h[0].attn.c_attn.lora_A["default"].grad.any()
    run.optimizer.step(), run.backward()
    run.model.h[0].attn.c_attn.lora_B["default"].grad.zero_()
    run.check(G)

@pytest.mark.parametrize("dtype, size", [(torch.float32, 1e30), (torch.float32, 1e-30),
                                         (torch.float64, 1e100), (torch.float64, 1e-100)])
def test_gradients_too_large_or_small_to_square_and_those_of_rows_are_fine(dtype, size):
    model = nn.Embedding(9, 4, sparse=size > 1).to(dtype)
    plan = freeze(model, "all")
    (model(torch.tensor([1, 1, 3])).sum() * size).backward()
    plan.check_gradients(model, 2)
    model.weight.grad = model.weight.grad * torch.nan
    with pytest.raises(FreezeError, match="not finite: weight; lower the rate"):
        plan.check_gradients(model, 2)

# ---- planted violations

get = lambda run, name: run.model.get_parameter(name)

def add(run, name, value):
    get(run, name).data.view(-1)[0] += value

def data(run, name, value):
    get(run, name).data = value(get(run, name).data)

def swap(run, name):  # for another parameter over the same memory
    module, _, leaf = name.rpartition(".")
    setattr(run.model.get_submodule(module), leaf, nn.Parameter(get(run, name).detach()))

def optimize(run, *more, without=None):
    kept = [p for p in run.plan.parameters() if p is not without]
    run.optimizer.param_groups[0]["params"] = [*kept, *more]

def prove(run, policy, **config):
    run.proof = freeze(small(**config), policy).proof

LORA, DROPS, WPE = {"policy": "lora", "lora_r": 2}, {"dropout": 0.1}, "wpe.weight"
PLAN, MODE, LN = "requires_grad is not as planned: ", "in train mode: ", "h.2.ln_1.weight"
HAS, LACKS = "holds what does not train, or holds it twice: ", "lacks what should train"
OBJECT, NONE = "added, removed or replaced: ", "frozen, but with a gradient where None belongs: "
MOVED, STUCK = "^frozen, but changed: ", "^should have trained, but did not change: "
VIOLATIONS = [  # the check, what it says, arguments of Run, the deed; more in test_public_bugs.py
    (M, PLAN + "h.0.ln_1.bias is True; it was set since", {},
     lambda r: get(r, "h.0.ln_1.bias").requires_grad_(True)),
    (M, OBJECT + "extra;", {}, lambda r: setattr(r.model, "extra", nn.Parameter(torch.ones(2)))),
    (M, OBJECT + "ln_f.bias;", {}, lambda r: setattr(r.model.ln_f, "bias", None)),
    (M, OBJECT + "lm_head.weight, wte.weight;", {}, lambda r: data(r, "wte.weight", torch.clone)),
    (M, OBJECT + "lm_head.weight;", {}, lambda r: swap(r, "lm_head.weight")),
    (M, OBJECT + "lm_head.weight;", UNTIED,
     lambda r: setattr(r.model.lm_head, "weight", r.model.wte.weight)),
    (M, OBJECT + WPE, {}, lambda r: data(r, WPE, lambda w: w[:4])),
    (M, OBJECT + WPE, {}, lambda r: data(r, WPE, lambda w: w.view(torch.int32))),
    (U, OBJECT + "h.2.attn.c_proj.w", {}, lambda r: data(r, "h.2.attn.c_proj.weight", torch.t)),
    (G, OBJECT + LN, {}, lambda r: (swap(r, LN), r.backward())),
    (M, "^buffers changed: steps; call plan.set_modes", {}, lambda r: r.model.steps.add_(1)),
    (M, "^buffers changed: more;", {}, lambda r: r.model.register_buffer("more", torch.ones(3))),
    (M, "^buffers changed: steps;", {}, lambda r: delattr(r.model, "steps")),
    (M, MODE + "h.1.mlp.dropout;", DROPS, lambda r: r.model.h[1].mlp.dropout.train()),
    (M, MODE + "h.0.attn.c_attn, h.0.attn.c_proj, h.0.mlp.c_fc, h.0.mlp.c_proj;",
     {"policy": "lora,-h.0.*", "lora_r": 2}, lambda r: r.model.train()),
    (O, HAS + "ln_f.bias;", {}, lambda r: optimize(r, get(r, "ln_f.bias"))),
    (O, HAS + r"a tensor \(8,\) not in the model;", {}, lambda r: optimize(r, torch.zeros(8))),
    (O, LACKS + r": ln_f.weight; give", {}, lambda r: optimize(r, without=get(r, "ln_f.weight"))),
    (G, NONE + "h.0.ln_1.bias; only backward", {},
     lambda r: (get(r, "h.0.ln_1.bias").requires_grad_(True), r.backward())),
    (G, "the gradient is not finite: ln_f.weight; lower", {},
     lambda r: (r.backward(), get(r, "ln_f.weight").grad[3].fill_(-torch.inf))),
    (G, "^zero gradients: h.0.attn.c_attn.lora_A.default, .* and 7 more; is it left out of", LORA,
     lambda r: (r.backward(), r.check(G), r.backward())),  # no update in between
    (U, MOVED + WPE + "; find", {},  # by one bit
     lambda r: get(r, WPE).data.view(torch.int32)[2, 3].bitwise_xor_(1)),
    (U, STUCK + "ln_f.bias; too low a rate", {},
     lambda r: (optimize(r, without=r.model.ln_f.bias), r.train())),
    (U, STUCK + "h.2.attn.c_attn.bias, .* and 9 more;", {},
     lambda r: (r.optimizer.param_groups[0].update(lr=0.0), r.train())),
    ("resume", "trained 'lora', here 'lora'", LORA, lambda r: prove(r, "lora", lora_r=1)),
    ("resume", MOVED + "h.1.ln_1.bias;", {},
     lambda r: (prove(r, "last_block"), add(r, "h.1.ln_1.bias", 1e-30))),
    ("resume", "^buffers changed: steps;", {},
     lambda r: (prove(r, "last_block"), r.model.steps.add_(1), r.start("last_block")))]

def caught(check, says, arguments, deed):
    """What the check says to a planted violation: "" if it does not notice it."""
    run = Run(**arguments)
    run.check(M), run.check(O)
    if says.startswith(MOVED):
        run.train()
    deed(run)
    before = run.plan.checks.copy()
    try:
        run.check(check)
    except FreezeError as error:
        return str(error) if run.plan.checks == before else "counted as passed"
    return ""

@pytest.mark.parametrize("violation", VIOLATIONS, ids=lambda v: f"{v[0]}: {v[1]}")
def test_a_planted_violation_is_caught_by_name_with_the_remedy(violation):
    assert re.search(violation[1], caught(*violation)), caught(*violation)

def test_planted_violations_are_caught_under_python_O_too():
    code = ("import re, test_freeze as t\n"
            "missed = [v[1] for v in t.VIOLATIONS if not re.search(v[1], t.caught(*v))]\n"
            "print(__debug__, len(t.VIOLATIONS), missed)")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run([sys.executable, "-O", "-W", "ignore", "-c", code], text=True,
                            capture_output=True, env=os.environ | {"PYTHONPATH": paths})
    assert result.stdout.strip() == f"False {len(VIOLATIONS)} []", result.stdout + result.stderr
    assert not re.search(r"^\s*assert\b", (ROOT / "freeze.py").read_text(), re.M)

attn_and_mlp = "h.{0}.attn.resid_dropout h.{0}.mlp.dropout".format

@pytest.mark.parametrize("policy, active", [
    ("last_block", attn_and_mlp(2)), ("embeddings", "drop"), ("h.1.ln_1.*", ""),
    ("h.1.mlp.c_proj.*", "h.1.mlp.dropout"), ("wpe.*,h.1.*", f"drop {attn_and_mlp(1)}"),
    ("all", " ".join(["drop", *map(attn_and_mlp, range(3))]))])
def test_dropout_acts_in_what_trains_and_not_before_it(policy, active):
    model = small(dropout=0.5)
    plan = freeze(model, policy)
    plan.set_modes(model.train())
    modules = dict(model.named_modules())
    on = {n for n, m in modules.items() if isinstance(m, nn.Dropout) and m.training}
    assert on == set(active.split())
    assert all(modules[n.rpartition(".")[0]].training for n in plan.trainable)
    assert [h.attn.training for h in model.h] == [  # it drops out by itself
        any(p.requires_grad for p in h.attn.parameters()) for h in model.h]
    plan.check_model(model)
    plan.set_modes(model.eval())
    assert not any(m.training for m in model.modules())
    plan.check_model(model)

@pytest.mark.parametrize("policy, modes", [("4.*", [0, 0, 0, 0, 1, 1]), ("0.*", [1, 1, 0, 1, 0, 1]),
                                           ("2.*", [0, 0, 1, 1, 0, 1]), ("all", [1] * 6)])
def test_a_module_without_parameters_rests_where_nothing_at_or_before_it_trains(policy, modes):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4),
                          nn.BatchNorm1d(4, affine=False), nn.Linear(4, 4), nn.Dropout(0.5))
    plan = freeze(model, policy)
    if policy != "all":
        with pytest.raises(FreezeError, match="in train mode"):
            plan.check_model(model.train())
    plan.set_modes(model.train())
    assert [m.training for m in model] == list(map(bool, modes))
    plan.check_model(model)
    before = {n: b.clone() for n, b in model.named_buffers()}
    model(torch.randn(8, 4)).sum().backward()
    still = {n for n, b in model.named_buffers() if torch.equal(b, before[n])}
    assert still == {n for n in before if not modes[int(n[0])]}  # statistics move where they may
    plan.check_model(model), plan.check_unchanged(model, trained=False)
    if not modes[2]:
        model[2].running_mean += 1
        with pytest.raises(FreezeError, match="buffers changed: 2.running_mean"):
            plan.check_gradients(model, 1)

def test_train_mode_of_frozen_parts_matters_with_dropout_and_statistics_alone():
    for module in (nn.AlphaDropout(0.1), nn.MultiheadAttention(4, 1, dropout=0.1)):
        assert freeze_file.depends_on_mode(module)
    model = small()  # without either
    freeze(model, "last_block").check_model(model.train())

def test_what_a_trained_parametrization_keeps_beside_its_weight_may_change():
    for norm in (nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm):
        model = small()
        norm(model.h[2].mlp.c_fc)
        plan = freeze(model, "last_block")
        loss_of(model.train()).backward()
        plan.check_model(model)
        plan = freeze(model, "embeddings")
        loss_of(model).backward()
        with pytest.raises(FreezeError, match="buffers changed: h.2.mlp.c_fc.*_u"):
            plan.check_model(model)

def test_digests_are_equal_for_bit_identical_tensors_alone():
    six, digest = torch.arange(6.0), lambda tensor: digests({"t": tensor})["t"]
    tensors = [six, six.reshape(2, 3), six.reshape(2, 3).T, six.double(), six.half(), six.long(),
               torch.tensor([True, False]), torch.tensor(1.0), torch.empty(0), torch.empty(3, 0),
               torch.tensor([torch.nan]), torch.zeros(1).expand(4), -torch.zeros(4),
               torch.zeros(8, dtype=torch.half), torch.zeros(8, dtype=torch.bfloat16)]
    assert len(set(map(digest, tensors))) == len(tensors)
    for tensor in tensors:
        copy = tensor.clone().contiguous()
        assert digest(copy) == digest(tensor)
        for i in range(copy.nbytes):
            copy.view(-1).view(torch.uint8)[i] ^= 1
            assert digest(copy) != digest(tensor)
            copy.view(-1).view(torch.uint8)[i] ^= 1

def test_the_fingerprint_is_of_what_trains_and_not_of_how_it_was_said():
    fingerprint = lambda policy, **config: freeze(small(**config), policy).fingerprint
    same = {fingerprint("last_block"), fingerprint("last:1"), fingerprint("h.2.*,ln_f.*", seed=1)}
    others = {fingerprint("last:2"), fingerprint("last_block", vocab_size=30),
              fingerprint("last_block", lora_r=2), fingerprint("last_block", **UNTIED)}
    assert len(same) == 1 and len(others | same) == 5

def test_a_resumed_run_goes_on_proving_against_the_first_digests():
    first, second = Run("lora,norms", lora_r=2), Run("lora,norms", lora_r=2, seed=1)
    first.train(), first.check(G), first.check(U)
    second.model.load_state_dict(first.model.state_dict())
    second.start("lora,norms")  # frozen only after the checkpoint was loaded
    with pytest.raises(FreezeError, match="did not change"):
        second.check(U)
    second.proof = json.loads(json.dumps(first.plan.proof))
    second.check(O), second.check("resume")
    second.check(U)  # what trains differs from the first run's beginning
    assert second.plan.checks == {G: 1, O: 1, U: 3}
    add(second, "wte.weight", 1)
    with pytest.raises(FreezeError, match="frozen, but changed: wte.weight"):
        second.check(U)

def test_what_fully_shard_has_sharded_is_proved_like_whole_tensors(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    run, mesh = Run("last_block"), init_device_mesh("cpu", (1,))
    unsharded = run.plan.proof["digests"]
    for module in (*run.model.h, run.model):
        fully_shard(module, mesh=mesh)
    run.start("last_block")
    assert run.plan.proof["digests"] == unsharded
    assert agrees(run.model, {"head": "tied to wte.weight", "embeddings": EMBEDDINGS})
    assert type(whole(run.model.wte.weight).data) is torch.Tensor
    run.train(), run.check(G), run.check(M), run.check(O), run.check(U)
    run.model.h[0].ln_1.bias.data.add_(1)
    with pytest.raises(FreezeError, match="frozen, but changed: h.0.ln_1.bias"):
        run.check(U)

@pytest.mark.parametrize("policy, steps, per_epoch, spans", [
    ("last:1", 9, 3, [(0, "last:1")]), ("norms, -biases", 9, 3, [(0, "norms, -biases")]),
    ("gradual:1", 99, 3, [(0, "last:1"), (3, "last:2"), (6, "last:3"), (9, "last:4")]),
    ("gradual:1", 3, 3, [(0, "last:1")]), ("gradual:1", 0, 3, [(0, "last:1")]),
    ("wpe*, gradual:2 ,-ln_f.*", 8, 4, [(0, "wpe*,last:2,-ln_f.*"), (4, "wpe*,last:3,-ln_f.*")]),
    ("blocks:0,2,gradual:2", 8, 9, [(0, "blocks:0,2,last:2")]),
    ("lisa:1@3", 10, 5, [(0, "blocks:1"), (6, "blocks:2"), (9, "blocks:3")]),
    ("lisa:2@07, wpe*", 8, 5, [(0, "blocks:1,2, wpe*"), (7, "blocks:1,3, wpe*")])])
def test_schedule_cuts_a_policy_into_static_spans(policy, steps, per_epoch, spans):
    assert schedule(policy, 4, steps, per_epoch, seed=0) == spans

@pytest.mark.parametrize("policy", [
    "gradual:", "gradual:0", "gradual:4", "gradual:x", "gradual:-1", "gradual:1@2", "gradual:1,2",
    "lisa:1", "lisa:1@", "lisa:1@0", "lisa:1@-2", "lisa:1@x", "lisa:0@2", "lisa:4@2", "lisa:@2",
    "lisa:1@2,3", "-lisa:1@2", "all, - gradual:1", "lisa:1@2,gradual:1", "gradual:1,gradual:2"])
def test_a_wrong_schedule_is_a_value_error_that_says_what_is_right(policy):
    message = f"{policy!r}: say gradual:K or lisa:K@N, once, no -, 0 < K < 4"
    with pytest.raises(ValueError, match=re.escape(message)):
        schedule(policy, 4, 10, 5, seed=0)

def test_lisa_draws_k_blocks_by_seed_and_turn_and_equal_neighbours_are_one_span():
    cut = lambda steps, per_epoch, seed: schedule("lisa:2@3,norms", 4, steps, per_epoch, seed)
    spans = cut(3000, 7, 0)
    assert spans == cut(3000, 9, 0) != cut(3000, 7, 1)
    assert cut(60, 7, 0) == [span for span in spans if span[0] < 60]
    drawn = [re.fullmatch(r"blocks:([0-3]),([0-3]),norms", text).groups() for _, text in spans]
    assert all(a < b for a, b in drawn) and len(set(drawn)) == 6
    steps = [step for step, _ in spans]
    assert steps[0] == 0 and not any(step % 3 for step in steps) and steps == sorted(set(steps))
    assert all(a != b for a, b in zip(drawn, drawn[1:])) and 700 < len(spans) < 900  # 5/6 of 1000

@pytest.mark.parametrize("flags, code, says", [
    ("", 0, "wte 232 of 232|h.0 872 of 872|ln_f 16 of 16|all: trains 2,928 of 2,928 parameters"),
    ("--trainable last_block,biases", 0, "wte 0 of 232|h.0 88 of 872|h.2 872 of 872|ln_f 16 of 16"),
    ("--lora-r 2 --trainable lora", 0, "h.1 256 of 1,128|lora: trains 768 of 3,696 parameters"),
    ("--trainable head", 1, "--untie-head"), ("--trainable last:9", 1, "'last:9'"),
    ("--trainable ,", 1, "'' is unknown"), ("--model no/such/folder", 1, "no/such/folder"),
    ("--lora-r 0", 1, "r is 0"), ("--lora-r x", 2, "--lora-r"), ("--nonsense", 2, "--nonsense")])
def test_the_script_prints_what_a_policy_trains_or_what_is_wrong_in_one_line(
        tmp_path, capsys, flags, code, says):
    small().save_pretrained(tmp_path)
    try:
        assert freeze_file.main(["--model", str(tmp_path), *flags.split()]) == code
    except SystemExit as stop:
        assert stop.code == code
    out, err = capsys.readouterr()
    out = [" ".join(line.split()) for line in out.splitlines()]
    for text in says.split("|"):
        assert any(line.startswith(text) for line in out) if code == 0 else text in err
    assert err == "" if code == 0 else not out and re.fullmatch(".*error: .*\n", err)

def test_copied_alone_it_works_as_a_module_and_as_a_script_says_what_it_lacks(tmp_path):
    shutil.copy(ROOT / "freeze.py", tmp_path)
    for command, code, says in ((["freeze.py"], 1, "error: No module named 'gpt'\n"),
                                (["-c", "import freeze"], 0, "")):
        result = subprocess.run([sys.executable, "-W", "ignore", *command], cwd=tmp_path, text=True,
                                capture_output=True)
        assert (result.returncode, result.stderr, result.stdout) == (code, says, "")
