"""What needs a GPU to be trusted: the proof there, a resume bit for bit, two devices over NCCL; and
what a CPU shows of it: how often a step waits for its device. mps is untested. With a GPU:
`python -m pytest -rs tests/test_gpu.py && python tests/bench.py --only gpu`"""

import signal
import subprocess
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode

import finetune
from freeze import FreezeError, freeze
from gpt import GPT, GPTConfig
from test_command_line import ROOT
from test_finetune import column, result, run, stopped, world  # noqa: F401

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices here")

class Reads(TorchFunctionMode):
    """Counts what would wait for a GPU: numbers taken out of tensors."""
    count = 0
    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function.__name__ in ("item", "tolist", "__float__", "__bool__", "__int__")
        return function(*args, **(kwargs or {}))

@pytest.mark.parametrize("flags", [[], ["--grad-accum", 2], ["--trainable", "last_block"]], ids=str)
def test_a_step_waits_for_its_device_once_but_for_the_first_two_which_are_checked(
        world, tmp_path, monkeypatch, flags):
    counts, log = [], finetune.log
    with Reads() as reads:
        monkeypatch.setattr(finetune, "log", lambda *how: counts.append(reads.count) or log(*how))
        assert run(world, tmp_path / "run", "--epochs", 4, "--eval-every", 99, *flags) == 0
    waits = [b - a for a, b in zip(counts, counts[1:])]
    assert waits[0] > 1 and set(waits[1:-1]) == {1} and len(waits) > 6

@gpu
def test_one_bit_of_a_frozen_tensor_on_the_gpu_is_found():
    model = GPT(GPTConfig(61, 24, 3, 2, 16)).cuda()
    plan = freeze(model, "last_block")
    plan.check_unchanged(model, trained=False)
    model.wte.weight.data.view(torch.int32)[3, 5] ^= 1
    with pytest.raises(FreezeError, match="frozen, but changed: wte.weight"):
        plan.check_unchanged(model, trained=False)

@gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_on_the_gpu_is_resumed_bit_for_bit(world, tmp_path, dtype):
    flags = ["--device", "cuda", "--dtype", dtype, "--epochs", 3, "--dropout", 0.1]
    assert run(world, tmp_path / "a", *flags) == 0
    assert stopped(signal.SIGINT, 7, run, world, tmp_path / "b", *flags) == 130
    assert run(world, tmp_path / "b", *flags, "--resume") == 0
    assert result(tmp_path / "a") == result(tmp_path / "b")

@two
@pytest.mark.parametrize("more", [[], ["--fsdp"]], ids=str)
def test_two_gpus_learn_what_one_does_with_batches_twice_as_large(world, tmp_path, more):
    how = ["--device", "cuda", "--dtype", "fp32", "--no-responses", "--lr", "1e-3"]
    data = ["--model", str(world / "model"), "--data", str(world / "records.json")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launch, str(ROOT / "finetune.py"), *how, *data, *more, "--batch-size", "4",
                    "--out", str(tmp_path / "two")], check=True)
    assert run(world, tmp_path / "one", *how) == 0
    one, two = (column(tmp_path / name, "train_loss") for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)
