"""finetune.py as a user runs it: beside a plain loop, stopped and resumed, with its proof."""

import contextlib
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import finetune
import gpt
from data import encode_examples, load_parts, load_tokenizer
from gpt import GPT, GPTConfig, read_json, read_safetensors
from lora import add_lora

MATMUL = torch.backends.mkldnn.matmul

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a random 2-block model whose tokens are the 256 bytes, and 40 records."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    GPT(GPTConfig(257, 320, 2, 2, 16)).save_pretrained(folder / "model")
    vocab = data.CHAR_TO_BYTE | {"<|endoftext|>": 256}
    (folder / "model" / "vocab.json").write_text(json.dumps(vocab))
    (folder / "model" / "merges.txt").write_text("#version: 0.2\n")
    records = [{"instruction": f"Say {'ab' * (i % 5)}{i}.", "input": "now" * (i % 3),
                "output": "yes " * (1 + i % 4)} for i in range(40)]
    (folder / "records.json").write_text(json.dumps(records))
    return folder

def run(world, out, *flags):
    """The exit code of a run that answers nothing, unless `flags` hold "answers"."""
    torch.backends.cuda.enable_flash_sdp(True)  # what a run sets is not for the next one
    MATMUL.fp32_precision = "none"
    quiet = [] if "answers" in flags else ["--no-responses"]
    flags = ["--model", world / "model", "--data", world / "records.json", "--out", out, "--lr",
             1e-3, "--batch-size", 8, "--device", "cpu", *quiet, *flags]
    return finetune.main([str(flag) for flag in flags if flag != "answers"])

metrics = lambda out: evaluate.read_records(out / "metrics.jsonl")
column = lambda out, key: [line[key] for line in metrics(out)]

def result(out):
    """What must not depend on stops: each byte of the weights; all metrics but the time."""
    files = [path.read_bytes() for path in sorted(out.rglob("*.safetensors"))]
    return files, [{k: v for k, v in line.items() if k != "seconds"} for line in metrics(out)]

def before_loss(monkeypatch, number, action):
    """Have action(model) called before the training loss of this number, from 1."""
    count, true = itertools.count(1), finetune.loss_sum

    def watched(model, *args):
        if torch.is_grad_enabled() and next(count) == number:
            action(model)
        return true(model, *args)
    monkeypatch.setattr(finetune, "loss_sum", watched)

def stopped(number, step, main, *args):
    """The exit code of main(*args), to which a signal is sent while it computes this step."""
    with pytest.MonkeyPatch.context() as patch:
        before_loss(patch, step, lambda model: os.kill(os.getpid(), number))
        if number != signal.SIGKILL:
            return main(*args)
        torch.set_num_threads(1)  # a forked process has none of the threads of this one
        if pid := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        try:
            main(*args)
        finally:
            os._exit(70)  # it was not killed

# ---- arithmetic

TRAINS = {"all": "", "last:1": r"h\.1\.|ln_f", "last_block": r"h\.1\.|ln_f", "last:2": r"h\.|ln_f",
          "lora,last_block": r".*lora_|h\.1\.|ln_f", "lora": ".*lora_", "head": "lm_head",
          "blocks:0,norms": r"h\.0\.|.*ln_", "blocks:1,norms": r"h\.1\.|.*ln_"}
FALLING = {"linear": lambda t: 1 - t, "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
           "constant": lambda t: 1.0}

