"""The pip door of pi05_ros: runs CMakeLists.txt and packs what it installs into the wheel.

What is installed is described in CMakeLists.txt alone. ROS 2 with its message generators comes
from a sourced installation (AMENT_PREFIX_PATH), else from the packages of
requirements/kilted.txt or requirements/jazzy.txt in the environment of this Python.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# What the generators of ROS 2 import, and the package of the lock files that has it.
GENERATOR_MODULES = {
    'ament_package': 'ros-ament-package',
    'catkin_pkg': 'catkin-pkg',
    'em': 'empy<4',
    'lark': 'lark',
    'numpy': 'numpy',
    'rosidl_generator_py': 'ros-rosidl-generator-py',
}

# ROS 2 is not in this list: it is either sourced, or installed from requirements/.
REQUIREMENTS = [
    'matplotlib',
    'numpy',
    'nvidia-ml-py',
    'pillow',
    'pydantic>=2',
    'pyyaml',
    'rich',
    'rosbags>=0.10',
    'safetensors',
    'sentencepiece',
    'torch>=2.8',  # CUDA graphs record events
]


class BuildError(SystemExit):
    """Ends the build with one message and no traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f'pi05_ros: {message}')


def ros_prefixes() -> list[str]:
    """Prefixes in which CMake looks for ROS 2, the sourced ones first."""
    prefixes = [p for p in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if p]
    if sys.prefix not in prefixes:
        prefixes.append(sys.prefix)
    if not any(Path(p, 'share', 'rosidl_default_generators').is_dir() for p in prefixes):
        raise BuildError(
            f'no ROS 2 message generators in {", ".join(prefixes)}; source a ROS 2 installation, '
            f'or install them: pip install -r requirements/kilted.txt -r requirements/python.txt'
        )
    return prefixes


def sourced_python_paths() -> list[str]:
    """Directories with the Python modules of the sourced ROS 2."""
    version = f'python{sys.version_info.major}.{sys.version_info.minor}'
    places = (
        Path(prefix, lib, version_dir, packages)
        for prefix in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep)
        if prefix and Path(prefix).resolve() != Path(sys.prefix).resolve()
        for lib in ('lib', 'local/lib')
        for version_dir, packages in (
            (version, 'site-packages'), (version, 'dist-packages'), ('python3', 'dist-packages')
        )
    )  # fmt: skip
    return [str(place) for place in places if place.is_dir()]


