"""recipes.py in the trainers themselves, and what these frameworks still do to a freeze.

Each passes and trains what the policy says, and a planted violation of each check is caught. Then
public bugs, in the version installed: the proof speaks if and only if they happen there."""

import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import recipes
from freeze import FreezeError, freeze, whole
from gpt import GPT, GPTConfig

pytestmark = pytest.mark.filterwarnings("ignore")
BATCHES = [{"input_ids": ids, "labels": ids} for ids in torch.randint(
    31, (4, 2, 8), generator=torch.Generator().manual_seed(0))]
ROWS = [{key: ids[0] for key, ids in batch.items()} for batch in BATCHES]

def package(name):
    """The module, or a skip."""
    return pytest.importorskip(name, reason=f"{name} is not installed")

class Ours(nn.Module):
    """Our GPT with the names of transformers', giving .loss."""
    def __init__(self):
        super().__init__()
        self.transformer = GPT(GPTConfig(31, 16, 3, 2, 8, dropout=0.1))
    def forward(self, input_ids, labels):
        logits = self.transformer(input_ids[:, :-1])
        return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))

def theirs():
    """A tiny GPT-2 of transformers."""
    T = package("transformers")
    T.logging.set_verbosity_error()
    torch.manual_seed(0)
    return T.GPT2LMHeadModel(T.GPT2Config(vocab_size=31, n_positions=16, n_layer=3, n_head=2,
                                          n_embd=8, bos_token_id=1, eos_token_id=2))

def run_trainer(model, callbacks, path, sft=False, resume=None, **more):
    """transformers' Trainer, or TRL's SFTTrainer, for four steps; returns it."""
    trl, T = package("trl") if sft else None, package("transformers")
    args = dict(output_dir=path, max_steps=4, learning_rate=1e-2, use_cpu=True, report_to=[],
                save_strategy="no", disable_tqdm=True, per_device_train_batch_size=2) | more
    how = {"model": model, "callbacks": callbacks, "train_dataset": ROWS}
    if sft:
        words = {str(i): i for i in range(31)}
        core = package("tokenizers").Tokenizer(package("tokenizers").models.WordLevel(words, "0"))
        rows = [{"input_ids": row["input_ids"].tolist()} for row in ROWS]
        how |= {"train_dataset": package("datasets").Dataset.from_list(rows),
                "processing_class": T.PreTrainedTokenizerFast(
                    tokenizer_object=core, eos_token="2", pad_token="2")}
    trainer = (trl.SFTTrainer(args=trl.SFTConfig(**args), **how) if sft else
               T.Trainer(args=T.TrainingArguments(**args), **how))
    trainer.train(resume_from_checkpoint=resume)
    return trainer

given = lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)

def run_lightning(model, callbacks, **more):
    """Lightning's Trainer, with a validation after every epoch."""
    L = package("lightning.pytorch")

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner, self.backbone = model, getattr(model, "backbone", None)
        def training_step(self, batch, index):
            return self.inner(**batch).loss
        validation_step = training_step
        def configure_optimizers(self):
            return given(self)

    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar",
                         "enable_model_summary"), False)
    loader = torch.utils.data.DataLoader(BATCHES, batch_size=None)
    L.Trainer(max_steps=4, accelerator="cpu", callbacks=callbacks, **off, **more).fit(
        Module(), loader, loader)

def run(trainer, model, policy, path):
    if trainer == "lightning":
        package("lightning.pytorch")
        run_lightning(model, [recipes.lightning_callback(policy)])
    elif trainer in ("Trainer", "SFTTrainer"):
        run_trainer(model, [recipes.trainer_callback(policy)], path, trainer == "SFTTrainer")
    else:
        package("accelerate" if trainer == "accelerated" else "torch")
        getattr(recipes, trainer)(model, policy, BATCHES, lr=1e-2)

TRAINERS = ["plain", "ddp", "sharded", "accelerated", "Trainer", "SFTTrainer", "lightning"]
make = lambda trainer: theirs() if trainer.endswith("Trainer") else Ours()

@pytest.mark.parametrize("trainer", TRAINERS)
def test_each_trainer_trains_what_the_policy_says_and_passes(trainer, tmp_path, group, monkeypatch):
    model, plans, modes = make(trainer), [], []
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    monkeypatch.setattr(recipes, "freeze", lambda *how: plans.append(freeze(*how)) or plans[-1])
    for block in model.transformer.h:
        block.register_forward_hook(lambda block, *_: modes.append(block.training))
    run(trainer, model, "last:1,-biases", tmp_path)
    after = {n: whole(p.detach()) for n, p in model.named_parameters()}
    trained = {n for n in after if not torch.equal(after[n], before[n])}
    assert trained == {n for n in after if re.search(r"\.h\.2\..*weight|ln_f.weight", n)}
    assert plans[0].checks == {"check_model": 3, "check_optimizer": 3, "check_gradients": 2,
                               "check_unchanged": 1, "updates": 2}
    assert (False, False, True) * 4 == tuple(modes)[-12:] or trainer == "lightning"
    assert not model._forward_pre_hooks or trainer == "sharded"  # FSDP's own

