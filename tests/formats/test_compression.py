# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Compressed checkpoints are read like others, and what cannot be unpacked is named."""

import gzip
import shutil
import subprocess
import tarfile

import pytest
import torch

from composer_bema.formats.composer import open_checkpoint
from tests.formats.runs import saved


def assert_holds(path, expected):
    weights = open_checkpoint(path).weights(average='BEMA')
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[name].read(), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize('extension', ['.gz', '.bz2', '.xz', '.zst', '.lz4'])
def test_compressed_checkpoints(tmp_path, extension):
    programs = {'.gz': 'gzip', '.bz2': 'bzip2', '.xz': 'xz', '.zst': 'zstd', '.lz4': 'lz4'}
    if shutil.which(programs[extension]) is None:
        pytest.skip(f'{programs[extension]} is not installed')
    path, weights = saved('two averages')
    compressed = tmp_path / f'x.pt{extension}'
    content = subprocess.run([programs[extension], '-c', path], capture_output=True, check=True).stdout
    compressed.write_bytes(content)
    assert_holds(compressed, weights['BEMA'])
    compressed.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"'{compressed}' cannot be"):
        open_checkpoint(compressed)


@pytest.mark.parametrize('mode', ['w', 'w:gz'])
def test_checkpoints_in_tar_files(tmp_path, mode):
    path, weights = saved('two averages')
    archived = tmp_path / {'w': 'x.tar', 'w:gz': 'x.tar.gz'}[mode]
    (tmp_path / 'content').mkdir()
    shutil.copy(path, tmp_path / 'content' / 'composer_states.pt')
    with tarfile.open(archived, mode) as archive:
        # As Composer writes them.
        archive.add(tmp_path / 'content', arcname='')
    assert_holds(archived, weights['BEMA'])
    archived.write_bytes(archived.read_bytes()[:3000])
    with pytest.raises(ValueError, match=rf"'{archived}' cannot be"):
        open_checkpoint(archived)


def test_a_program_that_is_not_installed_is_named(tmp_path, monkeypatch):
    (tmp_path / 'x.pt.zst').write_bytes(b'')
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(ValueError, match="the program 'zstd' to uncompress it is not installed"):
        open_checkpoint(tmp_path / 'x.pt.zst')


@pytest.mark.parametrize('mode', ['gz', 'tar.gz'])
@pytest.mark.parametrize(
    ('link', 'target'), [('latest-rank0.pt', 'ep0-ba4-rank0.pt.{}'), ('ep0-ba4-rank0.pt.{}', 'store/3f0c')]
)
def test_a_link_has_the_extension_of_what_it_leads_to_if_that_has_one(tmp_path, mode, link, target):
    """Composer's to the latest checkpoint has none of its own; what a store keeps by its digest has none."""
    path, weights = saved('two averages')
    link, target = tmp_path / link.format(mode), tmp_path / target.format(mode)
    target.parent.mkdir(exist_ok=True)
    if mode == 'gz':
        target.write_bytes(gzip.compress(path.read_bytes(), compresslevel=1))
    else:
        with tarfile.open(target, 'w:gz', compresslevel=1) as archive:
            archive.add(path, arcname='composer_states.pt')
    link.symlink_to(target)
    assert_holds(link, weights['BEMA'])
