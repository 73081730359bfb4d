# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What is installed, and whether it goes together, in folders with distributions made for each test."""

import textwrap
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from composer_bema import environment
from composer_bema.averaging import kernels
from composer_bema.cli import main
from composer_bema.environment import broken_requirements, entry_points, import_all, installed_version, requirement_of

Install = Callable[..., None]

OURS = ['Requires-Python: >=3.10', 'Requires-Dist: torch>=2.6', 'Requires-Dist: mosaicml<0.33,>=0.31']


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts distributions into a folder that is all that metadata are read from, and modules before all others."""
    monkeypatch.syspath_prepend(tmp_path)

    # Not a finder: there may be another, for importlib_metadata puts one of its own in the place of Python's.
    def discover(name: str | None = None) -> Iterable[metadata.Distribution]:
        context = metadata.DistributionFinder.Context(name=name, path=[str(tmp_path)])
        return metadata.MetadataPathFinder.find_distributions(context)

    monkeypatch.setattr(metadata.Distribution, 'discover', discover)

    def install(name: str, *fields: str, version: str = '1.0', module: str = '', points: str = '') -> None:
        folder = tmp_path / f'{name.replace("-", "_")}-{version}.dist-info'
        folder.mkdir()
        lines = ['Metadata-Version: 2.1', f'Name: {name}', f'Version: {version}', *fields]
        (folder / 'METADATA').write_text('\n'.join(lines) + '\n')
        (folder / 'entry_points.txt').write_text(points)
        for imported_as in filter(None, [environment.COMPONENTS.get(name)]):
            (tmp_path / f'{imported_as}.py').write_text(module)

    return install


def test_what_goes_together_breaks_nothing(install: Install):
    install('composer_bema', *OURS)
    install('torch', 'Requires-Dist: numpy; extra == "opt-einsum"', version='2.7.0+cu128')
    install('mosaicml', 'Requires-Dist: torch<2.7.1,>=2.6.0', version='0.32.1')
    assert broken_requirements() == []
    assert installed_version('mosaicml') == '0.32.1'
    assert installed_version('trl') is None


def test_a_version_that_is_not_the_one_asked_for_is_named_with_who_asks(install: Install):
    install('composer_bema', *OURS)
    install('torch', version='2.5.1')
    install('mosaicml', 'Requires-Dist: torch<2.7.1,>=2.6.0', version='0.34.0')
    assert broken_requirements() == [
        'composer_bema 1.0 needs torch>=2.6, and torch 2.5.1 is installed.',
        'composer_bema 1.0 needs mosaicml<0.33,>=0.31, and mosaicml 0.34.0 is installed.',
        'mosaicml 0.34.0 needs torch<2.7.1,>=2.6.0, and torch 2.5.1 is installed.',
    ]


def test_what_is_missing_is_named(install: Install):
    install('composer_bema', *OURS)
    install('torch', version='2.7.0')
    assert broken_requirements() == ['composer_bema 1.0 needs mosaicml<0.33,>=0.31, which is not installed.']


def test_an_extra_binds_only_what_is_installed_and_no_tools(install: Install):
    install(
        'composer_bema',
        'Provides-Extra: trl',
        'Provides-Extra: peft',
        'Provides-Extra: lint',
        "Requires-Dist: trl<0.21,>=0.20; extra == 'trl'",
        "Requires-Dist: peft<0.17; extra == 'peft'",
        "Requires-Dist: ruff==0.17.6; extra == 'lint'",
    )
    install('trl', version='1.16.0')
    install('ruff', version='0.1.0')
    assert broken_requirements() == ['composer_bema[trl] needs trl<0.21,>=0.20, and trl 1.16.0 is installed.']
    assert requirement_of('trl') == '<0.21,>=0.20 with [trl]'
    assert requirement_of('torch') == ''


def test_another_python_is_named(install: Install):
    install('composer_bema', 'Requires-Python: <3.0')
    (sentence,) = broken_requirements()
    assert sentence.startswith('composer_bema 1.0 needs Python<3.0, and this is Python 3.')
    assert requirement_of('Python') == '<3.0'


def test_the_package_itself_may_not_be_installed(install: Install):
    install('torch')
    (sentence,) = broken_requirements()
    assert sentence == "composer_bema is not installed, only found on Python's path: install it with pip."
    assert requirement_of('torch') == requirement_of('Python') == ''


def test_broken_metadata_are_named(install: Install, tmp_path: Path):
    install('composer_bema', *OURS)
    install('mosaicml', version='0.32.1')
    install('torch', version='2.7.0')
    install('peft', 'Requires-Dist: torch ~~ 2')
    (tmp_path / 'torch-2.7.0.dist-info/METADATA').unlink()
    sentences = '\n'.join(broken_requirements())
    assert 'The requirements of torch cannot be checked: The metadata of torch are broken: install it' in sentences
    assert 'The requirements of peft cannot be checked: ' in sentences


def test_entry_points_are_ours_alone(install: Install):
    points = """
        [llmfoundry_algorithms]
        bema = composer_bema.algorithms:BEMA
        ema = composer_bema.algorithms:EMA

        [llmfoundry_callbacks]
        other = other_package:Callback
    """
    install('composer_bema', points=textwrap.dedent(points))
    assert entry_points() == {
        'llmfoundry_algorithms': ['bema', 'ema'],
        'llmfoundry_schedulers': [],
        'llmfoundry_callbacks': [],
    }


TORCH = """
import os, sys
print('noise'); os.write(1, b'noise'); print('noise', file=sys.stderr)
get_num_threads = lambda: 5
class cuda:
    device_count = lambda: 1
    get_device_name = lambda i: 'Card'
