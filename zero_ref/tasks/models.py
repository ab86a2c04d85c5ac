"""What is trained: a residual network, a small CNN and a small GPT."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cnn(height: int, width: int, classes: int = 10) -> nn.Sequential:
    """The CNN of many ZeRO tutorials: (batch, 1, height, width) -> log-probabilities.

    Each of its four layers with parameters is a unit by default.
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64 * (height // 2) * (width // 2), 128), nn.ReLU(),
        nn.Linear(128, classes), nn.LogSoftmax(dim=-1),
    )


class Residual(nn.Module):
    """x plus two layers on it: (batch, width) -> (batch, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


def residual_mlp(inputs: int, classes: int, width: int = 448, blocks: int = 6) -> nn.Sequential:
    """(batch, ...) with that many inputs each -> log-probabilities.

    Nearly all parameters are in the blocks, which are of one size, and a unit each by default.
    """
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, width), *[Residual(width) for _ in range(blocks)],
        nn.LayerNorm(width), nn.Linear(width, classes), nn.LogSoftmax(dim=-1),
    )


class Block(nn.Module):
    """A pre-norm transformer block with causal attention: (B, T, width) -> (B, T, width)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, width = x.shape
        heads = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, heads, T, width / heads) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A character-level GPT: (B, T) token ids -> (B, T, vocab) logits. Embedding and head are tied.

    Each block is a unit by default; embeddings, final norm and head belong to the root.
    """

    def __init__(self, vocab: int, context: int, width: int = 64, heads: int = 4, layers: int = 2):
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
        self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
