# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What a generated text gives as its answer, or None where it gives none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Optional

__all__ = ['find_letter', 'find_number', 'find_yes_or_no']

# What introduces an answer, and what wraps it: "the answer is B", "Answer: **(B)**", "so we have $\boxed{\text{B}}$",
# "<answer>B</answer>".
_VERB = r'(?:is|would\s+be|must\s+be|should\s+be|has\s+to\s+be)'
_ADVERB = r'(?:\s+(?:actually|clearly|indeed|simply|therefore|thus|approximately|about))?'
_IS = (
    r'(?:\s+to\s+(?:the|this)\s+(?:question|problem))?\W{0,4}?'
    rf'(?:\s*{_VERB}{_ADVERB}\s*:?|\s*[:=\uff1a\u2013\u2192-]|\s*\n)'
)
_OF_A_CHOICE = r'\s*(?:(?:option|choice|letter)\s+)?'
_ANNOUNCED = (
    r'(?:(?<!wrong\s)(?<!incorrect\s)(?<!other\s)(?<!</)\b(?:answer|(?:correct|right|best)\s+(?:option|choice))s?\b'
    rf'{_IS}{_OF_A_CHOICE}|\\boxed\{{|<answer>)'
)
_OPENED = r'(?:[\s*_`"\'(\[<\u201c\u2018]|\\[(\[]|\$(?!\s*[\d.-])|\\(?:boxed|text|textbf|mathrm|mathbf)\{)*'

_YES_NO = {'yes': True, 'true': True, 'no': False, 'false': False}
# "no answer", "no longer" and "not true" say something else, and "yes or no" repeats the question.
_ELSE = r'(?:answer|information|one|doubt|evidence|longer|mention|indication|problem)\b'
_YES_OR_NO = (
    r'(?<!not\s)(?<!or\s)(?<![a-z0-9])(yes|no|true|false)(?![a-z0-9]|-\w)'
    rf'(?!\s+{_ELSE})(?!["\s]*(?:or|/)[\s"]*(?:yes|no|true|false|answer)\b)'
)

_IS_WRONG = r'\s+(?:is|are)\s+(?:wrong|incorrect|false|not)\b'

# 1.200,50 and 1.200.000 can only be as much of Europe writes numbers, while 1.200 is one and a fifth here. Elsewhere
# thousands may be grouped as in India: 1,50,000.
_EUROPEAN = r'[1-9]\d{0,2}(?:(?:\.\d{3})+,\d{1,2}|(?:\.\d{3}){2,})(?!\d|[.,]\d)'
_DIGITS = rf'{_EUROPEAN}|(?:\d{{1,3}}(?:,\d{{2,3}})*,\d{{3}}|\d+)(?:\.\d+)?|\.\d+'
# A date such as 3/4/2026 has more than one slash.
_FRACTION = rf'(?<!/)(?:\d+\s(?=\d+/))?(?:{_DIGITS})\s?/\s?[1-9]\d*(?![\d/]|[.,]\d)'
_CURRENCY = r'(?:(?:US)?\\?[$\u20ac\u00a3\u00a5]\s?|USD\s?)'
# A sign belongs to a number unless it stands after one, or after a word, as in "7 - 3" and "part-2".
_NUMBER = (
    rf'(?<![\d.])(?:(?<![\w)])(?<!\d\s)[-\u2212]\s?)?(?:{_CURRENCY}[-\u2212]?\s?)?(?:{_FRACTION}|(?:{_DIGITS})(?!\d))'
)
# As TeX has them, and with the spaces between thousands that are no ends of words.
_WRITTEN_OTHERWISE = (
    (r'\{,\}', ','),
    (r'\\[dt]?frac\{\s*([-\u2212]?[\d.]+)\s*\}\{\s*(\d+)\s*\}', r' \1/\2'),
    (r'(?<=\d)[\u202f\u00a0](?=\d{3}(?!\d))', ','),
)


