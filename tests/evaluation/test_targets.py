# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Models as they are evaluated: which weights they hold, from every kind of target."""

import json
import shutil
import weakref
from unittest import mock

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from composer_bema.evaluation import targets
from composer_bema.evaluation.targets import open_target
from composer_bema.formats.foreign_code import ForeignCodeError
from composer_bema.offline.loading import load_weights
from composer_bema.offline.settings import Setting
from tests.evaluation.models import make_tokenizer
from tests.formats.foreign import with_generation
from tests.formats.runs import saved
from tests.offline.runs import as_huggingface, as_safetensors, run

CPU = torch.device('cpu')
TRAINING = Setting('lawa', {'window': 1})


def held(target, settings=(), **options):
    """What was evaluated, with a copy of the weights that the model held then."""
    opened = open_target(str(target), dict(settings), device=CPU, **options)
    return [(s, {n: t.clone() for n, t in model.state_dict().items()}) for s, model in opened.models()]


def assert_holds(weights, expected, atol=1e-6):
    named = {name.removeprefix('model.'): tensor for name, tensor in expected.items()}
    assert weights.keys() == named.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, named[name].to(tensor.dtype), rtol=0, atol=atol)


def test_a_hugging_face_folder(tmp_path):
    folder = as_huggingface(run('training'), tmp_path) / 'checkpoint-6'
    [(subject, weights)] = held(folder)
    assert (subject.weights, subject.step, subject.settings) == (str(folder), None, {})
    assert_holds(weights, run('training').weights[6]['training'], atol=0)


@pytest.mark.parametrize(('chosen', 'expected'), [('average', 'BEMA'), ('training', 'training')])
def test_a_composer_checkpoint(chosen, expected):
    checkpoint = next(run('average').checkpoints.glob('*ba8-rank0.pt'))
    [(subject, weights)] = held(checkpoint, weights=chosen)
    assert (subject.weights, subject.step) == (chosen, 8)
    assert_holds(weights, run('average').weights[8][expected], atol=0)


def test_one_of_several_averages():
    [(_, weights)] = held(saved('two averages').path, average='EMA')
    assert_holds(weights, saved('two averages').weights['EMA'], atol=0)


@pytest.mark.parametrize('kind', ['composer', 'huggingface'])
def test_averages_of_a_directory(tmp_path, kind):
    source = run('training')
    checkpoints = source.checkpoints if kind == 'composer' else as_huggingface(source, tmp_path / 'folders')
    settings = {'bema': Setting('bema', update_freq=2), 'training': TRAINING}
    found = held(checkpoints, settings, weights='training', every_update=True, initial_model=source.initial_model)
    assert [(s.weights, s.step) for s, _ in found] == [(n, t) for n in settings for t in range(2, 13, 2)]
    for subject, weights in found:
        expected = 'BEMA' if subject.weights == 'bema' else 'training'
        assert_holds(weights, source.weights[subject.step][expected])
    assert found[0][0].settings == {'rule': 'bema', 'update_freq': 2}


def test_steps_of_averages():
    settings = {'ema': Setting('ema', update_after=4, update_freq=4)}
    options = {'weights': 'training', 'initial_model': run('training').initial_model}
    steps = [
        [subject.step for subject, _ in held(run('training').checkpoints, settings, **options, **chosen)]
        for chosen in ({}, {'at': (8,)}, {'every_update': True})
    ]
    assert steps == [[12], [8], [8, 12]]


def test_a_dtype():
    options = {'weights': 'training', 'dtype': 'bfloat16', 'initial_model': run('training').initial_model}
    [(_, weights)] = held(run('training').checkpoints, {'training': TRAINING}, **options)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert_holds(weights, run('training').weights[12]['training'], atol=0)


ADAPTERS = {
    'lora': {'target_modules': ['q_proj']},
    'lora with biases': {'target_modules': ['q_proj'], 'bias': 'all'},
    'dora': {'target_modules': ['q_proj', 'down_proj'], 'use_dora': True},
    'whole modules': {'target_modules': ['q_proj'], 'modules_to_save': ['lm_head', 'embed_tokens']},
    'lora of embeddings': {'target_modules': ['embed_tokens', 'v_proj']},
    'new tokens': {'target_modules': ['q_proj'], 'trainable_token_indices': [3, 5]},
}


def adapted(folder, **settings):
    torch.manual_seed(0)
    sizes = {'hidden_size': 8, 'intermediate_size': 12, 'num_hidden_layers': 1, 'num_attention_heads': 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=259, attention_bias=True, **sizes)).save_pretrained(folder)
    base = LlamaForCausalLM.from_pretrained(folder)
    return get_peft_model(base, LoraConfig(task_type='CAUSAL_LM', r=2, init_lora_weights=False, **settings))


