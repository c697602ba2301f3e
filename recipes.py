"""freeze.py in the trainers that people use. Copy this file and freeze.py.

Each recipe freezes before the optimizer is built, so that it gets what trains; checks flags, modes,
optimizer and gradients before the first two updates; at the end, flags and optimizer again, and
every byte. Tested, with planted violations, on models that give .loss, as transformers' do.

    from recipes import trainer_callback
    Trainer(model=model, args=args, train_dataset=data, callbacks=[trainer_callback("last:2")])

Not for fp16 with a GradScaler, whose first steps overflow on purpose (use bf16), nor for
load_best_model_at_end where the first update was the best: LoRA's A has not moved by then.
"""

import torch
from torch import nn

from freeze import find_blocks, freeze, refuse

def check(plan, model, optimizer):
    """Once an update, between the last backward and step; from the third on, nothing. Those at rate
    0, with which warmup begins, do not count: LoRA's A has zeros for longer then."""
    update = plan.checks["updates"] + 1
    if update <= 2:
        plan.check_model(model)
        plan.check_optimizer(optimizer)
        plan.check_gradients(model, update)
        plan.checks["updates"] += any(group["lr"] > 0 for group in optimizer.param_groups)

def finish(plan, model, optimizer):
    """After the last update."""
    plan.set_modes(model)
    plan.check_model(model)
    plan.check_optimizer(optimizer)
    once = plan.checks["updates"] == 1 or plan.checks["check_gradients"] < 2
    plan.check_unchanged(model, trained=not once)  # one update leaves LoRA's A as it was
    print(f"proved: {len(plan.frozen)} frozen tensors are bit-identical; {plan.summary()}")

def train(model, plan, optimizer, batches, forward, backward=torch.Tensor.backward):
    """A plain loop; `forward` is the model, or what it is wrapped in. Batches are on its device."""
    for batch in batches:
        plan.set_modes(model.train())
        backward(forward(**batch).loss)
        check(plan, model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    finish(plan, model, optimizer)

def plain(model, policy, batches, lr):
    plan = freeze(model, policy)
    train(model, plan, torch.optim.AdamW(plan.parameters(), lr), batches, model)

def accelerated(model, policy, batches, lr):
    """accelerate, on one device or several GPUs (DDP)."""
    from accelerate import Accelerator
    accelerator = Accelerator()
    plan = freeze(model.to(accelerator.device), policy)  # prepare() would move it
    optimizer = torch.optim.AdamW(plan.parameters(), lr)
    wrapped, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    train(model, plan, optimizer, batches, wrapped, accelerator.backward)

def ddp(model, policy, batches, lr):
    """DistributedDataParallel, under torchrun, of a model that is the same in all processes."""
    plan = freeze(model, policy)  # first: DDP heeds requires_grad while it wraps
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(model, plan, torch.optim.AdamW(plan.parameters(), lr), batches, wrapped)

def sharded(model, policy, batches, lr):
    """fully_shard (FSDP2), under torchrun."""
    from torch.distributed.fsdp import fully_shard
    for name in find_blocks(model):
        fully_shard(model.get_submodule(name))
    fully_shard(model)
    plan = freeze(model, policy)  # last: sharding replaces all parameters
    train(model, plan, torch.optim.AdamW(plan.parameters(), lr), batches, model)

def trainer_callback(policy):
    """For the constructor of transformers' Trainer or TRL's SFTTrainer, without model_init."""
    from transformers import TrainerCallback
    class Proof(TrainerCallback):
        def on_init_end(self, args, state, control, model, **_):  # on its device, no optimizer yet
            refuse(["DataParallel"] * (args.n_gpu > 1), "replicas are not checked", "use torchrun")
            self.plan = freeze(model, policy)
        def on_train_begin(self, args, state, control, model, **_):  # each step calls model.train()
            self.hook = model.register_forward_pre_hook(lambda *_: self.plan.set_modes(model))
        def on_pre_optimizer_step(self, args, state, control, model, optimizer, **_):
            check(self.plan, model, optimizer)
        def on_train_end(self, args, state, control, model, optimizer, **_):
            self.hook.remove()
            finish(self.plan, model, optimizer)
    return Proof()

def lightning_callback(policy):
    """For Lightning, with one optimizer: give it what has requires_grad, not self.parameters()."""
    from lightning.pytorch import Callback
    class Proof(Callback):
        def setup(self, trainer, module, stage):
            if stage == "fit":  # on its device and in its type
                module = trainer.precision_plugin.convert_module(module)
                self.plan = freeze(module.to(trainer.strategy.root_device), policy)
        def on_train_batch_start(self, trainer, module, batch, index):
            self.plan.set_modes(module.train())
        def on_before_optimizer_step(self, trainer, module, optimizer):
            check(self.plan, module, optimizer)
        def on_train_end(self, trainer, module):
            finish(self.plan, module, trainer.optimizers[0])
    return Proof()
