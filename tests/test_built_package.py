# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The wheel and the source distribution in ``dist``, and the wheel where `make test-package` has installed it."""

import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from composer_bema import __version__
from composer_bema.averaging import kernels

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif('PACKAGE_PYTHON' not in os.environ, reason='make test-package builds and installs it')


def python(*arguments: str, folder: Path) -> str:
    """What the interpreter that has the wheel prints, in a folder from where the sources are not found."""
    interpreter = ROOT / os.environ['PACKAGE_PYTHON']
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    done = subprocess.run([interpreter, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def package_files() -> set[str]:
    """The files of the package in the repository, without what is made of them."""
    made = ('.pyc', '.so')
    files = (path for path in (ROOT / 'composer_bema').rglob('*') if path.is_file() and path.suffix not in made)
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_the_wheel_holds_the_package_and_nothing_else():
    # One for each platform, whatever the version of Python, for it has the compiled kernels.
    (path,) = (ROOT / 'dist').glob(f'composer_bema-{__version__}-cp310-abi3-*.whl')
    with zipfile.ZipFile(path) as wheel:
        files = {name for name in wheel.namelist() if '.dist-info/' not in name}
        metadata = wheel.read(f'composer_bema-{__version__}.dist-info/METADATA').decode()
    assert {name for name in files if not name.endswith('.so')} == package_files()
    assert {'composer_bema/py.typed', 'composer_bema/training/run_page.html'} <= files
    assert f'\nVersion: {__version__}\n' in metadata


def test_the_source_distribution_holds_what_the_wheel_is_built_from():
    top = f'composer_bema-{__version__}'
    with tarfile.open(ROOT / f'dist/{top}.tar.gz') as archive:
        files = {name.removeprefix(f'{top}/') for name in archive.getnames()}
    assert package_files() | {'setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'CHANGELOG.md'} <= files


def test_the_installed_package_is_the_wheels(tmp_path: Path):
    printed = python('-c', 'import composer_bema as c; print(c.__version__, c.__file__)', folder=tmp_path)
    version, file = printed.split()
    assert version == __version__
    assert not Path(file).is_relative_to(ROOT / 'composer_bema')


def test_the_installed_package_has_compiled_kernels_if_this_one_has(tmp_path: Path):
    there = python('-c', 'from composer_bema.averaging import kernels; print(kernels._compiled())', folder=tmp_path)
    assert (there == 'None\n') == (kernels._compiled() is None)


def test_the_command_answers(tmp_path: Path):
    assert 'doctor' in python('-m', 'composer_bema', '--help', folder=tmp_path)
    assert python('-m', 'composer_bema', '--version', folder=tmp_path).strip().endswith(__version__)
    doctor = python('-m', 'composer_bema', 'doctor', folder=tmp_path)
    assert doctor.endswith('What is installed goes together.\n')


AVERAGING = """
import torch
from composer_bema import functional as cf

model = torch.nn.Linear(2, 2)
state = cf.init_bema(model, update_freq=1, bias_power=None)
start = model.weight.detach().clone()
for _ in range(3):
    with torch.no_grad():
        model.weight += 1
    cf.compute_bema(model, state)
with state.applied_to(model):
    assert ((start < model.weight) & (model.weight < start + 3)).all()
print('averaged')
"""


def test_it_averages(tmp_path: Path):
    assert python('-c', AVERAGING, folder=tmp_path) == 'averaged\n'
