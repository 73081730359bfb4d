# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Answers as models write them, from plain to evasive."""

from decimal import Decimal

import pytest

from composer_bema.evaluation.answers import find_letter, find_number, find_yes_or_no


@pytest.mark.parametrize(
    ('text', 'answer'),
    [
        ('yes', True),
        ('No.', False),
        ('**Yes**, the passage says so.', True),
        ('True', True),
        ('The passage says nothing of it. Answer: no', False),
        ('One might say yes at first. But the answer is: **No**.', False),
        ('Answer: yes\n\nWait. Answer: no', False),
        ('Is it so? In a way, no: the law forbids it. Hence no.', False),
        ('Yes and no.', True),
        ('It is true that some do, and false that all do.', None),
        ('I cannot answer that.', None),
        ('I know nothing of Norway.', None),
        ('', None),
        ('The final answer is \\boxed{\\text{yes}}', True),
        ('The answer would be "false"', False),
        ('No answer is given in the passage.', None),
        ('The answer is not yes.', None),
        ('Answer: yes or no', None),
        ('Yes. The answer is no longer in doubt.', True),
        ('Answer: _no_', False),
        ('The answer to the question is clearly no.', False),
        ('**Answer:** yes', True),
        ('### Answer\nyes', True),
        ('<think>No?</think>\n<answer>yes</answer>', True),
        ('<answer>\nNo\n</answer>\nYes, that was hard.', False),
    ],
)
def test_yes_or_no(text, answer):
    assert find_yes_or_no(text) is answer


@pytest.mark.parametrize(
    ('text', 'letter'),
    [
        ('B', 'B'),
        (' (c)', 'C'),
        ('D.', 'D'),
        ('A. The mitochondria', 'A'),
        ('Answer: A', 'A'),
        ('**Answer: (B)**', 'B'),
        ('The correct answer is C, since A and B are wrong.', 'C'),
        ('The answer is $\\boxed{D}$.', 'D'),
        ('At first the answer is A. No: the answer is B.', 'B'),
        ('The correct option is b', 'B'),
        ('I choose (C) because of the heat.', 'C'),
        ('Both (A) and (B) are possible.', None),
        ('A good answer depends on the context.', None),
        ('The answer is a matter of taste.', None),
        ('The answer is debatable.', None),
        ('I cannot help with that.', None),
        ('', None),
        ('A. x\nB. y\nC. z\nD. w\nAnswer: D', 'D'),
        ('Option B is right.', 'B'),
        ('Option A is wrong and option B is right.', 'B'),
        ('Option B is wrong, and option C is correct.', 'C'),
        ('Option A is wrong.', None),
        ('choice B is incorrect', None),
        ('Answer: B is wrong', None),
        ('The answer is B. Option C is wrong.', 'B'),
        ('The best choice is c', 'C'),
        ('E', None),
        ('Answer\uff1aB', 'B'),
        ('The answer is therefore B.', 'B'),
        ('Thus, the correct answer to the question is B.', 'B'),
        ('The final answer is \\(\\boxed{\\textbf{C}}\\).', 'C'),
        ('**Answer: B) 42**', 'B'),
        ('### Answer\n\n**D**', 'D'),
        ('B\n\nBecause of the heat.', 'B'),
        ('C is the correct answer.', 'C'),
        ('The answer is b because x', 'B'),
        ('Answer: B\nExplanation: the answer A is wrong', 'B'),
        ('Correct answer: B. Wrong answer: A', 'B'),
        ('Answer: A and B', None),
        ('Answer: A, B, C or D', None),
        ('A. Wrong.\nB. Right.\nSo B', None),
        ('The answer is $C = 4$', None),
        ('<answer>B</answer>', 'B'),
        ('Not (A) nor (D).\n<answer> (b) </answer>\nA good choice.', 'B'),
        ('A) is wrong; B) is right', 'B'),
        ('(A) is wrong, (B) is right, (C) is not to the point', 'B'),
        ('A. is incorrect.\nC. is what I choose.', 'C'),
        ('A) is wrong.', None),
        ('A) is right; B) is wrong', 'A'),
    ],
)
def test_letter(text, letter):
    assert find_letter(text) == letter


