"""finetune.py: the run as a user starts it, its arithmetic beside a plain loop, its proof, stops."""

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
from data import encode_examples, load_parts, load_tokenizer
from gpt import GPT, GPTConfig, read_safetensors
from lora import add_lora

MATMUL = torch.backends.mkldnn.matmul


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a random 2-block model whose tokens are the 256 bytes, and 40 records."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, block_size=320, n_layer=2, n_head=2, n_embd=16)
    GPT(GPTConfig(**sizes)).save_pretrained(folder / "model")
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


def read_json(path):
    return json.loads(path.read_text())


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def column(out, key):
    return [line[key] for line in metrics(out)]


def weights(folder):
    tensors = read_safetensors(folder / "model" / "model.safetensors")
    return {name.removeprefix("transformer."): t for name, t in tensors.items()}


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
            rate = FALLING[schedule]((step - warmup) / (len(order) - warmup))
        for (name, p), g in zip(named.items(), grads):
            m, v, t = moments[name]
            m, v, t = 0.9 * m + 0.1 * g * scale, 0.999 * v + 0.001 * (g * scale)**2, t + 1
            moments[name] = m, v, t
            lr = 1e-3 * rate * (lr_decay if name.startswith(("h.0.", "w")) else 1.0)
            lr *= 10 if "lora_" in name and policy != "lora" else 1
            with torch.no_grad():
                p *= 1 - lr * weight_decay * (p.dim() > 1)
                p -= lr * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        history.append((loss.item(), norm, 1e-3 * rate))
    return model, *zip(*history)


@pytest.mark.parametrize("flags, same", [
    ([], {}),  # one span
    (["--loss-on", "all", "--untie-head", "--schedule", "cosine", "--warmup", 3],
     dict(loss_on="all", untie=True, schedule="cosine", warmup=3)),
    (["--template", "chatml", "--clip", 0, "--weight-decay", 0.5, "--lr-decay", 0.5],
     dict(template="chatml", clip=None, weight_decay=0.5, lr_decay=0.5)),
    (["--trainable", "last_block", "--clip", 1.2, "--schedule", "constant", "--warmup", 0.4],
     dict(clip=1.2, schedule="constant", warmup=4)),
    (["--trainable", "head", "--untie-head"], dict(untie=True)),
    (["--lora-r", 2], dict(lora_r=2)),
    (["--lora-r", 2, "--trainable", "lora,last_block"], dict(lora_r=2)),
    (["--trainable", "gradual:1"], {}),
    (["--trainable", "lisa:1@2,norms"], {}),
], ids=lambda value: " ".join(map(str, value)))
def test_a_run_has_the_losses_norms_rates_and_weights_of_a_plain_loop(world, tmp_path, flags, same):
    assert run(world, tmp_path / "r", "--epochs", 2, *flags) == 0
    record = read_json(tmp_path / "r" / "run.json")
    spans = [(span["policy"], span["steps"]) for span in record["freeze"]]
    assert len(spans) == {"gradual:1": 2, "lisa:1@2,norms": 4}.get(record["flags"]["trainable"], 1)
    model, losses, norms, rates = plain_run(world, spans, **same)
    assert column(tmp_path / "r", "train_loss") == pytest.approx(losses, rel=1e-5)
    assert column(tmp_path / "r", "grad_norm") == pytest.approx(norms, rel=1e-4)
    assert column(tmp_path / "r", "lr") == pytest.approx(rates, rel=1e-6)
    ours = evaluate.load_model(tmp_path / "r", "cpu")[0]
    for (name, p), (_, q) in zip(ours.named_parameters(), model.named_parameters(), strict=True):
        if not name.endswith("c_attn.bias"):  # keys' have no gradient, and Adam scales its noise
            torch.testing.assert_close(p, q, rtol=1e-4, atol=5e-6, msg=lambda m: f"{name}: {m}")


def test_micro_batches_and_a_head_in_parts_give_the_undivided_step(world, tmp_path, monkeypatch):
    assert run(world, tmp_path / "whole", "--epochs", 2, "--loss-on", "all") == 0
    monkeypatch.setattr(finetune, "HEAD_ROWS", 7)
    rows = []
    before_loss(monkeypatch, 1, lambda model: model.lm_head.register_forward_hook(
        lambda head, inputs, logits: rows.append(len(logits))))
    assert run(world, tmp_path / "parts", "--epochs", 2, "--loss-on", "all", "--batch-size", 2,
               "--grad-accum", 4) == 0
    assert max(rows) == 7
    for key in ("train_loss", "grad_norm", "val_loss"):
        whole, parts = column(tmp_path / "whole", key), column(tmp_path / "parts", key)
        assert parts == pytest.approx(whole, rel=1e-5), key


