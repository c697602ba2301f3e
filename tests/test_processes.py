"""Two processes (gloo): equal to one, sharded or not; proved; stopped, killed and resumed together.

One driver imports torch once and forks the two processes of each case, with torchrun's environment.
"""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from gpt import read_json, read_safetensors
from test_command_line import ROOT
from test_finetune import column, curves, flags_of, result, run, world  # noqa: F401

DRIVER = """
import json, os, signal, socket, sys, time
sys.path.insert(0, sys.argv[1])
import finetune, torch, torch.distributed.fsdp  # slow ones, here once for all
sleep, time.sleep = time.sleep, lambda seconds: sleep(min(seconds, 1))

def process(rank, case, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{case['name']}.{stream}{rank}", os.O_CREAT | os.O_WRONLY), number)
    code = 70
    try:
        exec(case["patch"], globals() | {"rank": rank})
        code = finetune.main(case["flags"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        import traceback
        traceback.print_exc()
    os._exit(code)

for case in json.load(sys.stdin):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pids, codes = {}, {}
    for rank in range(2):
        if (pid := os.fork()) == 0:
            process(rank, case, port)
        pids[pid] = rank
    while pids:  # as torchrun: when one fails, the other is ended
        pid, status = os.wait()
        codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
        if status:
            sleep(0.2)
            for other in pids:
                os.kill(other, signal.SIGKILL if codes[1 - pids[other]] == 1 else signal.SIGTERM)
    print(json.dumps([codes[0], codes[1]]), flush=True)
"""
AT_LOSS = """
true, losses = finetune.loss_sum, []
def watched(model, *rest):
    if torch.is_grad_enabled():
        losses.append(1)
        print(torch.initial_seed(), file=sys.stderr, flush=True) if PRINT else None
        if len(losses) == NUMBER:
            ACTION
    return true(model, *rest)
finetune.loss_sum = watched
"""

def at_loss(number, action, show=False):
    """A patch: do something before the training loss of this number."""
    code = AT_LOSS.replace("NUMBER", str(number)).replace("ACTION", action)
    return code.replace("PRINT", str(show))

MOVE = at_loss(2, "rank and getattr(model.wte.weight, '_local_tensor', model.wte.weight)"
                  ".detach().view(-1)[-1].add_(1e-3)")
UNEVEN = ["--max-examples", 9, "--epochs", 2, "--max-steps", 3, "--no-responses"]  # 8, 1 and 8
TRAINED = ["--lora-r", 2, "--trainable", "lora,last_block", "--dropout", 0.1, "--epochs", 2]
EQUAL = {"full": ["--batch-size", 4], "frozen": ["--trainable", "last_block", "--batch-size", 4],
         "lora": ["--lora-r", 1, "--batch-size", 1, "--grad-accum", 4],
         "head": ["--trainable", "head,norms", "--untie-head", "--batch-size", 4]}
SECOND = "if rank: finetune.WRITTEN = finetune.finish = None"  # not called there
CASES = {  # name: (flags, patch); resumed-X goes on in the folder of X
    **{f"ddp-{name}": (UNEVEN + flags, SECOND) for name, flags in EQUAL.items()},
    **{f"fsdp-{name}": (UNEVEN + flags + ["--fsdp"], "finetune.HEAD_ROWS = 5")
       for name, flags in EQUAL.items()},
    "whole": (TRAINED, at_loss(0, "pass", show=True)), "fsdp-whole": (TRAINED + ["--fsdp"], ""),
    "stopped": (TRAINED + ["--fsdp"], at_loss(2, "rank and os.kill(os.getpid(), signal.SIGTERM)")),
    "resumed-stopped": (TRAINED + ["--fsdp", "--resume"], ""),
    "killed": (TRAINED, "finetune.CHECKPOINT_SECONDS = 600 - 600 * rank" +
               at_loss(4, "os.kill(os.getpid(), signal.SIGKILL)")),
    **{f"resumed-{name}": (TRAINED + ["--resume"], "") for name in ("killed", "torchrun")},
    "wrong": (UNEVEN + ["--trainable", "last:9"], ""),
    "dynamic": (UNEVEN + ["--fsdp", "--trainable", "gradual:1"], ""),
    "moved": (UNEVEN + ["--trainable", "last_block"], MOVE),
    "fsdp-moved": (UNEVEN + ["--trainable", "last_block", "--fsdp"], MOVE)}

