# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What the recipes for llm-foundry say of themselves; `test_llmfoundry.py` trains them where llm-foundry is."""

from pathlib import Path

import pytest
import yaml

from tests.llmfoundry.foundry import RECIPES, ROOT


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_opens_with_its_command(recipe: Path):
    header = recipe.read_text().split('\n\n')[0]
    assert f'llmfoundry train {recipe.relative_to(ROOT)}' in header
    assert 'First: the extra `llmfoundry`' in header
    assert 'One override: ' in header
    assert yaml.safe_load(recipe.read_text())['run_name'] == recipe.stem