@pytest.mark.filterwarnings('ignore:Setting `save_embedding_layers` to `True`')
@pytest.mark.parametrize('kind', ADAPTERS)
def test_adapters(tmp_path, kind):
    """Averages of adapters are put into one model, on a base that stays as it is."""
    model = adapted(tmp_path / 'base', **ADAPTERS[kind])
    trained = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
    base = {n: tensor.clone() for n, tensor in model.state_dict().items() if n not in trained}
    steps = []
    for step in (1, 2):
        steps.append({n: torch.randn_like(t) for n, t in model.state_dict().items() if n in trained})
        model.load_state_dict(steps[-1], strict=False)
        model.save_pretrained(str(tmp_path / f'run/checkpoint-{step}'))
        make_tokenizer().save_pretrained(tmp_path / f'run/checkpoint-{step}')
    average = {name: (tensor + steps[1][name]) / 2 for name, tensor in steps[0].items()}
    settings = {'lawa': Setting('lawa', {'window': 2}, update_freq=1)}
    target = open_target(str(tmp_path / 'run'), settings, device=CPU, weights='training')
    [(_, found)] = target.models()
    weights = found.state_dict()
    for name, tensor in (base | average).items():
        torch.testing.assert_close(weights[name], tensor)
    model.load_state_dict(average, strict=False)
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(found(ids).logits, model.eval()(ids).logits)


def test_the_reference_of_dpo_is_passed_over(tmp_path):
    model = adapted(tmp_path / 'base', target_modules=['q_proj'], modules_to_save=['lm_head'])
    state = {f'model.{name}': torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    reference = {n.replace('.default', '.reference'): t + 1 for n, t in state.items() if '.default' in n}
    assert len(reference) == 3
    load_weights(model, state | reference)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f'model.{name}'])


def test_adapters_of_another_shape(tmp_path):
    model = adapted(tmp_path / 'base', target_modules=['q_proj'], use_dora=True)
    state = get_peft_model_state_dict(model)
    magnitude = 'base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector'
    with pytest.raises(ValueError, match=r"they lack the tensor '.*q_proj.lora_magnitude_vector.default.weight'"):
        load_weights(model, {name: tensor for name, tensor in state.items() if name != magnitude})
    with pytest.raises(ValueError, match="they have a tensor 'base_model.model.lm_head.lora_A.weight' more"):
        load_weights(model, {**state, 'base_model.model.lm_head.lora_A.weight': torch.zeros(2, 8)})
    with pytest.raises(ValueError, match=r'has the shape \(3,\) in the checkpoints, but \(8,\) in the model'):
        load_weights(model, {**state, magnitude: torch.zeros(3)})


def test_an_average_is_in_the_model_alone():
    """What is in the model already is in memory no second time while it is evaluated."""
    compute, held_elsewhere = targets.averaged_weights, []

    def watched(*args, **kwargs):
        computed = compute(*args, **kwargs)

        def pair():
            average, weights = next(computed)
            held_elsewhere.append(weakref.ref(next(iter(weights.values()))))
            return average, weights

        for _ in range(2):
            yield pair()

    source = run('training')
    settings = {'bema': Setting('bema', update_freq=2)}
    options = {'weights': 'training', 'initial_model': source.initial_model, 'at': (2, 4)}
    target = open_target(str(source.checkpoints), settings, device=CPU, **options)
    with mock.patch.object(targets, 'averaged_weights', watched):
        for _ in target.models():
            assert held_elsewhere.pop()() is None


@pytest.mark.parametrize(
    ('file', 'named'),
    [
        ('config.json', {'_attn_implementation': 'someone/kernels:attention'}),
        ('adapter_config.json', {'auto_mapping': {'base_model_class': 'X', 'parent_library': 'named'}}),
    ],
)
def test_nothing_is_loaded_that_a_configuration_names(tmp_path, file, named):
    folder = as_huggingface(run('training'), tmp_path) / 'checkpoint-6'
    config = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**config, **named}))
    with pytest.raises(ValueError, match=f"The configuration in '{folder / file}' has code loaded"):
        held(folder)


def edit(path, **settings):
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_nothing_is_loaded_that_another_file_of_the_configuration_names(tmp_path):
    folder = as_huggingface(run('training'), tmp_path) / 'checkpoint-6'
    shutil.copy(folder / 'config.json', folder / 'config.4.0.0.json')
    edit(folder / 'config.4.0.0.json', _attn_implementation='someone/kernels:attention')
    edit(folder / 'config.json', configuration_files=['config.4.0.0.json'])
    with pytest.raises(ValueError, match='has code loaded'):
        held(folder)


