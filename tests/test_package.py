# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The package as a whole: what importing it costs, which room may import which, what its metadata and sources say."""

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import composer_bema
from composer_bema import cli

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'composer_bema'

LICENCE = '# Copyright 2026 composer_bema authors\n# SPDX-License-Identifier: Apache-2.0\n'

# Rooms from the ground up. One may import those of lower floors, and none of its own or of higher ones.
FLOORS = (
    {'version'},
    {'averaging', 'environment', 'flops'},
    {'functional', 'formats'},
    {'algorithms', 'offline', 'plots'},
    {'lr_schedulers', 'preference'},
    {'evaluation', 'training'},
    {'cli'},
    {'__main__'},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules_after(code: str) -> set[str]:
    """The top-level modules, and those of the package in full, that a fresh interpreter holds after `code`."""
    script = f'import sys\n{code}\nprint(*sys.modules)'
    # Not from the repository's root: what is tested is the package as it is installed.
    result = subprocess.run(
        [sys.executable, '-c', script], cwd=PACKAGE, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return {name for name in result.stdout.split() if '.' not in name or name.startswith('composer_bema')}


def source_files() -> list[Path]:
    folders = ('composer_bema', 'tests', 'benchmarks', 'docs')
    return sorted([ROOT / 'setup.py', *(path for folder in folders for path in (ROOT / folder).rglob('*.py'))])


def rooms_imported_by(source: Path) -> set[str]:
    """The rooms of the package that the imports of a source file name, wherever in the file they are."""
    names = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{source} line {node.lineno}: imports are absolute'
            names += [f'{node.module}.{alias.name}' for alias in node.names]
    return {name.split('.')[1] for name in names if name.startswith('composer_bema.')}


def test_importing_the_package_imports_neither_torch_nor_composer():
    modules = modules_after('import composer_bema')
    assert 'composer_bema' in modules
    assert not modules & {'torch', 'composer', 'numpy', 'transformers'}
    assert 'composer_bema.functional' not in modules


@pytest.mark.parametrize(
    'code',
    [
        'import composer_bema.averaging',
        'from composer_bema import functional as cf; cf.compute_bema',
        'import composer_bema.averaging, composer_bema.offline.export',
    ],
)
def test_the_core_works_where_composer_is_not_installed(code: str):
    # None in sys.modules makes `import composer` fail, whether or not Composer is installed.
    modules = modules_after(f"sys.modules['composer'] = sys.modules['transformers'] = None\n{code}")
    assert 'composer_bema.averaging' in modules
    assert not any(name.startswith('composer_bema.algorithms') for name in modules)


@pytest.mark.parametrize('command', [None, *cli.main.commands])
def test_the_help_of_the_command_line_does_not_import_torch(command: str | None):
    arguments = ['--help'] if command is None else [command, '--help']
    code = f'from composer_bema.cli import main\ntry: main({arguments})\nexcept SystemExit as e: assert not e.code'
    modules = modules_after(code)
    assert not modules & {'torch', 'composer', 'transformers'}


def test_public_names_are_found_when_they_are_touched():
    from composer_bema import algorithms, functional, lr_schedulers

    assert composer_bema.BEMA is algorithms.BEMA
    assert composer_bema.EMA is algorithms.EMA
    assert composer_bema.functional is functional
    for name in lr_schedulers.__all__:
        assert getattr(composer_bema, name) is getattr(lr_schedulers, name)
    assert set(composer_bema.__all__) <= set(dir(composer_bema))
    with pytest.raises(AttributeError, match="module 'composer_bema' has no attribute 'BEMMA'"):
        composer_bema.BEMMA  # noqa: B018 (touching the name is the test)


def test_the_version_is_the_one_in_the_metadata():
    assert metadata.version('composer_bema') == composer_bema.__version__


@pytest.mark.parametrize(
    ('group', 'name', 'value'),
    [
        ('console_scripts', 'composer-bema', 'composer_bema.cli:main'),
        ('llmfoundry_algorithms', 'bema', 'composer_bema.algorithms:BEMA'),
        ('llmfoundry_algorithms', 'dema', 'composer_bema.algorithms:DEMA'),
        ('llmfoundry_algorithms', 'ema', 'composer_bema.algorithms:EMA'),
        ('llmfoundry_algorithms', 'lawa', 'composer_bema.algorithms:LAWA'),
        ('llmfoundry_algorithms', 'ouema', 'composer_bema.algorithms:OUEMA'),
        ('llmfoundry_algorithms', 'swa_window', 'composer_bema.algorithms:SWAWindow'),
        (
            'llmfoundry_schedulers',
            'cosine_with_constant_tail',
            'composer_bema.lr_schedulers:CosineAnnealingWithConstantTailScheduler',
        ),
        (
            'llmfoundry_schedulers',
            'warmup_stable_decay',
            'composer_bema.lr_schedulers:WarmupStableDecayScheduler',
        ),
        ('llmfoundry_callbacks', 'flops_monitor', 'composer_bema.training.callbacks:FlopsMonitor'),
    ],
)
def test_entry_points_are_in_the_metadata_and_can_be_loaded(group: str, name: str, value: str):
    (entry_point,) = metadata.distribution('composer_bema').entry_points.select(group=group, name=name)
    assert entry_point.value == value
    assert callable(entry_point.load())


def test_type_checkers_are_told_that_the_package_is_typed():
    assert (PACKAGE / 'py.typed').is_file()


@pytest.mark.parametrize('source', source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_source_file_begins_with_the_licence_and_a_docstring(source: Path):
    text = source.read_text()
    assert text.startswith(LICENCE), f'{source} does not begin with the two licence lines'
    assert ast.get_docstring(ast.parse(text)), f'{source} does not say in a docstring what it is for'


@pytest.mark.parametrize('source', sorted(PACKAGE.rglob('*.py')), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward_only(source: Path):
    room = source.relative_to(PACKAGE).parts[0].removesuffix('.py')
    if room == '__init__':
        # The front door: it names rooms of all floors, and enters none until asked.
        return
    assert room in FLOOR_OF, f'the room {room!r} of {source} is on no floor: give it one'
    for other in rooms_imported_by(source) - {room}:
        assert FLOOR_OF[other] < FLOOR_OF[room], f'{source} imports {other!r}, which is not below {room!r}'
