"""Public bugs in which a freeze, an adapter or a data setting was silently not honoured, and what ends each here.

Each is planted in a few lines, either in a training script with finetune.py's steps and checks (`Run`),
which passes without the bug, or at the function that refuses it or does it right.
"""

import json
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

import finetune
from data import (TEMPLATES, Encoded, encode_example, encode_examples, load_examples, load_tokenizer, sample_order,
                  select_examples, split_stages)
from evaluate import example_key, judge_report, parse_score
from freeze import FreezeError, freeze, resolve
from gpt import GPT, GPTConfig, model_folder
from lora import LoRALinear, add_lora, merge_lora

BOOK = "rasbt/LLMs-from-scratch/"
CH06 = BOOK + "blob/main/ch06/02_bonus_additional-experiments/"
CH07 = BOOK + "blob/main/ch07/01_main-chapter-code/"


def small(lora=(), **config):
    """A random GPT-2 of three blocks, with adapters of these names."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=61, block_size=24, n_layer=3, n_head=2, n_embd=16, **config))
    for name in lora:
        add_lora(model, r=2, name=name)
    return model


class Run:
    """A training script. A bug changes its model, or sets another of its attributes."""

    def __init__(self, policy="last_block", without=(), **model):
        self.model, self.policy, self.without, self.proof = small(**model), policy, without, None
        self.clear, self.step = lambda: self.optimizer.zero_grad(), lambda: self.optimizer.step()
        self.rest = lambda: self.plan.set_modes(self.model)
        self.start()

    def start(self):
        self.plan = freeze(self.model, self.policy)
        self.optimizer = AdamW(self.plan.parameters(), lr=1e-2)

    def set(self, **attributes):
        vars(self).update(attributes)

    def check(self, name, *more):
        if name not in self.without:
            getattr(self.plan, name)(self.optimizer if name == "check_optimizer" else self.model, *more)

    def prove(self, steps=8):
        """Train, with the checks where finetune.py has them."""
        self.model.train()
        self.rest()
        self.check("check_model")
        self.check("check_optimizer")
        if self.proof:
            self.plan.resume(self.model, self.proof)
        for step in range(1, steps + 1):
            switched = self.plan.advance(0, step - 1)
            self.model.train()
            self.rest()
            if switched:
                self.plan.drop_frozen_state(self.optimizer)
                self.check("check_model")
                self.check("check_optimizer")
            self.clear()
            ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(step))
            F.cross_entropy(self.model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
            if step <= 2:
                self.check("check_gradients", step)
            self.step()
        for name in ("check_model", "check_optimizer", "check_unchanged"):
            self.check(name)


# -------------------------------------------------------------------- caught by a check of the proof


def matrices(run, name):
    return [p for n, p in run.model.named_parameters() if "lora_" in n and n.endswith("." + name)]


def optimizer_of_what_has_a_flag(run):
    run.optimizer = AdamW([p for p in run.model.parameters() if p.requires_grad])


def freeze_by_zeroing_in_a_hook(run):
    for name in run.plan.frozen:
        run.plan.named[name].requires_grad_(True).register_hook(torch.zeros_like)
    run.optimizer = AdamW(run.model.parameters(), weight_decay=0.1)


def checkpoint_reentrantly(run):
    for block in run.model.h:
        block.forward = lambda x, forward=block.forward, **options: checkpoint(
            lambda x: forward(x, **options), x, use_reentrant=True)


def cut_the_graph(run):
    layer = run.model.h[1].mlp.c_fc
    layer._adapt = lambda name, x, y: y + LoRALinear._adapt(layer, name, x, torch.zeros_like(y)).detach()


def normalize_with_batch_statistics(run):
    block = run.model.h[0]
    block.norm = nn.BatchNorm1d(16, affine=False)
    block.register_forward_hook(lambda module, inputs, y: module.norm(y.flatten(0, 1)).view_as(y))
    run.start()
    run.rest = lambda: None


LORA = {"policy": "lora", "lora": ["default"]}
TWO = {"policy": "*.task", "lora": ["style", "task"]}
LISA = {"policy": "lisa:1@2"}
CAUGHT = [  # title, where on github.com, the check, what it says, arguments of Run, the deed
    ("B5 LLMs-from-scratch frozen parameters in the optimizer", CH06 + "additional_experiments.py",
     "check_optimizer", "holds what is frozen", {}, lambda run: run.set(optimizer=AdamW(run.model.parameters()))),
    ("B7 LLaVA-NeXT#508 whole model trained beside LoRA", "LLaVA-VL/LLaVA-NeXT/issues/508",
     "check_model", "requires_grad is True: h.0.attn.c_attn.bias", LORA, lambda run: run.model.requires_grad_(True)),
    ("B8 mlx-vlm#2178 resume does not freeze the base", "Blaizzy/mlx-vlm/issues/2178",
     "resume", "the checkpoint trained 'lora', which on this model is not 'all'", LORA | {"policy": "all"},
     lambda run: run.set(proof=freeze(small(lora=["default"]), "lora").proof)),
    ("B9 unsloth-zoo#939 reloaded model left trainable", "unslothai/unsloth-zoo/pull/939",
     "check_model", "replaced since freezing: h.0.attn", LORA, lambda run: run.set(model=small(["default"]))),
    ("B10 peft#282 reloaded adapter has nothing trainable", "huggingface/peft/issues/282",
     "check_model", "replaced since freezing: .*lora_A.default", LORA,
     lambda run: run.model.h[0].attn.c_attn.lora_A.update({"default": nn.Parameter(torch.ones(2, 16), False)})),
    ("B11 peft#1374 set_adapter unfreezes frozen adapters", "huggingface/peft/issues/1374",
     "check_model", "is True: .*lora_A.style", TWO, lambda run: [p.requires_grad_() for p in matrices(run, "style")]),
    ("B12 peft#3580 loading a second adapter trains the first", "huggingface/peft/issues/3580",
     "check_model", "requires_grad is True: .*lora_A.style", TWO,
     lambda run: [p.requires_grad_(name == "style") for name in ("style", "task") for p in matrices(run, name)]),
    ("B13 fromage#18 resized embeddings are trainable again", "kohjingyu/fromage/issues/18",
     "check_model", "replaced since freezing: wte", {}, lambda run: setattr(run.model, "wte", nn.Embedding(64, 16))),
    ("B16 Isaac-GR00T#56 the flag that should train only ever freezes", "NVIDIA/Isaac-GR00T/issues/56",
     "check_model", "requires_grad is False: h.2.attn", {}, lambda run: run.model.h[2].requires_grad_(False)),
    ("B17 axolotl#3416 frozen by zeroing gradients, still decayed", "axolotl-ai-cloud/axolotl/pull/3416",
     "check_unchanged", "frozen, but changed", {"without": ["check_model", "check_optimizer", "check_gradients"]},
     freeze_by_zeroing_in_a_hook),
    ("B18 torchtitan#3886 frozen parameters registered again", "pytorch/torchtitan/pull/3886",
     "check_model", "replaced since freezing: ln_f.weight", {"policy": "embeddings"},
     lambda run: setattr(run.model.ln_f, "weight", nn.Parameter(run.model.ln_f.weight.detach()))),
    ("B19 LMFlow#726 LISA optimizer built from requires_grad", "OptimalScale/LMFlow/issues/726",
     "check_optimizer", "the optimizer lacks what should train: h", LISA, optimizer_of_what_has_a_flag),
    ("B20 ms-swift#10140 LISA layers drawn later never move", "modelscope/ms-swift/pull/10140",
     "check_unchanged", "did not change: h", LISA | {"without": ["check_optimizer"]}, optimizer_of_what_has_a_flag),
    ("B21 LMFlow#768 LISA keeps AdamW's state of every layer", "OptimalScale/LMFlow/issues/768",
     "check_optimizer", r"the optimizer's state is \d+ bytes, expected <= 0: h", LISA,
     lambda run: setattr(run.plan, "drop_frozen_state", lambda optimizer: None)),
    ("B22 open-unlearning#178 LoRA under reentrant checkpointing", "locuslab/open-unlearning/issues/178",
     "check_gradients", "has no gradient: h.0", LORA | {"policy": "lora,ln_f.*"}, checkpoint_reentrantly),
    ("B23 trl#6700 an empty optimizer", "huggingface/trl/issues/6700",
     "check_optimizer", "lacks what should train", LORA, lambda run: run.optimizer.param_groups[0]["params"].clear()),
    ("B24 trl#3926 preparing the model freezes its adapters", "huggingface/trl/issues/3926",
     "check_model", "requires_grad is False: .*lora_A", LORA, lambda run: run.model.requires_grad_(False)),
    ("B27 aprender#2232 LoRA's forward cuts the graph", "paiml/aprender/pull/2232",
     "check_gradients", "has no gradient: h.1.mlp.c_fc.lora_A.default", LORA, cut_the_graph),
    ("B29 prime-rl#1375 a check that matches no name under a prefix", "PrimeIntellect-ai/prime-rl/pull/1375",
     "check_model", "no longer in the model: h.0", {}, lambda run: run.set(model=nn.Sequential(run.model))),
    ("B30 pytorch#150610 frozen gradients zero instead of None", "pytorch/pytorch/issues/150610",
     "check_gradients", "frozen, but with a gradient where None belongs: h.0", {},
     lambda run: run.set(clear=lambda: [setattr(p, "grad", torch.zeros_like(p)) for p in run.model.parameters()])),
    ("B30 Muon#54 an optimizer that decays without a gradient", "KellerJordan/Muon/issues/54",
     "check_unchanged", "frozen, but changed: h.0.*weight", {},
     lambda run: run.set(step=lambda: [p.data.mul_(0.999) for p in run.model.parameters()])),
    ("B35 chemprop#952 frozen layers drop out", "chemprop/chemprop/pull/952",
     "check_model", "in train mode .*: drop, h.0, h.1", {"dropout": 0.1}, lambda run: run.set(rest=lambda: None)),
    ("B35 ultralytics#8753 frozen BatchNorm goes on counting", "ultralytics/ultralytics/pull/8753",
     "check_model", "buffers changed since freezing: h.0.norm", {}, normalize_with_batch_statistics),
]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # all that torch says of B22
@pytest.mark.parametrize("check, says, how, plant", [bug[2:] for bug in CAUGHT], ids=[bug[0] for bug in CAUGHT])
def test_a_public_bug_is_caught_by_its_check_and_without_it_there_is_no_alarm(check, says, how, plant):
    Run(**how).prove()
    run = Run(**how)
    plant(run)
    with pytest.raises(FreezeError, match=says) as caught:
        run.prove()
    assert check in [frame.name for frame in caught.traceback]


# -------------------------------------------------------------------- refused before anything trains


def eleven_hundred_rows_for_alpaca(folder):
    file = folder / "gpt2-finetune" / "data" / "alpaca.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([{"instruction": "Say it.", "output": "It."}] * 1100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder))
        load_examples("alpaca")


REFUSED = [  # title, where on github.com, what the ValueError says, the deed
    ("B1 LLMs-from-scratch#506 a mode that does not exist", BOOK + "pull/506",
     "unknown term 'last_2_blocks'", lambda _: freeze(small(), "last_2_blocks")),
    ("B3 LLMs-from-scratch 1,100 rows trained as alpaca's 52k", CH07 + "exercise_experiments.py",
     "1100 records, 52002 expected", eleven_hundred_rows_for_alpaca),
    ("B14 LlamaFactory#8993 an option that the mode ignores", "hiyouga/LlamaFactory/issues/8993",
     "--lora-r 2: no adapter trains under --trainable last_block",
     lambda _: finetune.prepare_plan(finetune.parse_args("--lora-r 2 --trainable last_block --batch-size 1".split()),
                                     small(lora=["default"]), [Encoded([1, 2, 3], 1)])),
    ("B15 ms-swift#7226 a misspelt layer to freeze", "modelscope/ms-swift/issues/7226",
     r"'h.0.mpl.\*' matches no parameter", lambda _: freeze(small(), "all,-h.0.mpl.*")),
    ("B25 unsloth#9326 embeddings dropped from LoRA's targets", "unslothai/unsloth/issues/9326",
     "target 'wte' hits no linear layer", lambda _: add_lora(small(), targets=["c_attn", "wte"])),
    ("B26 lerobot#3459 resume wraps a new adapter over the loaded one", "huggingface/lerobot/issues/3459",
     "already has an adapter 'default'", lambda _: add_lora(small(lora=["default"]))),
    ("B28 mlx-examples#940 training with 0.000% trainable", "ml-explore/mlx-examples/pull/940",
     "'lora' matches no parameter", lambda _: freeze(small(), "lora")),
    ("B32 transformers#11903 the head trains its tied embedding", "huggingface/transformers/issues/11903",
     "lm_head.weight, the same tensor as wte.weight", lambda _: freeze(small(), "head")),
    ("B33 peft#2777 adapters on tied layers drift apart", "huggingface/peft/issues/2777",
     "lm_head shares its weight with another module", lambda _: add_lora(small(), targets=["lm_head"])),
    ("B41 axolotl Spectrum without its ranking trains everything",
     "axolotl-ai-cloud/axolotl/blob/main/src/axolotl/integrations/spectrum/__init__.py",
     "spectrum:K ranks by the weights, and h.0.ln_1.weight holds NaN or inf",
     lambda _: freeze(small().apply(lambda m: [p.data.fill_(torch.nan) for p in m.parameters()]), "spectrum:1")),
]


@pytest.mark.parametrize("says, plant", [bug[2:] for bug in REFUSED], ids=[bug[0] for bug in REFUSED])
def test_a_public_bug_is_refused_before_anything_trains(says, plant, tmp_path):
    with pytest.raises(ValueError, match=says):
        plant(tmp_path)


# -------------------------------------------------------------------- cannot happen


DONE_RIGHT = []  # title, where on github.com, what holds


def done_right(title, link):
    return lambda holds: DONE_RIGHT.append((title, link, holds))


@done_right("B2 LLMs-from-scratch nested layers get the other LoRA class", CH06 + "additional_experiments.py")
def every_nested_layer_gets_the_asked_kind_of_lora():
    add_lora(model := small(), r=4, alpha=8, rslora=True)
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert [m.configs["default"].scale for m in layers] == [8 / 4**0.5] * 12


@done_right("B4 LLMs-from-scratch#821 LoRA scaled by alpha", BOOK + "issues/821")
def delta_is_alpha_over_r_times_ba():
    layer, x = nn.Linear(3, 5), torch.randn(7, 3)
    plain = layer(x)
    add_lora(nn.ModuleDict({"layer": layer}), r=4, alpha=6, targets=["layer"])
    A, B = layer.lora_A["default"], nn.init.normal_(layer.lora_B["default"])
    torch.testing.assert_close(layer(x) - plain, 6 / 4 * x @ A.T @ B.T)


@done_right("B6 LLMs-from-scratch LoRA on the vocabulary's head, unsaid", CH07 + "exercise-solutions.ipynb")
def lora_has_its_closed_form_count():
    for tied in (True, False):
        model = small(lora=["default"], tie_word_embeddings=tied)
        count = sum(model.get_parameter(name).numel() for name in resolve(model, "lora"))
        assert count == 3 * 2 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))


@done_right("B31 LLMs-from-scratch judge replies dropped from the mean", CH07 + "ollama_evaluate.py")
def unread_judge_replies_widen_the_bounds():
    assert parse_score("I would rather not say.") is None
    answers = [{"id": i, "instruction": "Say it.", "output": "It.", "model_response": "It."} for i in range(4)]
    report = judge_report({example_key(answer): 80 for answer in answers[:3]}, answers)
    assert (report["n_scored"], report["n"], report["mean"], report["bounds"]) == (3, 4, 80, [60, 85])


@done_right("B34 LoRA#61 the merge never happened", "microsoft/LoRA/issues/61")
def merging_keeps_the_function_and_happens_once():
    run, ids = Run(**LORA), torch.arange(20).view(2, 10)
    plain = run.model(ids)
    for p in matrices(run, "default"):
        nn.init.normal_(p, std=0.3)
    adapted = run.model(ids)
    merge_lora(run.model)
    torch.testing.assert_close(run.model.eval()(ids), adapted)
    assert not torch.allclose(plain, adapted) and not any("lora" in n for n, _ in run.model.named_parameters())
    with pytest.raises(ValueError, match="no adapter 'default'"):
        merge_lora(run.model)


@done_right("B37 trl#1550 template not found after merges of BPE", "huggingface/trl/issues/1550")
def targets_are_the_response_and_the_end():
    tokenizer = load_tokenizer(model_folder("tiny"))
    for template in TEMPLATES:
        for output in ("\n\nYes.", ":", " no ", "### Response:\n"):
            example = {"instruction": "Answer \n", "input": "", "output": output}
            encoded = encode_example(example, tokenizer, template)
            assert tokenizer.decode(encoded.ids[encoded.n_prompt:]) == output + "<|endoftext|>"
    with pytest.raises(ValueError, match="none of 1 examples has a response token"):
        encode_examples([example], tokenizer, max_length=4)


@done_right("B38 mlx-lm#1544 the mean of micro-batches' means", "ml-explore/mlx-lm/pull/1544")
def every_token_counts_the_same_in_accumulation():
    batch, gradients = [Encoded(list(range(4 + 5 * i)), 2) for i in range(4)], []
    for size in (4, 1):
        model, args = small(), finetune.parse_args(["--batch-size", str(size)])
        n = sum(len(example.ids) - example.n_prompt for example in batch)
        finetune.gradients(model, batch, n, args, finetune.Machine(torch.device("cpu")))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


@done_right("B39 axolotl#3707 a curriculum that is shuffled", "axolotl-ai-cloud/axolotl/pull/3707")
def easy_records_come_first():
    levels = [7 * i % 30 for i in range(30)]
    order = sample_order([1] * 30, split_stages(levels, 3, False, seed=0), per_step=5, epochs=2, seed=0)
    steps = [{levels[i] for i in indices} for _, indices in order]  # four to a stage: two epochs of two
    assert set().union(*steps[:4]) == set(range(10)) and set().union(*steps[4:8]) == set(range(10, 20))


@done_right("B40 Superfiltering a share of 52,002 rows of any data",
            "tianyi-lab/Superfiltering/blob/main/code_ifd/select_data.py")
def no_more_records_are_selected_than_there_are():
    encoded = [Encoded(list(range(3 + i)), 2) for i in range(6)]
    for how in ("longest", "shortest", "random", "ifd"):
        assert [len(select_examples(encoded, how, n, 0, lambda: [0.5] * 6)) for n in (4, 5200)] == [4, 6]


@pytest.mark.parametrize("holds", [bug[2] for bug in DONE_RIGHT], ids=[bug[0] for bug in DONE_RIGHT])
def test_a_public_bug_cannot_happen(holds):
    holds()


def test_every_bug_is_here_but_one_with_a_link_that_fits_its_title():
    bugs = {title: link for title, link, *_ in CAUGHT + REFUSED + DONE_RIGHT}
    for title, link in bugs.items():
        project, _, number = title.split()[1].partition("#")
        assert re.search(f"/{project}/(issues|pull)/{number}$" if number else f"/{project}/blob/", link), title
    assert len(bugs) == len(CAUGHT + REFUSED + DONE_RIGHT)
    # B36 is about parameters that are split over several devices.
    assert {int(title.split()[0][1:]) for title in bugs} == set(range(1, 42)) - {36}
