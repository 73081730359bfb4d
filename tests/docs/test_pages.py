# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Every block of code in README and docs runs as it stands, page by page; what cannot run is counted.

With SLOW_DOCS=1, as in `make test-docs-slow`, the pages are run with the blocks that take minutes.
"""

import os
import re
import shutil
from pathlib import Path

import pytest
from sybil import Document

import composer_bema
from tests.docs.blocks import NOT_RUN, ROOT, SLOW, blocks_of

PAGES = sorted([ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *(ROOT / 'docs').glob('*.md')])
# What commands name of the repository.
SHARED = ('benchmarks', 'tests', 'yamls')

WITH_SLOW = os.environ.get('SLOW_DOCS') == '1'
# How many blocks of all pages are not run. Each has its reason beside it.
MOST_NOT_RUN = 8

LINK = re.compile(r'\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)')
HEADING = re.compile(r'^#+ +(.+)$', re.MULTILINE)
FENCED = re.compile(r'^```.*?^```', re.MULTILINE | re.DOTALL)


def has(page: Path, *marks: str) -> bool:
    return any(example.parsed.mark in marks for example in blocks_of(page))


@pytest.fixture(scope='session')
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that pages read, and a short run of the quickstart."""
    from composer_bema.cli import main
    from tests.docs.world import make_checkpoints, make_trainer_run

    folder = tmp_path_factory.mktemp('prepared')
    make_checkpoints(folder)
    make_trainer_run(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        run_folder = folder / 'runs/quickstart'
        main(
            ['train', 'yamls/quickstart.yaml', 'max_duration=10ba', 'progress_bar=false', f'run_folder={run_folder}'],
            standalone_mode=False,
        )
    return folder


@pytest.fixture
def document(request: pytest.FixtureRequest, prepared: Path, tmp_path: Path, monkeypatch) -> Document:
    """A page whose blocks begin in a folder of their own, with what is prepared and links to the repository."""
    from tests.docs.world import namespace_of

    folder = tmp_path / 'page'
    shutil.copytree(prepared, folder, symlinks=True)
    for name in SHARED:
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    document = blocks_of(request.param)
    document.namespace.update(namespace_of(request.param))
    return document


@pytest.mark.slow
@pytest.mark.parametrize(
    'document',
    [page for page in PAGES if has(page, SLOW if WITH_SLOW else '')],
    indirect=True,
    ids=lambda page: page.name,
)
def test_the_blocks_of_a_page_run(document: Document):
    marks = ('', SLOW) if WITH_SLOW else ('',)
    for example in document:
        if example.parsed.mark in marks:
            print(f'{Path(example.path).name}:{example.line}', flush=True)
            example.evaluate()


def test_the_reference_has_all_that_is_public():
    shown = (ROOT / 'docs/api.md').read_text()
    names = {*composer_bema.__all__} - {'__version__'}
    assert [name for name in sorted(names) if not re.search(rf':: composer_bema\.{name}$', shown, re.MULTILINE)] == []


def test_few_blocks_are_not_run():
    left_out = [example for page in PAGES for example in blocks_of(page) if example.parsed.mark == NOT_RUN]
    places = [f'{Path(example.path).name}:{example.line}: {example.parsed.reason}' for example in left_out]
    assert len(places) <= MOST_NOT_RUN, '\n'.join(places)


def test_every_remark_belongs_to_a_block():
    for page in PAGES:
        marked = [example for example in blocks_of(page) if example.parsed.mark]
        remarks = re.findall(rf'^<!-- (?:{SLOW}|{NOT_RUN}):', page.read_text(), re.MULTILINE)
        assert len(remarks) == len(marked), page.name


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target, anchor in LINK.findall(FENCED.sub('', page.read_text())):
        other = (page.parent / target).resolve() if target else page
        assert other.exists(), f'{page.name} links to {target}, which is not there'
        if anchor:
            assert anchor in anchors(other), f'{page.name} links to {target}#{anchor}, a heading that is not there'


def anchors(page: Path) -> set[str]:
    """The names by which a page's headings are linked to."""
    titles = (re.sub(r'[`*]|\]\([^)]*\)|\[', '', title) for title in HEADING.findall(FENCED.sub('', page.read_text())))
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}
