"""What saves time or memory gives the same result as the plain way."""

import ctypes
import platform

import pytest
import torch

import finetune
from gpt import GPT, GPTConfig


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
    assert torch.equal(model.features(idx, None, wanted, hidden, first), model.features(idx, None, wanted))


# ------------------------------------------------------------------------------ memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_glibc_accepts_to_keep_what_is_freed(monkeypatch):
    libc, calls = ctypes.CDLL(None), []
    libc.mallopt = lambda option, value, true=libc.mallopt: calls.append((option, true(option, value)))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    finetune.keep_memory()
    assert calls == [(-3, 1), (-1, 1)]  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, 1: done


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_without_glibc_memory_is_left_as_it_is(monkeypatch, error):
    def refuse(name):
        raise error
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    finetune.keep_memory()
