"""Ticks come at the rate that was asked for, and nothing that can be avoided makes one late."""

from __future__ import annotations

import gc

import pytest
from helpers import SmallPolicy, bench
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter

from pi05_ros.policy.robot import load_robot

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


def test_every_action_is_followed_by_the_preparation_of_the_next_tick():
    policy = SmallPolicy(load_robot('franka'))
    with bench(policy, {'seed': 7}) as b:
        b.start()
        b.until(lambda: len(b.observer.chunks) >= 3)
        following = [(chunk.tick + 1, 7) for chunk in b.observer.chunks[:3]]
        assert policy.prepared[:3] == following
