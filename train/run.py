"""A run's directory: what is in it, where it stands, what may change in it."""

import dataclasses
import functools
import json
import pathlib
import re
import shutil
import sys
from typing import Any

from models import huggingface
from train import checkpoint
from train.config import Config, differences, from_json, to_json
from train.data.tokenizer import SPACES, AnyTokenizer, load

FREE = (
  *('save_every', 'save_minutes', 'eval_every', 'eval_batches'),
  *('mesh.data', 'mesh.fsdp', 'mesh.tensor'),
  'max_skipped',
)
"""What a resumed run may change: nothing that is computed depends on it."""


@dataclasses.dataclass(frozen=True)
class Run:
  """The directory of one run, and the names in it."""

  directory: pathlib.Path

  @property
  def config_path(self) -> pathlib.Path:
    """The configuration, as JSON."""
    return self.directory / 'config.json'

  @property
  def source_path(self) -> pathlib.Path:
    """What the checkpoint that a run began with has beside its weights."""
    return self.directory / 'source'

  @property
  def metrics_path(self) -> pathlib.Path:
    """One JSON object a line; a validation and a save have a line too."""
    return self.directory / 'metrics.jsonl'

  @property
  def curves_path(self) -> pathlib.Path:
    """The picture of the losses."""
    return self.directory / 'curves.png'

  @property
  def samples_path(self) -> pathlib.Path:
    """How the trained model goes on with some prompts, as JSON."""
    return self.directory / 'samples.json'

  @property
  def profile_path(self) -> pathlib.Path:
    """The profiler's trace, if one was asked for."""
    return self.directory / 'profile'

  @property
  def report_path(self) -> pathlib.Path:
    """The page that `train.report` writes."""
    return self.directory / 'report.html'

  @property
  def checkpoints_path(self) -> pathlib.Path:
    """Where Orbax keeps the checkpoints, one directory a step."""
    return self.directory / 'checkpoints'

  def create(
    self,
    config: Config,
    tokenizer: AnyTokenizer,
    source: pathlib.Path | None = None,
  ) -> None:
    """Writes the first files; nothing of a run exists before.

    Args:
      config: of the run.
      tokenizer: of the run.
      source: a directory of transformers whose small files are kept.
    """
    self.directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(self.directory)
    if source is not None:
      huggingface.copy(source, self.source_path)
    # Last: a directory is a run once it holds the configuration.
    self.write(config)

  def write(self, config: Config) -> None:
    """Writes the configuration, at once: a kill leaves the old one."""
    new = self.config_path.with_suffix('.new')
    new.write_text(json.dumps(to_json(config), indent=2) + '\n')
    new.replace(self.config_path)

  def branch(self, source: 'Run', config: Config) -> None:
    """Writes the first files of a run that goes on where `source` is."""
    self.directory.mkdir(parents=True, exist_ok=True)
    if source.metrics_path.exists():
      shutil.copy(source.metrics_path, self.metrics_path)
    self.create(config, source.tokenizer(), source.source())

  def source(self) -> pathlib.Path | None:
    """Returns its `source_path`; None where it began with no checkpoint."""
    return self.source_path if self.source_path.is_dir() else None

  def config(self) -> Config:
    """Reads the configuration."""
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
    """Reads the tokenizer, whose chat template is that of the run.

    A line on standard error names what has changed since an older version wrote
    the run.
    """
    found = load(self.directory)
    if SPACES in found.files and not (self.directory / SPACES).is_file():
      print(
        f'{self.directory} is of an older version, which put a space behind '
        'every special token and ignored user-defined pieces and eos_token: '
        'ids of its sentencepiece model are now those of transformers, and may '
        'differ',
        file=sys.stderr,
      )
    if found.chat_template is not None:
      # The file that the config names may be another one by now.
      found.chat_template.is_settled = True
    return found

  def check(self, config: Config) -> None:
    """Raises ValueError where a resumed run would compute something else."""
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
  """Returns the configuration of a run whose own file is garbage."""
  found = checkpoint.restore_config(run.checkpoints_path)
  if found is None:
    raise ValueError(
      f'{run.config_path} is no configuration ({reason}), and no checkpoint of '
      'the run has one: write it anew, or start a new run'
    )
  print(
    f'{run.config_path} is no configuration ({reason}): taken are the values '
    'that the newest checkpoint was saved with',
    file=sys.stderr,
  )
  return found


def listed(differ: dict[str, tuple[Any, Any]]) -> str:
  """Returns differences in words.

  >>> listed({'steps': (8, 9)})
  'steps is 8 in the run and 9 now'
  """
  return '; '.join(
    f'{name} is {ours!r} in the run and {theirs!r} now'
    for name, (ours, theirs) in differ.items()
  )


def new(directory: pathlib.Path | None, name: str) -> Run:
  """Returns a run that does not exist yet: `directory`, or a free runs/name."""
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
  """Returns a run to resume: `directory`, or the newest of runs/name."""
  if directory is not None:
    return Run(directory)
  # A directory without a configuration was given up before it was a run.
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
  """Returns the directories runs/name, runs/name-2, ... by their number."""
  pattern = re.compile(re.escape(name) + r'(?:-(\d+))?')
  found = {}
  for path in pathlib.Path('runs').glob(f'{name}*'):
    match = pattern.fullmatch(path.name)
    if match:
      found[int(match[1] or 1)] = path
  return found


def empty(directory: pathlib.Path) -> bool:
  """Whether nothing is in it."""
  return not any(directory.iterdir())
