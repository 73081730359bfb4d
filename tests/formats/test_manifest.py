# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The file that says which weights are beside it: read as it was written, missing, or damaged."""

import json

import pytest

from composer_bema.formats.manifest import MANIFEST, WEIGHTS, read_manifest, write_manifest
from composer_bema.version import __version__


def test_a_manifest_comes_back(tmp_path):
    write_manifest(tmp_path, 'BEMA', {'rule': 'bema', 'settings': {'lag': 0.1, 'half_life': None}, 'path': 'é'})
    assert [path.name for path in tmp_path.iterdir()] == ['averaging.json']
    assert read_manifest(tmp_path) == {
        'weights': 'BEMA',
        'composer_bema': __version__,
        'rule': 'bema',
        'settings': {'lag': 0.1, 'half_life': None},
        'path': 'é',
    }


def test_where_there_is_none_there_is_none(tmp_path):
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / 'missing') is None
    (tmp_path / 'file').touch()
    assert read_manifest(tmp_path / 'file') is None


def test_what_is_unknown_in_it_does_no_harm(tmp_path):
    """One of a later version."""
    (tmp_path / MANIFEST).write_text(json.dumps({WEIGHTS: 'training', 'composer_bema': '99', 'new': [1]}))
    assert read_manifest(tmp_path)[WEIGHTS] == 'training'


@pytest.mark.parametrize(
    'content',
    [b'', b'{"weights": "BE', b'[]', b'3', b'null', b'"weights"', b'{}', b'{"weights": null}', b'{"weights": "\xff"}'],
)
def test_one_that_is_damaged_is_named(tmp_path, content):
    """Whether the weights are an average is nothing to guess."""
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(
        ValueError, match=r"averaging\.json' is damaged: it does not say which weights are beside it\.$"
    ):
        read_manifest(tmp_path)
