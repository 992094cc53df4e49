"""The files for rqt_robot_monitor, rqt and PlotJuggler name what the node really publishes."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from pi05_ros.control.parameter_file import NODE_NAME
from pi05_ros.control.status import CONFIGURED_PARTS
from pi05_ros.msg import StageTiming

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
