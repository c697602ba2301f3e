"""What saves time or memory gives the same result as the plain way."""

import pytest
import torch

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
