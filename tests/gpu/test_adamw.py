"""The tests of AdamW on a GPU: the same bodies, with another `device`."""

from tests.unit.kernels.test_adamw import *  # noqa: F403
