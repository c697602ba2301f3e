"""finetune.py as a user runs it: beside a plain loop, stopped and resumed, with its proof."""

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

def flags_of(world, out, *more):  # on this model and these records
    flags = ["--model", world / "model", "--data", world / "records.json", "--out", out, "--lr",
             1e-3, "--batch-size", 8, "--device", "cpu", *more]
    return [str(flag) for flag in flags]

def run(world, out, *flags, answers=False):  # its exit code
    torch.backends.cuda.enable_flash_sdp(True)  # what a run sets is not for the next one
    MATMUL.fp32_precision = "none"
    quiet = [] if answers else ["--no-responses"]
    return finetune.main(flags_of(world, out, *quiet, *flags))

def fails(capsys, message, world, out, *flags):
    """Whether a run ends with code 1 and this message in its one line on stderr."""
    capsys.readouterr()
    code = run(world, out, *flags)
    return code == 1 and re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)

metrics = lambda out: evaluate.read_records(out / "metrics.jsonl")
column = lambda out, key: [line[key] for line in metrics(out)]
curves = lambda out: [line[key] for key in ("train_loss", "grad_norm", "val_loss")
                      for line in metrics(out) if line[key] is not None]

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

fill_disk = lambda model: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

def stopped(what, step, main, *args):
    """The exit code of main(*args) in a process of its own, to which this happens while it computes
    this step: a signal is sent, or something is done to the model."""
    torch.set_num_threads(1)  # a forked process has none of the threads of this one
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    send = lambda model: os.kill(os.getpid(), what)
    before_loss(pytest.MonkeyPatch(), step, what if callable(what) else send)
    try:
        os._exit(main(*args))
    finally:
        os._exit(1)  # an exception of torch.save's own

TRAINS = {"all": "", "last:1": r"h\.1\.|ln_f", "last_block": r"h\.1\.|ln_f", "last:2": r"h\.|ln_f",
          "lora,last_block": r".*lora_|h\.1\.|ln_f", "lora": ".*lora_", "head": "lm_head",
          "blocks:0,norms": r"h\.0\.|.*ln_", "blocks:1,norms": r"h\.1\.|.*ln_"}
FALLING = {"linear": lambda t: 1 - t, "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
           "constant": lambda t: 1.0}

def plain_run(world, spans, trainable=None, lora_r=None, untie_head=False, template="alpaca",
              loss_on="response", lr_decay=1.0, weight_decay=0.1, warmup=0.05, clip=1.0,
              schedule="linear"):
    """(model, losses, gradient norms, rates) of what a reader would write: padded batches, logits
    everywhere, cross_entropy's own mean, AdamW by hand with moments by name."""
    model = GPT.from_pretrained(world / "model", tie_word_embeddings=False if untie_head else None)
    torch.manual_seed(123)
    if lora_r:
        add_lora(model, lora_r, 2 * lora_r)
    train, tokenizer = load_parts(world / "records.json").train, load_tokenizer(world / "model")
    encoded, _ = encode_examples(train, tokenizer, template)
    order = [b for epoch in (0, 1)
             for b in data.batches([len(e.ids) for e in encoded], 8, 123, epoch)]
    warmup = warmup if warmup >= 1 else round(warmup * len(order))
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

@pytest.mark.parametrize("flags", [
    {}, dict(loss_on="all", untie_head=True, schedule="cosine", warmup=3),
    dict(template="chatml", clip=0, weight_decay=0.5, lr_decay=0.5),
    dict(trainable="last_block", clip=1.2, schedule="constant", warmup=0.4),
    dict(trainable="head", untie_head=True), dict(lora_r=2), dict(trainable="gradual:1"),
    dict(lora_r=2, trainable="lora,last_block"), dict(trainable="lisa:1@2,norms")], ids=str)
