"""finetune.py: the run as a user starts it, its arithmetic against plain loops, and its refusals."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import finetune
import freeze as freeze_file
import gpt
import lora
from data import encode_examples, load_examples, load_tokenizer, split_examples
from gpt import GPT, GPTConfig, read_safetensors

ROOT = Path(__file__).resolve().parents[1]
CPU = finetune.Machine(torch.device("cpu"))
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A random 2-block model whose tokens are the 256 bytes, and 40 records."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=320, n_layer=2, n_head=2, n_embd=16))
    model.save_pretrained(folder / "model")
    vocab = {char: byte for byte, char in data.BYTE_TO_CHAR.items()} | {"<|endoftext|>": 256}
    (folder / "model" / "vocab.json").write_text(json.dumps(vocab))
    (folder / "model" / "merges.txt").write_text("#version: 0.2\n")
    records = [{"instruction": f"Say {'ab' * (i % 5)}{i}.", "input": "now" * (i % 3), "output": "yes " * (1 + i % 4)} for i in range(40)]
    (folder / "records.json").write_text(json.dumps(records))
    return folder


def run(world, out, *flags):
    return finetune.main(["--model", str(world / "model"), "--data", str(world / "records.json"), "--out", str(out),
                          "--lr", "1e-3", "--batch-size", "8", "--device", "cpu", *map(str, flags)])


def weights(folder):
    return read_safetensors(folder / "model" / "model.safetensors")


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [m["train_loss"] for m in metrics(out) if m["train_loss"] is not None]


def plain_loop(world, steps, loss_on="response", untie=False, accumulate=1, lr=1e-3):
    """What a reader would write: padded batches, logits everywhere, cross_entropy's own mean, AdamW."""
    overrides = {"tie_word_embeddings": False} if untie else {}
    model, tokenizer = GPT.from_pretrained(world / "model", **overrides), load_tokenizer(world / "model")
    train = split_examples(load_examples(world / "records.json"))[0]
    encoded, _ = encode_examples(train, tokenizer)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=lr)
    order = [b for epoch in range(99) for b in data.batches([len(e.ids) for e in encoded], 8, 123, epoch)][:steps]
    history = []
    for batch in order:
        rows = [encoded[i] for i in batch]
        width = max(len(e.ids) for e in rows)
        x = torch.full((len(rows), width - 1), 256)
        y = torch.full((len(rows), width - 1), -100)
        for r, e in enumerate(rows):
            x[r, :len(e.ids) - 1] = torch.tensor(e.ids[:-1])
            first = 1 if loss_on == "all" else e.n_prompt
            y[r, first - 1:len(e.ids) - 1] = torch.tensor(e.ids[first:])
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history


CONSTANT = ["--schedule", "constant", "--warmup", 0, "--no-responses"]


# ------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("loss_on, untie", [("response", False), ("all", True)])
def test_twenty_steps_give_the_losses_of_a_plain_padded_loop(world, tmp_path, loss_on, untie):
    flags = ["--loss-on", loss_on, *(["--untie-head"] if untie else []), "--epochs", 4, "--max-steps", 20]
    assert run(world, tmp_path / "r", *CONSTANT, *flags) == 0
    assert losses(tmp_path / "r") == pytest.approx(plain_loop(world, 20, loss_on, untie), rel=1e-5)


def test_accumulated_micro_batches_take_the_step_of_the_undivided_batch(world, tmp_path):
    assert run(world, tmp_path / "a", *CONSTANT, "--max-steps", 4) == 0
    assert run(world, tmp_path / "b", *CONSTANT, "--max-steps", 4, "--batch-size", 2, "--grad-accum", 4) == 0
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-6)
    norms = [[m["grad_norm"] for m in metrics(tmp_path / r) if "grad_norm" in m] for r in "ab"]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("rows", [4, 10_000])
def test_under_bf16_the_losses_of_tokens_are_summed_in_fp32(world, monkeypatch, rows):
    monkeypatch.setattr(finetune, "HEAD_ROWS", rows)
    encoded, model = encoded_world(world), GPT.from_pretrained(world / "model")
    total, n = finetune.loss_sum(model, encoded, 0.3, finetune.Machine(torch.device("cpu"), torch.bfloat16))
    assert total.dtype == torch.float32
    parts = [finetune.loss_sum(model, [e], 0.3, finetune.Machine(torch.device("cpu"), torch.bfloat16)) for e in encoded]
    assert total.item() == pytest.approx(sum(loss.item() for loss, _ in parts), rel=1e-4)


def encoded_world(world):
    tokenizer = load_tokenizer(world / "model")
    return encode_examples(load_examples(world / "records.json"), tokenizer)[0]


@torch.no_grad()
def loss_without_graph(model, batch, loss_on):
    return finetune.loss_sum(model, batch, loss_on, CPU)


def test_accumulated_gradients_equal_undivided_ones_for_uneven_answers(world):
    batch = encoded_world(world)[:6]
    grads = []
    for micro in ([batch], [batch[:1], batch[1:3], batch[3:]]):
        model = GPT.from_pretrained(world / "model")
        parts = [finetune.loss_sum(model, b, "response", CPU) for b in micro]
        n = sum(count for _, count in parts)
        for loss, _ in parts:
            (loss / n).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 1e-6


def test_a_fractional_loss_weighs_the_prompt_and_lies_between_its_ends(world):
    batch, model = encoded_world(world)[:5], GPT.from_pretrained(world / "model")
    measure = lambda loss_on: [float(v) for v in loss_without_graph(model, batch, loss_on)]
    (response, n), (whole, m), (part, k) = measure("response"), measure("all"), measure("0.25")
    assert part == pytest.approx(response + 0.25 * (whole - response), rel=1e-6)
    assert k == pytest.approx(n + 0.25 * (m - n))


def test_the_validation_loss_does_not_depend_on_the_batch_size(world):
    encoded, model = encoded_world(world), GPT.from_pretrained(world / "model")
    measure = lambda size, limit=None: finetune.mean_loss(model, encoded, size, "response", CPU, limit)
    assert measure(1) == pytest.approx(measure(7), rel=1e-6)
    assert measure(4, 2) != measure(4)


