# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Questions through the harness, against likelihoods and generations of the model itself."""

import functools
import json
import logging
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tokenizers
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from composer_bema.evaluation.harness import Questions
from composer_bema.evaluation.language_models import language_model, without_end
from composer_bema.evaluation.suite import Suite
from composer_bema.evaluation.tasks import SYSTEM_PROMPT, Protocol
from tests.evaluation.models import FILES, make_model, make_tokenizer
from tests.evaluation.vllm_stand_in import vllm_stand_in


@functools.cache
def questions_of(*tasks, chat=False, **protocol):
    return Questions(tasks, Protocol(**protocol), make_tokenizer(chat), chat=chat, files=FILES)


def ask(*tasks, chat=False, model=None, **protocol):
    return questions_of(*tasks, chat=chat, **protocol).ask(model or make_model())


def measured(measurements):
    return {(m.task, m.metric): (m.value, m.standard_error, m.count) for m in measurements}


def log_likelihood(prompt, answer):
    """The model's own, of an answer that follows a prompt."""
    tokenizer, model = make_tokenizer(), make_model()
    prompt_ids, answer_ids = (tokenizer(text, add_special_tokens=False)['input_ids'] for text in (prompt, answer))
    logits = model(torch.tensor([prompt_ids + answer_ids])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt_ids) + i - 1, token].item() for i, token in enumerate(answer_ids))


def test_log_likelihoods_are_the_models():
    measurements, generations = ask('boolq', mode='log-likelihood')
    rows = [json.loads(line) for line in FILES['boolq'].read_text().splitlines()]
    assert len(generations) == len(rows)
    for generation, row in zip(generations, rows, strict=True):
        assert row['passage'] in generation.prompt
        no, yes = (log_likelihood(generation.prompt, f' Answer: {choice}') for choice in ('no', 'yes'))
        assert generation.accuracy == float((yes > no) == row['answer'])
    right = [generation.accuracy for generation in generations]
    assert 0 < sum(right) < len(right)
    assert measured(measurements)['boolq', 'accuracy'][::2] == (sum(right) / len(right), len(rows))


def test_subjects_count_together_and_apart():
    found = measured(ask('mmlu_hs', mode='log-likelihood')[0])
    assert found['mmlu_hs', 'accuracy'][2] == 28
    subjects = {task: values for (task, _), values in found.items() if task != 'mmlu_hs'}
    assert len(subjects) == 14
    assert found['mmlu_hs', 'accuracy'][0] == pytest.approx(sum(value for value, _, _ in subjects.values()) / 14)


def test_greedy_generations_are_the_models():
    _, (generation, *_) = ask('boolq', mode='greedy', questions=1)
    tokenizer, model = make_tokenizer(), make_model()
    ids = tokenizer(generation.prompt, return_tensors='pt', add_special_tokens=False)['input_ids']
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=256, do_sample=False)[0, ids.shape[1] :])
    assert expected.startswith(generation.answers[0].rstrip())
    assert len(generation.answers[0]) > 20


def test_a_models_own_settings_do_not_count():
    other = type(make_model())(make_model().config).eval()
    other.load_state_dict(make_model().state_dict())
    other.generation_config.update(max_new_tokens=5, min_p=0.9, repetition_penalty=3.0)
    asked = [ask('boolq', mode='greedy', questions=1, model=model) for model in (make_model(), other)]
    assert asked[0] == asked[1]
    assert other.generation_config.max_new_tokens == 5


def test_samples_differ_and_can_be_drawn_again():
    first, again = (ask('gsm8k', 'boolq', samples=3, questions=2) for _ in range(2))
    assert first == again
    measurements, generations = first
    assert [len(set(generation.answers)) for generation in generations] == [3] * 4
    found = measured(measurements)
    assert {task for task, _ in found} == {'gsm8k', 'boolq'}
    accuracies = [generation.accuracy for generation in generations if generation.task == 'boolq']
    assert found['boolq', 'accuracy'][::2] == (sum(accuracies) / 2, 2)
    assert ('boolq', 'no answer') in found


def test_another_model_answers_otherwise():
    other = type(make_model())(make_model().config)
    torch.manual_seed(9)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    mine, others = (ask('boolq', mode='greedy', questions=2, model=model)[1] for model in (make_model(), other.eval()))
    assert [g.prompt for g in mine] == [g.prompt for g in others]
    assert [g.answers for g in mine] != [g.answers for g in others]


