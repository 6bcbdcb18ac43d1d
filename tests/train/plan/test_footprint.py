"""Checks estimates of the shipped configs, which need no compiler."""

import dataclasses
import pathlib

import jax
import pytest

from models.llama import LlamaConfig
from train.config import Layerwise
from train.engine import step
from train.engine.command import load
from train.engine.task import task_of
from train.method import Galore
from train.plan.footprint import Cards, make_plan

ROOT = pathlib.Path(__file__).parents[3]
# Configs that contain their model. Others take the model of a checkpoint.
SHIPPED = {
  path.stem: path
  for path in sorted(ROOT.glob('configs/*.py'))
  if isinstance(load(str(path)).model, LlamaConfig)
}


def marked(name):
  # Large models are slow, because a layer-wise state is traced weight by
  # weight. One size of each paper is enough, and two sizes of GaLore's.
  large = '7b' in name or '8b' in name
  another = name.startswith(('scale', 'frugal'))
  another |= name in ('llama_130m', 'llama_350m')
  return pytest.param(name, marks=[pytest.mark.slow] * (large or another))


def estimate(config):
  return make_plan(config, Cards('rtx4090', estimate=True))


def num_bytes(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize('name', [marked(n) for n in SHIPPED])
def test_state_is_exact_to_the_byte(name):
  config = load(str(SHIPPED[name]))
  # The state of each config fits on this GPU.
  plan = make_plan(config, Cards('h100', estimate=True))
  init, _ = step.build(config, task_of(config))
  state = jax.eval_shape(init, jax.random.key(0))
  assert plan.state_bytes == num_bytes((state.params, state.optimizer))
  weights = plan.parameter_bytes + plan.vocabulary_bytes
  assert weights == num_bytes(state.params)
  assert sum(plan.parts.values()) == plan.total_bytes
  # An estimate has no temporaries, so it cannot show that a plan fits.
  assert plan.fits is None


GALORE = [
  name
  for name, path in SHIPPED.items()
  if type(load(str(path)).optimizer) is Galore
]


# State of a basis that is not the basis: energy, overlap with the last basis,
# and the number of the refresh.
NOTED_BYTES = 3 * 4


def moment_elements(model, rank):
  """Returns the elements of one moment, with projected layer matrices."""
  d, f, layers = model.width, model.mlp_width, model.num_layers
  low = layers * rank * (4 * d + 3 * f)
  return low + 2 * model.vocab_size * d + (2 * layers + 1) * d


@pytest.mark.parametrize('name', [marked(n) for n in GALORE])
def test_state_is_what_the_paper_counts(name):
  """Table 1 of the paper: m r + 2 n r elements for a weight [m, n], m <= n."""
  config = load(str(SHIPPED[name]))
  model, rank = config.model, config.optimizer.rank
  d, f = model.width, model.mlp_width
  size = 2 if model.param_dtype == 'bfloat16' else 4
  layers = model.num_layers
  plan = estimate(config)
  # The width is the shorter side of q, k, v, o, gate, up and down.
  basis = size * layers * 7 * rank * d
  assert plan.basis_bytes == basis + NOTED_BYTES * layers * 7
  moments = 2 * 4 * moment_elements(model, rank)
  assert 0 <= plan.moment_bytes - moments < 1024  # counters, probes
  assert plan.vocabulary_bytes == size * 2 * model.vocab_size * d
  matrices = layers * (4 * d * d + 3 * d * f)
  assert plan.parameter_bytes == size * (matrices + (2 * layers + 1) * d)


def test_sums_of_projected_gradients_are_counted():
  config = dataclasses.replace(
    load(str(SHIPPED['quickstart'])),
    optimizer=Galore(rank=64, subspace='power'),
  )
  sums = {}
  for parts, dtype in ((1, 'float32'), (2, 'float32'), (2, 'bfloat16')):
    update = Layerwise(accumulate=parts, sums=dtype)
    plan = estimate(dataclasses.replace(config, update=update))
    sums[parts, dtype] = plan.gradient_bytes
  elements = moment_elements(config.model, 64)
  assert sums[2, 'float32'] - sums[1, 'float32'] == 4 * elements
  assert sums[2, 'bfloat16'] - sums[1, 'float32'] == 2 * elements


def test_gradients_of_one_layer_exist_at_a_time():
  config = load(str(SHIPPED['llama_7b']))
  model = config.model
  d, f = model.width, model.mlp_width
  assert (d, f, model.vocab_size) == (4096, 11008, 32_000)
  # Weights are bfloat16. Two norms are in each layer. The embedding, which is
  # outside the stack, is smaller than a layer.
  layer = 2 * (4 * d * d + 3 * d * f + 2 * d)
  assert estimate(config).gradient_bytes == layer > 2 * model.vocab_size * d


def test_cards_share_the_state():
  config = load(str(SHIPPED['llama_60m']))
  one = estimate(config)
  eight = make_plan(config, Cards('rtx4090', 8, estimate=True))
  # All arrays are sharded, except norms and counters.
  small = 2 * (2 * 8 + 1) * 512
  assert eight.vocabulary_bytes * 8 == one.vocabulary_bytes
  assert eight.parameter_bytes == (one.parameter_bytes - small) / 8 + small
  noted = NOTED_BYTES * 8 * 7
  assert (eight.basis_bytes - noted) * 8 == one.basis_bytes - noted
  assert eight.activation_bytes * 8 == one.activation_bytes
  assert sum(eight.parts.values()) == eight.total_bytes < one.total_bytes / 7