def plain_run(world, spans, warmup=0, schedule="linear", clip=1.0, weight_decay=0.1, lr_decay=1.0,
              loss_on="response", template="alpaca", untie=False, lora_r=None):
    """(model, losses, gradient norms, rates) of what a reader would write: padded batches, logits
    everywhere, cross_entropy's own mean, AdamW by hand with moments by name."""
    model = GPT.from_pretrained(world / "model", tie_word_embeddings=False if untie else None)
    torch.manual_seed(123)
    if lora_r:
        add_lora(model, lora_r, 2 * lora_r)
    train, tokenizer = load_parts(world / "records.json").train, load_tokenizer(world / "model")
    encoded, _ = encode_examples(train, tokenizer, template)
    order = [b for epoch in (0, 1)
             for b in data.batches([len(e.ids) for e in encoded], 8, 123, epoch)]
    span_of_step = [policy for policy, steps in spans for _ in range(steps)]
    moments, history = {}, []
    for step, (batch, policy) in enumerate(zip(order, span_of_step, strict=True)):
        width = max(len(encoded[i].ids) for i in batch)
        x, y = torch.full((8, width), 256), torch.full((8, width), -100)
        for row, i in enumerate(batch):
            ids, n = encoded[i].ids, encoded[i].n_prompt
            x[row, :len(ids)] = torch.tensor(ids)
            first = n if loss_on == "response" else 1
            y[row, first - 1:len(ids) - 1] = torch.tensor(ids[first:])
        named = {n: p for n, p in model.named_parameters() if re.match(TRAINS[policy], n)}
        moments = {n: moments.get(n, (0.0, 0.0, 0)) for n in named}  # others are dropped
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        grads = torch.autograd.grad(loss, named.values())
        norm = math.sqrt(sum(g.square().sum().item() for g in grads))
        scale = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        rate = (step + 1) / (warmup + 1)
        if step >= warmup:
            rate = max(0.01, FALLING[schedule]((step - warmup) / (len(order) - warmup)))
        for (name, p), g in zip(named.items(), grads):
            m, v, t = moments[name]
            m, v, t = 0.9 * m + 0.1 * g * scale, 0.999 * v + 0.001 * (g * scale)**2, t + 1
            moments[name] = m, v, t
            depth = 2 if name[0] == "w" else name.startswith("h.0.")
            lr = 1e-3 * rate * lr_decay**depth
            lr *= 10 if "lora_" in name and policy != "lora" else 1
            with torch.no_grad():
                p *= 1 - lr * weight_decay * (p.dim() > 1)
                p -= lr * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        history.append((loss.item(), norm, 1e-3 * rate))
    return model, *zip(*history)

@pytest.mark.parametrize("flags, same", [
    ([], {}), (["--loss-on", "all", "--untie-head", "--schedule", "cosine", "--warmup", 3],
     dict(loss_on="all", untie=True, schedule="cosine", warmup=3)),
    (["--template", "chatml", "--clip", 0, "--weight-decay", 0.5, "--lr-decay", 0.5],
     dict(template="chatml", clip=None, weight_decay=0.5, lr_decay=0.5)),
    (["--trainable", "last_block", "--clip", 1.2, "--schedule", "constant", "--warmup", 0.4],
     dict(clip=1.2, schedule="constant", warmup=4)),
    (["--trainable", "head", "--untie-head"], dict(untie=True)), (["--lora-r", 2], dict(lora_r=2)),
    (["--lora-r", 2, "--trainable", "lora,last_block"], dict(lora_r=2)),
    (["--trainable", "gradual:1"], {}), (["--trainable", "lisa:1@2,norms"], {}),
], ids=lambda value: " ".join(map(str, value)))
def test_a_run_has_the_losses_norms_rates_and_weights_of_a_plain_loop(world, tmp_path, flags, same):
    assert run(world, tmp_path / "r", "--epochs", 2, *flags) == 0
    record = read_json(tmp_path / "r" / "run.json")
    spans = [(span["policy"], span["steps"]) for span in record["freeze"]]
    assert len(spans) == {"gradual:1": 2, "lisa:1@2,norms": 3}.get(record["flags"]["trainable"], 1)
    model, losses, norms, rates = plain_run(world, spans, **same)
    assert column(tmp_path / "r", "train_loss") == pytest.approx(losses, rel=1e-5)
    assert column(tmp_path / "r", "grad_norm") == pytest.approx(norms, rel=1e-4)
    assert column(tmp_path / "r", "lr") == pytest.approx(rates, rel=1e-6)
    ours = gpt.load_model(tmp_path / "r", "cpu")[0]
    for (name, p), (_, q) in zip(ours.named_parameters(), model.named_parameters(), strict=True):
        if not name.endswith("c_attn.bias"):  # keys' have no gradient, and Adam scales its noise
            torch.testing.assert_close(p, q, rtol=1e-4, atol=5e-6, msg=lambda m: f"{name}: {m}")

