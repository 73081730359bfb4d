# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The blocks of code in a page, and how each language is run: Python, commands, and YAML."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import yaml
from sybil import Document, Example, Lexeme, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

__all__ = ['NOT_RUN', 'ROOT', 'SLOW', 'Block', 'blocks_of', 'run']

ROOT = Path(__file__).parents[2]

SLOW = 'slow'
NOT_RUN = 'not run'

# The page about runs that are not ours.
LLM_FOUNDRY = 'llm-foundry.md'

# An invisible remark right before a block.
_MARK = re.compile(rf'<!-- ({SLOW}|{NOT_RUN}): ([^>]+) -->\s*\Z')
# Everything but the directives of the documentation's own pages.
_LEXER = FencedCodeBlockLexer(r'[^{\n]*')
_PACKAGE = re.compile(r'(?:composer_bema|\.)(?:\[(?P<extras>[\w,]+)\])?')


class Block(NamedTuple):
    """What a page says to run."""

    language: str
    source: Lexeme
    mark: str
    """``SLOW``, ``NOT_RUN`` or empty."""
    reason: str


def blocks_of(page: Path) -> Document:
    """The blocks of a page in their order, each with its `Block` as ``parsed``."""
    return Document.parse(str(page), _parse)


def _parse(document: Document) -> Iterable[Region]:
    for region in _LEXER(document):
        mark = _MARK.search(document.text, 0, region.start)
        language, source = region.lexemes['language'], region.lexemes['source']
        block = Block(language, source, *(mark.groups() if mark else ('', '')))
        yield Region(region.start, region.end, block, run)


def run(example: Example) -> None:
    """Runs one block in the current folder."""
    block: Block = example.parsed
    if block.language == 'python':
        example.parsed = block.source
        PythonEvaluator()(example)
    elif block.language == 'console':
        for command in _commands(block.source):
            _run_command(command)
    elif block.language == 'yaml':
        _check_settings(block.source, Path(example.path).name)
    else:
        # A drawing, which has nothing to run, says that it is text.
        assert block.language == 'text', f'{example.path}:{example.line}: nobody runs blocks of {block.language!r}'


def _commands(source: str) -> list[list[str]]:
    lines = source.replace('\\\n', ' ').splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def _run_command(words: Sequence[str]) -> None:
    program, *arguments = words
    if program == 'composer-bema':
        # In this process, where Composer has been imported already.
        from composer_bema.cli import main

        main(arguments, prog_name=program, standalone_mode=False)
    elif program == 'make':
        # Targets run for minutes, and the whole check of a commit runs those that it needs: here they have to exist.
        subprocess.run([program, '--dry-run', *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    elif program == 'python':
        subprocess.run([sys.executable, *arguments], check=True)
    elif program == 'torchrun':
        subprocess.run([sys.executable, '-m', 'torch.distributed.run', *arguments], check=True)
    elif [program, *arguments[:1]] == ['pip', 'install']:
        _check_extras(arguments[1:])
    else:
        raise AssertionError(f'nobody runs {program!r}')


def _check_extras(requirements: Sequence[str]) -> None:
    """What is installed has the extras that a page has people ask for."""
    provided = metadata.metadata('composer_bema').get_all('Provides-Extra') or []
    for match in map(_PACKAGE.fullmatch, requirements):
        assert match is not None, f'{requirements} is more than the package with its extras'
        assert {*(match['extras'] or '').split(',')} - {''} <= {*provided}


def _check_settings(source: str, page: str) -> None:
    """What is shown of a training YAML is fine in the place of the quickstart's own.

    Of what is for llm-foundry, whose loaders are others, the averages are.
    """
    from composer_bema.training.checks import build_named, check_config
    from composer_bema.training.config import TrainConfig, check_top_level, read_settings

    shown = yaml.safe_load(source)
    if page == LLM_FOUNDRY:
        assert build_named('algorithms', shown['algorithms'])
        return
    settings = read_settings('yamls/quickstart.yaml', [], {'run_folder': 'runs/${run_name}'})
    check_config(check_top_level({**settings, **shown}, TrainConfig))
