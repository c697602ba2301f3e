"""finetune.py killed at any moment, on full disks, on changed inputs: it goes on bit for bit, or says in one line why not."""

import errno
import json
import os
import resource
import shutil
import signal
import stat
import sys

import pytest
import torch

import finetune
from evaluate import read_records
from gpt import GPT, read_safetensors
from test_finetune import flip_a_bit, metrics, run, stop_after, world  # noqa: F401

QUICK = ["--max-steps", 5, "--epochs", 2, "--checkpoint-every", 1, "--keep", 1, "--no-responses"]


def result(out):
    """What must not depend on interruptions: every byte of the weights, and the metrics but for the time."""
    files = [path.read_bytes() for path in (out / "model" / "model.safetensors", out / "adapter" / "adapter_model.safetensors") if path.exists()]
    return files, [{k: v for k, v in m.items() if k != "seconds"} for m in metrics(out)]


def step_of(out):
    return finetune.find_checkpoint(out)[1]["state"]["step"]


# ------------------------------------------------------------------------------ killed


def killed(action, out, k):
    """Do it in a child process that ends by kill -9 before its k-th change of a file, or sync; the signal that ended it, or 0."""
    if pid := os.fork():
        return os.waitpid(pid, 0)[1]
    left, true_sync = [k], os.fsync
    def count():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    def hook(event, args):
        if event in ("os.remove", "os.rmdir") or str(out) in str(args[:1]) and (
                event in ("os.rename", "os.mkdir", "shutil.rmtree") or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)):
            count()
    try:
        os.fsync = lambda descriptor: (count(), true_sync(descriptor))
        sys.addaudithook(hook)
        action()
    finally:
        os._exit(0)


