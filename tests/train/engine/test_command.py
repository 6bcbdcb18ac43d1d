import dataclasses
import functools
import pathlib
import re

import pytest

from models.llama import Llama3Scaling
from tests.train.program import write_config
from train import evaluate, export, report
from train.data.corpus import Tfds
from train.engine import command
from train.engine.config_json import flatten
from train.finetune import Finetune, of_seeds
from train.method import AdamW, Galore
from train.plan.__main__ import Request
from train.tasks import text_sampling


@pytest.fixture
def path(tmp_path):
  return write_config(tmp_path)


def test_overrides_are_typed(path):
  launch = command.parse(
    [
      *(path, '--steps', '200', '--optimizer.rank', '0.5', '--resume'),
      *('--optimizer.targets', '.*/q/.*', '.*/k/.*', '--clip-norm', 'None'),
    ]
  )
  assert launch.resume and launch.run is None
  assert launch.config.steps == 200
  assert launch.config.optimizer == Galore(
    rank=0.5, gap=3, subspace='power', targets=('.*/q/.*', '.*/k/.*')
  )
  assert launch.config.clip_norm is None


def test_another_method_comes_with_its_own_defaults(path):
  launch = command.parse(
    [path, '--optimizer', 'AdamW', '--optimizer.b1', '0.8', '--corpus', 'Tfds']
  )
  assert launch.config.optimizer == AdamW(b1=0.8)
  assert launch.config.corpus == Tfds()


def test_naming_the_method_in_use_keeps_its_options(path):
  launch = command.parse([path, '--optimizer', 'Galore'])
  assert launch.config == command.load(path)


@pytest.mark.parametrize(
  'name, text',
  [
    ('Galore', 'number r of basis vectors;'),
    # Options that are on by default can be switched off.
    ('Apollo', '--optimizer.no-channels'),
  ],
)
def test_help_documents_every_key(path, capsys, monkeypatch, name, text):
  monkeypatch.setenv('COLUMNS', '200')
  args = [path, '--optimizer', name]
  with pytest.raises(SystemExit) as stop:
    command.parse([*args, '--help'])
  assert not stop.value.code
  out = capsys.readouterr().out
  for key in command.keys(command.parse(args).config):
    assert key in out
  assert text in out and '(default: 8)' in out


def flags(kind, config):
  """Returns the dotted names of all boolean options of a program and config."""
  options = {
    field.name: getattr(kind(config), field.name)
    for field in dataclasses.fields(kind)[1:]
  }
  values = options | flatten(config)
  return [name for name, value in values.items() if isinstance(value, bool)]


def spelled(name, value):
  """Returns a boolean option as it is written on the command line."""
  *parents, last = name.replace('_', '-').split('.')
  return '--' + '.'.join([*parents, last if value else f'no-{last}'])


@pytest.mark.parametrize('value', [True, False])
@pytest.mark.parametrize('method', ['Apollo', 'Badam'])
@pytest.mark.parametrize('kind', [command.Launch, Finetune, Request])
def test_both_spellings_of_every_flag(path, kind, method, value):
  args = [path, '--optimizer', method]
  names = flags(kind, command.parse(args, kind).config)
  assert {'save_best', 'model.remat'} < set(names)
  assert any(name.startswith('optimizer.') for name in names)
  launch = command.parse([*args, *(spelled(x, value) for x in names)], kind)
  values = dataclasses.asdict(launch) | flatten(launch.config)
  assert {values[name] for name in names} == {value}


@pytest.mark.parametrize('kind', [command.Launch, Finetune, Request])
def test_help_has_both_spellings_of_every_flag(path, kind, capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '200')
  args = [path, '--optimizer', 'Apollo']
  with pytest.raises(SystemExit):
    command.parse([*args, '--help'], kind)
  out = capsys.readouterr().out
  for name in flags(kind, command.parse(args, kind).config):
    assert f'{spelled(name, True)}, {spelled(name, False)}' in out


PROGRAMS = {
  evaluate: ['runs/a'],
  text_sampling: ['runs/a', '--prompt', 'b'],
  export: ['runs/a', 'b'],
  report: ['runs/a'],
}
"""A command line of each program that takes no config."""