@pytest.mark.skipif(not (SHARED / "gpt2").is_dir(), reason="needs GPT-2's vocab.json and merges.txt and the book's records beside the repository")
def test_on_the_books_records_the_loss_is_the_books_to_1e_5():
    """Its collate function: pad with <|endoftext|>, keep the first pad token as target, ignore the others."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(SHARED / "gpt2")
    model = GPT(GPTConfig(n_layer=2, n_embd=48, n_head=3, tie_word_embeddings=False))
    records = load_examples(SHARED / "instruction-data.json")[:8]
    encoded, _ = encode_examples(records, tokenizer)
    rows = [tokenizer.encode(data.format_prompt(r) + r["output"]) for r in records]
    width = max(map(len, rows)) + 1
    padded = torch.tensor([row + [50256] * (width - len(row)) for row in rows])
    inputs, targets = padded[:, :-1], padded[:, 1:].clone()
    for row, length in zip(targets, map(len, rows)):
        row[length:] = -100  # position length - 1 predicts the first pad token
    book = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss, n = loss_without_graph(model, encoded, "all")
    book = book.detach()
    assert float(loss) / n == pytest.approx(float(book), rel=1e-5)


@pytest.mark.parametrize("trainable, dtype", [("all", "fp32"), ("all", "bf16"), ("last_block", "fp32"), ("last_block", "bf16"), ("head", "fp32"), ("lora", "fp32")])
def test_a_head_applied_in_parts_gives_the_same_loss_and_gradients(world, monkeypatch, trainable, dtype):
    batch, results, sizes = encoded_world(world)[:5], [], []
    machine = finetune.Machine(torch.device("cpu"), finetune.DTYPES[dtype])
    for rows in (10_000, 7):
        monkeypatch.setattr(finetune, "HEAD_ROWS", rows)
        monkeypatch.setattr(finetune, "FROZEN_HEAD_ROWS", rows)
        torch.manual_seed(0)
        model = GPT.from_pretrained(world / "model", tie_word_embeddings=trainable == "all")
        if trainable == "lora":
            finetune.add_lora(model, 2, targets=("c_attn", "lm_head"))
        finetune.freeze(model, trainable)
        largest = []
        model.lm_head.register_forward_hook(lambda module, given, output: largest.append(len(output)))
        loss, n = finetune.loss_sum(model, batch, "0.5", machine)
        (loss / 3).backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        sizes.append(max(largest))
    assert sizes[1] == 7 < sizes[0]
    for whole, parts in zip(*results):
        assert whole.dtype == parts.dtype == torch.float32
        close = 1e-5 if dtype == "fp32" else 1e-2 * whole.abs().max().item()
        torch.testing.assert_close(whole, parts, rtol=1e-5, atol=close)


def test_a_loss_in_parts_cannot_be_taken_backward_twice(world, monkeypatch):
    monkeypatch.setattr(finetune, "HEAD_ROWS", 7)
    loss, _ = finetune.loss_sum(GPT.from_pretrained(world / "model"), encoded_world(world)[:5], "all", CPU)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rates_fall_with_the_distance_from_the_head():
    names = ["lm_head.weight", "ln_f.bias", "h.2.ln_1.bias", "h.1.attn.c_attn.lora_A.default", "h.0.mlp.c_fc.weight", "wte.weight", "wpe.weight"]
    assert [finetune.depth_factor(n, 3, 0.5) for n in names] == [1, 1, 1, 0.5, 0.25, 0.125, 0.125]


def test_the_rate_rises_then_falls_and_is_never_zero_in_a_step():
    rates = {s: [finetune.rate_at(i, 20, 4, s) for i in range(20)] for s in ("linear", "cosine", "constant")}
    for values in rates.values():
        assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert min(values) > 0
    assert rates["linear"][12] == pytest.approx(0.5) and rates["cosine"][12] == pytest.approx(0.5)
    assert rates["linear"][19] == pytest.approx(1 / 16) and set(rates["constant"][4:]) == {1.0}


# ------------------------------------------------------------------------------ the run


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(world, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(world, tmp_path / name, "--max-steps", 5, "--seed", seed, "--dropout", 0.1, "--no-responses") == 0
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not all(torch.equal(a[n], c[n]) for n in a)


def test_a_run_folder_holds_what_the_contract_names(world, tmp_path, capsys):
    assert run(world, tmp_path / "r", "--trainable", "last_block", "--epochs", 1) == 0
    info = json.loads((tmp_path / "r" / "run.json").read_text())
    assert info["data"] == {"path": str(world / "records.json"), "sha256": finetune.sha256(world / "records.json"),
                            "rows": 40, "used": 36, "dropped": 0, "truncated": 0}
    frozen, trainable = info["freeze"]["frozen"], info["freeze"]["trainable"]
    assert all(n.startswith(("h.1.", "ln_f.")) for n in trainable) and "h.0.ln_1.bias" in frozen
    assert info["freeze"]["trainable_parameters"] == 12 * 16 * 16 + 13 * 16 + 2 * 16
    assert set(info["freeze"]["checks"]) == {"check_model", "check_optimizer", "check_gradients", "check_unchanged"}
    assert set(info["train"]) == {"steps", "train_loss", "val_loss", "exact_match", "seconds", "tokens_per_second", "peak_memory_bytes", "skipped_steps", "prompt_tokens", "max_new_tokens"}
    assert info["train"]["steps"] == 5 and info["train"]["exact_match"] == 0.0
    responses = [json.loads(line) for line in (tmp_path / "r" / "responses.jsonl").read_text().splitlines()]
    assert len(responses) == 4 and all("model_response" in r for r in responses)
    lines = metrics(tmp_path / "r")
    assert [m["step"] for m in lines] == [0, 1, 2, 3, 4, 5, 5]
    assert lines[0]["val_loss"] is not None and lines[-1]["val_loss"] == info["train"]["val_loss"]
    out = capsys.readouterr().out
    assert "14 frozen tensors are bit-identical, 14 trainable ones have changed" in out and "before" in out
    before, after = weights(world), weights(tmp_path / "r")
    moved = {n.removeprefix("transformer.") for n in before if not torch.equal(before[n], after[n])}
    assert moved == set(trainable)


def test_what_a_run_saves_loads_in_transformers_with_its_tokenizer(world, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    assert run(world, tmp_path / "r", "--max-steps", 3, "--no-responses") == 0
    folder = tmp_path / "r" / "model"
    theirs, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Say it, <now>")["input_ids"]
    assert ids == load_tokenizer(folder).encode_ordinary("Say it, <now>")
    x = torch.tensor([ids])
    torch.testing.assert_close(GPT.from_pretrained(folder).eval()(x), theirs.eval()(x).logits, atol=2e-6, rtol=0)


def test_adapters_train_alone_and_a_second_run_goes_on_from_them(world, tmp_path):
    assert run(world, tmp_path / "a", "--lora-r", 4, "--epochs", 2, "--no-responses") == 0
    assert not (tmp_path / "a" / "model").exists() and (tmp_path / "a" / "adapter" / "adapter_config.json").exists()
    info = json.loads((tmp_path / "a" / "run.json").read_text())
    assert info["freeze"]["policy"] == "lora" and all(".lora_" in n for n in info["freeze"]["trainable"])
    assert info["freeze"]["trainable_parameters"] == 2 * 4 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16)
    assert info["flags"]["lora_alpha"] == 8.0
    assert finetune.main(["--model", str(tmp_path / "a"), "--data", str(world / "records.json"), "--out", str(tmp_path / "b"),
                          "--lr", "1e-3", "--batch-size", "8", "--no-responses", "--max-steps", "3", "--eval-batches", "99"]) == 0
    assert metrics(tmp_path / "b")[0]["val_loss"] == pytest.approx(info["train"]["val_loss"], rel=1e-6)
    assert json.loads((tmp_path / "b" / "run.json").read_text())["freeze"]["policy"] == "lora"


def test_a_hybrid_run_saves_the_changed_weights_and_the_adapter(world, tmp_path):
    assert run(world, tmp_path / "r", "--lora-r", 2, "--trainable", "lora,last_block", "--max-steps", 4, "--no-responses") == 0
    before, after = weights(world), weights(tmp_path / "r")
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {n for n in before if n.startswith(("transformer.h.1.", "transformer.ln_f."))}
    assert (tmp_path / "r" / "adapter" / "adapter_model.safetensors").exists()
    info = json.loads((tmp_path / "r" / "run.json").read_text())
    folder, adapter = finetune.locate(str(tmp_path / "r"))
    model, tokenizer = finetune.load_model(finetune.parse_args([]), folder, adapter)
    val = encode_examples(split_examples(load_examples(world / "records.json"))[1], tokenizer)[0]
    again = finetune.mean_loss(model, val, 8, "response", CPU)
    assert again == pytest.approx(info["train"]["val_loss"], rel=1e-6)


def test_full_weights_and_adapters_learn_at_their_own_rates(world):
    args = finetune.parse_args(["--lora-r", "2", "--trainable", "lora,last_block", "--lr", "0.001", "--loraplus-ratio", "16"])
    model, _ = finetune.load_model(args, world / "model", None)
    args.batch_size = 8
    plan, optimizer = finetune.prepare_plan(args, model, encoded_world(world))
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if name in plan.eligible:
            expected = 0.16 if ".lora_B." in name else 0.01 if ".lora_A." in name else 0.001
            assert rate[id(p)] == pytest.approx(expected), name
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decay[id(p)] == (0.1 if p.dim() > 1 else 0.0) for p in plan.parameters())


def test_truncated_and_dropped_records_are_counted_and_named(world, tmp_path, capsys):
    records = json.loads((world / "records.json").read_text())
    records[3]["output"] = "x" * 400
    records[5]["instruction"] = "y" * 400
    path = tmp_path / "long.json"
    path.write_text(json.dumps(records))
    assert run(world, tmp_path / "r", "--data", path, "--max-steps", 2, "--no-responses") == 0
    out = capsys.readouterr().out
    assert "1 training records dropped" in out and "the first is record 6" in out
    assert "1 training records truncated" in out and "the first is record 4" in out
    assert json.loads((tmp_path / "r" / "run.json").read_text())["data"]["dropped"] == 1


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("flags, code, message", [
    (["--trainable", "last:9"], 2, "--trainable last:9"),
    (["--trainable", "none"], 2, "--trainable none"),
    (["--trainable", "lora"], 2, "--trainable lora"),
    (["--trainable", "head"], 2, "--untie-head"),
    (["--lora-r", 2, "--trainable", "last_block"], 2, "--lora-r 2: no adapter trains"),
    (["--lora-r", 2, "--lora-targets", "c_foo"], 2, "--lora-targets c_foo"),
    (["--loraplus-ratio", 4], 2, "--loraplus-ratio 4"),
    (["--lora-r", 2, "--trainable", "*lora_A*", "--loraplus-ratio", 4], 2, "--loraplus-ratio 4: no"),
    (["--trainable", "rgn:1", "--loss-on", 0.5], 2, "--loss-on 0.5: under --trainable rgn:1"), (["--nons\nense"], 2, "--nons"),
    (["--trainable", "last_block", "--lr-decay", 0.5], 2, "--lr-decay 0.5: under --trainable last_block"),
    (["--trainable", "head", "--untie-head", "--dropout", 0.5], 2, "--dropout 0.5: under --trainable head"),
    (["--trainable", "biases", "--weight-decay", 0.9], 2, "--weight-decay 0.9: no matrix trains under --trainable biases"),
    (["--lora-alpha", 4], 2, "--lora-alpha has no effect without --lora-r"),
    (["--rslora"], 2, "--rslora has no effect"),
    (["--max-length", 999], 2, "--max-length 999"),
    (["--lora-r", 0], 2, "--lora-r"), (["--max-steps", 0], 2, "--max-steps"), (["--epochs", "many"], 2, "--epochs"),
    (["--lr", -1], 2, "--lr"), (["--lr", "nan"], 2, "--lr"), (["--loss-on", 2], 2, "--loss-on"), (["--nonsense"], 2, "--nonsense"),
    (["--device", "cuda:77"], 2, "--device cuda:77"), (["--device", "toaster"], 2, "--device toaster"),
    (["--template", "llama"], 2, "--template"),
    (["--model", "no/such/folder"], 1, "no/such/folder"),
    (["--data", "no-such-file.json"], 1, "no-such-file.json"),
    (["--select", "random"], 2, "--select has no effect without --max-examples"), (["--warmup", 2.5], 2, "--warmup 2.5: must be a number of steps"),
    (["--stages", 3], 2, "--stages has no effect without --curriculum"),
    (["--curriculum", "length", "--stages", 99], 2, "--stages 99"), (["--curriculum", "level"], 1, "record 1 has no number under 'level'"),
    (["--instruction", "long"], 1, "record 1: no text under 'instruction_long'"), (["--response", "rationale"], 1, "'rationale'"),
    (["--max-examples", 2, "--stages", 3, "--curriculum", "length"], 2, "--stages 3"), (["--trainable", "lisa:9@2"], 2, "lisa:9@2"), (["--trainable", "hybrid:0.5"], 2, "hybrid:0.5"),
])
def test_what_is_wrong_ends_in_one_line_and_the_right_exit_code(world, tmp_path, capsys, flags, code, message):
    try:
        result = run(world, tmp_path / "r", *flags)
    except SystemExit as stop:
        result = stop.code
    error = capsys.readouterr().err
    assert (result, error.count("\n")) == (code, 1) and message in error
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("flags", [[], ["--dropout", 0.1], ["--lr-decay", 0.5], ["--weight-decay", 0]])
def test_a_flag_that_has_an_effect_on_something_that_trains_is_taken(world, tmp_path, flags):
    assert run(world, tmp_path / "r", "--trainable", "biases", "--max-steps", 2, "--no-responses", *flags) == 0
    assert json.loads((tmp_path / "r" / "run.json").read_text())["flags"]["weight_decay"] == (0 if "--weight-decay" in flags else 0.1)


@pytest.mark.parametrize("begin", ["model", "adapter", "data"])
def test_a_run_does_not_overwrite_what_it_begins_from(world, tmp_path, capsys, begin):
    short = ["--max-steps", 2, "--no-responses"]
    assert run(world, tmp_path / "r", *short) == 0
    flags = ["--model", tmp_path / "r" / "model", "--lora-r", 2]
    if begin == "adapter":  # a run whose base lies in --out
        assert run(world, tmp_path / "on r", *short, *flags) == 0
        flags = ["--model", tmp_path / "on r"]
    elif begin == "data":
        shutil.copy(world / "records.json", tmp_path / "r" / "records.json")
        flags = ["--data", tmp_path / "r" / "records.json"]
    capsys.readouterr()
    assert run(world, tmp_path / "r", *short, *flags, "--overwrite") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"holds what --{'data' if begin == 'data' else 'model'} goes on from" in error
    assert (tmp_path / "r" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("policy, changed", [("lisa:1@99", 12), ("gradual:1", 14), ("last_block", 14)])
def test_the_last_line_of_the_proof_counts_what_had_its_turn(world, tmp_path, capsys, policy, changed):
    """One of two blocks of 12 tensors trains, with ln_f's two where the policy has it; there are 28."""
    assert run(world, tmp_path / "r", "--trainable", policy, "--max-steps", 2, "--no-responses") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("proved"))
    assert f"{28 - changed} frozen tensors are bit-identical, {changed} trainable ones have changed" in line
    assert (", 12 others have had one step at most" in line) == (policy != "last_block")
    before, after = (GPT.from_pretrained(folder).state_dict() for folder in (world / "model", tmp_path / "r" / "model"))
    told = json.loads((tmp_path / "r" / "run.json").read_text())["freeze"]
    assert set(told["changed"]) == {n for n in after if n != "lm_head.weight" and not torch.equal(before[n], after[n])}
    assert not set(told["trainable"]) & set(told["frozen"]) and set(told["changed"]) <= set(told["trainable"])