def test_the_head_is_applied_only_where_a_loss_is_wanted(world, tmp_path, monkeypatch):
    rows = []
    before_loss(monkeypatch, 1, lambda model: model.lm_head.register_forward_pre_hook(
        lambda head, inputs: rows.append(len(inputs[0])) if head.training else None))
    assert run(world, tmp_path / "r", "--epochs", 1) == 0
    train = load_parts(world / "records.json").train
    assert sum(rows) == sum(len(record["output"]) + 1 for record in train)  # and the end token


def test_the_last_validation_is_of_all_records_and_earlier_ones_of_the_first(
        world, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "EVAL_RECORDS", 1)
    assert run(world, tmp_path / "r", "--epochs", 1, "--eval-every", 2, "--batch-size", 1) == 0
    val = load_parts(world / "records.json").val
    model, tokenizer = evaluate.load_model(tmp_path / "r", "cpu")
    nats, tokens = map(sum, zip(*evaluate.nlls(model, encode_examples(val, tokenizer)[0])))
    losses = column(tmp_path / "r", "val_loss")
    assert losses[-1] == pytest.approx(nats / tokens, rel=1e-6)
    assert [loss is None for loss in losses] == [True, False] * 17
    assert read_json(tmp_path / "r" / "run.json")["train"]["val_loss"] == losses[-1]