def test_a_run_has_the_losses_norms_rates_and_weights_of_a_plain_loop(world, tmp_path, flags):
    words = [f"--{k.replace('_', '-')}" + f"={v}" * (v is not True) for k, v in flags.items()]
    assert run(world, tmp_path / "r", "--epochs", 2, *words) == 0
    record = read_json(tmp_path / "r" / "run.json")
    spans = [(span["policy"], span["steps"]) for span in record["freeze"]]
    assert len(spans) == {"gradual:1": 2, "lisa:1@2,norms": 3}.get(record["flags"]["trainable"], 1)
    model, losses, norms, rates = plain_run(world, spans, **flags)
    assert column(tmp_path / "r", "train_loss") == pytest.approx(losses, rel=1e-5)
    assert column(tmp_path / "r", "grad_norm") == pytest.approx(norms, rel=1e-4)
    assert column(tmp_path / "r", "lr") == pytest.approx(rates, rel=1e-6)
    ours = gpt.load_model(tmp_path / "r", "cpu")[0]
    for (name, p), (_, q) in zip(ours.named_parameters(), model.named_parameters(), strict=True):
        if not name.endswith("c_attn.bias"):  # keys' have no gradient, and Adam scales its noise
            torch.testing.assert_close(p, q, rtol=1e-4, atol=5e-6, msg=lambda m: f"{name}: {m}")

def test_micro_batches_and_a_head_in_parts_give_the_undivided_step(world, tmp_path, monkeypatch):
    flags = ["--epochs", 1, "--eval-every", 3]
    assert run(world, tmp_path / "whole", *flags) == 0
    monkeypatch.setattr(finetune, "HEAD_ROWS", 7)
    rows, true = {True: [], False: []}, F.cross_entropy  # of a training loss, of a validation
    monkeypatch.setattr(F, "cross_entropy", lambda logits, targets, **more: (
        rows[torch.is_grad_enabled()].append(len(targets)), true(logits, targets, **more))[1])
    assert run(world, tmp_path / "parts", *flags, "--batch-size", 2, "--grad-accum", 4) == 0
    assert curves(tmp_path / "parts") == pytest.approx(curves(tmp_path / "whole"), rel=1e-5)
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
    (["--compile"], ["--batch-size", 3], None, 1e-5), (["--dtype", "bf16"], [], 20, 1e-2),
    (["--compile"], ["--trainable", "last_block", "--batch-size", 3], None, 1e-5)], ids=str)
def test_a_cheaper_run_has_the_same_loss(world, tmp_path, monkeypatch, remedy, flags, calls, close):
    """Cached: the lower blocks rest, their dropout with them. Recomputed: to the bit. Compiled:
    traced and guarded as always, but run as it is, for a compiler would take a minute."""
    flags, compiled, true = ["--epochs", 2, *flags], [], torch.compile
    assert run(world, tmp_path / "plain", *flags) == 0
    monkeypatch.setattr(torch, "compile", lambda function, **options: true(
        function, backend=lambda graph, _: compiled.append(graph) or graph, **options))
    found = calls_of(monkeypatch, 0) if calls is not None else []
    assert run(world, tmp_path / "r", *flags, *remedy) == 0
    plain, ours = curves(tmp_path / "plain"), curves(tmp_path / "r")
    assert ours == pytest.approx(plain, rel=close, abs=0)
    assert len(found) == (calls or 0) and (0 < len(compiled) < 3) == (calls is None)
    assert (ours != plain) == ("bf16" in remedy) or close == 1e-5
    assert {t.dtype for file in (tmp_path / "r").rglob("*.safetensors")
            for t in read_safetensors(file).values()} == {torch.float32}

@pytest.mark.parametrize("flags, shares, keeps, sparse", [
    ([], 1, 1, 1), (["--compile"], 0, 1, 1), (["--untie-head"], 1, 1, 0),
    (["--trainable", "last_block", "--cache-prefix"], 1, 0, 1), (["--lora-r", 2], 1, 0, 1)])