def test_what_had_its_turn_is_known_after_a_resume(world, tmp_path, monkeypatch):
    flags = ["--trainable", "lisa:1@2", "--max-steps", 6, "--epochs", 3, "--seed", 120, "--no-responses"]  # one block, then twice the other
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert run(world, tmp_path / "r", *flags) == 143
    assert run(world, tmp_path / "r", *flags, "--resume") == 0
    assert run(world, tmp_path / "whole", *flags) == 0
    told = [json.loads((tmp_path / r / "run.json").read_text())["freeze"]["changed"] for r in ("r", "whole")]
    assert told[0] == told[1] and {name.split(".")[1] for name in told[0] if name.startswith("h.")} == {"0", "1"}


def test_the_end_token_of_a_model_wider_than_its_tokenizer_is_the_tokenizer_s(world, tmp_path, capsys):
    torch.manual_seed(0)
    shutil.copytree(world / "model", tmp_path / "wide")
    GPT(GPTConfig(vocab_size=300, block_size=320, n_layer=1, n_head=2, n_embd=16)).save_pretrained(tmp_path / "wide")
    assert run(world, tmp_path / "r", "--model", tmp_path / "wide", "--max-steps", 2, "--no-responses") == 0
    config = json.loads((tmp_path / "r" / "model" / "config.json").read_text())
    assert (config["eos_token_id"], config["vocab_size"]) == (256, 300)
    capsys.readouterr()
    assert gpt.main(["--model", str(tmp_path / "r"), "--prompt", "Say", "--temperature", "9", "--max-new-tokens", "99"]) == 0
    assert capsys.readouterr().out.startswith("Say")


