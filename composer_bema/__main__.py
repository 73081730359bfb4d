# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""``python -m composer_bema``, for launchers that start a module: the ``composer-bema`` command."""

from composer_bema.cli import main

main(prog_name='composer-bema')