def cut(net):
    net.h[2].ln_2.register_forward_hook(lambda module, x, y: y.detach())

def drop(optimizer, parameter):
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p is not parameter]

PLANTED = [  # after which update, what is done; what is said, and after how many updates
    (1, lambda net, o: net.wpe.weight.requires_grad_(),
     r"requires_grad is not as planned: \S*wpe.weight is True; it was set since freeze", 1),
    (1, lambda net, o: drop(o, net.ln_f.bias),
     r"the optimizer lacks what should train: \S*ln_f.bias; give it plan.parameters", 1),
    (3, lambda net, o: drop(o, net.ln_f.bias), r"the optimizer lacks what should train", 4),
    (1, lambda net, o: cut(net),
     r"trainable, but no gradient: \S*h.2.ln_2.bias, \S*h.2.ln_2.weight; is it left out", 1),
    (1, lambda net, o: net.wpe.weight.data.add_(1),
     r"frozen, but changed: \S*wpe.weight; find what else writes", 4),
    (4, lambda net, o: net.h[2].ln_2.bias.data.zero_(),
     r"should have trained, but did not change: \S*h.2.ln_2.bias; too low a rate", 4)]

@pytest.mark.parametrize("after, deed, says, updates", PLANTED, ids=lambda v: str(v)[:30])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_planted_violation_is_caught_when_it_happens(
        trainer, after, deed, says, updates, tmp_path, group):
    model, done = make(trainer), []

    def plant(optimizer, *_):
        done.append(1)
        if len(done) == after:
            deed(model.transformer, optimizer)

    hook = register_optimizer_step_post_hook(plant)
    try:
        with pytest.raises(FreezeError, match=says):
            run(trainer, model, "last:1", tmp_path)
    finally:
        hook.remove()
    assert len(done) == updates

@pytest.mark.parametrize("how", [{"warmup_steps": 2}, {"max_steps": 1}], ids=str)
def test_warmup_from_zero_a_single_step_and_others_callbacks_raise_no_alarm(tmp_path, capsys, how):
    class Awake(package("transformers").TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            model.train()  # as after text to look at

    run_trainer(adapted(lora_dropout=0.1), [recipes.trainer_callback("lora"), Awake()], tmp_path,
                **how)
    run_lightning(Ours(), [recipes.lightning_callback("last:1")], precision="64-true")
    assert capsys.readouterr().out.count("proved: ") == 2

@pytest.mark.parametrize("deed", [cut, lambda net: None], ids=["cut", "right"])
def test_a_resumed_trainer_is_checked_like_a_new_one(tmp_path, deed):
    how = dict(path=tmp_path, save_strategy="steps", save_steps=2)
    run_trainer(theirs(), [recipes.trainer_callback("last:1")], **how)
    model, wrong = theirs(), pytest.raises(FreezeError, match="no gradient: .*ln_2.bias")
    deed(model.transformer)
    with wrong if deed is cut else nullcontext():
        run_trainer(model, [recipes.trainer_callback("last:1")], resume=f"{tmp_path}/checkpoint-2",
                    **how)

# ---- public bugs: each gives whether it happens in this version, and what the proof is asked then

def adapted(targets=("c_attn",), **more):
    """A GPT-2 of transformers with PEFT's LoRA."""
    peft = package("peft")
    config = peft.LoraConfig(r=2, target_modules=[*targets], task_type="CAUSAL_LM", **more)
    return peft.get_peft_model(theirs(), config)

def loaded(path):
    """The same from its folder, frozen, as PEFT has it by default."""
    adapted().save_pretrained(path)
    return package("peft").PeftModel.from_pretrained(theirs(), path)

flags = lambda model: {n for n, p in model.named_parameters() if p.requires_grad}

def frozen_blocks_are_set_to_train_mode(path):
    model, seen = theirs(), []
    plan = freeze(model, "last:1")
    plan.set_modes(model.train())
    model.transformer.h[0].register_forward_hook(lambda block, *_: seen.append(block.training))
    run_trainer(model, [], path)
    return any(seen), lambda: plan.check_model(model)

def to_freeze_the_head_freezes_its_tied_embedding(path):
    model = theirs()
    model.lm_head.requires_grad_(False)
    return not model.transformer.wte.weight.requires_grad, lambda: freeze(model, "all,-head")

def checkpointing_cuts_the_adapters_gradients(path):
    how = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    model = adapted()
    run_trainer(model, [], path, **how)
    stuck = not any(p.any() for n, p in model.named_parameters() if "lora_B" in n)
    return stuck, lambda: run_trainer(adapted(), [recipes.trainer_callback("lora")], path, **how)

def norms_in_bf16_never_move(path):
    model, slow = theirs().bfloat16(), {"learning_rate": 1e-4}
    run_trainer(model, [], path, **slow)
    return bool((model.transformer.ln_f.weight == 1).all()), lambda: run_trainer(
        theirs().bfloat16(), [recipes.trainer_callback("norms")], path, **slow)

def an_adapter_trains_nothing(path, make=loaded):
    trainer = run_trainer(make(path), [], path, sft=True)
    held = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    plan = freeze(trainer.model, "lora")
    return held == 0, lambda: plan.check_optimizer(trainer.optimizer)

def activating_frozen_adapters_thaws_them(path):
    model = loaded(path)
    model.load_adapter(path, "other", is_trainable=True)
    plan = freeze(model, "*.other.*")
    model.base_model.set_adapter(["default", "other"])
    return flags(model) != {*plan.trainable}, lambda: plan.check_model(model)

def a_second_adapter_makes_the_first_one_train(path):
    model = loaded(path)
    model.load_adapter(path, "other", is_trainable=True)
    optimizer, wrong = given(model), {n for n in flags(model) if ".other." not in n}
    return bool(wrong), lambda: freeze(model, "*.other.*").check_optimizer(optimizer)

def targets_that_hit_nothing_are_passed_over(path):
    try:
        model = adapted(targets=["c_attn", "q_proj"])
    except ValueError:
        return False, lambda: None
    return True, lambda: freeze(model, "*.c_attn.lora_*,*.q_proj.lora_*")

class Normed(nn.Module):
    """A backbone with a BatchNorm, and a head."""
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 1)
    def forward(self, input_ids, labels):
        return SimpleNamespace(loss=self.head(self.backbone(input_ids.float())).square().mean())

