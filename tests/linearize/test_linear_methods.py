"""Agent, Mala and Rala against their formulas in float64, their settings, and their operators on the grid."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d, conv2d, grid_sample
from torch.utils.flop_counter import FlopCounterMode

from lineardit.kernels.agent import agent_attention_reference
from lineardit.kernels.agent.agent_bias import agent_bias
from lineardit.kernels.linear import log_mass_reference, mala_attention_reference, rala_attention_reference
from lineardit.kernels.pieces.cell_means import cell_means
from lineardit.kernels.pieces.cells import cell_grid
from lineardit.linearize.layout import Layout
from lineardit.linearize.methods import METHODS, Agent, Mala, Rala
from lineardit.linearize.methods.local_terms import conv_tokens

GRID, TEXT_LEN, SCALE = (3, 5), 4, 0.6
CONFIGS = [
    Mala(conv_size=3, gate=True, balance=True),
    Rala(conv_size=5, gate=True, balance=True),
    Agent(num_agents=4, conv_size=3, bias_size=5, second_scale_exponent=0.3, shortcut=0.1, balance=True),
]


def randomized(config: Any) -> Any:
    """The attention module for 2 heads of 8 in float64, with random parameters."""
    kernel = METHODS[type(config)](config, num_heads=2, head_dim=8).double()
    for parameter in kernel.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return kernel


def image_by_hand(kernel: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention among the image tokens, [B, 2, 15, 8], from the formula."""
    config = kernel.config
    if isinstance(config, Agent):
        agents = adaptive_avg_pool3d(_picture(query), cell_grid(1, *GRID, 4)).flatten(2).unflatten(1, (2, 8)).mT
        biases = {"key_bias": _bias_by_hand(kernel.key_bias), "query_bias": _bias_by_hand(kernel.query_bias).mT}
        scales = {"scale": SCALE, "second_scale": SCALE**0.3, "shortcut": 0.1}
        out = agent_attention_reference(query, key, value, agents, **scales, **biases)
    else:
        out = (mala_attention_reference if isinstance(config, Mala) else rala_attention_reference)(query, key, value)
    neighbours = conv2d(_picture(value)[:, :, 0], kernel.conv.weight, padding="same", groups=16)
    out = out + neighbours.flatten(2).unflatten(1, (2, 8)).mT
    if isinstance(config, Agent):
        return out
    factors = torch.einsum("bhnd,hde->bhne", value, kernel.gate.weight) + kernel.gate.bias
    return out * 2 / (1 + torch.exp(-factors))


def _picture(tokens: Tensor) -> Tensor:
    """[B, 2, 15, 8] -> [B, 16, 1, 3, 5]."""
    return tokens.mT.reshape(-1, 16, 1, *GRID)


def _bias_by_hand(table: Tensor) -> Tensor:
    """[2, R, R] -> [2, A, n] by PyTorch's own bilinear sampling."""
    _, rows, columns = cell_grid(1, *GRID, 4)
    out = []
    for agent in range(4):
        row, column = divmod(agent, columns)
        dy = (torch.arange(GRID[0]).double() + 0.5) / GRID[0] - (row + 0.5) / rows
        dx = (torch.arange(GRID[1]).double() + 0.5) / GRID[1] - (column + 0.5) / columns
        places = torch.stack(torch.meshgrid(dy, dx, indexing="ij")[::-1], -1)[None]
        out.append(grid_sample(table[None], places, align_corners=True)[0].flatten(1))
    return torch.stack(out, 1)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_joint_attention_matches_the_formula(config: Any, text_first: bool) -> None:
    kernel = randomized(config)
    text, image = ([torch.randn(2, 2, count, 8, dtype=torch.float64) for _ in range(3)] for count in (TEXT_LEN, 15))
    mask = torch.tensor([[True, True, False, True], [False] * 4])
    inputs = [torch.cat((a, b) if text_first else (b, a), 2) for a, b in zip(text, image, strict=True)]
    out = kernel(*inputs, Layout(GRID, TEXT_LEN, text_first, mask), scale=SCALE)

    query, key, value = image
    mass = log_mass_reference(query, key, scale=SCALE) + kernel.balance[:, None]
    logits = (query @ text[1].mT * SCALE).masked_fill(~mask[:, None, None], -torch.inf)
    weights = torch.cat([logits, mass[..., None]], -1).softmax(-1)
    image_out = weights[..., :-1] @ text[2] + weights[..., -1:] * image_by_hand(kernel, *image)
    logits = torch.cat(
        [(text[0] @ text[1].mT * SCALE).masked_fill(~mask[:, None, None], -torch.inf), text[0] @ key.mT * SCALE], -1
    )
    text_out = logits.softmax(-1) @ torch.cat([text[2], value], 2)
    expected = torch.cat((text_out, image_out) if text_first else (image_out, text_out), 2)
    assert torch.allclose(out, expected, atol=1e-8)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_attention_without_text_is_the_image_part_alone(config: Any) -> None:
    kernel = randomized(config)
    image = [torch.randn(2, 2, 15, 8, dtype=torch.float64) for _ in range(3)]
    out = kernel(*image, Layout(GRID, 0, True, None), scale=SCALE)
    assert torch.allclose(out, image_by_hand(kernel, *image), atol=1e-8)


