# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Questions through the harness, against likelihoods and generations of the model itself."""

import functools
import json
import logging
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from composer_bema.evaluation.harness import Questions
from composer_bema.evaluation.tasks import SYSTEM_PROMPT, Protocol
from tests.evaluation.models import FILES, make_model, make_tokenizer


@functools.cache
def questions_of(*tasks, chat=False, **protocol):
    return Questions(tasks, Protocol(**protocol), make_tokenizer(chat), files=FILES)


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
    questions = Questions(['boolq'], Protocol('log-likelihood', questions=1), tokenizer, files=FILES)
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


def test_vllm_gets_each_model_as_a_folder():
    seen = []

    def vllm(pretrained, dtype, batch_size):
        from lm_eval.models.huggingface import HFLM

        model = AutoModelForCausalLM.from_pretrained(pretrained)
        seen.append((Path(pretrained), dtype, batch_size, model.state_dict()))
        return HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=4)

    questions = Questions(['boolq'], Protocol('log-likelihood'), make_tokenizer(), files=FILES, backend='vllm')
    with mock.patch('lm_eval.api.registry.get_model', {'vllm': vllm}.get):
        measurements, _ = questions.ask(make_model())
    [(folder, dtype, batch_size, weights)] = seen
    assert (dtype, batch_size) == ('float32', 'auto')
    assert all(torch.equal(tensor, weights[name]) for name, tensor in make_model().state_dict().items())
    assert not folder.exists()
    assert measurements == ask('boolq', mode='log-likelihood')[0]


def test_wrong_settings():
    with pytest.raises(ValueError, match='The tokenizer has no chat template: leave out --chat-template'):
        Questions(['boolq'], Protocol(), make_tokenizer(), files=FILES, chat=True)
    with pytest.raises(ValueError, match="backend must be one of hf, vllm, not 'tgi'"):
        Questions(['boolq'], Protocol(), make_tokenizer(), files=FILES, backend='tgi')  # pyright: ignore
    with mock.patch.dict('sys.modules', {'lm_eval': None}), pytest.raises(ImportError, match=r'composer_bema\[eval\]'):
        Questions(['boolq'], Protocol(), make_tokenizer(), files=FILES)


def test_a_damaged_file(tmp_path):
    file = tmp_path / 'boolq.jsonl'
    file.write_text('{"question": "is it"')
    with pytest.raises(ValueError, match="The questions of boolq could not be read from '.*boolq.jsonl'"):
        Questions(['boolq'], Protocol(), make_tokenizer(), files={'boolq': file})
