# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What is found out about settings before anything is built; and the recipes that ship pass it."""

import contextlib
from pathlib import Path

import pytest

from composer_bema.training.checks import check_config
from composer_bema.training.config import ConfigError, load_config
from composer_bema.training.registry import REGISTRY, find_builder
from composer_bema.training.sweep import check_sweep
from tests.training.tiny import tiny_settings, write_yaml

YAMLS = Path(__file__).parents[2] / 'yamls'
SWEEPS = sorted((YAMLS / 'sweeps').rglob('*.yaml'))
# Those of llm-foundry are for its own command.
RECIPES = sorted({*YAMLS.rglob('*.yaml')} - {*SWEEPS} - {*(YAMLS / 'llmfoundry').rglob('*.yaml')})


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('model.name=mpt', "model.name: there is no model named 'mpt'"),
        ('model.pretraned=false', "model.pretraned is not a setting; the nearest one is 'model.pretrained'"),
        ('tokenizer.kwarg={}', "tokenizer.kwarg is not a setting; the nearest one is 'tokenizer.kwargs'"),
        ('optimizer.name=decoupled_adam', "optimizer.name: .*; the nearest one is 'decoupled_adamw'"),
        ('optimizer={name: decoupled_sgdw}', 'optimizer.lr is missing'),
        ('optimizer={lr: 1.0}', 'optimizer.name is missing'),
        ('optimizer.beta=[0,1]', "optimizer.beta is not a setting; the nearest one is 'optimizer.betas'"),
        ('optimizer.params=[]', 'optimizer.params is not a setting'),
        ('scheduler={name: constant_with_warmup}', 'scheduler.t_warmup is missing'),
        ('scheduler.alpah=1', "scheduler.alpah is not a setting; the nearest one is 'scheduler.alpha'"),
        ('train_loader.nam=1', "train_loader.nam is not a setting; the nearest one is 'train_loader.name'"),
        ('train_loader.num_worker=1', "the nearest one is 'train_loader.num_workers'"),
        ('train_loader.dataset.shufle=1', "the nearest one is 'train_loader.dataset.shuffle'"),
        ('train_loader.dataset.tokenizer=1', 'train_loader.dataset.tokenizer is not a setting'),
        ('train_loader.dataset={}', 'train_loader.dataset.paths is missing'),
        ('train_loader.dataset=3', 'train_loader.dataset must hold'),
        ('eval_loader.0.dataset.parts=x', "the nearest one is 'eval_loader.0.dataset.part'"),
        ('eval_loader.1.label=one', "eval_loader.1.label: 'one' is the label of another evaluator"),
        ('eval_loader.1.label=train', "eval_loader.1.label: 'train' is how Composer calls"),
        ('eval_loader.1.label=null', 'eval_loader.1.label is missing'),
        (
            'callbacks.speed_moniter={}',
            "there is no callback named 'speed_moniter'; the nearest one is 'speed_monitor'",
        ),
        ('callbacks.speed_monitor.window=3', "the nearest one is 'callbacks.speed_monitor.window_size'"),
        ('loggers.tensorbord={}', "there is no logger named 'tensorbord'; the nearest one is 'tensorboard'"),
        ('algorithms.bemma={}', "there is no algorithm named 'bemma'; the nearest one is 'bema'"),
        ('algorithms.gradient_clipping.threshold=1', 'algorithms.gradient_clipping.threshold is not a setting'),
        ('algorithms.gradient_clipping=3', 'algorithms.gradient_clipping must hold'),
        ('max_duration=6bats', "max_duration: '6bats' is not a Composer time"),
        ('global_train_batch_size=0', 'global_train_batch_size must be a positive multiple'),
        ('fsdp_config.sharding=1', "the nearest one is 'fsdp_config.sharding_strategy'"),
        ('autoresume=true', 'autoresume needs save_folder'),
        ('fsdp_config.sharding_strategy=FULL', "fsdp_config.sharding_strategy: 'FULL' is not one of FULL_SHARD, "),
        ('precision=fp8', "precision: 'fp8' is not one of fp32, "),
        ('python_log_level=loud', "python_log_level: 'LOUD' is not one of CRITICAL, "),
        ('device_train_microbatch_size=0', "must be a positive number of sequences or 'auto', not 0"),
        ('device_train_microbatch_size=all', "must be a positive number of sequences or 'auto', not 'all'"),
        ('device_eval_batch_size=0', 'device_eval_batch_size must be a positive number of sequences, not 0'),
        ('eval_subset_num_batches=0', 'eval_subset_num_batches must be a positive number'),
        ('max_duration=0ba', "max_duration must be positive, not '0ba'"),
        ('optimizer.lr=abc', "optimizer.lr must be a number, not 'abc'"),
        ('scheduler.t_max=soon', "scheduler.t_max must be a Composer time such as '100ba', not 'soon'"),
        ('scheduler={name: warmup_stable_decay, decay: sqrt}', "scheduler.decay must be one of linear, .*, not 'sqrt'"),
        ('scheduler={name: warmup_stable_decay, alpha_f: -1}', 'scheduler: alpha_f must be between 0 and 1, but is -1'),
        ('scheduler={name: cosine_with_constant_tail, t_tail: 1dur}', 'scheduler: .* together must be less than t_max'),
        ('train_loader.dataset.part=test', "train_loader.dataset.part must be one of train, held_out, all, not 'test'"),
        ('run_name=../elsewhere', "run_name: '../elsewhere' leads out of the folder of runs; name another folder with"),
        ('run_name=/elsewhere', "run_name: '/elsewhere' leads out of the folder of runs"),
        ('train_loader.num_workers=abc', "train_loader.num_workers must be a whole number, not 'abc'"),
    ],
)
def test_a_mistake_is_named_with_its_dotted_key(tmp_path, override, message):
    config = load_config(write_yaml(tmp_path, tiny_settings(tmp_path)), [override])
    with pytest.raises(ConfigError, match=message):
        check_config(config)


