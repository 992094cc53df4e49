"""Ticks come at the rate that was asked for, and nothing that can be avoided makes one late."""

from __future__ import annotations

import gc

import pytest
from helpers import SmallPolicy, bench
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter

from pi05_ros.policy.robot import load_robot
from pi05_ros.ros.direct_take import DirectTakeError

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('ros')]

SUCCESS = TransitionCallbackReturn.SUCCESS


def test_a_rate_that_is_set_while_inactive_holds_from_the_next_activation_on():
    def set_rate(rate_hz: float) -> bool:
        (result,) = b.node.set_parameters([Parameter('rate_hz', value=rate_hz)])
        return result.successful

    with bench(parameters={'rate_hz': 20.0}) as b:
        b.start()
        assert not set_rate(50.0)
        assert b.node.trigger_deactivate() == SUCCESS
        assert set_rate(50.0)
        assert b.node.trigger_activate() == SUCCESS
        b.until(lambda: b.observer.values('Action').get('Target frequency (Hz)') == '50.0')
        assert b.node._tick_timer.timer_period_ns == 20_000_000


def test_collections_between_ticks_do_not_walk_what_was_loaded():
    with bench() as b:
        assert b.configure()
        assert gc.get_freeze_count() > 0
        assert b.node.trigger_cleanup() == SUCCESS
        assert gc.get_freeze_count() == 0


def test_ticks_are_rehearsed_on_the_images_that_are_there():
    policy = SmallPolicy(load_robot('franka'))
    with bench(policy, {'rate_hz': 10.0}) as b:
        b.start()
        b.until(lambda: len(policy.rehearsed) >= 3)
        assert set(policy.rehearsed[-1].images) == {'base', 'wrist'}


def test_what_would_take_long_is_not_rehearsed(monkeypatch: pytest.MonkeyPatch):
    def refuse(node: object) -> None:
        raise DirectTakeError('not here')

    monkeypatch.setattr('pi05_ros.ros.session.checked_rcl', refuse)
    policy = SmallPolicy(load_robot('franka'))
    with bench(policy, {'rate_hz': 10.0}) as b:
        b.start()
        b.until(lambda: len(b.observer.chunks) >= 3)
        assert policy.rehearsed == []


@pytest.mark.parametrize(
    ('found', 'told'),
    [
        ('broken', 'RuntimeError: broken'),
        ('CUDA error: an illegal memory access was encountered', 'CUDA is dead in this process'),
    ],
)
def test_what_a_tick_would_meet_in_its_rehearsal_stops_the_node(found: str, told: str):
    policy = SmallPolicy(load_robot('franka'))

    def break_down(observation: object, **call: object) -> None:
        raise RuntimeError(found)

    policy.rehearse = break_down  # type: ignore[method-assign]
    with bench(policy, {'rate_hz': 10.0}) as b:
        b.start()
        b.until(lambda: b.node.lifecycle_state == 'unconfigured')
        assert b.node.last_error.startswith(f'act: {told}')


def test_every_action_is_followed_by_the_preparation_of_the_next_tick():
    policy = SmallPolicy(load_robot('franka'))
    with bench(policy, {'seed': 7}) as b:
        b.start()
        b.until(lambda: len(b.observer.chunks) >= 3)
        following = [(chunk.tick + 1, 7) for chunk in b.observer.chunks[:3]]
        assert policy.prepared[:3] == following
