"""What a user can get wrong, or odd: it works, or ends in one line on stderr that names the thing, with the right exit code."""

import ast
import asyncio
import io
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import finetune
import freeze
import gpt
import lora
from gpt import GPT, GPTConfig, read_safetensors, write_safetensors

ROOT = Path(__file__).resolve().parents[1]
RECORDS = [{"instruction": f"Say {i}.", "input": "", "output": "yes " * (1 + i % 3)} for i in range(40)]
LONG = {"instruction": "x" * 400, "input": "", "output": "y"}


def attempt(capsys, main, *flags):
    """(exit code, stderr, stdout) of a script's main, as the shell would see them."""
    capsys.readouterr()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # as in the scripts and as Python's own
    try:
        code = main([str(flag) for flag in flags])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    if isinstance(code, str):  # sys.exit(text) prints it and exits with 1
        code, err = 1, err + code + "\n"
    return code or 0, err, out


def is_one_line(err):
    return err.startswith("error: ") and err.count("\n") == 1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A random model whose tokens are the 256 bytes, 40 records, a full run and an adapter run."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=320, n_layer=2, n_head=2, n_embd=16))
    model.save_pretrained(folder / "model")
    vocab = {char: byte for byte, char in data.BYTE_TO_CHAR.items()} | {"<|endoftext|>": 256}
    (folder / "model" / "vocab.json").write_text(json.dumps(vocab))
    (folder / "model" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "records.json").write_text(json.dumps(RECORDS))
    assert finetune.main(flags(folder, folder / "run")) == 0
    assert finetune.main(flags(folder, folder / "lora", "--lora-r", "2")) == 0
    return folder


def flags(world, out, *more):
    return ["--model", str(world / "model"), "--data", str(world / "records.json"), "--out", str(out), "--batch-size", "8",
            "--max-steps", "2", "--device", "cpu", *map(str, more)]


def train(capsys, world, out, *more):
    return attempt(capsys, finetune.main, *flags(world, out, "--no-responses", *more))


def edit(path, **changes):
    """Change keys of a JSON file; dotted names reach inside."""
    value = json.loads(path.read_text())
    for key, new in changes.items():
        *outer, last = key.split("__")
        inner = value
        for name in outer:
            inner = inner[name]
        inner[last] = new
    path.write_text(json.dumps(value))


# ------------------------------------------------------------------------------ flags


@pytest.mark.parametrize("more, code, message", [
    (["--warmup", 3], 2, "--warmup 3: the run has only 2 steps"), (["--warmup", 1e9], 2, "--warmup 1e+09"),
    (["--weight-decay", "inf"], 2, "--weight-decay"), (["--weight-decay", "nan"], 2, "--weight-decay"),
    (["--weight-decay", -1], 2, "--weight-decay"), (["--clip", "1e400"], 2, "--clip"), (["--lr", "1e-400"], 2, "--lr"),
    (["--lr", ""], 2, "--lr"), (["--lr", "0x1"], 2, "--lr"), (["--seed", -1], 2, "--seed"), (["--seed", 2**64], 2, "--seed"),
    (["--max-steps", "1e3"], 2, "--max-steps"), (["--epochs", ""], 2, "--epochs"), (["--epochs", "9" * 5000], 2, "--epochs"),
    (["--batch-size", 0], 2, "--batch-size"), (["--grad-accum", -3], 2, "--grad-accum"), (["--checkpoint-every", 0], 2, "--checkpoint-every"),
    (["--keep", 0], 2, "--keep"), (["--eval-every", 0], 2, "--eval-every"), (["--dropout", 1], 2, "--dropout"),
    (["--max-length", 1], 2, "--max-length"), (["--max-length", 321], 2, "--max-length 321"), (["--max-length", 9], 1, "raise --max-length"),
    (["--loss-on", "nan"], 2, "--loss-on"), (["--loss-on", ""], 2, "--loss-on"),
    (["--lora-r", 17], 2, "--lora-r 17: the model is 16 wide"), (["--lora-r", 10**8], 2, "--lora-r"), (["--lora-r", "9" * 30], 2, "--lora-r"),
    (["--lora-r", 2, "--lora-targets", ""], 2, "--lora-targets: must not be empty"), (["--lora-r", 2, "--lora-targets", ","], 2, "--lora-targets ,"),
    (["--lora-r", 2, "--lora-targets", "c_attn,"], 2, "--lora-targets"), (["--lora-r", 2, "--lora-targets", "lm_head"], 2, "--lora-targets lm_head"),
    (["--lora-r", 2, "--lora-alpha", "inf"], 2, "--lora-alpha"), (["--lora-r", 2, "--lora-dropout", 1], 2, "--lora-dropout"),
    (["--lora-dropout", 0], 2, "--lora-dropout has no effect without --lora-r"),
    (["--trainable", ""], 2, "--trainable: must not be empty"), (["--trainable", ","], 2, "--trainable ,"),
    (["--trainable", "last_block,"], 2, "--trainable"), (["--trainable", "\udcff*"], 2, "matches no parameter"),
    (["--trainable", "random:²"], 2, "random:²"), (["--trainable", "blocks:0-99999999999"], 2, "2 blocks"), (["--trainable", "last:-1"], 2, "last:-1"),
    (["--device", ""], 2, "--device"), (["--device", "meta"], 2, "--device meta"), (["--device", "cuda:77"], 2, "--device cuda:77"),
    (["--dtype", "fp16"], 2, "--dtype"), (["--resume", "--overwrite"], 2, "--resume and --overwrite"), (["--resume"], 1, "no run in"),
    (["--model", ""], 2, "--model: must not be empty"), (["--data", ""], 2, "--data: must not be empty"), (["--out", ""], 2, "--out: must not be empty"),
    (["--model", "a\0b"], 2, "--model: holds a NUL"), (["--data", "a\0b"], 2, "--data: holds a NUL"), (["--out", "a\0b"], 2, "--out: holds a NUL"),
    (["--model", "\udcff"], 1, "no model folder"), (["--data", "\udcff"], 1, "no such data"), (["--data", "http://host/x.json"], 1, "no such data"),
    (["--data", "file:///etc/hostname"], 1, "no such data"), (["--model", "https://host/gpt2"], 1, "no model folder"), (["--data", "-"], 1, "no such data"),
    (["--model", os.devnull], 1, "no model folder"), (["--data", os.devnull], 1, "a pipe or a device"), (["--model", "x" * 5000], 1, "too long"),
    (["--out", "x" * 300], 1, "too long"),
    (["--curriculum", "length", "--stages", 10**6], 2, "--stages"), (["stray"], 2, "stray"),
    (["--clip", "1e-300"], 2, "--clip 1e-300: must be 0"), (["--warmup", 1e18], 2, "--warmup"), (["--lr", 1e-30], 2, "--lr 1e-30 with"),
    (["--lr-decay", 1e-320], 2, "--lr-decay"), (["--lora-r", 2, "--loraplus-ratio", 1e-300], 2, "--loraplus-ratio 1e-300"),
    (["--lora-r", 2, "--lora-alpha", 1e300], 2, "--lora-alpha"), (["--lora-r", 2, "--lora-alpha", 1e-30], 2, "--lora-alpha"),
])
def test_a_wrong_flag_is_one_line_that_names_it_and_leaves_nothing(world, tmp_path, capsys, more, code, message):
    result, err, _ = train(capsys, world, tmp_path / "r", *more)
    assert result == code and is_one_line(err) and message in err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("more", [
    ["--warmup", 2], ["--eval-every", 10**6], ["--eval-batches", 10**20], ["--seed", 2**63 - 1], ["--epochs", 10**25], ["--keep", 10**20],
    ["--batch-size", 10**20], ["--grad-accum", 10**20], ["--max-examples", 10**20], ["--trainable", "all,all"], ["--trainable", " last_block "],
    ["--lora-r", 16, "--lora-targets", "c_attn,c_attn"], ["--loss-on", "1e-320"], ["--curriculum=-length"], ["--clip", 1e300], ["--clip", 1e-6],
    ["--dropout", 0.99], ["--lora-r", 2, "--lora-alpha", 1e-6], ["--warmup", 1e-300], ["--trainable", f"lisa:1@{10**20}"],
], ids=str)
def test_an_odd_flag_that_makes_sense_works(world, tmp_path, capsys, more):
    result, err, _ = train(capsys, world, tmp_path / "r", *more)
    assert (result, err) == (0, "") and (tmp_path / "r" / "run.json").exists()


