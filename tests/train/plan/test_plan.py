"""Tests the planner: bytes that add up, and errors with a remedy."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import re

import jax
import pytest

from models import huggingface_config
from models.encoder import EncoderConfig, Layers
from train.engine import machine
from train.engine.command import load
from train.plan import __main__ as plan
from train.plan import cards, compare
from train.plan.bill import make_bill
from train.plan.cards import GPUS
from train.plan.footprint import Cards
from train.plan.program import arrays

ROOT = pathlib.Path(__file__).parents[3]

needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec('jax_cuda12_plugin') is None,
  reason='needs the extra `plan`',
)

CONFIG = """
from models.llama import LlamaConfig
from train.config import Config, Layerwise
from train.data.corpus import Chitchat
from train.method import Galore

config = Config(
  model=LlamaConfig(
    vocab_size=256, width=64, mlp_width=160, num_heads=2, num_layers=3
  ),
  corpus=Chitchat(),
  optimizer=Galore(rank=16, gap=10, subspace='power'),
  update=Layerwise(clip='previous', slices=2),
  steps=10,
  learning_rate=0.01,
  batch_size=4,
  sequence_length=32,
)
"""


@pytest.fixture
def config(tmp_path):
  path = tmp_path / 'small.py'
  path.write_text(CONFIG)
  return str(path)


def report(capsys, *args):
  assert plan.main([*args, '--json']) == 0
  return json.loads(capsys.readouterr().out)


def test_a_batch_that_its_microbatches_do_not_divide(tmp_path, capsys):
  path = tmp_path / 'parts.py'
  text = CONFIG.replace("Layerwise(clip='previous', slices=2)", 'WholeTree()')
  text = text.replace('Config, Layerwise', 'Config, WholeTree')
  path.write_text(text.replace('batch_size=4', 'batch_size=8, microbatches=4'))
  found = [
    report(capsys, str(path), '--estimate', *options)
    for options in (
      *(['--batch-size', '6'], ['--batch-size=8'], ['--batch_size', '6']),
    )
  ]
  # Batch 6 has two microbatches of three rows, and batch 8 has four of two.
  row = 3 * 32 * 64 * 4
  expected = [3 * row, 2 * row, 3 * row]
  assert [x['activation_bytes'] for x in found] == expected
  assert found[0]['temp_bytes'] is None


def test_estimate_is_exact_for_weights_and_state(config, capsys):
  found = report(capsys, config, '--estimate', '--device', 'a100-80')
  matrices = 3 * (4 * 64 * 64 + 3 * 64 * 160)
  assert found['parameter_bytes'] == 4 * (matrices + 2 * 3 * 64 + 64)
  assert found['vocabulary_bytes'] == 4 * 2 * 256 * 64
  # Each basis has three further numbers in the state.
  assert found['basis_bytes'] == 4 * 3 * 7 * (16 * 64 + 3)
  low = 3 * 16 * (4 * 64 + 3 * 160)
  rest = 2 * 256 * 64 + 7 * 64
  assert 0 <= found['moment_bytes'] - 8 * (low + rest) < 1024
  assert found['activation_bytes'] == 4 * 3 * 4 * 32 * 64
  share = machine.MEMORY_SHARE * GPUS['a100-80'].memory_bytes
  assert found['capacity_bytes'] == int(share)
  assert found['workspace_bytes'] == 0
  assert found['fits'] is None


@pytest.fixture(scope='module')
def roberta(tmp_path_factory):
  """A small RoBERTa, of which only config.json exists."""
  directory = tmp_path_factory.mktemp('roberta')
  config = EncoderConfig(
    vocab_size=320,
    width=16,
    mlp_width=32,
    num_heads=2,
    num_layers=2,
    num_positions=66,
    family='roberta',
    num_types=1,
    pad_id=1,
    dropout=0.1,
  )
  fields = huggingface_config.fields_of(config)
  (directory / 'config.json').write_text(json.dumps(fields))
  return ['--checkpoint', str(directory)]


@pytest.mark.parametrize(
  'task', ['cola', pytest.param('stsb', marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
  'update', ['WholeTree', pytest.param('Layerwise', marks=pytest.mark.slow)]
)
def test_an_estimate_of_an_encoder_is_exact(roberta, capsys, task, update):
  path = str(ROOT / f'configs/glue_{task}.py')
  found = report(
    capsys, path, *roberta, '--estimate', '--update', update, '--batch-size=8'
  )
  config = load(path)
  config = dataclasses.replace(config, checkpoint=roberta[1]).resolved()
  shapes = jax.eval_shape(Layers(config.model).init, jax.random.key(0))
  weights = sum(4 * x.size for x in jax.tree.leaves(shapes))
  assert found['parameter_bytes'] + found['vocabulary_bytes'] == weights
  # Six kernels in each of two layers, of rank 4, with three further numbers.
  assert found['basis_bytes'] == 4 * 2 * 6 * (4 * 16 + 3)
  # The config has 512 tokens, but the model has only 64 positions.
  assert (found['batch_size'], found['sequence_length']) == (8, 64)
  assert found['activation_bytes'] == 4 * 2 * 8 * 64 * 16
  assert found['attention'] == 'blockwise'


@pytest.mark.slow
def test_every_method_and_bar_is_planned_for_an_encoder(
  roberta, tmp_path, capsys
):
  path = str(ROOT / 'configs/glue_cola.py')
  found = report(capsys, path, *roberta, '--estimate', '--compare')
  methods = [plan['method'] for plan in found]
  assert methods == [*compare.methods(load(path))]
  assert plan.main([path, *roberta, '--estimate', '--compare']) == 0
  assert 'APOLLO-Mini' in capsys.readouterr().out
  bars = tmp_path / 'bars.png'
  report(capsys, path, *roberta, '--estimate', '--plot', str(bars))
  assert bars.read_bytes().startswith(b'\x89PNG')


def test_a_plan_of_an_encoder_needs_its_checkpoint(capsys):
  with pytest.raises(SystemExit) as stop:
    plan.main([str(ROOT / 'configs/glue_cola.py'), '--estimate'])
  assert stop.value.code == 2
  assert 'name a directory of transformers with' in capsys.readouterr().err


@needs_compiler
@pytest.mark.card
@pytest.mark.parametrize('update', ['WholeTree', 'Layerwise'])
def test_an_encoder_is_compiled_for_a_card(roberta, capsys, update):
  path = str(ROOT / 'configs/glue_cola.py')
  args = (path, *roberta, '--update', update)
  found = report(capsys, *args)
  peak = found['argument_bytes'] + found['output_bytes']
  peak += found['temp_bytes'] - found['alias_bytes']
  assert found['total_bytes'] == peak + found['workspace_bytes']
  assert found['fits'] and 0 < len(found['buffers']) <= 10
  assert plan.main(args) == 0
  assert 'attention: block by block' in capsys.readouterr().out
  bill = report(capsys, *args, '--cost')
  assert bill['step']['flops'] > bill['update']['flops'] > 0


def test_an_encoder_has_the_kernel_of_cudnn_where_it_may(roberta, capsys):
  # The heads have size 64, in 16 bits.
  directory = pathlib.Path(roberta[1])
  fields = json.loads((directory / 'config.json').read_text())
  fields |= {'hidden_size': 128, 'intermediate_size': 256, 'dtype': 'bfloat16'}
  wide = directory / 'wide'
  wide.mkdir()
  (wide / 'config.json').write_text(json.dumps(fields))
  path = str(ROOT / 'configs/glue_cola.py')
  found = report(capsys, path, '--checkpoint', str(wide), '--estimate')
  assert found['attention'] == 'cudnn'


@needs_compiler
@pytest.mark.card
def test_compiled_bytes_add_up(config, capsys):
  found = report(
    capsys,
    *(config, '--batch-size', '2', '--sequence-length', '16'),
    *('--clip-norm', 'None'),
  )
  peak = found['argument_bytes'] + found['output_bytes']
  peak += found['temp_bytes'] - found['alias_bytes']
  assert found['total_bytes'] == peak + found['workspace_bytes']
  assert found['batch_size'] == 2 and found['sequence_length'] == 16
  assert 0 < len(found['buffers']) <= 10
  assert found['collectives'] == []
  state = found['parameter_bytes'] + found['vocabulary_bytes']
  state += found['basis_bytes'] + found['moment_bytes']
  # The other arguments are the batch and counters. XLA pads each to its
  # alignment.
  assert 0 <= found['argument_bytes'] - state < 2**16


PROMISE = re.compile(
  r'memory: ([\d.]+) GiB on an [\w ]+, of which ([\d.]+) GiB is optimizer'
  r" state, by the compiler's memory analysis \(make plan"
  r" ARGS='?configs/\w+\.py([^,']*)"
)
PROMISES = [
  (str(path), *found)
  for path in sorted((ROOT / 'configs').glob('*.py'))
  for found in PROMISE.findall(' '.join(path.read_text().split()))
]
assert len(PROMISES) == 10


@needs_compiler
@pytest.mark.card
@pytest.mark.parametrize('path, total, state, options', PROMISES)
def test_a_config_needs_what_it_says(path, total, state, options, capsys):
  found = report(capsys, path, *options.split())
  ours = found['total_bytes'], found['basis_bytes'] + found['moment_bytes']
  assert [f'{x / 2**30:.2f}' for x in ours] == [total, state]
  assert found['fits']


def test_table(config, capsys):
  assert plan.main([config, '--estimate']) == 0
  out = capsys.readouterr().out
  # A narrow terminal wraps the title, so only short parts of it are matched.
  assert 'embeddings and head' in out and '4090' in out


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--batch-size', '0'], 'batch_size must be at least 1'),
    (['--devices', '3'], 'multiple of mesh.data x mesh.fsdp = 3'),
    (['--devices', '4', '--mesh.data', '2'], 'leave one of the two out'),
    (['--devices', '0'], '--devices must be at least 1'),
  ],
)
def test_bad_input_ends_with_code_2(config, capsys, args, message):
  with pytest.raises(SystemExit) as stop:
    plan.main([config, '--estimate', *args])
  assert stop.value.code == 2
  assert message in capsys.readouterr().err


def test_unknown_config_and_device_end_with_code_2(config, capsys):
  for args in (['none.py'], [config, '--device', 'rtx1']):
    with pytest.raises(SystemExit) as stop:
      plan.main(args)
    assert stop.value.code == 2
  assert 'rtx4090' in capsys.readouterr().err


def test_without_the_compiler_the_extra_is_named(config, capsys, monkeypatch):
  def missing(**_):
    raise RuntimeError('Unknown backend cuda')

  monkeypatch.setattr(cards.topologies, 'get_topology_desc', missing)
  with pytest.raises(SystemExit) as stop:
    plan.main([config])
  assert stop.value.code == 2
  err = capsys.readouterr().err
  assert 'make plan ARGS' in err and '--estimate' in err


def test_the_config_takes_the_same_keys_as_in_training(config, capsys):
  found = report(capsys, config, '--estimate', '--optimizer', 'Lomo')
  assert found['method'] == 'Lomo' and found['basis_bytes'] == 0
  # Only counters remain.
  assert found['moment_bytes'] < 256
  with pytest.raises(SystemExit) as stop:
    plan.main([config, '--estimate', '--optimizer.rnk', '3'])
  assert stop.value.code == 2
  assert '--device' in capsys.readouterr().err


@pytest.mark.slow
def test_several_configs_make_one_table(config, tmp_path, capsys):
  other = tmp_path / 'wide.py'
  other.write_text(CONFIG.replace('width=64', 'width=128'))
  args = (config, str(other), '--estimate')
  small, wide = report(capsys, *args)
  assert small == report(capsys, config, '--estimate')
  assert wide == report(capsys, str(other), '--estimate')
  plan.main(args)
  out = capsys.readouterr().out
  assert 'small' in out and 'wide' in out


@pytest.mark.slow
def test_compares_every_method(config, capsys):
  found = report(capsys, config, '--estimate', '--compare')
  state = {x['method']: x['basis_bytes'] + x['moment_bytes'] for x in found}
  assert list(state) == list(compare.methods(load(config)))
  order = ['LOMO', 'AdaLomo', 'APOLLO-Mini', '8-bit GaLore']
  order += ['APOLLO', 'GaLore', 'AdamW']
  assert sorted(order, key=state.get) == order
  # The config's own method keeps its options.
  (own,) = [x for x in found if x['method'] == 'GaLore']
  alone = report(capsys, config, '--estimate')
  assert own == alone | {'method': 'GaLore'}


@pytest.mark.slow
def test_plots_a_bar_for_each_method(config, tmp_path, capsys):
  path = tmp_path / 'bars.png'
  found = report(capsys, config, '--estimate', '--plot', str(path))
  assert [x['method'] for x in found] == [
    *compare.BARS,
    *('layer-wise 8-bit GaLore', 'LOMO'),
  ]
  # A layer-wise update has only the gradients of one layer, others have all.
  gradients = [x['gradient_bytes'] for x in found]
  assert gradients[0] == gradients[3] > gradients[4] == gradients[5]
  assert path.read_bytes().startswith(b'\x89PNG')


@needs_compiler
@pytest.mark.card
def test_cost(config, capsys):
  args = (config, '--cost', '--clip-norm', 'None')
  found = report(capsys, *args)
  update, step = found['update'], found['step']
  matrices = 3 * (4 * 64 * 64 + 3 * 64 * 160)
  rest = 2 * 256 * 64 + 7 * 64
  assert found['elements'] == matrices + rest
  # Every method reads the gradient, and reads and writes the weight.
  assert update['bytes'] > 12 * found['elements']
  # Most flops project the gradient at rank 16, and the update back.
  products = 2 * 2 * 16 * matrices
  assert products < update['flops'] < 1.5 * products
  # Six flops per weight and token, and attention.
  model = 6 * (matrices + 256 * 64) * 4 * 32
  assert model < step['flops'] < 1.5 * (model + products)
  assert step['estimate_h100'] < step['estimate_rtx4090'] < 1
  assert plan.main(args) == 0
  out = capsys.readouterr().out
  assert 'an estimate' in out and 'block by block' in out


@needs_compiler
@pytest.mark.card
@pytest.mark.parametrize('kind', ['auto', 'blockwise'])
def test_no_scores_of_all_pairs_exist(kind):
  config = load(str(ROOT / 'configs/llama_60m.py'))
  model = dataclasses.replace(config.model, attention=kind)
  config = dataclasses.replace(config, model=model)
  bill = make_bill(config, Cards('rtx4090'))
  assert bill.attention == {'auto': 'cudnn'}.get(kind, kind)
  # A microbatch has 64 rows, 8 heads and 256 x 256 pairs of positions.
  scores = 64 * 8 * 256 * 256
  made = [x for k in bill.step.kernels for x in arrays(k.shape)]
  assert max(math.prod(sizes) for _, sizes in made) > scores
  for _, sizes in made:
    assert sizes.count(256) < 2 or math.prod(sizes) < scores, sizes


@needs_compiler
@pytest.mark.card
def test_a_low_rank_update_moves_fewer_bytes_than_adamw_s(tmp_path, capsys):
  path = tmp_path / 'wide.py'
  text = CONFIG.replace('width=64, mlp_width=160', 'width=512, mlp_width=1376')
  path.write_text(text.replace('rank=16', 'rank=128'))
  args = (str(path), '--cost', '--clip-norm', 'None')
  found = {
    name: report(capsys, *args, *options)
    for name, options in {
      'GaLore': [],
      'AdamW': ['--optimizer', 'AdamW'],
    }.items()
  }
  moved = {k: x['update']['bytes'] / x['elements'] for k, x in found.items()}
  # AdamW reads gradient, weight and two moments, and writes the last three.
  assert moved['AdamW'] == pytest.approx(28, rel=0.01)
  # XLA fuses the projection back with the addition to the weight.
  assert moved['GaLore'] < 24.5


def test_cost_asks_the_compiler(config, capsys):
  with pytest.raises(SystemExit) as stop:
    plan.main([config, '--cost', '--estimate'])
  assert stop.value.code == 2
  assert 'leave one of them out' in capsys.readouterr().err


@needs_compiler
@pytest.mark.card
def test_collectives_of_a_shared_step(config, capsys):
  found = report(capsys, config, '--devices', '2', '--clip-norm', 'None')
  assert found['devices'] == 2
  assert 'all-reduce' in {row['op'] for row in found['collectives']}
  assert all(row['bytes'] > 0 for row in found['collectives'])
  # Each GPU updates its shard in place.
  assert found['output_bytes'] - found['alias_bytes'] < 2**12


def test_an_encoder_is_planned(tmp_path, capsys):
  path = tmp_path / 'encoder.py'
  path.write_text(f"""
from models.encoder import EncoderConfig
from train.config import Config
from train.data.labelled import LabelledFiles
from train.method import Galore

config = Config(
  model=EncoderConfig(
    vocab_size=300, width=24, mlp_width=56, num_heads=2, num_layers=2,
    num_positions=20, dropout=0.1,
  ),
  corpus=LabelledFiles('x.csv'),
  tokenizer={str(tmp_path)!r},
  optimizer=Galore(rank=8),
  steps=8,
  learning_rate=0.01,
  batch_size=12,
  sequence_length=32,
)
""")
  found = report(capsys, str(path), '--estimate')
  # Two layers keep the inputs of 12 rows, which have a position each.
  assert found['activation_bytes'] == 4 * 2 * 12 * 20 * 24
  assert found['batch'] == '12 x 20 tokens'