def test_gpt_continues_a_text_with_a_run_s_adapter(world, tmp_path, capsys):
    assert run(world, tmp_path / "r", "--lora-r", 4, "--lora-alpha", 4000, "--trainable", "lora,last_block", "--max-steps", 4, "--no-responses") == 0
    assert lora.main(["merge", "--base", str(tmp_path / "r" / "model"), "--adapter", str(tmp_path / "r"), "--out", str(tmp_path / "merged")]) == 0
    told = []
    for model in ("r", "merged", "r/model"):
        capsys.readouterr()
        assert gpt.main(["--model", str(tmp_path / model), "--prompt", "Say", "--max-new-tokens", "20"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] != told[2]
    with pytest.raises(ValueError, match="the run's adapter is not part of a model; give .*model for its base alone, or merge it"):
        GPT.from_pretrained(tmp_path / "r")
    assert lora.main(["merge", "--base", str(world / "model"), "--adapter", str(tmp_path / "r"), "--out", str(tmp_path / "x")]) == 1
    assert re.fullmatch(r"error: .* was trained on .*r/model, not on .*: give that as --base .*\n", capsys.readouterr().err)


def test_an_occupied_folder_is_refused_and_overwrite_replaces_only_a_run(world, tmp_path, capsys):
    out = tmp_path / "r"
    assert run(world, out, "--max-steps", 2, "--no-responses") == 0
    assert run(world, out, "--max-steps", 2, "--no-responses") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run(world, out, "--lora-r", 2, "--max-steps", 2, "--no-responses", "--overwrite") == 0
    assert (out / "adapter").exists() and not (out / "model").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert run(world, tmp_path / "mine", "--max-steps", 2, "--overwrite") == 1
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize("planted, check", [
    ("optimizer over everything", "the optimizer holds what is frozen"),
    ("a flag flipped while training", "frozen, but with a gradient"),
    ("a frozen weight nudged", "frozen, but changed"),
    ("a step that does nothing", "should have trained, but did not change"),
])
def test_a_broken_proof_ends_the_run(world, tmp_path, capsys, monkeypatch, planted, check):
    if planted == "optimizer over everything":
        monkeypatch.setattr(finetune, "build_optimizer", lambda model, *_: torch.optim.AdamW(model.parameters()))
    elif planted == "a flag flipped while training":
        true = finetune.loss_sum
        def flipped(model, *args):
            model.h[0].ln_1.bias.requires_grad_(True)
            return true(model, *args)
        monkeypatch.setattr(finetune, "loss_sum", flipped)
    elif planted == "a frozen weight nudged":
        true_train = finetune.train
        def nudged(args, machine, model, *rest):
            figures = true_train(args, machine, model, *rest)
            with torch.no_grad():
                w = model.wte.weight
                w[0, 0] = torch.nextafter(w[0, 0], torch.tensor(math.inf))
            return figures
        monkeypatch.setattr(finetune, "train", nudged)
    else:
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    assert run(world, tmp_path / "r", "--trainable", "last_block", "--max-steps", 3, "--no-responses") == 1
    error = capsys.readouterr().err
    assert "freeze proof broken" in error and check in error
    assert not (tmp_path / "r" / "run.json").exists() and not (tmp_path / "r" / "model").exists()


def test_the_script_runs_from_anywhere_and_head_does_not_end_it(world, tmp_path):
    command = (f"{sys.executable} {ROOT / 'finetune.py'} --model {world / 'model'} --data {world / 'records.json'} "
               "--batch-size 8 --max-steps 3 --out r --no-responses | head -1")
    result = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.startswith("model ") and result.stderr == ""
    assert (tmp_path / "r" / "run.json").exists()


# ------------------------------------------------------------------------------ interrupted and resumed

POLICIES = {
    "full": [], "partial": ["--trainable", "last_block,-biases", "--cache-prefix"], "lora": ["--lora-r", 2, "--lora-dropout", 0.2],
    "hybrid": ["--lora-r", 2, "--trainable", "lora,last_block"],
}
DYNAMIC = {"gradual": ["--trainable", "gradual:1", "--lr-decay", 0.4], "lisa": ["--trainable", "lisa:1@3,embeddings"],
           "rgn": ["--trainable", "rgn:1"], "scored hybrid": ["--lora-r", 2, "--trainable", "hybrid:0.2"]}


def stop_after(monkeypatch, steps, number=signal.SIGTERM):
    """Send a signal to this process while the given step runs."""
    taken, true = [], finetune.gradients
    def stopping(*args):
        taken.append(1)
        if len(taken) == steps:
            os.kill(os.getpid(), number)
        return true(*args)
    monkeypatch.setattr(finetune, "gradients", stopping)


@pytest.mark.parametrize("policy, step", [("full", 1), ("full", 15), ("lora", 1), *((policy, 7) for policy in POLICIES | DYNAMIC)])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(world, tmp_path, monkeypatch, policy, step):
    flags = [*(POLICIES | DYNAMIC)[policy], "--epochs", 3, "--batch-size", 4, "--grad-accum", 2, "--dropout", 0.1, "--no-responses"]
    assert run(world, tmp_path / "a", *flags) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        assert run(world, tmp_path / "b", *flags) == 128 + signal.SIGTERM
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "torn')  # as a killed process may leave it
    assert not (tmp_path / "b" / "run.json").exists()
    assert run(world, tmp_path / "b", *flags, "--resume") == 0
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "a" / file).exists() == (tmp_path / "b" / file).exists()
        if (tmp_path / "a" / file).exists():
            a, b = (read_safetensors(tmp_path / r / file) for r in "ab")
            assert all(torch.equal(a[n], b[n]) for n in a)
    drop = lambda lines: [{k: v for k, v in m.items() if k != "seconds"} for m in lines]
    assert drop(metrics(tmp_path / "a")) == drop(metrics(tmp_path / "b"))
    a, b = (json.loads((tmp_path / r / "run.json").read_text())["freeze"]["checks"] for r in "ab")
    assert b.pop("resume") == 1 and a.keys() == b.keys() and all(b[check] >= times for check, times in a.items())
    assert not (tmp_path / "b" / "checkpoints").exists()


def test_ctrl_c_finishes_the_step_and_exits_130(world, tmp_path, monkeypatch, capsys):
    stop_after(monkeypatch, 2, signal.SIGINT)
    assert run(world, tmp_path / "r", "--no-responses") == 130
    assert "--resume" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["step-000002"]


