"""How products of the prefill are cut up on Hopper GPUs, see hopper_prefill_product.cuh."""

from __future__ import annotations

from dataclasses import dataclass

DEPTH = 64  # of a step along K
THREADS = 384
MIN_TOKENS, MAX_TOKENS = 24, 256  # of a tile; narrower ones read too many weights
RING_BYTES = 224 * 1024  # of the 227 KB that a block may have; barriers and the like are beside it


@dataclass(frozen=True)
class Tiling:
    """How a product is cut up.

    Args:
        features, tokens: of a tile.
        cluster: blocks with different tokens that share their features' weights: 1, 2, 4 or 8.
    """

    features: int
    tokens: int
    cluster: int

    @property
    def stages(self) -> int:
        """Return how many steps along K the ring in shared memory holds."""
        return RING_BYTES // self._stage_bytes()

    def defines(self) -> dict[str, int]:
        """Return the macros that a source is compiled with."""
        return {
            'FEATURES': self.features, 'TOKENS': self.tokens, 'CLUSTER': self.cluster,
            'STAGES': self.stages,
        }  # fmt: skip

    def shared_bytes(self) -> int:
        """Return the shared memory of a block: its ring, with room to begin at 1024 bytes."""
        return self.stages * self._stage_bytes() + 1024

    def units(self, rows: int, features: int) -> int:
        """Return how many clusters the tiles make."""
        return -(-rows // (self.tokens * self.cluster)) * (features // self.features)

    def box_rows(self) -> int:
        """Return how many rows of the weight are copied at once."""
        return self.features // self.cluster

    def step_clocks(self) -> int:
        """Return what 64 columns of K of a tile cost a multiprocessor, in clocks.

        The tensor cores multiply 4096 pairs of numbers in two clocks; shared memory, which
        delivers 128 bytes per clock, takes the step and gives all tokens to every 64 features.
        """
        tensor = self.features * self.tokens * DEPTH * 2 // 4096
        written = self.features + self.tokens
        read = self.features + self.features // 64 * self.tokens
        return max(tensor, written + read)

    def _stage_bytes(self) -> int:
        return (self.features + self.tokens) * DEPTH * 2


def tokens_of_tile(rows: int, tiles: int) -> int:
    """Return the tokens of each of so many tiles: a multiple of 8."""
    return max(-(-rows // (tiles * 8)) * 8, MIN_TOKENS)


def pairs_or_none(rows: int, tokens: int) -> int:
    """Return the blocks that share weights: two where the number of tiles of tokens is even."""
    return 2 if -(-rows // tokens) % 2 == 0 else 1