@pytest.mark.parametrize("warmup, schedule, rates", [
    (4, "linear", [.2, .4, .6, .8, 1, 3 / 4, 1 / 2, 1 / 4]), (0, "constant", [1] * 8),
    (4, "cosine", [.2, .4, .6, .8, 1, (2 + 2**.5) / 4, 1 / 2, (2 - 2**.5) / 4]),
    (0.25, "linear", [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    (8, "linear", [i / 9 for i in range(1, 9)])])
def test_the_rate_rises_then_falls_and_is_never_zero(warmup, schedule, rates):
    assert [finetune.rate_at(i, 8, warmup, schedule) for i in range(8)] == pytest.approx(rates)


def test_large_models_take_small_rates_and_adapters_ten_times_as_much(world, tmp_path):
    model = shutil.copytree(world / "model", tmp_path / "large")
    GPT(GPTConfig(257, 156_500, 1, 1, 64)).save_pretrained(model)  # ten million parameters
    for more, expected in (([], (3e-4, 3, 16)), (["--lora-r", 2], (3e-3, 3, 16)),
                           (["--trainable", "last_block", "--model", model], (5e-5, 2, 8)),
                           (["--lora-r", 2, "--model", model], (5e-4, 2, 8))):
        more = ["--model", world / "model", "--data", world / "records.json", "--max-steps", 1,
                "--max-length", 300, "--out", tmp_path / "r", "--overwrite", "--device", "cpu",
                "--no-responses", *more]
        assert finetune.main([str(flag) for flag in more]) == 0
        flags = read_json(tmp_path / "r" / "run.json")["flags"]
        assert (flags["lr"], flags["epochs"], flags["batch_size"]) == pytest.approx(expected)
        assert len(metrics(tmp_path / "r")[0]["records"]) == expected[2]


def test_a_seed_gives_one_run_and_another_seed_another(world, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(world, tmp_path / name, "--max-steps", 4, "--seed", seed, "--dropout", 0.1) == 0
    assert result(tmp_path / "a") == result(tmp_path / "b") != result(tmp_path / "c")


# ---- what saves time or memory

LAST = ["--trainable", "last_block,-biases", "--dropout", 0.3, "--epochs", 2]


def calls_of(monkeypatch, block):
    """A list that gets an entry for each call of a block, from the first training loss on."""
    calls = []
    before_loss(monkeypatch, 1, lambda model: model.h[block].ln_1.register_forward_hook(
        lambda *_: calls.append(1)))
    return calls


@pytest.mark.parametrize("policy", [LAST, ["--lora-r", 2, "--lora-targets", "h.1.mlp.c_fc"],
                                    ["--trainable", "head,ln_f.*", "--untie-head"]], ids=str)
def test_a_cached_prefix_changes_nothing_and_its_blocks_rest(world, tmp_path, monkeypatch, policy):
    """Without it too dropout below what trains is off: it would change the losses."""
    assert run(world, tmp_path / "plain", "--epochs", 2, *policy) == 0
    calls = calls_of(monkeypatch, 0)
    assert run(world, tmp_path / "cached", "--epochs", 2, *policy, "--cache-prefix") == 0
    assert not calls
    for key in ("train_loss", "val_loss"):
        plain, cached = column(tmp_path / "plain", key), column(tmp_path / "cached", key)
        assert cached == pytest.approx(plain, rel=1e-5)


def test_recomputed_activations_give_the_same_bits(world, tmp_path, monkeypatch):
    flags = ["--dropout", 0.1, "--max-steps", 3, "--eval-every", 3, "--lora-r", 2,
             "--trainable", "lora,blocks:0", "--lora-dropout", 0.2]
    assert run(world, tmp_path / "plain", *flags) == 0
    calls = calls_of(monkeypatch, 0)
    assert run(world, tmp_path / "again", *flags, "--recompute") == 0
    assert len(calls) == 2 * 3 + 1  # forward and backward; the validation
    assert result(tmp_path / "plain") == result(tmp_path / "again")


def test_compiled_blocks_give_the_same_losses(world, tmp_path, monkeypatch):
    """Traced, guarded and dynamic as always; but run as they are: a compiler takes a minute."""
    assert run(world, tmp_path / "plain", "--max-steps", 4) == 0
    MATMUL.fp32_precision, compiled, true = "none", [], torch.compile

    def traced(function, **options):
        return true(function, backend=lambda graph, _: compiled.append(1) or graph, **options)
    monkeypatch.setattr(torch, "compile", traced)
    assert run(world, tmp_path / "r", "--max-steps", 4, "--compile") == 0
    assert compiled
    plain, ours = column(tmp_path / "plain", "train_loss"), column(tmp_path / "r", "train_loss")
    assert ours == pytest.approx(plain, rel=1e-5)
    assert weights(tmp_path / "r").keys() == weights(tmp_path / "plain").keys()


def test_under_bf16_weights_stay_fp32_and_losses_are_close(world, tmp_path, monkeypatch):
    for dtype in ("fp32", "bf16"):
        assert run(world, tmp_path / dtype, "--max-steps", 4, "--dtype", dtype) == 0
    fp32, bf16 = (column(tmp_path / dtype, "train_loss") for dtype in ("fp32", "bf16"))
    assert fp32 != bf16 and bf16 == pytest.approx(fp32, rel=1e-2)
    assert {t.dtype for t in weights(tmp_path / "bf16").values()} == {torch.float32}
    assert read_json(tmp_path / "bf16" / "run.json")["flags"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("rounds", [False, True])
def test_products_of_a_run_are_never_rounded_to_bf16(world, tmp_path, monkeypatch, rounds):
    """torch's setting allows it; on a CPU that makes use of it, here one by patch, it is not set."""
    true, seen, x = torch.Tensor.__matmul__, [], torch.randn(300, 300)
    exact = x.double() @ x.double()
    if rounds:
        monkeypatch.setattr(torch.Tensor, "__matmul__",
                            lambda a, b: true(a.bfloat16().float(), b.bfloat16().float()))
    before_loss(monkeypatch, 1, lambda model: seen.append((MATMUL.fp32_precision, true(x, x))))
    assert run(world, tmp_path / "r", "--max-steps", 1) == 0
    (setting, product), = seen
    assert (product - exact).abs().max() < 2e-6 * exact.abs().max()
    assert setting == "none" or not rounds


# ---- the run folder


def test_a_run_folder_holds_what_the_contract_names(world, tmp_path):
    out = tmp_path / "r"
    assert run(world, out, "--trainable", "last_block", "--epochs", 2, "--eval-every", 4,
               "answers") == 0
    record, lines, parts = read_json(out / "run.json"), metrics(out), load_parts(
        world / "records.json")
    assert set(record) == {"flags", "versions", "data", "weights", "freeze", "train"}
    assert record["data"] == {
        "name": str(world / "records.json"), "sha256": parts.sha256, "split": "shuffled",
        "rows": 40, "used": 34, "dropped": 0, "truncated": 0}
    assert record["flags"]["model"] == str(world / "model")
    (span,), train = record["freeze"], record["train"]
    assert set(span) == {"policy", "steps", "trainable", "frozen", "trainable_parameters",
                         "fingerprint", "checks"}
    assert all(name.startswith(("h.1.", "ln_f.")) for name in span["trainable"])
    assert len(span["trainable"]) == len(span["frozen"]) == 14 and span["steps"] == 10
    assert span["trainable_parameters"] == 12 * 16 * 16 + 13 * 16 + 2 * 16
    assert {"check_model": 2, "check_optimizer": 2, "check_gradients": 2,
            "check_unchanged": 1}.items() <= span["checks"].items()
    assert set(train) == {"steps", "train_loss", "val_loss", "exact_match", "seconds",
                          "tokens_per_second", "peak_memory_bytes", "max_new_tokens"}
    losses = [line["train_loss"] for line in lines]
    assert (train["steps"], train["exact_match"], train["val_loss"]) == (
        10, 0.0, lines[-1]["val_loss"])
    assert train["train_loss"] == pytest.approx(sum(losses[-4:]) / 4)
    assert train["tokens_per_second"] == pytest.approx(lines[-1]["tokens"] / train["seconds"], 0.05)
    assert 2**26 < train["peak_memory_bytes"] < 2**34 and train["max_new_tokens"] == 2 * 17
    assert [(m["step"], m["epoch"]) for m in lines] == [(i, 1 + (i > 5)) for i in range(1, 11)]
    assert [m["step"] for m in lines if m["val_loss"] is not None] == [4, 8, 10]
    assert set(lines[0]) == {"step", "epoch", "train_loss", "val_loss", "lr", "grad_norm",
                             "tokens", "seconds", "records"}
    learned = sorted(i for line in lines[:5] for i in line["records"])
    assert learned == sorted(parts.positions) and len(lines[0]["records"]) <= 8
    answers = evaluate.read_records(out / "responses.jsonl")
    assert sorted(a["id"] for a in answers) == [0, 1, 2, 3] and {
        "instruction", "output", "model_response", "ended"} <= set(answers[0])
    before, after = weights(world), weights(out)
    assert {n for n in before if not before[n].equal(after[n])} == set(span["trainable"])
    assert not list(out.glob("checkpoint*"))


def test_losses_are_drawn_where_matplotlib_is_installed(world, tmp_path):
    pytest.importorskip("matplotlib", reason="loss.png is drawn where it is installed")
    assert run(world, tmp_path / "r", "--max-steps", 2) == 0
    assert (tmp_path / "r" / "loss.png").read_bytes().startswith(b"\x89PNG")


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
    model, tokenizer = evaluate.load_model(out, "cpu")
    val = encode_examples(load_parts(world / "records.json").val, tokenizer)[0]
    nats, tokens = map(sum, zip(*evaluate.nlls(model, val)))
    assert nats / tokens == pytest.approx(metrics(out)[-1]["val_loss"], rel=1e-6)
    folder = out / "model" if "model" in parts else world / "model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if "adapter" in parts:
        assert read_json(out / "adapter" / "adapter_config.json")[
            "base_model_name_or_path"] == str(folder)
        theirs = peft.PeftModel.from_pretrained(theirs, out / "adapter")
    x = torch.tensor([val[0].ids])
    torch.testing.assert_close(model(x), theirs.eval()(input_ids=x).logits, atol=2e-6, rtol=1e-5)
    text = "Say it, <now>"
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert ids == load_tokenizer(folder).encode_ordinary(text)


def test_a_run_goes_on_from_the_adapter_or_the_weights_of_another(world, tmp_path):
    for name, more in (("a", ["--lora-r", 2]), ("m", []), ("b", ["--model", tmp_path / "a"]),
                       ("n", ["--model", tmp_path / "m"]), ("c", ["--model", tmp_path / "b"])):
        assert run(world, tmp_path / name, "--lr", 1e-2, "--epochs", 1, *more) == 0, name
    chain = [[column(tmp_path / name, "val_loss")[-1] for name in names] for names in ("abc", "mn")]
    assert chain == [sorted(losses, reverse=True) for losses in chain]  # each better than before
    assert read_json(tmp_path / "c" / "run.json")["flags"]["trainable"] == "lora"
    for name in "abcmn":
        model, tokenizer = evaluate.load_model(tmp_path / name, "cpu")
        val = encode_examples(load_parts(world / "records.json").val, tokenizer)[0]
        nats, tokens = map(sum, zip(*evaluate.nlls(model, val)))
        assert nats / tokens == pytest.approx(metrics(tmp_path / name)[-1]["val_loss"], rel=1e-6)


def test_dropped_and_cut_records_are_counted_and_said_and_limits_hold(world, tmp_path, capsys):
    records = read_json(world / "records.json")
    records[3]["output"], records[5]["instruction"] = "x" * 400, "y" * 400
    records[34]["output"] = "z" * 400
    for name, part in (("train", records[:34]), ("val", records[34:36]), ("test", records[36:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    flags = ["--data", tmp_path, "--epochs", 9, "--max-steps", 7, "--overwrite"]
    for more, account in (([], (33, 1, 2)), (["--max-examples", 5], (5, 0, 2)),
                          (["--max-length", 190], (33, 1, 3))):
        assert run(world, tmp_path / "r", *flags, *more) == 0
        found, (used, dropped, cut) = read_json(tmp_path / "r" / "run.json")["data"], account
        assert (found["used"], found["dropped"], found["truncated"]) == account
        assert re.search(rf"note +{dropped} records .*dropped, {cut} are cut", capsys.readouterr().out)
        lines = metrics(tmp_path / "r")
        assert len(lines) == 7 and {i for m in lines for i in m["records"]} == {
            *range(34)} - {5} & {*range(34 if used > 5 else 5)}
        assert found["split"] == "folder" and max(column(tmp_path / "r", "epoch")) < 9


def test_an_answer_that_never_ended_is_not_exactly_right(world, tmp_path, monkeypatch):
    def answers(model, tokenizer, examples, *_, **more):
        return [{**e, "id": i, "model_response": e["output"] if i else "no", "ended": i > 1}
                for i, e in enumerate(examples)]
    monkeypatch.setattr(finetune, "generate_responses", answers)
    assert run(world, tmp_path / "r", "--max-steps", 2, "answers") == 0
    assert read_json(tmp_path / "r" / "run.json")["train"]["exact_match"] == 2 / 4


def test_the_default_run_begins_answers_and_names_its_folder(tmp_path, monkeypatch, capsys):
    """That the whole of it ends with 96 % of answers right is shown by tests/bench.py: a minute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "load_parts", lambda name: shortened(load_parts(name)))
    assert finetune.main(["--max-steps", "3", "--device", "cpu"]) == 0
    record = read_json(tmp_path / "runs" / "tiny-all" / "run.json")
    assert record["data"]["rows"] == 4500 and record["data"]["split"] == "file order"
    assert record["flags"]["model"] == record["flags"]["data"] == "tiny"
    assert record["train"]["steps"] == 3 and record["train"]["exact_match"] is not None
    answers = evaluate.read_records(tmp_path / "runs" / "tiny-all" / "responses.jsonl")
    assert len(answers) == 9 and "2,222,208" in capsys.readouterr().out


def shortened(parts):
    return data.Parts(parts.train, parts.val[:9], parts.test[:9], parts.positions, parts.split,
                      parts.sha256, parts.rows, parts.notes)


@pytest.mark.parametrize("flags, name", [
    ([], "model-all-records"), (["--lora-r", 2], "model-lora-r2-records"),
    (["--trainable", "blocks:0-1,norms"], "model-blocks_0-1,norms-records"),
    (["--lora-r", 1, "--trainable", "h.*.lora_*", "--data", "tiny"], "model-h._.lora__-r1")])
def test_the_default_folder_names_model_policy_rank_and_data(
        world, tmp_path, monkeypatch, flags, name):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", world / "model", "--data", world / "records.json", "--max-steps", 1,
             "--device", "cpu", "--no-responses", *flags]
    monkeypatch.setattr(finetune, "load_parts", lambda name: shortened(load_parts(name)))
    assert finetune.main([str(flag) for flag in flags]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [name]


# ---- the proof


def nudge(model):
    with torch.no_grad():
        model.wte.weight[0, 0] += 1e-6


def widened(model, plan, *_):
    return torch.optim.AdamW([{"params": list(model.parameters()), "peak": 1e-3}])


def narrowed(model, plan, *_):
    return torch.optim.AdamW([{"params": plan.parameters()[1:], "peak": 1e-3}])


@pytest.mark.parametrize("loss, action, check, name", [
    (2, nudge, "frozen, but changed", "wte.weight"),
    (1, lambda m: m.h[0].ln_1.bias.requires_grad_(), "with a gradient", "h.0.ln_1.bias"),
    (4, lambda m: m.h[0].ln_1.bias.requires_grad_(), "not as planned", "h.0.ln_1.bias is True"),
    (3, lambda m: setattr(m.ln_f, "weight", torch.nn.Parameter(torch.ones(16))), "replaced", "ln_f"),
    (1, lambda m: m.ln_f.bias.register_hook(torch.zeros_like), "zero gradients", "ln_f.bias"),
    (0, ("build_optimizer", widened), "holds what does not train", "h.0.ln_1.bias"),
    (0, ("build_optimizer", narrowed), "lacks what should train", "h.1.ln_1.weight"),
    (0, (torch.optim.AdamW, "step", lambda self: None), "did not change", "h.1.ln_1.bias"),
])
def test_a_planted_violation_ends_the_run_with_its_name_and_without_a_result(
        world, tmp_path, monkeypatch, capsys, loss, action, check, name):
    if loss:
        before_loss(monkeypatch, loss, action)
    else:
        monkeypatch.setattr(*action) if len(action) == 3 else monkeypatch.setattr(finetune, *action)
    assert run(world, tmp_path / "r", "--trainable", "last_block", "--max-steps", 4) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert check in error and name in error
    assert {path.name for path in (tmp_path / "r").iterdir()} <= {"metrics.jsonl"}


def test_no_checkpoint_is_written_of_weights_that_break_the_proof(world, tmp_path, monkeypatch):
    before_loss(monkeypatch, 3, nudge)
    assert run(world, tmp_path / "r", "--trainable", "last_block", "--checkpoint-every", 3) == 1
    assert not list((tmp_path / "r").glob("checkpoint*"))


# ---- stopped and resumed

STOPS = {  # flags, signal, step in which it comes; spans end after the steps 5, 10 and 3, 6, ...
    "Ctrl-C": ([], signal.SIGINT, 7), "first step": ([], signal.SIGTERM, 1),
    "last step": (["--trainable", "last_block"], signal.SIGTERM, 15),
    "killed": (["--schedule", "cosine", "--clip", 0.5], signal.SIGKILL, 7),
    "lora": (["--lora-r", 2, "--lora-dropout", 0.2], signal.SIGTERM, 1),
    "hybrid": (["--lora-r", 2, "--trainable", "lora,last_block"], signal.SIGKILL, 7),
    "prefix": (["--trainable", "last_block", "--cache-prefix"], signal.SIGTERM, 7),
    "bf16": (["--dtype", "bf16", "--batch-size", 2, "--grad-accum", 4], signal.SIGTERM, 7),
    "gradual": (["--trainable", "gradual:1", "--lr-decay", 0.4], signal.SIGTERM, 7),
    "gradual killed": (["--trainable", "gradual:1"], signal.SIGKILL, 12),
    "lisa": (["--trainable", "lisa:1@3,embeddings"], signal.SIGINT, 8),
    "lisa killed": (["--trainable", "lisa:1@3", "--untie-head"], signal.SIGKILL, 11),
    "end of a span": (["--trainable", "lisa:1@3,norms"], signal.SIGTERM, 6),
    "lisa and lora": (["--lora-r", 2, "--trainable", "lora,lisa:1@2"], signal.SIGTERM, 10)}


@pytest.mark.parametrize("case", STOPS)
def test_a_run_that_was_stopped_and_resumed_is_the_uninterrupted_one_bit_for_bit(
        world, tmp_path, case):
    flags, number, step = STOPS[case]
    flags = ["--epochs", 3, "--dropout", 0.1, "--checkpoint-every", 4, *flags]
    assert run(world, tmp_path / "a", *flags) == 0
    code = stopped(number, step, run, world, tmp_path / "b", *flags)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    assert not (tmp_path / "b" / "run.json").exists()
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "torn')  # as a killed process may leave it
    assert run(world, tmp_path / "b", *flags, "--resume") == 0
    assert result(tmp_path / "a") == result(tmp_path / "b")
    whole, resumed = (read_json(tmp_path / name / "run.json") for name in "ab")
    for a, b in zip(whole["freeze"], resumed["freeze"], strict=True):
        checks, more = a.pop("checks"), b.pop("checks")
        assert a == b and checks["check_gradients"] == more["check_gradients"]
        assert all(more[name] >= times for name, times in checks.items())
    for key in ("steps", "train_loss", "val_loss"):
        assert whole["train"][key] == resumed["train"][key]
    assert not list((tmp_path / "b").glob("checkpoint*"))


@pytest.fixture(scope="module")
def half(world, tmp_path_factory):
    """A run that was stopped after step 7 of 10; its checkpoints are of the steps 6 and 7."""
    out = tmp_path_factory.mktemp("half") / "r"
    flags = ["--epochs", 2, "--checkpoint-every", 2, "--trainable", "last_block"]
    assert stopped(signal.SIGTERM, 7, run, world, out, *flags) == 143
    return out


HALF = ["--epochs", 2, "--trainable", "last_block", "--resume"]


def test_every_ten_minutes_there_is_a_checkpoint_without_a_flag(world, tmp_path, capfd, monkeypatch):
    assert stopped(signal.SIGKILL, 5, run, world, tmp_path / "none") == -signal.SIGKILL
    assert run(world, tmp_path / "none", "--resume") == 1
    assert "no intact checkpoint" in capfd.readouterr().err
    monkeypatch.setattr(finetune, "CHECKPOINT_SECONDS", 0)
    assert run(world, tmp_path / "a") == 0
    assert stopped(signal.SIGKILL, 5, run, world, tmp_path / "b") == -signal.SIGKILL
    steps = calls_of(monkeypatch, 1)
    assert run(world, tmp_path / "b", "--resume", "--eval-every", 99) == 0
    assert len(steps) == 11 + 1  # all but the first four; the validation
    assert result(tmp_path / "a")[0] == result(tmp_path / "b")[0]


def flip(content):
    return content[:5000] + bytes([content[5000] ^ 4]) + content[5001:]


@pytest.mark.parametrize("damage", [flip, lambda c: c[:-1], lambda c: c[:9], lambda c: b"",
                                    lambda c: c + b"x", None], ids=range(6))
def test_a_damaged_checkpoint_is_passed_over_by_name_for_the_one_before(
        world, half, tmp_path, capsys, damage):
    out, newer = shutil.copytree(half, tmp_path / "r"), tmp_path / "r" / "checkpoint.pt"
    newer.write_bytes(damage(newer.read_bytes())) if damage else newer.unlink()
    assert run(world, out, *HALF) == 0
    assert (str(newer) in capsys.readouterr().out) == (damage is not None)
    assert run(world, tmp_path / "whole", *HALF[:-1]) == 0
    assert result(out) == result(tmp_path / "whole")


def test_an_intact_checkpoint_never_gives_way_to_a_damaged_one(world, half, tmp_path, monkeypatch):
    """Killed between the two renames of the next checkpoint: one intact one must be left."""
    out = shutil.copytree(half, tmp_path / "r")
    (out / "checkpoint.pt").write_bytes(flip((out / "checkpoint.pt").read_bytes()))
    true = os.replace

    def replace(source, target):
        if str(target).endswith("checkpoint.pt"):
            raise KeyboardInterrupt
        true(source, target)
    monkeypatch.setattr(os, "replace", replace)
    assert run(world, out, *HALF, "--checkpoint-every", 1) == 130
    monkeypatch.undo()
    assert run(world, out, *HALF) == 0


def test_without_an_intact_checkpoint_a_resume_is_refused(world, half, tmp_path, capsys):
    out = shutil.copytree(half, tmp_path / "r")
    for path in out.glob("checkpoint*.pt"):
        path.write_bytes(flip(path.read_bytes()))
    assert run(world, out, *HALF) == 1
    said, error = capsys.readouterr()
    assert said.count("damaged") == 2 and "no intact checkpoint" in error and error.count("\n") == 1
    assert len(metrics(out)) == 7  # nothing was begun anew


@pytest.mark.parametrize("complete", [False, True])
def test_a_resume_as_another_run_is_refused_with_what_differs(
        world, half, tmp_path, capsys, complete):
    out = shutil.copytree(half, tmp_path / "r")
    if complete:
        assert run(world, out, *HALF) == 0
    other = shutil.copytree(world, tmp_path / "other")
    other_data = other / "records.json"
    other_data.write_text(other_data.read_text().replace("now", "then"))
    model = GPT.from_pretrained(other / "model")
    nudge(model)
    model.save_pretrained(other / "model")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for flags, what in ((["--lr", 2e-3], "lr was 0.001, is 0.002"), (["--epochs", 3], "epochs was 2"),
                        (["--lora-r", 2, "--trainable", "lora"], "lora_r was None, is 2"),
                        (["--trainable", "all"], "trainable was 'last_block', is 'all'"),
                        (["--seed", 5], "seed was 123, is 5"), (["--dtype", "bf16"], "dtype was"),
                        (["--data", other_data], "data was"),
                        (["--model", other / "model"], "weights was")):
        capsys.readouterr()
        assert run(world, out, *HALF, *flags) == 1
        error = capsys.readouterr().err
        assert what in error and error.count("\n") == 1, flags
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_what_only_shows_or_stores_may_differ_in_a_resume(world, half, tmp_path, capsys):
    out = shutil.copytree(half, tmp_path / "r")
    assert run(world, out, *HALF, "--recompute", "--eval-every", 3, "--checkpoint-every", 1) == 0
    assert run(world, tmp_path / "whole", *HALF[:-1]) == 0
    assert result(out)[0] == result(tmp_path / "whole")[0]
    before = (out / "run.json").read_bytes()
    assert run(world, out, *HALF) == 0 and "complete" in capsys.readouterr().out
    assert (out / "run.json").read_bytes() == before


@pytest.mark.parametrize("number, plant", [
    (5, lambda m: m.ln_f.bias.register_hook(lambda g: g / 0)),
    (5, lambda m: m.ln_f.bias.data.fill_(math.nan))], ids=["gradient", "loss"])
def test_numbers_that_are_not_finite_end_the_run_and_its_checkpoint_is_kept(
        world, tmp_path, monkeypatch, capsys, number, plant):
    flags = ["--epochs", 2, "--checkpoint-every", 2]
    with monkeypatch.context() as patch:
        before_loss(patch, number, plant)
        assert run(world, tmp_path / "r", *flags) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "step 5" in error
    assert len(metrics(tmp_path / "r")) == 4 and not (tmp_path / "r" / "run.json").exists()
    assert run(world, tmp_path / "r", *flags, "--resume") == 0
    assert run(world, tmp_path / "whole", *flags) == 0
    assert result(tmp_path / "r") == result(tmp_path / "whole")


def test_a_run_whose_last_step_diverged_is_not_saved(world, tmp_path, capsys):
    assert run(world, tmp_path / "r", "--max-steps", 1, "--lr", 1e18,
               "--weight-decay", 1e18) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not {"run.json", "model"} & {path.name for path in (tmp_path / "r").iterdir()}


def test_on_a_full_disk_the_last_checkpoint_is_kept(world, tmp_path, monkeypatch, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before_loss(monkeypatch, 4, lambda model: resource.setrlimit(
        resource.RLIMIT_FSIZE, (50_000, limits[1])))
    try:
        assert run(world, tmp_path / "r", "--checkpoint-every", 2) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert str(tmp_path / "r" / "checkpoint.pt") in error and error.count("\n") == 1
    monkeypatch.undo()
    steps = calls_of(monkeypatch, 1)
    assert not list((tmp_path / "r").glob("*.tmp"))
    assert run(world, tmp_path / "r", "--resume", "--eval-every", 99) == 0 and len(steps) == 13 + 1


# ---- places


def test_overwrite_removes_what_a_run_writes_and_nothing_else(world, tmp_path):
    out = tmp_path / "r"
    assert run(world, out, "--max-steps", 2, "answers") == 0
    for name in ("notes.txt", "judge-ollama.jsonl", "scores.json", "checkpoint.pt"):
        (out / name).write_text("{}")
    assert run(world, out, "--max-steps", 1, "--lora-r", 2, "--overwrite") == 0
    assert {path.name for path in out.iterdir()} - {"loss.png"} == {
        "run.json", "metrics.jsonl", "adapter", "notes.txt"}
    assert len(metrics(out)) == 1
