# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""The quickstart of DPO, shortened: what a user sees of it, also when it is resumed, with LoRA, and of JSONL."""

import json
from pathlib import Path

import pytest

from composer_bema.training.config import ConfigError, load_config
from composer_bema.training.outputs import evaluation_curves, read_metrics
from composer_bema.training.run import train

RECIPE = Path(__file__).parents[2] / 'yamls/dpo_quickstart.yaml'


def settings(folder: Path, *more: str) -> list[str]:
    return [
        f'run_folder={folder}',
        f'model.pretrained_model_name_or_path={RECIPE.parent / "quickstart_model"}',
        'progress_bar=false',
        'max_duration=4ba',
        'eval_interval=1ba',
        'save_interval=2ba',
        'global_train_batch_size=4',
        'eval_subset_num_batches=1',
        'device_eval_batch_size=4',
        'algorithms.bema.ref_model_update_freq=2ba',
        'algorithms.bema.ref_model_update_after=1ba',
        'scheduler={name: constant}',
        *more,
    ]


@pytest.mark.parametrize('lora', [False, True], ids=['whole', 'adapter'])
def test_the_quickstart_and_its_resumption(tmp_path: Path, lora: bool):
    more = ['save_overwrite=false', 'autoresume=true']
    if lora:
        pytest.importorskip('peft')
        more.append('model.peft_config={r: 2, target_modules: [q_proj, v_proj]}')
    text = train(load_config(RECIPE, settings(tmp_path / 'whole', *more)))
    assert 'margin' in text and 'accuracy' in text and 'KL (nats per token)' in text
    assert (tmp_path / 'whole' / 'curves.png').exists()
    train(load_config(RECIPE, settings(tmp_path / 'cut', *more, 'max_duration=2ba')))
    resumed = train(load_config(RECIPE, settings(tmp_path / 'cut', *more)))
    assert resumed.splitlines()[:4] == text.splitlines()[:4]
    margins = evaluation_curves(read_metrics(tmp_path / 'cut' / 'metrics.jsonl'), 'RewardMargin')
    # The reference was updated at steps 1 and 3.
    assert [step for step, margin in margins['bema'] if margin == 0] == [1, 3]
    assert margins == evaluation_curves(read_metrics(tmp_path / 'whole' / 'metrics.jsonl'), 'RewardMargin')


def test_pairs_of_a_file(tmp_path: Path):
    rows = [{'prompt': f'{i} + 1 = ', 'chosen': str(i + 1), 'rejected': str(i + 2)} for i in range(20)]
    (tmp_path / 'pairs.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    loader = f'{{name: preference, dataset: {{hf_name: json, hf_kwargs: {{data_files: {tmp_path}/pairs.jsonl}}}}}}'
    more = [f'train_loader={loader}', 'eval_loader=', 'algorithms.bema.eval_labels=']
    train(load_config(RECIPE, settings(tmp_path / 'run', *more)))
    records = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
    assert [r['bema/num_ref_model_updates'] for r in records if 'bema/num_ref_model_updates' in r] == [1, 2]


def test_a_model_without_a_reference_is_named(tmp_path: Path):
    config = load_config(RECIPE, settings(tmp_path / 'run', 'model.name=hf_causal_lm', 'model.beta=0.1'))
    with pytest.raises(ConfigError, match=r'model\.beta is not a setting'):
        train(config)
