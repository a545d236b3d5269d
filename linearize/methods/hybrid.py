"""A hybrid: softmax over text and a window, and a global branch of linear cost for the rest of the image.

    text query i    softmax over every token, once, in the local branch
    image query i   out_i = L_i + g s_i (G_i - L_i)

    L   the local branch: softmax over all text and a window of the image
    G   the global branch: attention to the image alone, through agents, proxies or a state
    g   learned for each head, starts at `gate`; at 0 the hybrid is its local branch, bit for bit

    join="mass"     s_i = M_i / (M_i + sum_j exp(scale q_i . k_j)),   j in text or window
                    M_i = exp(b) sum_c r_ic exp(scale q_i . k_c),   k_c the mean key of a cell of the image,
                                                                    r_ic its number of tokens outside i's window
    join="gate"     s_i = 1

Softmax over everything has this form: L over text and window, G over the rest of the image, s_i the rest's share of the
denominator, and g = 1. So "mass" weighs the two branches as the base does, as far as linear cost allows: M_i estimates
the rest's part of the denominator from C = `mass_cells` cells of the image (rest_of_cells.py in kernels/focus), too low
because means smooth. b, learned for each head, starts at 0. With "gate", text loses the weight that G gains, since G
sees no text. "mass" is the default: with g = 1 it is by far closer to the base before training, and at g = 0 both are
the local branch.

If the cells are G's own proxies, G attends to them with these weights as well, and (1 - s) L + s G is one softmax over
text, window, and proxies that stand for their cells' tokens outside the window. With a proxy for every token, that is
softmax over everything. With `focus_tokens`, the cells with the largest weights contribute their own tokens to that
softmax instead of their proxies (attention.py there). Other global branches, and proxies with other `mass_cells`, see
the whole image.

If the window covers the image there is no rest, and the hybrid is the base's attention.

`Clear(pool_tokens=...)` differs: one softmax over window and pooled tokens, where a cell weighs as much as one token.

Related: SLA (arXiv:2509.24006) uses softmax for large weights and linear attention for others, and adds the two, with a
learned projection instead of g s. L2ViT (arXiv:2501.16182) alternates layers of linear and window attention, as a
mapping of patterns can here. UltraGen (arXiv:2510.16325) has windows and, for global context, a low-resolution copy of
the picture.

B batch, H heads, N tokens, n of them of the image, D head dimension.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.focus import cells_in_focus, choose_impl, focus_attention, focus_pairs, log_rest
from ...kernels.pieces.cell_means import cell_means
from ...kernels.pieces.extra_key import attend_with_extra_key, share_of_keys
from ...kernels.pieces.text import split_text
from ..layout import Grid, Layout
from .agent import Agent, AgentAttention
from .clear import Clear, ClearAttention
from .field_checks import check_count, check_finite
from .hybrid_advice import focus_advice, proxy_advice, warn_once
from .mala import Mala, MalaAttention
from .method import Method
from .neighborhood import Neighborhood
from .proxy_tokens import ProxyTokens, ProxyTokensAttention
from .rala import Rala, RalaAttention
from .sliding_tile import SlidingTile
from .windows import WindowAttention

# A local branch has `attend_and_lse`, a global one `attend_to_image`.
LOCAL: dict[type, type[Any]] = {Clear: ClearAttention, Neighborhood: WindowAttention, SlidingTile: WindowAttention}
GLOBAL: dict[type, type[Any]] = {
    Agent: AgentAttention,
    Mala: MalaAttention,
    Rala: RalaAttention,
    ProxyTokens: ProxyTokensAttention,
}
JOINS = ("mass", "gate")
STATE_CELLS = 64  # cells that weigh a state, which has no keys


@dataclass(frozen=True, kw_only=True)
class Hybrid:
    """Config of a hybrid.

    Attributes:
        local: Config of the window: `Clear` without pooling, `Neighborhood` or `SlidingTile`.
        global_: Config of the global branch: `Agent`, `Mala`, `Rala` or `ProxyTokens`; "global" in files and commands.
        join: How the branches are weighted: "mass", by their shares of softmax, or "gate", by the gate only.
        gate: Initial value of g for every head. 0: the local branch only; 1: the full share of the global branch, which
            is closer to the base before training.
        mass_cells: Number of cells that estimate the share for join="mass", at any image size; None: the number of
            proxies or agents of the global branch, or 64 for a state.
        focus_tokens: Number of tokens outside the window that each query attends to individually, those of the cells
            with the largest weights (kernels/focus/attention.py); 0: none. Cells are read whole: if the image is so
            large that one cell holds more tokens, none is read.
        focus_side: Side in tokens of the tiles of queries that choose cells together; smaller is closer to the base
            and slower.
    """

    local: Any = field(metadata={"of_method": True})
    global_: Any = field(metadata={"of_method": True})
    join: str = "mass"
    gate: float = 0.0
    mass_cells: int | None = None
    focus_tokens: int = 0
    focus_side: int = 4

    def __post_init__(self) -> None:
        _check_branch("local", self.local, LOCAL)
        _check_branch("global", self.global_, GLOBAL)
        if isinstance(self.local, Clear) and (self.local.pool_size is not None or self.local.pool_tokens is not None):
            raise ValueError(f"local must have no pooled tokens, which the global branch replaces, got {self.local}")
        if self.global_.balance:
            raise ValueError(f"global must not have balance, since the hybrid has a gate, got {self.global_}")
        if self.join not in JOINS:
            raise ValueError(f"join must be one of {', '.join(JOINS)}, got {self.join!r}")
        check_finite("gate", self.gate)
        check_count("mass_cells", self.mass_cells, optional=True)
        check_count("focus_tokens", self.focus_tokens, least=0)
        check_count("focus_side", self.focus_side)
        if self.focus_tokens > 0 and not self.is_one_softmax:
            raise ValueError(
                "focus_tokens must be 0 unless join is 'mass', global is ProxyTokens, and mass_cells is None or "
                f"num_proxies, got {self}"
            )

    @property
    def num_cells(self) -> int:
        """C above."""
        if self.mass_cells is not None:
            return self.mass_cells
        match self.global_:
            case ProxyTokens(num_proxies=count) | Agent(num_agents=count):
                return count
        return STATE_CELLS

    @property
    def is_one_softmax(self) -> bool:
        """Whether the cells are the global branch's own proxies."""
        return self.join == "mass" and type(self.global_) is ProxyTokens and self.global_.num_proxies == self.num_cells