def test_what_makes_a_cpu_fast_is_on_where_it_pays_and_changes_no_loss(
        world, tmp_path, monkeypatch, flags, shares, keeps, sparse):
    true, seen = finetune.share_beginnings, {"shares": [], "keeps": [], "sparse": []}
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(finetune, "keep_freed_memory", lambda: seen["keeps"].append(1))
    monkeypatch.setattr(finetune, "share_beginnings", lambda *how: (
        seen["shares"].append(true(*how)) or seen["shares"][-1]))
    before_loss(monkeypatch, 2, lambda model: seen["sparse"].append(model.wte.sparse))
    assert run(world, tmp_path / "fast", "--epochs", 2, *flags) == 0
    assert [any(values) for values in seen.values()] == [shares, keeps, sparse]
    monkeypatch.setattr(finetune, "share_beginnings", lambda *how: None)
    before_loss(monkeypatch, 1, lambda model: setattr(model.wte, "sparse", False))
    assert run(world, tmp_path / "plain", "--epochs", 2, *flags) == 0
    assert curves(tmp_path / "fast") == pytest.approx(curves(tmp_path / "plain"), rel=1e-5)

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
    flags = ["--trainable", "last_block", "--epochs", 2, "--eval-every", 4]
    assert run(world, out, *flags, answers=True) == 0
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

@pytest.mark.parametrize("flags, parts", [
    (["--max-steps", 3], {"model"}), (["--lora-r", 4, "--rslora"], {"adapter"}),
    (["--untie-head", "--trainable", "head"], {"model"}),
    (["--untie-head", "--lora-r", 4], {"model", "adapter"}),
    (["--lora-r", 2, "--trainable", "lora,last_block"], {"model", "adapter"})], ids=str)
def test_a_run_saves_what_it_validated_for_transformers_and_peft_too(world, tmp_path, flags, parts):
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
    for more, n, dropped, cut in (([], 34, {5}, 1), (["--max-examples", 4], 4, set(), 1),
                                  (["--max-length", 175], 34, {5}, 17)):
        assert run(world, tmp_path / "r", "--data", tmp_path, "--epochs", 9, "--max-steps", 7,
                   "--overwrite", *more) == 0
        found = read_json(tmp_path / "r" / "run.json")["data"]
        used = {i for indices in column(tmp_path / "r", "records") for i in indices}
        assert used == {*range(n)} - dropped and found["used"] == len(used)
        assert (found["dropped"], found["truncated"]) == (len(dropped), cut)
        assert re.search(rf"note .*\b{len(dropped)} rec.* {cut} are cut", capsys.readouterr().out)
        assert found["split"] == "folder" and column(tmp_path / "r", "step") == [*range(1, 8)]

@pytest.mark.parametrize("flags, name, rates", [
    (["--model", "tiny", "--data", "tiny"], "tiny-all", (3e-4, 3, 16)),
    (["--lora-r", 2], "model-lora-r2-records", (3e-3, 3, 16)),
    (["--model", "LARGE", "--trainable", "h.*,blocks:0-0"], "LARGE-h._,blocks_0-0-records",
     (5e-5, 2, 8)),
    (["--model", "LARGE", "--lora-r", 1, "--data", "tiny"], "LARGE-lora-r1", (5e-4, 2, 8))])
def test_defaults_follow_from_other_flags(world, tmp_path, monkeypatch, capsys, flags, name, rates):
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
    [out] = (tmp_path / "runs").iterdir()
    flags, rows = (read_json(out / "run.json")[key] for key in ("flags", "data"))
    assert out.name == name and not flags["model"].endswith("LARGE")
    assert (flags["lr"], flags["epochs"], flags["batch_size"]) == pytest.approx(rates)
    if name == "tiny-all":
        assert (flags["model"], rows["name"], rows["rows"]) == ("tiny", "tiny", 4500)
        assert rows["split"] == "file order" and "2,222,208" in capsys.readouterr().out
        assert len(evaluate.read_records(out / "responses.jsonl")) == 9

nudge = lambda model: model.wte.weight.data[0, 0].add_(1e-6)

