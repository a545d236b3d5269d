"""Attention through proxy tokens against its formula written out in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from lineardit.kernels.linear import log_mass_reference
from lineardit.linearize.layout import Layout
from lineardit.linearize.methods import ProxyTokens
from lineardit.linearize.methods.proxy_tokens import ProxyTokensAttention

GRID, SCALE = (3, 5), 0.6


def image_by_hand(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """The formula for [B, 2, 15, 8], head by head; 4 proxies are 2 x 2 cells of the 3 x 5 grid."""
    outs = []
    for head in range(2):
        q, k, v = (x[:, head] for x in (query, key, value))  # [B, 15, 8]
        means = [adaptive_avg_pool2d(x.mT.unflatten(2, GRID), (2, 2)).flatten(2).mT for x in (q, k, v)]  # [B, 4, 8]
        attended = (means[0] @ means[1].mT * SCALE).softmax(-1) @ means[2]
        values = (1 - gate[head]) * means[2] + gate[head] * attended
        outs.append((q @ means[1].mT * SCALE).softmax(-1) @ values)
    return torch.stack(outs, 1)


@pytest.mark.parametrize("text_first", [True, False])
def test_proxy_tokens_match_the_formula(text_first: bool) -> None:
    kernel = ProxyTokensAttention(ProxyTokens(num_proxies=4, balance=True), num_heads=2, head_dim=8).double()
    for parameter in kernel.parameters():
        torch.nn.init.normal_(parameter)
    text, image = ([torch.randn(2, 2, count, 8, dtype=torch.float64) for _ in range(3)] for count in (4, 15))
    mask = torch.tensor([[True, True, False, True], [False] * 4])
    inputs = [torch.cat((a, b) if text_first else (b, a), 2) for a, b in zip(text, image, strict=True)]
    out = kernel(*inputs, Layout(GRID, 4, text_first, mask), scale=SCALE)

    mass = log_mass_reference(image[0], image[1], scale=SCALE) + kernel.balance[:, None]
    logits = (image[0] @ text[1].mT * SCALE).masked_fill(~mask[:, None, None], -torch.inf)
    weights = torch.cat([logits, mass[..., None]], -1).softmax(-1)
    expected = weights[..., :-1] @ text[2] + weights[..., -1:] * image_by_hand(*image, kernel.gate)
    assert torch.allclose(out[:, :, 4:] if text_first else out[:, :, :15], expected, atol=1e-8)


def test_one_proxy_per_token_starts_as_softmax_attention() -> None:
    kernel = ProxyTokensAttention(ProxyTokens(num_proxies=15), num_heads=2, head_dim=8)
    inputs = [torch.randn(2, 2, 15, 8) for _ in range(3)]
    out = kernel(*inputs, Layout(GRID, 0, True), scale=SCALE)
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs, scale=SCALE)
    assert torch.allclose(out, expected, atol=1e-6)


def test_pairs_sum_both_attentions() -> None:
    kernel = ProxyTokensAttention(ProxyTokens(num_proxies=4), num_heads=2, head_dim=8)
    assert kernel.pairs(kernel.config, (3, 5), 0, num_heads=2, head_dim=8) == 4 * 4 + 15 * 4
    assert kernel.pairs(kernel.config, (3, 5), 3, num_heads=2, head_dim=8) == 76 + 15 * (3 + 8) + 3 * 18


@pytest.mark.parametrize("number", [0, True, 2.0, None])
def test_proxy_tokens_refuse_an_invalid_num_proxies(number: object) -> None:
    with pytest.raises(ValueError, match="num_proxies must be an integer >= 1, got"):
        ProxyTokens(num_proxies=number)  # type: ignore[arg-type]
