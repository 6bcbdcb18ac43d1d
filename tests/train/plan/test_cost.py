"""Guards the cost of the compiled updates and steps against a record of it.

The programs are those between two refreshes, for the CPU, with two layers of
width 64. Nothing is timed, so the machine does not matter.
"""

import dataclasses
import json
import pathlib
import warnings
from collections.abc import Iterator

import jax
import jaxlib
import pytest

from models.llama import LlamaConfig
from train.config import Config, Layerwise
from train.data.corpus import Chitchat
from train.engine import step as step_lib
from train.engine.mesh import Mesh, devices
from train.engine.task import task_of
from train.method import CLASSES, Galore, Galore8bit
from train.plan.bill import whole_update
from train.plan.cost import cost_of

pytestmark = [pytest.mark.slow, pytest.mark.optimized]

RECORD = pathlib.Path(__file__).with_name('cost.json')
WRITE = 'JAX_PLATFORMS=cpu python -m tests.train.plan.test_cost'
VERSIONS = {'jax': jax.__version__, 'jaxlib': jaxlib.__version__}
KEYS = ('flops', 'bytes', 'launches', 'fusions', 'copies', 'transposes')


def config(name, **given):
  kind = CLASSES[name]
  known = {field.name for field in dataclasses.fields(kind)}
  options = {'rank': 16, 'gap': 10, 'update_proj_gap': 10} | given
  return Config(
    model=LlamaConfig(
      vocab_size=256, width=64, mlp_width=160, num_heads=2, num_layers=2
    ),
    corpus=Chitchat(),
    optimizer=kind(**{k: options[k] for k in options if k in known}),
    steps=20,
    learning_rate=0.01,
    batch_size=4,
    sequence_length=32,
    clip_norm=None,
  )


STEPS = {
  'AdamW': config('AdamW'),
  'Galore': config('Galore'),
  'Galore8bit, layer by layer': dataclasses.replace(
    config('Galore8bit'), update=Layerwise(slices=2)
  ),
}


def step(config):
  """Returns the step, and the shapes of its arguments."""
  init, step = step_lib.build(config, task_of(config))
  return step, jax.eval_shape(init, jax.random.key(0)), task_of(config).inputs()


PROGRAMS = {
  f'update, {name}': lambda name=name: whole_update(
    config(name), devices(Mesh())
  )
  for name in CLASSES
} | {f'step, {name}': lambda x=x: step(x) for name, x in STEPS.items()}


def lowered(f, *arguments):
  with warnings.catch_warnings():
    # For example, JAX warns about a donated buffer that XLA cannot use.
    warnings.simplefilter('error')
    return f.lower(*arguments)


def compiled(f, *arguments):
  return lowered(f, *arguments).compile().as_text()


def differences(old, new, keys=KEYS):
  """Lists the sums that differ by more than a tenth and by more than two."""
  return [
    f'{key}: {old[key]:,.0f} before, {new[key]:,.0f} now'
    for key in keys
    if abs(new[key] - old[key]) > max(2, 0.1 * old[key])
  ]


@pytest.fixture(autouse=True)
def full_locations() -> Iterator[None]:
  """Compiles with full source locations, as users do.

  Other tests shorten the locations to save time. XLA then fuses more.
  """
  name = 'jax_include_full_tracebacks_in_locations'
  before = getattr(jax.config, name)
  jax.config.update(name, True)
  yield
  jax.config.update(name, before)


@pytest.mark.parametrize('name', PROGRAMS)
def test_cost(name):
  record = json.loads(RECORD.read_text())
  new = cost_of(compiled(*PROGRAMS[name]())).to_json()
  # Another version of XLA may fuse differently, but flops do not depend on it.
  same = record['versions'] == VERSIONS
  keys = KEYS if same else ('flops',)
  lines = differences(record['programs'][name], new, keys)
  assert not lines, (
    f'{name}\n'
    + '\n'.join(lines)
    + (
      '\nChanging the record is right where the change is meant, and says why '
      f'it costs that; or for a new JAX (this is {VERSIONS}). It is written '
      f'anew by: {WRITE}'
    )
  )


def test_every_program_is_on_record():
  assert json.loads(RECORD.read_text())['programs'].keys() == PROGRAMS.keys()


def test_a_donation_that_is_of_no_use_is_an_error():
  halve = jax.jit(lambda x: x[::2], donate_argnums=0)
  with pytest.raises(UserWarning, match='donated'):
    lowered(halve, jax.ShapeDtypeStruct((8,), 'float32'))


@pytest.mark.parametrize('name', CLASSES)
def test_a_step_takes_its_state_over(name):
  lowered(*step(config(name)))


@pytest.mark.parametrize('optimizer', [Galore, Galore8bit])
def test_a_layer_wise_step_takes_its_state_over(optimizer):
  base = config(optimizer.__name__)
  lowered(*step(dataclasses.replace(base, update=Layerwise(slices=2))))


def main():
  """Writes the record."""
  jax.config.update('jax_platforms', 'cpu')
  costs = {
    name: cost_of(compiled(*make())).to_json()
    for name, make in PROGRAMS.items()
  }
  record = {'versions': VERSIONS, 'programs': costs}
  RECORD.write_text(json.dumps(record, indent=2) + '\n')


if __name__ == '__main__':
  main()
