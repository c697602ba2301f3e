"""What saves time or memory gives the same result as the plain way."""

import contextlib
import ctypes
import functools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import finetune
import gpt
from freeze import freeze
from gpt import GPT, GPTConfig
from test_finetune import losses, metrics, run, stop_after, weights, world  # noqa: F401


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=31, block_size=16, n_layer=3, n_head=2, n_embd=8))


@pytest.fixture
def idx():
    return torch.randint(31, (3, 9), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------ the model


def test_features_of_wanted_positions_and_their_gradients_are_those_of_all(model, idx):
    wanted, results = torch.tensor([2, 3, 11, 26]), []
    for hidden in (model.features(idx).flatten(0, 1)[wanted], model.features(idx, wanted=wanted)):
        model.zero_grad()
        hidden.pow(3).sum().backward()
        results.append([hidden.detach(), *(p.grad for p in model.parameters())])
    for plain, fast in zip(*results):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", range(4))
def test_features_from_what_enters_a_block_are_bit_equal(model, idx, first):
    hidden = model.hidden_states(idx, first)
    assert torch.equal(model.features(idx, hidden=hidden, first=first), model.features(idx))
    wanted = torch.tensor([0, 5, 26])
    known, plain = model.features(idx, None, wanted, hidden, first), model.features(idx, None, wanted)
    if first < 3:
        assert torch.equal(known, plain)
    else:  # the last block ran on all positions, not on three: the last bits of a product depend on its rows
        torch.testing.assert_close(known, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cached", [False, True])
def test_attention_of_few_scores_gives_the_logits_of_flash_attention(model, idx, monkeypatch, cached):
    calls, true = [], gpt.attention
    monkeypatch.setattr(gpt, "attention", lambda *args: (calls.append(args), true(*args))[1])
    def logits():
        cache = gpt.KVCache(model.config, len(idx), 16) if cached else None
        return [model.lm_head(model.features(part, cache)) for part in (idx[:, :5], idx[:, 5:])]
    few, n = logits(), len(calls)
    monkeypatch.setattr(gpt, "FEW_SCORES", 0)
    for a, b in zip(few, logits()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert n == len(calls) == 6  # three blocks, twice


@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradients_are_those_of_torch_in_float64(masked):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in ((2, 5, 5) if masked else (5, 5, 5))]
    mask = torch.tensor([[[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]], [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]).bool()[:, None] if masked else None
    oracle = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=not masked)
    ours = gpt.attention(*inputs, mask, 0.0)
    torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(oracle)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, oracle))):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_bfloat16_attends_as_precisely_over_few_scores_as_over_many():
    torch.manual_seed(0)
    model = gpt.CausalSelfAttention(gpt.GPTConfig(n_embd=64, n_head=2))
    torch.nn.init.normal_(model.c_attn.weight, std=0.3)  # large scores, whose rounding would show
    x = torch.randn(2, 50, 64)
    with torch.no_grad():
        exact = model.double()(x.double())
        rounded = model.bfloat16()(x.bfloat16()).double()
        q, k, v = model.c_attn(x.bfloat16()).view(2, 50, 3, 2, 32).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        flash = model.c_proj(y.transpose(1, 2).reshape(2, 50, 64)).double()
    assert (rounded - exact).abs().max() <= 1.01 * (flash - exact).abs().max()


def test_attention_drops_a_share_of_its_weights_and_scales_up_the_others():
    torch.manual_seed(0)
    q, v = torch.zeros(4, 2, 64, 8), torch.eye(64).expand(4, 2, 64, 64)
    weights = gpt.attention(q, q, v, torch.ones(4, 1, 64, 64).bool(), 0.25)  # each 1/64, or dropped
    assert sorted((weights * 64).unique().tolist()) == pytest.approx([0, 1 / 0.75])
    assert (weights == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)


# ------------------------------------------------------------------------------ the loss and the optimizer


