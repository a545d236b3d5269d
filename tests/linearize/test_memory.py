"""Memory of a hybrid: tables kept between calls, and copies of the image within a call."""

import copy
import gc
from typing import Any

import pytest
import torch

from lineardit.kernels.pieces import table_cache
from lineardit.linearize import linearize_, restore_
from lineardit.linearize.layout import Layout
from lineardit.linearize.measures.live_bytes import LiveBytes
from lineardit.linearize.methods import METHODS, Clear, Hybrid, ProxyTokens, Rala
from tiny_models import build, inputs_of, run

LOCAL = Clear(radius=2)


@pytest.mark.parametrize("focus_tokens", [0, 30])
def test_restore_frees_the_cached_tables(focus_tokens: int) -> None:
    proxies = ProxyTokens(num_proxies=4)
    model = build("flux", num_layers=1)
    linearize_(model, Hybrid(local=Clear(radius=2), global_=proxies, focus_tokens=focus_tokens), impl="tiled")
    run(model, inputs_of("flux", grid=(6, 7)))
    assert _num_tables() >= 2
    restore_(model)
    assert _num_tables() == 0


def test_tables_are_freed_with_the_last_converted_model() -> None:
    method = Hybrid(local=Clear(radius=2), global_=ProxyTokens(num_proxies=4), focus_tokens=30)
    models = [build("flux", num_layers=1) for _ in range(2)]
    for model in models:
        linearize_(model, method, impl="tiled")
    models.append(copy.deepcopy(models[0]))
    run(models[0], inputs_of("flux", grid=(6, 7)))
    del model
    while models:
        assert _num_tables() >= 2
        del models[0]
        gc.collect()
    assert _num_tables() == 0


def _num_tables() -> int:
    return sum(cached.cache_info().currsize for cached in table_cache._CACHES)


@pytest.mark.parametrize("text_len", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("global_", "focus_tokens"), [(ProxyTokens(num_proxies=4), 0), (ProxyTokens(num_proxies=4), 50), (Rala(), 0)]
)
def test_output_is_the_same_without_gradients(
    global_: Any, focus_tokens: int, dtype: torch.dtype, text_len: int
) -> None:
    kernel, inputs, layout = _case(Hybrid(local=LOCAL, global_=global_, gate=0.7, focus_tokens=focus_tokens), text_len)
    inputs = [x.to(dtype) for x in inputs]
    expected, before = kernel(*inputs, layout), [x.clone() for x in inputs]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(kernel(*inputs, layout), expected)
    assert all(map(torch.equal, inputs, before))


def test_hybrid_without_gradients_holds_two_copies_besides_its_inputs() -> None:
    """The outputs of window and focus, mixed in place into one of them."""
    config = Hybrid(local=LOCAL, global_=ProxyTokens(num_proxies=4), gate=0.7, focus_tokens=50)
    kernel, inputs, layout = _case(config, text_len=3)
    with torch.no_grad(), LiveBytes(kernel) as live:
        kernel(*inputs, layout)
    assert live.peak < (3 + 2.5) * inputs[0].nbytes


def _case(config: Hybrid, text_len: int) -> tuple[Any, list[torch.Tensor], Layout]:
    """A kernel, and its arguments for 12 x 14 image tokens."""
    kernel = METHODS[Hybrid](config, num_heads=2, head_dim=32)
    kernel.impl = "tiled"
    return kernel, [torch.randn(2, 2, text_len + 168, 32) for _ in range(3)], Layout((12, 14), text_len, True, None)