@pytest.mark.parametrize("loss, action, message", [
    (3, nudge, "frozen, but changed.*wte.weight"), (4, nudge, "frozen, but changed.*wte.weight"),
    (1, lambda m: m.h[0].ln_1.bias.requires_grad_(), "with a gradient.*h.0.ln_1.bias"),
    (4, lambda m: m.h[0].ln_1.bias.requires_grad_(), "not as planned.*h.0.ln_1.bias is True"),
    (1, lambda m: m.ln_f.bias.register_hook(torch.zeros_like), "zero gradients.*ln_f.bias"),
    (0, (finetune, "build_optimizer", lambda model, *_: torch.optim.AdamW(model.parameters())),
     "holds what does not train.*h.0.ln_1.bias"),
    (0, (finetune.AdamW, "step", lambda self: None), "did not change.*h.1.ln_1.bias")])
def test_a_planted_violation_ends_the_run_with_its_name_and_without_a_result(
        world, tmp_path, monkeypatch, capsys, loss, action, message):
    before_loss(monkeypatch, loss, action) if loss else monkeypatch.setattr(*action)
    flags = ["--trainable", "last_block", "--max-steps", 4, "--checkpoint-every", 3]
    assert fails(capsys, message, world, tmp_path / "r", *flags)
    assert {path.name for path in (tmp_path / "r").iterdir()} <= {
        "metrics.jsonl", *(["checkpoint.pt"] if loss == 4 or "did not" in message else [])}

STOPS = {  # flags, what happens in which step, exit code; spans end after steps 5, 10 and 3, 6, ...
    "Ctrl-C": ([], signal.SIGINT, 7, 130), "full disk": ([], fill_disk, 8, 1),
    "last step": (["--trainable", "last:1"], signal.SIGTERM, 15, 143),
    "lora": (["--lora-r", 2, "--lora-dropout", 0.2], signal.SIGTERM, 1, 143),
    "bf16": ("--trainable last_block --cache-prefix --dtype bf16".split(), signal.SIGTERM, 7, 143),
    "gradual": (["--trainable", "gradual:1", "--lr-decay", 0.4], signal.SIGTERM, 7, 143),
    "killed": (["--trainable", "lisa:1@3,embeddings", "--untie-head"], signal.SIGKILL, 11, -9),
    "end of a span": (["--trainable", "lisa:1@3,norms"], signal.SIGTERM, 6, 143),
    "lisa and lora": (["--lora-r", 2, "--trainable", "lora,lisa:1@2"], signal.SIGTERM, 10, 143),
    "step 5: .*'gradient': inf": ([], lambda m: m.ln_f.bias.register_hook(lambda g: g / 0), 5, 1),
    "step 5: .'loss': nan": ([], lambda m: m.ln_f.bias.data.div_(0), 5, 1),
    "step 5: .*'val loss': nan": ([], lambda m: m.ln_f.register_forward_hook(
        lambda *seen: None if torch.is_grad_enabled() else seen[2] * math.nan), 5, 1)}

@pytest.mark.parametrize("case", STOPS)
def test_a_run_that_ended_early_and_was_resumed_is_the_uninterrupted_one_bit_for_bit(
        world, tmp_path, capfd, case):
    flags, what, step, code = STOPS[case]
    flags = ["--epochs", 3, "--dropout", 0.1, "--checkpoint-every", 4, *flags]
    assert run(world, tmp_path / "a", *flags) == 0
    assert stopped(what, step, run, world, tmp_path / "b", *flags) == code
    assert len(metrics(tmp_path / "b")) == step - (code == -9 or "step 5" in case)
    assert "step 5" not in case or re.fullmatch(f"error: {case}.*\n", capfd.readouterr().err)
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

HALF = ["--epochs", 2, "--trainable", "last_block", "--resume"]

@pytest.fixture(scope="module")
def half(world, tmp_path_factory):
    """r: a run that was stopped after step 7 of 10; its checkpoints: 6 and 7. whole: its twin."""
    folder, flags = tmp_path_factory.mktemp("half"), [*HALF[:-1], "--checkpoint-every", 2]
    assert stopped(signal.SIGTERM, 7, run, world, folder / "r", *flags) == 143
    assert run(world, folder / "whole", *flags) == 0
    return folder

