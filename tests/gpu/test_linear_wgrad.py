"""The tests of the weight gradient on a GPU: the same bodies, with another `device`."""

from tests.unit.kernels.test_linear_wgrad import *  # noqa: F403
