"""The base of tasks on texts: data with a tokenizer.

A run directory keeps the tokenizer, so that a later version of the corpus or of
the checkpoint does not change the ids.
"""

import dataclasses
import pathlib
import sys
from typing import Any

from train.config import Config
from train.data import tokenizer as tokenizers
from train.data.pretrained import is_of_first_version
from train.data.tokenizer import Tokenizer
from train.engine import cluster
from train.engine.task import Data, Task


@dataclasses.dataclass(frozen=True)
class Text(Data):
  """The data and the tokenizer of a run."""

  tokenizer: Tokenizer
  """The run's tokenizer."""


class TextTask(Task):
  """A task whose data are texts, read by a tokenizer."""

  def __post_init__(self) -> None:
    """Raises ValueError if a row has no length or the corpus does not fit."""
    super().__post_init__()
    if self.config.sequence_length is None:
      raise ValueError(
        'sequence_length must be the number of tokens in a row, got None: set '
        'it in the config, or by --sequence-length'
      )

  @property
  def sequence_length(self) -> int:
    """Number of tokens in a row."""
    assert self.config.sequence_length is not None
    return self.config.sequence_length

  @property
  def length(self) -> int | None:
    """Number of tokens in the rows of the largest batch."""
    return self.inputs()['inputs'].shape[1]

  def describe_batch(self) -> str:
    """Returns the shape of the largest batch as text."""
    return f'{self.config.batch_size} x {self.length} tokens'

  def open(self, run: pathlib.Path | None) -> Text:
    """Opens both splits, and reads, loads or trains the tokenizer."""
    found = super().open(run)
    if run is None:
      tokenizer = prepare_tokenizer(self.config, found.train)
    else:
      tokenizer = tokenizer_of(run, self.config)
    return Text(found.train, found.validation, tokenizer)

  def held_out(self, run: pathlib.Path) -> Text:
    """Opens the validation split and the run's tokenizer."""
    found = super().held_out(run)
    tokenizer = tokenizer_of(run, self.config)
    return Text(None, found.validation, tokenizer)

  def warnings(self, data: Text) -> list[str]:
    """Checks both splits, so that training does not reject a chat later."""
    splits = (data.train, data.validation)
    lines = (line for x in splits for line in x.check(data.tokenizer))
    return list(dict.fromkeys(lines))

  def save(self, data: Text, directory: pathlib.Path) -> None:
    """Writes the tokenizer's files."""
    data.tokenizer.save(directory)

  def identity(self, data: Text) -> bytes:
    """Returns the tokenizer's files and the bytes of its tokens."""
    files = sorted(data.tokenizer.files.items())
    return repr(files).encode() + data.tokenizer.bytes_V.tobytes()


def vocab_size(config: Config) -> int:
  """Returns the size of the vocabulary of a text task's model."""
  model: Any = config.resolved_model
  return model.vocab_size


def prepare_tokenizer(config: Config, documents: Any) -> Tokenizer:
  """Loads the tokenizer that the config names, or trains one on documents.

  Args:
    config: the experiment.
    documents: the training split of its corpus.
  """
  size = vocab_size(config)
  path = config.tokenizer or config.checkpoint
  if path is None:
    sample = documents.stream(seed=0, repeat=False)
    tokenizer = tokenizers.train_tokenizer(sample, vocab_size=size)
  else:
    remedy = 'raise model.vocab_size, or name another with --tokenizer'
    if config.checkpoint is not None:
      remedy = (
        'name a directory with the tokenizer of this model by --tokenizer'
      )
    tokenizer = tokenizers.fitted(
      tokenizers.load(path), size, origin=path, remedy=remedy
    )
  return documents.templated(tokenizer, cluster.clock())


def tokenizer_of(run: pathlib.Path, config: Config) -> Tokenizer:
  """Returns a run's tokenizer, checked against the model's vocabulary size."""
  return tokenizers.fitted(
    stored_tokenizer(run),
    vocab_size(config),
    origin=str(run),
    remedy='restore the tokenizer that the run was saved with',
  )


def stored_tokenizer(run: pathlib.Path) -> Tokenizer:
  """Reads the tokenizer of a run, with the chat template of the training.

  If an older version wrote the run, a line on standard error lists the
  differences.
  """
  found = tokenizers.load(run)
  if is_of_first_version(run):
    print(
      f'{run} is of an older version, which put a space behind '
      'every special token and ignored user-defined pieces and eos_token: '
      'ids of its sentencepiece model are now those of transformers, and may '
      'differ',
      file=sys.stderr,
    )
  if found.chat_template is not None:
    # Keep the saved template: the file that the config names may have changed.
    found.chat_template.is_settled = True
  return found