def test_letters_of_other_choices():
    assert find_letter('Answer: E', 'ABCDE') == 'E'


@pytest.mark.parametrize(
    ('text', 'number'),
    [
        ('#### 42', '42'),
        ('48/2 = 24. 48 + 24 = 72\n#### 72', '72'),
        ('#### $1,234.50', '1234.5'),
        ('#### 1,000,000 apples', '1000000'),
        ('#### 10 hours and 30 minutes', '10'),
        ('#### -3', '-3'),
        ('#### \u22125', '-5'),
        ('#### 7.00', '7'),
        ('#### .5', '0.5'),
        ('#### 20%', '20'),
        ('#### 12. That is all 3 of them.', '12'),
        ('She has 7-3 = 4 left.', '4'),
        ('10 - 3', '3'),
        ('Answer: -$5', '-5'),
        ('Answer: $-5', '-5'),
        ('The total is $1{,}234$.', '1234'),
        ('#### 16 - 3 - 4 = 9', '9'),
        ('#### Step 1\n3 + 4 = 7\n\nThe answer is 7', '7'),
        ('\\[ \\boxed{18} \\]\n\nSo in 3 days', '18'),
        ('The answer is approximately $18, as in step 3.', '18'),
        ('So the answer is 9*2=18.', '18'),
        ('Answer: US$18 for 2', '18'),
        ('The answer is 18, since 9 + 9 = 18. Check: 18 / 2 = 9.', '18'),
        ('The answer is: **$35**. It took 3 steps.', '35'),
        ('So it is \\boxed{120} km in 2 hours. The answer is \\boxed{120}.', '120'),
        ('I think it is 5, no, 6.', '6'),
        ('#### none, but the answer is 8', '8'),
        ('#### 1\nWait.\n#### 2', '2'),
        ('Buses: 3, 5, 9.', '9'),
        ('It costs 1,50,000 or so', '150000'),
        ('#### 1/2', '0.5'),
        ('The answer is 3/4 of a cake.', '0.75'),
        ('Answer: \\boxed{\\frac{3}{4}}', '0.75'),
        ('Answer: \\boxed{\\frac{-1}{2}}', '-0.5'),
        ('We get \\frac{2.5}{5}', '0.5'),
        ('Answer: $-\\dfrac{1}{4}$', '-0.25'),
        ('#### 2 1/2', '2.5'),
        ('#### -$1,200 / 8', '-150'),
        ('So 18 / 2 = 9', '9'),
        ('The answer is 18/4 = 4.5', '4.5'),
        ('It was on 3/4/2026', '2026'),
        ('#### 5/0', '5'),
        ('#### 1.200,50 \u20ac', '1200.50'),
        ('Answer: 1.200.000', '1200000'),
        ('#### 1.200', '1.2'),
        ('#### 1.234.567,8', '1234567.8'),
        ('#### 1\u00a0200', '1200'),
        ('#### 1,234.500', '1234.5'),
        ('<answer>42</answer> in 3 steps', '42'),
        ('I cannot do sums.', None),
        ('', None),
        ('####', None),
    ],
)
def test_number(text, number):
    assert find_number(text) == (None if number is None else Decimal(number))


def test_what_counts_as_equal_numbers():
    assert find_number('#### 42.0') == find_number('the answer is 42') == Decimal(42)
    assert find_number('#### 42.1') != Decimal(42)


@pytest.mark.parametrize('find', [find_letter, find_number, find_yes_or_no])
@pytest.mark.parametrize(
    'run', [' ', '\n', ' \n', '*', '(', '-', '1,000', ',000', '1.000', '1/', 'answer ', 'answer: ', '<answer>']
)
def test_endless_repetition_takes_no_time(find, run):
    for start in ('answer', 'The answer is', '#### '):
        find(start + run * 3000 + 'zz')
