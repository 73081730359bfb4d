# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Transformers runs no code that comes with a model, whatever it is told, and runs it again afterwards."""

import builtins
import sys

import pytest
import transformers
from transformers import dynamic_module_utils, modeling_utils

from composer_bema.formats.foreign_code import ForeignCodeError, no_foreign_code
from tests.formats.foreign import with_configuration, with_generation
from tests.formats.runs import TINY


@pytest.fixture(autouse=True)
def modules_of_their_own(tmp_path, monkeypatch):
    """Has code that is run copied to a temporary folder, and forgotten."""
    monkeypatch.setattr(dynamic_module_utils, 'HF_MODULES_CACHE', str(tmp_path / 'modules'))
    monkeypatch.setattr(sys, 'path', [*sys.path])
    before = {*sys.modules}
    yield
    for name in {*sys.modules} - before:
        if name.startswith('transformers_modules'):
            del sys.modules[name]


def test_code_does_not_run_and_does_afterwards(tmp_path):
    folder, mark = with_configuration(tmp_path / 'model', tmp_path / 'has-run'), tmp_path / 'has-run'
    refused = pytest.raises(ForeignCodeError, match=r"'it' has code of its own loaded \(.*own\.py\): remove it")
    with no_foreign_code('it'), refused:
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert not mark.exists()
    transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert mark.exists()


def test_nobody_is_asked(tmp_path, monkeypatch):
    folder, mark = with_configuration(tmp_path / 'model', tmp_path / 'has-run'), tmp_path / 'has-run'
    monkeypatch.setattr(builtins, 'input', lambda question: 'y')
    with no_foreign_code('it'), pytest.raises(ForeignCodeError, match="'it' has code of its own loaded: remove it"):
        transformers.AutoConfig.from_pretrained(folder)
    assert not mark.exists()


@pytest.mark.skipif(not hasattr(transformers.GenerationMixin, 'load_custom_generate'), reason='this version has none')
def test_generation_of_its_own_does_not_run(tmp_path):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).save_pretrained(tmp_path / 'model')
    folder, mark = with_generation(tmp_path / 'model', tmp_path / 'has-run'), tmp_path / 'has-run'
    with no_foreign_code('it'), pytest.raises(ForeignCodeError, match=r'custom_generate/generate\.py'):
        transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert not mark.exists()


@pytest.mark.skipif(not hasattr(modeling_utils, 'is_kernels_available'), reason='this version has none')
def test_kernels_are_not_loaded(monkeypatch):
    loaded = []
    monkeypatch.setattr(modeling_utils, 'is_kernels_available', lambda: True)
    monkeypatch.setattr(modeling_utils, 'get_kernel', loaded.append, raising=False)
    config = transformers.LlamaConfig(**TINY, attn_implementation='someone/kernels:attention')
    with no_foreign_code('it'), pytest.raises(ForeignCodeError, match=r'loaded \(someone/kernels\)'):
        transformers.LlamaForCausalLM(config)
    assert not loaded


def test_all_is_put_back():
    def held():
        names = ('check_imports', 'get_relative_import_files', '_raise_timeout_error', 'TIME_OUT_REMOTE_CODE')
        return [getattr(dynamic_module_utils, name) for name in names]

    before = held()
    with pytest.raises(KeyError), no_foreign_code('it'), no_foreign_code('a part of it'):
        assert not {*before} & {*held()}
        raise KeyError
    assert held() == before