def test_the_cross_entropy_and_its_gradient_are_those_of_torch():
    torch.manual_seed(0)
    logits, targets, weights = torch.randn(150, 31) * 30, torch.randint(31, (150,)), torch.rand(150)
    results = []
    for function, dtype in ((finetune.CrossEntropy.apply, torch.float32),
                            (functools.partial(torch.nn.functional.cross_entropy, reduction="none"), torch.float64)):
        x = logits.to(dtype).requires_grad_()
        loss = function(x * 1, targets)  # as the head's output: nobody else's
        results.append((loss.detach().double(), torch.autograd.grad(loss @ weights.to(dtype), x)[0].double()))
    for ours, oracle in zip(*results):
        torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_cross_entropy_takes_the_place_of_the_logits_and_cannot_be_taken_twice():
    x = torch.randn(3, 5, requires_grad=True)
    logits = x * 1
    loss = finetune.CrossEntropy.apply(logits, torch.tensor([0, 4, 2])).sum()
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_run_and_what_it_reads_do_without_torchs_compiler(world, tmp_path):
    flags = ["--model", str(world / "model"), "--data", str(world / "records.json"), "--out", str(tmp_path / "r"), "--max-steps", "2"]
    code = f"import finetune, sys; assert finetune.main({flags}) == 0; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(finetune.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"torch.optim", "finetune"} <= set(done.stdout.split()) and not {"torch._dynamo", "sympy"} & set(done.stdout.split())


def test_the_optimizer_is_torchs():
    torch.manual_seed(0)
    start, results = torch.randn(4, 3), []
    for kind in (finetune.AdamW, torch.optim.AdamW):
        p = start.clone().requires_grad_()
        optimizer = kind([{"params": [p], "lr": 0.1, "weight_decay": 0.1}], fused=True)
        for step in range(6):
            (p - 1).pow(4).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert p.grad is None
            if step == 2:  # a fresh one goes on from what was kept
                kept = optimizer.state_dict()
                optimizer = kind([{"params": [p], "lr": 0.1, "weight_decay": 0.1}], fused=True)
                optimizer.load_state_dict(kept)
        results.append(p.detach())
    assert torch.equal(*results) and not torch.equal(results[0], start)


# ------------------------------------------------------------------------------ memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_glibc_accepts_to_keep_what_is_freed(monkeypatch):
    libc, calls = ctypes.CDLL(None), []
    def mallopt(option, value, true=libc.mallopt):
        calls.append((option, true(option, value)))
        return calls[-1][1]
    libc.mallopt = mallopt
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    finetune.keep_memory()
    assert calls in ([(-3, 1), (-1, 1)], [(-3, 0), (-3, 1), (-1, 1)])  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD; 1: done


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_without_glibc_memory_is_left_as_it_is(monkeypatch, error):
    asked = []
    def refuse(name):
        asked.append(name)
        raise error
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    finetune.keep_memory()
    assert asked == [None]  # the library of this process was asked for, and its absence is no error


@pytest.mark.parametrize("preset", ["7", None])
def test_onednn_keeps_few_shapes_unless_the_environment_says_otherwise(monkeypatch, preset):
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.setenv(name, preset) if preset else monkeypatch.delenv(name, raising=False)
    finetune.keep_memory()
    kept = os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"]
    assert kept == ((preset, preset) if preset else ("24", "1"))


# ------------------------------------------------------------------------------ matrix products


def test_products_that_onednn_may_do_are_those_of_float32():
    a, b = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double()
    with finetune.multiply_with_onednn():
        product = a @ b
    assert ((product - exact).abs().max() / exact.abs().max()).item() < 2e-6  # factors rounded to bf16: 3e-3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rounds", [False, True])
def test_where_onednn_would_round_to_bf16_it_is_not_used(monkeypatch, rounds, compiled):
    matmul, true = torch.backends.mkldnn.matmul, torch.Tensor.__matmul__
    before = matmul.fp32_precision
    if rounds:
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: true(a.bfloat16().float(), b.bfloat16().float()))
    with pytest.raises(KeyError), finetune.multiply_with_onednn(compiled):
        assert matmul.fp32_precision == (before if rounds else "bf16") and before != "bf16"
        raise KeyError
    assert matmul.fp32_precision == before