def test_micro_batches_and_a_head_in_parts_give_the_undivided_step(world, tmp_path, monkeypatch):
    assert run(world, tmp_path / "whole", "--epochs", 1) == 0
    monkeypatch.setattr(finetune, "HEAD_ROWS", 7)
    rows = {True: [], False: []}  # of a training loss, of a validation
    true = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda logits, targets, **more: (
        rows[torch.is_grad_enabled()].append(len(targets)), true(logits, targets, **more))[1])
    assert run(world, tmp_path / "parts", "--epochs", 1, "--batch-size", 2, "--grad-accum", 4,
               "--eval-every", 3) == 0
    for key in ("train_loss", "grad_norm"):
        whole, parts = column(tmp_path / "whole", key), column(tmp_path / "parts", key)
        assert parts == pytest.approx(whole, rel=1e-5), key
    records = load_parts(world / "records.json")
    tokens = [[len(r["output"]) + 1 for r in part] for part in (records.train, records.val)]
    assert max(rows[True]) == 7 and sum(rows[False]) == 2 * sum(tokens[1])
    assert sum(rows[True]) in (sum(tokens[0]), 2 * sum(tokens[0]))  # parts are computed again
    assert [loss is None for loss in column(tmp_path / "parts", "val_loss")] == [1, 1, 0, 1, 0]

def calls_of(monkeypatch, block):
    """A list that gets an entry for each call of a block, from the first training loss on."""
    calls = []
    before_loss(monkeypatch, 1, lambda model: model.h[block].ln_1.register_forward_hook(
        lambda *_: calls.append(1)))
    return calls

@pytest.mark.parametrize("remedy, flags, calls, close", [
    (["--cache-prefix"], ["--trainable", "last_block,-biases", "--dropout", 0.3], 0, 1e-5),
    (["--cache-prefix"], ["--lora-r", 2, "--lora-targets", "h.1.mlp.c_fc"], 0, 1e-5),
    (["--cache-prefix"], ["--trainable", "head,ln_f.*", "--untie-head"], 0, 1e-5),
    (["--recompute"], ["--lora-r", 2, "--trainable", "lora,blocks:0", "--dropout", 0.1], 30, 0),
    (["--compile"], [], None, 1e-5), (["--dtype", "bf16"], [], 20, 1e-2)], ids=str)
def test_what_saves_time_or_memory_changes_no_loss(
        world, tmp_path, monkeypatch, remedy, flags, calls, close):
    """Cached: the lower blocks rest, their dropout with them. Recomputed: to the bit. Compiled:
    traced and guarded as always, but run as it is, for a compiler would take a minute."""
    flags, compiled, true = ["--epochs", 2, *flags], [], torch.compile
    assert run(world, tmp_path / "plain", *flags) == 0
    monkeypatch.setattr(torch, "compile", lambda function, **options: true(
        function, backend=lambda graph, _: compiled.append(graph) or graph, **options))
    found = calls_of(monkeypatch, 0) if calls is not None else []
    assert run(world, tmp_path / "r", *flags, *remedy) == 0
    for key in ("train_loss", "grad_norm", "val_loss"):
        plain, ours = column(tmp_path / "plain", key), column(tmp_path / "r", key)
        assert ours == pytest.approx(plain, rel=close, abs=0), key
    assert len(found) == (calls or 0) and bool(compiled) == (calls is None)
    assert (ours != plain) == ("bf16" in remedy) or close == 1e-5
    assert {t.dtype for file in (tmp_path / "r").rglob("*.safetensors")
            for t in read_safetensors(file).values()} == {torch.float32}

@pytest.mark.parametrize("rounds", [False, True])
def test_products_of_a_run_are_never_rounded_to_bf16(world, tmp_path, monkeypatch, rounds):
    """torch's setting allows it. Where a CPU makes use of that, here by a patch, it is not set."""
    true, seen, x = torch.Tensor.__matmul__, [], torch.randn(300, 300)
    if rounds:
        monkeypatch.setattr(torch.Tensor, "__matmul__",
                            lambda a, b: true(a.bfloat16(), b.bfloat16()).float())
    before_loss(monkeypatch, 1, lambda model: seen.append((MATMUL.fp32_precision, true(x, x))))
    assert run(world, tmp_path / "r", "--max-steps", 1) == 0
    exact = true(x.double(), x.double())
    assert (seen[0][1] - exact).abs().max() < 2e-6 * exact.abs().max()
    assert seen[0][0] == "none" or not rounds