@pytest.mark.parametrize("more, message", [
    (["--lr", 1e-12], "weight did not change: at a rate of 1e-12"), (["--lr", 2.9e-8], "raise --lr"),
    (["--lr-decay", 1e-8], "wte.weight did not change"), (["--lr", 1e-11, "--trainable", "gradual:1", "--epochs", 2, "--max-steps", 9], "did not change"),
    (["--lora-r", 2, "--lr", 1e-18], "lora_A.default did not change"), (["--lora-r", 2, "--lora-alpha", 1e38], "none of the 2 steps"),
], ids=str)
def test_numbers_with_which_nothing_is_learned_are_blamed_and_not_the_proof(world, tmp_path, capsys, more, message):
    result, err, _ = train(capsys, world, tmp_path / "r", *more)
    assert result == 1 and is_one_line(err) and message in err and "nothing is saved" in err
    assert not {"model", "adapter", "run.json"} & {path.name for path in (tmp_path / "r").iterdir()}


@pytest.mark.parametrize("more", [["--lr", 1e38], ["--lr", 1e300], ["--weight-decay", 1e300], ["--lora-r", 2, "--trainable", "lora,last_block", "--loraplus-ratio", 1e300]], ids=str)
def test_weights_that_end_as_nan_or_inf_are_not_saved(world, tmp_path, capsys, more):
    result, err, _ = train(capsys, world, tmp_path / "r", "--warmup", 0, "--schedule", "constant", "--clip", 0, *more)
    assert result == 1 and is_one_line(err) and "holds NaN or inf after step 2" in err
    assert not {"model", "adapter", "run.json"} & {path.name for path in (tmp_path / "r").iterdir()}


def test_out_of_memory_in_training_names_batch_longest_example_and_the_flags_that_lower_it(world, tmp_path, capsys, monkeypatch):
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"), MemoryError(),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")):
        def full(*_, error=error):
            raise error
        monkeypatch.setattr(finetune, "gradients", full)
        code, err, _ = train(capsys, world, tmp_path / type(error).__name__)
        assert code == 1 and is_one_line(err) and err.startswith("error: out of memory: --batch-size 8")
        longest = re.search(r"up to (\d+) tokens", err)
        assert 150 < int(longest[1]) < 170 and "--grad-accum" in err and "--max-length" in err
    monkeypatch.setattr(finetune, "load_model", full)
    err = train(capsys, world, tmp_path / "r")[1]
    assert is_one_line(err) and f"--model {world / 'model'} is too large" in err
    monkeypatch.setattr(evaluate, "load_model", full)
    code, err, _ = attempt(capsys, evaluate.main, world / "run")
    assert code == 1 and is_one_line(err) and "out of memory" in err