@pytest.mark.parametrize(
  'program, names',
  [
    (evaluate, ['best']),
    (text_sampling, ['best', 'chat']),
    (export, ['newest', 'adapter']),
  ],
)
def test_other_programs_have_both_spellings_too(program, names, capsys):
  parse = functools.partial(command.parse_options, program.Options)
  for name in names:
    # A program either continues prompts or chats.
    args = ['runs/a'] if name == 'chat' else PROGRAMS[program]
    assert getattr(parse([*args, spelled(name, True)]), name) is True
    args = PROGRAMS[program]
    assert getattr(parse([*args, spelled(name, False)]), name) is False
    assert getattr(parse(args), name) is False
  with pytest.raises(SystemExit) as stop:
    program.main(['--help'])
  assert not stop.value.code
  out = capsys.readouterr().out
  for name in names:
    assert f'--{name}, --no-{name}' in out


@pytest.mark.parametrize('program', PROGRAMS)
def test_options_are_documented_and_spelled_both_ways(program, capsys):
  with pytest.raises(SystemExit) as stop:
    program.main(['--help'])
  assert not stop.value.code
  out = ' '.join(capsys.readouterr().out.replace('\u2502', ' ').split())
  assert program.Options.__doc__ in out
  for field in dataclasses.fields(program.Options):
    assert field.name.upper() in out or spelled(field.name, True) in out
  if program is text_sampling:
    more = [
      *('--top_k', '7', '--top-p=0.5', '--stop', 'a', '--stop', ' b'),
      *('--prompt', '- c', '--temperature', '0', '--num_tokens=9', '--no_best'),
    ]
    assert command.parse_options(
      program.Options, [*PROGRAMS[program], *more]
    ) == program.Options(
      pathlib.Path('runs/a'),
      **{'prompt': ('b', '- c'), 'stop': ('a', ' b'), 'num_tokens': 9},
      **{'temperature': 0.0, 'top_k': 7, 'top_p': 0.5},
    )


LONG = f'/tmp/{"a" * 90}/b,c'


@pytest.mark.parametrize('program', PROGRAMS)
@pytest.mark.parametrize(
  'args, message',
  [
    ([LONG], f'Unrecognized options: {LONG}'),
    (['--stepz', '3'], 'Unrecognized options: --stepz, 3'),
    ('', 'Missing from python -m '),
  ],
)
def test_a_wrong_command_line_is_one_line(program, args, message, capsys):
  given = [*PROGRAMS[program], *args] if args else []
  with pytest.raises(SystemExit) as stop:
    program.main(given)
  assert stop.value.code == 2
  out, err = capsys.readouterr()
  assert out == '' and err.startswith(f'error: {message}')
  assert err.count('\n') == 1


@pytest.mark.parametrize(
  'program, args, message',
  [
    (text_sampling, ['--top-k', 'x'], "--top-k: .* int.* 'x'"),
    (text_sampling, ['--seed'], 'Missing value for argument .*--seed'),
    (text_sampling, ['--promt', 'x'], '--promt, x; similar options: --prompt'),
    (text_sampling, ['--chat'], 'give either --prompt or --chat'),
    (text_sampling, ['--stop', ''], '--stop must be a text that is not empty'),
    (text_sampling, ['--template-variables'], 'variables needs a value'),
    (evaluate, ['--batches', 'x'], "--batches: .* got|--batches: .*'x'"),
    (evaluate, ['--text', '--best'], '--text needs a value, got none'),
    (evaluate, ['--choices'], '--choices needs a value, got none'),
    (export, ['--dtype', 'int8'], "invalid choice 'int8' .*'bfloat16'"),
    (export, ['--dtype', 'float32', '--adapter'], 'leave out one of the two'),
  ],
)
def test_a_wrong_value_is_one_line(program, args, message, capsys):
  with pytest.raises(SystemExit) as stop:
    program.main([*PROGRAMS[program], *args])
  assert stop.value.code == 2
  out, err = capsys.readouterr()
  assert out == '' and err.startswith('error: ') and err.count('\n') == 1
  assert re.search(message, err), err


@pytest.mark.parametrize('flag', ['--save-best', '--no-save-best'])
def test_the_same_command_again_resumes(path, flag):
  begun = command.parse([path, flag]).config
  again = command.parse([path, flag, '--resume'], default=lambda _: begun)
  assert again.resume and again.config == begun
  assert command.source([path, '--no-resume', flag]) is None
  assert command.source([path, '--no_branch', flag]) is None


