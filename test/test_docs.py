"""The documents say what the code does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from pi05_ros.control.parameter_table import parameter_specs
from pi05_ros.control.reasons import Reason
from pi05_ros.launch_arguments import ARGUMENTS
from pi05_ros.msg import ActionChunk, StageTiming
from pi05_ros.tools.cli import COMMANDS

pytestmark = pytest.mark.ros

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
DOCUMENTS = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')])
CAMERAS = ('base', 'wrist')


def load_script(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def tables():
    return load_script(ROOT / 'docs' / 'write_tables.py')


def first_cells(heading: str) -> list[str]:
    """Return the code words in the first column of the tables below a heading."""
    section = README.split(f'\n## {heading}\n')[1].split('\n## ')[0]
    return re.findall(r'^\| `([^`]+)` \|', section, flags=re.MULTILINE)


def test_generated_tables_are_up_to_date(tables):
    assert tables.with_tables(README) == README, 'run: python docs/write_tables.py'


def test_every_table_has_its_place_in_the_readme(tables):
    assert set(re.findall(r'<!-- table: (\w+) -->', README)) == set(tables.TABLES)


def test_parameters_are_listed_and_no_others():
    shown = first_cells('Parameters')
    expected = [
        re.sub(r'^cameras\.base', 'cameras.<camera>', n) for n in parameter_specs(['base'])
    ]
    assert shown == expected


def test_shipped_parameter_file_names_every_parameter_with_its_default():
    document = yaml.safe_load((ROOT / 'config' / 'policy.yaml').read_text(encoding='utf-8'))
    found = flatten(document['/**']['ros__parameters'])
    assert found == {name: spec.default for name, spec in parameter_specs(CAMERAS).items()}


def flatten(tree: dict, prefix: str = '') -> dict:
    flat: dict = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def test_every_reason_has_a_meaning(tables):
    assert set(tables.REASONS) == set(Reason)


def test_every_status_has_its_levels_described(tables):
    assert [part.part for part in tables.diagnostics_statuses()] == list(tables.LEVELS)


def test_subcommands_and_launch_arguments_are_listed():
    assert first_cells('Tools') == [f'pi05-ros {name}' for name in COMMANDS]
    assert first_cells('Launch arguments') == [argument.name for argument in ARGUMENTS]


def test_shipped_robots_are_named():
    robots = {path.stem for path in (ROOT / 'config' / 'robots').glob('*.yaml')} - {'template'}
    (sentence,) = re.findall(r'action is: shipped are ([^.]+)\.', README)
    assert set(re.findall(r'`(\w+)`', sentence)) == robots


def test_every_topic_that_the_node_names_is_listed_and_no_other():
    shown = {topic.replace('<name>', 'NAME') for topic in first_cells('Topics')}
    sources = [ROOT / 'pi05_ros' / 'control' / 'topics.py', *(ROOT / 'pi05_ros/ros').glob('*.py')]
    text = '\n'.join(source.read_text(encoding='utf-8') for source in sources)
    named = set(re.findall(r"'((?:~/|/diag)[\w/]+)'", text))
    named |= {'joint_states', 'eef_pose', 'task_prompt', 'robot_description'}
    named |= {'joint_trajectory', 'commands', 'joint_commands'}
    named |= {'camera/NAME/image_raw', 'camera/NAME/image_raw/compressed'}
    assert shown == named


@pytest.mark.parametrize('kind', [ActionChunk, StageTiming])
def test_every_field_of_a_message_is_explained_in_its_definition(kind):
    lines = (ROOT / 'msg' / f'{kind.__name__}.msg').read_text(encoding='utf-8').splitlines()
    fields = [line for line in lines if line.strip() and not line.startswith('#')]
    assert [line.split()[1] for line in fields] == list(kind.get_fields_and_field_types())
    assert [line for line in fields if '#' not in line] == []


def test_commands_in_the_documents_exist():
    for document in DOCUMENTS:
        text = document.read_text(encoding='utf-8')
        for command in re.findall(r'pi05-ros ([a-z][a-z-]+)', text):
            assert command in COMMANDS, f'{document.name}: pi05-ros {command}'
        for target in re.findall(r'^make ([a-z-]+)', text, flags=re.MULTILINE):
            makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
            assert f'\n{target}:' in makefile, f'{document.name}: make {target}'


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document):
    text = document.read_text(encoding='utf-8')
    links = re.findall(r'\]\(([^)#\s]+)(?:#[^)]*)?\)', text)
    missing = [
        link for link in links if '://' not in link and not (document.parent / link).exists()
    ]
    assert missing == []


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_links_to_headings_of_the_same_page_lead_somewhere(document):
    text = document.read_text(encoding='utf-8')
    headings = {
        re.sub(r'[^\w\- ]', '', heading).strip().lower().replace(' ', '-')
        for heading in re.findall(r'^#+ (.+)$', text, flags=re.MULTILINE)
    }
    anchors = set(re.findall(r'\]\(#([^)]+)\)', text))
    assert anchors <= headings


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_modules_named_in_the_documents_exist(document):
    text = document.read_text(encoding='utf-8')
    for path in re.findall(
        r'`((?:ros|control|policy|model|engine|tools|test|docs)/[\w/]+\.\w+)`', text
    ):
        roots = (ROOT, ROOT / 'pi05_ros')
        assert any((root / path).exists() for root in roots), f'{document.name}: {path}'
