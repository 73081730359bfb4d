# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""How Sphinx makes a site of these pages, with a reference of the API from the docstrings: ``make docs``."""

import re

from sphinx.application import Sphinx

from composer_bema.version import __version__

project = 'composer_bema'
author = 'composer_bema authors'
copyright = '2026, composer_bema authors'
version = release = __version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.doctest', 'sphinx.ext.mathjax']
html_theme = 'furo'
html_title = f'composer_bema {release}'
exclude_patterns = ['**.png']

myst_enable_extensions = ['dollarmath']
# Links to headings, as on GitHub.
myst_heading_anchors = 4

autodoc_member_order = 'bysource'
# The types are in the docstrings, with their units and shapes.
autodoc_typehints = 'none'
napoleon_numpy_docstring = False
# As text, with the types as they are written: they are prose, and no names to be looked up.
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# Every reference of ours leads somewhere; errors are Python's, and other packages have sites of their own.
nitpicky = True
nitpick_ignore_regex = [('py:exc', '.*'), ('py:.*', r'(composer|torch|transformers)\..*|PreTrained.*')]


def link_to_files(app: Sphinx, docname: str, source: list[str]) -> None:
    """Makes files of what is linked to beside this folder, such as the README: the site has no such pages."""
    del app, docname
    source[0] = re.sub(r'\]\((\.\./[^)#]+\.md)(?:#[^)]*)?\)', r'](path:\1)', source[0])


def setup(app: Sphinx) -> None:
    """Is what Sphinx calls."""
    app.connect('source-read', link_to_files)
