"""Attention of one new token for each row over that row's keys alone, as a Triton kernel; see
torch_server.py."""

import torch
import triton
import triton.language as tl


@triton.jit
def kernel(
    q,
    k,
    v,
    out,
    length,
    scale,
    q_row,
    kv_row,
    kv_group,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, group = tl.program_id(0), tl.program_id(1)
    count = tl.load(length + row).to(tl.int32)
    h, d, t = tl.arange(0, PADDED), tl.arange(0, SIZE), tl.arange(0, BLOCK)
    real = (h < HEADS)[:, None]
    query = tl.load(
        q + row * q_row + (group * HEADS + h)[:, None] * SIZE + d[None, :], mask=real, other=0.0
    )
    start_of_row = row.to(tl.int64) * kv_row + group * kv_group
    best = tl.full([PADDED], float("-inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    weighted = tl.zeros([PADDED, SIZE], tl.float32)
    for start in range(0, count, BLOCK):
        inside = start + t < count
        at = start_of_row + (start + t)[:, None] * SIZE + d[None, :]
        keys = tl.load(k + at, mask=inside[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        p, shrink = tl.exp(scores - higher[:, None]), tl.exp(best - higher)
        values = tl.load(v + at, mask=inside[:, None], other=0.0)
        added = tl.dot(p.to(values.dtype), values, input_precision="ieee")
        weighted = weighted * shrink[:, None] + added
        total = total * shrink + tl.sum(p, 1)
        best = higher
    head = row * tl.num_programs(1) * HEADS + (group * HEADS + h)[:, None]
    mean = (weighted / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + head * SIZE + d[None, :], mean, mask=real)


def decode_attention(q, keys, values, length):
    """q (rows, heads, d), caches (seats, groups, places, d), length (rows,): how many places count.
    -> (rows, heads, d)"""
    rows, heads, size = q.shape
    each = heads // keys.shape[1]
    out = torch.empty(rows, heads, size, dtype=q.dtype, device=q.device)
    kernel[(rows, keys.shape[1])](
        q,
        keys,
        values,
        out,
        length,
        size**-0.5,
        q.stride(0),
        keys.stride(0),
        keys.stride(1),
        HEADS=each,
        PADDED=max(16, triton.next_power_of_2(each)),
        SIZE=size,
        BLOCK=64,
    )
    return out
