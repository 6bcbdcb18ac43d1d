"""Collects the tests of a peer only if its package is installed."""

import importlib.util

PEERS = {
  'test_brax.py': 'brax',
  'test_chex.py': 'chex',
  'test_equinox.py': 'equinox',
  'test_flax.py': 'flax',
  'test_haiku.py': 'haiku',
  'test_haliax.py': 'haliax',
  'test_jaxopt.py': 'jaxopt',
  'test_numpyro.py': 'numpyro',
  'test_optimistix.py': 'optimistix',
  'test_tunix.py': 'tunix',
}
"""Maps each file to the package that it imports. test_installed.py checks that
none is missing if the tests run for the peers."""

collect_ignore = [
  name
  for name, package in PEERS.items()
  if not importlib.util.find_spec(package)
]
