# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What runs the blocks of a page finds them all, and lets nothing wrong pass."""

from pathlib import Path
from subprocess import CalledProcessError

import click
import pytest

from composer_bema.training.config import ConfigError
from tests.docs.blocks import NOT_RUN, ROOT, SLOW, blocks_of

PAGE = """
<!-- a remark about something else -->
```python
x = 1
```

Text.

<!-- slow: a year -->

```console
composer-bema --version
```
<!-- not run: on a ship -->
```python
assert x == 2
```

```{toctree}
training
```
"""


def page_of(folder: Path, text: str) -> Path:
    path = folder / 'page.md'
    path.write_text(text)
    return path


def test_blocks_are_found_with_what_is_remarked(tmp_path):
    found = [example.parsed for example in blocks_of(page_of(tmp_path, PAGE))]
    assert [block.language for block in found] == ['python', 'console', 'python']
    assert [(block.mark, block.reason) for block in found] == [('', ''), (SLOW, 'a year'), (NOT_RUN, 'on a ship')]


def test_blocks_see_the_ones_before_them(tmp_path):
    first, _, last = blocks_of(page_of(tmp_path, PAGE))
    first.evaluate()
    with pytest.raises(AssertionError):
        last.evaluate()


@pytest.mark.parametrize(
    ('language', 'source', 'error'),
    [
        ('console', 'composer-bema trian x.yaml', click.UsageError),
        ('console', 'composer-bema flops nothing.yaml', click.ClickException),
        ('console', 'ls', AssertionError),
        ('console', "pip install 'composer_bema[nothing]'", AssertionError),
        ('console', 'pip install something-else', AssertionError),
        ('console', 'python -c "import nothing"', CalledProcessError),
        ('console', 'make nothing-of-this-name', CalledProcessError),
        ('yaml', 'algorithms: {bemma: {}}', ConfigError),
        ('ruby', 'puts 1', AssertionError),
        ('', 'drawing', AssertionError),
    ],
)
def test_what_is_wrong_fails(tmp_path, monkeypatch, language, source, error):
    monkeypatch.chdir(ROOT)
    [example] = blocks_of(page_of(tmp_path, f'```{language}\n{source}\n```\n'))
    with pytest.raises(error):
        example.evaluate()
