"""Strict flags for every test: eight CPU devices, no silent broadcasting."""

import jax

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_configure(config):
  # The default tests compile far more than they compute. Slow and parity
  # tests are about speed, memory and numbers as users get them.
  quick = 'not slow' in config.option.markexpr
  jax.config.update('jax_disable_most_optimizations', quick)
