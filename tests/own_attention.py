"""An attention module that is not of diffusers."""

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class OwnAttention(nn.Module):
    """Self-attention of a user's own model: [B, N, 16] -> [B, N, 16], two heads."""

    num_heads, head_dim = 2, 8

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