def test_weights_alone_cannot_be_resumed(tmp_path):
    overrides = ['autoresume=true', 'save_folder=x', 'save_weights_only=true']
    config = load_config(write_yaml(tmp_path, tiny_settings(tmp_path)), overrides)
    with pytest.raises(ConfigError, match='autoresume needs more than save_weights_only=true saves'):
        check_config(config)


@pytest.mark.parametrize(
    ('version', 'key', 'message'),
    [
        ('1', 'sharding_strategy=FULL_SHARD', None),
        ('1', 'reshard_after_forward=true', 'fsdp_config.reshard_after_forward is not a setting'),
        ('2', 'reshard_after_forward=true', None),
        ('2', 'sharding_strategy=FULL_SHARD', 'fsdp_config.sharding_strategy is not a setting'),
        ('2', 'load_monolith_rank0_only=true', 'the other ranks would keep the weights that they were built with'),
        ('2', 'mixed_precison=PURE', "the nearest one is 'fsdp_config.mixed_precision'"),
    ],
)
def test_fsdp_settings_are_those_of_the_version_that_composer_will_use(tmp_path, monkeypatch, version, key, message):
    monkeypatch.setenv('FSDP_VERSION', version)
    config = load_config(write_yaml(tmp_path, tiny_settings(tmp_path)), [f'fsdp_config.{key}'])
    with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
        check_config(config)


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('algorithms.bema.emapower=1', "the nearest one is 'algorithms.bema.ema_power'"),
        (
            'algorithms.bema.update_freq=10',
            "algorithms.bema.update_freq must be a Composer time such as '100ba', not 10",
        ),
        ('algorithms={bema: {}, ema: {half_life: 2ba}}', 'BEMA and EMA share a run'),
        ('algorithms.bema.bias_power=-1', 'algorithms.bema: .*-1'),
        ('algorithms.ema={half_life: 10ba, eval_labels: [too]}', "no evaluator is labelled 'too'; .* 'two'"),
    ],
)
def test_mistakes_in_an_averaging_algorithm(tmp_path, override, message):
    config = load_config(write_yaml(tmp_path, tiny_settings(tmp_path)), [override])
    with pytest.raises(ConfigError, match=message):
        check_config(config)


PAIRS = '{name: toy_preferences, dataset: {}}'


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        (
            ['model.name=hf_causal_lm_dpo'],
            '^train_loader.name: hf_causal_lm_dpo needs preference pairs, which text_files does not make; '
            'use preference or toy_preferences',
        ),
        (['model.name=hf_causal_lm_dpo', f'train_loader={PAIRS}'], '^eval_loader.0.name: hf_causal_lm_dpo needs'),
        (
            [f'train_loader={PAIRS}'],
            '^train_loader.name: toy_preferences makes preference pairs, which hf_causal_lm does not train on; use the '
            'model hf_causal_lm_dpo',
        ),
        ([f'eval_loader={PAIRS}'], '^eval_loader.name: toy_preferences makes preference pairs'),
        (['model.name=hf_causal_lm_dpo', f'train_loader={PAIRS}', f'eval_loader={PAIRS}'], None),
    ],
)
def test_pairs_go_to_a_model_that_trains_on_them(tmp_path, overrides, message):
    config = load_config(write_yaml(tmp_path, tiny_settings(tmp_path)), [*overrides, 'algorithms='])
    with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
        check_config(config)


def test_recipes_are_valid():
    """Every recipe passes all checks that need no download."""
    recipes = RECIPES
    assert recipes
    for recipe in recipes:
        check_config(load_config(recipe, ['variables.data=somewhere']))


def test_sweeps_are_valid_and_open_with_their_command():
    assert SWEEPS
    for sweep in SWEEPS:
        assert check_sweep(sweep)
        header = sweep.read_text().split('\n\n')[0]
        assert f'--config yamls/{sweep.relative_to(YAMLS)}' in header
        # It may stand on two lines.
        assert 'One override: ' in ' '.join(header.replace('#', '').split())


def test_recipes_open_with_their_command():
    for recipe in RECIPES:
        header = recipe.read_text().split('\n\n')[0]
        assert f'composer-bema train yamls/{recipe.relative_to(YAMLS)}' in header
        assert 'One override: ' in header


@pytest.mark.parametrize(('kind', 'name'), [(kind, name) for kind, names in REGISTRY.items() for name in names])
def test_every_registered_name_leads_to_a_builder(kind, name):
    assert callable(find_builder(kind, name, kind))
