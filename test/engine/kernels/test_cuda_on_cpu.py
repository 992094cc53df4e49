"""CUDA kernels on the CPU: what the other tests rely on to see a mistake."""

import re
from pathlib import Path

import pytest
import torch
from cuda_on_cpu import CpuModule, TensorMap

_HERE = Path(__file__).parent
_TILES = _HERE / 'tile_on_cpu.cu'
_MISTAKES = re.findall(r'\bk\w+', _TILES.read_text().split('enum Mistake')[1].split('}')[0])
_CLUSTER, _CLUSTERS, _THREADS = 4, 6, 64


@pytest.fixture(scope='module')
def blocks(tmp_path_factory) -> CpuModule:
    library = tmp_path_factory.mktemp('blocks') / 'blocks.so'
    return CpuModule(_HERE / 'cluster_on_cpu.cu', {}, library)


def _cluster_sums(
    blocks: CpuModule, rounds: int, before_reading: bool, after_reading: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of a kernel's clusters and the right ones, both (rounds, blocks)."""
    n = _CLUSTER * _CLUSTERS
    values = torch.randint(-50, 50, (rounds, n, _THREADS), generator=torch.Generator()).float()
    sums = torch.full((rounds, n), float('nan'))
    blocks.launch(
        'cluster_sum', n, _THREADS, _CLUSTER,
        values, sums, rounds, _CLUSTER, int(before_reading), int(after_reading),
    )  # fmt: skip
    of_cluster = values.unflatten(1, (_CLUSTERS, _CLUSTER)).sum((2, 3))
    return sums, of_cluster.repeat_interleave(_CLUSTER, dim=1)


def test_blocks_of_a_cluster_read_each_other(blocks):
    sums, right = _cluster_sums(blocks, 5, before_reading=True, after_reading=True)
    assert torch.equal(sums, right)


def test_reading_before_the_others_have_written_is_seen(blocks):
    sums, right = _cluster_sums(blocks, 1, before_reading=False, after_reading=True)
    assert not torch.equal(sums, right)


def test_writing_before_the_others_have_read_is_seen(blocks):
    sums, right = _cluster_sums(blocks, 5, before_reading=True, after_reading=False)
    assert not torch.equal(sums[:-1], right[:-1])


def test_reading_from_a_block_that_has_ended_is_seen(blocks):
    sums, _ = _cluster_sums(blocks, 1, before_reading=True, after_reading=False)
    assert sums.isnan().any()


def test_arriving_at_the_barrier_of_a_cluster_does_not_wait(blocks):
    ranks = torch.full((8,), -1, dtype=torch.int32)
    blocks.launch('split_barrier', 8, _THREADS, 4, ranks)
    assert ranks.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize('cluster', [1, 2])
def test_a_block_begins_without_the_memory_of_the_last_one(blocks, cluster):
    found = torch.zeros(4, 2)
    blocks.launch('fresh_memory', 4, 32, cluster, found)
    assert found.isnan().all()


@pytest.mark.parametrize(
    ('kernel', 'cluster', 'message'),
    [
        ('half_a_barrier', 1, 'block 0: thread 32 waits for ever in __syncthreads'),
        ('half_a_barrier', 2, 'block 0: thread 32 waits for ever in __syncthreads'),
        ('arrive_twice', 2, 'cluster_arrive twice without cluster_wait'),
        ('settle_nothing', 1, 'settle: a null pointer'),
        ('arrive_twice', 3, 'cluster size must be 1 to 16 and divide the number of blocks'),
    ],
)
def test_a_mistake_is_said(blocks, kernel, cluster, message):
    with pytest.raises(RuntimeError, match=message):
        blocks.launch(kernel, 4, _THREADS, cluster)


def test_a_matrix_of_eight_rows_is_transposed(blocks):
    matrix = torch.arange(64, dtype=torch.int16).view(8, 8)
    transposed, of_lane = torch.empty_like(matrix), torch.empty(32)
    blocks.launch('matrix_transposed', 1, 32, 1, matrix, transposed, of_lane)
    assert torch.equal(transposed, matrix.T)
    assert torch.equal(of_lane, torch.arange(16).repeat(2) + 0.5)


@pytest.fixture(scope='module')
def tiles(tmp_path_factory) -> CpuModule:
    library = tmp_path_factory.mktemp('tiles') / 'tiles.so'
    return CpuModule(_TILES, {}, library)


def _product(tiles: CpuModule, depth: int, mistake: str = 'kNone') -> bool:
    """Return whether a kernel's product of (150, depth) and (200, depth)^T is right."""
    generator = torch.Generator().manual_seed(depth)
    a, b = (
        torch.randint(-2, 3, (rows, depth), generator=generator).bfloat16() for rows in (150, 200)
    )
    room = torch.full((151, 200), float('nan'), dtype=torch.bfloat16)
    tiles.launch(
        'product', 8, 160, 2,
        TensorMap(a, 64), TensorMap(b, 64), room, 150, 200, depth, _MISTAKES.index(mistake),
    )  # fmt: skip
    assert room[150].isnan().all()
    return torch.equal(room[:150], (a.float() @ b.float().T).bfloat16())


@pytest.mark.parametrize('depth', [64, 200, 384])
def test_tiles_are_multiplied(tiles, depth):
    assert _product(tiles, depth)


@pytest.mark.parametrize('mistake', ['kRoomTooEarly', 'kRoomOfOwnBlock'])
def test_a_wait_that_is_missing_is_seen(tiles, mistake):
    assert not _product(tiles, 384, mistake)


@pytest.mark.parametrize(
    ('mistake', 'message'),
    [
        ('kNoWaitForTiles', 'more arrivals at a barrier than it waits for'),
        ('kNoWaitForRoom', 'more arrivals at a barrier than it waits for'),
        ('kNoCommit', 'a thread ends without wgmma_wait'),
        ('kNoWaitForSums', 'a thread ends without wgmma_wait'),
        ('kLeaveEarly', "ends while copies|after its block's end"),
        ('kNoBarriersYet', 'a barrier is used without barrier_init'),
        ('kTooFewBytes', 'waits for ever in barrier_wait'),
        ('kMissedPhase', 'at a barrier of which it has missed a phase'),
    ],
)
def test_what_a_gpu_leaves_undefined_is_said(tiles, mistake, message):
    with pytest.raises(RuntimeError, match=message):
        for _ in range(20):  # not every order of the blocks shows it
            _product(tiles, 384, mistake)


def _product_of_registers(tiles: CpuModule, row_per_k: bool, early: bool) -> bool:
    """Return whether a kernel's product of (64, 32) and (32, 128) is right."""
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-2, 3, s, generator=generator).bfloat16() for s in ((64, 32), (32, 128)))
    matrix = b if row_per_k else b.T.contiguous()
    product = torch.full((64, 128), float('nan'))
    tiles.launch(
        'product_of_registers', 1, 128, 1,
        a, TensorMap(matrix, matrix.shape[0]), product, int(row_per_k), int(early),
    )  # fmt: skip
    return torch.equal(product, a.float() @ b.float())