def test_a_run_folder_holds_what_the_contract_names(world, tmp_path):
    out, parts = tmp_path / "r", load_parts(world / "records.json")
    assert run(world, out, "--trainable", "last_block", "--epochs", 2, "--eval-every", 4,
               "answers") == 0
    record, lines = read_json(out / "run.json"), metrics(out)
    assert set(record) == {"flags", "versions", "data", "weights", "freeze", "train"}
    assert record["data"] == {
        "name": str(world / "records.json"), "sha256": parts.sha256, "split": "shuffled",
        "rows": 40, "used": 34, "dropped": 0, "truncated": 0}
    (span,), train = record["freeze"], record["train"]
    assert set(span) == {*"policy steps trainable frozen trainable_parameters fingerprint "
                         "checks".split()}
    assert (len(span["trainable"]), len(span["frozen"])) == (14, 14) and (
        span["steps"], span["trainable_parameters"]) == (10, 12 * 16 * 16 + 15 * 16)
    assert {"check_model": 2, "check_optimizer": 2, "check_gradients": 2,
            "check_unchanged": 1}.items() <= span["checks"].items()
    assert set(train) == {*"steps train_loss val_loss exact_match seconds tokens_per_second "
                          "peak_memory_bytes max_new_tokens".split()}
    assert [train[key] for key in ("steps", "val_loss")] == [10, lines[-1]["val_loss"]]
    assert train["train_loss"] == pytest.approx(sum(m["train_loss"] for m in lines[-4:]) / 4)
    assert train["tokens_per_second"] == pytest.approx(lines[-1]["tokens"] / train["seconds"], 0.1)
    assert 2**26 < train["peak_memory_bytes"] < 2**34 and train["max_new_tokens"] == 2 * 17
    assert [(m["step"], m["epoch"]) for m in lines] == [(i, 1 + (i > 5)) for i in range(1, 11)]
    assert set(lines[0]) == {*"step epoch train_loss val_loss lr grad_norm tokens seconds "
                             "records".split()}
    learned = [i for line in lines[:5] for i in line["records"]]
    assert sorted(learned) == sorted(parts.positions) and lines[0]["tokens"] > 1000
    first = sorted(evaluate.read_records(out / "responses.jsonl"), key=lambda r: r["id"])[0]
    assert {"id": 0, **parts.test[0]}.items() <= first.items() and "ended" in first
    before, after = (dict(GPT.from_pretrained(folder / "model").named_parameters())
                     for folder in (world, out))
    assert {n for n in before if not before[n].equal(after[n])} == set(span["trainable"])
    pytest.importorskip("matplotlib", reason="loss.png is drawn where it is installed")
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")

def saved_loss(out):
    """The validation loss of what a run has saved: that which it logged."""
    model, tokenizer = gpt.load_model(out, "cpu")
    val = encode_examples(load_parts(read_json(out / "run.json")["data"]["name"]).val, tokenizer)[0]
    nats, tokens = map(sum, zip(*evaluate.nlls(model, val)))
    assert nats / tokens == pytest.approx(column(out, "val_loss")[-1], rel=1e-6)
    return nats / tokens

@pytest.mark.parametrize("name, flags, parts", [
    ("full", ["--max-steps", 3], {"model"}), ("lora", ["--lora-r", 4, "--rslora"], {"adapter"}),
    ("untied", ["--untie-head", "--trainable", "head"], {"model"}),
    ("untied lora", ["--untie-head", "--lora-r", 4], {"model", "adapter"}),
    ("hybrid", ["--lora-r", 2, "--trainable", "lora,last_block"], {"model", "adapter"})])
