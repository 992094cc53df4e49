"""Files that are shipped with the package: configuration, launch files and the demo bag."""

from __future__ import annotations

from pathlib import Path

from pi05_ros.model.errors import Pi05Error

_PACKAGE = 'pi05_ros'


def share_dir() -> Path:
    """Directory that holds config/, launch/ and msg/.

    Running from a source tree it is that tree, so that an edit takes effect; otherwise it is
    share/pi05_ros of the prefix into which the package was installed.

    Raises:
        Pi05Error: the modules were copied somewhere without the rest of the package.
    """
    return _share_dir_of(Path(__file__).resolve().parent)


def _share_dir_of(package_dir: Path) -> Path:
    tree = package_dir.parent
    if (tree / 'package.xml').is_file() and (tree / 'config').is_dir():
        return tree
    # <prefix>/lib/python3.x/site-packages/pi05_ros, or Debian's <prefix>/local/lib/...
    for prefix in package_dir.parents:
        share = prefix / 'share' / _PACKAGE
        if (share / 'package.xml').is_file():
            return share
    raise Pi05Error(
        f'{package_dir}: no share/{_PACKAGE} beside these modules and no source tree around '
        f'them; install the package with `colcon build` or `pip install .`'
    )


def config_dir() -> Path:
    """Directory of the parameter files, transport profiles and rqt files."""
    return share_dir() / 'config'


def robot_dir() -> Path:
    """Directory of the shipped robot files (NAME.yaml)."""
    return config_dir() / 'robots'


def demo_bag() -> Path:
    """Directory of the recorded bag that the demo plays."""
    share = share_dir()
    for folder in (share / 'demo', share / 'test' / 'data'):
        bag = folder / 'libero_spatial_bowl'
        if (bag / 'metadata.yaml').is_file():
            return bag
    raise Pi05Error(f'{share}: the demo bag libero_spatial_bowl is missing; reinstall {_PACKAGE}')
