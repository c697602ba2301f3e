"""Several processes: equal to one, sharded or not; proved, stopped and resumed together; one line where they fail.

One driver imports torch once and forks the processes of each case, with the environment that torchrun gives them.
"""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

import finetune
from data import encode_examples, load_examples, load_tokenizer
from gpt import GPT
from test_finetune import ROOT, losses, metrics, run, world  # noqa: F401

DRIVER = """
import json, os, signal, sys, time
sys.path.insert(0, {root!r})
import finetune, torch, torch._dynamo, torch.distributed.fsdp  # slow ones, here once for all

def process(rank, case, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{{case['log']}}.{{stream}}{{rank}}", os.O_CREAT | os.O_WRONLY), number)
    code = 70
    try:
        exec(case["patch"], {{"finetune": finetune, "torch": torch, "rank": rank, "os": os, "time": time}})
        code = finetune.main(case["flags"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        import traceback
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)

for case in json.load(sys.stdin):
    pids = {{}}
    for rank in range(2):
        if (pid := os.fork()) == 0:
            process(rank, case, case["port"])
        pids[pid] = rank
    codes = {{}}
    while pids:  # as torchrun: when one fails, the others are ended
        pid, status = os.wait()
        codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
        if status:
            time.sleep(0.3)
            for other in pids:
                os.kill(other, signal.SIGTERM)
    print(json.dumps([codes[0], codes[1]]), flush=True)
"""

STOP = """
if rank == 1:  # only one of them is told
    noted = finetune.Signals.on_any_process
    finetune.Signals.steps = 0
    def stop(self, device):
        self.steps += 1
        if self.steps == 2:
            os.kill(os.getpid(), 15)
        return noted(self, device)
    finetune.Signals.on_any_process = stop
"""
MOVE = """
take_step = finetune.take_step
def moved(model, plan, *rest):
    if rank == 1:
        p = plan.named[plan.frozen[0]]
        (p.to_local() if hasattr(p, "to_local") else p).detach().view(-1)[-1] += 1e-3
    return take_step(model, plan, *rest)
finetune.take_step = moved
"""
FETCH = """
folder = finetune.model_folder
def slow(name):
    open("fetched", "a").write(f"{rank} begins\\n")
    time.sleep(0.2)
    open("fetched", "a").write(f"{rank} ends\\n")
    return folder(name)
finetune.model_folder = slow
"""
SHORT = ["--max-examples", 9, "--max-steps", 3, "--no-responses"]  # batches of 8 and of 1, for which the second process has no example
MIXED = ["--lora-r", 2, "--trainable", "lora,last_block", "--dropout", 0.1, "--epochs", 2]
EQUAL = {"full": [], "frozen": ["--trainable", "last_block", "--loss-on", 0.3], "lora": ["--lora-r", 2, "--lora-targets", "c_attn,c_fc"],
         "hybrid": ["--lora-r", 2, "--trainable", "hybrid:0.2,norms"], "lisa": ["--trainable", "lisa:1@1,head", "--untie-head"]}
CASES = {  # name: (flags, patch)
    **{f"ddp-{name}": ([*SHORT, *EQUAL[name]], "") for name in ("full", "hybrid")},
    **{f"fsdp-{name}": ([*SHORT, *flags, "--fsdp"], "finetune.HEAD_ROWS = finetune.FROZEN_HEAD_ROWS = 5") for name, flags in EQUAL.items()},
    "whole": ([*MIXED, "--fsdp"], ""),
    "stopped": ([*MIXED, "--fsdp"], STOP),
    "resumed": ([*MIXED, "--fsdp", "--resume"], ""),
    "ddp-whole": (MIXED, ""),
    "torchrun": ([*MIXED, "--resume"], ""),
    "wrong": ([*SHORT, "--trainable", "last:9"], FETCH),
    "flag": ([*SHORT, "--fsdp", "--cache-prefix"], ""),
    "head": ([*SHORT, "--fsdp", "--trainable", "head", "--untie-head"], ""),
    "moved": ([*SHORT, "--trainable", "last_block"], MOVE),
    "fsdp-moved": ([*SHORT, "--trainable", "last_block", "--fsdp"], MOVE),
}


