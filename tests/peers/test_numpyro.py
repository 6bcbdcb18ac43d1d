"""numpyro: stochastic variational inference of a model with a network."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen as nn
from numpyro.contrib.module import flax_module
from numpyro.infer import SVI, Trace_ELBO
from numpyro.optim import optax_to_numpyro

import galore_optax as go
from tests.galore_optax.program import normal32
from tests.peers import steps

pytestmark = pytest.mark.peers

BATCH, DATA, LATENT = 16, 13, 5
X = jnp.tanh(normal32((BATCH, LATENT), 1)) @ normal32((LATENT, DATA), 2)


class Network(nn.Module):
  """The encoder or decoder of a variational autoencoder."""

  sizes: tuple[int, ...]

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(11)(x))
    return [nn.Dense(size)(x) for size in self.sizes]


def model(x):
  decode = flax_module('decoder', Network((DATA,)), input_shape=(BATCH, LATENT))
  with numpyro.plate('batch', BATCH):
    unit = dist.Normal(jnp.zeros(LATENT), 1).to_event(1)
    (mean,) = decode(numpyro.sample('z', unit))
    numpyro.sample('x', dist.Normal(mean, 0.5).to_event(1), obs=x)


def guide(x):
  encode = flax_module(
    'encoder', Network((LATENT, LATENT)), input_shape=(BATCH, DATA)
  )
  mean, log_scale = encode(x)
  with numpyro.plate('batch', BATCH):
    scale = jnp.exp(log_scale)
    numpyro.sample('z', dist.Normal(mean, scale).to_event(1))


BASES = {
  'decoder$params/Dense_0/kernel': (3, 5),
  'decoder$params/Dense_1/kernel': (3, 11),
  'encoder$params/Dense_0/kernel': (3, 11),
  'encoder$params/Dense_1/kernel': (3, 5),
  'encoder$params/Dense_2/kernel': (3, 5),
}


def inference(tx):
  return SVI(model, guide, optax_to_numpyro(tx), Trace_ELBO())


@pytest.fixture(autouse=True)
def numpy_rank_promotion():
  """numpyro's distributions promote the ranks of their parameters."""
  with jax.numpy_rank_promotion('allow'):
    yield


@pytest.mark.parametrize('stable', [False, True])
@pytest.mark.parametrize(
  'make',
  [
    lambda: optax.chain(go.galore(rank=3, gap=10), optax.adamw(0.03)),
    lambda: go.galore_muon(0.03, rank=3, gap=10),
  ],
  ids=['chain', 'muon'],
)
def test_run(make, stable):
  result = inference(make()).run(
    jax.random.key(0), 60, X, progress_bar=False, stable_update=stable
  )
  assert np.mean(result.losses[-10:]) < 0.8 * np.mean(result.losses[:10])
  _, (params, state) = result.state.optim_state
  assert steps.bases(state) == BASES
  assert jax.tree.structure(params) == jax.tree.structure(result.params)


def test_update_is_that_of_a_dict():
  tx = go.galore_adamw(0.1, weight_decay=0.1, rank=3, gap=2)
  svi = inference(tx)
  params = svi.get_params(svi.init(jax.random.key(0), X))
  steps.assert_container_does_not_matter(tx, params)
  steps.assert_same_steps(tx, params)