def _check_branch(name: str, config: object, allowed: dict[type, type[Any]]) -> None:
    if type(config) not in allowed:
        names = ", ".join(cls.__name__ for cls in allowed)
        raise ValueError(f"{name} must be a config of {names}, got {config!r}")


class HybridAttention(Method):
    """A hybrid as the kernel of one attention module; `gate` [H] is g and, for join="mass", `balance` [H] is b."""

    def __init__(self, config: Hybrid, *, num_heads: int, head_dim: int) -> None:
        super().__init__(config, num_heads=num_heads, head_dim=head_dim)
        shape = {"num_heads": num_heads, "head_dim": head_dim}
        self.local = LOCAL[type(config.local)](config.local, **shape)
        self.global_ = GLOBAL[type(config.global_)](config.global_, **shape)
        self.gate = nn.Parameter(torch.full((num_heads,), float(config.gate)))
        self.balance = nn.Parameter(torch.zeros(num_heads)) if config.join == "mass" else None

    @property
    def impl(self) -> str:
        """That of the local branch; the global branch runs the one of the same name, or "auto" if it has none."""
        return self.local.impl

    @impl.setter
    def impl(self, name: str) -> None:
        self.local.impl = name
        self.global_.impl = name if name in self.global_.implementations() else "auto"

    @staticmethod
    def implementations() -> tuple[str, ...]:
        """Names that `impl` may take, those of windows."""
        return WindowAttention.implementations()

    @staticmethod
    def auto_impl(config: Hybrid, query: Tensor, grid: Grid, text_len: int) -> str:
        """What impl="auto" runs for a query [B, H, N, D]: "tiled", or "tiled (focus: plain)"."""
        window_impl = LOCAL[type(config.local)].auto_impl(config.local, query, grid, text_len)
        if config.focus_tokens == 0 or cells_in_focus(config.focus_tokens, config.num_cells, grid) == 0:
            return window_impl
        return f"{window_impl} (focus: {choose_impl(query, config.focus_side, 'auto')})"

    @staticmethod
    def pairs(config: Hybrid, grid: Grid, text_len: int, *, num_heads: int, head_dim: int) -> int:
        """Cost of both branches, text once, and of the cells that weigh them unless these are the proxies."""
        shape = {"num_heads": num_heads, "head_dim": head_dim}
        local_pairs = LOCAL[type(config.local)].pairs(config.local, grid, text_len, **shape)
        global_pairs = GLOBAL[type(config.global_)].pairs(config.global_, grid, 0, **shape)
        uses_cells = config.join == "mass" and not config.is_one_softmax
        if config.focus_tokens > 0:
            global_pairs += focus_pairs(config.focus_tokens, config.num_cells, config.focus_side, grid)
        return local_pairs + global_pairs + (math.prod(grid) * config.num_cells if uses_cells else 0)

    @staticmethod
    def advice(config: Hybrid, grid: Grid) -> str | None:
        """Known weaknesses at this grid: no tokens in focus, or proxies that are coarse for the window."""
        notes = [one for one in (focus_advice(config, grid), proxy_advice(config, grid)) if one is not None]
        return "; ".join(notes) if notes else None

    def prepare_for(self, grid: Grid) -> None:
        """As `Method.prepare_for`.

        Raises:
            LayoutError: a branch rejects this grid.
        """
        self.local.prepare_for(grid)
        self.global_.prepare_for(grid)
        if (warning := focus_advice(self.config, grid)) is not None:
            warn_once(warning)

    def is_exact(self, layout: Layout) -> bool:
        """Whether the window leaves nothing to the global branch."""
        return self.local.is_exact(layout)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float | None = None
    ) -> Tensor:
        """[B, H, N, D] -> [B, H, N, D]."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if self.is_exact(layout):
            return self.local(query, key, value, layout, scale=scale)
        text_len, text_first = layout.text_len, layout.text_first
        image_query, image_key, image_value = (split_text(x, text_len, text_first)[1] for x in (query, key, value))
        share = self.gate[:, None, None]  # g [H, 1, 1], and then g s_i
        if self.balance is None:
            out = self.local(query, key, value, layout, scale=scale)
            text_out, near = split_text(out, text_len, text_first)
            far = self.global_.attend_to_image(image_query, image_key, image_value, layout.grid, scale)
        else:
            out, lse = self.local.attend_and_lse(query, key, value, layout, scale=scale)
            text_out, near = split_text(out, text_len, text_first)
            num_cells = self.config.num_cells
            tokens_per_cell = lse.new_ones(()) * (image_query.shape[2] / num_cells)
            log_near = lse - self.balance[:, None] - tokens_per_cell.log()  # of L, in cells of n/C tokens
            if self.config.is_one_softmax:
                image = (image_query, image_key, image_value)
                far, far_share = self._one_softmax(*image, near, log_near, layout.grid, scale)
                share = share * far_share
            else:
                log_weights = log_rest(image_value, layout.grid, self.local.window, num_cells)  # of r_ic over n/C
                cells = cell_means(image_key, *layout.grid[-2:], num_cells).to(key.dtype)
                share = share * share_of_keys(image_query, cells, log_near, bias=log_weights, scale=scale)[..., None]
                far = self.global_.attend_to_image(image_query, image_key, image_value, layout.grid, scale)
        mixed = _mixed(near, far.to(near.dtype), share)
        if mixed is near:
            return out
        if text_len == 0:
            return mixed
        return torch.cat([text_out, mixed] if text_first else [mixed, text_out], dim=2)

    def _one_softmax(
        self, query: Tensor, key: Tensor, value: Tensor, near: Tensor, log_near: Tensor, grid: Grid, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(far, share) to mix into `near`, L; `log_near` [B, H, n] is the log of its denominator in n/C tokens."""
        proxies = self.global_.proxies(query, key, value, grid, scale)
        config, window = self.config, self.local.window
        if cells_in_focus(config.focus_tokens, config.num_cells, grid) == 0:
            log_weights = log_rest(value, grid, window, config.num_cells)
            tensors = (query, *proxies, log_near, near)  # one call gives (1 - s_i) L_i + s_i G_i, so the share is 1
            return attend_with_extra_key(*tensors, bias=log_weights, scale=scale), log_near.new_ones(())
        far, log_far = focus_attention(
            *(query, key, value, *proxies),
            grid=grid,
            window=window,
            num_tokens=config.focus_tokens,
            side=config.focus_side,
            scale=scale,
            impl=self.impl if self.impl in ("auto", "triton") else "plain",
        )
        return far, torch.sigmoid(log_far - log_near)[..., None]


def _mixed(near: Tensor, far: Tensor, share: Tensor) -> Tensor:
    """(1 - share) near + share far, [B, H, n, D], in place without gradients; share may have a wider dtype."""
    in_place = not (torch.is_grad_enabled() or torch.compiler.is_compiling())  # a copy takes GiB in large pictures
    if share.dtype == near.dtype:
        return near.lerp_(far, share) if in_place else torch.lerp(near, far, share)
    if in_place:
        return near.addcmul_(far - near, share)
    return torch.addcmul(near, far - near, share).to(near.dtype)
