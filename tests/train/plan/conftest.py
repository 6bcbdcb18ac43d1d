"""Turns off the compilation cache: no buffer assignment is written from it."""

import jax
import pytest


@pytest.fixture(autouse=True)
def no_cache():
  jax.config.update('jax_enable_compilation_cache', False)
  yield
  jax.config.update('jax_enable_compilation_cache', True)
