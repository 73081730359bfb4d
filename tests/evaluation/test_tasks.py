# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What is asked, of which questions, and how answers are judged."""

import json

import datasets
import numpy as np
import pytest

from composer_bema.evaluation.tasks import HIGH_SCHOOL_SUBJECTS, QUESTION_TASKS, Protocol, task_configs
from tests.evaluation.models import DATA, FILES


def rows_of(count, **columns):
    return datasets.Dataset.from_list([{name: value(i) for name, value in columns.items()} for i in range(count)])


def boolq(count):
    return rows_of(count, question=lambda i: f'is it {i}', passage=lambda i: f'It is {i}.', answer=lambda i: i % 2 == 0)


def config_of(task, protocol=Protocol(), name=None, **kwargs):  # noqa: B008 (it is frozen)
    return task_configs(task, protocol, chat=kwargs.pop('chat', True), **kwargs)[name or task]


@pytest.mark.parametrize(('task', 'count', 'length'), [('boolq', 64, 256), ('gsm8k', 128, 512), ('mmlu_hs', 64, 256)])
def test_the_papers_protocol(task, count, length):
    for name, config in task_configs(task, Protocol(), chat=True).items():
        assert config['repeats'] == 50
        settings = config['generation_kwargs']
        assert settings['max_gen_toks'] == length
        assert (settings['do_sample'], settings['temperature'], settings['top_p'], settings['top_k']) == (True, 1, 1, 0)
        assert QUESTION_TASKS[task][name].questions == count
        assert config['num_fewshot'] == 0


def test_high_school_subjects():
    assert len(HIGH_SCHOOL_SUBJECTS) == 14
    asked = task_configs('mmlu_hs', Protocol(), chat=True)
    assert {config['dataset_path'] for config in asked.values()} == {'cais/mmlu'}
    assert list(asked) == [f'mmlu_hs_{subject}' for subject in HIGH_SCHOOL_SUBJECTS]


@pytest.mark.parametrize(
    ('task', 'name', 'said'),
    [
        ('boolq', 'boolq', ['winter', 'Passage: ', 'Answer: yes']),
        ('gsm8k', 'gsm8k', ['Question: ', '#### 42']),
        ('mmlu_hs', 'mmlu_hs_biology', ['\nA. ', '\nD. ', 'Answer: A']),
    ],
)
def test_prompts(task, name, said):
    rows = [json.loads(line) for line in FILES[task].read_text().splitlines()]
    prompt = config_of(task, name=name)['doc_to_text'](rows[0])
    assert all(part in prompt for part in said)
    # A base model is given a place to go on from.
    assert config_of(task, name=name, chat=False)['doc_to_text'](rows[0]) == f'{prompt}\n\nResponse:'


def test_chain_of_thought_is_asked_for():
    row = json.loads(FILES['boolq'].read_text().splitlines()[0])
    assert 'step by step' not in config_of('boolq')['doc_to_text'](row)
    assert 'step by step' in config_of('boolq', Protocol(chain_of_thought=True))['doc_to_text'](row)


def test_questions_are_those_of_the_papers_code():
    rows = boolq(200)
    expected = sorted(np.random.RandomState(37371).choice(200, 64, replace=False).tolist())
    chosen = config_of('boolq')['process_docs'](rows)
    assert chosen['question'] == [f'is it {i}' for i in expected]
    assert config_of('boolq')['process_docs'](rows)['question'] == chosen['question']
    assert config_of('boolq', Protocol(seed=1))['process_docs'](rows)['question'] != chosen['question']


def test_examples_are_not_asked():
    config = config_of('boolq', Protocol(questions=6, few_shot=3))
    examples = config['fewshot_config']['process_docs'](boolq(9))['question']
    asked = config['process_docs'](boolq(9))['question']
    assert len(examples) == 3
    assert sorted([*examples, *asked]) == [f'is it {i}' for i in range(9)]


def test_fewer_questions_than_wanted():
    config = config_of('boolq', Protocol(few_shot=2))
    assert len(config['process_docs'](boolq(10))) == 8
    with pytest.raises(ValueError, match="'google/boolq' has 2 questions, too few for 2 examples and one to ask"):
        config['process_docs'](boolq(2))


def test_a_subject_has_its_own_questions():
    rows = datasets.load_dataset('json', data_files=str(DATA / 'mmlu_hs.jsonl'), split='train')
    config = config_of('mmlu_hs', name='mmlu_hs_physics')
    assert set(config['process_docs'](rows)['subject']) == {'high_school_physics'}


