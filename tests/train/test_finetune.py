"""Fine-tunes tiny checkpoints, from the imported to the exported directory."""

import datetime
import io
import json

import chex
import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from models import huggingface, lowrank, peft
from models.llama import Layers, LlamaConfig
from tests.train.data.tiny import (
  CHATML,
  DATED,
  SPECIALS,
  THINK_OR_NOT,
  VICUNA,
  write,
)
from tests.train.program import saved
from train import evaluate, export, finetune, sample
from train.data.chats import PLAIN
from train.data.tokenizer import load
from train.engine import checkpoint, cluster, metrics, training
from train.engine.run import Run
from train.tasks.text import stored_tokenizer
from train.tasks.text_model import opened

SMALL = dict(width=16, mlp_width=24, num_heads=2, num_layers=2)
MODELS = {
  'llama': LlamaConfig(400, **SMALL, tied=True),
  'mistral': LlamaConfig(400, **SMALL, num_kv_heads=1, window=12),
  'qwen2': LlamaConfig(400, **SMALL, qkv_bias=True, param_dtype='bfloat16'),
}
FEW = [
  *('--batch-size', '4', '--sequence-length', '48', '--eval-batches', '2'),
  *('--optimizer.rank', '4', '--optimizer.gap', '2'),
]


def make(tmp_path, kind='llama', template=CHATML, eos='<|im_end|>'):
  """Writes a checkpoint with tokenizer and template, and a file of chats."""
  directory, config = tmp_path / 'checkpoint', MODELS[kind]
  source = tmp_path / 'source'
  source.mkdir()
  write(source, template, {'eos_token': eos}, SPECIALS)
  params = jax.jit(Layers(config).init)(jax.random.key(3))
  huggingface.save(directory, config, params, source=source)
  return directory, chats_file(tmp_path)


def chats_file(tmp_path):
  """Writes a file of eighty short chats."""
  records = [
    {
      'messages': [
        {'role': 'user', 'content': f'Question {i}?'},
        {'role': 'assistant', 'content': f'Answer {i}.' + i % 3 * ' So.'},
      ]
    }
    for i in range(80)
  ]
  chats = tmp_path / 'chats.jsonl'
  chats.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return chats


def tune(tmp_path, directory, chats, *args, config='configs/chat.py'):
  """Fine-tunes a checkpoint; returns the exit code and the run."""
  run = tmp_path / 'run'
  code = finetune.main(
    [
      *(config, '--checkpoint', str(directory), '--run', str(run)),
      *('--corpus.train', str(chats), *FEW, *args),
    ]
  )
  return code, Run(run)


def exported(tmp_path, run, *args):
  out = tmp_path / 'exported'
  export.main([str(run.directory), str(out), *args])
  return out


@pytest.mark.slow
@pytest.mark.parametrize('kind', MODELS)
def test_a_rate_of_zero_exports_the_imported_checkpoint(tmp_path, capsys, kind):
  directory, chats = make(tmp_path, kind)
  code, run = tune(
    tmp_path, directory, chats, '--steps', '3', '--learning-rate', '0'
  )
  assert code == 0
  out = exported(tmp_path, run)
  names = {file.name for file in directory.iterdir()}
  # The imported checkpoint does not name the tokens that end an answer.
  ends = {'generation_config.json'}
  assert {file.name for file in out.iterdir()} == names | ends
  for name in names - {'config.json'}:
    assert (out / name).read_bytes() == (directory / name).read_bytes(), name
  ours, theirs = (
    json.loads((x / 'config.json').read_text()) for x in (out, directory)
  )
  assert ours == theirs
  printed = capsys.readouterr().out
  assert 'what is scored is green' in printed
  assert f'train.export {run.directory}' in printed


@pytest.mark.slow
def test_a_negative_zero_is_kept_where_nothing_is_trained(tmp_path):
  directory, chats = make(tmp_path)
  config, params = huggingface.load(directory)
  params = jax.tree.map(lambda w: -0.0 * abs(w), params)
  zeros = tmp_path / 'zeros'
  huggingface.save(zeros, config, params, source=directory)
  _, run = tune(tmp_path, zeros, chats, '--steps', '2', '--learning-rate', '0')
  out = exported(tmp_path, run)
  name = 'model.safetensors'
  assert (out / name).read_bytes() == (zeros / name).read_bytes()