def find_yes_or_no(text: str) -> Optional[bool]:
    """Returns True for yes, False for no.

    The last "answer: ..." counts, then the first word of the text, then a word that the text has without its opposite.
    True and false count as yes and no.
    """
    text = _squeezed(text).lower()
    announced = re.findall(_ANNOUNCED + _OPENED + _YES_OR_NO, text)
    if announced:
        return _YES_NO[announced[-1]]
    first = re.match(_OPENED + _YES_OR_NO, text)
    if first:
        return _YES_NO[first[1]]
    said = {_YES_NO[word] for word in re.findall(_YES_OR_NO, text)}
    return said.pop() if len(said) == 1 else None


def find_letter(text: str, letters: Sequence[str] = 'ABCD') -> Optional[str]:
    """Returns the letter of a choice.

    The last "answer: ..." counts, then a letter that is all of the first line or labels its start ("B.", "(B)") while
    no other line starts so, then the only one that is named in brackets, as "option B" or as "B is correct". The
    article in "A good answer" is no choice, and neither are several, nor what "is wrong".

    Args:
        text (str): The generated text.
        letters (Sequence[str]): The letters of the choices. Default: A to D.
    """
    text = _squeezed(text)
    every = ''.join(letters) + ''.join(letters).lower()
    # Neither one of several, nor part of a word or formula, nor the article: "the answer is a matter of taste".
    end = rf"(?![\w']|-\w|\+|\s*=|(?:\s*,)?\s*(?:,|\band\b|\bor\b)\s*\(?[{every}]\b)"
    letter = rf'(?:(?!a\s+[a-z])([{every}]){end})'
    announced = re.findall(rf'(?i:{_ANNOUNCED}){_OPENED}{letter}(?!{_IS_WRONG})', text)
    if announced:
        return announced[-1].upper()
    labels = re.findall(rf'^{_OPENED}{letter}(?:\s*[)\].:,*$](?!{_IS_WRONG})|[ \t]*$)', text, re.MULTILINE)
    if labels and re.match(_OPENED + letter, text):
        return labels[0].upper() if len({label.upper() for label in labels}) == 1 else None
    named = re.findall(
        rf'\(([{every}])\)(?!{_IS_WRONG})|(?i:\b(?:option|choice)\s+){letter}(?!{_IS_WRONG})|\b{letter}\)?\s+is\s+(?:the\s+)?(?:correct|right|best)\b',
        text,
    )
    said = {''.join(found).upper() for found in named}
    return said.pop() if len(said) == 1 else None


def find_number(text: str) -> Optional[Decimal]:
    """Returns the number that a text ends with.

    What stands after the last "####", "answer is ..." or box counts, whichever comes last; of an equation its right
    side; else the last number of the text. Thousands separators, currencies, units and trailing zeros do not matter,
    and a fraction is its value.
    """
    for pattern, replacement in _WRITTEN_OTHERWISE:
        text = re.sub(pattern, replacement, text)
    text = _squeezed(text)
    markers = re.finditer(rf'####|(?i:{_ANNOUNCED})', text)
    end = len(text)
    for marker in reversed(list(markers)):
        line = re.split(r'\n|\.\s', text[marker.end() : end].lstrip('\n '), maxsplit=1)[0]
        numbers = re.findall(_NUMBER, line.rpartition('=')[2])
        if numbers:
            return _decimal(numbers[0])
        end = marker.start()
    numbers = re.findall(_NUMBER, text)
    return _decimal(numbers[-1]) if numbers else None


def _squeezed(text: str) -> str:
    # Models go on with blanks for ever, over which patterns would go again and again.
    return re.sub(r'\n\s+', '\n', re.sub(r'[^\S\n]+', ' ', text))


def _decimal(number: str) -> Decimal:
    numerator, _, denominator = number.partition('/')
    *whole, value = (_plain(digits) for digits in re.findall(r'[\d.,]+', numerator))
    if denominator:
        value = sum(whole) + value / Decimal(denominator)
    return -value if re.search('[-\u2212]', number) else value


def _plain(digits: str) -> Decimal:
    if re.fullmatch(_EUROPEAN, digits):
        digits = digits.replace('.', '').replace(',', '.')
    return Decimal(digits.replace(',', ''))