def batch_norm_of_a_frozen_backbone_trains(path):
    L, model = package("lightning.pytorch"), Normed()
    frozen = lambda: L.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=9, train_bn=False)
    run_lightning(model, [frozen()])
    proof = recipes.lightning_callback("*.head.*")
    return not (model.backbone[1].weight == 1).all(), lambda: (
        run_lightning(Normed(), [proof, frozen()]))

def validation_ends_in_train_mode(path):
    model = Normed()
    plan = freeze(model, "head.*")
    plan.set_modes(model.train())
    run_lightning(model, [])
    return model.backbone[1].training, lambda: plan.check_model(model)

def an_optimizer_made_before_sharding_updates_nothing(path):
    from torch.distributed.fsdp import fully_shard
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = given(model)
    fully_shard(model)
    before = model[0].weight.full_tensor().clone()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return before.equal(model[0].weight.full_tensor()), lambda: (
        freeze(model, "all").check_optimizer(optimizer))

BUGS = {  # in the framework's tracker, or in that of who met it there: the bug, what is said
    "transformers#24479": (frozen_blocks_are_set_to_train_mode, "frozen, but in train mode"),
    "transformers#11903": (to_freeze_the_head_freezes_its_tied_embedding, "tied to"),
    "transformers#26221": (checkpointing_cuts_the_adapters_gradients, "no gradient"),
    "speculators#765": (norms_in_bf16_never_move, "did not change: .*ln_1.weight"),
    "trl#6700": (an_adapter_trains_nothing, "lacks what should train"),
    "trl#3926": (partial(an_adapter_trains_nothing, make=lambda path: adapted()), "lacks"),
    "peft#1374": (activating_frozen_adapters_thaws_them, r"planned: .*\.default\.weight is True"),
    "peft#3580": (a_second_adapter_makes_the_first_one_train, "holds what does not train"),
    "peft#3554": (targets_that_hit_nothing_are_passed_over, "q_proj.* matches no parameter"),
    "pytorch-lightning#21531": (batch_norm_of_a_frozen_backbone_trains, "backbone.1.bias is True"),
    "pytorch-lightning#18930": (validation_ends_in_train_mode, "frozen, but in train mode"),
    "pytorch#107843": (an_optimizer_made_before_sharding_updates_nothing, "not in the model")}

@pytest.mark.parametrize("name", BUGS)
def test_the_proof_speaks_of_a_frameworks_bug_if_and_only_if_it_happens(name, tmp_path, group):
    bug, says = BUGS[name]
    happens, prove = bug(tmp_path)
    print(f"{name}: {'still there' if happens else 'no longer'}")
    if happens:
        with pytest.raises((FreezeError, ValueError), match=says):
            prove()
    else:
        prove()

def test_every_bug_of_a_framework_stands_in_the_table():
    table = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    assert [bug for bug in BUGS if f"[#{bug.partition('#')[2]}](https://" not in table] == []