def test_out_of_memory_in_the_small_scripts_is_one_line(world, tmp_path, capsys, monkeypatch):
    adapter, scripts = world / "lora" / "adapter", (gpt.main, lora.main, lora.main)
    flags = (["--model", world / "model", "--prompt", "x"], ["show", adapter], ["merge", "--base", world / "model", "--adapter", adapter, "--out", tmp_path / "m"])
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")):
        def full(*_, error=error):
            raise error
        for module in (gpt, lora):
            monkeypatch.setattr(module, "_read_entry", full)
        for main, more in zip(scripts, flags):
            code, err, _ = attempt(capsys, main, *more)
            assert code == 1 and is_one_line(err) and "out of memory" in err
    monkeypatch.setattr(lora, "show", lambda _: F.linear(torch.ones(2), torch.ones(3)))
    with pytest.raises(RuntimeError, match="size"):
        lora.main(["show", "x"])
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_an_adapter_is_merged_or_combined_leaves_nothing(world, tmp_path, capsys):
    adapter, before = world / "lora" / "adapter", resource.getrlimit(resource.RLIMIT_FSIZE)
    for more in (["merge", "--base", world / "model", "--adapter", adapter], ["combine", "--adapter", f"{adapter}=1"]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            code, err, _ = attempt(capsys, lora.main, *more, "--out", tmp_path / "m")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert code == 1 and is_one_line(err) and "model.safetensors" in err and str(tmp_path) in err and not list(tmp_path.iterdir())


def test_an_error_that_is_ours_is_not_taken_for_the_users(world, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes cannot be multiplied")
    monkeypatch.setattr(finetune, "gradients", broken)
    with pytest.raises(RuntimeError, match="multiplied"):
        finetune.main(flags(world, tmp_path / "r"))


# ------------------------------------------------------------------------------ places


def test_places_that_cannot_be_written_are_named_before_training(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.setattr(finetune, "train", None)  # it must not come to that
    for out in ("file", "file/below", "full", ".", "..", "loop", "dangling", "/", os.devnull, world / "run", world / "model"):
        code, err, _ = train(capsys, world, out)
        assert code == (2 if out in ("..", "/", world / "model") else 1) and is_one_line(err) and "--out" in err, out
    true = Path.mkdir
    def read_only(self, *args, **kwargs):  # root may write everywhere
        raise PermissionError(13, "Permission denied", str(self))
    monkeypatch.setattr(Path, "mkdir", read_only)
    code, err, _ = train(capsys, world, "fresh")
    monkeypatch.setattr(Path, "mkdir", true)
    assert code == 1 and is_one_line(err) and "--out fresh: cannot be written (Permission denied)" in err
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "thesis.tex").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "full", "loop"]


def test_linked_folders_and_names_in_other_encodings_work(world, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "model").symlink_to(world / "model")
    odd = tmp_path / "d\udcff.json"  # a byte that is no UTF-8
    shutil.copy(world / "records.json", odd)
    code, err, _ = train(capsys, world, tmp_path / "link", "--model", tmp_path / "model", "--data", odd)
    assert (code, err) == (0, "") and (tmp_path / "there" / "run.json").exists()
    assert attempt(capsys, evaluate.main, tmp_path / "link")[:2] == (0, "")


# ------------------------------------------------------------------------------ data

ROW = '{"instruction": "a", "output": "b"}'


@pytest.mark.parametrize("content, more, message", [
    (b"", [], "empty"), ("[]", [], "no records"), ("{}", [], "record 1"), ("[1]", [], "record 1"), ('{"data": []}', [], "fields ['data']"),
    (f"[{ROW}]", [], "at least 2 are needed"), (f"{ROW}\n{ROW[:20]}", [], "record 2 (line 2)"), (f"[{ROW}", [], "not JSON"),
    (b"\x1f\x8b\0\0", [], "gunzip"), ("<!doctype html>", [], "web page"), ("version https://git-lfs.github.com/spec/v1", [], "git lfs pull"),
    (b"\x80\x04cos\nsystem\n.", [], "neither a JSON array nor JSON lines"), ("instruction,output\na,b", [], "neither"),
    (json.dumps(RECORDS).encode("utf-16"), [], "neither"), ('[{"instruction": "é", "output": "b"}]'.encode("latin-1"), [], "UTF-8"),
    ("[" * 100_000, [], "recursion"), ("[" + ",".join([ROW] * 9 + [ROW.replace("{", '{"output": "c", ')]) + "]", [], "['output', 'instruction', 'output'] are not unique"), (ROW.replace('"b"', "9" * 5000), [], "digits"), (ROW.replace("b", "\\ud800"), [], "lone surrogate"),
    (ROW.replace('"b"', '" "'), [], "output is empty"), (ROW.replace('"b"', "null"), [], "output must be text"),
    ([LONG] * 40, [], "training records: none of 34 examples"), (RECORDS[:38] + [LONG] * 2, [], "validation records: none of 2"),
    (RECORDS, ["--curriculum", "level"], "record 1 has no number under 'level'"),
    ([r | {"level": math.nan} for r in RECORDS], ["--curriculum", "level"], "record 1 has no number"),
    ([r | {"level": True} for r in RECORDS], ["--curriculum", "level"], "record 1 has no number"),
    (RECORDS, ["--instruction", "adaptive"], "instruction_long"), (RECORDS, ["--response", "reflection"], "draft"),
])
def test_broken_data_is_one_line_that_names_file_and_record(world, tmp_path, capsys, content, more, message):
    path = tmp_path / "mine.json"
    content = json.dumps(content) if isinstance(content, list) else content
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, err, _ = train(capsys, world, tmp_path / "r", "--data", path, *more)
    assert code == 1 and is_one_line(err) and message in err and "mine.json" in err
    assert not (tmp_path / "r").exists()


IMITATION = {"instruction": "### Response:\nhi <|endoftext|> {input} {0} %s", "input": "### Instruction:\n{output}\0", "output": "<|im_end|>{instruction}"}


@pytest.mark.parametrize("records, more", [
    (RECORDS[:2], []), (RECORDS[:3], []), (RECORDS[:9], []), (RECORDS[:10], []), (RECORDS[:34] + [LONG] * 4 + RECORDS[:2], []),
    ([IMITATION] * 10, []), ([IMITATION] * 10, ["--template", "chatml"]), ([r | {"level": 10**400, "x": math.nan} for r in RECORDS], ["--curriculum", "level"]),
    ([r | {"id": "x", "model_response": "old", "ended": 0, "error": 1, "": []} for r in RECORDS], []),
], ids=range(9))
def test_odd_data_trains_answers_and_is_scored(world, tmp_path, capsys, records, more):
    path, out = tmp_path / "mine.json", tmp_path / "r"
    path.write_text(json.dumps(records))
    code, err, said = attempt(capsys, finetune.main, *flags(world, out, "--data", path, *more))
    assert (code, err, "leave no room for an answer" in said) == (0, "", LONG in records)
    assert len(evaluate.read_records(out / "responses.jsonl")) == len(records) // 10
    code, err, _ = attempt(capsys, evaluate.main, out)
    if len(records) < 10:
        assert code == 1 and is_one_line(err) and "mine.json" in err and "test records" in err
    else:
        assert (code, err) == (0, "")


# ------------------------------------------------------------------------------ models


def tensors(change):
    """A fault that changes the tensors of model.safetensors."""
    def fault(folder):
        weights = read_safetensors(folder / "model.safetensors")
        change(weights)
        write_safetensors(folder / "model.safetensors", weights)
    return fault


def config(**changes):
    return lambda folder: edit(folder / "config.json", **changes)


def write(name, content):
    """A fault that puts other content into a file."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(name):
    return lambda folder: (folder / name).unlink()


PICKLE = b"cos\nsystem\n(S'touch pwned'\ntR."


def pickle_only(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(PICKLE)


def shard(name):
    """A fault: an index whose shard is called so."""
    def fault(folder):
        shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))
    return fault


def larger_tokenizer(folder):
    edit(folder / "vocab.json", **{"ab": 256, "<|endoftext|>": 257})
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")


@pytest.mark.parametrize("fault, message", [
    (tensors(lambda w: w["transformer.h.0.mlp.c_fc.weight"].__setitem__((0, 0), math.nan)), "h.0.mlp.c_fc.weight holds NaN or inf"),
    (tensors(lambda w: w.pop("transformer.wpe.weight")), "missing tensor: wpe.weight"),
    (tensors(lambda w: w.update(mine=torch.ones(2))), "unexpected tensor: mine"),
    (tensors(lambda w: w.update({k: v.long() for k, v in w.items()})), "dtype torch.int64"),
    (write("model.safetensors", b""), "not a safetensors file"), (write("model.safetensors", "<html>404</html>"), "not a safetensors file"),
    (write("model.safetensors", "version https://git-lfs.github.com/spec/v1\nsize 12"), "not a safetensors file"),
    (write("model.safetensors", PICKLE), "not a safetensors file"), (pickle_only, "pytorch_model.bin is a pickle"),
    (shard("../outside.safetensors"), "not a plain file name"), (shard("/etc/hostname"), "not a plain file name"), (shard(".."), "not a plain file name"),
    (shard("a\0b"), "missing"), (shard(3), "missing"), (shard("there.safetensors"), "missing"),
    (remove("config.json"), "config.json: no such file"), (write("config.json", "{"), "not JSON"), (write("config.json", "[]"), "not a JSON object"),
    (config(vocab_size=10**12), "vocab_size"), (config(vocab_size=10**7), "the config says (10000000, 16)"), (config(vocab_size="257"), "vocab_size"),
    (config(n_positions=10**7), "the config says"), (config(n_embd=2**40), "n_embd"), (config(n_embd=2**23), "the config says"), (config(n_head=3), "n_head"),
    (config(n_layer=10**6), "1000000 blocks"), (config(n_layer=1), "unexpected tensors"), (config(n_layer=3), "missing tensors"),
    (config(layer_norm_epsilon=math.nan), "layer_norm_epsilon"), (config(layer_norm_epsilon=-1), "layer_norm_epsilon"),
    (config(model_type="llama"), "model_type"), (config(activation_function="relu"), "activation_function"), (config(tie_word_embeddings=None), "tie_word"),
    (remove("vocab.json"), "tokenizer"), (write("vocab.json", "[]"), "broken tokenizer"), (write("merges.txt", b"\xff\xfe"), "broken tokenizer"),
    (write("tokenizer.json", "null"), "broken tokenizer"), (write("added_tokens.json", '{"<x>": 0}'), "broken tokenizer"),
    (larger_tokenizer, "the tokenizer has 258 ids, the model 257"),
])
def test_a_model_folder_that_lies_is_one_line_that_names_it(world, tmp_path, capsys, monkeypatch, fault, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "model", tmp_path / "copy")
    fault(tmp_path / "copy")
    code, err, _ = train(capsys, world, tmp_path / "r", "--model", tmp_path / "copy")
    assert code == 1 and is_one_line(err) and message in err and "copy" in err
    assert not (tmp_path / "r").exists() and not (tmp_path / "pwned").exists()


# ------------------------------------------------------------------------------ runs


def adapter(**changes):
    return lambda folder: edit(folder / "adapter" / "adapter_config.json", **changes)


@pytest.mark.parametrize("kind, fault, message", [
    ("lora", write("run.json", "{"), "run.json: not JSON"), ("lora", write("run.json", "[]"), "not a JSON object"), ("lora", write("run.json", "{}"), "not what finetune.py writes"),
    ("lora", write("run.json", '{"flags": null}'), "not what finetune.py writes"), ("lora", write("run.json", '{"flags": {"model": 3}}'), "not what finetune.py writes"),
    ("lora", lambda f: edit(f / "adapter" / "adapter_config.json", base_model_name_or_path="no/longer/there"), "its base model is gone: no model folder no/longer/there"),
    ("lora", lambda f: edit(f / "adapter" / "adapter_config.json", base_model_name_or_path=str(f)), "the run's adapter is not part of a model"),
    ("lora", lambda f: shutil.rmtree(f / "adapter"), "adapter: no such folder"), ("run", lambda f: shutil.rmtree(f / "model"), "model: no such folder"),
    ("lora", adapter(r=3), "rank 2"), ("lora", adapter(use_dora=True), "use_dora"), ("lora", adapter(target_modules="["), "target_modules"),
    ("lora", adapter(lora_alpha=10**400), "alpha"), ("lora", adapter(rank_pattern=[1]), "copy"), ("lora", write("adapter/adapter_model.safetensors", PICKLE), "not a safetensors"),
])
def test_a_broken_run_is_one_line_as_model_and_when_it_is_scored(world, tmp_path, capsys, kind, fault, message):
    shutil.copytree(world / kind, tmp_path / "copy")
    fault(tmp_path / "copy")
    (tmp_path / "copy" / "responses.jsonl").unlink()
    for code, err, _ in (train(capsys, world, tmp_path / "r", "--model", tmp_path / "copy"), attempt(capsys, evaluate.main, tmp_path / "copy")):
        assert code == 1 and is_one_line(err) and ("not what finetune.py writes" in err if "writes" in message else message in err)
    assert not (tmp_path / "r").exists() and not (tmp_path / "copy" / "scores.json").exists()


def test_a_run_serves_as_model_and_a_model_is_no_run(world, tmp_path, capsys):
    assert train(capsys, world, tmp_path / "a", "--model", world / "run")[:2] == (0, "")
    assert train(capsys, world, tmp_path / "b", "--model", world / "lora")[:2] == (0, "")
    code, err, _ = train(capsys, world, tmp_path / "c", "--model", world / "lora", "--lora-r", 2)
    assert code == 2 and is_one_line(err) and "lora.py merge" in err
    code, err, _ = train(capsys, world, tmp_path / "c", "--model", world / "lora" / "adapter")
    assert code == 1 and is_one_line(err) and "config.json: no such file" in err
    for empty in ([""], [world / "run", "--ask", ""], [world / "run", "--text", ""]):  # from a shell variable that was never set
        code, err, _ = attempt(capsys, evaluate.main, *empty)
        assert code == 2 and is_one_line(err) and "must not be empty" in err
    code, err, _ = attempt(capsys, evaluate.main, world / "run", "--text", world / "nothing")
    assert code == 1 and is_one_line(err) and "--text " in err and "No such file" in err
    for wrong in (world / "model", world / "records.json", world / "nothing", "\udcff", "/"):
        code, err, _ = attempt(capsys, evaluate.main, wrong)
        assert code == 1 and is_one_line(err) and "is not a run folder" in err
    assert attempt(capsys, evaluate.main, world / "run", world / "run")[:2] == (0, "")


def test_a_folder_with_the_name_of_a_model_is_meant_by_its_path(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "model", "tiny")
    for main, more in ((finetune.main, flags(world, tmp_path / "r", "--model", "./tiny")), (evaluate.main, [tmp_path / "r"]),
                       (finetune.main, flags(world, tmp_path / "s", "--model", tmp_path / "r")), (freeze.main, ["--model", "./tiny"]),
                       (finetune.main, flags(world, tmp_path / "l", "--model", "./tiny", "--lora-r", 2)),
                       (finetune.main, flags(world, tmp_path / "m", "--model", tmp_path / "l")),
                       (lora.main, ["merge", "--base", "./tiny", "--adapter", tmp_path / "l", "--out", tmp_path / "merged"])):
        assert attempt(capsys, main, *more)[:2] == (0, ""), more
    width = lambda folder: json.loads((folder / "config.json").read_text())["n_embd"]
    assert {width(tmp_path / name) for name in ("r/model", "s/model", "merged")} == {16}
    assert GPT.from_pretrained(Path("tiny")).config.n_embd == data.load_tokenizer(Path("tiny")).n_vocab - 241 == 16
    assert json.loads((tmp_path / "r" / "run.json").read_text())["flags"]["model"] == str(tmp_path / "tiny")


def test_a_run_on_adapters_has_its_own_base_in_any_working_directory(world, tmp_path, capsys, monkeypatch):
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        shutil.copytree(world / "model", tmp_path / name / "base")
    tensors(lambda w: w["transformer.ln_f.bias"].fill_(3.0))(tmp_path / "b" / "base")
    monkeypatch.chdir(tmp_path / "a")
    assert train(capsys, world, tmp_path / "r", "--model", "base", "--lora-r", 2)[:2] == (0, "")
    monkeypatch.chdir(tmp_path / "b")
    assert finetune.locate(str(tmp_path / "r"))[0].resolve() == (tmp_path / "a" / "base").resolve()
    assert attempt(capsys, evaluate.main, tmp_path / "r", "--text", world / "records.json")[:2] == (0, "")
    before = json.loads((tmp_path / "r" / "scores.json").read_text())["text_nll"]["before"]
    monkeypatch.chdir(tmp_path / "a")
    assert attempt(capsys, evaluate.main, tmp_path / "r", "--text", world / "records.json")[:2] == (0, "")
    assert json.loads((tmp_path / "r" / "scores.json").read_text())["text_nll"]["before"] == before


def test_a_resume_whose_adapter_differs_is_refused(world, tmp_path, capsys, monkeypatch):
    true = finetune.gradients
    def stopping(*args):
        os.kill(os.getpid(), 15)
        return true(*args)
    monkeypatch.setattr(finetune, "gradients", stopping)
    assert train(capsys, world, tmp_path / "r", "--lora-r", 2)[0] == 143
    for more in (["--lora-r", 3], [], ["--lora-r", 2, "--lora-targets", "c_attn"], ["--lora-r", 2, "--rslora"]):
        code, err, _ = train(capsys, world, tmp_path / "r", "--resume", *more)
        assert code == 1 and is_one_line(err) and "belongs to another run" in err and ("lora_" in err or "rslora" in err)


# ------------------------------------------------------------------------------ evaluate


def responses(change):
    """A fault that changes the bytes of responses.jsonl."""
    def fault(folder):
        path = folder / "responses.jsonl"
        path.write_bytes(change(path.read_bytes()))
    return fault


def unanswered(**changes):
    """A fault in run.json, with nothing answered."""
    def fault(folder):
        (folder / "responses.jsonl").unlink()
        edit(folder / "run.json", **changes)
    return fault


def blocked(name):
    """A fault: a folder where a file is to be written."""
    def fault(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
    return fault


@pytest.mark.parametrize("fault, message", [
    (responses(lambda b: b.replace(b"\n", b"", 1)), "responses.jsonl, line 1"), (responses(lambda b: b"\xff\0\n" + b), "responses.jsonl, line 1"),
    (responses(lambda b: b"[1]\n" + b), "not a JSON object"), (responses(lambda b: b"[" * 100_000 + b"\n" + b), "line 1"),
    (responses(lambda b: b.replace(b'"id": 0', b'"id": -1')), "answers to other examples"), (responses(lambda b: b.replace(b'"id": 0', b'"id": "0"')), "answers to other"),
    (responses(lambda b: re.sub(rb'"ended": \w+', b'"ended": "x"', b)), "record 1: ended"),
    (responses(lambda b: re.sub(rb'"model_response": "(\\.|[^"\\])*"', b'"model_response": 3', b)), "record 1: instruction"),
    (unanswered(data__path="gone.json"), "gone.json: no such data"), (unanswered(data__sha256="0" * 64), "has changed"), (unanswered(data__path=3), "data is 3"),
    (unanswered(train=None), "not what finetune.py writes"), (unanswered(train__max_new_tokens="x"), "max_new_tokens"), (unanswered(train__max_new_tokens=-1), "max_new_tokens"),
    (unanswered(flags__template="llama"), "llama"), (unanswered(flags__template=["x"]), "template"), (unanswered(flags__instruction="x"), "instruction 'x'"),
    (blocked("scores.json"), "scores.json"), (blocked("responses.jsonl"), "responses.jsonl"), (blocked("judge-x.jsonl"), "judge-x.jsonl"),
    (write("judge-x.jsonl", "{}\n"), "judge-x.jsonl, record 1"), (write("judge-x.jsonl", "torn\n{}\n"), "judge-x.jsonl, line 1"),
    (write("judge-x.jsonl", '{"id": [1], "key": "k", "score": 3}\n'), "record 1"), (write("judge-x.jsonl", '{"id": 0, "key": "k", "score": "high"}\n'), "record 1"),
    (write("judge-x.jsonl", '{"id": 0, "key": "k", "score": NaN}\n'), "record 1"), (write("judge-x.jsonl", '{"id": 0, "key": "k", "score": 101}\n'), "record 1"),
])
def test_a_run_that_cannot_be_scored_is_one_line_and_keeps_no_half_file(world, tmp_path, capsys, fault, message):
    shutil.copytree(world / "run", tmp_path / "copy")
    (tmp_path / "copy" / "scores.json").unlink(missing_ok=True)
    fault(tmp_path / "copy")
    code, err, _ = attempt(capsys, evaluate.main, tmp_path / "copy")
    assert code == 1 and is_one_line(err) and message in err
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("change", [lambda b: b[:-20], lambda b: b"", lambda b: b.replace(b"\n", b"\r\n"), lambda b: b + b.splitlines()[0],
                                    lambda b: re.sub(rb'"model_response": "(\\.|[^"\\])*"', rb'"model_response": "\\ud800"', b)], ids=range(5))
def test_torn_and_odd_answers_are_completed_and_scored(world, tmp_path, capsys, change):
    shutil.copytree(world / "run", tmp_path / "copy")
    responses(change)(tmp_path / "copy")
    assert attempt(capsys, evaluate.main, tmp_path / "copy")[:2] == (0, "")
    assert json.loads((tmp_path / "copy" / "scores.json").read_text())["n"] == 4


SECRET = "sk-Secret1234567"


@pytest.mark.parametrize("more, code", [
    (["--judge", ""], 2), (["--judge", "gpt"], 2), (["--judge", "ollama"], 2), (["--judge", "ollama:"], 2), (["--judge", "model:"], 2), (["--judge", "none:x"], 2),
    (["--judge", "OLLAMA:x"], 2), (["--judge", "http://x"], 2), (["--judge", "model:nowhere"], 1), (["--pairwise"], 2), (["--ask", "x", "--judge", "ollama:x"], 2),
    *[(["--judge", "ollama:x", "--judge-url", url], 2) for url in ("", "x", "ftp://h", "file:///etc/hostname", "http://", f"http://u:{SECRET}@h", f"http://u:{SECRET}@h:x",
      "http://h?x", "http://h#x", "http://h:99999", "http://h:0", "http://[::1", "javascript:1", "http://\udcff", "http://h/é")],
    *[(["--judge", "ollama:x", "--judge-timeout", seconds], 2) for seconds in (0, -1, "nan", "inf", "soon")],
    (["--judge", "openai:x", "--judge-key-env", SECRET], 2), (["--judge", "openai:x", "--judge-key-env", "NOT_SET"], 2), (["--judge", "openai:x", "--judge-key-env", "BROKEN"], 2),
    (["--judge", "ollama:x", "--judge-url", "http://127.0.0.1:9", "--judge-key-env", "KEY"], 1), (["--device", "meta"], 2), (["--device", "toaster"], 2),
    (["--text", "nowhere.txt"], 1), (["--text", "/"], 1), (["--text", os.devnull], 1), (["--ask", "x" * 5000], 1),
], ids=lambda value: str(value).encode("ascii", "replace").decode())
def test_a_wrong_judge_or_text_is_one_line_and_no_key_is_printed_or_stored(world, capsys, monkeypatch, more, code):
    monkeypatch.setenv("KEY", SECRET)
    monkeypatch.setenv("BROKEN", SECRET + "\nx")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(evaluate, "retry_delay", lambda *_: 0)
    result, err, out = attempt(capsys, evaluate.main, world / "run", *more)
    assert result == code and is_one_line(err) and SECRET not in err + out
    assert not any(SECRET.encode() in path.read_bytes() for path in (world / "run").rglob("*") if path.is_file())


# ------------------------------------------------------------------------------ the small scripts


@pytest.mark.parametrize("main, more, code, message", [
    (gpt.main, [], 2, "--prompt"), (gpt.main, ["--prompt", ""], 2, "prompt 0 is empty"), (gpt.main, ["--prompt", "x" * 5000], 2, "no room to answer"),
    (gpt.main, ["--prompt", "a", "--max-new-tokens", 0], 2, "max_new_tokens"), (gpt.main, ["--prompt", "a", "--temperature", "nan"], 2, "temperature"),
    (gpt.main, ["--prompt", "a", "--top-k", 3], 2, "temperature 0"), (gpt.main, ["--prompt", "a", "--top-p", 2, "--temperature", 1], 2, "top_p"),
    (gpt.main, ["--prompt", "a", "--model", ""], 2, "--model: must not be empty"), (gpt.main, ["--prompt", "a", "--seed", 2**64, "--temperature", 1], 2, "--seed 1844"),
    (lora.main, ["show", ""], 2, "must not be empty"), (lora.main, ["merge", "--base", "", "--adapter", "x", "--out", "fresh"], 2, "--base: must not"),
    (lora.main, ["combine", "--adapter", "x=1", "--out", ""], 2, "--out: must not"),
    (gpt.main, ["--prompt", "a", "--model", "nowhere"], 1, "no model folder nowhere"), (gpt.main, ["--nonsense"], 2, "--prompt"),
    (lora.main, [], 2, "command"), (lora.main, ["show"], 2, "folder"), (lora.main, ["melt"], 2, "melt"), (lora.main, ["show", "nowhere"], 1, "nowhere"),
    (lora.main, ["merge", "--base", "nowhere", "--adapter", "x", "--out", "fresh"], 1, "nowhere"), (lora.main, ["combine", "--adapter", "x=nan", "--out", "fresh"], 2, "x=nan"),
    (lora.main, ["combine", "--adapter", "x", "--out", "fresh"], 2, "FOLDER=WEIGHT"), (lora.main, ["merge", "--base", "x", "--adapter", "x", "--out", "/"], 1, "--out /"),
    (data.main, ["--data", "nowhere"], 1, "nowhere"), (data.main, ["--model", "nowhere"], 1, "nowhere"), (data.main, ["--max-length", 1], 2, "--max-length 1"),
    (data.main, ["--loss-on", "nan"], 2, "--loss-on"), (data.main, ["--template", "llama"], 2, "llama"), (data.main, ["--max-length", "x"], 2, "--max-length"),
    (data.main, ["--data", ""], 2, "--data: must not be empty"), (data.main, ["--model", ""], 2, "--model: must not be empty"),
    (data.main, ["--max-length", 2], 1, "error: tiny: none of"), (freeze.main, ["--model", ""], 2, "--model: must not be empty"),
], ids=lambda value: getattr(value, "__module__", str(value)[:40]))
def test_the_small_scripts_end_in_one_line_too(tmp_path, capsys, monkeypatch, main, more, code, message):
    monkeypatch.chdir(tmp_path)
    result, err, _ = attempt(capsys, main, *more)
    assert result == code and is_one_line(err) and message in err
    assert not list(tmp_path.iterdir())


class OutStream(io.TextIOBase):
    """Standard output as a notebook's kernel has it: no reconfigure, no file number, not a terminal."""

    encoding = "UTF-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)


def test_the_mains_work_in_a_notebook(world, tmp_path, monkeypatch):
    """In a cell: an event loop is running. In a background thread: no signal handlers can be set."""
    async def cell(main, *flags):
        return main(list(flags))

    commands = ((finetune.main, flags(world, tmp_path / "run")), (evaluate.main, [str(tmp_path / "run")]), (evaluate.main, [str(tmp_path / "run"), "--ask", "☃?"]),
                (gpt.main, ["--model", str(world / "model"), "--prompt", "☃", "--max-new-tokens", "2"]),
                (data.main, ["--data", str(world / "records.json"), "--model", str(world / "model")]),
                (freeze.main, ["--model", str(world / "model")]), (lora.main, ["show", str(world / "lora" / "adapter")]))
    for main, more in commands:
        monkeypatch.setattr(sys, "stdout", OutStream())
        assert not asyncio.run(cell(main, *more)) and sys.stdout.text.endswith("\n"), main.__module__
    monkeypatch.setattr(sys, "stdout", OutStream())
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(finetune.main, flags(world, tmp_path / "other")).result() == 0
    assert "proved" in sys.stdout.text


def test_what_a_stranger_wrote_does_not_steer_the_terminal(world, tmp_path, capsys):
    steer = "\x1b[2J\x07"
    (tmp_path / "records.json").write_text(json.dumps([{"instruction": "a" + steer, "output": "b"}] * 10))
    shutil.copytree(world / "model", tmp_path / "copy")
    tensors(lambda w: w.update({steer: torch.ones(1)}))(tmp_path / "copy")
    shutil.copytree(world / "lora" / "adapter", tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=steer, target_modules="c_.*" + steer)
    for main, more, code in ((finetune.main, flags(world, tmp_path / "r", "--data", tmp_path / "records.json"), 0),
                             (finetune.main, flags(world, tmp_path / "s", "--model", tmp_path / "copy"), 1), (lora.main, ["show", tmp_path / "adapter"], 0)):
        result, err, out = attempt(capsys, main, *more)
        assert result == code and "\x1b" not in err + out and "\x07" not in err + out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="writes to /dev/full")