def test_every_ten_minutes_there_is_a_checkpoint(world, tmp_path, capfd, monkeypatch):
    assert stopped(signal.SIGKILL, 5, run, world, tmp_path / "b") == -signal.SIGKILL
    assert fails(capfd, "no intact checkpoint", world, tmp_path / "b", "--resume")
    monkeypatch.setattr(finetune, "CHECKPOINT_SECONDS", 0)
    assert stopped(signal.SIGKILL, 5, run, world, tmp_path / "b", "--overwrite") == -signal.SIGKILL
    calls = calls_of(monkeypatch, 1)
    assert run(world, tmp_path / "b", "--resume", "--eval-every", 99) == 0
    assert len(calls) == 11 + 1  # all steps but the first four; the validation

flip = lambda content: content[:5000] + bytes([content[5000] ^ 4]) + content[5001:]

@pytest.mark.parametrize("damage", [flip, lambda c: c[:-1], lambda c: c * 2, lambda c: b"", None])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(world, half, tmp_path, capsys, damage):
    out, newer = shutil.copytree(half / "r", tmp_path / "r"), tmp_path / "r" / "checkpoint.pt"
    newer.write_bytes(damage(newer.read_bytes())) if damage else newer.unlink()
    none = shutil.copytree(out, tmp_path / "none")
    assert run(world, out, *HALF) == 0
    assert (str(newer) in capsys.readouterr().out) == (damage is not None)
    assert result(out) == result(half / "whole")
    (none / "checkpoint.prev.pt").write_bytes(flip((none / "checkpoint.prev.pt").read_bytes()))
    assert fails(capsys, "no intact checkpoint", world, none, *HALF)
    assert len(metrics(none)) == 7  # nothing was begun anew

@pytest.mark.parametrize("complete", [False, True])
def test_resume_refuses_by_name_what_differs(world, half, tmp_path, capsys, monkeypatch, complete):
    out, other = tmp_path / "r", shutil.copytree(world, tmp_path / "other")
    shutil.copytree(half / "r", out)
    assert not complete or run(world, out, *HALF) == 0
    (other / "records.json").write_text((world / "records.json").read_text().replace("w", "v"))
    model = GPT.from_pretrained(other / "model")
    nudge(model)
    model.save_pretrained(other / "model")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for flags, what in ((["--lr", 2e-3], "lr 0.001 0.002"), (["--epochs", 3], "epochs 2 3"),
                        (["--trainable", "all"], "trainable last_block all"),
                        (["--seed", 5], "seed 123 5"), (["--dtype", "bf16"], "dtype float32 bf"),
                        (["--data", other / "records.json"], "data"),
                        (["--model", other / "model"], "weights|model")):
        message = rf"--resume: .*\b({what.replace(' ', '.* ')})"
        assert fails(capsys, message, world, out, *HALF, *flags), flags
    more = ["--recompute", "--eval-every", 3, "--checkpoint-every", 1]
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(world, out, *HALF, *more) == 0  # these may differ
    assert ("complete" in capsys.readouterr().out) == complete
    assert result(out)[0] == result(half / "whole")[0]
    monkeypatch.setitem(data.TEMPLATES, "alpaca", data.TEMPLATES["plain"])  # other ids
    assert fails(capsys, "weights was", world, out, *HALF)

def test_overwrite_removes_what_a_run_writes_and_nothing_else(world, tmp_path, monkeypatch):
    """The run answers; of right answers one that has not ended counts as wrong."""
    out = tmp_path / "r"
    monkeypatch.setattr(finetune, "generate_responses", lambda model, tokenizer, examples, *_: [
        {**e, "model_response": e["output"] if i else "no", "ended": i > 1}
        for i, e in enumerate(examples)])
    assert run(world, out, "--max-steps", 2, answers=True) == 0
    assert read_json(out / "run.json")["train"]["exact_match"] == 2 / 4
    for name in ("notes.txt", "judge-ollama.jsonl", "scores.json", "checkpoint.pt"):
        (out / name).write_text("{}")
    assert run(world, out, "--max-steps", 1, "--lora-r", 2, "--overwrite") == 0
    assert {path.name for path in out.iterdir()} - {"loss.png"} == {
        "run.json", "metrics.jsonl", "adapter", "notes.txt"} and len(metrics(out)) == 1
