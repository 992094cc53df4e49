"""CUDA kernels on the CPU: what the other tests rely on to see a mistake."""

from pathlib import Path

import pytest
import torch
from cuda_on_cpu import CpuModule

_HERE = Path(__file__).parent
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
        ('half_a_barrier', 1, 'half_a_barrier: block 0: waits for ever'),
        ('half_a_barrier', 2, 'waits for ever'),
        ('arrive_twice', 2, 'cluster_arrive twice without cluster_wait'),
        ('arrive_twice', 3, 'cluster size must be 1 to 16 and divide the number of blocks'),
    ],
)
def test_a_mistake_is_said(blocks, kernel, cluster, message):
    with pytest.raises(RuntimeError, match=message):
        blocks.launch(kernel, 4, _THREADS, cluster)