def test_a_standard_output_that_is_full_cut_off_or_closed_is_one_line_or_none(world, tmp_path, capsys, monkeypatch):
    """What was trained or written is worth more than the lines about it; what was only to be shown has failed."""
    adapter = world / "lora" / "adapter"
    scripts = {"finetune": (finetune.main, flags(world, tmp_path / "r", "--overwrite", "--no-responses"), 0, "note: standard output: No space left on device; the run goes on"),
               "gpt": (gpt.main, ["--model", world / "model", "--prompt", "a", "--max-new-tokens", 1], 1, "error: standard output: No space left on device"),
               "lora": (lora.main, ["show", adapter], 1, "error: [Errno 28] No space left on device: 'standard output'")}
    for main, more, failed, message in scripts.values():
        for kind in ("full", "cut", "closed"):
            with monkeypatch.context() as patch:
                read, write = os.pipe()
                os.close(read)
                patch.setattr(sys, "stdout", {"full": lambda: open("/dev/full", "w"), "cut": lambda: os.fdopen(os.dup(write), "w"), "closed": lambda: None}[kind]())
                code = main([str(flag) for flag in more])
                os.close(write)
            err = capsys.readouterr().err
            if kind == "full":
                assert code == failed and err.startswith(message) and err.count("\n") == 1
            else:
                assert (code, err) == (0, "")
    assert (tmp_path / "r" / "run.json").exists()