@pytest.mark.parametrize('row_per_k', [False, True])
def test_registers_are_multiplied(tiles, row_per_k):
    assert _product_of_registers(tiles, row_per_k, early=False)


@pytest.mark.parametrize('row_per_k', [False, True])
def test_overwriting_registers_before_the_wait_is_seen(tiles, row_per_k):
    assert not _product_of_registers(tiles, row_per_k, early=True)


def _load_before_a_tile(tiles: CpuModule, wait: bool) -> bool:
    """Return whether a warp has the matrix that was there before."""
    matrix, loaded = torch.randn(32, 64).bfloat16(), torch.zeros(16, 16).bfloat16()
    tiles.launch('tile_after_loads', 1, 64, 1, TensorMap(matrix, 16), loaded, int(wait))
    return torch.equal(loaded, matrix[:16, :16])


def test_a_tile_takes_the_place_of_matrices_that_have_been_loaded(tiles):
    assert all(_load_before_a_tile(tiles, wait=True) for _ in range(10))


def test_a_tile_in_the_place_of_matrices_that_may_be_on_their_way_is_said(tiles):
    with pytest.raises(RuntimeError, match='may be on their way: wait_for_loads'):
        _load_before_a_tile(tiles, wait=False)


@pytest.mark.parametrize('kernel', ['misplaced_rows', 'misplaced_narrow_rows'])
def test_rows_begin_at_a_multiple_of_eight(tiles, kernel):
    with pytest.raises(RuntimeError, match='begins at a multiple of 8 rows'):
        tiles.launch(kernel, 1, 128, 1)


def test_every_warp_of_a_group_multiplies(tiles):
    with pytest.raises(RuntimeError, match='wgmma without all four warps of a group'):
        tiles.launch('three_warps', 1, 128, 1)
