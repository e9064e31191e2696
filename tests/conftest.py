"""Eight virtual devices, and no silent broadcasting between ranks, for every test; set before anything runs."""

import os

import jax
import pytest
from launching import QUICK

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# What compiled once need not compile again, in a later run or in a test's own process.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", ".cache", "jax"))
# Subsets of permutations, too, and not among the user's own.
os.environ.setdefault("XDG_CACHE_HOME", os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".cache")))
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
# XLA takes most of the time of most tests. Without its optimisations it takes half of it, and the small programs of the
# tests are as fast.
jax.config.update("jax_disable_most_optimizations", True)
# XLA reads the flags when the first device is asked for.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()


@pytest.fixture
def full_compile():
  """For tests of what XLA makes of a program: XLA optimises it as it does for users."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)