@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):  # noqa: F811
    """The folder in which all cases have run, with codes.json: {case: both exit codes}."""
    folder = tmp_path_factory.mktemp("runs")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    flags = flags_of(world, folder / "torchrun", *TRAINED, "--batch-size", 4, "--eval-every", 1)
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         ROOT / "finetune.py", *flags], env=environment, cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in torchrun.stdout:
        if line.startswith("step 2/"):
            torchrun.send_signal(signal.SIGTERM)  # which it hands to both
            break
    said = torchrun.communicate(timeout=60)[0]
    place = lambda name: folder / name.removeprefix("resumed-")
    cases = [{"name": name, "patch": patch, "flags": flags_of(
        world, place(name), "--batch-size", 4, *flags)} for name, (flags, patch) in CASES.items()]
    done = subprocess.run([sys.executable, "-c", DRIVER, str(ROOT)], input=json.dumps(cases),
                          cwd=folder, env=environment, text=True, capture_output=True, timeout=300)
    codes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(codes) == len(CASES), done.stderr
    codes = dict(zip(CASES, codes)) | {"torchrun": [torchrun.returncode, said]}
    (folder / "codes.json").write_text(json.dumps(codes))
    return folder

codes = lambda runs, name: read_json(runs / "codes.json")[name]

def errors(runs, name):
    return "".join((runs / f"{name}.err{rank}").read_text() for rank in range(2))

@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_train_and_prove_what_one_does_with_the_same_batches(
        world, runs, tmp_path, name):  # noqa: F811
    flags = [*UNEVEN, *EQUAL[name], "--batch-size", 4, "--grad-accum", 2]
    assert run(world, one := tmp_path / "one", *flags) == 0
    for two in (runs / f"ddp-{name}", runs / f"fsdp-{name}"):
        assert codes(runs, two.name) == [0, 0], errors(runs, two.name)
        assert column(two, "records") == column(one, "records")
        assert column(two, "tokens") == column(one, "tokens")
        assert curves(two) == pytest.approx(curves(one), rel=1e-5)
        first, second = (read_json(out / "run.json")["freeze"] for out in (one, two))
        assert first == second and first[0]["checks"]["check_gradients"] == 2
        for path in one.rglob("*.safetensors"):
            theirs, ours = read_safetensors(path), read_safetensors(two / path.relative_to(one))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("name, whole", [("stopped", "fsdp-whole"), ("killed", "whole"),
                                         ("torchrun", "whole")])
def test_stopped_or_killed_processes_resume_together_bit_for_bit(runs, name, whole):
    resumed = f"resumed-{name}"
    assert codes(runs, resumed) == codes(runs, whole) == [0, 0], errors(runs, resumed)
    assert result(runs / name) == result(runs / whole)
    assert len((runs / name / "responses.jsonl").read_text().splitlines()) == 4

def test_a_signal_stops_all_processes_after_the_same_step_and_only_the_first_prints(runs):
    assert codes(runs, "stopped") == [143, 143] and codes(runs, "killed") == [-9, -9]
    assert errors(runs, "stopped") == "" == (runs / "stopped.out1").read_text()
    said = (runs / "stopped.out0").read_text() + codes(runs, "torchrun")[1]
    assert said.count("stopped after step") == 2 and codes(runs, "torchrun")[0] != 0

def test_each_process_draws_dropout_masks_of_its_own_in_each_step(runs):
    errors = [(runs / f"whole.err{rank}").read_text() for rank in range(2)]
    seeds = [re.findall(r"(?m)^\d+$", text) for text in errors]  # not the notes of the answers
    assert len(seeds[0]) == len(seeds[1]) == 10 == len({*seeds[0], *seeds[1]}) / 2

@pytest.mark.parametrize("case, message", [
    ("wrong", "error: .*last:9"), ("dynamic", "error: --fsdp.*gradual:1"),
    ("moved", "error: frozen, but changed: wte.weight"),
    ("fsdp-moved", "error: frozen, but changed: wte.weight")])
def test_what_fails_in_any_process_is_said_in_one_line_and_saves_nothing(runs, case, message):
    assert re.search(f"(?m)^{message}[^\n]*$", errors(runs, case)) and 1 in codes(runs, case)
    assert case == "moved" or len({*errors(runs, case).splitlines()}) == 1
    assert not (runs / case / "run.json").exists() and not (runs / case / "model").exists()
