"""Files that a person writes, and recordings."""

from __future__ import annotations

import io
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from checkpoint_targets import SMALL
from target import ROOT, Target, scratch, written

from pi05_ros.control.parameter_file import settings_from_yaml
from pi05_ros.control.parameters import ParameterError
from pi05_ros.engine.denoise_tuning import (
    DenoiseTuning,
    read_denoise_tunings,
    save_denoise_tuning,
)
from pi05_ros.engine.pipeline import BackendError
from pi05_ros.engine.tuning import TunedChoices, read_choices
from pi05_ros.policy.errors import RobotError
from pi05_ros.policy.robot import load_robot
from pi05_ros.tools.action_log import ActionLog, ActionLogError
from pi05_ros.tools.bag import BagError, open_bag
from pi05_ros.tools.golden import GoldenError, read_golden

from bag_files import string_cdr, write_bag  # isort: skip (test/tools)

GPU = 'NVIDIA Test'


def read_robot(data: bytes) -> None:
    load_robot(str(written('robot.yaml', data)))


def robot_seeds() -> list[bytes]:
    return [path.read_bytes() for path in sorted((ROOT / 'config' / 'robots').glob('*.yaml'))]


def read_parameters(data: bytes) -> None:
    settings_from_yaml(written('params.yaml', data))


def parameters_seeds() -> list[bytes]:
    short = 'pi05_policy:\n  ros__parameters: {checkpoint: a, cameras.base.transport: raw}\n'
    return [(ROOT / 'config' / 'policy.yaml').read_bytes(), short.encode()]


def read_tuning(data: bytes) -> None:
    choices = read_choices(written('tuning.json', data), GPU)
    for key in choices.kernels:
        choices.kernel(key, {'BLOCK_M': 64})
    for key in choices.algorithms:
        bytes.fromhex(choices.algorithm(key, choices.cublaslt_version) or '')


def tuning_seeds() -> list[bytes]:
    path = scratch() / 'tuning_seed.json'
    algorithms, kernels = {'1x2x3': '00' * 64}, {'attention': {'BLOCK_M': 64, 'num_warps': 4}}
    TunedChoices(GPU, 120_000, algorithms, kernels).save(path)
    return [path.read_bytes()]


def read_denoise_tuning(data: bytes) -> None:
    read_denoise_tunings(written('denoise_tuning.json', data))


def denoise_tuning_seeds() -> list[bytes]:
    path = scratch() / 'denoise_tuning_seed.json'
    save_denoise_tuning(path, SMALL.expert, 16, DenoiseTuning())
    return [path.read_bytes()]


def _read_bag(path: Path) -> None:
    with open_bag(path) as bag:
        with suppress(BagError):
            bag.lap_ns  # noqa: B018 (evaluated for its error)
        for _ in bag.messages():
            pass


def read_mcap(data: bytes) -> None:
    _read_bag(written('bag.mcap', data))


def read_sqlite(data: bytes) -> None:
    _read_bag(written('bag.db3', data))


@cache
def _bag(storage: str, name: str = 'seed') -> Path:
    rows = [('/task', 'std_msgs/msg/String', 10 * i, string_cdr('a' * i)) for i in range(4)]
    return write_bag(scratch() / f'{name}_{storage}', rows, storage)


def mcap_seeds() -> list[bytes]:
    return [path.read_bytes() for path in _bag('mcap').glob('*.mcap')]


def sqlite_seeds() -> list[bytes]:
    return [path.read_bytes() for path in _bag('sqlite3').glob('*.db3')]


def read_bag_metadata(data: bytes) -> None:
    directory = _bag('mcap', 'metadata')
    (directory / 'metadata.yaml').write_bytes(data)
    _read_bag(directory)


def bag_metadata_seeds() -> list[bytes]:
    # The files that it names are called after their directory.
    text = (_bag('mcap') / 'metadata.yaml').read_text().replace('seed_mcap', 'metadata_mcap')
    return [text.encode()]


def read_golden_file(data: bytes) -> None:
    read_golden(written('golden.npz', data), SMALL)


def golden_seeds() -> list[bytes]:
    px = SMALL.vision.image_px
    arrays = {
        'images_u8': np.zeros((1, px, px, 3), np.uint8),
        'view_mask': np.ones(1, bool),
        'tokens': np.ones(3, np.int64),
        'token_mask': np.ones(3, bool),
        'noise': np.ones((2, 4), np.float32),
        'actions_10': np.ones((2, 4), np.float32),
    }
    files = []
    for save_npz in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save_npz(file, **arrays)
        files.append(file.getvalue())
    return files


def read_action_log(data: bytes) -> None:
    ActionLog.load(written('actions.npz', data))


def action_log_seeds() -> list[bytes]:
    path = scratch() / 'actions_seed.npz'
    numbers = np.arange(2)
    ActionLog(('a', 'b'), ('rad', 'm'), np.ones((2, 3, 2), np.float32), *[numbers] * 3).save(path)
    return [path.read_bytes()]


TARGETS = {
    'robot': Target(read_robot, (RobotError,), robot_seeds),
    'parameters': Target(read_parameters, (ParameterError, RobotError), parameters_seeds),
    'tuning': Target(read_tuning, (BackendError,), tuning_seeds),
    'denoise_tuning': Target(read_denoise_tuning, (BackendError,), denoise_tuning_seeds),
    'bag_mcap': Target(read_mcap, (BagError,), mcap_seeds),
    'bag_sqlite': Target(read_sqlite, (BagError,), sqlite_seeds),
    'bag_metadata': Target(read_bag_metadata, (BagError,), bag_metadata_seeds),
    'action_log': Target(read_action_log, (ActionLogError,), action_log_seeds),
    'golden': Target(read_golden_file, (GoldenError,), golden_seeds),
}
