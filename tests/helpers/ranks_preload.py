"""What every test rank imports; the fork server pays for it once."""

import megatron.core.parallel_state  # noqa: F401

import diffmoe.parallel.zero
import diffmoe.training.checkpoint  # noqa: F401
