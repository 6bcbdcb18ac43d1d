"""Tokenizers: they convert text to ids and back, by a tokenizer.json.

`load` reads the tokenizer of a run, or of a checkpoint by
`train.data.pretrained`. `train_tokenizer` trains one on a corpus; a run trains
it once and keeps it.

A byte-level tokenizer, as those that are trained here, decodes every text
exactly.

Shapes: n tokens of a text, V ids.
"""

import copy
import datetime
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from train.data.pretrained import (
  CLOCK,
  CONFIG,
  GENERATION,
  MODEL,
  OWN,
  PLAIN_CLASS,
  TEMPLATE,
  ids_of,
  json_of,
  located,
  parsed,
  read,
)
from train.data.template import ChatTemplate, Piece

_SPECIALS = {'pad_token': '<pad>', 'bos_token': '<s>', 'eos_token': '</s>'}
"""The special tokens of a tokenizer that is trained here, in the order of their
ids. Packing pads rows with zeros, so padding must have the id 0."""


class Tokenizer:
  """Converts text to ids and back.

  Attributes:
    files: contents of its files by name; tokenizer.json is one of them.
    vocab_size: one more than the highest id, added tokens included.
    num_rows: number of rows of the model's embedding, as in `fitted`; None
      without a limit.
    bos_id: id that starts each document; None without BOS.
    eos_id: id that ends each document.
    stop_ids: ids that end an answer: eos_id, those of generation_config.json,
      and the ends of a turn in the chat template.
    tokens: texts of the tokens that a template can name, such as eos_token.
    specials: ids of special tokens and of others that are never split, by their
      texts.
    chat_template: the chat template; None without one.
  """

  def __init__(self, files: Mapping[str, bytes]) -> None:
    """Loads a tokenizer from its files.

    Args:
      files: contents by name: tokenizer.json, tokenizer_config.json with the
        special tokens, and possibly generation_config.json, chat_template.jinja
        and the clock of a run.

    Raises:
      ValueError: a file is damaged, or no file defines EOS.
    """
    self.files = dict(files)
    self.num_rows: int | None = None
    self._tokenizer = parsed(self.model)
    self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
    config = json_of(files, CONFIG)
    ends = ids_of(json_of(files, GENERATION).get('eos_token_id'))
    texts = {
      name: token['content'] if isinstance(token, dict) else token
      for name, token in config.items()
      if name.endswith('_token')
    }
    self.tokens = {k: x for k, x in texts.items() if isinstance(x, str)}
    self.eos_id = self._eos_id(ends)
    self.bos_id = self._bos_id(config.get('add_bos_token'))
    self._added = self._tokenizer.get_added_tokens_decoder()
    whole = config.get(OWN, {}).get('whole', ())
    self.specials = {token.content: i for i, token in self._added.items()}
    self.specials |= {text: self._id(text) for text in whole}
    self.chat_template = self._template(config)
    template = self.chat_template
    turns = (
      [] if template is None else [self.specials[x] for x in template.ends]
    )
    self.stop_ids = tuple(dict.fromkeys([self.eos_id, *ends, *turns]))
    # This post-processor adds no special tokens, and includes a space in front
    # of a token in the token's offsets.
    self._tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)

  @property
  def model(self) -> bytes:
    """The content of tokenizer.json."""
    return self.files[MODEL]

  def save(self, directory: str | os.PathLike) -> None:
    """Writes the files into a directory."""
    for name, content in self.files.items():
      (pathlib.Path(directory) / name).write_bytes(content)

  def encode(self, text: str, *, special: bool = False) -> np.ndarray:
    """Returns the ids of a text, [n] int32, without BOS and EOS.

    Args:
      text: the text.
      special: whether texts of special tokens are encoded as these tokens.

    Raises:
      ValueError: an id has no row, by `num_rows`.
    """
    tokenizer = self._tokenizer if special else self._plain
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return checked(self, np.array(ids, np.int32), text)

  def encode_pieces(
    self, pieces: Iterable[Piece]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids [n] of joined pieces, and which are in the loss [n].

    The ids are those of the whole text, with special tokens. A token that spans
    two pieces counts in the loss if one of them does.

    Raises:
      ValueError: an id has no row, by `num_rows`.
    """
    text, before = _concatenated(pieces)
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    ids_n = checked(self, np.array(encoding.ids, np.int32), text)
    starts_n, stops_n = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    return ids_n, before[stops_n] > before[starts_n]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids, without BOS, EOS and padding."""
    return self._tokenizer.decode(
      [int(i) for i in ids], skip_special_tokens=True
    )

  @functools.cached_property
  def bytes_V(self) -> np.ndarray:
    """Number of UTF-8 bytes that each id stands for, [vocab_size] int32."""
    fields = json.loads(self.model)
    num_bytes = _num_bytes_of(fields.get('decoder'), fields['model'])
    found_V = np.zeros(self.vocab_size, np.int32)
    for token, i in self._tokenizer.get_vocab().items():
      if i not in self._added:
        found_V[i] = num_bytes(token)
      elif not self._added[i].special:
        found_V[i] = len(token.encode())
    return found_V

  def with_template(
    self, source: str | None, clock: datetime.datetime | None = None
  ) -> 'Tokenizer':
    """Returns the same tokenizer with another chat template.

    Args:
      source: the Jinja text; None keeps the template.
      clock: the time of a run, which templates can print; None keeps the clock.
    """
    files = dict(self.files)
    if source is not None:
      files[TEMPLATE] = source.encode()
    if clock is not None:
      files[CLOCK] = json.dumps({'clock': clock.isoformat()}).encode()
    found = Tokenizer(files)
    found.num_rows = self.num_rows
    return found

  def ordinary(self) -> dict[str, int]:
    """Returns the ids of all tokens that are not special, by their texts."""
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
    return {text: i for text, i in vocabulary.items() if i not in self._added}

  @functools.cached_property
  def _plain(self) -> tokenizers.Tokenizer:
    """A copy of the tokenizer that encodes special tokens as ordinary text."""
    plain = parsed(self.model)
    plain.encode_special_tokens = True
    return plain

  def _eos_id(self, ends: Sequence[int]) -> int:
    """Returns the id of EOS: by its name, else `ends`, else the id of SEP."""
    # BERT has no EOS; its documents end with SEP.
    if ends and 'eos_token' not in self.tokens:
      return ends[0]
    name = self.tokens.get('eos_token', self.tokens.get('sep_token'))
    if name is None:
      raise ValueError(
        'nothing says what ends a document: give eos_token in '
        'tokenizer_config.json, or eos_token_id in config.json'
      )
    return self._id(name)

  def _bos_id(self, adds_bos: bool | None) -> int | None:
    """Returns the id of BOS: by the setting, else by encoding an empty text."""
    bos = self.tokens.get('bos_token')
    if adds_bos is not None:
      return self._id(bos) if adds_bos and bos else None
    first = self._tokenizer.encode('', add_special_tokens=True).ids[:1]
    is_eos = first == [self.eos_id] and bos != self.tokens.get('eos_token')
    return first[0] if first and not is_eos else None

  def _id(self, token: str) -> int:
    found = self._tokenizer.token_to_id(token)
    if found is None:
      raise ValueError(
        f'the special token {token!r} is not in the vocabulary of {MODEL}: '
        f'correct {CONFIG}'
      )
    return found

  def _template(self, config: Mapping[str, Any]) -> ChatTemplate | None:
    """Returns the template in its own file, else in the settings."""
    source = config.get('chat_template')
    if TEMPLATE in self.files:
      source = self.files[TEMPLATE].decode()
    if not source:
      return None
    clock = json_of(self.files, CLOCK).get('clock')
    if clock is not None:
      clock = datetime.datetime.fromisoformat(clock)
    return ChatTemplate(source, self.tokens, self.specials, clock=clock)


def load(path: str | os.PathLike) -> Tokenizer:
  """Reads the tokenizer of a run or of a checkpoint.

  Args:
    path: a directory, a tokenizer.json, or a sentencepiece model.

  Raises:
    FileNotFoundError: there is no tokenizer at this path.
    ImportError: transformers, which reads the tokenizers of checkpoints, is not
      installed.
    ValueError: a file is damaged.
  """
  path = pathlib.Path(path)
  files = read(path)
  with located(path if path.is_dir() else path.parent):
    return Tokenizer(files)


def fitted(
  tokenizer: Tokenizer, num_rows: int, *, origin: str, remedy: str
) -> Tokenizer:
  """Returns the tokenizer for a model whose embedding has `num_rows` rows.

  Ids beyond the last row are harmless while no text uses them, such as a
  '[PAD]' that was added for another program. If a text uses one, encoding it
  raises ValueError.

  Args:
    tokenizer: a tokenizer with any number of ids.
    num_rows: number of rows of the model's embedding.
    origin: where the tokenizer is from, for the error.
    remedy: what to do, for the error.

  Raises:
    ValueError: BOS, EOS or a token that can occur in any text has no row.
  """
  ends = {
    text: tokenizer.specials.get(text)
    for name, text in tokenizer.tokens.items()
    if name == 'eos_token' or (name == 'bos_token' and tokenizer.bos_id)
  }
  for text, i in (tokenizer.ordinary() | ends).items():
    if i is not None and i >= num_rows:
      raise ValueError(
        f'the tokenizer of {origin} must have at most vocab_size={num_rows} '
        f'ids that texts use, got {text!r} of id {i}: {remedy}'
      )
  found = copy.copy(tokenizer)
  found.num_rows = num_rows
  return found


def check_texts(
  tokenizer: Tokenizer, texts: Iterable[str], *, special: bool
) -> None:
  """Raises ValueError for the first text with a token that has no row.

  Args:
    tokenizer: a tokenizer that `fitted` has returned.
    texts: the texts. They are read only if some token has no row.
    special: as in `Tokenizer.encode`.
  """
  rows = tokenizer.num_rows
  if rows is None or tokenizer.vocab_size <= rows:
    return
  beyond = [text for text, i in tokenizer.specials.items() if i >= rows]
  for text in texts:
    if any(name in text for name in beyond):
      tokenizer.encode(text, special=special)


def _concatenated(pieces: Iterable[Piece]) -> tuple[str, np.ndarray]:
  """Returns the text of pieces, and a count for each offset in it, [n + 1].

  The count is the number of characters before the offset that are in the loss.
  """
  pieces = list(pieces)
  scored = [np.full(len(text), is_scored) for text, is_scored in pieces]
  counts = np.cumsum(np.concatenate([np.zeros(1, np.int64), *scored]))
  return ''.join(text for text, _ in pieces), counts


def checked(tokenizer: Tokenizer, ids_n: np.ndarray, text: str) -> np.ndarray:
  """Returns the ids of a text.

  Raises:
    ValueError: the model has no row for one of the ids.
  """
  rows = tokenizer.num_rows
  if rows is not None and len(ids_n) and ids_n.max() >= rows:
    i = int(ids_n.max())
    name = next(x for x, id_ in tokenizer.specials.items() if id_ == i)
    raise ValueError(
      f'the text {text[:60]!r} has the token {name!r} of id {i}, for which a '
      f'model of vocab_size={rows} has no row: take {name} out of the text, or '
      'add rows to the model'
    )
  return ids_n


def _num_bytes_of(
  decoder: Any, model: Mapping[str, Any]
) -> Callable[[str], int]:
  """Returns a function from a token to the bytes of text that it stands for."""
  if '"ByteLevel"' in json.dumps(decoder):
    return len  # each character stands for a byte
  if model.get('type') == 'WordPiece':
    mark = model.get('continuing_subword_prefix', '##')
    return lambda token: (
      len(token.removeprefix(mark).encode())
      if token.startswith(mark)
      else 1 + len(token.encode())
    )
  return lambda token: (
    1
    if re.fullmatch('<0x[0-9A-F]{2}>', token)
    else len(token.replace('\u2581', ' ').encode())
  )


def train_tokenizer(
  documents: Iterable[str], *, vocab_size: int, sample_chars: int = 5_000_000
) -> Tokenizer:
  """Trains a byte-level BPE on the first `sample_chars` of documents.

  Words are separated as in GPT-2. Training is deterministic: the same documents
  in the same order give the same ids, for any number of threads. Pass
  `corpus.open('train').stream(seed=0, repeat=False)`, a shuffled pass, so that
  the sample is drawn from the whole corpus.

  Args:
    documents: texts.
    vocab_size: number of ids.
    sample_chars: number of characters to train on.

  Raises:
    ValueError: `vocab_size` is smaller than the number of bytes and special
      tokens, or larger than the sample supports. The message has the possible
      sizes.
  """
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  least = len(_SPECIALS) + len(alphabet)
  if vocab_size < least:
    raise ValueError(
      f'vocab_size must be at least {least} (256 bytes and {len(_SPECIALS)} '
      f'special ids), got {vocab_size}: raise vocab_size'
    )
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(_SPECIALS.values()),
    initial_alphabet=alphabet,
    show_progress=False,
  )
  tokenizer.train_from_iterator(_sample(documents, sample_chars), trainer)
  most = tokenizer.get_vocab_size()
  if most < vocab_size:
    raise ValueError(
      f'vocab_size must be at most {most} on this corpus, got {vocab_size}: '
      'lower vocab_size, or give more text'
    )
  bos = _SPECIALS['bos_token']
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f'{bos} $A',
    pair=f'{bos} $A {bos}:1 $B:1',
    special_tokens=[(bos, tokenizer.token_to_id(bos))],
  )
  config = {'tokenizer_class': PLAIN_CLASS, **_SPECIALS, OWN: {}}
  return Tokenizer(
    {
      MODEL: tokenizer.to_str().encode(),
      CONFIG: json.dumps(config, indent=2).encode(),
    }
  )


def _sample(documents: Iterable[str], num_chars: int) -> Iterator[str]:
  """Yields documents until they have `num_chars` characters."""
  for document in documents:
    yield document[:num_chars]
    num_chars -= len(document)
    if num_chars <= 0:
      return