def test_a_choice_may_be_spelled_with_an_equals_sign(path):
  launch = command.parse([path, '--optimizer=AdamW', '--optimizer.b1=0.8'])
  assert launch.config.optimizer == AdamW(b1=0.8)
  with pytest.raises(ValueError, match=r"--optimizer must be .* got 'Sgd'"):
    command.parse([path, '--optimizer=Sgd'])
  lines = of_seeds([path, '--seeds=2', '--seed=7'])
  assert [line[-2:] for line in lines] == [['--seed', '7'], ['--seed', '8']]
  assert not any('--seed=7' in line for line in lines)
  for args, message in (
    (['--seeds', 'x'], "--seeds: .* 'x'"),
    (['--seeds', '0'], '--seeds must be at least 1, got 0'),
    (['--seeds', '2', '--seed'], 'Missing value for argument .*--seed'),
  ):
    with pytest.raises(ValueError, match=message) as caught:
      of_seeds([path, *args])
    assert '\n' not in str(caught.value)


def test_options_that_are_parsed_first_leave_the_others_as_they_are(path):
  others = [path, '--steps=200', '--optimizer.targets', 'x', '--x_y', '-1e-3']
  flags = ['--optimizer.no-channels', '--help']
  chosen = ['--run', 'runs/a b', '--no_resume']
  found, rest = command.parse_some(
    command.Continued, [*others, *chosen, *flags]
  )
  assert found == command.Continued(run=pathlib.Path('runs/a b'))
  assert rest == [*others, *flags]


def test_the_scaling_of_waves_has_keys_where_a_file_has_one(path):
  config = command.load(path)
  scaling = Llama3Scaling(8.0, 1.0, 4.0, 64)
  model = dataclasses.replace(config.model, rope_scaling=scaling)
  scaled = dataclasses.replace(config, model=model)
  more = {*command.keys(scaled)} - {*command.keys(config)}
  assert len(more) == 4 and '--model.rope-scaling.factor' in more
  args = [path, '--model.rope-scaling.factor', '4']
  launch = command.parse(args, default=lambda _: scaled)
  assert launch.config.model.rope_scaling.factor == 4


@pytest.mark.parametrize(
  'args', [['--optimizr.rank', '3'], ['--steps', 'x'], ['--optimizer.gap']]
)
def test_wrong_keys_end_with_the_valid_ones(path, args, capsys):
  with pytest.raises(SystemExit) as stop:
    command.parse([path, *args])
  assert stop.value.code == 2
  first, last = capsys.readouterr().err.strip().splitlines()
  assert first.startswith('error: ') and args[0] in first
  assert last.startswith('valid keys: --run, --resume')
  assert '--optimizer.rank' in last and '--model.width' in last


@pytest.mark.parametrize('name', ['chat', 'glue_cola', 'vit_fashion'])
def test_a_model_from_a_checkpoint_has_keys_too(name, capsys):
  """Its class has no value for some class variables, such as `task`."""
  with pytest.raises(SystemExit) as stop:
    command.parse([f'configs/{name}.py', '--steps', 'x'])
  assert stop.value.code == 2
  first, last = capsys.readouterr().err.strip().splitlines()
  assert first.startswith('error: ') and '--steps' in first
  assert last.startswith('valid keys: --run, --resume')


def test_without_a_config_the_usage_is_shown(capsys):
  for args, code in [([], 2), (['--help'], 0)]:
    with pytest.raises(SystemExit) as stop:
      command.parse(args)
    assert stop.value.code == code
    out, err = capsys.readouterr()
    assert 'python -m train.pretrain CONFIG' in (err if code else out)


@pytest.mark.parametrize(
  'text, message',
  [
    ('config = 3', r'wrong\.py must hold `config = Config'),
    ('config = (3', r'wrong\.py, line 1: SyntaxError: .* was never closed'),
    ('import train\nx = y', r"wrong\.py, line 2: NameError: name 'y' is not"),
    ('import no_such', r'wrong\.py, line 1: ModuleNotFoundError: .*no_such'),
    (
      'from train.config import Config\nconfig = Config(stepz=3)',
      r'wrong\.py, line 2: TypeError: .*stepz',
    ),
    (
      'from models.llama import llama\n\nllama("8b")',
      r"wrong\.py, line 3: size must be one of .* got '8b'",
    ),
  ],
)
def test_an_error_in_a_config_file_names_file_and_line(text, message, tmp_path):
  path = tmp_path / 'wrong.py'
  path.write_text(f'{text}\n')
  with pytest.raises(ValueError, match=message):
    command.load(str(path))
