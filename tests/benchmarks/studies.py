# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""How tests run the scripts of `benchmarks/`: as a user does, in a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_study(name: str, *arguments: str, cwd: Path) -> str:
    """What a script prints."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, str(ROOT / 'benchmarks' / name), *arguments]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout
