"""A run's directory: its files, finding it, and limits of a resume."""

import dataclasses
import functools
import json
import pathlib
import re
import shutil
import sys
from typing import Any

from models import huggingface
from train.config import Config, differences, from_json, to_json
from train.data.pretrained import is_of_first_version
from train.data.tokenizer import AnyTokenizer, load
from train.engine import checkpoint

FREE = (
  'save_every',
  'save_minutes',
  'eval_every',
  'eval_batches',
  'mesh.data',
  'mesh.fsdp',
  'mesh.tensor',
  'max_skipped',
)
"""Fields that a resumed run may change, since they do not change the result."""


@dataclasses.dataclass(frozen=True)
class Run:
  """The directory of a run, and the paths of its files."""

  directory: pathlib.Path
  """The directory."""

  @property
  def config_path(self) -> pathlib.Path:
    """The configuration, as JSON."""
    return self.directory / 'config.json'

  @property
  def source_path(self) -> pathlib.Path:
    """Copies of the first checkpoint's config.json and tokenizer files."""
    return self.directory / 'source'

  @property
  def metrics_path(self) -> pathlib.Path:
    """The metrics as JSONL: one line for each step, validation and save."""
    return self.directory / 'metrics.jsonl'

  @property
  def curves_path(self) -> pathlib.Path:
    """The picture of the losses."""
    return self.directory / 'curves.png'

  @property
  def samples_path(self) -> pathlib.Path:
    """Prompts and the trained model's continuations, as JSON."""
    return self.directory / 'samples.json'

  @property
  def profile_path(self) -> pathlib.Path:
    """The profiler's trace, if `--profile` was given."""
    return self.directory / 'profile'

  @property
  def report_path(self) -> pathlib.Path:
    """The HTML page that `train.report` writes."""
    return self.directory / 'report.html'

  @property
  def checkpoints_path(self) -> pathlib.Path:
    """The checkpoint directory: Orbax writes one directory for each step."""
    return self.directory / 'checkpoints'

  def create(
    self,
    config: Config,
    tokenizer: AnyTokenizer,
    source: pathlib.Path | None = None,
  ) -> None:
    """Writes the first files of a new run.

    Args:
      config: the experiment.
      tokenizer: the tokenizer of the run.
      source: directory in the format of transformers that the run starts from;
        its config and tokenizer are copied.
    """
    self.directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(self.directory)
    if source is not None:
      huggingface.copy(source, self.source_path)
    # Write the configuration last: it makes the directory a run.
    self.write(config)

  def write(self, config: Config) -> None:
    """Replaces the configuration atomically: a kill leaves the old one."""
    new = self.config_path.with_suffix('.new')
    new.write_text(json.dumps(to_json(config), indent=2) + '\n')
    new.replace(self.config_path)

  def branch(self, source: 'Run', config: Config) -> None:
    """Writes the first files of a run that continues the run `source`."""
    self.directory.mkdir(parents=True, exist_ok=True)
    if source.metrics_path.exists():
      shutil.copy(source.metrics_path, self.metrics_path)
    self.create(config, source.tokenizer(), source.source())

  def source(self) -> pathlib.Path | None:
    """Returns `source_path`; None if the run began with random weights."""
    return self.source_path if self.source_path.is_dir() else None

  def config(self) -> Config:
    """Reads the configuration.

    Raises:
      FileNotFoundError: the directory is not a run.
      ValueError: another version wrote the file, or it is damaged.
    """
    if not self.config_path.is_file():
      raise FileNotFoundError(
        f'{self.directory} is not a run: it has no {self.config_path.name}'
      )
    try:
      return from_json(Config, json.loads(self.config_path.read_bytes()))
    except ValueError as error:
      return salvaged(self, f'{type(error).__name__}: {error}')
    except (AttributeError, KeyError, TypeError) as error:
      raise ValueError(
        f'{self.config_path} is no configuration of this version ({error}): '
        'go on with the version that wrote it, or start a new run'
      ) from error

  def tokenizer(self) -> AnyTokenizer:
    """Reads the tokenizer, with the chat template of the training.

    If an older version wrote the run, a line on standard error lists the
    differences.
    """
    found = load(self.directory)
    if is_of_first_version(self.directory):
      print(
        f'{self.directory} is of an older version, which put a space behind '
        'every special token and ignored user-defined pieces and eos_token: '
        'ids of its sentencepiece model are now those of transformers, and may '
        'differ',
        file=sys.stderr,
      )
    if found.chat_template is not None:
      # Keep the saved template: the file that the config names may have
      # changed.
      found.chat_template.is_settled = True
    return found

  def check(self, config: Config) -> None:
    """Raises ValueError if resuming with `config` would change the result."""
    differ = {
      name: values
      for name, values in differences(self.config(), config).items()
      if name not in FREE
    }
    if differ:
      raise ValueError(
        f'cannot resume {self.directory} with other values: {listed(differ)}. '
        'Leave them out to go on as before, or add --branch to start a new run '
        'from its checkpoint'
      )


@functools.cache
def salvaged(run: Run, reason: str) -> Config:
  """Reads the configuration from a checkpoint, since config.json is damaged.

  Args:
    run: the run.
    reason: the error from reading its config.json.

  Raises:
    ValueError: no checkpoint has a configuration, either.
  """
  found = checkpoint.restore_config(run.checkpoints_path)
  if found is None:
    raise ValueError(
      f'{run.config_path} is no configuration ({reason}), and no checkpoint of '
      'the run has one: write it again, or start a new run'
    )
  print(
    f'{run.config_path} is no configuration ({reason}): using the values '
    'that the newest checkpoint was saved with',
    file=sys.stderr,
  )
  return found


def listed(differ: dict[str, tuple[Any, Any]]) -> str:
  """Formats the differences between two configs.

  >>> listed({'steps': (8, 9)})
  'steps is 8 in the run and 9 now'
  """
  return '; '.join(
    f'{name} is {ours!r} in the run and {theirs!r} now'
    for name, (ours, theirs) in differ.items()
  )


def new(directory: pathlib.Path | None, name: str) -> Run:
  """Returns a new run: in `directory`, or in an unused directory runs/name-N.

  Raises:
    ValueError: `directory` is a run already, or contains other files.
  """
  if directory is None:
    taken = numbered(name)
    number = max(taken, default=0) + 1
    suffix = '' if number == 1 else f'-{number}'
    return Run(pathlib.Path('runs') / f'{name}{suffix}')
  found = Run(directory)
  if found.config_path.exists():
    raise ValueError(
      f'{directory} exists; continue it with --resume, or name another --run'
    )
  if directory.exists() and not (directory.is_dir() and empty(directory)):
    raise ValueError(
      f'{directory} exists and is no run; name another --run, or leave it out'
    )
  return found


def old(directory: pathlib.Path | None, name: str) -> Run:
  """Returns a run to resume: in `directory`, or the newest of runs/name-N.

  Raises:
    FileNotFoundError: runs/ contains no such run.
  """
  if directory is not None:
    return Run(directory)
  # A directory without a configuration failed before it became a run.
  runs = {
    number: found
    for number, path in numbered(name).items()
    for found in [Run(path)]
    if found.config_path.exists()
  }
  if not runs:
    raise FileNotFoundError(
      f'no run of {name} in runs/ to resume: leave out --resume to start one, '
      'or name one with --run'
    )
  return runs[max(runs)]


def numbered(name: str) -> dict[int, pathlib.Path]:
  """Returns the directories runs/name, runs/name-2 and so on, by number."""
  pattern = re.compile(re.escape(name) + r'(?:-(\d+))?')
  found = {}
  for path in pathlib.Path('runs').glob(f'{name}*'):
    match = pattern.fullmatch(path.name)
    if match:
      found[int(match[1] or 1)] = path
  return found


def empty(directory: pathlib.Path) -> bool:
  """Whether a directory is empty."""
  return not any(directory.iterdir())