class backends:
    class mps:
        is_available = lambda: False
"""


def test_what_cannot_be_imported_is_named_and_the_rest_is_tried(install: Install):
    install('torch', module=TORCH)
    install('peft', module='import nothing_of_this_name')
    install('llm-foundry', module='raise SystemExit(3)')
    points = '[llmfoundry_algorithms]\nbema = composer_bema.version:BEMMA\nbemma = composer_bema.version:__version__\n'
    install('composer_bema', points=points)
    devices, without_kernels, problems = import_all()
    assert devices == ['CPU (5 threads)', 'cuda:0 (Card)']
    # They need more of torch than this one has.
    assert without_kernels
    assert problems == [
        "peft cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this_name'",
        'llmfoundry cannot be imported: SystemExit: 3',
        "composer_bema.version:BEMMA cannot be imported: AttributeError: module 'composer_bema.version' has no "
        "attribute 'BEMMA'",
    ]


def test_an_import_that_ends_python_is_named(install: Install):
    install('torch', module=TORCH)
    install('trl', module='import os; os._exit(7)')
    devices, without_kernels, problems = import_all()
    assert len(devices) == 2 and without_kernels == 'not tried'
    assert problems == ['Importing trl ends Python, with exit code 7.']


def test_an_import_that_takes_too_long_is_named(install: Install, monkeypatch: pytest.MonkeyPatch):
    install('trl', module='import time; time.sleep(100)')
    monkeypatch.setattr(environment, '_TIMEOUT', 1.0)
    assert import_all().problems == ['Importing trl takes more than 1 seconds.']


def test_the_command_says_what_is_wrong(install: Install):
    install('composer_bema', *OURS)
    install('torch', version='2.5.1', module=TORCH)
    install('trl', module='import nothing_of_this_name')
    result = CliRunner().invoke(main, ['doctor'])
    assert result.exit_code == 1
    assert 'torch               2.5.1        >=2.6' in result.stdout
    assert 'mosaicml            -            <0.33,>=0.31' in result.stdout
    assert 'devices: CPU (5 threads), cuda:0 (Card)\ncompiled kernels: none, averages in host' in result.stdout
    assert result.stdout.count('\n- ') == 3
    assert "- trl cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this_name'\n" in result.stdout
    assert 'goes together' not in result.stdout


def test_what_the_tests_run_with_goes_together():
    """Imports all that is installed here."""
    result = CliRunner().invoke(main, ['doctor'])
    assert result.exit_code == 0, result.output
    assert 'llmfoundry_algorithms: bema, dema, ema, lawa, ouema, swa_window\n' in result.stdout
    assert 'devices: CPU (' in result.stdout
    assert ('compiled kernels: yes\n' in result.stdout) == (kernels._compiled() is not None)
    assert result.stdout.endswith('\nWhat is installed goes together.\n')