@pytest.mark.parametrize("compiled, used", [(False, "bf16"), (True, "none")])
def test_beside_a_gpu_which_would_obey_the_settings_old_name_too_a_compiled_run_is_left_alone(monkeypatch, compiled, used):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with finetune.multiply_with_onednn(compiled):
        assert torch.backends.mkldnn.matmul.fp32_precision == used and torch.backends.cuda.matmul.fp32_precision in ("none", "ieee")


@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_a_run_multiplies_with_onednn(world, tmp_path, monkeypatch, flags):
    settings, true = [], finetune.gradients
    def watched(*args):
        settings.append(torch.backends.mkldnn.matmul.fp32_precision)
        if "--compile" in flags:
            torch.get_float32_matmul_precision()  # torch's compiler does so: an error where it was set by the new name alone
        return true(*args)
    monkeypatch.setattr(finetune, "gradients", watched)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    assert run(world, tmp_path / "r", "--max-steps", 1, "--no-responses", *flags) == 0
    assert settings == ["bf16"] and torch.backends.mkldnn.matmul.fp32_precision == "none"
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("flags", [[], ["--recompute", "--grad-accum", 2], ["--lora-r", 2, "--trainable", "lora,embeddings"]])
def test_what_is_always_on_gives_the_losses_of_the_plain_way(world, tmp_path, monkeypatch, flags):
    """oneDNN, attention of short texts and the lookup's gradient, beside torch's defaults: 20 steps."""
    flags = [*flags, "--max-steps", 20, "--epochs", 20, "--no-responses", "--eval-batches", 1]
    assert run(world, tmp_path / "fast", *flags) == 0
    monkeypatch.setattr(finetune, "multiply_with_onednn", lambda compiled: contextlib.nullcontext())
    monkeypatch.setattr(gpt, "FEW_SCORES", 0)
    monkeypatch.setattr(torch.nn.Embedding, "sparse", property(lambda self: False, lambda self, value: None), raising=False)
    assert run(world, tmp_path / "plain", *flags) == 0
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


@pytest.mark.parametrize("untie", [[], ["--untie-head"]])
def test_the_gradient_of_an_embedding_arrives_dense_and_only_a_tied_one_by_way_of_few_rows(world, tmp_path, monkeypatch, untie):
    seen, true = [], finetune.gradients
    def watched(model, *rest):
        loss = true(model, *rest)
        seen.append((model.wte.sparse, model.wte.weight.grad.is_sparse))
        return loss
    monkeypatch.setattr(finetune, "gradients", watched)
    assert run(world, tmp_path / "r", *untie, "--max-steps", 2, "--no-responses") == 0
    assert seen == [(not untie, False)] * 2


# ------------------------------------------------------------------------------ how blocks run

TRAINED = {"full": ["--dropout", 0.1], "two blocks": ["--trainable", "last:1,norms"],
           "LoRA": ["--lora-r", 2, "--lora-dropout", 0.2, "--trainable", "lora,last_block", "--dtype", "bf16"]}


@pytest.mark.parametrize("policy", TRAINED)
def test_recomputed_activations_give_the_same_bits_dropout_included(world, tmp_path, monkeypatch, policy):
    calls, true = [], finetune.checkpoint
    monkeypatch.setattr(finetune, "checkpoint", lambda *args, **options: (calls.append(args), true(*args, **options))[1])
    for name, flags in (("plain", []), ("again", ["--recompute"])):
        before = len(calls)
        assert run(world, tmp_path / name, *TRAINED[policy], "--epochs", 2, "--max-steps", 6, "--grad-accum", 2, "--no-responses", *flags) == 0
        assert (len(calls) > before) == bool(flags)
    assert losses(tmp_path / "plain") == losses(tmp_path / "again")
    plain, again = weights(tmp_path / "plain"), weights(tmp_path / "again")
    assert all(torch.equal(plain[n], again[n]) for n in plain)