@pytest.mark.slow
def test_the_best_weights_are_kept_and_exported(tmp_path):
  directory, chats = make(tmp_path)
  # The learning rate becomes too high after the first validation, so later
  # validations are worse.
  fast = ['--learning-rate', '0.3', '--warmup', '0.7', '--save-every', '99']
  every = ['--steps', '8', '--eval-every', '2']
  code, run = tune(tmp_path, directory, chats, *fast, *every)
  assert code == 0
  losses = {
    line['step']: line['validation_loss']
    for line in metrics.read(run.metrics_path)
    if 'validation_loss' in line
  }
  best = min(losses, key=losses.get)
  assert best != 8
  with checkpoint.opened(run.checkpoints_path) as manager:
    scores = checkpoint.scores(manager)
    assert min(scores, key=scores.get) == best
    assert checkpoint.best_score(manager) == losses[best]
    assert 8 in manager.all_steps()
  out = exported(tmp_path, run)
  newest = tmp_path / 'newest'
  export.main([str(run.directory), str(newest), '--newest'])
  one, other = (load_file(x / 'model.safetensors') for x in (out, newest))
  with pytest.raises(AssertionError):
    chex.assert_trees_all_equal(one, other)


@pytest.mark.slow
def test_a_resumed_fine_tune_needs_no_checkpoint_of_transformers(tmp_path):
  directory, chats = make(tmp_path)
  args = ['--steps', '4', '--eval-every', '2']
  assert tune(tmp_path, directory, chats, *args)[0] == 0
  for file in directory.iterdir():
    file.unlink()
  run = Run(tmp_path / 'run')
  code = finetune.main(
    ['configs/chat.py', '--run', str(run.directory), '--branch', '--steps', '6']
  )
  assert code == 0


@pytest.mark.slow
def test_factors_are_exported_separately_or_merged(tmp_path, capsys):
  directory, chats = make(tmp_path)
  lora = ['--adapter', 'Lora', '--optimizer', 'AdamW', '--update', 'WholeTree']
  run = tmp_path / 'run'
  command = [
    *('configs/chat.py', '--checkpoint', str(directory), '--run', str(run)),
    *('--corpus.train', str(chats), *FEW[:6], '--steps', '3', *lora),
    *('--learning-rate', '0.1'),
  ]
  assert finetune.main(command) == 0
  alone, merged = tmp_path / 'alone', tmp_path / 'merged'
  export.main([str(run), str(alone), '--adapter'])
  export.main([str(run), str(merged)])
  names = {file.name for file in alone.iterdir()}
  assert names == {'adapter_config.json', 'adapter_model.safetensors'}
  _, base = huggingface.load(directory)
  with_factors, adapter = peft.load_adapter(alone, base)
  # Both are exported from the same checkpoint of the run.
  chex.assert_trees_all_close(
    lowrank.merge(with_factors, adapter), huggingface.load(merged)[1], rtol=1e-6
  )
  with pytest.raises(SystemExit):
    export.main([str(run), str(tmp_path / 'x'), '--adapter', '--dtype=float32'])
  assert '--adapter writes none' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('kind', MODELS)
def test_the_documented_command_with_an_adapter_works(tmp_path, capsys, kind):
  directory, chats = make(tmp_path, kind)
  run = tmp_path / 'run'
  code = finetune.main(
    [
      *('configs/chat.py', '--checkpoint', str(directory)),
      *('--corpus.train', str(chats), '--adapter', 'Lora'),
      # The documented command ends here. The remaining options make the run
      # short.
      *(*FEW[:6], '--steps', '12', '--eval-every', '6', '--run', str(run)),
      *('--learning-rate', '0.05'),
    ]
  )
  assert code == 0
  assert '--adapter Lora is trained by AdamW' in capsys.readouterr().err
  found = [
    line['validation_loss']
    for line in metrics.read(Run(run).metrics_path)
    if 'validation_loss' in line
  ]
  assert found[-1] < found[0]


@pytest.mark.slow
def test_the_template_of_the_chats_is_exported(tmp_path, capsys):
  directory, chats = make(tmp_path)
  still = ['--steps', '1', '--learning-rate', '0']
  _, run = tune(
    tmp_path, directory, chats, *still, '--corpus.template', 'plain'
  )
  out = exported(tmp_path, run)
  assert load(out).chat_template.source == PLAIN
  assert load(directory).chat_template.source == CHATML
  with pytest.raises(SystemExit):
    export.main([str(run.directory), str(tmp_path / 'x'), '--adapter'])
  assert 'has no factors' in capsys.readouterr().err


LONG = ('--sequence-length', '96')
STILL = ('--steps', '1', '--learning-rate', '0')
ASKED = [{'role': 'user', 'content': 'Question 1?'}]


