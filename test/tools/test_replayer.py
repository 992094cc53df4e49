"""When ticks happen, and what each of them sees; the policy only writes down what it gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from bag_files import START_NS, Row, write_bag
from replay_bags import STRING, TYPESTORE, serialize, shipped_rows, write_with_chunks

from pi05_ros.engine.pipeline import StageTimes
from pi05_ros.model.errors import Pi05Error
from pi05_ros.policy.robot import load_robot
from pi05_ros.policy.types import ActionChunk, Observation
from pi05_ros.tools.bag import open_bag
from pi05_ros.tools.remapping import Remapping
from pi05_ros.tools.replayer import Replay, ReplayError, Setup

MS = 1_000_000


class WritingPolicy:
    """Answers with the measured joints and keeps every observation, by tick."""

    def __init__(self) -> None:
        facts = {'checkpoint_sha256': '0' * 64, 'robot': 'franka'}
        self.info = SimpleNamespace(as_dict=lambda: facts)
        self.seen: list[tuple[int, Observation]] = []
        self.is_closed = False
        self.before_act: Callable[[int], None] = lambda tick: None

    def act(self, observation: Observation, *, tick: int, seed: int, num_steps: int | None = None):
        self.before_act(tick)
        self.seen.append((tick, observation))
        return ActionChunk(
            actions=np.tile(observation.state, (2, 1)).astype(np.float32),
            names=tuple('abcdefgh'), step_s=0.05,
            stamp_ns=observation.oldest_stamp_ns, stamps_ns=dict(observation.stamps_ns),
            tick=tick, seed=seed, num_steps=num_steps or 1, prompt=observation.prompt,
            times=StageTimes(0, 0, 0, 0, 0, 0, 0),
        )  # fmt: skip

    def self_check(self, observation: Observation, min_cosine: float) -> tuple:
        return ()

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def policy() -> WritingPolicy:
    return WritingPolicy()


@pytest.fixture
def make(policy: WritingPolicy, tiny_checkpoint: Path):
    def build(**overrides) -> Replay:
        settings = Setup(None, {'checkpoint': str(tiny_checkpoint), **overrides}).settings()
        return Replay(settings, Remapping(), load_policy=lambda settings, sizes: policy)

    return build


def replay(run: Replay, path: Path) -> Replay:
    with open_bag(path) as bag:
        run.run(bag)
    return run


@pytest.mark.parametrize('rate_hz', [7.0, 20.0, 30.0])
def test_ticks_are_all_multiples_of_the_period_from_complete_to_last(make, short_bag, rate_hz):
    run = replay(make(rate_hz=rate_hz), short_bag)
    with open_bag(short_bag) as bag:
        complete_ns, last_ns = bag.start_ns + 7 * MS, bag.start_ns + bag.duration_ns
    period_ns = run.settings.period_ns
    first = -(-complete_ns // period_ns)
    expected = [n * period_ns for n in range(first, last_ns // period_ns + 1)]
    assert [result.now_ns for result in run.results] == expected
    assert [result.tick for result in run.results] == list(range(len(expected)))


def test_a_message_with_the_stamp_of_a_tick_comes_before_it(make, short_bag, policy):
    run = replay(make(), short_bag)
    base = {result.chunk.stamps_ns['base'] - result.now_ns for result in run.results}
    wrist = {result.chunk.stamps_ns['wrist'] - result.now_ns for result in run.results}
    assert base == {0}
    assert wrist == {-43 * MS}


def test_a_tick_sees_nothing_that_came_after_it(make, tmp_path, policy):
    rows = shipped_rows()
    late = [(*row[:2], row[2] + (row[0] == '/camera/base/image_raw'), row[3]) for row in rows]
    run = replay(make(), write_bag(tmp_path / 'bag', late))
    assert {r.chunk.stamps_ns['base'] - r.now_ns for r in run.results} == {-50 * MS}


def test_warm_up_is_no_tick(make, short_bag, policy):
    run = replay(make(), short_bag)
    warm_up, ticks = policy.seen[:3], policy.seen[3:]
    assert len(ticks) == len(run.results)
    assert {observation.stamps_ns['base'] for _, observation in warm_up} == {
        run.results[0].now_ns - 50 * MS
    }


def test_configure_waits_for_a_usable_message_of_every_sensor(make, tmp_path, policy):
    rows = shipped_rows()
    first_wrist = next(i for i, row in enumerate(rows) if 'wrist' in row[0])
    broken = (*rows[first_wrist][:3], rows[first_wrist][3][:1000])
    rows[first_wrist] = broken
    run = replay(make(), write_bag(tmp_path / 'bag', rows))
    start_ns = START_NS + rows[0][2]
    assert run.results[0].now_ns == start_ns + 100 * MS
    assert run.results[0].chunk is not None


def test_a_sensor_that_never_sends_anything_usable_is_named(make, tmp_path, policy):
    spoilt = [(*r[:3], r[3][:1000]) if 'wrist' in r[0] else r for r in shipped_rows()]
    path = write_bag(tmp_path / 'bag', spoilt)
    with pytest.raises(ReplayError, match='never gives a complete observation: .*wrist image'):
        replay(make(), path)
    assert policy.seen == []


def test_a_receive_stamp_of_another_age_ends_the_replay_and_keeps_the_ticks(make, tmp_path):
    rows = shipped_rows()
    stray = (*rows[-1][:2], rows[-1][2] + 2 * 10**18, rows[-1][3])
    run = make()
    with pytest.raises(ReplayError, match=r'no input for 555555\.6 hours before the message on'):
        replay(run, write_bag(tmp_path / 'bag', [*rows, stray]))
    assert len(run.results) == 11


def test_a_pause_of_the_recording_is_counted(make, tmp_path):
    start_ns = shipped_rows()[0][2]
    rows = [row for row in shipped_rows() if not 0.1e9 < row[2] - start_ns < 0.4e9]
    run = replay(make(), write_bag(tmp_path / 'bag', rows))
    reasons = [result.skip and str(result.skip.reason) for result in run.results]
    assert reasons == [*[None] * 3, *['stale_input'] * 5, *[None] * 4]


def test_a_policy_that_breaks_ends_the_replay_and_keeps_the_ticks(make, short_bag, policy):
    def fail(tick: int) -> None:
        if len(policy.seen) == 5:
            raise RuntimeError('device lost')

    policy.before_act = fail
    run = make()
    with pytest.raises(ReplayError, match='tick 2: inference_failed: RuntimeError: device lost'):
        replay(run, short_bag)
    assert [result.chunk is not None for result in run.results] == [True, True, False]
    assert policy.is_closed


def test_policy_is_closed_at_the_end(make, short_bag, policy):
    replay(make(), short_bag)
    assert policy.is_closed


def test_costs_are_those_of_each_tick_and_never_negative(make, short_bag):
    run = replay(make(), short_bag)
    assert len(run.costs) == len(run.results)
    for cost in run.costs:
        parts = (cost.read_ms, cost.push_ms, cost.gate_ms, cost.policy_ms, cost.other_ms)
        assert min(parts) >= 0
        assert cost.overhead_ms == pytest.approx(sum(parts))


def test_settings_come_from_the_section_of_the_remapped_node(tmp_path):
    path = tmp_path / 'params.yaml'
    path.write_text('/left/arm: {ros__parameters: {seed: 5}}\npi05_policy: {ros__parameters: {}}')
    rules = (('__ns', '/left'), ('__node', 'arm'))
    assert Setup(path, {}, Remapping(rules)).settings().seed == 5
    assert Setup(path, {'seed': 6}, Remapping(rules)).settings().seed == 6
    assert Setup(path).settings().seed == 0


def urdf_row(finger_upper: float) -> Row:
    """Return a recorded robot description whose arm has wide limits."""
    joints = ''.join(
        f'<joint name="{dim.joint}" type="revolute"><limit lower="-9" upper="9" velocity="9"/>'
        '</joint>'
        for dim in load_robot('franka').actions[:7]
    )
    finger = '<joint name="panda_finger_joint1" type="prismatic">'
    limit = f'<limit upper="{finger_upper}"/></joint>'
    text = TYPESTORE.types[STRING](data=f'<robot name="r">{joints}{finger}{limit}</robot>')
    return '/robot_description', STRING, 0, serialize(text, STRING)


def test_limits_are_those_of_the_recorded_description_as_in_the_live_node(make, tmp_path):
    path = write_with_chunks(tmp_path / 'bag', [urdf_row(0.01), *shipped_rows()])
    limited, wide = replay(make(limits_source='both'), path), replay(make(), path)
    assert limited.robot.actions[7].max == 0.01
    assert limited.core.guard.clips == {'h': limited.core.counters.actions}
    assert limited.core.counters.actions > 0
    assert wide.core.guard.clips == {}
    assert wide.robot.actions[:7] == limited.robot.actions[:7]


def test_description_that_was_not_recorded_is_an_error_with_the_way_out(make, short_bag):
    with pytest.raises(Pi05Error, match='has no /robot_description; record it, or set limits_so'):
        replay(make(limits_source='urdf'), short_bag)