def test_a_signal_that_comes_while_the_processes_ask_each_other_is_for_the_next_step(monkeypatch):
    with finetune.Signals() as signals:
        def ask(values, device):
            signals.noted = int(signal.SIGINT)
            return values
        monkeypatch.setattr(finetune, "total_over_processes", ask)
        assert [signals.on_any_process(None) for _ in range(2)] == [0, signal.SIGINT]


@pytest.fixture
def interrupted(world, tmp_path, monkeypatch):
    """A run stopped after step 7, with checkpoints of the steps 6 and 7."""
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        assert run(world, tmp_path / "r", "--epochs", 2, "--checkpoint-every", 2, "--no-responses") == 143
    assert sorted(p.name for p in (tmp_path / "r" / "checkpoints").iterdir()) == ["step-000006", "step-000007"]
    return tmp_path / "r"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [
    lambda f: flip_a_bit(f / "state.safetensors"), lambda f: (f / "state.safetensors").unlink(),
    lambda f: (f / "manifest.json").write_text("{}"), lambda f: (f / "manifest.json").unlink(),
    lambda f: (f / "state.safetensors").write_bytes((f / "state.safetensors").read_bytes()[:-9]),
])
def test_a_damaged_checkpoint_is_skipped_by_name_and_the_one_before_it_used(world, interrupted, capsys, damage):
    damage(interrupted / "checkpoints" / "step-000007")
    assert run(world, interrupted, "--epochs", 2, "--no-responses", "--resume") == 0
    out = capsys.readouterr().out
    assert "skipped" in out and "step-000007" in out and "from " + str(interrupted / "checkpoints" / "step-000006") in out
    assert [m["step"] for m in metrics(interrupted)] == [*range(11), 10]


def test_without_an_intact_checkpoint_nothing_starts_from_scratch(world, interrupted, tmp_path, capsys):
    for folder in (interrupted / "checkpoints").iterdir():
        flip_a_bit(folder / "state.safetensors")
    assert run(world, interrupted, "--epochs", 2, "--no-responses", "--resume") == 1
    assert "no intact checkpoint" in capsys.readouterr().err
    assert run(world, tmp_path / "nothing", "--resume") == 1
    assert "no run in" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--lr", "2e-3"], "lr was 0.001, is 0.002"), (["--seed", 5], "seed was 123, is 5"), (["--epochs", 3], "epochs was 2, is 3"),
    (["--trainable", "last_block"], "trainable was 'all', is 'last_block'"), (["--batch-size", 4], "batch_size was 8, is 4"),
    (["--lora-r", 2], "lora_r was None, is 2"), (["--template", "plain"], "template was 'alpaca'"),
])
def test_a_resume_that_does_not_match_is_refused_with_what_differs(world, interrupted, capsys, flags, message):
    assert run(world, interrupted, "--epochs", 2, "--no-responses", "--resume", *flags) == 1
    assert message in capsys.readouterr().err


def test_a_resume_on_changed_data_or_a_changed_base_is_refused(world, interrupted, tmp_path, capsys):
    other = tmp_path / "records.json"
    other.write_text((world / "records.json").read_text().replace("now", "then"))
    assert run(world, interrupted, "--epochs", 2, "--no-responses", "--resume", "--data", other) == 1
    assert "data sha256 was" in capsys.readouterr().err