def test_a_column_is_missing():
    with pytest.raises(ValueError, match="questions of 'google/boolq' have no column 'passage', but"):
        config_of('boolq')['process_docs'](boolq(3).remove_columns('passage'))


def test_errors_name_the_file_that_was_given(tmp_path):
    rows = boolq(2)
    file = tmp_path / 'boolq.jsonl'
    file.write_text('{}')
    for wrong in (rows.remove_columns('passage'), rows.remove_columns('answer').add_column('answer', ['a', 'b'])):
        with pytest.raises(ValueError, match=f"questions of '{file}'"):
            config_of('boolq', file=file)['process_docs'](wrong)
    with pytest.raises(ValueError, match=f"'{file}' has 2 questions, too few for 2 examples"):
        config_of('boolq', Protocol(few_shot=2), file=file)['process_docs'](rows)


def test_answers_of_another_type():
    rows = rows_of(3, question=str, passage=str, answer=lambda i: 'yes')
    with pytest.raises(ValueError, match="column 'answer' of .* holds 'yes', and should hold true or false"):
        config_of('boolq')['process_docs'](rows)


@pytest.mark.parametrize(
    ('task', 'name', 'row', 'answers', 'right', 'silent'),
    [
        ('boolq', None, {'answer': True}, ['Answer: yes', 'no', 'who knows', 'Yes'], 0.5, 0.25),
        ('boolq', None, {'answer': False}, ['Answer: no', 'false'], 1.0, 0.0),
        ('gsm8k', None, {'answer': 'So 1+1 = <<1+1=2>>2.\n#### 1,200'}, ['#### 1200', '1,200.00', '2', ''], 0.5, 0.25),
        ('mmlu_hs', 'mmlu_hs_physics', {'answer': 2}, ['Answer: C', 'C', 'D', 'I would rather not say'], 0.5, 0.25),
    ],
)
def test_a_question_counts_as_the_part_of_its_answers_that_is_right(task, name, row, answers, right, silent):
    judged = config_of(task, name=name)['process_results'](row, [answers])
    assert judged == {'acc': right, 'no_answer': silent}


@pytest.mark.parametrize(
    ('task', 'name', 'row', 'target'),
    [
        ('boolq', None, {'answer': False}, 'Answer: no'),
        ('gsm8k', None, {'answer': '48/2 = <<48/2=24>>24\n#### 24'}, '48/2 = 24\n#### 24'),
        ('mmlu_hs', 'mmlu_hs_physics', {'answer': 3}, 'Answer: D'),
    ],
)
def test_targets_are_judged_right(task, name, row, target):
    config = config_of(task, name=name)
    assert config['doc_to_target'](row) == target
    assert config['process_results'](row, [[target]]) == {'acc': 1.0, 'no_answer': 0.0}


def test_greedy_answers_once():
    config = config_of('boolq', Protocol('greedy', samples=50))
    assert config['repeats'] == 1
    assert config['generation_kwargs']['do_sample'] is False


def test_log_likelihoods_compare_the_choices():
    config = config_of('mmlu_hs', Protocol('log-likelihood'), name='mmlu_hs_physics')
    assert config['doc_to_choice'] == ['Answer: A', 'Answer: B', 'Answer: C', 'Answer: D']
    assert config['doc_to_target']({'answer': 2}) == 2


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'mode': 'beam'}, "mode must be one of sample, greedy, log-likelihood, not 'beam'"),
        ({'samples': 0}, 'samples must be a whole number, at least 1, not 0'),
        ({'questions': 1.5}, 'questions must be a whole number, at least 1, not 1.5'),
        ({'few_shot': True}, 'few_shot must be a whole number, at least 0, not True'),
        ({'seed': -1}, 'seed must be a whole number, at least 0, not -1'),
        ({'mode': 'log-likelihood', 'chain_of_thought': True}, 'there is no chain of thought'),
    ],
)
def test_wrong_protocols(settings, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**settings)


def test_wrong_tasks(tmp_path):
    with pytest.raises(ValueError, match="no task 'arc', but loss, boolq, gsm8k, mmlu_hs"):
        config_of('arc')
    with pytest.raises(ValueError, match='answers of gsm8k are free'):
        config_of('gsm8k', Protocol('log-likelihood'))
    with pytest.raises(FileNotFoundError, match="no file '.*nowhere.jsonl' with the questions of boolq"):
        config_of('boolq', file=tmp_path / 'nowhere.jsonl')