@pytest.mark.slow
def test_a_base_checkpoint_stops_where_an_answer_ends(tmp_path):
  directory, chats = make(tmp_path, eos='<|endoftext|>')
  ids = load(directory).specials
  for name in ('config.json', 'generation_config.json'):
    path = directory / name
    fields = json.loads(path.read_text()) if path.is_file() else {}
    fields['eos_token_id'] = ids['<|endoftext|>']
    path.write_text(json.dumps(fields))
  _, run = tune(tmp_path, directory, chats, *STILL)
  out = exported(tmp_path, run)
  both = [ids['<|im_end|>'], ids['<|endoftext|>']]
  fields = json.loads((out / 'generation_config.json').read_text())
  assert fields['eos_token_id'] == both
  tokenizer = load(out)
  assert tokenizer.tokens['eos_token'] == '<|im_end|>'
  assert set(tokenizer.stop_ids) == set(both)
  fields = json.loads((out / 'config.json').read_text())
  assert fields['eos_token_id'] == ids['<|im_end|>']


@pytest.mark.slow
def test_variables_of_the_template_go_into_run_and_export(tmp_path, capsys):
  directory, chats = make(tmp_path, template=THINK_OR_NOT)
  variables = ['--corpus.template-variables', 'enable_thinking=false']
  _, run = tune(tmp_path, directory, chats, *STILL, *variables)
  assert run.config().corpus.template_variables == ('enable_thinking=false',)
  assert 'warning' not in capsys.readouterr().out
  expected = '<|im_start|>assistant\n<think>\n\n</think>\n\n'
  for path in (run.directory, exported(tmp_path, run)):
    template = load(path).chat_template
    prompt = template.render(ASKED, add_generation_prompt=True)
    assert prompt.endswith(expected)


@pytest.mark.slow
def test_a_template_without_an_end_gets_one_and_says_so(tmp_path, capsys):
  directory, chats = make(tmp_path, template=VICUNA)
  _, run = tune(tmp_path, directory, chats, *STILL)
  printed = ' '.join(capsys.readouterr().out.split())
  assert "would never stop: '<|im_end|>' is added there and scored" in printed
  answer = {'role': 'assistant', 'content': 'Answer 1.'}
  for path in (run.directory, exported(tmp_path, run)):
    text = load(path).chat_template.render([*ASKED, answer])
    assert text == 'USER: Question 1? ASSISTANT: Answer 1.<|im_end|> '


@pytest.mark.slow
def test_a_run_resumed_on_another_day_has_its_date(tmp_path, monkeypatch):
  directory, chats = make(tmp_path, template=DATED)
  args = ['--steps', '6', '--save-every', '2', '--eval-every', '3', *LONG]
  clock = datetime.datetime(2026, 1, 2, 3, 4, 5)

  class Killed(Exception):
    pass

  def crash(batch):
    raise Killed

  (tmp_path / 'whole').mkdir()
  with monkeypatch.context() as patch:
    patch.setattr(cluster, 'clock', lambda: clock)
    _, whole = tune(tmp_path / 'whole', directory, chats, *args)
    patch.setattr(metrics, 'describe', crash)
    with pytest.raises(Killed):
      tune(tmp_path, directory, chats, *args)
  run = Run(tmp_path / 'run')
  assert stored_tokenizer(run.directory).chat_template.clock == clock
  resume = ['configs/chat.py', '--run', str(run.directory), '--resume']
  assert finetune.main(resume) == 0
  chex.assert_trees_all_equal(saved(run), saved(whole))
  # The clock file is left out, because other programs use their own clock.
  assert not (exported(tmp_path, run) / 'chat_clock.json').exists()


@pytest.mark.slow
def test_a_run_of_an_older_version(tmp_path, capsys):
  directory, chats = make(tmp_path)
  template = tmp_path / 'own.jinja'
  template.write_text(DATED)
  args = ['--corpus.template', str(template), *LONG]
  _, run = tune(tmp_path, directory, chats, *STILL, *args)
  # Older versions had neither template variables nor the clock, and stored the
  # name of the template.
  template.unlink()
  (run.directory / 'chat_clock.json').unlink()
  fields = json.loads(run.config_path.read_text())
  del fields['corpus']['template_variables']
  run.config_path.write_text(json.dumps(fields))
  evaluate.main([str(run.directory), '--batches', '2'])
  assert 'validation: loss' in capsys.readouterr().out
  text = load(exported(tmp_path, run)).chat_template.source
  assert text == DATED
  typed = io.StringIO('Question 1?\n')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('sys.stdin', typed)
    sample.main([str(run.directory), '--chat', '--num-tokens', '4'])
  assert capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
  'args',
  [
    ['--optimizer', 'AdamW', '--update', 'WholeTree', '--microbatches', '2'],
    ['--optimizer', 'Lomo', '--learning-rate', '0.1'],
    ['--update.accumulate', '2', '--update.clip', 'previous'],
    ['--update.weights', 'int8', '--update.slices', '2'],
  ],
)
def test_every_update_learns_the_answers(tmp_path, args):
  directory, chats = make(tmp_path)
  rate = [] if '--learning-rate' in args else ['--learning-rate', '0.02']
  steps = ['--steps', '12', '--eval-every', '6']
  targets = [] if 'AdamW' in args or 'Lomo' in args else FEW[6:]
  run = tmp_path / 'run'
  command = [
    *('configs/chat.py', '--checkpoint', str(directory), '--run', str(run)),
    *('--corpus.train', str(chats), *FEW[:6], *targets, *args, *rate, *steps),
  ]
  assert finetune.main(command) == 0
  found = [
    line['validation_loss']
    for line in metrics.read(Run(run).metrics_path)
    if 'validation_loss' in line
  ]
  assert found[-1] < found[0]
  scored = [
    line['tokens']
    for line in metrics.read(Run(run).metrics_path)
    if 'tokens' in line
  ]
  # Only answers are scored, which is a fraction of the 4 x 48 tokens.
  assert max(scored) < 0.7 * 4 * 48
  assert np.isfinite(found).all()