def test_the_smallest_temperature_takes_the_likeliest_token(world, capsys):
    more = ["--model", world / "model", "--prompt", "ab", "--max-new-tokens", 5]
    greedy = attempt(capsys, gpt.main, *more)
    for cold in (["--temperature", 1e-320], ["--temperature", 1e-45, "--top-p", 0.5], ["--temperature", 1e-39, "--top-k", 9]):
        assert attempt(capsys, gpt.main, *more, *cold) == greedy


def test_nothing_that_is_read_can_be_executed():
    """No file of ours unpickles, evaluates or starts anything."""
    for name in ("gpt", "data", "freeze", "lora", "finetune", "evaluate"):
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert not re.fullmatch(r"eval|exec|compile|__import__|torch\.(load|hub\..*|jit\..*)|pickle\..*|os\.(system|popen|exec.*|spawn.*)", called), called
            assert not isinstance(node, (ast.Import, ast.ImportFrom)) or not re.search(r"\b(pickle|subprocess|importlib|marshal|shelve)\b", ast.unparse(node))


def test_ends_without_a_terminal_in_ascii_with_closed_streams_and_into_head(world, tmp_path):
    """What only a process shows: streams that are closed, cut short, or cannot hold the text."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"instruction": "Schön ☃?", "output": "größer ☃"}] * 20))
    python = f"{sys.executable} {ROOT}"
    command = f"{python}/finetune.py {' '.join(flags(world, '$OUT', '--data', path))}"
    for name, line in {
        "ascii": f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONIOENCODING=ascii TERM=dumb {command} <&- > log && "
                 f"LC_ALL=C PYTHONIOENCODING=ascii {python}/evaluate.py $OUT <&- > log",
        "small": f"{python}/gpt.py --model {world}/model --prompt ☃ >&- && "
                 f"PYTHONIOENCODING=ascii {python}/data.py --data {path} --model {world}/model | head -1",
    }.items():
        result = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=100, env=os.environ | {"OUT": name})
        assert (result.returncode, result.stderr) == (0, ""), name
        assert name == "small" or (tmp_path / name / "run.json").exists()
