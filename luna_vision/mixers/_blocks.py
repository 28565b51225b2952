"""The common parts of the sparse mixers: attention of blocks of the grid to their surroundings, and further tokens.

Every block, gathered with its surroundings, is a row of the batch of one `F.scaled_dot_product_attention`.

Shapes: B batch, H heads, N patches, C width, E = C / H head width, R, S rows and columns of the grid, X = B * blocks,
Q, K patches of a block and of its surroundings, G further tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def check_grid(grid_size: tuple[int, int], length: int) -> None:
    """Raise a ValueError unless a patch grid has `length` patches."""
    if grid_size[0] * grid_size[1] != length:
        raise ValueError(f"grid_size {grid_size[0]} x {grid_size[1]} does not have the {length} patches of x")


def with_tokens(tokens: Tensor, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, G, C) before the patches (B, N, C), and which of both may be read (B, G + N)."""
    valid = torch.cat([torch.ones_like(valid[:, :1]).expand(-1, tokens.shape[1]), valid], dim=1)
    return torch.cat([tokens, x], dim=1), valid


def band(length: int, reach: int, device: torch.device) -> Tensor:
    """Which keys are near: (length, length + 2 reach) bool, for `length` queries and as many keys with a margin.

    True where a key is at most `reach` places from the query.
    """
    i = torch.arange(length, device=device)[:, None]
    j = torch.arange(length + 2 * reach, device=device)
    return (j - reach - i).abs() <= reach


def at_least_two(count: int) -> int:
    """A number of blocks or patches, at least 2 in compiled and exported code. The caller masks what is too much.

    PyTorch specialises a size of 1, so a graph exported with many blocks would refuse the small image that has one.
    """
    if not torch.jit.is_scripting():
        if torch.compiler.is_compiling():
            return torch.sym_max(count, 2)
    return count


def block_index(
    grid_size: tuple[int, int], block: tuple[int, int], margin: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The patches of all blocks with their margins: (blocks, K) int, and (blocks, K) bool, True inside the grid.

    In the place of a patch outside the grid stands the nearest one inside. The last block may be all outside.
    """
    R, S = grid_size
    rows, columns = (R + block[0] - 1) // block[0], (S + block[1] - 1) // block[1]
    height, width = block[0] + 2 * margin[0], block[1] + 2 * margin[1]
    i = torch.arange(at_least_two(rows * columns), device=device)[:, None]
    j = torch.arange(height * width, device=device)
    block_row = i // columns
    block_column = i - block_row * columns  # not i % columns, which the ONNX exporter cannot translate
    row = block_row * block[0] + j // width - margin[0]
    column = block_column * block[1] + j % width - margin[1]
    inside = (row >= 0) & (row < R) & (column >= 0) & (column < S)
    return row.clamp(0, R - 1) * S + column.clamp(0, S - 1), inside


def place_in_blocks(grid_size: tuple[int, int], block: tuple[int, int], device: torch.device) -> Tensor:
    """Where the patches stand when the grid is cut into blocks, (N) int."""
    R, S = grid_size
    columns = (S + block[1] - 1) // block[1]
    n = torch.arange(R * S, device=device)
    row = n // S
    column = n - row * S  # as above
    i = row // block[0] * columns + column // block[1]
    return (i * block[0] + row % block[0]) * block[1] + column % block[1]


def gather_blocks(x: Tensor, index: Tensor) -> Tensor:
    """Patches (B, H, N, E) at (blocks, K): (X, H, K, E)."""
    B, H, _, E = x.shape
    blocks, K = index.shape
    # in the layout of the projections, where all heads of a patch are one piece of memory
    return x.transpose(1, 2).index_select(1, index.view(-1)).view(B * blocks, K, H, E).transpose(1, 2)


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor,
    grid_size: tuple[int, int],
    block: tuple[int, int],
    margin: tuple[int, int],
    near: Tensor | None = None,
    k_extra: Tensor | None = None,
    v_extra: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Let every block of the grid attend to itself and a margin around it.

    Args:
        q, k, v: Queries, keys and values (B, H, N, E).
        valid: Which keys may be read, (B, N) bool. A query without any reads all keys of its block; its output is
            finite and has no meaning.
        grid_size: Rows and columns of the grid, row by row in N.
        block: Rows and columns of a block.
        margin: Rows and columns that its keys reach beyond it, on each side.
        near: Which of the keys of its block a query may read, (Q, K) bool; all if None.
        k_extra, v_extra: Keys and values (B, H, G, E) that all queries read.
        dropout_p: Probability of dropping an attention weight.

    Returns:
        (B, H, N, E).
    """
    B, H, _, E = q.shape
    q_index, _ = block_index(grid_size, block, (0, 0), q.device)
    k_index, inside = block_index(grid_size, block, margin, q.device)
    blocks, K = k_index.shape
    q, k, v = gather_blocks(q, q_index), gather_blocks(k, k_index), gather_blocks(v, k_index)
    mask = valid.index_select(1, k_index.view(-1)).view(B, blocks, K) & inside
    mask = mask.view(B * blocks, 1, 1, K)
    if near is not None:
        mask = mask & near
    if k_extra is not None and v_extra is not None:
        G = k_extra.shape[2]
        k = torch.cat([k_extra[:, None].expand(-1, blocks, -1, -1, -1).reshape(B * blocks, H, G, E), k], dim=2)
        v = torch.cat([v_extra[:, None].expand(-1, blocks, -1, -1, -1).reshape(B * blocks, H, G, E), v], dim=2)
        mask = torch.cat([torch.ones_like(mask[..., :1]).expand(-1, -1, -1, G), mask], dim=3)
    mask = mask | ~mask.any(dim=3, keepdim=True)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    y = y.transpose(1, 2).reshape(B, blocks * q_index.shape[1], H, E)
    return y.index_select(1, place_in_blocks(grid_size, block, q.device)).transpose(1, 2)
