# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""Lets the server that ranks are forked from import Composer while the tests before them run."""

from pathlib import Path

import pytest

from tests.distributed import ranks


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts the server if a test of this folder is to be run."""
    here = Path(__file__).parent
    if not session.config.option.collectonly and any(here in item.path.parents for item in session.items):
        ranks.start_server()