def test_what_a_run_saves_is_what_it_validated_here_and_in_transformers_and_peft(
        world, tmp_path, name, flags, parts):
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    peft = pytest.importorskip("peft", reason="the oracle is peft")
    out = tmp_path / "r"
    assert run(world, out, "--epochs", 2, *flags) == 0
    assert {path.name for path in out.iterdir() if path.is_dir()} == parts
    assert saved_loss(out) > 0
    folder = out / "model" if "model" in parts else world / "model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if "adapter" in parts:
        config = read_json(out / "adapter" / "adapter_config.json")
        assert config["base_model_name_or_path"] == str(folder)
        theirs = peft.PeftModel.from_pretrained(theirs, out / "adapter")
    model, tokenizer = gpt.load_model(out, "cpu")
    x = torch.tensor([tokenizer.encode_ordinary("Say it, <now>")])
    torch.testing.assert_close(model(x), theirs.eval()(input_ids=x).logits, atol=2e-6, rtol=1e-5)
    ids = transformers.AutoTokenizer.from_pretrained(folder)("Say it, <now>")["input_ids"]
    assert ids == x[0].tolist()

def test_a_run_goes_on_from_the_adapter_or_the_weights_of_another(world, tmp_path):
    for name, more in (("a", ["--lora-r", 2]), ("m", []), ("n", ["--model", tmp_path / "m"]),
                       ("b", ["--model", tmp_path / "a"]), ("c", ["--model", tmp_path / "b"])):
        assert run(world, tmp_path / name, "--lr", 1e-2, "--epochs", 1, *more) == 0, name
    a, b, c, m, n = (saved_loss(tmp_path / name) for name in "abcmn")
    assert a > b > c and m > n
    assert read_json(tmp_path / "c" / "run.json")["flags"]["trainable"] == "lora"

def test_dropped_and_cut_records_are_counted_and_said_and_limits_hold(world, tmp_path, capsys):
    records = read_json(world / "records.json")
    records[3]["output"], records[5]["instruction"] = "x" * 400, "y" * 400
    for name, part in (("train", records[:34]), ("val", records[34:36]), ("test", records[36:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    for more, n, longest in (([], 34, 320), (["--max-examples", 4], 4, 320),
                             (["--max-length", 175], 34, 175)):
        assert run(world, tmp_path / "r", "--data", tmp_path, "--epochs", 9, "--max-steps", 7,
                   "--overwrite", *more) == 0
        sizes = [(len(data.format_prompt(r)), len(r["output"]) + 1)
                 for r in records[:n] + records[34:36]]
        dropped = [prompt >= longest for prompt, _ in sizes]
        cut = sum(prompt < longest < prompt + answer for prompt, answer in sizes)
        found = read_json(tmp_path / "r" / "run.json")["data"]
        used = {i for indices in column(tmp_path / "r", "records") for i in indices}
        assert used == {i for i in range(n) if not dropped[i]} and found["used"] == len(used)
        assert (found["dropped"], found["truncated"]) == (sum(dropped), cut)
        assert re.search(rf"note .*\b{sum(dropped)} rec.* {cut} are cut", capsys.readouterr().out)
        assert found["split"] == "folder" and column(tmp_path / "r", "step") == [*range(1, 8)]

@pytest.mark.parametrize("flags, name, rates", [
    (["--model", "tiny", "--data", "tiny"], "tiny-all", (3e-4, 3, 16)),
    (["--lora-r", 2], "model-lora-r2-records", (3e-3, 3, 16)),
    (["--trainable", "blocks:0-1,norms"], "model-blocks_0-1,norms-records", (3e-4, 3, 16)),
    (["--model", "LARGE", "--trainable", "h.*"], "LARGE-h._-records", (5e-5, 2, 8)),
    (["--model", "LARGE", "--lora-r", 1, "--data", "tiny"], "LARGE-lora-r1", (5e-4, 2, 8))])
def test_defaults_follow_from_model_policy_rank_and_data(
        world, tmp_path, monkeypatch, capsys, flags, name, rates):
    """Three steps of the default run; that the whole of it is right is shown by tests/bench.py."""
    monkeypatch.chdir(tmp_path)
    large = shutil.copytree(world / "model", "of ten million parameters")
    GPT(GPTConfig(257, 156_500, 1, 1, 64)).save_pretrained(large)
    os.symlink(large, "LARGE")  # which may lead elsewhere tomorrow (huggingface/peft#1932)
    monkeypatch.setattr(finetune, "load_parts", lambda name: data.Parts._replace(
        (parts := data.load_parts(name)), val=parts.val[:9], test=parts.test[:9]))
    flags = ["--model", world / "model", "--data", world / "records.json", "--max-steps", 3,
             "--device", "cpu", *flags]
    assert finetune.main([str(flag) for flag in flags]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [name]
    record = read_json(tmp_path / "runs" / name / "run.json")
    flags = record["flags"]
    assert (flags["lr"], flags["epochs"], flags["batch_size"]) == pytest.approx(rates)
    assert not flags["model"].endswith("LARGE")
    if name == "tiny-all":
        assert (flags["model"], flags["data"], record["data"]["rows"]) == ("tiny", "tiny", 4500)
        assert record["data"]["split"] == "file order" and "2,222,208" in capsys.readouterr().out
        assert len(evaluate.read_records(tmp_path / "runs" / name / "responses.jsonl")) == 9

def nudge(model):
    with torch.no_grad():
        model.wte.weight[0, 0] += 1e-6

def adam(parameters):
    return torch.optim.AdamW([{"params": list(parameters), "peak": 1e-3}])

@pytest.mark.parametrize("loss, action, check, name", [
    (3, nudge, "frozen, but changed", "wte.weight"),
    (4, nudge, "frozen, but changed", "wte.weight"),
    (1, lambda m: m.h[0].ln_1.bias.requires_grad_(), "with a gradient", "h.0.ln_1.bias"),
    (4, lambda m: m.h[0].ln_1.bias.requires_grad_(), "not as planned", "h.0.ln_1.bias is True"),
    (4, lambda m: setattr(m.ln_f, "bias", torch.nn.Parameter(torch.ones(16))), "replaced", "ln_f"),
    (1, lambda m: m.ln_f.bias.register_hook(torch.zeros_like), "zero gradients", "ln_f.bias"),
    (0, (finetune, "build_optimizer", lambda model, *_: adam(model.parameters())),
     "holds what does not train", "h.0.ln_1.bias"),
    (0, (finetune, "build_optimizer", lambda model, plan, *_: adam(plan.parameters()[1:])),
     "lacks what should train", "h.1.ln_1.weight"),
    (0, (torch.optim.AdamW, "step", lambda self: None), "did not change", "h.1.ln_1.bias")])
def test_a_planted_violation_ends_the_run_with_its_name_and_without_a_result(
        world, tmp_path, monkeypatch, capsys, loss, action, check, name):
    before_loss(monkeypatch, loss, action) if loss else monkeypatch.setattr(*action)
    assert run(world, tmp_path / "r", "--trainable", "last_block", "--max-steps", 4,
               "--checkpoint-every", 3) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert check in error and name in error
    assert {path.name for path in (tmp_path / "r").iterdir()} <= {
        "metrics.jsonl", *(["checkpoint.pt"] if loss == 4 or "did not" in check else [])}

STOPS = {  # flags, signal, step in which it comes; spans end after the steps 5, 10 and 3, 6, ...
    "Ctrl-C": ([], signal.SIGINT, 7), "last step": (["--trainable", "last:1"], signal.SIGTERM, 15),
    "lora": (["--lora-r", 2, "--lora-dropout", 0.2], signal.SIGTERM, 1),
    "hybrid": (["--lora-r", 2, "--trainable", "lora,last_block"], signal.SIGKILL, 7),
    "prefix": (["--trainable", "last_block", "--cache-prefix"], signal.SIGTERM, 7),
    "bf16": (["--dtype", "bf16"], signal.SIGTERM, 7),
    "gradual": (["--trainable", "gradual:1", "--lr-decay", 0.4], signal.SIGTERM, 7),
    "lisa": (["--trainable", "lisa:1@3,embeddings"], signal.SIGINT, 8),
    "killed": (["--trainable", "lisa:1@3", "--untie-head"], signal.SIGKILL, 11),
    "end of a span": (["--trainable", "lisa:1@3,norms"], signal.SIGTERM, 6),
    "lisa and lora": (["--lora-r", 2, "--trainable", "lora,lisa:1@2"], signal.SIGTERM, 10)}

@pytest.mark.parametrize("case", STOPS)
def test_a_run_that_was_stopped_and_resumed_is_the_uninterrupted_one_bit_for_bit(
        world, tmp_path, case):
    flags, number, step = STOPS[case]
    flags = ["--epochs", 3, "--dropout", 0.1, "--checkpoint-every", 4, *flags]
    assert run(world, tmp_path / "a", *flags) == 0
    code = stopped(number, step, run, world, tmp_path / "b", *flags)
    expected = (-9, step - 1) if number == signal.SIGKILL else (128 + number, step)
    assert (code, len(metrics(tmp_path / "b"))) == expected
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "torn')  # as a killed process may leave it
    assert run(world, tmp_path / "b", *flags, "--resume") == 0
    assert result(tmp_path / "a") == result(tmp_path / "b")
    whole, resumed = (read_json(tmp_path / name / "run.json") for name in "ab")
    for a, b in zip(whole["freeze"], resumed["freeze"], strict=True):
        checks, more = a.pop("checks"), b.pop("checks")
        assert a == b and checks["check_gradients"] == more["check_gradients"]
        assert all(more[name] >= times for name, times in checks.items())
    assert whole["train"]["train_loss"] == resumed["train"]["train_loss"]
    assert not list((tmp_path / "b").glob("checkpoint*"))

@pytest.fixture(scope="module")
def half(world, tmp_path_factory):
    """A run that was stopped after step 7 of 10; its checkpoints are of the steps 6 and 7."""
    out = tmp_path_factory.mktemp("half") / "r"
    flags = ["--epochs", 2, "--checkpoint-every", 2, "--trainable", "last_block"]
    assert stopped(signal.SIGTERM, 7, run, world, out, *flags) == 143
    return out

HALF = ["--epochs", 2, "--trainable", "last_block", "--resume"]

def test_every_ten_minutes_there_is_a_checkpoint(world, tmp_path, capfd, monkeypatch):
    assert stopped(signal.SIGKILL, 5, run, world, tmp_path / "b") == -signal.SIGKILL
    assert run(world, tmp_path / "b", "--resume") == 1
    assert "no intact checkpoint" in capfd.readouterr().err
    monkeypatch.setattr(finetune, "CHECKPOINT_SECONDS", 0)
    assert run(world, tmp_path / "a") == 0
    assert stopped(signal.SIGKILL, 5, run, world, tmp_path / "b", "--overwrite") == -signal.SIGKILL
    calls = calls_of(monkeypatch, 1)
    assert run(world, tmp_path / "b", "--resume", "--eval-every", 99) == 0
    assert len(calls) == 11 + 1  # all steps but the first four; the validation
    assert result(tmp_path / "a")[0] == result(tmp_path / "b")[0]

flip = lambda content: content[:5000] + bytes([content[5000] ^ 4]) + content[5001:]

@pytest.mark.parametrize("damage", [flip, lambda c: c[:-1], lambda c: c[:9], lambda c: b"",
                                    lambda c: c + b"x", None], ids=range(6))
def test_a_damaged_checkpoint_is_passed_over_by_name_for_the_one_before_if_that_is_intact(
        world, half, tmp_path, capsys, damage):
    out, newer = shutil.copytree(half, tmp_path / "r"), tmp_path / "r" / "checkpoint.pt"
    newer.write_bytes(damage(newer.read_bytes())) if damage else newer.unlink()
    none = shutil.copytree(out, tmp_path / "none")
    assert run(world, out, *HALF) == 0
    assert (str(newer) in capsys.readouterr().out) == (damage is not None)
    assert run(world, tmp_path / "whole", *HALF[:-1]) == 0
    assert result(out) == result(tmp_path / "whole")
    (none / "checkpoint.prev.pt").write_bytes(flip((none / "checkpoint.prev.pt").read_bytes()))
    assert run(world, none, *HALF) == 1 and len(metrics(none)) == 7  # nothing was begun anew
    error = capsys.readouterr().err
    assert "no intact checkpoint" in error and error.count("\n") == 1

@pytest.mark.parametrize("complete", [False, True])
def test_a_resume_as_another_run_is_refused_with_what_differs(
        world, half, tmp_path, capsys, monkeypatch, complete):
    out, other = shutil.copytree(half, tmp_path / "r"), shutil.copytree(world, tmp_path / "other")
    assert not complete or run(world, out, *HALF) == 0
    (other / "records.json").write_text((world / "records.json").read_text().replace("w", "v"))
    model = GPT.from_pretrained(other / "model")
    nudge(model)
    model.save_pretrained(other / "model")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for flags, what in ((["--lr", 2e-3], "lr 0.001 0.002"), (["--epochs", 3], "epochs 2 3"),
                        (["--lora-r", 2, "--trainable", "lora"], "lora_r None 2"),
                        (["--trainable", "all"], "trainable last_block all"),
                        (["--seed", 5], "seed 123 5"), (["--dtype", "bf16"], "dtype float32 bf"),
                        (["--data", other / "records.json"], "data"),
                        (["--model", other / "model"], "weights|model")):
        capsys.readouterr()
        assert run(world, out, *HALF, *flags) == 1
        error = capsys.readouterr().err
        assert re.fullmatch(rf"error: --resume: .*\b({what.replace(' ', '.* ')}).*\n", error), flags
    more = ["--recompute", "--eval-every", 3, "--checkpoint-every", 1]
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(world, out, *HALF, *more) == 0  # these may differ
    assert ("complete" in capsys.readouterr().out) == complete
    assert run(world, tmp_path / "whole", *HALF[:-1]) == 0
    assert result(out)[0] == result(tmp_path / "whole")[0]
    monkeypatch.setitem(data.TEMPLATES, "alpaca", data.TEMPLATES["plain"])  # other ids
    assert run(world, out, *HALF) == 1 and "weights was" in capsys.readouterr().err

@pytest.mark.parametrize("every, plant", [
    (9, lambda ln_f: ln_f.bias.register_hook(lambda g: g / 0)),
    (9, lambda ln_f: ln_f.bias.data.div_(0)), (5, lambda ln_f: ln_f.register_forward_hook(
        lambda *seen: None if torch.is_grad_enabled() else seen[2] * math.nan))], ids=str)
def test_numbers_that_are_not_finite_end_the_run_and_its_checkpoint_is_kept(
        world, tmp_path, monkeypatch, capsys, every, plant):
    flags = ["--epochs", 2, "--checkpoint-every", 2, "--eval-every", every]
    with monkeypatch.context() as patch:
        before_loss(patch, 5, lambda model: plant(model.ln_f))
        assert run(world, tmp_path / "r", *flags) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: step 5") and error.count("\n") == 1
    assert len(metrics(tmp_path / "r")) == 4 and not (tmp_path / "r" / "run.json").exists()
    assert run(world, tmp_path / "r", *flags, "--resume") == 0
    assert run(world, tmp_path / "whole", *flags) == 0
    assert result(tmp_path / "r") == result(tmp_path / "whole")

def test_on_a_full_disk_the_last_checkpoint_is_kept(world, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        before_loss(patch, 4, lambda model: resource.setrlimit(
            resource.RLIMIT_FSIZE, (50_000, limits[1])))
        try:
            with contextlib.suppress(RuntimeError):  # torch.save's own
                assert run(world, tmp_path / "r", "--checkpoint-every", 2) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run(world, tmp_path / "r", "--resume") == 0

def test_overwrite_removes_what_a_run_writes_and_nothing_else(world, tmp_path, monkeypatch):
    """The run answers; of right answers one that has not ended counts as wrong."""
    out = tmp_path / "r"
    monkeypatch.setattr(finetune, "generate_responses", lambda model, tokenizer, examples, *_: [
        {**e, "model_response": e["output"] if i else "no", "ended": i > 1}
        for i, e in enumerate(examples)])
    assert run(world, out, "--max-steps", 2, "answers") == 0
    assert read_json(out / "run.json")["train"]["exact_match"] == 2 / 4
    for name in ("notes.txt", "judge-ollama.jsonl", "scores.json", "checkpoint.pt"):
        (out / name).write_text("{}")
    assert run(world, out, "--max-steps", 1, "--lora-r", 2, "--overwrite") == 0
    assert {path.name for path in out.iterdir()} - {"loss.png"} == {
        "run.json", "metrics.jsonl", "adapter", "notes.txt"} and len(metrics(out)) == 1