def test_recomputation_keeps_less_for_the_backward_pass(model, idx):
    kept = []
    for again in (False, True):
        sizes = []
        model.run_block = functools.partial(finetune.checkpoint, model.run_block, use_reentrant=False) if again else model.run_block
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            model.features(idx).sum()
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_a_recomputed_run_may_go_on_without_it_and_the_other_way_round(world, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(world, tmp_path / "r", "--max-steps", 4, "--no-responses") == 143
    assert run(world, tmp_path / "r", "--max-steps", 4, "--no-responses", "--resume", "--recompute") == 0
    assert run(world, tmp_path / "whole", "--max-steps", 4, "--no-responses") == 0
    assert losses(tmp_path / "r") == losses(tmp_path / "whole")


def test_compiled_blocks_give_the_losses_of_plain_ones_and_keep_their_names(world, tmp_path, monkeypatch):
    """Traced, but run operation by operation: what this package brings, without half a minute of a C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    flags = ["--trainable", "last_block", "--max-steps", 3, "--eval-batches", 1, "--no-responses"]
    assert run(world, tmp_path / "plain", *flags) == 0
    assert run(world, tmp_path / "compiled", *flags, "--compile") == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "plain").keys()
    frozen = [json.loads((tmp_path / r / "run.json").read_text())["freeze"]["fingerprint"] for r in ("plain", "compiled")]
    assert frozen[0] == frozen[1]


@pytest.mark.parametrize("flags, message", [
    (["--compile"], "--compile: torch.compile does not work on this machine (no C++ compiler)"),
    (["--recompute", "--trainable", "head", "--untie-head"], "--recompute: under --trainable head the backward pass enters no block"),
])
def test_what_cannot_speed_a_run_up_is_refused_in_one_line(world, tmp_path, capsys, monkeypatch, flags, message):
    def broken(function, **options):
        raise RuntimeError("no C++ compiler\nSet TORCHDYNAMO_VERBOSE=1")
    monkeypatch.setattr(torch, "compile", broken)
    assert run(world, tmp_path / "r", *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not (tmp_path / "r").exists()


# ------------------------------------------------------------------------------ the frozen prefix

LAST = ["--trainable", "last_block", "--epochs", 4, "--max-steps", 20, "--no-responses"]


def counted(monkeypatch):
    """A list that grows with every group of records that the frozen blocks are run on."""
    calls, true = [], finetune.Prefix.compute
    monkeypatch.setattr(finetune.Prefix, "compute", lambda self, group: (calls.append(group), true(self, group)))
    return calls


def test_a_cached_prefix_is_computed_once_and_gives_the_bits_of_one_computed_each_time(world, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    assert run(world, tmp_path / "cached", *LAST, "--cache-prefix", "--dropout", 0.1) == 0
    assert len(calls) == 5 and len({id(e) for group in calls for e in group}) == sum(map(len, calls)) == 36
    true = finetune.Prefix.__call__
    monkeypatch.setattr(finetune.Prefix, "__call__", lambda self, batch: (self.kept.clear(), true(self, batch))[1])
    assert run(world, tmp_path / "anew", *LAST, "--cache-prefix", "--dropout", 0.1) == 0
    assert len(calls) > 25
    assert metrics_without_time(tmp_path / "cached") == metrics_without_time(tmp_path / "anew")
    cached, anew = weights(tmp_path / "cached"), weights(tmp_path / "anew")
    assert all(torch.equal(cached[n], anew[n]) for n in cached)


def metrics_without_time(out):
    return [{k: v for k, v in m.items() if k != "seconds"} for m in metrics(out)]


@pytest.mark.parametrize("flags, tolerance", [([], 1e-5), (["--dtype", "bf16", "--grad-accum", 2, "--batch-size", 4], 5e-3)])
def test_a_cached_prefix_gives_the_losses_of_a_plain_run(world, tmp_path, flags, tolerance):
    assert run(world, tmp_path / "plain", *LAST, *flags) == 0
    assert run(world, tmp_path / "cached", *LAST, *flags, "--cache-prefix") == 0
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=tolerance)
    val = [[m["val_loss"] for m in metrics(tmp_path / r) if m["val_loss"]] for r in ("cached", "plain")]
    assert val[0] == pytest.approx(val[1], rel=tolerance) and len(val[0]) > 2


def test_what_does_not_fit_into_memory_goes_to_a_file_that_leaves_no_trace(world, tmp_path, monkeypatch, capsys):
    flags = [*LAST, "--max-steps", 7, "--cache-prefix"]
    assert run(world, tmp_path / "memory", *flags) == 0
    assert "prefix   1 frozen blocks" in (out := capsys.readouterr().out) and "on the disk" not in out
    files, true = [], finetune.tempfile.TemporaryFile
    monkeypatch.setattr(finetune.tempfile, "TemporaryFile", lambda **options: (files.append(options["dir"]), true(**options))[1])
    monkeypatch.setattr(finetune, "PREFIX_BYTES", 100_000)  # of some 400,000
    assert run(world, tmp_path / "disk", *flags) == 0
    assert files == [tmp_path / "disk"] and "on the disk" in capsys.readouterr().out
    assert metrics_without_time(tmp_path / "memory") == metrics_without_time(tmp_path / "disk")
    assert {p.name for p in (tmp_path / "disk").iterdir()} == {p.name for p in (tmp_path / "memory").iterdir()}


@pytest.mark.parametrize("written", [0, None])
def test_a_disk_that_is_full_of_the_cache_ends_in_one_line(world, tmp_path, monkeypatch, capsys, written):
    class Full:
        def seek(self, *where):
            return 0

        def write(self, data):
            if written is None:
                raise OSError(28, "No space left on device")
            return written
    monkeypatch.setattr(finetune.tempfile, "TemporaryFile", lambda **options: Full())
    monkeypatch.setattr(finetune, "PREFIX_BYTES", 100_000)
    assert run(world, tmp_path / "r", *LAST, "--cache-prefix") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--cache-prefix" in error and "No space left" in error


def test_a_resumed_run_with_a_cached_prefix_gives_the_bits_of_an_undivided_one(world, tmp_path, monkeypatch):
    flags = [*LAST, "--max-steps", 7, "--cache-prefix"]
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert run(world, tmp_path / "r", *flags) == 143
    assert run(world, tmp_path / "r", *flags[:-1], "--resume") == 1  # other bits: another run
    assert run(world, tmp_path / "r", *flags, "--resume") == 0
    assert run(world, tmp_path / "whole", *flags) == 0
    resumed, whole = weights(tmp_path / "r"), weights(tmp_path / "whole")
    assert all(torch.equal(resumed[n], whole[n]) for n in whole)


@pytest.mark.parametrize("policy, epochs, layer", [
    ("last_block", 9, 2), ("blocks:1", 1, 1), ("last_block,head", 1, 2), ("head", 1, 3), ("gradual:1", 1, 2), ("gradual:1", 2, 1)])
def test_the_prefix_ends_below_the_lowest_block_that_trains_at_any_time(policy, epochs, layer):
    model = GPT(GPTConfig(vocab_size=31, block_size=16, n_layer=3, n_head=2, n_embd=8, tie_word_embeddings=False))
    args = finetune.parse_args(["--cache-prefix", "--trainable", policy, "--epochs", str(epochs), "--batch-size", "4"])
    data = finetune.Data([], [], [[]], [], [], {})
    assert finetune.prepare_prefix(args, model, freeze(model, policy), data, finetune.Machine(torch.device("cpu"))).layer == layer


@pytest.mark.parametrize("policy", ["all", "norms", "embeddings", "lisa:1@2", "gradual:1", "first:1", "lora"])
def test_without_a_block_that_stays_frozen_below_a_cached_prefix_is_refused(world, tmp_path, capsys, policy):
    flags = ["--lora-r", 2] if policy == "lora" else []
    assert run(world, tmp_path / "r", "--trainable", policy, *flags, "--epochs", 2, "--cache-prefix") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--cache-prefix: under --trainable {policy}" in error
    assert not (tmp_path / "r").exists()
