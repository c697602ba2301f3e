"""What a user can get wrong: one line on stderr that names it, exit code, nothing half-written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data
import evaluate
import finetune
import freeze
import gpt
import lora
from gpt import read_json
from test_finetune import flags_of, run, world  # noqa: F401
from test_public_models import config, file, tensors

ROOT = Path(__file__).resolve().parents[1]
MAINS = {module.__name__: module.main for module in (data, evaluate, finetune, freeze, gpt, lora)}
FLAGS = {  # those of DESIGN.md, by script
    "finetune": """--model --data --out --trainable --lora-r --lora-alpha --lora-targets
        --lora-dropout --rslora --untie-head --template --loss-on --max-length --max-examples
        --epochs --batch-size --grad-accum --lr --lr-decay --dropout --weight-decay --warmup
        --schedule --clip --seed --max-steps --device --dtype --compile --cache-prefix --recompute
        --fsdp --eval-every --checkpoint-every --resume --overwrite --no-responses""",
    "evaluate": "--data --template --judge --judge-url --pairwise --text --plot --ask",
    "gpt": "--model --prompt --max-new-tokens --temperature --top-k --top-p --seed",
    "data": "--data --model --template --max-length", "freeze": "--model --trainable --lora-r"}

@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):  # noqa: F811
    """A folder with a model, the records, a full run that has answered, and an adapter's run."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(world, folder, dirs_exist_ok=True)
    assert run(folder, folder / "full", "--max-steps", 2, answers=True) == 0
    assert run(folder, folder / "lora", "--max-steps", 2, "--lora-r", 2) == 0
    return folder

def attempt(capsys, main, *flags):
    """(exit code, what it wrote to stderr, to stdout), as a shell would see them."""
    capsys.readouterr()
    try:
        code = main([str(flag) for flag in flags])
    except SystemExit as stop:
        code = stop.code
    return code, *reversed(capsys.readouterr())

def says(result, code, message):
    """Whether that is this exit code, and one line with this message."""
    return result[0] == code and re.fullmatch(f".*error: .*(?:{message}).*\n", result[1])

def files(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}

@pytest.mark.parametrize("name", MAINS)
def test_help_names_every_flag_of_the_contract(capsys, name):
    code, err, out = attempt(capsys, MAINS[name], "--help")
    assert (code, err) == (0, "")
    flags, shown = FLAGS.get(name, "").split(), re.findall(r"--[a-z][a-z-]+", out)
    assert {*flags} <= {*shown} and (name != "finetune" or {*flags, "--help"} == {*shown})

REFUSED = """--lora-r 0 | --lora-dropout 0.1 | --lora-alpha 4 | --lora-targets c_fc | --rslora
    | --lr -1 | --lr nan | --lr inf | --lr 0 | --epochs 0 | --epochs many | --clip -1
    | --batch-size 0 | --weight-decay -1 | --dropout nan | --lr-decay 0 | --seed -1 | --max-steps 0
    | --eval-every 0 | --checkpoint-every 0 | --nonsense | --dtype fp16 | --loss-on 0.5 | stray"""