def with_pad(directory, *, special):
  """Adds a token to a checkpoint's tokenizer for which the model has no row.

  transformers makes every token special that the settings name.
  """
  path = str(directory / 'tokenizer.json')
  library = tokenizers.Tokenizer.from_file(path)
  token = tokenizers.AddedToken('[PAD]', normalized=False, special=special)
  assert library.get_vocab_size() == MODELS['llama'].vocab_size
  library.add_tokens([token])
  library.save(path)
  words = json.loads((directory / 'tokenizer_config.json').read_text())
  words |= {'pad_token': '[PAD]'} if special else {}
  (directory / 'tokenizer_config.json').write_text(json.dumps(words))


def prepared(directory, chats, *args):
  """Prepares a run without starting it."""
  lora = ['--adapter', 'Lora', '--optimizer', 'AdamW', *FEW[:6]]
  return training.prepare(
    [
      *('configs/chat.py', '--checkpoint', str(directory), *lora),
      *('--corpus.train', str(chats), *args),
    ],
    finetune.Finetune,
  )


def test_a_token_without_a_row_that_no_text_uses_is_harmless(tmp_path):
  directory, chats = make(tmp_path)
  with_pad(directory, special=True)
  rows = MODELS['llama'].vocab_size
  setup = prepared(directory, chats)
  assert setup.data.tokenizer.vocab_size == rows + 1
  assert int(next(setup.batches)['inputs'].max()) < rows
  setup.task.example(setup.data)
  # Evaluation, sampling and exports can read the directory as well.
  tokenizer = opened(directory).tokenizer
  assert (tokenizer.vocab_size, tokenizer.num_rows) == (rows + 1, rows)


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_a_token_without_a_row_that_a_text_uses_is_named(
  tmp_path, capsys, split
):
  directory, chats = make(tmp_path)
  with_pad(directory, special=True)
  padded = tmp_path / 'padded.jsonl'
  record = json.loads(chats.read_text().splitlines()[0])
  record['messages'][0]['content'] = 'Why [PAD]?'
  padded.write_text(chats.read_text() + json.dumps(record) + '\n')
  files = {'train': chats, 'validation': chats} | {split: padded}
  run = tmp_path / 'run'
  with pytest.raises(SystemExit) as stop:
    finetune.main(
      [
        *('configs/chat.py', '--checkpoint', str(directory)),
        *('--corpus.train', str(files['train']), *FEW[:6]),
        *('--corpus.validation', str(files['validation'])),
        *('--optimizer', 'AdamW', '--run', str(run)),
      ]
    )
  assert stop.value.code == 2 and not run.exists()
  err = capsys.readouterr().err
  assert "has the token '[PAD]' of id 400" in err and err.count('\n') == 1


def test_a_document_with_a_token_without_a_row_is_named(tmp_path, capsys):
  directory, _ = make(tmp_path)
  with_pad(directory, special=False)
  text = tmp_path / 'a.txt'
  text.write_text('What is [PAD]?')
  with pytest.raises(SystemExit):
    evaluate.main([str(directory), '--text', str(text)])
  err = capsys.readouterr().err
  assert "has the token '[PAD]' of id 400" in err and err.count('\n') == 1


@pytest.mark.parametrize(
  'args, message',
  [
    ([], 'name a directory of transformers with --checkpoint'),
    (['--checkpoint', 'nowhere'], 'nowhere'),
  ],
)
def test_without_a_checkpoint_the_error_names_the_option(args, message, capsys):
  with pytest.raises(SystemExit):
    finetune.main(['configs/chat.py', *args])
  error = capsys.readouterr().err
  assert message in error and len(error.strip().splitlines()) == 1


def test_export_refuses_a_directory_that_is_not_a_run(tmp_path, capsys):
  with pytest.raises(SystemExit):
    export.main([str(tmp_path), str(tmp_path / 'new')])
  assert 'is not a run' in capsys.readouterr().err