@pytest.mark.parametrize(
    ("sides", "num_agents", "expected"),
    [
        ((1, 64, 64), 64, (1, 8, 8)),
        ((1, 64, 256), 64, (1, 4, 16)),
        ((1, 5, 7), 6, (1, 2, 3)),
        ((1, 1, 5), 4, (1, 1, 4)),
        ((1, 8, 8), 7, (1, 1, 7)),
        ((16, 16, 16), 64, (4, 4, 4)),
        ((2, 32, 32), 64, (1, 8, 8)),
    ],
)
def test_cell_grid_makes_cells_close_to_cubes(
    sides: tuple[int, ...], num_agents: int, expected: tuple[int, ...]
) -> None:
    assert cell_grid(*sides, num_agents) == expected


@pytest.mark.parametrize(("grid", "num_agents"), [((3, 5), 4), ((2, 2), 9), ((4, 3, 5), 24), ((7, 1), 3)])
def test_cell_means_match_adaptive_pooling(grid: tuple[int, ...], num_agents: int) -> None:
    frames, height, width = (1, *grid)[-3:]
    tokens = torch.randn(2, 3, frames * height * width, 4, dtype=torch.float64, requires_grad=True)
    pooled = cell_means(tokens, height, width, num_agents)
    picture = tokens.mT.reshape(6, 4, frames, height, width)
    expected = adaptive_avg_pool3d(picture, cell_grid(frames, height, width, num_agents))
    assert torch.allclose(pooled, expected.flatten(2).mT.unflatten(0, (2, 3)))
    assert torch.autograd.gradcheck(lambda x: cell_means(x, height, width, num_agents), tokens, fast_mode=True)


def test_agent_bias_is_the_same_in_every_frame() -> None:
    table = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    assert cell_grid(2, 3, 5, 4)[0] == 1
    bias = agent_bias(table, 30, 3, 5, 4)
    assert torch.allclose(bias, _bias_by_hand(table).repeat(1, 1, 2))
    assert torch.autograd.gradcheck(lambda x: agent_bias(x, 30, 3, 5, 4), table, fast_mode=True)


def test_conv_tokens_stays_within_each_frame() -> None:
    tokens = torch.randn(1, 2, 30, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    out = conv_tokens(tokens, weight, 3, 5)
    alone = [conv_tokens(frame, weight, 3, 5) for frame in tokens.split(15, 2)]
    assert torch.allclose(out, torch.cat(alone, 2))
    assert torch.autograd.gradcheck(lambda *x: conv_tokens(*x, 3, 5), (tokens, weight), fast_mode=True)


def test_grid_operators_pass_opcheck() -> None:
    tokens = torch.randn(1, 2, 30, 4, requires_grad=True)
    torch.library.opcheck(cell_means, (tokens, 3, 5, 4))
    torch.library.opcheck(agent_bias, (torch.randn(2, 5, 5, requires_grad=True), 30, 3, 5, 4))
    torch.library.opcheck(conv_tokens, (tokens, torch.randn(8, 1, 3, 3, requires_grad=True), 3, 5))


@pytest.mark.parametrize("config", [Mala(gate=True), Rala(), Agent(num_agents=6)], ids=str)
def test_pairs_match_the_pytorch_flop_counter(config: Any) -> None:
    """Compared on the image part in PyTorch's own operators, which the counter knows."""
    num_heads, head_dim, num_tokens = 2, 8, 35
    kernel = METHODS[type(config)](config, num_heads=num_heads, head_dim=head_dim)
    image = torch.randn(1, num_heads, num_tokens, head_dim)
    with FlopCounterMode(display=False) as counter:
        if isinstance(config, Agent):
            kernel.impl = "reference"
            kernel(image, image, image, Layout((5, 7), 0, True))
        else:
            state = image.mT @ image
            _ = image @ state
            if kernel.gate is not None:
                kernel.gate(image)
    pairs = kernel.pairs(config, (5, 7), 0, num_heads=num_heads, head_dim=head_dim)
    assert 4 * pairs * num_heads * head_dim == counter.get_total_flops()
    with_text = kernel.pairs(config, (5, 7), 3, num_heads=num_heads, head_dim=head_dim)
    assert with_text == pairs + 35 * (3 + head_dim) + 3 * 38


@pytest.mark.parametrize(
    ("method", "entries", "message"),
    [
        (Mala, {"conv_size": 4}, "conv_size must be an odd integer >= 3 or None, got 4"),
        (Rala, {"conv_size": 1}, "conv_size must be an odd integer"),
        (Mala, {"gate": 1}, "gate must be true or false, got 1"),
        (Rala, {"balance": "yes"}, "balance must be true or false"),
        (Agent, {"num_agents": 0}, "num_agents must be an integer >= 1, got 0"),
        (Agent, {"num_agents": True}, "num_agents must be"),
        (Agent, {"num_agents": 4, "bias_size": 2}, "bias_size must be an odd integer"),
        (Agent, {"num_agents": 4, "shortcut": -1}, "shortcut must be a finite number >= 0"),
        (Agent, {"num_agents": 4, "second_scale_exponent": float("nan")}, "second_scale_exponent must be a finite"),
    ],
)
def test_configs_refuse_invalid_settings(method: Any, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**entries)
