# Copyright 2026 composer_bema authors
# SPDX-License-Identifier: Apache-2.0

"""What can be done with checkpoints when the run is over."""
