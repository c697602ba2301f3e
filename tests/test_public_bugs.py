"""Public bugs in which a freeze, an adapter or a data setting was silently not honoured.

Each is planted in a training script with finetune.py's checks (`Run`), which passes without the
bug, or at the function that refuses it or does it right. tests/README.md has the table, with links.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

import data
from data import TEMPLATES, encode_example, encode_examples, load_parts, load_tokenizer
from freeze import FreezeError, freeze, resolve, schedule
from gpt import model_folder
from lora import LoRALinear, add_lora, merge_lora
from test_freeze import ADAPTED, G, LORA, M, O, OBJECT, PLAN, U, UNTIED, loss_of, small, swap
from test_lora import IDS, random_model, trained

class Run:
    """A training script; a bug changes its model, or sets another of its attributes."""

    def __init__(self, policy="last_block", adapters=(), without=(), **config):
        self.model, self.without, self.proof = small(**config), without, None
        for name in adapters:
            add_lora(self.model, r=2, name=name)
        self.spans = [text for _, text in schedule(policy, 3, 12, 4, seed=0)]
        self.optimizer_over = lambda: AdamW(self.plan.parameters(), lr=1e-2)
        self.clear, self.step = lambda: self.optimizer.zero_grad(), lambda: self.optimizer.step()
        self.rest, self.deed = lambda: self.plan.set_modes(self.model), lambda run: None

    def check(self, name, *more):
        if name not in self.without:
            argument = self.optimizer if name == "check_optimizer" else self.model
            getattr(self.plan, name)(argument, *more)

    def prove(self):
        """Train, with the checks where finetune.py has them."""
        for span, policy in enumerate(self.spans):
            self.plan = freeze(self.model, policy)
            self.optimizer = self.optimizer_over()
            if span == 0:
                self.deed(self)
            if self.proof:
                self.plan.resume(self.model, self.proof)
            self.model.train()
            self.rest()
            self.check("check_model")
            self.check("check_optimizer")
            for step in range(1, 5):
                self.clear()
                loss_of(self.model, seed=step).backward()
                if step <= 2:
                    self.check("check_gradients", step)
                self.step()
            for name in ("check_model", "check_optimizer", "check_unchanged"):
                self.check(name)

def same_optimizer_in_all_spans(run):  # of what has the flag when it is built, as in a Trainer
    optimizer = run.optimizer
    run.optimizer_over = lambda: optimizer

def state_of_all_that_ever_trained(run):
    fresh = run.optimizer_over
    run.optimizer_over = lambda: [o := fresh(), o.state.update(run.optimizer.state)][0]

def zero_in_a_hook(run):
    for name in run.plan.frozen:
        run.model.get_parameter(name).requires_grad_(True).register_hook(torch.zeros_like)
    run.optimizer = AdamW(run.model.parameters(), weight_decay=0.1)

def checkpoint_reentrantly(run):
    for block in run.model.h:
        block.forward = lambda *x, forward=block.forward: checkpoint(
            forward, *x, use_reentrant=True)

def cut_the_graph(run):
    layer = run.model.h[1].mlp.c_fc
    layer.adapt = lambda n, x, y: y + LoRALinear.adapt(layer, n, x, torch.zeros_like(y)).detach()

def normalize_with_batch_statistics(run):
    block = run.model.h[0]
    block.norm = nn.BatchNorm1d(8, affine=False)
    block.register_forward_hook(lambda module, inputs, y: module.norm(y.flatten(0, 1)).view_as(y))
    run.rest = lambda: None
    run.plan = freeze(run.model, "last_block")
    run.optimizer = AdamW(run.plan.parameters())

LISA, TWO = {"policy": "lisa:1@4"}, {"policy": "*.task*", "adapters": ["style", "task"]}
CAUGHT = [  # bug, the check that catches it, what it says, arguments of Run, the deed
    ("B5", O, "holds what does not train", {},
     lambda run: setattr(run, "optimizer", AdamW(run.model.parameters()))),
    ("B7", M, PLAN + "h.0.attn.c_attn.bias is True", LORA,
     lambda run: run.model.requires_grad_(True)),
    ("B8", "resume", "the checkpoint trained 'lora', here 'all'", LORA | {"policy": "all"},
     lambda run: setattr(run, "proof", freeze(small(**ADAPTED), "lora").proof)),
    ("B9", M, OBJECT + "h.0.attn", LORA, lambda run: setattr(run, "model", small(**ADAPTED))),
    ("B10", M, OBJECT + "h.0.attn.c_attn.lora_A.default;", LORA,
     lambda run: run.model.h[0].attn.c_attn.lora_A.update(
         {"default": nn.Parameter(torch.ones(2, 8), False)})),
    ("B11", M, PLAN + ".*lora_A.style is True", TWO,
     lambda run: [p.requires_grad_("lora_" in n) for n, p in run.model.named_parameters()]),
    ("B12", M, PLAN + ".*lora_A.style is True, .*lora_A.task is False", TWO,
     lambda run: [p.requires_grad_("style" in n) for n, p in run.model.named_parameters()]),
    ("B13", M, OBJECT + "wte.weight", {},
     lambda run: setattr(run.model, "wte", nn.Embedding(32, 8))),
    ("B16", M, PLAN + "h.2.attn.c_attn.bias is False", {},
     lambda run: run.model.h[2].requires_grad_(False)),
    ("B17", U, "frozen, but changed: h.0.attn.c_attn.w", {"without": [M, O, G]}, zero_in_a_hook),
    ("B18", M, OBJECT + "ln_f.bias;", {"policy": "embeddings"}, lambda run: swap(run, "ln_f.bias")),
    ("B19", O, "holds what does not train.*: h", LISA, same_optimizer_in_all_spans),
    ("B20", U, "should have trained, but did not change: h", LISA | {"without": [O]},
     same_optimizer_in_all_spans),
    ("B21", O, "has state of what does not train: h", LISA, state_of_all_that_ever_trained),
    ("B22", G, "no gradient: h.0", LORA | {"policy": "lora,ln_f.*"}, checkpoint_reentrantly),
    ("B23", O, "lacks what should train", LORA,
     lambda run: run.optimizer.param_groups[0]["params"].clear()),
    ("B24", M, PLAN + ".*lora_A.default is False", LORA,
     lambda run: run.model.requires_grad_(False)),
    ("B27", G, "no gradient: h.1.mlp.c_fc.lora_A.default", LORA, cut_the_graph),
    ("B29", M, OBJECT + "0.h.0", {}, lambda run: setattr(run, "model", nn.Sequential(run.model))),
    ("B30", G, "frozen, but with a gradient where None belongs: h.0", {},
     lambda run: setattr(run, "clear", lambda: [
         setattr(p, "grad", torch.zeros_like(p)) for p in run.model.parameters()])),
    ("B30", U, "frozen, but changed: h.0.*weight", {}, lambda run: setattr(
        run, "step", lambda: [p.data.mul_(0.999) for p in run.model.parameters()])),
    ("B35", M, "in train mode: drop, h.0.attn, .*; call plan.set_modes", {"dropout": 0.1},
     lambda run: setattr(run, "rest", lambda: None)),
    ("B35", M, "in train mode: h.0.norm;", {}, normalize_with_batch_statistics)]

@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's word on B22
@pytest.mark.parametrize("bug, check, says, how, plant", CAUGHT, ids=lambda v: str(v)[:40])
def test_a_public_bug_is_caught_by_its_check_and_without_it_there_is_no_alarm(
        bug, check, says, how, plant):
    Run(**how).prove()
    run = Run(**how)
    run.deed = plant
    with pytest.raises(FreezeError, match=says) as caught:
        run.prove()
    assert check in [frame.name for frame in caught.traceback]

REFUSED = [  # bug, what the ValueError says, the deed
    ("B1", "'last_2_blocks' is unknown; there are", lambda: freeze(small(), "last_2_blocks")),
    ("B15", r"'h.0.mpl.\*' matches no parameter", lambda: freeze(small(), "all,-h.0.mpl.*")),
    ("B25", "target '?wte'? hits no", lambda: add_lora(small(), targets=["c_attn", "wte"])),
    ("B26", "adapter 'default'", lambda: add_lora(small(**ADAPTED))),
    ("B28", "'lora' matches no parameter", lambda: freeze(small(), "lora")),
    ("B32", "lm_head.weight, which is tied to wte.weight", lambda: freeze(small(), "head")),
    ("B33", "lm_head shares its weight", lambda: add_lora(small(), targets=["lm_head"]))]

@pytest.mark.parametrize("bug, says, plant", REFUSED, ids=lambda v: str(v)[:40])
def test_a_public_bug_is_refused_before_anything_trains(bug, says, plant):
    with pytest.raises(ValueError, match=says):
        plant()

def test_B3_a_data_set_is_never_read_from_the_file_of_another(tmp_path, monkeypatch):
    file = tmp_path / "gpt2-finetune" / "data" / "book.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([{"instruction": "Say it.", "output": "It."}] * 40))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(data, "GITHUB", "http://127.0.0.1:9")
    assert load_parts("book").rows == 40  # stands in run.json
    with pytest.raises(OSError, match="127.0.0.1:9"):
        load_parts("alpaca")

@pytest.mark.parametrize("rslora, scale", [(False, 6 / 4), (True, 6 / 4**0.5)])
def test_B2_B4_every_layer_gets_the_asked_lora_whose_delta_is_alpha_over_r_times_BA(rslora, scale):
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 5))), torch.randn(7, 3)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    plain = [layer(x) for layer in layers]
    add_lora(model, r=4, alpha=6, targets=["*"], rslora=rslora)
    for layer, before in zip(layers, plain):
        A, B = layer.lora_A["default"], nn.init.normal_(layer.lora_B["default"])
        torch.testing.assert_close(layer(x) - before, scale * x @ A.T @ B.T)

def test_B6_lora_has_its_closed_form_count_without_the_head():
    model = small(**ADAPTED, **UNTIED)
    count = sum(model.get_parameter(name).numel() for name in resolve(model, "lora"))
    assert count == 3 * 2 * ((8 + 24) + (8 + 8) + (8 + 32) + (32 + 8))

def test_B34_merging_keeps_the_function_and_happens_once():
    model, plain = trained(random_model()), random_model()(IDS)
    adapted = model(IDS)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), adapted)
    assert not torch.allclose(plain, adapted) and "lora" not in str(model.state_dict().keys())
    with pytest.raises(ValueError, match="no adapter 'default'"):
        merge_lora(model)

def test_B37_targets_are_the_response_and_the_end_by_construction():
    tokenizer = load_tokenizer(model_folder("tiny"))
    for output in ("\n\nYes.", ":", " no ", "### Response:\n"):
        example = {"instruction": "Answer \n", "input": "", "output": output}
        for encoded in (encode_example(example, tokenizer, template) for template in TEMPLATES):
            supervised = encoded.ids[encoded.n_prompt:]
            assert tokenizer.decode(supervised) == output + "<|endoftext|>"
    with pytest.raises(ValueError):  # nothing supervised is left
        encode_examples([example], tokenizer, max_length=4)

def test_every_bug_of_the_table_has_a_link_and_a_test():
    here, table = Path(__file__).read_text(), (Path(__file__).parent / "README.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| B")]
    assert [row[0] for row in rows] == [f"| B{i}" for i in range(1, 42)]
    for bug, _, link, _, test in rows:
        assert "](https://github.com/" in link and re.search(r"test_\w+\.py", test), bug
        planted = re.search(rf'\("{bug[2:]}", |def test_(B\d+_)?{bug[2:]}_', here)
        assert bool(planted) == ("test_public_bugs.py" in test), bug
