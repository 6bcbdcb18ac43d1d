"""brax: a PPO loss in `gradient_update_fn`, which takes any optimizer.

The function `train` of each agent creates `optax.adam` itself, so a program
with another optimizer calls `gradient_update_fn`. It passes no parameters to
the update, so an optimizer with weight decay cannot be used.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from tests.peers import steps

# brax logs an error because an optional backend of its simulator is missing.
logging.disable(logging.ERROR)
from brax.training import gradients, types  # noqa: E402
from brax.training.agents.ppo import losses  # noqa: E402
from brax.training.agents.ppo import networks as ppo_networks  # noqa: E402

logging.disable(logging.NOTSET)

pytestmark = pytest.mark.peers

OBSERVATION, ACTION, BATCH, TIME = 7, 3, 16, 5

BASES = {
  'policy/params/hidden_0/kernel': (4, 7),
  'policy/params/hidden_1/kernel': (4, 9),
  'policy/params/hidden_2/kernel': (4, 6),
  'value/params/hidden_0/kernel': (4, 7),
  'value/params/hidden_1/kernel': (4, 13),
}


def network():
  return ppo_networks.make_ppo_networks(
    OBSERVATION,
    ACTION,
    policy_hidden_layer_sizes=(11, 9),
    value_hidden_layer_sizes=(13, 17),
  )


def initial():
  keys, nets = jax.random.split(jax.random.key(0)), network()
  return losses.PPONetworkParams(
    policy=nets.policy_network.init(keys[0]),
    value=nets.value_network.init(keys[1]),
  )


def transitions(params):
  """Returns a batch whose reward depends on the observation and the action."""
  nets, keys = network(), jax.random.split(jax.random.key(1), 2)
  observations = jax.random.normal(keys[0], (BATCH, TIME + 1, OBSERVATION))
  act = ppo_networks.make_inference_fn(nets)((None, params.policy))
  action, extras = act(observations[:, :-1], keys[1])
  return types.Transition(
    observation=observations[:, :-1],
    action=action,
    reward=action[..., 0] + observations[:, :-1, 0],
    discount=jnp.ones((BATCH, TIME)),
    next_observation=observations[:, 1:],
    extras={
      'policy_extras': extras,
      'state_extras': {'truncation': jnp.zeros((BATCH, TIME))},
    },
  )


@pytest.fixture(autouse=True)
def numpy_rank_promotion():
  """brax promotes the ranks of its distributions' parameters."""
  with jax.numpy_rank_promotion('allow'):
    yield


MAKERS = {
  'chain': lambda: optax.chain(
    optax.clip_by_global_norm(1.0),
    go.galore(rank=4, gap=10),
    optax.adam(3e-2),
  ),
  'galore_adamw': lambda: go.galore_adamw(3e-2, rank=4, gap=10),
  'galore_muon': lambda: go.galore_muon(3e-2, rank=4, gap=10),
  'frugal': lambda: go.frugal(3e-3, density=0.5, gap=10),
}


@pytest.mark.parametrize('name', MAKERS)
def test_training(name):
  tx, params = MAKERS[name](), initial()
  loss = functools.partial(losses.compute_ppo_loss, ppo_network=network())
  update = gradients.gradient_update_fn(
    loss, tx, pmap_axis_name=None, has_aux=True
  )
  data = transitions(params)

  @jax.jit
  def train(params, state):
    def step(carry, key):
      params, state = carry
      (_, metrics), params, state = update(
        params, None, data, key, optimizer_state=state
      )
      return (params, state), metrics['total_loss']

    keys = jax.random.split(jax.random.key(2), 40)
    return jax.lax.scan(step, (params, state), keys)

  (params, state), found = train(params, tx.init(params))
  assert np.mean(found[-5:]) < 0.8 * np.mean(found[:5])
  assert isinstance(params, losses.PPONetworkParams)
  bases = steps.bases(state)
  assert name == 'frugal' or bases == BASES
  assert bases.keys() >= BASES.keys()


def test_update_is_that_of_a_dict():
  tx = go.galore_adamw(0.1, weight_decay=0.1, rank=4, gap=2)
  steps.assert_container_does_not_matter(tx, initial())
  steps.assert_same_steps(tx, initial())
