# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What is installed here, and whether it goes together: as metadata say, and as another process finds by importing it.

This process imports none of it, so that what is missing, broken or slow to import can be named.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import NamedTuple, Optional

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

__all__ = [
    'COMPONENTS',
    'PACKAGE',
    'Imports',
    'broken_requirements',
    'entry_points',
    'import_all',
    'installed_version',
    'requirement_of',
]

PACKAGE = 'composer_bema'

# What a run may be made of, in the order of import: names of distributions, and the module that each is imported as.
COMPONENTS = {
    'torch': 'torch',
    'mosaicml': 'composer',
    'transformers': 'transformers',
    'mosaicml-streaming': 'streaming',
    'peft': 'peft',
    'lm-eval': 'lm_eval',
    'trl': 'trl',
    'llm-foundry': 'llmfoundry',
}

# What averages in host memory go without where it cannot be imported.
_KERNELS = 'composer_bema.averaging.compiled'

_ENTRY_POINT_GROUPS = ('llmfoundry_algorithms', 'llmfoundry_schedulers', 'llmfoundry_callbacks')

# In seconds. Where all are installed, importing them takes half a minute on two cores.
_TIMEOUT = 600.0


class Imports(NamedTuple):
    """What importing the components showed."""

    devices: list[str]
    """What torch can compute on, in words; empty where torch cannot be imported."""
    without_kernels: str
    """Why averages in host memory go without compiled kernels; empty where they have them."""
    problems: list[str]
    """A sentence for each module or entry point that cannot be imported."""


class _Need(NamedTuple):
    """A requirement of a distribution, or of one of its extras."""

    by: str
    requirement: Requirement
    extra: str = ''


def installed_version(distribution: str) -> Optional[str]:
    """Returns the version of a distribution, or None where it is not installed.

    Raises:
        ValueError: If its metadata do not say.
    """
    if not _is_installed(distribution):
        return None
    versions = _fields(distribution, 'Version')
    if not versions:
        raise ValueError(f'The metadata of {distribution} are broken: install it anew.')
    return versions[0]


def requirement_of(distribution: str) -> str:
    """Returns the versions of a distribution, or of ``'Python'``, that this package asks for, and with which extra."""
    if not _is_installed(PACKAGE):
        return ''
    if distribution == 'Python':
        return ''.join(_fields(PACKAGE, 'Requires-Python'))
    for need in _needs_of_package():
        if _is_same(need.requirement.name, distribution):
            return f'{need.requirement.specifier}' + (f' with [{need.extra}]' if need.extra else '')
    return ''


def broken_requirements() -> list[str]:
    """Returns a sentence for each requirement of this package, or of a component, that what is installed breaks.

    A component that only an extra asks for may be missing, but not be there in a version that the extra excludes.
    """
    if not _is_installed(PACKAGE):
        return [f"{PACKAGE} is not installed, only found on Python's path: install it with pip."]
    sentences = []
    for distribution in (PACKAGE, *filter(_is_installed, COMPONENTS)):
        try:
            sentences += _broken_requirements_of(distribution)
        except ValueError as error:
            sentences.append(f'The requirements of {distribution} cannot be checked: {error}')
    return sentences


def entry_points() -> dict[str, list[str]]:
    """Returns the names by which llm-foundry finds what is ours, by their groups."""
    return {group: sorted(point.name for point in _points_of(group)) for group in _ENTRY_POINT_GROUPS}


def import_all() -> Imports:
    """Imports the components that are installed, and what our entry points name, in one other process."""
    targets = [module for distribution, module in COMPONENTS.items() if _is_installed(distribution)]
    targets += [point.value for group in _ENTRY_POINT_GROUPS for point in _points_of(group)]
    return _import_in_another_process([*targets, _KERNELS])


