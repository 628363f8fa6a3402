"""The tests of the kernels, on a GPU: the same bodies, with another `device`."""

from tests.unit.kernels.test_rms_norm import *  # noqa: F403
from tests.unit.kernels.test_rope import *  # noqa: F403
from tests.unit.kernels.test_swiglu import *  # noqa: F403
