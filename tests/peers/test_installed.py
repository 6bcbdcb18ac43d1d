"""The environment of the peers has all of them."""

import importlib.util
import pathlib

import pytest

from tests.peers.conftest import PEERS

pytestmark = pytest.mark.peers


def test_no_peer_is_left_out():
  here = pathlib.Path(__file__).parent
  files = {path.name for path in here.glob('test_*.py')}
  others = {'test_installed.py', 'test_optax.py', 'test_page.py'}
  assert files == {*PEERS, *others}
  assert all(map(importlib.util.find_spec, PEERS.values()))
