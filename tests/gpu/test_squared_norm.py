"""The tests of the squared norm on a GPU: the same bodies, with another `device`."""

from tests.unit.kernels.test_squared_norm import *  # noqa: F403
