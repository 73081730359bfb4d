# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""From a YAML to a Composer Trainer and its records: settings, registry, models, data, outputs, and the run itself."""
