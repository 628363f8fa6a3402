"""The tests of the cross-entropy on a GPU: the same bodies, with another `device`."""

from tests.unit.kernels.test_cross_entropy import *  # noqa: F403
