# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Puts the tables that measurements have written into a page.

    python benchmarks/paste_tables.py docs/performance.md

What stands between the lines ``<!-- table NAME -->`` and ``<!-- end -->`` becomes ``runs/benchmarks/NAME.md``, if there
is such a file, and is left as it is if not.
"""

import re
from pathlib import Path

import click


def paste(page: str, tables: Path) -> tuple[str, list[str]]:
    """A page with the tables in a folder, and the names of those that were put in."""
    pasted: list[str] = []

    def replacement(match: re.Match[str]) -> str:
        path = tables / f'{match["name"]}.md'
        if not path.is_file():
            return match[0]
        pasted.append(match['name'])
        return f'<!-- table {match["name"]} -->\n{path.read_text(encoding="utf-8").strip()}\n<!-- end -->'

    pattern = r'<!-- table (?P<name>[\w-]+) -->\n.*?<!-- end -->'
    return re.sub(pattern, replacement, page, flags=re.DOTALL), pasted


@click.command(context_settings={'show_default': True})
@click.argument('page', type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option('--tables', type=click.Path(exists=True, file_okay=False, path_type=Path), default='runs/benchmarks')
def main(page: Path, tables: Path) -> None:
    """Put measured tables into a page, and say which."""
    text, pasted = paste(page.read_text(encoding='utf-8'), tables)
    page.write_text(text, encoding='utf-8')
    click.echo('\n'.join(pasted) or f"No table of '{page}' is in '{tables}'.")


if __name__ == '__main__':
    main()
