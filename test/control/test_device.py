"""Which errors of a GPU end the process, and what the others leave behind."""

from __future__ import annotations

import weakref

import pytest
import torch

from pi05_ros.control.device import DeviceLostError, DeviceMemoryError, DeviceWatch
from pi05_ros.model.errors import Pi05Error

ILLEGAL = 'an illegal memory access was encountered'


@pytest.mark.parametrize(
    'error',
    [
        RuntimeError(f'CUDA error: {ILLEGAL}\nCUDA kernel errors might be reported later'),
        RuntimeError(f'Triton Error [CUDA]: {ILLEGAL}'),
        RuntimeError('CUDA error: unspecified launch failure'),
        RuntimeError('CUDA error: device-side assert triggered'),
        RuntimeError('CUDA error: unknown error'),
    ],
)
def test_dead_context_is_remembered_and_no_gpu_used_again(error):
    watch = DeviceWatch()
    watch.check('auto')
    explained = watch.explain(error)
    assert isinstance(explained, DeviceLostError)
    assert str(explained).startswith('CUDA is dead in this process (RuntimeError: ')
    assert str(explained).endswith('); restart the process of the node')
    assert '\n' not in str(explained)
    for device in ('auto', 'cuda', 'cuda:1'):
        with pytest.raises(DeviceLostError, match='restart the process of the node'):
            watch.check(device)
    watch.check('cpu')


def test_first_cause_is_kept():
    watch = DeviceWatch()
    watch.explain(RuntimeError(f'CUDA error: {ILLEGAL}'))
    later = watch.explain(RuntimeError('CUDA error: unknown error'))
    assert ILLEGAL in str(later)
    assert str(later) == watch.lost


@pytest.mark.parametrize(
    'error',
    [
        RuntimeError('CUDA error: invalid argument'),
        RuntimeError('unknown error'),  # of something else than CUDA
        ValueError('shapes do not match'),
        Pi05Error('cuda:0 has too little free memory: CUDA out of memory.'),
    ],
)
def test_other_errors_stay_what_they_are(error):
    watch = DeviceWatch()
    assert watch.explain(error) is error
    watch.check('cuda')


def test_too_little_memory_says_what_to_do_and_allows_another_try():
    watch = DeviceWatch()
    error = torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
    explained = watch.explain(error)
    assert isinstance(explained, DeviceMemoryError)
    assert 'Tried to allocate 2.00 GiB.); end what else uses it' in str(explained)
    watch.check('cuda')


def test_what_the_failed_call_held_is_let_go():
    """The error keeps its frames, and they the tensors, until after everything was freed."""

    class Activations:
        pass

    held: list[weakref.ref] = []

    def infer() -> None:
        activations = Activations()
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError('CUDA out of memory.')

    try:
        infer()
    except torch.OutOfMemoryError as error:
        kept = error
    assert held[0]() is not None
    DeviceWatch().explain(kept)
    assert held[0]() is None
