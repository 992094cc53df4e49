"""``~/doctor`` of a real node, asked over DDS."""

from __future__ import annotations

import pytest
from helpers import CameraScript, Sensors, bench
from rclpy.qos import QoSProfile, ReliabilityPolicy
from std_srvs.srv import Trigger

pytestmark = [pytest.mark.ros, pytest.mark.usefixtures('ros')]

BEST_EFFORT = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)


def ask(b) -> Trigger.Response:
    client = b.observer.node.create_client(Trigger, 'pi05_policy/doctor')
    b.until(client.service_is_ready)
    future = client.call_async(Trigger.Request())
    b.until(future.done)
    return future.result()


def discovered(b, count: int) -> bool:
    """Tell whether the node knows the publishers of its inputs."""
    names = ('camera/base/image_raw', 'camera/wrist/image_raw', 'joint_states')
    return sum(b.node.count_publishers(name) for name in names) == count


def test_node_that_is_fine_says_so():
    with bench() as b:
        b.start()
        b.until(lambda: b.observer.chunks)
        answer = ask(b)
        assert (answer.success, answer.message) == (True, 'nothing is wrong')


def test_missing_camera_is_named_before_the_node_is_configured():
    with bench(sensors=Sensors(cameras={'base': CameraScript()})) as b:
        b.until(lambda: discovered(b, 2))
        answer = ask(b)
        assert not answer.success
        assert answer.message.startswith('nobody publishes on /camera/wrist/image_raw (ROS_DOMAIN')


def test_qos_that_does_not_match_is_named_with_the_remedy():
    reliable = {'cameras.base.reliability': 'reliable'}
    with bench(parameters=reliable, sensors=Sensors(qos=BEST_EFFORT)) as b:
        b.until(lambda: discovered(b, 3))
        answer = ask(b)
        assert answer.message == (
            '/test_sensors publishes /camera/base/image_raw with other QoS: '
            'it offers best_effort; set cameras.base.reliability: best_effort'
        )


def test_robot_description_that_nobody_sends_is_named_where_it_is_needed():
    with bench(parameters={'limits_source': 'both'}) as b:
        b.until(lambda: discovered(b, 3))
        answer = ask(b)
        assert answer.message.startswith('nobody publishes on /robot_description (ROS_DOMAIN_ID')


def test_parameter_that_is_wrong_is_named():
    with bench(parameters={'rate': 5.0}) as b:
        assert ask(b).message == 'parameters: unknown parameter rate; did you mean rate_hz?'


def test_failed_transition_is_named():
    with bench() as b:
        b.node.last_error = 'configure: no such checkpoint'
        b.until(lambda: discovered(b, 3))
        assert ask(b).message == 'Lifecycle: [ERROR] unconfigured; configure: no such checkpoint'