def flags_of(world, out, more):
    return [str(flag) for flag in ["--model", world / "model", "--data", world / "records.json", "--out", out, "--lr", "1e-3",
                                   "--batch-size", 4, "--device", "cpu", *more]]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """The folder in which all cases have run, with codes.json: {case: exit code of each process}."""
    folder = tmp_path_factory.mktemp("runs")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "finetune.py"),
         *flags_of(world, folder / "torchrun", [*MIXED, "--eval-every", 1])], env=environment, cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in torchrun.stdout:
        if line.startswith("step 2/"):
            torchrun.send_signal(signal.SIGTERM)
            break
    said = torchrun.communicate(timeout=60)[0]
    (folder / "torchrun.steps").write_text(json.dumps([torchrun.returncode, said, sorted(os.listdir(folder / "torchrun" / "checkpoints"))]))
    cases = [{"flags": flags_of(world, folder / ("stopped" if name == "resumed" else name), flags), "patch": patch, "log": str(folder / name),
              "port": free_port()} for name, (flags, patch) in CASES.items()]
    result = subprocess.run([sys.executable, "-c", DRIVER.format(root=str(ROOT))], input=json.dumps(cases), cwd=folder, env=environment,
                            text=True, capture_output=True, timeout=300)
    codes = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(codes) == len(CASES), result.stderr
    (folder / "codes.json").write_text(json.dumps(dict(zip(CASES, codes))))
    return folder


def codes(runs, name):
    return json.loads((runs / "codes.json").read_text())[name]


def errors(runs, name):
    return "".join((runs / f"{name}.err{rank}").read_text() for rank in range(2))


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """For each of EQUAL the run of one process with the same global batches."""
    folder = tmp_path_factory.mktemp("alone")
    for name, flags in EQUAL.items():
        assert run(world, folder / name, "--batch-size", 4, "--grad-accum", 2, *SHORT, *flags) == 0
    return folder