def generator_environment() -> dict[str, str]:
    """Environment for CMake: that of the target Python, not pip's isolated one."""
    env = dict(os.environ)
    # pip hides the environment's own packages behind a PYTHONPATH of its own and forgets the one
    # that sourcing ROS 2 had set.
    env.pop('PYTHONNOUSERSITE', None)
    paths = [p for p in env.pop('PYTHONPATH', '').split(os.pathsep) if 'pip-build-env' not in p]
    paths += sourced_python_paths()
    if paths := list(dict.fromkeys(filter(None, paths))):
        env['PYTHONPATH'] = os.pathsep.join(paths)
    env['AMENT_PREFIX_PATH'] = os.pathsep.join(ros_prefixes())
    env['CMAKE_PREFIX_PATH'] = os.pathsep.join(
        [*ros_prefixes(), *filter(None, [env.get('CMAKE_PREFIX_PATH')])]
    )
    probe = '; '.join(
        f'importlib.util.find_spec({module!r}) or print({module!r})'
        for module in GENERATOR_MODULES
    )
    result = subprocess.run(
        [sys.executable, '-c', f'import importlib.util; {probe}'],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    if missing := result.stdout.split():
        packages = ' '.join(f"'{GENERATOR_MODULES[module]}'" for module in missing)
        raise BuildError(
            f'{sys.executable} lacks what the ROS 2 message generators import '
            f'({", ".join(missing)}); pip install {packages}, or for a sourced ROS 2 use a '
            f'virtual environment with --system-site-packages'
        )
    return env


def build_tool(name: str) -> str:
    """Path of the program cmake or ninja."""
    try:
        # Of these packages' programs on PATH some are scripts that import the package, which the
        # target environment need not have.
        package = importlib.import_module(name)
        folder = getattr(package, 'CMAKE_BIN_DIR', None) or package.BIN_DIR
    except (ImportError, AttributeError):
        folder = None
    beside_python = str(Path(sys.executable).parent)
    places = filter(None, (folder, os.environ.get('PATH'), beside_python))
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise BuildError(f'{name} was not found; pip install {name}')
    return found


class CMakeBuild(build_py):
    """Fills the wheel with what `cmake --install` installs."""

    editable_mode = False

    def run(self) -> None:
        """Configure, build, install into a staging directory, and take it over."""
        if self.editable_mode:
            raise BuildError(
                'an editable install cannot hold the generated messages; install with '
                '`pip install .` and run from the source tree, whose modules then come first'
            )
        for compiler, variable in (('cc', 'CC'), ('c++', 'CXX')):
            if not os.environ.get(variable) and shutil.which(compiler) is None:
                raise BuildError(
                    f'no {compiler}: a C and a C++ compiler build the messages '
                    f'(Debian and Ubuntu: apt install build-essential)'
                )
        work = Path(self.get_finalized_command('build').build_temp).resolve()
        shutil.rmtree(work, ignore_errors=True)
        stage = work / 'stage'
        self._run_cmake(work / 'cmake', stage)
        shutil.copytree(
            stage / 'python' / 'pi05_ros', Path(self.build_lib, 'pi05_ros'), dirs_exist_ok=True
        )
        shutil.rmtree(stage / 'python')
        self.distribution.data_files = [
            (str(folder.relative_to(stage)), [str(f) for f in files])
            for folder in sorted({f.parent for f in stage.rglob('*') if f.is_file()})
            if (files := sorted(f for f in folder.iterdir() if f.is_file()))
        ]

    @staticmethod
    def _run_cmake(build: Path, stage: Path) -> None:
        env = generator_environment()
        cmake = build_tool('cmake')
        configure = [
            cmake, '-S', str(ROOT), '-B', str(build), '-G', 'Ninja',
            f'-DCMAKE_MAKE_PROGRAM={build_tool("ninja")}',
            f'-DCMAKE_INSTALL_PREFIX={stage}',
            '-DCMAKE_BUILD_TYPE=Release',
            '-DCMAKE_INSTALL_MESSAGE=NEVER',
            '-DPYTHON_INSTALL_DIR=python',
            f'-DPython3_EXECUTABLE={sys.executable}',
            # A sourced ROS 2 does not put the libraries of this environment on the search path.
            '-DCMAKE_INSTALL_RPATH=$ORIGIN;$ORIGIN/../../..',
        ]  # fmt: skip
        build_and_install = ([cmake, action, str(build)] for action in ('--build', '--install'))
        for command in (configure, *build_and_install):
            if subprocess.run(command, env=env, stdin=subprocess.DEVNULL).returncode != 0:
                raise BuildError(f'failed: {" ".join(command)} (its output is above)')


class PlatformDistribution(Distribution):
    """A distribution whose wheel belongs to one Python and one platform."""

    def has_ext_modules(self) -> bool:
        """The generated messages are compiled."""
        return True


def main() -> None:
    """Hand the metadata to setuptools."""
    manifest = ElementTree.parse(ROOT / 'package.xml').getroot()
    setup(
        name='pi05_ros',
        version=manifest.findtext('version'),
        description=' '.join((manifest.findtext('description') or '').split()),
        license='Apache-2.0',
        python_requires='>=3.10',
        packages=['pi05_ros'],
        install_requires=REQUIREMENTS,
        entry_points={
            'console_scripts': [
                'pi05-ros = pi05_ros.tools.cli:main',
                'policy_node = pi05_ros.policy_node:main',
            ],
        },
        cmdclass={'build_py': CMakeBuild},
        distclass=PlatformDistribution,
        zip_safe=False,
    )


if __name__ == '__main__':
    main()
