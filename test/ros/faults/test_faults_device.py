"""The model fails in a tick: what can go on is freed and configured again, what cannot says so.

There is no GPU here: a stand-in for the model raises what PyTorch raises.
"""

from __future__ import annotations

import re
import shutil
import signal

import pytest
from fault_bench import STAND_IN, TASK
from safetensors.torch import load_file, save_file

HAS_TO_END = {
    'CUDA: illegal memory access in a tick (stand-in)': ('illegal access', 'illegal memory'),
    'CUDA: unspecified launch failure in a tick (stand-in)': ('launch failure', 'unspecified'),
}


@pytest.fixture(scope='module', autouse=True)
def sensors(bay) -> None:
    bay.sensors('sensors', 'camera:base', 'camera:wrist', 'joints')


@pytest.fixture
def node(bay):
    started = bay.node(STAND_IN)
    yield started
    assert started.stop(signal.SIGINT) == 0


def test_gpu_out_of_memory_frees_everything_and_allows_a_new_configure(node, table):
    node.start()
    node.set_task('out of memory')
    message = node.until_said(
        'Lifecycle',
        r'^unconfigured; act: the GPU has too little memory \(OutOfMemoryError: CUDA out of '
        r'memory\. .*\); end what else uses it, configure again$',
    )
    node.until(node.is_holding)
    node.set_task(TASK)
    node.start()
    table.add(
        'GPU out of memory in a tick (stand-in)',
        'held; freed everything, unconfigured', message, 'yes, by configure and activate',
    )  # fmt: skip


@pytest.mark.parametrize('fault', HAS_TO_END)
def test_dead_cuda_context_is_said_and_not_configured_again(fault, node, table):
    kind, what = HAS_TO_END[fault]
    node.start()
    node.set_task(kind)
    message = node.until_said(
        'Lifecycle', rf'^unconfigured; act: CUDA is dead in this process \(.*{what}.*\); restart'
    )
    node.until(node.is_holding)
    assert message.endswith('restart the process of the node')
    node.set_task(TASK)
    assert not node.configure()
    refusal = node.until_said('Lifecycle', '^unconfigured; configure: ')
    assert refusal == message.replace('act: ', 'configure: ')
    table.add(
        fault, 'held; unconfigured, refuses a new configure', message, 'no: restart the process'
    )


def test_weights_with_nan_are_refused_at_configure(bay, tiny_checkpoint, tmp_path, table):
    broken = tmp_path / 'nan'
    shutil.copytree(tiny_checkpoint, broken)
    tensors = load_file(broken / 'model.safetensors')
    name = next(name for name in tensors if name.endswith('action_out_proj.weight'))
    tensors[name][0, 0] = float('nan')
    save_file(tensors, broken / 'model.safetensors')
    node = bay.node(checkpoint=str(broken))
    assert not node.configure()
    message = node.until_said('Lifecycle', '^unconfigured; configure: ')
    found = re.sub(r'\s+', ' ', message.replace(str(broken), 'DIR'))
    assert found == (
        'unconfigured; configure: DIR/model.safetensors holds NaN or infinity in: '
        'action_out_proj.weight'
    )
    table.add('NaN in the weights', 'refused to configure', found, 'no: mend the checkpoint')
