# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Reading settings: files, overrides, interpolations, and what is said about wrong ones."""

import pytest
from omegaconf import OmegaConf

from composer_bema.training.config import ConfigError, load_config
from tests.training.tiny import tiny_settings, write_yaml


@pytest.mark.parametrize('given', [{}, {'run_folder': None, 'run_name': None}])
def test_names_default_to_the_file(tmp_path, given):
    settings = tiny_settings(tmp_path)
    del settings['run_folder']
    settings |= given
    config = load_config(write_yaml(tmp_path, settings))
    assert config.run_name == 'tiny'
    assert config.run_folder == 'runs/tiny'


def test_overrides_reach_into_sections_lists_and_interpolations(tmp_path):
    settings = tiny_settings(tmp_path) | {'variables': {'rate': 1.0}, 'save_folder': '${run_folder}/checkpoints'}
    settings['optimizer'] = {'name': 'sgd', 'lr': '${variables.rate}'}
    overrides = ['variables.rate=2e-3', 'eval_loader.1.label=ema', 'run_folder=elsewhere', 'algorithms.bema.lag=5']
    config = load_config(write_yaml(tmp_path, settings), overrides)
    assert config.optimizer['lr'] == 2e-3
    assert config.eval_loader[1]['label'] == 'ema'
    assert config.save_folder == 'elsewhere/checkpoints'
    assert config.algorithms == {'bema': {'lag': 5}}


def test_an_override_takes_values_with_equals_signs(tmp_path):
    config = load_config(write_yaml(tmp_path, tiny_settings(tmp_path)), ['run_name=a=b'])
    assert config.run_name == 'a=b'


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        (['max_durations=1ep'], "max_durations is not a setting; the nearest one is 'max_duration'"),
        (['zzz=1'], '^zzz is not a setting.$'),
        (['max_duration=null'], 'max_duration is missing'),
        (['max_seq_len=long'], "max_seq_len: Value 'long' of type 'str' could not be converted to Integer"),
        (['algorithms=[bema]'], 'algorithms: Cannot merge'),
        (['optimizer=3'], 'optimizer: Cannot assign int'),
        (['max_duration'], "Override 'max_duration' is not of the form key=value"),
        (['=3'], 'not of the form key=value'),
        (['run_name=${nowhere}'], "key 'run_name': Interpolation key 'nowhere' not found"),
        (['run_name=${eval:1}'], "key 'run_name': Unsupported interpolation type eval"),
        (['seed=???'], "key 'seed': Missing mandatory value"),
        (['run_name={'], "^The value of the override 'run_name={' is not valid YAML: "),
        (['run_name=*x'], r"^The value of the override 'run_name=\*x' is not valid YAML: "),
        (['run_name=${x'], r"^Override 'run_name=\${x': "),
        (['eval_loader.7.label=x'], r"^Override 'eval_loader\.7\.label=x': list index out of range"),
        (['eval_loader.first=x'], r"^Override 'eval_loader\.first=x': "),
    ],
)
def test_wrong_settings(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write_yaml(tmp_path, tiny_settings(tmp_path)), overrides)


@pytest.mark.parametrize(('text', 'message'), [('a: [', 'is not valid YAML'), ('- a', 'pairs at its top level')])
def test_wrong_files(tmp_path, text, message):
    path = tmp_path / 'wrong.yaml'
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"No such settings file: '.*nothing\.yaml'"):
        load_config(tmp_path / 'nothing.yaml')


def test_resolvers_are_those_of_omegaconf_whatever_others_have_registered(tmp_path, monkeypatch):
    monkeypatch.setenv('RATE', '0.5')
    called = []
    # The name of OmegaConf 2.4, or else that of 2.3.
    register = getattr(OmegaConf, 'register_resolver', None) or OmegaConf.register_new_resolver
    register('of_another_package', called.append)
    try:
        path = write_yaml(tmp_path, tiny_settings(tmp_path))
        for override in ('run_name=${of_another_package:x}', r'run_name=\${of_another_package:x}'):
            with pytest.raises(ValueError, match='Unsupported interpolation type of_another_package'):
                load_config(path, [override])
        # An override looks its section up, which would resolve it.
        (tmp_path / 'section.yaml').write_text('model: ${of_another_package:x}')
        with pytest.raises(ConfigError, match='Unsupported interpolation type of_another_package'):
            load_config(tmp_path / 'section.yaml', ['model.name=x'])
        assert load_config(path, ['optimizer.lr=${oc.decode:${oc.env:RATE}}']).optimizer['lr'] == 0.5
        # And the other package still has it.
        OmegaConf.to_container(OmegaConf.create({'x': '${of_another_package:y}'}), resolve=True)
    finally:
        OmegaConf.clear_resolver('of_another_package')
    assert called == ['y']