def _import_in_another_process(targets: Sequence[str]) -> Imports:
    # With this process's path, so that it finds what this one would find.
    request = json.dumps({'path': sys.path, 'targets': targets})
    try:
        child = subprocess.run(
            [sys.executable, '-c', _CHILD, request], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired as expired:
        output, end = expired.stdout or b'', f'takes more than {_TIMEOUT:.0f} seconds'
    else:
        output, end = child.stdout, f'ends Python, with exit code {child.returncode}'
    results = [json.loads(line) for line in output.splitlines()]
    devices = [device for result in results for device in result.get('devices', ())]
    errors = {result['target']: result['error'] for result in results if 'error' in result}
    without_kernels = errors.pop(_KERNELS, '')
    problems = [f'{target} cannot be imported: {error}' for target, error in errors.items()]
    if len(results) < len(targets):
        problems.append(f'Importing {targets[len(results)]} {end}.')
        without_kernels = without_kernels or 'not tried'
    return Imports(devices, without_kernels, problems)


# What libraries print goes to its standard error; its standard output has a line of JSON for each target.
_CHILD = """
import importlib, json, os, sys

def devices():
    import torch
    gpus = range(torch.cuda.device_count())
    found = [f'CPU ({torch.get_num_threads()} threads)', *(f'cuda:{i} ({torch.cuda.get_device_name(i)})' for i in gpus)]
    return found + ['mps'] * torch.backends.mps.is_available()

def result_of(target):
    module, _, name = target.partition(':')
    try:
        found = importlib.import_module(module)
        if name:
            getattr(found, name)
        return {'devices': devices()} if target == 'torch' else {}
    except BaseException as error:
        return {'error': ' '.join(f'{type(error).__name__}: {error}'.split())}

results = os.fdopen(os.dup(1), 'w')
os.dup2(2, 1)
request = json.loads(sys.argv[1])
sys.path = request['path']
for target in request['targets']:
    print(json.dumps({'target': target, **result_of(target)}), file=results, flush=True)
# Some libraries wait for threads of theirs at an orderly exit.
os._exit(0)
"""


def _broken_requirements_of(distribution: str) -> list[str]:
    version = installed_version(distribution)
    here = platform.python_version()
    sentences = [
        f'{distribution} {version} needs Python{wanted}, and this is Python {here}.'
        for wanted in _fields(distribution, 'Requires-Python')
        if not SpecifierSet(wanted).contains(here, prereleases=True)
    ]
    needs = _needs_of_package() if distribution == PACKAGE else _needs_of(distribution)
    return sentences + [sentence for need in needs for sentence in _breach_of(need)]


def _breach_of(need: _Need) -> list[str]:
    """Returns the sentence about a requirement that is not met, if it is not."""
    name = need.requirement.name
    wanted = f'{need.by} needs {name}{need.requirement.specifier}'
    version = installed_version(name)
    if version is None:
        return [] if need.extra else [f'{wanted}, which is not installed.']
    if need.requirement.specifier.contains(version, prereleases=True):
        return []
    return [f'{wanted}, and {name} {version} is installed.']


def _needs_of_package() -> list[_Need]:
    """Returns what this package needs, and what its extras need of the components; the rest are tools."""
    extras = [need for extra in _fields(PACKAGE, 'Provides-Extra') for need in _needs_of(PACKAGE, extra)]
    return _needs_of(PACKAGE) + [need for need in extras if any(_is_same(need.requirement.name, c) for c in COMPONENTS)]


def _needs_of(distribution: str, extra: str = '') -> list[_Need]:
    """Returns what a distribution needs here without any extra, or what one extra adds to that."""
    by = f'{distribution}[{extra}]' if extra else f'{distribution} {installed_version(distribution)}'
    requirements = [Requirement(line) for line in _fields(distribution, 'Requires-Dist')]
    return [
        _Need(by, requirement, extra)
        for requirement in requirements
        if _applies(requirement, extra) and not (extra and _applies(requirement, ''))
    ]


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({'extra': extra})


def _points_of(group: str) -> list[metadata.EntryPoint]:
    return [point for point in metadata.entry_points(group=group) if point.value.startswith(f'{PACKAGE}.')]


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _fields(distribution: str, name: str) -> list[str]:
    """Returns the values of a field of the metadata; none where a file has been lost."""
    try:
        return metadata.metadata(distribution).get_all(name) or []
    except TypeError:
        # What importlib.metadata raises if there is no METADATA.
        return []


def _is_same(name: str, other: str) -> bool:
    return name.lower().replace('_', '-') == other.lower().replace('_', '-')