@pytest.fixture
def one_thread():
    """A forked process has none of the threads that OpenMP started in this one, and would wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_killed_at_any_change_of_a_file_and_again_while_resuming_it_ends_with_the_same_weights(world, tmp_path, one_thread):
    assert run(world, tmp_path / "whole", *QUICK) == 0
    out, ends = tmp_path / "r", []
    for k in range(6, 999, 17):  # a checkpoint takes 18 changes: each time another part of it is cut off
        shutil.rmtree(out, ignore_errors=True)
        if killed(lambda: run(world, out, *QUICK), out, k) == 0:
            break
        if (out / "run.json").exists():
            ends.append("complete")
        elif not finetune.saved_checkpoints(out):
            ends.append("too early")
            assert run(world, out, *QUICK, "--resume") == 1
            continue
        else:
            ends.append(step_of(out))
            reached = max(m["step"] for m in read_records(out / "metrics.jsonl"))
            assert ends[-1] in (reached - 1, reached)  # no more is lost than since the last checkpoint
        killed(lambda: run(world, out, *QUICK, "--resume"), out, 6)
        assert run(world, out, *QUICK, "--resume") == 0
        assert result(out) == result(tmp_path / "whole") and not (out / "checkpoints").exists() and not list(out.rglob("*.tmp"))
    assert ends[0] == "too early" and {1, 2, 3, 4, "complete"} <= set(ends)


def test_a_checkpoint_and_the_result_are_on_the_disk_before_they_replace_anything(world, tmp_path, monkeypatch):
    events, out = [], tmp_path / "r"
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    def fsync(descriptor):
        events.append("sync " + os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{out}/"))
        real["fsync"](descriptor)
    def replace(source, target):
        events.append("rename " + str(target).removeprefix(f"{out}/"))
        real["replace"](source, target)
    true = shutil.rmtree
    def rmtree(path, **more):
        events.append("remove " + str(path).removeprefix(f"{out}/"))
        true(path, **more)
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("reads in /proc which file is synced")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert run(world, out, "--max-steps", 3, "--checkpoint-every", 1, "--keep", 1, "--no-responses") == 0
    new = "checkpoints/step-000002"
    left = iter(events)  # each of these is found in what the one before it has left
    assert all(event in left for event in (
        f"sync {new}.tmp/state.safetensors.tmp", f"rename {new}.tmp/state.safetensors", f"rename {new}.tmp/manifest.json",
        f"sync {new}.tmp/manifest.json", f"sync {new}.tmp", f"rename {new}", "sync checkpoints", "remove checkpoints/step-000001", "rename run.json"))
    last = list(left)
    synced = {"sync " + name for name in ("run.json", "metrics.jsonl", "model", "model/vocab.json", "model/config.json", str(out))}
    assert synced <= set(last[:last.index("remove checkpoints")])


def test_a_signal_while_the_result_is_validated_or_saved_does_not_lose_it(world, tmp_path, monkeypatch, capsys):
    true = finetune.keep_result
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        true(*args)
    monkeypatch.setattr(finetune, "keep_result", interrupted)
    assert run(world, tmp_path / "a", "--max-steps", 2) == 143
    assert "and evaluate.py" in capsys.readouterr().out
    assert run(world, tmp_path / "a", "--max-steps", 2, "--resume") == 0
    assert "but for its answers: evaluate.py" in capsys.readouterr().out and not (tmp_path / "a" / "responses.jsonl").exists()
    assert json.loads((tmp_path / "a" / "run.json").read_text())["train"]["steps"] == 2
    assert run(world, tmp_path / "b", "--max-steps", 2, "--no-responses") == 0
    assert result(tmp_path / "a") == result(tmp_path / "b")


def test_a_run_stopped_after_its_last_step_resumes_in_the_epoch_of_that_step(world, tmp_path, monkeypatch):
    flags = ["--max-steps", 2, "--epochs", 5, "--no-responses"]
    assert run(world, tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(world, tmp_path / "r", *flags) == 143
    assert step_of(tmp_path / "r") == 2
    assert run(world, tmp_path / "r", *flags, "--resume") == 0
    assert result(tmp_path / "r") == result(tmp_path / "whole") and metrics(tmp_path / "r")[-1]["epoch"] == 1


def test_a_run_killed_before_its_first_line_does_not_occupy_the_folder(world, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".lock").touch()
    assert run(world, tmp_path / "r", "--max-steps", 2, "--no-responses") == 0


def test_a_file_system_without_locks_and_sync_of_folders_is_enough_and_a_broken_disk_is_not(world, tmp_path, monkeypatch, capsys):
    def unlockable(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    true, code = os.fsync, [errno.EINVAL]
    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code[0], os.strerror(code[0]))
        true(descriptor)
    monkeypatch.setattr(finetune.fcntl, "flock", unlockable)
    monkeypatch.setattr(os, "fsync", fsync)
    flags = ["--max-steps", 3, "--checkpoint-every", 1, "--no-responses"]
    assert run(world, tmp_path / "a", *flags) == 0
    assert "a cannot be locked there" in capsys.readouterr().out
    code[0] = errno.EIO
    assert run(world, tmp_path / "b", *flags) == 1
    err = capsys.readouterr().err
    assert "step-000001.tmp: the checkpoint of" in err and "Input/output error" in err and err.count("\n") == 1


def test_a_run_that_came_and_went_while_this_one_was_loading_is_not_replaced(world, tmp_path, monkeypatch, capsys):
    true = finetune.load_model
    def slow(*args):
        monkeypatch.setattr(finetune, "load_model", true)
        assert run(world, tmp_path / "r", "--max-steps", 2, "--no-responses") == 0
        return true(*args)
    monkeypatch.setattr(finetune, "load_model", slow)
    assert run(world, tmp_path / "r", "--max-steps", 2, "--seed", 1, "--no-responses") == 1
    assert "holds a run" in capsys.readouterr().err
    assert json.loads((tmp_path / "r" / "run.json").read_text())["flags"]["seed"] == 123


# ------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):  # noqa: F811
    """A run that was stopped after step 3, and has checkpoints of all three."""
    out = tmp_path_factory.mktemp("stopped") / "r"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        assert run(world, out, *QUICK, "--keep", 9) == 143
    return out


@pytest.fixture
def half(stopped, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped, tmp_path / "half")


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("damage, message", [
    (lambda f: edit(f / "manifest.json", lambda m: m["state"].update(taken=2)), "manifest.json is not what its sha256 says"),
    (lambda f: edit(f / "manifest.json", lambda m: m.pop("sha256")), "manifest.json is not what its sha256 says"),
    (lambda f: edit(f / "manifest.json", lambda m: m["file"].clear()), "manifest.json is not what its sha256 says"),
    (lambda f: open(f / "state.safetensors", "ab").write(b"x"), "state.safetensors is not what its size"),
    (lambda f: flip_a_bit(f / "state.safetensors"), "state.safetensors is not what its size and sha256"),
    (lambda f: shutil.rmtree(f) or f.mkdir(), "no such file"),
])
def test_a_checkpoint_that_is_not_what_its_manifest_says_is_passed_over(half, capsys, damage, message):
    damage(half / "checkpoints" / "step-000003")
    assert step_of(half) == 2
    out = capsys.readouterr().out
    assert "skipped" in out and "step-000003" in out and message in out


def test_a_size_that_differs_is_seen_without_hashing(half, monkeypatch):
    with open(half / "checkpoints" / "step-000003" / "state.safetensors", "ab") as file:
        file.write(b"x")
    hashed, true = [], finetune.sha256
    monkeypatch.setattr(finetune, "sha256", lambda path: hashed.append(path.parent.name) or true(path))
    assert step_of(half) == 2 and hashed == ["step-000002"]


def test_checkpoints_are_ordered_by_number_and_leftovers_are_none(tmp_path):
    for name in ("step-1000000", "step-999999", "step-000002", "step-000003.tmp", "step-x", "step-"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in finetune.saved_checkpoints(tmp_path)] == ["step-000002", "step-999999", "step-1000000"]


def test_the_newest_complete_checkpoint_is_never_the_one_removed(world, half, monkeypatch):
    """Newer ones are damaged: what is written after the intact one must not fall to them."""
    for step in (2, 3):
        flip_a_bit(half / "checkpoints" / f"step-00000{step}" / "state.safetensors")
    (half / "checkpoints" / "step-000009.tmp").mkdir()
    stop_after(monkeypatch, 1)
    assert run(world, half, *QUICK, "--resume") == 143
    assert [path.name for path in (half / "checkpoints").iterdir()] == ["step-000002"] and step_of(half) == 2


# ------------------------------------------------------------------------------ what must be the same


def other_tokenizer(folder):
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "vocab.json").write_text(json.dumps(vocab))


def other_weight(folder):
    model = GPT.from_pretrained(folder)
    with torch.no_grad():
        model.wpe.weight[0, 0] += 1e-6
    model.save_pretrained(folder)


@pytest.mark.parametrize("more, change, message", [
    ([], lambda w: edit(w / "model" / "config.json", lambda c: c.update(n_head=4)), "model n_head was 2, is 4"),
    ([], lambda w: edit(w / "model" / "config.json", lambda c: c.update(layer_norm_epsilon=1e-3)), "model layer_norm_epsilon was 1e-05, is 0.001"),
    ([], lambda w: other_tokenizer(w / "model"), "token ids was"),
    ([], lambda w: edit(w / "records.json", lambda r: r.reverse()), "data sha256 was"),
    (["--trainable", "last_block"], lambda w: other_weight(w / "model"), "wpe.weight; has --model"),
    (["--trainable", "last_block", "--lora-r", 2, "--trainable", "lora,last_block"], lambda w: other_weight(w / "model"), "wpe.weight; has --model"),
])
def test_a_resume_on_another_model_tokenizer_or_data_under_the_same_names_is_refused(world, tmp_path, monkeypatch, capsys, more, change, message):
    copy = shutil.copytree(world, tmp_path / "world")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(copy, tmp_path / "r", *QUICK, *more) == 143
    change(copy)
    assert run(copy, tmp_path / "r", *QUICK, *more, "--resume") == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and "step-000002" in err


def test_a_resume_in_another_precision_is_refused_also_where_it_is_chosen_by_the_machine(world, tmp_path, monkeypatch, capsys):
    flags, true = ["--max-steps", 4, "--no-responses", "--dtype", "auto"], finetune.join_processes
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(world, tmp_path / "r", *flags) == 143
    monkeypatch.setattr(finetune, "join_processes", lambda args: true(args)._replace(dtype=torch.bfloat16))
    assert run(world, tmp_path / "r", *flags, "--resume") == 1
    assert "dtype was 'torch.float32', is 'torch.bfloat16'" in capsys.readouterr().err


def test_a_resume_whose_loaded_adapter_has_another_scale_is_refused(world, tmp_path, monkeypatch, capsys):
    assert run(world, tmp_path / "a", "--lora-r", 2, "--max-steps", 2, "--no-responses") == 0
    flags = ["--model", tmp_path / "a", *QUICK]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(world, tmp_path / "r", *flags) == 143
    edit(tmp_path / "a" / "adapter" / "adapter_config.json", lambda c: c.update(lora_alpha=5))
    assert run(world, tmp_path / "r", *flags, "--resume") == 1
    err = capsys.readouterr().err
    assert "adapter h.0.attn.c_attn was" in err and "alpha=5" in err and err.rstrip().endswith("and 3 more") and err.count("\n") == 1


@pytest.mark.parametrize("line", ["{}", '{"step": "1", "train_loss": 1, "val_loss": 1}', '{"step": 1}'])
def test_a_log_that_somebody_changed_is_named_with_its_line(world, half, capsys, line):
    metrics = half / "metrics.jsonl"
    metrics.write_text(line + "\n" + metrics.read_text())
    assert run(world, half, *QUICK, "--resume") == 1
    err = capsys.readouterr().err
    assert "metrics.jsonl, line 1: no step" in err and err.count("\n") == 1


@pytest.mark.parametrize("more", [
    ["--untie-head", "--loss-on", 0.3], ["--trainable", "embeddings,norms", "--clip", 0], ["--dtype", "bf16", "--schedule", "cosine"],
    ["--curriculum", "length", "--stages", 2, "--max-examples", 20, "--select", "longest"], ["--trainable", "random:1,head", "--untie-head"],
    ["--lora-r", 2, "--rslora", "--loraplus-ratio", 8, "--lora-dropout", 0.3], ["--trainable", "lisa:1@1", "--lr-decay", 0.5],
    ["--lora-r", 2, "--trainable", "lora,lisa:1@2"], ["--trainable", "gradual:1,embeddings", "--batch-size", 3],
], ids=str)
def test_from_any_step_under_any_flags_a_resumed_run_is_the_uninterrupted_one(world, tmp_path, more):
    """One run keeps a checkpoint of each step; from each (every other, if there are many) a copy goes on."""
    flags = ["--epochs", 2, "--batch-size", 4, "--grad-accum", 3, "--dropout", 0.1, "--no-responses", *more]
    with pytest.MonkeyPatch.context() as patch:
        true, kept = finetune.shutil.rmtree, tmp_path / "kept"
        def rmtree(path, **options):
            if path.name == "checkpoints":
                shutil.copytree(path.parent, kept)
            true(path, **options)
        patch.setattr(finetune.shutil, "rmtree", rmtree)
        assert run(world, tmp_path / "whole", *flags, "--checkpoint-every", 1, "--keep", 99) == 0
    (kept / "run.json").unlink()
    for folder in finetune.saved_checkpoints(kept)[1::3]:
        out = shutil.copytree(kept, tmp_path / folder.name)
        for other in (out / "checkpoints").iterdir():
            if other.name != folder.name:
                shutil.rmtree(other)
        assert run(world, out, *flags, "--resume") == 0
        assert result(out) == result(tmp_path / "whole"), folder.name


# ------------------------------------------------------------------------------ full disks


@pytest.fixture
def limit():
    """A function that lets no file grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("moment, name, intact", [("gradients", "metrics.jsonl", True), ("keep_result", "model.safetensors", True), ("describe", "run.json", True),
                                                  ("encode_prompts", "responses.jsonl", False), ("save_checkpoint", "step-000002.tmp", True)])