def test_chat_templates_have_turns():
    _, generations = ask('boolq', chat=True, mode='log-likelihood', few_shot=1, questions=2)
    prompt = generations[0].prompt
    assert prompt.startswith(f'<system>{SYSTEM_PROMPT}</system><user>Read the passage')
    assert '</user><assistant>Answer: ' in prompt
    assert prompt.endswith('?</user><assistant>')
    assert prompt.count('<user>') == 2


def test_a_chat_template_without_a_system_turn():
    tokenizer = make_tokenizer(chat=True)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    questions = Questions(['boolq'], Protocol('log-likelihood', questions=1), tokenizer, chat=True, files=FILES)
    _, [generation] = questions.ask(make_model())
    assert generation.prompt.startswith('<user>Read the passage')


def test_examples_come_before_a_question():
    _, generations = ask('mmlu_hs', mode='log-likelihood', few_shot=1, questions=1)
    assert all(generation.prompt.count('Response:') == 2 for generation in generations)
    assert all('Response: Answer: ' in generation.prompt for generation in generations)


def test_questions_that_do_not_fit_are_counted(caplog):
    with caplog.at_level(logging.WARNING, 'composer_bema'):
        ask('boolq', mode='log-likelihood', model=make_model(context=300))
    [message] = [record.getMessage() for record in caplog.records if record.name.startswith('composer_bema')]
    assert 'of the 8 questions of boolq do not fit into the 300 tokens of the context' in message


def test_an_answer_longer_than_the_context():
    with pytest.raises(ValueError, match='An answer may have 256 tokens, but the context of the model only 128'):
        ask('boolq', mode='greedy', model=make_model(context=128))


def ask_through_vllm(model, tokenizer=None, **protocol):
    """What is measured through vLLM, with the weights that it has read and the engine's other settings."""
    seen = []

    with vllm_stand_in() as engine:

        class Watched(engine):
            def __init__(self, model, **settings):
                super().__init__(model, **settings)
                seen.append((Path(model), settings, self.model.state_dict()))

        questions = Questions(
            ['boolq'], Protocol(**protocol), tokenizer or make_tokenizer(), files=FILES, backend='vllm'
        )
        with mock.patch('lm_eval.models.vllm_causallms.LLM', Watched):
            measured = questions.ask(model)
    [(folder, settings, weights)] = seen
    assert not folder.exists()
    return measured, settings, weights


@pytest.mark.parametrize('mode', ['log-likelihood', 'greedy'])
def test_vllm_measures_what_transformers_do(mode):
    model = make_model()
    with mock.patch.object(model, 'to', wraps=model.to) as to:
        found, settings, weights = ask_through_vllm(model, mode=mode, questions=2)
    assert [call.args for call in to.call_args_list] == [('cpu',), (torch.device('cpu'),)]
    assert (settings['dtype'], settings['max_model_len'], settings['seed']) == ('float32', 2048, 37371)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    expected = ask('boolq', mode=mode, questions=2)
    assert found[0] == expected[0]
    assert found[1] == expected[1]


def test_vllm_makes_room_for_the_next_model():
    with vllm_stand_in() as engine:
        questions = Questions(['boolq'], Protocol('log-likelihood'), make_tokenizer(), files=FILES, backend='vllm')
        assert questions.ask(make_model())[0] == questions.ask(make_model())[0]
        assert not engine.alive


