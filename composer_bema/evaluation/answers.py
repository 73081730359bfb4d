# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What a generated text gives as its answer, or None where it gives none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Optional

__all__ = ['find_letter', 'find_number', 'find_yes_or_no']

# What introduces an answer, and what wraps it: "the answer is B", "Answer: **(B)**", "correct choice: $\boxed{B}$".
_IS = r'(?:\s+(?:is|would\s+be|must\s+be))?\s*[:=]?\s*(?:option\s+|choice\s+)?'
_ANNOUNCED = rf'\b(?:answer|(?:correct|right|best)\s+(?:option|choice))\b{_IS}'
_OPENED = r'[\s*_`"\'(\[$]*(?:\\boxed\{)?(?:\\text\{)?[\s*_`"\'(\[$]*'

_YES_NO = {'yes': True, 'true': True, 'no': False, 'false': False}
_YES_OR_NO = r'\b(yes|no|true|false)\b'

# Thousands may be grouped as in India: 1,50,000.
_DIGITS = r'(?:\d{1,3}(?:[,\u202f\u00a0]\d{2,3})*[,\u202f\u00a0]\d{3}|\d+)(?:\.\d+)?|\.\d+'
# A sign belongs to a number unless it stands after one, or after a word, as in "7-3" and "part-2".
_NUMBER = rf'(?<![\d.])(?:(?<![\w)])[-\u2212]\s?)?(?:[$€£]\s?)?(?:{_DIGITS})(?![\d])'


def find_yes_or_no(text: str) -> Optional[bool]:
    """Returns True for yes, False for no.

    The last "answer: ..." counts, then the first word of the text, then a word that the text has without its opposite.
    True and false count as yes and no.
    """
    text = text.lower()
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

    The last "answer: ..." counts, then a letter that is all of the text or labels its start ("B.", "(B)"),
    then the only one that is named in brackets or as "option B". The article in "A good answer" is no choice.

    Args:
        text (str): The generated text.
        letters (Sequence[str]): The letters of the choices. Default: A to D.
    """
    capital, small = ''.join(letters), ''.join(letters).lower()
    # "the answer is a matter of taste" announces nothing.
    letter = rf'([{capital}](?![\w\'])|[{small}](?![\w\']|\s+[a-z]))'
    announced = re.findall(rf'(?i:{_ANNOUNCED}){_OPENED}{letter}', text)
    if announced:
        return announced[-1].upper()
    first = re.match(rf'{_OPENED}([{capital}{small}])(?:\s*[)\].:,*}}$]|\s*$)', text)
    if first:
        return first[1].upper()
    named = re.findall(rf'\(([{capital}{small}])\)|(?i:\b(?:option|choice)\s+){letter}', text)
    said = {(bracketed or option).upper() for bracketed, option in named}
    return said.pop() if len(said) == 1 else None


def find_number(text: str) -> Optional[Decimal]:
    """Returns the number that a text ends with.

    What stands after the last "####" counts, else what stands after the last "answer is ...", else the last number.
    Thousands separators, currencies, units and trailing zeros do not matter.
    """
    _, marker, marked = text.rpartition('####')
    announced = re.findall(rf'(?i:{_ANNOUNCED}){_OPENED}({_NUMBER})', text)
    numbers = re.findall(_NUMBER, marked)[:1] if marker else []
    numbers = numbers or announced[-1:] or re.findall(_NUMBER, text)[-1:]
    return _decimal(numbers[0]) if numbers else None


def _decimal(number: str) -> Decimal:
    return Decimal(re.sub(r'[^\d.-]', '', number.replace('\u2212', '-')))