def test_a_frozen_weight_that_differs_on_resume_breaks_the_proof(world, tmp_path, monkeypatch, capsys):
    shutil.copytree(world / "model", tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--trainable", "last_block", "--no-responses"]
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert run(world, tmp_path / "r", *flags) == 143
    model = GPT.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.wpe.weight[3, 3] += 1e-6
    model.save_pretrained(tmp_path / "model")
    assert run(world, tmp_path / "r", *flags, "--resume") == 1
    assert "freeze proof broken" in capsys.readouterr().err


def test_resuming_a_finished_run_says_so_and_exits_0(world, tmp_path, capsys):
    assert run(world, tmp_path / "r", "--max-steps", 2, "--no-responses") == 0
    assert run(world, tmp_path / "r", "--max-steps", 2, "--no-responses", "--resume") == 0
    assert "complete" in capsys.readouterr().out


def test_two_runs_cannot_share_a_folder(world, tmp_path, capsys):
    (tmp_path / "r").mkdir()
    lock = finetune.lock_folder(tmp_path / "r")
    (tmp_path / "r" / "metrics.jsonl").touch()
    assert run(world, tmp_path / "r", "--overwrite", "--no-responses") == 1
    assert "another run is writing there" in capsys.readouterr().err
    lock.close()


# ------------------------------------------------------------------------------ numbers that are none, disks that are full


def plant_nan(monkeypatch, steps):
    counter, true = [], finetune.loss_sum
    def poisoned(model, *args):
        loss, n = true(model, *args)
        if torch.is_grad_enabled():
            counter.append(1)
            loss = loss * (math.nan if len(counter) in steps else 1)
        return loss, n
    monkeypatch.setattr(finetune, "loss_sum", poisoned)


def test_a_step_without_a_finite_loss_is_skipped_and_counted(world, tmp_path, monkeypatch, capsys):
    plant_nan(monkeypatch, {1, 3, 4})
    assert run(world, tmp_path / "r", "--max-steps", 6, "--epochs", 2, "--no-responses") == 0
    info = json.loads((tmp_path / "r" / "run.json").read_text())
    assert info["train"]["skipped_steps"] == 3 and math.isfinite(info["train"]["train_loss"])
    assert "step 3 skipped: loss nan" in capsys.readouterr().out
    assert all(torch.isfinite(t).all() for t in weights(tmp_path / "r").values())


@pytest.mark.parametrize("policy", ["lisa:1@2", "gradual:1"])
@pytest.mark.parametrize("wrong", [{1}, {3, 4}, {5, 6}, {9, 10}])
def test_a_skipped_step_is_no_alarm_where_the_set_changes(world, tmp_path, monkeypatch, policy, wrong):
    plant_nan(monkeypatch, wrong)
    assert run(world, tmp_path / "r", "--trainable", policy, "--epochs", 2, "--no-responses") == 0


def test_the_probe_of_a_policy_sees_the_loss_that_is_trained_on(world, tmp_path, monkeypatch):
    targets, true = [], finetune.freeze
    monkeypatch.setattr(finetune, "freeze", lambda *args, batches, seed: (targets.append(batches), true(*args, batches=batches, seed=seed))[1])
    for loss_on in ("response", "all"):
        assert run(world, tmp_path / loss_on, "--trainable", "rgn:1", "--loss-on", loss_on, "--max-steps", 2, "--no-responses") == 0
    ignored = [sum(int((t == -100).sum()) for _, t in batches) for batches in targets]
    assert ignored[0] > ignored[1]


def test_the_rate_in_the_metrics_is_that_of_lr(world, tmp_path, monkeypatch):
    flags = ["--schedule", "linear", "--warmup", 0, "--max-steps", 4, "--no-responses"]
    for name, more in (("hybrid", ["--lora-r", 2, "--trainable", "lora,last_block"]), ("deep", ["--lr-decay", 0.1])):
        assert run(world, tmp_path / name, *flags, *more) == 0
        assert [m["lr"] for m in metrics(tmp_path / name)] == pytest.approx([0, 1e-3, 7.5e-4, 5e-4, 2.5e-4, 0])
    plant_nan(monkeypatch, {2})
    assert run(world, tmp_path / "skipped", *flags) == 0
    assert metrics(tmp_path / "skipped")[2]["lr"] == pytest.approx(7.5e-4)


def test_only_what_is_used_counts_as_truncated(world, tmp_path):
    records = json.loads((world / "records.json").read_text())
    for record in records[5:34]:
        record["output"] = "yes " * 40
    (tmp_path / "d.json").write_text(json.dumps(records))
    flags = ["--data", tmp_path / "d.json", "--max-length", 250, "--max-steps", 2, "--no-responses"]
    for name, more, cut in (("all", [], 29), ("few", ["--max-examples", 3, "--select", "shortest"], 0)):
        assert run(world, tmp_path / name, *flags, *more) == 0
        assert json.loads((tmp_path / name / "run.json").read_text())["data"]["truncated"] == cut


def test_five_such_steps_in_a_row_end_the_run_and_leave_the_checkpoint(world, tmp_path, monkeypatch, capsys):
    plant_nan(monkeypatch, range(4, 99))
    assert run(world, tmp_path / "r", "--epochs", 3, "--checkpoint-every", 3, "--no-responses") == 1
    assert "5 steps in a row" in capsys.readouterr().err
    assert not (tmp_path / "r" / "run.json").exists()
    folder, _ = finetune.find_checkpoint(tmp_path / "r")
    assert all(torch.isfinite(t).all() for t in read_safetensors(folder / "state.safetensors").values())


def test_a_full_disk_ends_in_one_line_with_the_last_checkpoint_intact(world, tmp_path, monkeypatch, capsys):
    true, calls = finetune.write_safetensors, []
    def full(path, tensors):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        true(path, tensors)
    monkeypatch.setattr(finetune, "write_safetensors", full)
    assert run(world, tmp_path / "r", "--epochs", 2, "--checkpoint-every", 2, "--no-responses") == 1
    error = capsys.readouterr().err
    assert "No space left" in error and "bytes are free" in error and error.count("\n") == 1
    assert [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()] == ["step-000002"]
    assert finetune.find_checkpoint(tmp_path / "r")[0].name == "step-000002"


# ------------------------------------------------------------------------------ several processes


@pytest.mark.parametrize("policy", POLICIES)
def test_two_processes_take_the_steps_of_one_with_the_same_global_batch(world, tmp_path, policy):
    flags = ["--model", world / "model", "--data", world / "records.json", "--lr", "1e-3", "--max-steps", "4", "--device", "cpu",
             "--no-responses", *[f for f in POLICIES[policy] if f not in ("--lora-dropout", 0.2)]]
    assert finetune.main([str(f) for f in [*flags, "--batch-size", 6, "--out", tmp_path / "one"]]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "finetune.py",
               *flags, "--batch-size", 3, "--out", tmp_path / "two"]
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("proved") == 1  # only one process prints
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-6)
    norms = [[m["grad_norm"] for m in metrics(tmp_path / r) if "grad_norm" in m] for r in ("one", "two")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    vals = [json.loads((tmp_path / r / "run.json").read_text())["train"]["val_loss"] for r in ("one", "two")]
    assert vals[0] == pytest.approx(vals[1], rel=1e-6)


# ------------------------------------------------------------------------------ which examples, in which order, asked how


def test_ifd_is_the_ratio_of_perplexities_with_and_without_the_prompt(world):
    encoded, model = encoded_world(world)[:5], GPT.from_pretrained(world / "model").eval()
    scores = evaluate.instruction_following_difficulty(model, encoded, 256, 2)
    for e, score in zip(encoded, scores):
        answer = e.ids[e.n_prompt:]
        def nll(context):
            with torch.no_grad():
                logits = model(torch.tensor([context + answer[:-1]]))[0, len(context) - 1:]
            return F.cross_entropy(logits, torch.tensor(answer)).item()
        assert score == pytest.approx(math.exp(nll(e.ids[:e.n_prompt]) - nll([256])), rel=1e-4)


def test_selection_takes_what_its_name_says():
    encoded = [data.Encoded(list(range(10 + n)), 10) for n in (5, 1, 9, 3, 7)]
    assert data.select_examples(encoded, None, 2, 0, None) == [0, 1]
    assert data.select_examples(encoded, "longest", 2, 0, None) == [2, 4]
    assert data.select_examples(encoded, "shortest", 2, 0, None) == [1, 3]
    assert data.select_examples(encoded, "ifd", 2, 0, lambda: [0.2, 1.4, 0.9, 0.5, 0.1]) == [2, 3]
    drawn = data.select_examples(encoded, "random", 3, 0, None)
    assert drawn == data.select_examples(encoded, "random", 3, 0, None) == sorted(set(drawn)) and len(drawn) == 3
    assert data.select_examples(encoded, "random", 99, 0, None) == [0, 1, 2, 3, 4]


def test_stages_rise_in_difficulty_and_the_last_repeats_a_tenth_of_the_earlier():
    difficulty = [float(d) for d in random.Random(1).sample(range(60), 60)]
    stages = data.split_stages(difficulty, 3, False, 7)
    values = [[difficulty[i] for i in stage[:20]] for stage in stages]
    assert max(values[0]) < min(values[1]) and max(values[1]) < min(values[2])
    assert [len(stage) for stage in stages] == [20, 20, 24] and set(stages[2][20:]) < set(stages[0] + stages[1])
    falling = data.split_stages(difficulty, 3, True, 7)
    assert [sorted(stage[:20]) for stage in falling] == [sorted(stage[:20]) for stage in stages[::-1]]


@pytest.fixture(scope="session")
def leveled(world):
    """40 records with every optional field, hardest first in the file."""
    records = json.loads((world / "records.json").read_text())
    for i, record in enumerate(records):
        record |= {"level": 3 - i * 3 // 34, "instruction_long": "Please, " * 5 + record["instruction"], "rationale": f"Because {i}.", "draft": "no"}
    path = world / "leveled.json"
    path.write_text(json.dumps(records))
    return path


def test_a_curriculum_trains_the_easy_records_first_as_the_log_shows(world, leveled, tmp_path):
    assert run(world, tmp_path / "r", "--data", leveled, "--curriculum", "level", "--epochs", 2, "--no-responses") == 0
    seen = [m["records"] for m in metrics(tmp_path / "r") if "records" in m]
    assert [sum(map(len, seen[i:i + 4])) for i in (0, 4)] == [22, 22]
    assert {i for s in seen[:4] for i in s} == set(range(23, 34)) and {i for s in seen[4:8] for i in s} == set(range(12, 23))
    counts = [sum(s.count(i) for s in seen) for i in range(34)]
    assert set(counts[:12]) == {2} and sorted(counts[12:]) == [2] * 20 + [4] * 2


@pytest.mark.parametrize("kind", ["-length", "ifd", "random"])
def test_every_curriculum_sees_every_record(world, tmp_path, kind):
    assert run(world, tmp_path / "r", f"--curriculum={kind}", "--stages", 2, "--epochs", 1, "--no-responses") == 0
    assert {i for m in metrics(tmp_path / "r") for i in m.get("records", [])} == set(range(34))


def test_selected_records_are_the_only_ones_trained_on(world, tmp_path, capsys):
    assert run(world, tmp_path / "r", "--max-examples", 5, "--select", "longest", "--epochs", 1, "--no-responses") == 0
    assert "--max-examples" not in capsys.readouterr().out
    assert {i for m in metrics(tmp_path / "r") for i in m.get("records", [])} == {3, 7, 11, 15, 19}
    assert json.loads((tmp_path / "r" / "run.json").read_text())["data"]["used"] == 7


@pytest.mark.parametrize("select", [[], ["--select", "longest"]])
def test_asking_for_more_examples_than_there_are_is_not_passed_over_in_silence(world, tmp_path, capsys, select):
    assert run(world, tmp_path / "r", "--max-examples", 35, *select, "--max-steps", 1, "--no-responses") == 0
    assert "note     --max-examples 35: only 34 training records can be had\n" in capsys.readouterr().out


def test_on_a_terminal_notes_and_errors_stand_on_lines_of_their_own(world, tmp_path, monkeypatch, capsys):
    results = iter([(math.nan, 1.0), OSError("gone")])
    def step(*args):
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result
    monkeypatch.setattr(finetune, "take_step", step)
    monkeypatch.setattr(finetune, "in_place", lambda: True)
    assert run(world, tmp_path / "r", "--max-steps", 3, "--eval-every", 3, "--no-responses") == 1
    out, err = capsys.readouterr()
    lines = [line.rpartition("\r")[2].rstrip() for line in out.split("\n")]
    assert "note     step 1 skipped: loss nan, gradient norm 1.0" in lines
    assert lines[-2].startswith("step 1/3 ") and lines[-1] == "" and err == "error: gone\n"


def test_a_run_whose_last_steps_diverged_is_not_saved(world, tmp_path, capsys):
    assert run(world, tmp_path / "r", "--max-steps", 2, "--lr", 1e30, "--clip", 0, "--no-responses") == 1
    err = capsys.readouterr().err
    assert err.startswith("error: the validation loss is nan after step 2, nothing is saved") and err.count("\n") == 1
    assert not (tmp_path / "r" / "model").exists() and not (tmp_path / "r" / "run.json").exists()
    for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_test_prompts_without_room_for_an_answer_are_said_and_the_run_is_scored_without_their_likelihood(world, tmp_path, capsys):
    records = json.loads((world / "records.json").read_text())
    for i in (34, 35, 36, 37):
        records[i]["instruction"] = "long " * 90
    (tmp_path / "long.json").write_text(json.dumps(records))
    assert run(world, tmp_path / "r", "--data", tmp_path / "long.json", "--max-steps", 2) == 0
    assert "note     4 test prompts leave no room for an answer and count as wrong; the first is test record 1\n" in capsys.readouterr().out
    assert evaluate.main([str(tmp_path / "r"), "--plot"]) == 0
    assert "of 4 of 4 test records the response is not in response_nll" in capsys.readouterr().out
    scores = json.loads((tmp_path / "r" / "scores.json").read_text())
    assert (scores["n"], scores["exact_match"], scores["response_nll"], scores["response_perplexity"]) == (4, 0, None, None)


def test_a_head_that_is_untied_already_is_not_untied_again(world, tmp_path, capsys):
    GPT.from_pretrained(world / "model", tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(world / "model" / file, tmp_path / "untied")
    assert run(world, tmp_path / "r", "--model", tmp_path / "untied", "--untie-head") == 2
    assert freeze_file.main(["--model", str(tmp_path / "untied"), "--untie-head"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("--untie-head: the head of" in line and "leave the flag out" in line for line in lines)


def test_answers_of_every_shape_are_trained_on_and_scored_on_the_final_answer(world, leveled, tmp_path):
    for response, text in (("rationale", "Because 34.\nAnswer: yes yes yes"), ("reflection", "no\nThat is wrong. Because 34.\nAnswer: yes yes yes")):
        assert run(world, tmp_path / response, "--data", leveled, "--response", response, "--max-steps", 1) == 0
        first = json.loads((tmp_path / response / "responses.jsonl").read_text().splitlines()[0])
        assert first["output"] == text
        assert evaluate.main([str(tmp_path / response)]) == 0
        scores = json.loads((tmp_path / response / "scores.json").read_text())
        assert scores["n"] == 4 and scores["exact_match"] == 0


def test_adaptive_instructions_are_the_shortest_that_are_no_harder_and_longer_where_unsure(world, leveled, tmp_path, capsys):
    assert run(world, tmp_path / "r", "--data", leveled, "--instruction", "adaptive", "--max-steps", 2) == 0
    records = load_examples(leveled)
    model, tokenizer = GPT.from_pretrained(world / "model"), load_tokenizer(world / "model")
    losses = [[nats / n for nats, n in evaluate.example_nlls(model, encode_examples([data.reshape_example(r, kind) for r in records[:34]],
                                                                                    tokenizer)[0])] for kind in data.INSTRUCTIONS]
    long = sum(short > best + finetune.TAU for short, best in zip(losses[0], map(min, *losses)))
    assert f"of 34 training records {long} take the long instruction" in capsys.readouterr().out
    responses = [json.loads(line) for line in (tmp_path / "r" / "responses.jsonl").read_text().splitlines()]
    tuned = GPT.from_pretrained(tmp_path / "r" / "model")
    entropy = lambda part: evaluate.first_token_entropies(tuned, finetune.encode_prompts(tokenizer, part, "alpaca"), 3)
    threshold = sorted(entropy(records[38:]))[1]
    asked = ["Please" in r["instruction"] for r in responses]
    assert asked == [h > threshold for h in entropy(records[34:38])]
    answers = (tmp_path / "r" / "responses.jsonl").read_bytes()
    for left in (b"", answers[:answers.index(b"\n") + 1]):  # none, or the first: evaluate.py chooses and answers as finetune.py would have
        (tmp_path / "r" / "responses.jsonl").write_bytes(left)
        assert evaluate.main([str(tmp_path / "r")]) == 0
        assert (tmp_path / "r" / "responses.jsonl").read_bytes() == answers
    records[35]["instruction_long"] = records[36]["instruction"] = "long " * 90  # no room for an answer
    (tmp_path / "long.json").write_text(json.dumps(records))
    assert run(world, tmp_path / "long", "--data", tmp_path / "long.json", "--instruction", "adaptive", "--max-steps", 2) == 0
    assert len((tmp_path / "long" / "responses.jsonl").read_text().splitlines()) == 4
    capsys.readouterr()
    assert run(world, tmp_path / "none", "--data", leveled, "--instruction", "adaptive", "--max-length", 2) == 1
    err = capsys.readouterr().err
    assert f"error: {leveled}: training records" in err and err.count("\n") == 1


def test_entropy_of_the_first_token_is_that_of_each_prompt_alone(world):
    model, prompts = GPT.from_pretrained(world / "model").eval(), [[1, 2, 3], [5], [7, 8]]
    for prompt, entropy in zip(prompts, evaluate.first_token_entropies(model, prompts, 2)):
        p = torch.distributions.Categorical(logits=model(torch.tensor([prompt]))[0, -1].detach())
        assert entropy == pytest.approx(p.entropy().item(), rel=1e-5)


def test_losses_are_drawn_with_matplotlib_and_without(tmp_path, monkeypatch):
    rows = [{"step": 0, "train_loss": None, "val_loss": 3.0}] + [{"step": i, "train_loss": 9 - i, "val_loss": None} for i in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert finetune.draw_losses(tmp_path).startswith("█▇▆▅▄▃▂▁  8.000 to 1.000")
    assert not (tmp_path / "loss.png").exists()
    pytest.importorskip("matplotlib", reason="draws with matplotlib where it is installed")
    assert finetune.draw_losses(tmp_path) == str(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_default_command_runs_from_the_embedded_model_to_its_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert finetune.main(["--max-steps", "3", "--device", "cpu"]) == 0
    info = json.loads((tmp_path / "runs" / "tiny-all" / "run.json").read_text())
    assert info["data"]["rows"] == 4500 and info["train"]["steps"] == 3 and info["freeze"]["policy"] == "all"
    assert info["train"]["exact_match"] is not None
    assert len((tmp_path / "runs" / "tiny-all" / "responses.jsonl").read_text().splitlines()) == 450
    out = capsys.readouterr().out
    assert out.startswith("model    tiny: 2,222,208 parameters") and "52 trainable ones have changed" in out


def test_an_overwrite_that_was_interrupted_can_be_repeated(world, tmp_path, monkeypatch):
    flags = ["--max-steps", 1, "--no-responses"]
    assert run(world, tmp_path / "r", *flags) == 0
    with monkeypatch.context() as patch:
        def interrupt(*_):
            raise KeyboardInterrupt
        patch.setattr(finetune.shutil, "rmtree", interrupt)
        assert run(world, tmp_path / "r", *flags, "--overwrite") == 130
    assert (tmp_path / "r" / "model").exists() and not (tmp_path / "r" / "run.json").exists()
    assert run(world, tmp_path / "r", *flags, "--overwrite") == 0


def test_the_training_loss_of_a_run_is_the_mean_of_its_last_steps_not_of_all(world, tmp_path):
    assert run(world, tmp_path / "r", "--epochs", 2, "--eval-every", 3, "--no-responses") == 0
    figures, every = json.loads((tmp_path / "r" / "run.json").read_text())["train"], losses(tmp_path / "r")
    assert len(every) == 10 and figures["train_loss"] == pytest.approx(sum(every[-3:]) / 3, rel=1e-6)


def test_a_resumed_run_counts_the_checks_that_passed_before_it_was_stopped(world, interrupted):
    assert run(world, interrupted, "--epochs", 2, "--no-responses", "--resume") == 0
    checks = json.loads((interrupted / "run.json").read_text())["freeze"]["checks"]
    assert checks["check_gradients"] == 2  # in steps 1 and 2, before the stop after step 7
    assert checks["check_optimizer"] == 4  # before training, twice; of the loaded state; at the end


def test_each_process_draws_dropout_masks_of_its_own_in_each_step(world, tmp_path, monkeypatch):
    seeds, true = [], finetune.join_processes
    for rank in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(finetune, "join_processes", lambda args: true(args)._replace(rank=rank, world=2))
            patch.setattr(torch, "manual_seed", seeds.append)
            assert run(world, tmp_path / str(rank), "--batch-size", 1, "--max-steps", 3, "--no-responses") == 0
    assert seeds[0] == seeds[4] == 123 and len(set(seeds)) == 7  # that of new adapters is the same for all


def test_no_checkpoint_is_written_of_a_model_whose_frozen_weights_have_moved(world, tmp_path, monkeypatch, capsys):
    true = finetune.take_step
    def moved(model, plan, *rest):
        with torch.no_grad():
            model.wpe.weight[3, 3] += 1e-3
        return true(model, plan, *rest)
    monkeypatch.setattr(finetune, "take_step", moved)
    assert run(world, tmp_path / "r", "--trainable", "last_block", "--checkpoint-every", 2, "--no-responses") == 1
    assert "freeze proof broken: frozen, but changed: wpe.weight" in capsys.readouterr().err
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_a_step_whose_gradient_alone_is_infinite_moves_nothing(world, tmp_path, monkeypatch, capsys):
    calls, true = [], finetune.gradients
    def overflowing(model, *args):
        loss = true(model, *args)
        calls.append(loss)
        if len(calls) == 3:
            model.h[1].mlp.c_fc.bias.grad[0] = math.inf
        return loss
    monkeypatch.setattr(finetune, "gradients", overflowing)
    assert run(world, tmp_path / "r", "--max-steps", 5, "--no-responses") == 0
    assert re.search(r"step 3 skipped: loss \d\.\d+, gradient norm inf", capsys.readouterr().out)
    assert json.loads((tmp_path / "r" / "run.json").read_text())["train"]["skipped_steps"] == 1
    assert all(torch.isfinite(t).all() for t in weights(tmp_path / "r").values())


def test_five_skipped_steps_that_are_not_in_a_row_do_not_end_the_run(world, tmp_path, monkeypatch):
    plant_nan(monkeypatch, {2, 4, 6, 8, 10})
    assert run(world, tmp_path / "r", "--epochs", 3, "--max-steps", 11, "--no-responses") == 0
    assert json.loads((tmp_path / "r" / "run.json").read_text())["train"]["skipped_steps"] == 5


def test_the_long_instruction_is_asked_only_above_the_75th_percentile_of_the_validation_records(monkeypatch):
    space = lambda **names: type("Space", (), names)
    monkeypatch.setattr(finetune, "encode_prompts", lambda tokenizer, examples, template: [[e] for e in examples])
    monkeypatch.setattr(finetune, "first_token_entropies", lambda model, prompts, batch_size: [p[0] for p in prompts])
    model = space(config=space(block_size=9))
    assert finetune.lengthen(model, None, "alpaca", 2, [7, 0, 3, 1, 6, 2, 5, 4], [5, 6, 6.5, 9], ["a", "b", "c", "d"]) == [5, 6, "c", "d"]


def test_a_right_answer_that_never_ended_is_not_exactly_right_in_run_json(world, tmp_path, monkeypatch):
    answers = lambda model, tokenizer, examples, *_, **more: [
        {**e, "id": i, "model_response": e["output"], "ended": i > 0} for i, e in enumerate(examples)]
    monkeypatch.setattr(finetune, "generate_responses", answers)
    assert run(world, tmp_path / "r", "--max-steps", 2) == 0
    assert json.loads((tmp_path / "r" / "run.json").read_text())["train"]["exact_match"] == 3 / 4


def test_a_validation_record_that_is_cut_counts_as_truncated(world, tmp_path):
    records = json.loads((world / "records.json").read_text())
    records[38]["output"] = "x" * 400  # 34 train, 4 test, the last two validate
    (tmp_path / "d.json").write_text(json.dumps(records))
    assert run(world, tmp_path / "r", "--data", tmp_path / "d.json", "--max-steps", 2, "--no-responses") == 0
    account = json.loads((tmp_path / "r" / "run.json").read_text())["data"]
    assert (account["truncated"], account["dropped"], account["used"]) == (1, 0, 36)


def test_what_is_selected_or_repeated_by_chance_depends_on_the_seed():
    encoded = [data.Encoded(list(range(9)), 3)] * 30
    selected = [data.select_examples(encoded, "random", 5, seed, None) for seed in (0, 1, 0)]
    repeated = [data.split_stages(list(range(60)), 3, False, seed)[2][20:] for seed in (0, 1, 0)]
    for drawn in (selected, repeated):
        assert drawn[0] == drawn[2] != drawn[1]
    assert repeated[0] != [0, 1, 2, 3]  # not the easiest ones


def test_the_speed_of_a_run_is_without_the_time_of_its_validations(world, tmp_path, monkeypatch):
    true = finetune.mean_loss
    monkeypatch.setattr(finetune, "mean_loss", lambda *args: finetune.time.sleep(0.5) or true(*args))
    assert run(world, tmp_path / "r", "--max-steps", 4, "--eval-every", 1, "--no-responses") == 0
    figures, tokens = json.loads((tmp_path / "r" / "run.json").read_text())["train"], metrics(tmp_path / "r")[-1]["tokens"]
    assert figures["seconds"] > 1.5 and tokens / figures["tokens_per_second"] <= figures["seconds"] - 1.4


def test_a_short_validation_takes_batches_of_all_lengths(world):
    model, tokenizer = GPT.from_pretrained(world / "model"), load_tokenizer(world / "model")
    encoded = sorted(encode_examples(load_examples(world / "records.json")[:5], tokenizer)[0], key=lambda e: len(e.ids))
    of = lambda part, **more: finetune.mean_loss(model, part, 1, "response", CPU, **more)
    assert of(encoded, limit=2) == of([encoded[0], encoded[3]])
    assert of(encoded, limit=3) == of(encoded[::2]) and of(encoded, limit=99) == of(encoded)
