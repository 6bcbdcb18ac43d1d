"""What is compiled for a card that is not there cannot be read from a cache."""

import jax
import pytest


@pytest.fixture(autouse=True)
def no_cache():
  jax.config.update('jax_enable_compilation_cache', False)
  yield
  jax.config.update('jax_enable_compilation_cache', True)
