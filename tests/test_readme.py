"""Every command and snippet of the README runs, or says what it needs."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
SHORT = ["--max-steps", "2", "--max-examples", "40", "--device", "cpu"]

def commands():
    """Of every block without a language, the lines that start a program, but for what they need."""
    lines = [line for kind, block in BLOCKS if not kind for line in block.splitlines()]
    lines = [line for line in lines if line.startswith(("python ", "torchrun "))]
    return [line.partition("#")[0] for line in lines if "# needs" not in line]

def test_every_command_runs_or_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    record = {"instruction": "Say {}.", "input": "", "output": "{}."}
    records = [{k: v.format(i) for k, v in record.items()} for i in range(40)]
    Path("my.json").write_text(json.dumps(records))
    scripts = []
    for line in commands():
        program, *argv = shlex.split(line)
        if program == "torchrun":
            at = argv.index("finetune.py")
            argv[at] = str(ROOT / "finetune.py")
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            launch = [sys.executable, "-m", "torch.distributed.run", *argv, *SHORT]
            assert subprocess.run(launch, env=env, capture_output=True).returncode == 0, line
        elif argv[0] not in ("-m", "tests/bench.py"):
            extra = SHORT if argv[0] == "finetune.py" else []
            main = importlib.import_module(argv[0].removesuffix(".py")).main
            assert main(argv[1:] + extra) == 0, (line, capsys.readouterr().err)
        scripts.append(argv[0])
    assert {"finetune.py", "evaluate.py", "data.py", "lora.py"} <= set(scripts)
    assert len(scripts) > 10

def test_every_snippet_runs_as_it_stands(tmp_path):
    snippets = [block for kind, block in BLOCKS if kind == "python"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for code in snippets:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len(snippets) >= 3

def test_every_link_to_a_file_leads_to_one():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