@pytest.mark.parametrize("flags, code, message", [
    *((flags, 2, re.split("[ =]", flags)[0]) for flags in re.split(r"\s+\| ", REFUSED)),
    ("--trainable last:9", 1, "last:9"), ("--trainable none", 1, "none"),
    ("--trainable lora", 1, "lora"), ("--trainable head", 1, "--untie-head"),
    ("--trainable last_block,", 1, "trainable|''"), ("--trainable lisa:2@1", 1, "lisa:2@1"),
    ("--trainable gradual:1,lisa:1@1", 1, "gradual:1,lisa:1@1"), ("--trainable h.0", 1, "h.0"),
    ("--lora-r 2 --trainable last_block", 1, "--lora-r"), ("--fsdp", 1, "--fsdp"),
    ("--lora-r 2 --lora-targets c_foo", 1, "c_foo"), ("--cache-prefix", 1, "--cache-prefix"),
    ("--lora-r 2 --lora-dropout 1", 2, "--lora-dropout 1"), ("--fsdp --cache-prefix", 2, "--fsdp"),
    ("--resume", 1, "--resume: no run in"), ("--resume --overwrite", 2, "--resume and"),
    ("--max-length 999", 1, "--max-length"), ("--max-length 9", 1, "max.length"),
    ("--device cuda:77", 1, "--device cuda:77"), ("--device toaster", 1, "--device toaster"),
    ("--model no/such/folder", 1, "no/such/folder"), ("--data no-such.json", 1, "no-such.json"),
    ("--model RUNS/lora --lora-r 2", 1, "adapter"), ("--model RUNS/lora/adapter", 1, "adapter"),
    ("--model RUNS/records.json", 1, "records.json"), ("--data RUNS/model", 1, "train.jsonl?"),
    ("gpt", 2, "--prompt"), ("gpt --prompt a --model nowhere", 1, "nowhere"),
    ("gpt --prompt a --max-new-tokens 0", 1, "max_new_tokens"),
    ("gpt --prompt a --temperature nan", 1, "temperature"),
    ("data --data nowhere", 1, "nowhere"), ("data --model nowhere", 1, "nowhere"),
    ("data --template llama", 2, "llama"), ("data --max-length x", 2, "--max-length"),
    ("data --max-length 2", 1, "max_length"), ("freeze --trainable last:9", 1, "last:9"),
    ("freeze --trainable head", 1, "untie"), ("freeze --model nowhere", 1, "nowhere"),
    ("freeze --lora-r x", 2, "--lora-r"), ("freeze --trainable gradual:1", 1, "gradual:1"),
    ("lora show", 2, "folder"), ("lora merge --out fresh", 2, "--base"),
    ("lora merge --base RUNS/model --adapter RUNS/model --out fresh", 1, "adapter_config.json"),
    ("lora merge --base RUNS/model --adapter RUNS/lora --out RUNS/full", 1, "--out .*full"),
    ("evaluate", 2, "required"), ("evaluate nowhere", 1, "nowhere"),
    ("evaluate RUNS/model", 1, "--data"), ("evaluate RUNS/full --judge gpt", 2, "--judge gpt"),
    ("evaluate RUNS/full --pairwise", 2, "--pairwise"),
    ("evaluate RUNS/full --judge model:nowhere", 1, "nowhere"),
    ("evaluate RUNS/full --data tiny", 1, "another file"),
    ("evaluate RUNS/lora/adapter --data tiny", 1, "merge it first")], ids=lambda v: str(v)[:60])
def test_what_is_wrong_in_a_command_is_named_in_one_line_and_leaves_nothing(
        runs, tmp_path, monkeypatch, capsys, flags, code, message):
    """Where the command names no script, it is finetune.py."""
    monkeypatch.chdir(tmp_path)
    before, flags = files(runs), flags.replace("RUNS", str(runs)).split()
    main = MAINS[flags.pop(0)] if flags[0] in MAINS else finetune.main
    flags = flags_of(runs, "r", *flags) if main == finetune.main else flags
    assert says(attempt(capsys, main, *flags), code, message)
    assert files(runs) == before and not list(tmp_path.iterdir())

ROW = b'{"instruction": "a", "output": "b"}'
mine = lambda content: file("../records.json", content)

def longer(folder):
    vocab = read_json(folder / "vocab.json") | {"ab": 256, "<|endoftext|>": 257}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")

