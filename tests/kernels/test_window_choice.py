"""Which implementation of window attention runs, what it allocates, and its operators under the compiler."""

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
from lineardit.kernels.window import (
    Circle,
    choose_impl,
    operator,
    tiled,
    window_attention,
)
from lineardit.kernels.window.kept_bias import kept_bias, kept_window_bias, window_bias_op
from lineardit.kernels.window.partial import FLASH, PLAIN, fastest_partial
from lineardit.kernels.window.reference import window_mask


def test_fastest_partial_is_flash_on_this_cpu():
    assert fastest_partial("cpu", torch.float32) is FLASH
    assert fastest_partial("cpu", torch.float64) is FLASH


@pytest.mark.parametrize("broken", ["raises", "wrong"])
def test_fastest_partial_falls_back_where_flash_does_not_work(broken, monkeypatch, caplog):
    def flash(query: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if broken == "raises":
            raise NotImplementedError("no kernel for this device")
        return query, query[..., 0]

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", flash)
    assert fastest_partial.__wrapped__("cpu", torch.float32) is PLAIN
    assert "slower public operations" in caplog.text


@pytest.mark.parametrize(
    "grid, radius, text_len, expected",
    [
        ((24, 24), 2, 0, "masked"),
        ((25, 24), 2, 0, "tiled"),
        ((32, 32), 4, 64, "tiled"),
        ((48, 48), 32, 512, "masked"),
        ((65, 64), 64, 512, "tiled"),
        ((2, 12, 12), 12, 0, "masked"),
        ((2, 128, 128), 8, 512, "tiled"),
    ],
)
def test_choose_impl_follows_its_cascade(grid, radius, text_len, expected):
    query = torch.empty(1, 1, 1, 1)
    window = Circle(radius=radius)
    assert choose_impl(query, grid=grid, window=window, text_len=text_len) == expected
    assert choose_impl(query.to("meta"), grid=grid, window=window, text_len=text_len) == "tiled"


@pytest.mark.parametrize("grid", [(5, 6), (23, 29)], ids=str)
def test_window_attention_auto_runs_what_choose_impl_tells(grid):
    case = Case(grid=grid, radius=3, text_len=2)
    tensors = case.tensors(torch.float32)
    chosen = choose_impl(tensors[0], grid=grid, window=Circle(radius=3), text_len=2)
    (other,) = {"masked", "tiled"} - {chosen}
    out = case.run(window_attention, *tensors)
    assert torch.equal(out, case.run(window_attention, *tensors, impl=chosen))
    assert not torch.equal(out, case.run(window_attention, *tensors, impl=other))


class Allocations(TorchDispatchMode):
    """Sizes, in elements, of what operations return."""

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
    """Of a forward and a backward, inside of the operators too."""
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
        case.run(window_attention, *tensors, impl="tiled").sum().backward()
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


def test_window_attention_op_passes_opcheck():
    case = Case(grid=(9, 40), radius=3, text_len=4, masked=True)
    tensors = case.tensors(torch.float32)
    text, image = zip(*(tensor.split([4, 360], dim=2) for tensor in tensors), strict=True)
    text_out, shared_key, shared_value = (tensor.detach().requires_grad_() for tensor in text)
    image = [tensor.detach().requires_grad_() for tensor in image]
    arguments = (text_out, True, *image, shared_key, shared_value, case.text_mask(), case.grid, 3.0, 0.5, "tiled")
    torch.library.opcheck(operator.window_attention_op, arguments)


def test_window_bias_op_passes_opcheck_and_is_never_shared():
    arguments = (torch.zeros(1), (3, 5), 2.0, 4, True)
    torch.library.opcheck(window_bias_op, arguments)
    window_bias_op(*arguments).fill_(1)
    window = Circle(radius=2.0)
    kept = kept_window_bias(torch.zeros(1), (3, 5), window, 4, True)
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


def test_kept_window_bias_of_fake_tensors_is_none_of_real_ones():
    arguments = ((4, 5), Circle(radius=2.25), 3, False)
    for first_fake in (True, False):
        kept_bias.cache_clear()
        for fake in (first_fake, not first_fake):
            with FakeTensorMode() if fake else nullcontext():
                assert isinstance(kept_window_bias(torch.zeros(1), *arguments), FakeTensor) == fake


@pytest.mark.parametrize("impl", ["auto", *PORTABLE])
def test_window_attention_compiles_once_for_all_grids(impl):
    counter = CompileCounterWithBackend("aot_eager")
    project = torch.nn.Linear(16, 48)

    def block(tokens: Tensor, grid: Tensor) -> Tensor:
        query, key, value = project(tokens).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        # The shape of a tensor is symbolic to the compiler from the second size on.
        out = window_attention(query, key, value, grid=tuple(grid.shape), radius=3, text_len=4, impl=impl)
        return tokens + out.transpose(1, 2).flatten(2)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for expected_graphs, grid in [(1, (5, 30)), (1, (5, 30)), (2, (7, 20)), (2, (40, 3)), (2, (13, 14))]:
        tokens = torch.randn(1, 4 + math.prod(grid), 16, requires_grad=True)
        results = [function(tokens, torch.empty(grid, device="meta")) for function in (block, compiled)]
        grads = [torch.autograd.grad(out.square().sum(), tokens)[0] for out in results]
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(grads[1], grads[0])
        assert counter.frame_count == expected_graphs
