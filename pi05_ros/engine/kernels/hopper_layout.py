"""How the Hopper kernels cut up a layer, and how their weights lie in memory.

The weights of a block are one contiguous range of tiles as the warpgroup instruction takes them
from shared memory, so that bulk copies bring them there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pi05_ros.engine.expert_weights import ExpertWeights
from pi05_ros.model.config import GemmaConfig, Pi05Config

THREADS = 256
PRODUCT_THREADS = THREADS + 32  # those that multiply, and a warp that copies
_MAX_HORIZON = 64
_RANGES = 8  # of keys: blocks of a cluster; more than 8 are not portable
_BLOCK_BYTES = 224 * 1024  # dynamic shared memory of a block, beside what the kernels declare
TILE_COLUMNS = 64  # of K: of a tile, and of a step
_MAX_DEPTH = 16 * TILE_COLUMNS  # of a block; it has a barrier per step
_UNIT = 8  # rows and 16-byte chunks of a row that the swizzle exchanges
_TILE_ALIGN = 1024
# Shared memory that a block asks for at least. A kernel that starts early finds some
# multiprocessors empty; several of its blocks on one of them would take turns. The blocks of a
# cluster start together, beside the blocks of QKV where there is room for both.
_ATTEND_BYTES = 116 * 1024  # no second block fits beside it
# Two blocks of the output projection fit, and one beside a block of gate_up; it asks for less
# where it would not fit beside a block of the attention.
_OUT_BYTES = 76 * 1024
_MLP_TOKEN_BYTES = 14 * 1024  # so that blocks of gate_up and down fit beside each other
# Weights compete for device memory: those of gate_up are needed first and are the most.
_UP_IN_FLIGHT_BYTES, _DOWN_IN_FLIGHT_BYTES = 64 * 1024, 24 * 1024
_PROCESSOR_BYTES = 228 * 1024
_DECLARED_BYTES = 6 * 1024  # what two blocks take beside it, with 1 KB each for the driver
PRODUCTS = ('qkv', 'attention_out', 'gate_up', 'down')  # fields of plan and weights alike
_MACROS = ('QKV', 'OUT', 'UP', 'DOWN')  # how the source calls them


@dataclass(frozen=True)
class Slab:
    """One product: ``features`` weight rows and ``depth`` columns of K per block.

    The ``split`` blocks of a cluster have the same features, together all of K, and add up their
    parts of it.
    """

    features: int
    depth: int
    split: int = 1
    least_bytes: int = 0  # of shared memory
    token_bytes: int = 28 * 1024  # of it for tokens; there always is room for a step per group
    in_flight_bytes: int = 32 * 1024  # of weights that are on their way at once

    def blocks(self, rows: int, columns: int) -> int:
        """Return the number of blocks for weights of (rows, columns)."""
        return rows // self.features * (columns // self.depth)

    def stages(self, horizon: int) -> int:
        """Return the steps along K whose tokens have room beside all weights."""
        room = self.token_bytes // (2 * TILE_COLUMNS * token_rows(horizon))
        groups = self.groups()
        return min(self.depth // TILE_COLUMNS, max(1, room // groups) * groups)

    def groups(self) -> int:
        """Return the groups of warps that share out the steps along K."""
        return 2 if self.features == 64 else 1

    def shared_bytes(self, horizon: int) -> int:
        """Return the shared memory of a block: weights and tokens, then sums in their place."""
        tokens = token_rows(horizon)
        of_tokens = self.stages(horizon) * 2 * TILE_COLUMNS * tokens
        own = 4 * self.groups() * tokens * (self.features + 4)
        sent = 4 * (self.split - 1) * -(-horizon // self.split) * self.features
        needed = max(2 * self.features * self.depth + of_tokens, own + sent) + _TILE_ALIGN
        return max(needed, self.least_bytes)


def token_rows(horizon: int) -> int:
    """Return the rows of tokens that the products multiply: the columns of their instruction."""
    return -(-horizon // 8) * 8


@dataclass(frozen=True)
class HopperPlan:
    """The sizes that the kernels are compiled for."""

    qkv: Slab
    attention_out: Slab
    gate_up: Slab
    down: Slab
    queries: int  # rows of a cluster of the attention
    ranges: int  # of keys, one per block of a cluster
    keys: int  # of a range, at most
    # Clusters of the attention that only keep two blocks of the output projection, which start
    # beside it, from one multiprocessor: no block of gate_up would fit there with them.
    spare_clusters: int = 0
    end_tokens: int = 4  # of a cluster at a step's end
    end_blocks: int = 8  # of such a cluster, each with some columns

    def square_parts(self, width: int) -> int:
        """Return the parts of a token's sum of squares: enough for every kernel that writes x."""
        units = (width // self.attention_out.features, width // self.down.features)
        parts = max(4, self.end_blocks, *units)
        return 1 << (parts - 1).bit_length()

    def step_end_blocks(self, horizon: int) -> int:
        """Return the blocks of a step's end."""
        return -(-horizon // self.end_tokens) * self.end_blocks

    def attend_blocks(self, expert: GemmaConfig, horizon: int) -> int:
        """Return the blocks of the attention."""
        clusters = -(-expert.num_heads * horizon // self.queries) + self.spare_clusters
        return clusters * self.ranges

    def attend_bytes(self, head_dim: int) -> int:
        """Return the shared memory of an attention block: keys, values, queries."""
        merged = -(-self.queries // self.ranges) * self.ranges
        rows = max(self.keys, merged) + self.keys + self.queries
        return max(2 * rows * head_dim, _ATTEND_BYTES)


def hopper_plan(expert: GemmaConfig, horizon: int, max_prefix: int, processors: int) -> HopperPlan:
    """Return the plan for a model shape that fits (:func:`hopper_misfit`).

    Args:
        max_prefix: prefix rows that there is room for.
        processors: multiprocessors of the GPU.
    """
    # A cluster has to fit into one part of the GPU: of 132 multiprocessors 15 clusters of 8 do.
    clusters = max(1, processors // _RANGES - 1)
    rows = expert.num_heads * horizon
    queries = 16 * -(-rows // (16 * clusters))
    new_rows = -(-horizon // (8 * _RANGES)) * 8  # of a range, whole tiles of 8
    heads = expert.num_heads * expert.head_dim
    plan = HopperPlan(
        qkv=Slab(128, expert.width // 4, 4),
        attention_out=Slab(64, heads // 8, 8, least_bytes=_OUT_BYTES),
        gate_up=Slab(
            128, expert.width // 2, 2, token_bytes=_MLP_TOKEN_BYTES,
            in_flight_bytes=_UP_IN_FLIGHT_BYTES,
        ),
        down=Slab(
            64, expert.mlp_dim // 8, 8, token_bytes=_MLP_TOKEN_BYTES,
            in_flight_bytes=_DOWN_IN_FLIGHT_BYTES,
        ),
        queries=queries,
        ranges=_RANGES,
        keys=-(-(new_rows - (-max_prefix // _RANGES)) // 16) * 16,
        spare_clusters=min(1, clusters + -rows // queries),
    )  # fmt: skip
    beside = _PROCESSOR_BYTES - _DECLARED_BYTES - plan.attend_bytes(expert.head_dim)
    out = replace(plan.attention_out, least_bytes=min(_OUT_BYTES, beside))
    plan = replace(plan, attention_out=out)
    if plan.qkv.shared_bytes(horizon) > beside:
        return replace(plan, qkv=Slab(64, expert.width // 4, 4))
    return plan


def hopper_misfit(
    config: Pi05Config, horizon: int, max_prefix: int, processors: int
) -> str | None:
    """Return why the kernels cannot take a model shape, or None if they can."""
    expert = config.expert
    if (
        expert.num_kv_heads != 1
        or expert.head_dim != 256
        or expert.width != 1024
        or expert.mlp_dim % 2048
        or expert.num_heads * expert.head_dim % 1024
        or max(expert.mlp_dim, expert.num_heads * expert.head_dim) > 8 * _MAX_DEPTH
        or config.action_dim % 4
        or config.action_dim > 48
    ):
        return 'they are made for the released expert'
    if horizon > _MAX_HORIZON:
        return f'they take a horizon up to {_MAX_HORIZON}, not {horizon}'
    plan = hopper_plan(expert, horizon, max_prefix, processors)
    slabs = [getattr(plan, name).shared_bytes(horizon) for name in PRODUCTS]
    needed = max(plan.attend_bytes(expert.head_dim), *slabs)
    if needed > _BLOCK_BYTES:
        return f'a block needs {needed} bytes of shared memory, there are {_BLOCK_BYTES}'
    return None


def defines(plan: HopperPlan, config: Pi05Config, horizon: int) -> dict[str, int | str]:
    """Return the macros that the source is compiled with."""
    expert = config.expert
    products: dict[str, int | str] = {}
    for name, macro in zip(PRODUCTS, _MACROS, strict=True):
        slab: Slab = getattr(plan, name)
        products[f'{macro}_FEATURES'] = slab.features
        products[f'{macro}_DEPTH'] = slab.depth
        products[f'{macro}_SPLIT'] = slab.split
        products[f'{macro}_STAGES'] = slab.stages(horizon)
        products[f'{macro}_IN_FLIGHT'] = slab.in_flight_bytes
    return products | {
        'HORIZON': horizon,
        'WIDTH': expert.width,
        'MLP': expert.mlp_dim,
        'HEADS': expert.num_heads,
        'HEAD_DIM': expert.head_dim,
        'ACTIONS': config.action_dim,
        'EPS': f'{expert.rms_norm_eps}f',
        'QUERY_BLOCK': plan.queries,
        'RANGES': plan.ranges,
        'KEYS': plan.keys,
        'END_TOKENS': plan.end_tokens,
        'END_BLOCKS': plan.end_blocks,
        'SQUARES': plan.square_parts(expert.width),
    }


def pack_weights(weights: ExpertWeights, plan: HopperPlan, expert: GemmaConfig) -> ExpertWeights:
    """Return the weights with those of the four products as the kernels read them."""
    return _repacked(weights, plan, expert, pack)


def unpack_weights(weights: ExpertWeights, plan: HopperPlan, expert: GemmaConfig) -> ExpertWeights:
    """Return what :func:`pack_weights` was given."""
    return _repacked(weights, plan, expert, unpack)


def qkv_order(features: int, expert: GemmaConfig) -> Tensor:
    """Return the rows of q, k and v by block: first halves of rotation pairs, then second ones."""
    half, pairs = expert.head_dim // 2, features // 2
    pair = torch.arange((expert.num_heads + 2) * half).view(-1, pairs)
    first = pair // half * expert.head_dim + pair % half
    return torch.cat([first, first + half], dim=1).flatten()


def gate_up_order(features: int, expert: GemmaConfig) -> Tensor:
    """Return the rows of gate and up by block: gate rows, then the up rows that belong to them."""
    gate = torch.arange(expert.mlp_dim).view(-1, features // 2)
    return torch.cat([gate, gate + expert.mlp_dim], dim=1).flatten()


def pack(weight: Tensor, slab: Slab, order: Tensor | None = None) -> Tensor:
    """Return a weight (N, K) as the kernels read it, of the same shape.

    By block (features, then parts of K) and step of 64 K: rows of 128 bytes, whose 16-byte chunk c
    lies in row r at c ^ (r % 8).
    """
    rows = weight if order is None else weight[order.to(weight.device)]
    parts = rows.view(*_split(weight, slab)).permute(*_PACKED)
    return _swizzled(parts).reshape(weight.shape)


def unpack(packed: Tensor, slab: Slab, order: Tensor | None = None) -> Tensor:
    """Return the weight that :func:`pack` was given."""
    shape = _split(packed, slab)
    parts = _swizzled(packed.view(*(shape[i] for i in _PACKED)))
    inverse = sorted(range(len(_PACKED)), key=_PACKED.__getitem__)
    rows = parts.permute(*inverse).reshape(packed.shape)
    if order is None:
        return rows
    weight = torch.empty_like(rows)
    weight[order.to(rows.device)] = rows
    return weight


# From (feature block, eight rows, row, part of K, step, chunk, element).
_PACKED = (0, 3, 4, 1, 2, 5, 6)


def _split(weight: Tensor, slab: Slab) -> Sequence[int]:
    rows, columns = weight.shape
    return (
        rows // slab.features, slab.features // _UNIT, _UNIT,
        columns // slab.depth, slab.depth // TILE_COLUMNS, _UNIT, TILE_COLUMNS // _UNIT,
    )  # fmt: skip


def _swizzled(parts: Tensor) -> Tensor:
    """Return (..., row, chunk, element) with exchanged chunks; twice gives it back."""
    row = torch.arange(_UNIT, device=parts.device)[:, None]
    return parts[..., row, row ^ row.T, :]


def _repacked(weights: ExpertWeights, plan: HopperPlan, expert: GemmaConfig, how) -> ExpertWeights:
    orders = {
        'qkv': qkv_order(plan.qkv.features, expert),
        'gate_up': gate_up_order(plan.gate_up.features, expert),
    }
    changes = {}
    for name in PRODUCTS:
        layers, slab = getattr(weights, name), getattr(plan, name)
        changes[name] = torch.stack([how(layer, slab, orders.get(name)) for layer in layers])
    return replace(weights, **changes)