@pytest.mark.parametrize("fault, message", [
    (mine(b""), "empty"), (mine(b"[]"), "bad|no record"), (mine(b"a,b\nc,d"), "csv"),
    (mine(b'{"data": [1]}'), "record 1"), (mine(b"\x1f\x8b\0"), "gzip"),
    (mine(b"<!doctype html>"), "web page"), (mine(ROW), "1 record|too few|at least"),
    (mine((ROW + b"\n") * 9 + ROW.replace(b'"b"', b"null")), "record 10"),
    (mine((ROW + b"\n") * 9 + ROW.replace(b"}", b', "label": false}')), "label"),
    (tensors(lambda t: {name: p / 0 for name, p in t.items()}), "ln_f.bias .*NaN"),
    (tensors(lambda t: {name: p for name, p in t.items() if "wpe" not in name}), "wpe.weight"),
    (longer, "tokenizer"), (config(n_positions=9), "wpe"), (config(model_type="llama"), "llama"),
    (file("model.safetensors", b"version https://git-lfs.github.com/spec/v1"), "git lfs"),
    (file("config.json", b"{"), "config.json: not JSON"), (file("vocab.json", b"{}"), "copy"),
    (lambda folder: (folder / "vocab.json").unlink(), "vocab.json")])
def test_broken_data_or_a_broken_model_is_named(runs, tmp_path, capsys, fault, message):
    copy = shutil.copytree(runs, tmp_path / "copy")
    fault(copy / "model")
    result = attempt(capsys, finetune.main, *flags_of(copy, tmp_path / "r"))
    assert says(result, 1, message) and re.search(rf"{copy}/(model|records\.json)", result[1])
    assert list(tmp_path.iterdir()) == [copy]

@pytest.mark.parametrize("out, more, message", [
    ("full", [], "full.*--resume.*--overwrite.*another --out"), ("records.json", [], "records"),
    ("thesis", ["--overwrite"], "thesis"), ("thesis", [], "another"), ("model", [], "model"),
    ("full", ["--overwrite", "--model", "full"], "full"), ("", ["--overwrite"], "copy"),
    ("lora", ["--overwrite", "--model", "lora"], "lora"), ("records.json/below", [], "records"),
    ("thesis", ["--resume"], "no run in")])
def test_an_occupied_place_is_refused_and_left_as_it_is(runs, tmp_path, capsys, out, more, message):
    copy = shutil.copytree(runs, tmp_path / "copy")
    (copy / "thesis").mkdir()
    (copy / "thesis" / "thesis.tex").write_text("years of work")
    before, more = files(copy), [copy / word if word in ("full", "lora") else word for word in more]
    result = attempt(capsys, finetune.main, *flags_of(runs, copy / out, *more))
    assert says(result, 1, message) and files(copy) == before

@pytest.mark.parametrize("flags, missing", [
    ("gpt --prompt a", "data"), ("gpt --prompt a", "lora"), ("freeze", "gpt"), ("freeze", "lora"),
    ("lora show RUNS/lora", "gpt"), ("evaluate RUNS/full", "gpt")])
def test_a_script_that_was_copied_alone_says_what_is_missing(
        runs, monkeypatch, capsys, flags, missing):
    monkeypatch.setitem(sys.modules, missing, None)  # as if there were no such file
    name, *flags = flags.replace("RUNS", str(runs)).split()
    assert says(attempt(capsys, MAINS[name], *flags), 1, rf"\b{missing}\b")

@pytest.mark.parametrize("command", [
    "gpt.py --model RUNS/model --prompt a", "finetune.py --model RUNS/model --no-responses "
    "--data RUNS/records.json --max-steps 2 --trainable last_block"])
def test_scripts_run_from_anywhere_under_python_O_without_numpy_or_torchs_compiler(
        runs, tmp_path, command):
    for name in ("numpy", "sympy"):  # the compiler imports sympy
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    script, *flags = command.replace("RUNS", str(runs)).split()
    done = subprocess.run([sys.executable, "-O", ROOT / script, *flags], env=environment,
                          cwd=tmp_path, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout
    assert script == "gpt.py" or (tmp_path / "runs/model-last_block-records/run.json").exists()