@pytest.mark.parametrize('tied', [False, True])
def test_vllm_reads_an_adapter_in_its_base(tied):
    torch.manual_seed(5)
    base = make_model()
    own, read = (
        type(base)(type(base.config).from_dict({**base.config.to_dict(), 'tie_word_embeddings': value})).eval()
        for value in (tied, False)
    )
    config = LoraConfig(
        task_type='CAUSAL_LM',
        r=2,
        target_modules=['q_proj'],
        modules_to_save=['lm_head'],
        use_dora=True,
        init_lora_weights=False,
    )
    model: Any = get_peft_model(own, config).eval()
    torch.nn.init.normal_(model.get_output_embeddings().modules_to_save['default'].weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(3, 40)[None]
    expected = model(ids).logits
    _, _, weights = ask_through_vllm(model, mode='log-likelihood', questions=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    read.load_state_dict(weights)
    torch.testing.assert_close(read(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_adapters_that_cannot_be_merged():
    model = get_peft_model(
        type(make_model())(make_model().config), PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match='PROMPT_TUNING cannot be merged into its base for vLLM: take --backend hf'):
        ask_through_vllm(model, mode='log-likelihood')


def test_vllm_is_missed_before_anything_is_read():
    with pytest.raises(ImportError, match='vLLM is not installed: pip install vllm, or take --backend hf'):
        Suite(['boolq'], backend='vllm')


# How a tokenizer begins texts, and how it ends them.
SPECIALS = [('<s>', None), (None, '</s>'), ('<s>', '</s>'), (None, None)]


def fast_tokenizer(begin, end):
    vocabulary = {'<pad>': 0, '</s>': 1, '<s>': 2, '<unk>': 3, 'is': 4, 'it': 5, 'Answer': 6}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token='<unk>'))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    template = ' '.join(part for part in (begin, '$A', end) if part)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[('<s>', 2), ('</s>', 1)]
    )
    names = {'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '<pad>', 'unk_token': '<unk>'}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def slow_tokenizer(begin, end):
    tokenizer = ByT5Tokenizer(extra_ids=0, bos_token='<s>')
    first, last = ([] if name is None else [tokenizer.convert_tokens_to_ids(name)] for name in (begin, end))
    tokenizer.build_inputs_with_special_tokens = lambda ids, pair=None: [*first, *ids, *last]
    return tokenizer


@pytest.mark.parametrize('make', [fast_tokenizer, slow_tokenizer])
@pytest.mark.parametrize(('begin', 'end'), SPECIALS)
def test_prompts_keep_their_beginning_and_lose_their_end(make, begin, end):
    tokenizer = without_end(make(begin, end))
    text = 'is it\nAnswer'
    plain = tokenizer(text, add_special_tokens=False)['input_ids']
    expected = ([] if begin is None else [tokenizer.convert_tokens_to_ids(begin)]) + plain
    with language_model(make_model(), tokenizer, 'hf', 2, 0) as lm:
        assert lm.tok_encode(text) == expected
        rows, mask = lm.tok_batch_encode([text, 'is'])
    assert rows[0].tolist() == expected
    # Padding is on the left.
    assert (
        rows[1][mask[1].bool()].tolist()
        == [*expected[: len(expected) - len(plain)], *tokenizer('is').input_ids][-int(mask[1].sum()) :]
    )


@pytest.mark.parametrize('backend', ['hf', 'vllm'])
def test_prompts_of_every_backend_are_encoded_alike(backend):
    tokenizer = without_end(slow_tokenizer('<s>', '</s>'))
    with vllm_stand_in(), language_model(make_model(), tokenizer, backend, 2, 0) as lm:
        plain = tokenizer('is it', add_special_tokens=False).input_ids
        assert lm.tok_encode('is it') == [tokenizer.bos_token_id, *plain]


def test_a_tokenizer_without_an_end_of_text():
    tokenizer = fast_tokenizer('<s>', None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match='The tokenizer has no end-of-text token, which questions need'):
        Questions(['boolq'], Protocol(), tokenizer, files=FILES)


def test_wrong_settings():
    with pytest.raises(ValueError, match='The tokenizer has no chat template: leave out --chat-template'):
        Questions(['boolq'], Protocol(), make_tokenizer(), files=FILES, chat=True)
    with pytest.raises(ValueError, match="backend must be one of hf, vllm, not 'tgi'"):
        Questions(['boolq'], Protocol(), make_tokenizer(), files=FILES, backend='tgi')  # pyright: ignore
    with mock.patch.dict('sys.modules', {'lm_eval': None}), pytest.raises(ImportError, match=r'composer_bema\[eval\]'):
        Questions(['boolq'], Protocol(), make_tokenizer(), files=FILES)


QUESTION = '{"question": "is it", "passage": "It is.", "answer": true}'


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{"question": "is it"', "The questions of boolq could not be read from '.*boolq.jsonl': JSON parse error"),
        ('3', "The questions of boolq could not be read from '.*boolq.jsonl'"),
        ('\n\n', "The file '.*boolq.jsonl' is empty, and should have the questions of boolq"),
        (QUESTION.replace('"It is."', 'null'), "'passage' of the questions of '.*boolq.jsonl' holds None, .* a text"),
    ],
)
def test_a_damaged_file(tmp_path, content, message):
    file = tmp_path / 'boolq.jsonl'
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        Questions(['boolq'], Protocol(), make_tokenizer(), files={'boolq': file})