def test_a_disk_that_fills_up_is_one_line_with_the_path_and_leaves_the_checkpoint(world, tmp_path, monkeypatch, capsys, limit, moment, name, intact):
    true, calls = getattr(finetune, moment), []
    def full(*args, **more):
        calls.append(1)
        if len(calls) == (1 if moment in ("keep_result", "describe") else 2):
            limit(100)
        try:
            return true(*args, **more)
        finally:
            if moment == "save_checkpoint":
                limit(resource.RLIM_INFINITY)
    monkeypatch.setattr(finetune, moment, full)
    out = tmp_path / "r"
    code = run(world, out, "--max-steps", 3, "--checkpoint-every", 1)
    limit(resource.RLIM_INFINITY)
    err = capsys.readouterr().err
    assert code == 1 and err.count("\n") == 1 and str(out) in err and name in err and "File too large" in err
    assert not list(out.rglob("*.tmp")) and (out / "run.json").exists() != intact
    if intact:
        assert step_of(out) == (1 if moment in ("gradients", "save_checkpoint") else 2)
        monkeypatch.setattr(finetune, moment, true)
        assert run(world, out, "--max-steps", 3, "--checkpoint-every", 1, "--resume") == 0
        assert [m["step"] for m in metrics(out)] == [0, 1, 2, 3, 3]


def test_a_resume_with_another_number_of_processes_is_refused(world, half, monkeypatch, capsys):
    true = finetune.join_processes
    monkeypatch.setattr(finetune, "join_processes", lambda args: true(args)._replace(world=2))
    assert run(world, half, *QUICK, "--keep", 9, "--resume") == 1
    assert "processes was 1, is 2" in capsys.readouterr().err