def test_no_other_model_is_loaded_that_a_configuration_names(tmp_path):
    folder = as_huggingface(run('training'), tmp_path) / 'checkpoint-6'
    edit(folder / 'config.json', text_config={'model_type': 'mask2former', 'backbone': 'someone/model'})
    with pytest.raises(ValueError, match=f"The configuration in '{folder / 'config.json'}' has another model loaded"):
        held(folder)


@pytest.mark.skipif(not hasattr(transformers.GenerationMixin, 'load_custom_generate'), reason='this version has none')
def test_generation_of_its_own_does_not_run(tmp_path):
    folder = with_generation(as_huggingface(run('training'), tmp_path) / 'checkpoint-6', tmp_path / 'has-run')
    with pytest.raises(ForeignCodeError, match=f"'{folder}' has code of its own loaded"):
        held(folder)
    assert not (tmp_path / 'has-run').exists()


def test_code_that_comes_with_a_model_does_not_run(tmp_path):
    folder = as_huggingface(run('training'), tmp_path) / 'checkpoint-6'
    (folder / 'config.py').write_text(f"open({str(tmp_path / 'has-run')!r}, 'w')")
    config = json.loads((folder / 'config.json').read_text())
    code = {'model_type': 'unheard', 'auto_map': {'AutoConfig': 'config.Config'}}
    (folder / 'config.json').write_text(json.dumps({**config, **code}))
    with pytest.raises(ValueError, match='trust_remote_code'):
        held(folder)
    assert not (tmp_path / 'has-run').exists()


def adapter_on(base, folder):
    """Makes an adapter, and returns its folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(run('training').initial_model)
    get_peft_model(model, LoraConfig(task_type='CAUSAL_LM', target_modules='all-linear')).save_pretrained(folder)
    edit(folder / 'adapter_config.json', base_model_name_or_path=str(base))
    return folder


def test_an_adapter_on_an_adapter_is_refused(tmp_path):
    """What its base names is another configuration, which nobody looks at."""
    model = shutil.copytree(run('training').initial_model, tmp_path / 'model')
    middle = adapter_on(model, tmp_path / 'middle')
    shutil.copy(model / 'config.json', middle)
    with pytest.raises(ValueError, match=f"base model '{middle}' of the adapter holds an adapter itself: merge that"):
        held(adapter_on(middle, tmp_path / 'adapter'))


def test_the_base_of_an_adapter_is_looked_at_in_its_revision(tmp_path, monkeypatch):
    repository = tmp_path / 'models--someone--model'
    (repository / 'refs').mkdir(parents=True)
    for revision, commit in (('main', 'a' * 40), ('named', 'b' * 40)):
        (repository / 'refs' / revision).write_text(commit)
        shutil.copytree(run('training').initial_model, repository / 'snapshots' / commit)
    edit(repository / 'snapshots' / ('b' * 40) / 'config.json', _attn_implementation='someone/kernels:attention')
    for name in ('default_cache_path', 'TRANSFORMERS_CACHE'):
        monkeypatch.setattr(transformers.utils.hub, name, str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub, '_is_offline_mode', True)
    folder = adapter_on('someone/model', tmp_path / 'adapter')
    edit(folder / 'adapter_config.json', revision='named')
    with pytest.raises(ValueError, match="The configuration in 'someone/model' has code loaded"):
        held(folder)


def test_what_cannot_be_evaluated(tmp_path):
    source = run('training')
    with pytest.raises(ValueError, match='averages of a directory of checkpoints need --rule'):
        held(source.checkpoints)
    options = {'weights': 'training'}
    with pytest.raises(ValueError, match='has weights alone, and does not say of what model'):
        held(as_safetensors(source, tmp_path / 'bare'), {'training': TRAINING}, **options)
    with pytest.raises(ValueError, match='not a HuggingFaceModel'):
        held(run('classifier').checkpoints, {'training': TRAINING}, **options)
    with pytest.raises(FileNotFoundError, match='nowhere'):
        held(tmp_path / 'nowhere' / 'at' / 'all')


def test_a_tokenizer_of_its_own(tmp_path):
    folder = shutil.copytree(run('training').initial_model, tmp_path / 'model')
    with pytest.raises(ValueError, match="no tokenizer in '.*model': name one with --tokenizer"):
        held(folder)
    make_tokenizer().save_pretrained(tmp_path / 'tokenizer')
    assert len(held(folder, tokenizer=str(tmp_path / 'tokenizer'))) == 1
