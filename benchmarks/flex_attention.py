"""Attention over rows [prefix | suffix | suffix]: SDPA with a dense mask, as 04 has it, compared
with FlexAttention with a block mask.

    # a GPU, Qwen2-7B's heads, bf16
    python benchmarks/flex_attention.py
    # tried here; seconds
    python benchmarks/flex_attention.py --device cpu --lengths 256 512 --forward-only

A line a length: milliseconds of a forward and backward pass (median of --repeats), making of the
masks included, the ratio, and the largest difference of the outputs over the largest output."""

import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


@dataclass
class Args:
    lengths: tuple[int, ...] = (512, 2048, 8192)
    """tokens of a row; half of them prefix, a quarter each suffix"""
    tokens: int = 16384
    """tokens of a pass; rows are as many as fit"""
    heads: tuple[int, int, int] = (28, 4, 128)
    """heads, key-value heads, width of a head"""
    device: str = "cuda"
    """cuda or cpu"""
    repeats: int = 10
    """timed passes of each"""
    forward_only: bool = False
    """FlexAttention has no backward pass on the CPU"""


def timed(work, args: Args) -> tuple[float, torch.Tensor]:
    """Median milliseconds of work(), after two passes that compile and warm up, and its output."""
    seconds = []
    for number in range(args.repeats + 2):
        torch.cuda.synchronize() if args.device == "cuda" else None
        began = time.perf_counter()
        out = work()
        torch.cuda.synchronize() if args.device == "cuda" else None
        seconds += [time.perf_counter() - began] if number > 1 else []
    return 1e3 * statistics.median(seconds), out


def compare(length: int, flex, make_mask, args: Args) -> str:
    """A line of the table."""
    heads, groups, width = args.heads
    rows, prefix, suffix = max(1, args.tokens // length), length // 2, length // 4
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    q, k, v, grad = (
        torch.randn(rows, n, length, width, device=args.device, dtype=dtype)
        for n in (heads, groups, groups, heads)
    )
    at = torch.arange(length, device=args.device)
    is_chosen = (at >= prefix) & (at < prefix + suffix)
    last = torch.where(is_chosen, prefix + suffix, length).expand(rows, -1)

    def with_backward(out):
        if not args.forward_only:
            out.backward(grad)
        for tensor in (q, k, v):
            tensor.grad = None
        return out.detach()

    def dense():
        sees = (at[:, None] >= at) & (at[:, None] < last[:, None, :])
        attention = torch.nn.functional.scaled_dot_product_attention
        return with_backward(attention(q, k, v, sees[:, None], enable_gqa=True))

    def block():
        def sees(row, head, i, j):
            return (i >= j) & (i < last[row, j])

        mask = make_mask(sees, rows, None, length, length, device=args.device)
        return with_backward(flex(q, k, v, block_mask=mask, enable_gqa=True))

    for tensor in (q, k, v):
        tensor.requires_grad_(not args.forward_only)
    dense_ms, expected = timed(dense, args)
    block_ms, output = timed(block, args)
    difference = (expected.float() - output.float()).abs().max() / expected.float().abs().max()
    cells = f"{dense_ms:.1f} | {block_ms:.1f} | {dense_ms / block_ms:.2f} | {difference:.1e}"
    return f"| {length} | {rows} | {cells} |"


def main(args: Args):
    flex, make_mask = torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask)
    print("| tokens | rows | SDPA, ms | FlexAttention, ms | ratio | difference |")
    print("|---:|---:|---:|---:|---:|---:|")
    for length in args.lengths:
        print(compare(length, flex, make_mask, args), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
