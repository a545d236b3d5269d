"""Which implementation of window attention runs, what it allocates, and its operators under the compiler."""

import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from window_case import Case

from impls import PORTABLE
from lineardit.kernels import focus  # noqa: F401  registers operators
from lineardit.kernels.window import Box, Circle, choose_impl, operator, tiled, windowed_attention
from lineardit.kernels.window import partial as partials
from lineardit.kernels.window.cached_bias import cached_bias, cached_window_bias, window_bias_op
from lineardit.kernels.window.partial import EFFICIENT, FLASH, PLAIN, fastest_partial
from lineardit.kernels.window.reference import window_mask
from lineardit.kernels.window.windows import to_arguments


def test_fastest_partial_is_flash_on_cpu():
    assert fastest_partial(torch.device("cpu"), torch.float32) is FLASH
    assert fastest_partial(torch.device("cpu"), torch.float64) is FLASH


@pytest.mark.parametrize("broken", ["raises", "wrong"])
def test_fastest_partial_falls_back_where_flash_does_not_work(broken, monkeypatch, caplog):
    def flash(query: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if broken == "raises":
            raise NotImplementedError("no kernel for this device")
        return query, query[..., 0]

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", flash)
    assert fastest_partial.__wrapped__(torch.device("cpu"), torch.float32) is PLAIN
    assert "slower public operations" in caplog.text


def test_fastest_partial_runs_its_trial_on_the_given_device(monkeypatch):
    tried = []
    monkeypatch.setattr(partials, "_agree", lambda *given: tried.append(given[-1]) or True)
    assert fastest_partial.__wrapped__(torch.device("cuda:1"), torch.bfloat16) is EFFICIENT
    assert tried == [torch.device("cuda:1")]


@pytest.mark.parametrize(
    "grid, window, text_len, expected",
    [
        ((24, 24), Circle(radius=2), 0, "masked"),
        ((25, 24), Circle(radius=2), 0, "tiled"),
        ((32, 32), Circle(radius=4), 64, "tiled"),
        ((48, 48), Circle(radius=32), 512, "masked"),
        ((65, 64), Circle(radius=64), 512, "tiled"),
        ((2, 12, 12), Circle(radius=12), 0, "masked"),
        ((2, 128, 128), Circle(radius=8), 512, "tiled"),
        ((8, 16, 16), Circle(radius=16), 0, "masked"),
        ((8, 16, 16), Circle(radius=16, frame_radius=8), 0, "masked"),
        ((8, 16, 16), Circle(radius=16, frame_radius=1), 0, "tiled"),
        ((8, 16, 16), Circle(radius=16, frame_radius=2), 0, "tiled"),
        ((3, 16, 16), Circle(radius=16, frame_radius=1), 0, "tiled"),
        ((3, 16, 16), Circle(radius=16, frame_radius=3), 0, "masked"),
        ((2, 16, 16), Circle(radius=16, frame_radius=1), 0, "masked"),
        ((16, 4, 4), Circle(radius=16, frame_radius=1), 0, "masked"),
        ((24, 24), Box(window=(3, 3)), 0, "masked"),
        ((25, 24), Box(window=(3, 3)), 0, "tiled"),
        ((32, 32), Box(window=(25, 25)), 0, "masked"),
        ((32, 32), Box(window=(25, 25), dilation=(2, 2)), 0, "tiled"),
        ((32, 32), Box(window=(3, 3), cell=(8, 8)), 0, "masked"),
        ((64, 64), Box(window=(3, 3), cell=(8, 8)), 0, "tiled"),
        ((8, 16, 16), Box(window=(15, 15)), 0, "masked"),
        ((8, 16, 16), Box(window=(15, 15), frame_radius=1), 0, "tiled"),
        ((65, 64), Box(window=(99, 99)), 0, "tiled"),
    ],
    ids=str,
)
def test_choose_impl_selects_masked_or_tiled_by_what_tiles_read(grid, window, text_len, expected):
    query = torch.empty(1, 1, 1, 1)
    assert choose_impl(query, grid=grid, window=window, text_len=text_len) == expected
    assert choose_impl(query.to("meta"), grid=grid, window=window, text_len=text_len) == "tiled"


@pytest.mark.parametrize("grid", [(5, 6), (23, 29)], ids=str)
def test_window_attention_auto_runs_the_choice_of_choose_impl(grid):
    case = Case(grid=grid, radius=3, text_len=2)
    tensors = case.tensors(torch.float32)
    chosen = choose_impl(tensors[0], grid=grid, window=Circle(radius=3), text_len=2)
    (other,) = {"masked", "tiled"} - {chosen}
    out = case.run(*tensors)
    assert torch.equal(out, case.run(*tensors, impl=chosen))
    assert not torch.equal(out, case.run(*tensors, impl=other))


class Allocations(TorchDispatchMode):
    """Sizes, in elements, of the tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.sizes += [
            tensor.numel() for tensor in (out if isinstance(out, tuple | list) else [out]) if isinstance(tensor, Tensor)
        ]
        return out


def allocations(case: Case, monkeypatch) -> list[int]:
    """Sizes allocated by a forward and a backward, including those inside the operators."""
    mode = Allocations()

    def recorded(function):
        def inner(*args):
            with mode:
                return function(*args)

        return inner

    with monkeypatch.context() as patch, mode:
        for name in ("tiled_forward", "tiled_backward"):
            patch.setattr(operator, name, recorded(getattr(operator, name)))
        tensors = [tensor.requires_grad_() for tensor in case.tensors(torch.float32)]
        case.run(*tensors, impl="tiled").sum().backward()
    return mode.sizes


@pytest.mark.parametrize("partial", [FLASH, PLAIN], ids=["flash", "plain"])
def test_window_attention_tiled_never_allocates_tokens_by_tokens(monkeypatch, partial):
    monkeypatch.setattr(tiled, "fastest_partial", lambda *_: partial)
    case = Case(grid=(61, 67), radius=4, text_len=5, num_heads=1, head_dim=4)
    sizes = allocations(case, monkeypatch)
    assert max(sizes) <= 150 * case.num_tokens  # logits of 15x15 windows in chunks; dense is 4092 * num_tokens


def test_window_attention_tiled_allocates_in_proportion_to_the_image(monkeypatch):
    small, large = (Case(grid=(side, 2 * side), radius=4, num_heads=1, head_dim=4) for side in (32, 64))
    assert sum(allocations(large, monkeypatch)) <= 4.2 * sum(allocations(small, monkeypatch))


@pytest.mark.parametrize(
    "case",
    [
        Case(grid=(9, 40), radius=3, text_len=4, masked=True),
        Case(grid=(2, 2, 3), radius=2, frame_radius=1, text_len=3, num_heads=1),
        Case(grid=(3, 5), box=Box(window=(3, 1), dilation=(1, 2)), text_len=3, num_heads=1),
    ],
    ids=str,
)
def test_operators_pass_opcheck(case):
    tensors = case.tensors(torch.float32)
    text, image = (
        [tensor[:, :, part].detach().requires_grad_() for tensor in tensors]
        for part in (slice(case.text_len), case.image)
    )
    radius, *others = to_arguments(case.window)
    arguments = (text[0], True, *image, *text[1:], case.text_mask(), case.grid, radius, 0.5, "tiled", *others)
    torch.library.opcheck(operator.window_attention_op, arguments)
    torch.library.opcheck(window_bias_op, (torch.zeros(1), case.grid, radius, 4, True, *others))


def test_window_bias_op_never_returns_the_cached_bias():
    window_bias_op(torch.zeros(1), (3, 5), 2.0, 4, True).fill_(1)
    window = Circle(radius=2.0)
    kept = cached_window_bias(torch.zeros(1), (3, 5), window, 4, True)
    assert torch.equal(kept == 0, window_mask((3, 5), window, 4, True, torch.device("cpu")))
    assert kept[kept != 0].eq(-torch.inf).all()


@pytest.mark.parametrize(
    "name",
    [
        "window_attention",
        "window_attention_backward",
        "window_bias",
        "log_rest",
        "focus_attention",
        "focus_attention_backward",
    ],
)
def test_operators_that_keep_tables_are_not_recorded_in_cuda_graphs(name):
    tags = getattr(torch.ops.lineardit, name).default.tags
    assert torch.Tag.cudagraph_unsafe in tags and torch.Tag.pt2_compliant_tag in tags


def test_cached_window_bias_keeps_fake_and_real_tensors_apart():
    arguments = ((4, 5), Circle(radius=2.25), 3, False)
    for first_fake in (True, False):
        cached_bias.cache_clear()
        for fake in (first_fake, not first_fake):
            with FakeTensorMode() if fake else nullcontext():
                assert isinstance(cached_window_bias(torch.zeros(1), *arguments), FakeTensor) == fake


CIRCLE = Circle(radius=3), [(5, 30), (7, 20), (40, 3), (13, 14)]
FRAMES = Circle(radius=3, frame_radius=2), [(3, 5, 8), (4, 7, 6), (2, 9, 3), (5, 4, 11)]
BOX = Box(window=(3, 5), dilation=(2, 1), cell=(1, 2)), [(5, 8), (7, 6), (9, 3), (4, 11)]
COMPILED = [("auto", CIRCLE), ("masked", FRAMES), ("tiled", FRAMES), *itertools.product(PORTABLE, (CIRCLE, BOX))]


@pytest.mark.parametrize(("impl", "window_and_grids"), COMPILED, ids=str)
def test_windowed_attention_adds_no_graph_after_the_second_grid(impl, window_and_grids):
    counter = CompileCounterWithBackend("aot_eager")
    project = torch.nn.Linear(16, 48)
    window, grids = window_and_grids

    def block(tokens: Tensor, grid: Tensor) -> Tensor:
        query, key, value = project(tokens).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        # The shape of a tensor is symbolic to the compiler from the second size on.
        out = windowed_attention(query, key, value, grid=tuple(grid.shape), window=window, text_len=4, impl=impl)
        return tokens + out.transpose(1, 2).flatten(2)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for expected_graphs, grid in zip((1, 1, 2, 2, 2), (grids[0], *grids), strict=True):
        tokens = torch.randn(1, 4 + math.prod(grid), 16, requires_grad=True)
        results = [function(tokens, torch.empty(grid, device="meta")) for function in (block, compiled)]
        grads = [torch.autograd.grad(out.square().sum(), tokens)[0] for out in results]
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(grads[1], grads[0])
        assert counter.frame_count == expected_graphs
