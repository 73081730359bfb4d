# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What tests of the averages share."""

import pytest

from composer_bema.averaging import kernels


@pytest.fixture
def by_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what was compiled from being used."""
    monkeypatch.setattr(kernels, '_compiled', lambda: None)
