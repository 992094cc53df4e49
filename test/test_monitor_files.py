"""The files for other tools name what the node really publishes, and ask for."""

from __future__ import annotations

import ast
import json
import re
import struct
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    QoSCompatibility,
    QoSProfile,
    ReliabilityPolicy,
    qos_check_compatible,
)

from pi05_ros.control.parameter_file import NODE_NAME
from pi05_ros.control.status import CONFIGURED_PARTS
from pi05_ros.control.topics import TASK_PROMPT, InputTopic
from pi05_ros.msg import StageTiming
from pi05_ros.ros.subscriptions import input_qos

pytestmark = pytest.mark.ros

CONFIG = Path(__file__).parents[1] / 'config'
STATUSES = {f'{NODE_NAME}: {part}' for part in ('Lifecycle', *CONFIGURED_PARTS)}
TIMING = f'/{NODE_NAME}/timing'
# rqt_plot and PlotJuggler plot numbers, not text and not what is inside of the header.
PLOTTABLE = {
    f'{TIMING}/{name}'
    for name, kind in StageTiming.get_fields_and_field_types().items()
    if kind in ('double', 'float', 'uint64')
}


def test_every_status_belongs_to_exactly_one_analyzer():
    document = yaml.safe_load((CONFIG / 'diagnostic_analyzers.yaml').read_text('utf-8'))
    group = document['analyzers']['ros__parameters'][NODE_NAME]
    assert group['type'] == 'diagnostic_aggregator/AnalyzerGroup'
    matched = [name for analyzer in group['analyzers'].values() for name in analyzer['contains']]
    assert sorted(matched) == sorted(STATUSES)


def test_analyzers_have_what_the_aggregator_wants():
    """It creates an analyzer when it has seen path and type; without a match it does nothing."""
    document = yaml.safe_load((CONFIG / 'diagnostic_analyzers.yaml').read_text('utf-8'))
    group = document['analyzers']['ros__parameters'][NODE_NAME]
    for analyzer in group['analyzers'].values():
        assert set(analyzer) == {'type', 'path', 'contains', 'timeout'}
        assert analyzer['type'] == 'diagnostic_aggregator/GenericAnalyzer'
        assert isinstance(analyzer['timeout'], float)  # an integer would be another ROS type


def perspective_keys(group: dict) -> dict:
    """Return the values of a group as rqt reads them."""
    assert all(value['type'] == 'repr' for value in group['keys'].values())
    return {key: ast.literal_eval(value['repr']) for key, value in group['keys'].items()}


def test_perspective_opens_the_monitor_and_plots_numbers_of_the_timing():
    document = json.loads((CONFIG / 'pi05_ros.perspective').read_text('utf-8'))
    manager = document['groups']['pluginmanager']
    running = perspective_keys(manager)['running-plugins']
    assert running == {'rqt_plot/Plot': [1], 'rqt_runtime_monitor/RuntimeMonitor': [1]}
    plot = manager['groups']['plugin__rqt_plot__Plot__1']['groups']['plugin']
    topics = perspective_keys(plot)['topics']
    assert len(topics) > 1  # rqt stores a list of one as a plain string
    assert set(topics) <= PLOTTABLE


def test_perspective_opens_wide_enough_to_read_and_shows_ten_seconds():
    document = json.loads((CONFIG / 'pi05_ros.perspective').read_text('utf-8'))
    plot = document['groups']['pluginmanager']['groups']['plugin__rqt_plot__Plot__1']
    keys = perspective_keys(plot['groups']['plugin'])
    # rqt_plot stores limits as text.
    assert [float(limit) for limit in keys['x_limits']] == [0.0, 10.0]
    assert float(keys['y_limits'][0]) == 0.0
    geometry = document['groups']['mainwindow']['keys']['geometry']
    assert geometry['type'] == 'repr(QByteArray.hex)'
    (found,) = re.findall(r"^QtCore\.QByteArray\(b'([0-9a-f]+)'\)$", geometry[geometry['type']])
    # Qt's saveGeometry: magic, version 3.0, then the frame's rectangle (inclusive corners).
    magic, major, _, left, top, right, bottom = struct.unpack_from('>IHH4i', bytes.fromhex(found))
    assert (magic, major) == (0x1D9D0CB, 3)
    assert (right - left + 1, bottom - top + 1) == (1280, 800)


def test_bag_play_offers_the_task_as_the_node_asks_for_it():
    (overrides,) = yaml.safe_load((CONFIG / 'bag_play_qos.yaml').read_text('utf-8')).items()
    topic, profile = overrides
    assert topic == f'/{TASK_PROMPT}'
    nothing = {'sec': 0, 'nsec': 0}
    assert {key: profile[key] for key in profile if profile[key] == nothing} == {
        'deadline': nothing,
        'lifespan': nothing,
        'liveliness_lease_duration': nothing,
    }
    # rosbag2's player component refuses a profile without any of its keys.
    assert (profile['liveliness'], profile['avoid_ros_namespace_conventions']) == (
        'automatic',
        False,
    )
    offered = QoSProfile(
        depth=profile['depth'],
        history=HistoryPolicy.get_from_short_key(profile['history']),
        reliability=ReliabilityPolicy.get_from_short_key(profile['reliability']),
        durability=DurabilityPolicy.get_from_short_key(profile['durability']),
    )
    wanted = input_qos(InputTopic(TASK_PROMPT, TASK_PROMPT, '', 'reliable', latched=True))
    verdict, why = qos_check_compatible(offered, wanted)
    assert verdict != QoSCompatibility.ERROR, why


def test_plotjuggler_plots_every_time_of_the_timing():
    root = ElementTree.parse(CONFIG / 'plotjuggler_layout.xml').getroot()
    curves = [curve.get('name') for curve in root.iter('curve')]
    assert len(curves) == len(set(curves))
    assert set(curves) == PLOTTABLE - {f'{TIMING}/tick'}
    streamer = root.find('previouslyLoaded_Streamer').get('name')
    (plugin,) = root.find('Plugins')
    assert plugin.get('ID') == streamer
    assert plugin.find('selected_topics').get('value') == TIMING


def test_splitters_of_the_layout_count_their_areas():
    root = ElementTree.parse(CONFIG / 'plotjuggler_layout.xml').getroot()
    for splitter in root.iter('DockSplitter'):
        assert int(splitter.get('count')) == len(splitter)
        assert len(splitter.get('sizes').split(';')) == len(splitter)
