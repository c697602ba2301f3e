"""freeze.py in the trainers that people use. Take the recipe that you need, `check`, and freeze.py.

Each freezes before the optimizer is built, so that it gets what trains; checks model, optimizer and
gradients in the first two steps, between backward and update; and at the end compares every byte.
Tested on a model that gives .loss, as transformers' do, with planted violations.

    from recipes import trainer_callback
    Trainer(model=model, args=args, train_dataset=data, callbacks=[trainer_callback("last:2")])
"""

import torch
from torch import nn

from freeze import find_blocks, freeze

def check(plan, model, optimizer, step):
    """Before the update of a step, from 1; nothing from step 3 on. Or FreezeError."""
    if step <= 2:
        plan.check_model(model)
        plan.check_optimizer(optimizer)
        plan.check_gradients(model, step)

def train(model, plan, optimizer, batches, forward, backward=torch.Tensor.backward):
    """A plain loop; `forward` is the model, or what it is wrapped in."""
    for step, batch in enumerate(batches, 1):
        plan.set_modes(model.train())
        backward(forward(**batch).loss)
        check(plan, model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
    plan.check_model(model)
    plan.check_unchanged(model)

def plain(model, policy, batches, lr):
    plan = freeze(model, policy)
    train(model, plan, torch.optim.AdamW(plan.parameters(), lr), batches, model)

def accelerated(model, policy, batches, lr):
    """accelerate, on one device or several (DDP)."""
    from accelerate import Accelerator
    accelerator = Accelerator()
    plan = freeze(model.to(accelerator.device), policy)  # prepare() would move it
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(plan.parameters(), lr))
    train(model, plan, optimizer, batches, wrapped, accelerator.backward)

def ddp(model, policy, batches, lr):
    """DistributedDataParallel, under torchrun."""
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
    """For transformers' Trainer and TRL's SFTTrainer, on one device or several (DDP)."""
    from transformers import TrainerCallback
    class Proof(TrainerCallback):
        def on_init_end(self, args, state, control, model, **_):  # it is on its device
            self.plan = freeze(model, policy)
            # Trainer calls model.train() in every step, so the modes are set just before forward.
            model.register_forward_pre_hook(lambda *_: self.plan.set_modes(model))
        def on_pre_optimizer_step(self, args, state, control, model, optimizer, **_):
            check(self.plan, model, optimizer, state.global_step + 1)
        def on_train_end(self, args, state, control, model, **_):
            self.plan.check_model(model)
            self.plan.check_unchanged(model)
    return Proof()

def lightning_callback(policy):
    """For Lightning. configure_optimizers gives what has requires_grad, not self.parameters()."""
    from lightning.pytorch import Callback
    class Proof(Callback):
        def setup(self, trainer, module, stage):
            if stage == "fit":
                self.plan = freeze(module.to(trainer.strategy.root_device), policy)
        def on_train_batch_start(self, trainer, module, batch, index):
            self.plan.set_modes(module.train())
        def on_before_optimizer_step(self, trainer, module, optimizer):
            check(self.plan, module, optimizer, trainer.global_step + 1)
        def on_train_end(self, trainer, module):
            self.plan.check_model(module)
            self.plan.check_unchanged(module)
    return Proof()