@pytest.mark.parametrize("case", [name for name in CASES if name.partition("-")[2] in EQUAL])
def test_two_processes_train_what_one_trains_with_the_same_global_batches(runs, alone, case):
    assert codes(runs, case) == [0, 0], errors(runs, case)
    one, two = alone / case.partition("-")[2], runs / case
    assert len(losses(two)) == 3 and losses(two) == pytest.approx(losses(one), rel=1e-6)
    validated = [[m["val_loss"] for m in metrics(out) if m["val_loss"] is not None] for out in (one, two)]
    assert len(validated[0]) == 4 and validated[1] == pytest.approx(validated[0], rel=1e-6)
    norms = [[m["grad_norm"] for m in metrics(out) if "grad_norm" in m] for out in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    first, second = (json.loads((out / "run.json").read_text())["freeze"] for out in (one, two))
    assert [first[key] for key in ("trainable", "frozen", "fingerprint")] == [second[key] for key in ("trainable", "frozen", "fingerprint")]
    assert second["checks"].items() >= first["checks"].items() and ("rebind" in second["checks"]) == case.startswith("fsdp")
    for part in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (one / part).exists() == (two / part).exists()
        if (one / part).exists():
            tensors, others = (finetune.read_safetensors(out / part) for out in (one, two))
            assert tensors.keys() == others.keys()
            for name, tensor in tensors.items():
                torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_a_process_without_a_validation_batch_counts_none_twice(world):
    model, tokenizer = GPT.from_pretrained(world / "model"), load_tokenizer(world / "model")
    encoded = sorted(encode_examples(load_examples(world / "records.json")[:5], tokenizer)[0], key=lambda e: len(e.ids))
    part = lambda examples, **process: finetune.mean_loss(model, examples, 2, "response", finetune.Machine(torch.device("cpu"), **process))
    assert part(encoded, rank=1, world=2) == part(encoded[2:4])  # of three batches the second
    assert part(encoded, rank=0, world=2) == pytest.approx(part(encoded[:2] + encoded[4:]), rel=1e-6)


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_they_resume_bit_for_bit(runs):
    assert codes(runs, "stopped") == [128 + signal.SIGTERM] * 2 and codes(runs, "resumed") == [0, 0] == codes(runs, "whole"), errors(runs, "resumed")
    assert "stopped after step 2" in (runs / "stopped.out0").read_text()
    assert [m["step"] for m in metrics(runs / "stopped")] == [m["step"] for m in metrics(runs / "whole")]
    same_bytes(runs / "stopped", runs / "whole")
    for out in (runs / "stopped", runs / "whole"):
        assert len((out / "responses.jsonl").read_text().splitlines()) == 4
    assert errors(runs, "stopped") == "" == (runs / "stopped.out1").read_text()  # only the first process prints


def test_torchrun_passes_a_signal_on_and_the_run_it_stopped_resumes_bit_for_bit(runs):
    code, said, checkpoints = json.loads((runs / "torchrun.steps").read_text())
    assert code == 1 and said.count("stopped after step") == 1  # 1 is torchrun's own
    assert len(checkpoints) == 1 and checkpoints[0].startswith("step-")
    assert codes(runs, "torchrun") == [0, 0] == codes(runs, "ddp-whole"), errors(runs, "torchrun")
    same_bytes(runs / "torchrun", runs / "ddp-whole")


def same_bytes(one, two):
    for part in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (one / part).read_bytes() == (two / part).read_bytes()


@pytest.mark.parametrize("case, code, message", [
    ("wrong", 2, "error: --trainable last:9: freeze policy: 'last:9'"), ("flag", 2, "error: --fsdp and --cache-prefix exclude each other"),
    ("head", 2, "error: --fsdp: under --trainable head the backward pass stays in the head"),
    ("fsdp-moved", 1, "error: freeze proof broken: frozen, but changed: h.0."), ("moved", 1, "error: process 1: freeze proof broken: frozen, but changed: h.0."),
])
def test_what_fails_under_torchrun_is_said_in_one_line(runs, case, code, message):
    assert errors(runs, case).startswith(message) and errors(runs, case).count("\n") == 1, errors(runs, case)
    assert code in codes(runs, case)
    assert not (runs / case / "run.json").exists()


def test_the_first_process_downloads_before_the_others_look(runs):
    assert (runs / "fetched").read_text().splitlines() == ["0 begins", "0 ends", "1 begins", "1 ends"]


def test_fsdp_without_torchrun_is_refused(world, tmp_path, capsys):
    assert run(world, tmp_path / "r", "--fsdp") == 2
    assert capsys.readouterr().err == ("error: --fsdp: there is one process, and nothing to shard over; start several with "
                                       "torchrun --nproc_per_node=N finetune.py\n")


def test_each_process_takes_its_own_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [str(finetune.choose_device(name, 8)) for name in ("auto", "cuda", "cpu")] == ["cuda:3", "cuda:3", "cpu"]
    for name in ("cuda:1", "mps"):
        with pytest.raises(finetune.UsageError, match=f"--device {name}: each of several processes"):
            finetune.choose_device(name, 2)
    monkeypatch.delenv("LOCAL_RANK")
    assert [str(finetune.choose_device(name)) for name in ("auto", "cuda:1", "mps")] == ["cuda:0", "cuda:1", "mps"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [str(finetune.choose_device("auto", n)) for n in (1, 2)] == ["mps", "cpu"]


def test_bf16_is_the_default_on_a_gpu_that_has_it_and_not_where_it_is_emulated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    for in_hardware, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or in_hardware)
        assert finetune.join_processes(finetune.parse_args([])).dtype == dtype
        assert finetune.join_processes(finetune.parse_args(["--dtype", "bf16"])).dtype == torch.bfloat16
    assert finetune.join_processes(finetune.parse_args(["--device", "cpu"])).dtype == torch.float32
