"""``pi05-ros bench-inputs``: a short run with senders in another process, over real DDS."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pi05_ros.control.cdr import parse_image
from pi05_ros.control.images import NATIVE_ENCODINGS, pixels
from pi05_ros.tools import input_measure
from pi05_ros.tools.cli import main
from pi05_ros.tools.input_measure import PARTS, WAYS

pytestmark = pytest.mark.ros


@pytest.fixture
def options(tmp_path, monkeypatch):
    # The transports of the tests stay, for this process and those that it starts.
    monkeypatch.setattr(input_measure, 'profile_environment', lambda profile: {})
    monkeypatch.setattr(input_measure, '_WARM_UP_TICKS', 3)
    return [
        'bench-inputs', '--duration-s', '2', '--image-size', '32x24', '--device', 'cpu',
        '--json', str(tmp_path / 'inputs.json'),
    ]  # fmt: skip


def test_both_ways_are_measured_side_by_side(options, tmp_path, capsys):
    assert main([*options, '--views', '3', '--encoding', 'bgra8']) == 0
    printed = capsys.readouterr().out
    for word in ('3 x 32x24 bgra8 at 30 Hz', 'direct p50', 'rclpy p50', *PARTS, 'camera_2',
                 'memory of this process'):  # fmt: skip
        assert word in printed
    report = json.loads((tmp_path / 'inputs.json').read_text())
    for way in WAYS:
        values = report['times_ms'][way]
        assert list(values) == list(PARTS)
        for percent in ('50', '99', '100'):
            part = {name: values[name][percent] for name in PARTS}
            assert 0 < part['take'] <= part['inputs together'] <= part['whole tick']
    for name in ('camera_0', 'camera_1', 'camera_2', 'joint_states'):
        assert report['received'][name]['taken'] > 5


def test_more_views_than_the_model_has_are_refused(options, capsys):
    assert main([*options, '--views', '4']) == 2
    assert '4 views, but the model has 3; ask for fewer' in capsys.readouterr().err


@pytest.mark.parametrize('encoding', sorted(NATIVE_ENCODINGS))
def test_senders_send_images_that_the_node_can_read(encoding):
    from rclpy.serialization import serialize_message

    from pi05_ros.tools.bench_sensors import draw_pictures, image_message

    picture = draw_pictures(24, 32, seed=1)[0]
    raw = serialize_message(image_message(picture, encoding))
    image = pixels(parse_image(raw))
    expected = picture[..., :1].repeat(3, axis=2) if encoding == 'mono8' else picture
    np.testing.assert_array_equal(image, expected)
