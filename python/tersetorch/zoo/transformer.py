"""A small causal transformer, which says of each symbol of a text what follows it."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tersetorch.storage import register_module
from tersetorch.zoo.checks import check_count

# Of the embeddings' normal distribution.
DEVIATION = 0.02


class Transformer(nn.Module):
    """Embeddings of symbols and positions, pre-norm blocks, a last norm and a linear layer.

    Takes tokens int64 [N, length], length at most context; gives logits [N, length, symbols], of which those at a
    place depend on the tokens up to it. A block adds proj(attention(qkv(norm1(x)))) to x, then
    down(gelu(up(norm2(x)))), with 4 width hidden units; every weight but the embeddings' is a Linear layer's.

    Source:
        Vaswani et al., Attention is all you need (2017), with the norms before the layers, GELU and trained positions
        of Radford et al., Language models are unsupervised multitask learners (2019).
    """

    def __init__(
        self, symbols: int = 256, width: int = 128, blocks: int = 4, heads: int = 4, context: int = 128
    ) -> None:
        """Draws fresh weights.

        Args:
            symbols: how many there are.
            width: features of a symbol, a multiple of heads.
            blocks: at least 1.
            heads: of each attention.
            context: the longest sequence.

        Raises:
            TypeError: an argument is not an int.
            ValueError: an argument is less than 1, or width is no multiple of heads.
        """
        super().__init__()
        sizes = {"symbols": symbols, "width": width, "blocks": blocks, "heads": heads, "context": context}
        for name, value in sizes.items():
            check_count("Transformer", name, value)
        if width % heads:
            raise ValueError(f"Transformer: width must be a multiple of heads={heads}, got {width}; pass another")
        self.sizes = sizes
        self.symbols = nn.Embedding(symbols, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        nn.init.normal_(self.symbols.weight, std=DEVIATION)
        nn.init.normal_(self.positions, std=DEVIATION)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [N, length, symbols] of tokens [N, length].

        Raises:
            TypeError, ValueError: tokens is no int64 tensor of that shape.
        """
        check_tokens("Transformer", tokens, len(self.positions))
        x = self.symbols(tokens) + self.positions[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class Block(nn.Module):
    """Causal attention between the places of a sequence, then two linear layers at each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, length, width] of [N, length, width]."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        hidden: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return hidden


def check_tokens(where: str, tokens: Tensor, context: int) -> None:
    """Refuses what is no int64 [N, length] with length from 1 to context."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{where}: tokens must be a tensor, got {type(tokens).__name__}; pass int64 [N, length]")
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or not 1 <= tokens.shape[1] <= context:
        raise ValueError(
            f"{where}: tokens must be int64 [N, length] of 1 to {context} symbols, got {tokens.dtype} "
            f"{tuple(tokens.shape)}; cut the sequences"
        )


# So that torch.fx, and with it convert, can follow a network that looks at its input.
fx.wrap("check_tokens")

register_module("zoo.Transformer", Transformer, lambda model: model.sizes)
