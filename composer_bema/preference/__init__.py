# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""DPO with a reference model that can follow an average of the policy."""

from composer_bema.preference.dpo import DPO

__all__ = ['DPO']
