"""Statistics: openpi's and lerobot's numbers, and an error for everything doubtful."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_files import feature_stats, lerobot_steps, write_lerobot, write_norm_stats

from pi05_ros.policy.errors import NormError
from pi05_ros.policy.robot import RobotSpec, load_robot
from pi05_ros.policy.stats import NormStats, load_stats

MODEL_DIM = 32


@pytest.fixture
def franka() -> RobotSpec:
    return load_robot('franka')


def load_openpi(root: Path, robot: RobotSpec, asset_id: str = '') -> NormStats:
    return load_stats(root, 'openpi', robot, MODEL_DIM, asset_id)


def load_lerobot(
    root: Path, robot: RobotSpec, mode: str, state: dict[str, Any], actions: dict[str, Any]
) -> NormStats:
    write_lerobot(root, lerobot_steps(mode), state, actions)
    return load_stats(root, 'lerobot', robot, MODEL_DIM)


# openpi


@pytest.mark.parametrize('parent', ['assets/franka', 'franka'])
def test_openpi_statistics_are_found_in_either_place(
    tmp_path: Path, franka: RobotSpec, parent: str
):
    path = write_norm_stats(tmp_path / parent, feature_stats(8), feature_stats(8))
    stats = load_openpi(tmp_path, franka)
    assert stats.files == (path,)
    assert stats.describe() == 'state quantile, actions quantile (openpi)'


def test_openpi_quantiles_by_hand(tmp_path: Path, franka: RobotSpec):
    """(x - q01) / (q99 - q01 + 1e-6) * 2 - 1, and back."""
    write_norm_stats(tmp_path / 'assets/franka', feature_stats(8), feature_stats(8, first=3.0))
    stats = load_openpi(tmp_path, franka)
    assert stats.state is not None
    x = np.full(8, 0.25)
    expected = (0.25 - -1.0) / (1.0 - -1.0 + 1e-6) * 2 - 1
    assert stats.state.normalize(x)[0] == expected
    assert stats.actions.unnormalize(np.full((1, 8), 0.5))[0, 1] == pytest.approx(
        (0.5 + 1) / 2 * (5.0 - -4.0 + 1e-6) - 4.0, rel=1e-15
    )


def test_openpi_zscore_by_hand(tmp_path: Path, franka: RobotSpec):
    """(x - mean) / (std + 1e-6), chosen by the robot file."""
    write_norm_stats(tmp_path / 'assets/franka', feature_stats(8), feature_stats(8))
    stats = load_openpi(tmp_path, franka.model_copy(update={'normalization': 'zscore'}))
    assert stats.state is not None
    assert stats.state.normalize(np.full(8, 4.0))[2] == (4.0 - 3.0) / (2.5 + 1e-6)
    assert stats.actions.unnormalize(np.ones((1, 8)))[0, 2] == pytest.approx(3.0 + 2.5 + 1e-6)


def test_openpi_equal_quantiles_divide_by_the_epsilon(tmp_path: Path, franka: RobotSpec):
    """A dimension that never moved in training: its own value maps to -1, exactly."""
    entry = feature_stats(8)
    entry['q01'][4] = entry['q99'][4] = 0.7
    write_norm_stats(tmp_path / 'assets/franka', entry, entry)
    stats = load_openpi(tmp_path, franka)
    assert stats.state is not None
    assert stats.state.normalize(np.full(8, 0.7))[4] == -1.0
    assert stats.actions.unnormalize(np.zeros((1, 8)))[0, 4] == pytest.approx(0.7, abs=1e-6)


def test_statistics_may_be_padded_to_the_model(tmp_path: Path, franka: RobotSpec):
    entry = feature_stats(8)
    padded = {name: [*values, *[0.0] * 24] for name, values in entry.items()}
    write_norm_stats(tmp_path / 'assets/franka', padded, padded)
    stats = load_openpi(tmp_path, franka)
    assert stats.state is not None
    write_norm_stats(tmp_path / 'assets/franka', entry, entry)
    exact = load_openpi(tmp_path, franka)
    assert exact.state is not None
    x = np.linspace(-1, 1, 8)
    np.testing.assert_array_equal(stats.state.normalize(x), exact.state.normalize(x))


def test_asset_id_parameter_wins_over_the_robot_file(tmp_path: Path, franka: RobotSpec):
    path = write_norm_stats(tmp_path / 'assets/my/lab', feature_stats(8), feature_stats(8))
    assert load_openpi(tmp_path, franka, 'my/lab').files == (path,)


def test_missing_statistics_list_what_the_checkpoint_has(tmp_path: Path, franka: RobotSpec):
    write_norm_stats(tmp_path / 'assets/droid', feature_stats(8), feature_stats(8))
    write_norm_stats(tmp_path / 'physical-intelligence/libero', feature_stats(8), feature_stats(7))
    message = (
        "no normalisation statistics for asset 'franka': looked for .*assets/franka.*; "
        'assets of this checkpoint: droid, physical-intelligence/libero'
    )
    with pytest.raises(NormError, match=message):
        load_openpi(tmp_path, franka)


@pytest.mark.parametrize('asset_id', ['../other', '/etc', 'a//b', 'a/../b', '.'])
def test_asset_id_cannot_leave_the_checkpoint(tmp_path: Path, franka: RobotSpec, asset_id: str):
    with pytest.raises(NormError, match='is not a relative path of plain names'):
        load_openpi(tmp_path, franka, asset_id)


def test_golden_directory_has_no_statistics(tmp_path: Path, franka: RobotSpec):
    with pytest.raises(NormError, match='a golden directory has no normalisation statistics'):
        load_stats(tmp_path, 'golden', franka, MODEL_DIM)


def test_statistics_of_another_robot_name_both_numbers(tmp_path: Path, franka: RobotSpec):
    write_norm_stats(tmp_path / 'assets/franka', feature_stats(7), feature_stats(8))
    message = 'state has 8 dims in the robot file, norm stats have 7: .*norm_stats.json'
    with pytest.raises(NormError, match=message):
        load_openpi(tmp_path, franka)


def test_more_statistics_than_the_robot_has_are_refused(tmp_path: Path, franka: RobotSpec):
    write_norm_stats(tmp_path / 'assets/franka', feature_stats(8), feature_stats(14))
    with pytest.raises(NormError, match='actions has 8 dims .* norm stats have 14'):
        load_openpi(tmp_path, franka)


DAMAGED = {
    'nan': ({'q01': [float('nan')] * 8}, r'state.q01: dimension 0 is nan'),
    'infinite': ({'q99': [1.0] * 7 + [float('inf')]}, 'state.q99: dimension 7 is inf'),
    'inverted': ({'q99': [9.0, -9.0, *[99.0] * 6]}, 'dimension 1: q99 -9 is below q01 -2'),
    'overflow': ({'q01': [-1e308] * 8, 'q99': [1e308] * 8}, 'q99 - q01 overflows'),
    'absent': ({'q01': None}, 'needs q01 and q99, but q01 is missing; found: '),
    'length': ({'q01': [0.0] * 7}, 'q01 has 7 dimensions, q99 has 8'),
    'text': ({'q01': ['0'] * 8}, 'state.q01: expected a list of numbers'),
    'booleans': ({'q01': [True] * 8}, 'state.q01: expected a list of numbers'),
    'number': ({'q01': 0.0}, r'state.q01: expected a list of numbers, found shape \(\)'),
    'nested': ({'q01': [[0.0] * 8]}, 'state.q01: expected a list of numbers'),
    'nothing': ({'q01': [], 'q99': []}, r'found shape \(0,\)'),
    'too_big_for_a_float': ({'q01': [10**400] * 8}, 'state.q01: expected a list of numbers'),
}


@pytest.mark.parametrize('change, message', DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_statistics_are_refused(
    tmp_path: Path, franka: RobotSpec, change: dict[str, Any], message: str
):
    path = write_norm_stats(
        tmp_path / 'assets/franka', feature_stats(8) | change, feature_stats(8)
    )
    with pytest.raises(NormError, match=message) as caught:
        load_openpi(tmp_path, franka)
    assert str(path) in str(caught.value)


def test_negative_deviation_is_refused(tmp_path: Path, franka: RobotSpec):
    bad = feature_stats(8) | {'std': [1.0, -1.0, *[1.0] * 6]}
    write_norm_stats(tmp_path / 'assets/franka', feature_stats(8), bad)
    robot = franka.model_copy(update={'normalization': 'zscore'})
    with pytest.raises(NormError, match='actions: dimension 1: std -1 is below 0'):
        load_openpi(tmp_path, robot)


@pytest.mark.parametrize('absent', ['state', 'actions'])
def test_absent_feature_is_refused(tmp_path: Path, franka: RobotSpec, absent: str):
    features = {'state': feature_stats(8), 'actions': feature_stats(8)} | {absent: None}
    write_norm_stats(tmp_path / 'assets/franka', features['state'], features['actions'])
    with pytest.raises(NormError, match=f"no statistics of '{absent}'"):
        load_openpi(tmp_path, franka)


NOT_STATISTICS = {
    'empty': (b'', 'not valid JSON'),
    'truncated': (b'{"norm_stats": {', 'not valid JSON'),
    'not_text': (b'\xff\xfe\x00\x01', 'not valid JSON'),
    'list': (b'[]', 'expected a JSON object, found list'),
    'other_object': (b'{"stats": 1}', "expected the key 'norm_stats'"),
    'nested': (b'[' * 100_000, 'not valid JSON'),
    'huge': (b' ' * (4 * 1024 * 1024 + 1), 'larger than'),
}


@pytest.mark.parametrize('raw, message', NOT_STATISTICS.values(), ids=NOT_STATISTICS.keys())
def test_file_that_is_no_statistics_is_refused(
    tmp_path: Path, franka: RobotSpec, raw: bytes, message: str
):
    path = tmp_path / 'assets/franka/norm_stats.json'
    path.parent.mkdir(parents=True)
    path.write_bytes(raw)
    with pytest.raises(NormError, match=message):
        load_openpi(tmp_path, franka)


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=9)
        | st.dictionaries(
            st.sampled_from(['norm_stats', 'state', 'actions', 'q01', 'q99', 'mean']), inner
        )
    ),
)


@given(_JSON)
def test_any_json_is_a_norm_error(tmp_path_factory: pytest.TempPathFactory, content: Any):
    root = tmp_path_factory.getbasetemp() / 'fuzzed'
    path = root / 'assets/franka/norm_stats.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    with pytest.raises(NormError, match='norm_stats.json'):
        load_openpi(root, load_robot('franka'))


# lerobot


def test_lerobot_quantiles_by_hand(tmp_path: Path, franka_like: RobotSpec):
    """2 (x - q01) / (q99 - q01) - 1, without an epsilon where the quantiles differ."""
    stats = load_lerobot(
        tmp_path, franka_like, 'QUANTILES', feature_stats(8), feature_stats(8, 3.0)
    )
    assert stats.state is not None
    assert stats.describe() == 'state quantile, actions quantile (lerobot)'
    assert stats.state.normalize(np.full(8, 0.25))[0] == 2 * (0.25 + 1.0) / 2.0 - 1
    assert stats.actions.unnormalize(np.zeros((1, 8)))[0, 0] == 0.0


def test_lerobot_equal_quantiles_divide_by_its_epsilon(tmp_path: Path, franka_like: RobotSpec):
    entry = feature_stats(8)
    entry['q01'][4] = entry['q99'][4] = 0.5
    stats = load_lerobot(tmp_path, franka_like, 'QUANTILES', entry, entry)
    assert stats.state is not None
    assert stats.state.divisor[4] == 1e-8
    assert stats.state.normalize(np.full(8, 0.5))[4] == -1.0


def test_lerobot_mean_and_deviation_by_hand(tmp_path: Path, franka_like: RobotSpec):
    """lerobot divides by std + eps but multiplies by std alone."""
    entry = feature_stats(8) | {'std': [0.0, *[2.0] * 7]}
    stats = load_lerobot(tmp_path, franka_like, 'MEAN_STD', entry, entry)
    assert stats.state is not None
    assert stats.describe() == 'state zscore, actions zscore (lerobot)'
    assert stats.state.normalize(np.full(8, 4.0))[1] == (4.0 - 2.0) / (2.0 + 1e-8)
    assert stats.state.divisor[0] == 1e-8
    np.testing.assert_array_equal(stats.actions.unnormalize(np.ones((1, 8)))[0, :2], [1.0, 4.0])


def test_robot_files_mode_is_not_used_where_the_checkpoint_says_it(
    tmp_path: Path, franka_like: RobotSpec
):
    assert franka_like.normalization == 'quantile'
    stats = load_lerobot(tmp_path, franka_like, 'MEAN_STD', feature_stats(8), feature_stats(8))
    assert stats.actions.mode == 'zscore'


def test_lerobot_without_the_statistics_of_its_mode_is_refused(
    tmp_path: Path, franka_like: RobotSpec
):
    entry = {'mean': [0.0] * 8, 'std': [1.0] * 8}
    with pytest.raises(NormError, match='observation.state: quantile normalisation needs q01'):
        load_lerobot(tmp_path, franka_like, 'QUANTILES', entry, entry)


def test_lerobot_statistics_of_another_robot_are_refused(tmp_path: Path, franka_like: RobotSpec):
    with pytest.raises(NormError, match='state has 8 dims in the robot file, norm stats have 6'):
        load_lerobot(tmp_path, franka_like, 'QUANTILES', feature_stats(6), feature_stats(8))


@pytest.fixture
def franka_like(franka: RobotSpec) -> RobotSpec:
    """The Franka without deltas, which a lerobot checkpoint has only where it says so."""
    actions = tuple(dim.model_copy(update={'delta_to_state': False}) for dim in franka.actions)
    return franka.model_copy(update={'actions': actions})
