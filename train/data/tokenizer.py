"""Tokenizers: a sentencepiece model, or a checkpoint's tokenizer.json.

`load` reads either kind. `train_tokenizer` trains a sentencepiece model on a
corpus; a run trains it once and keeps it.

A trained model decodes every text exactly, except that U+2581 becomes a space:
it does not normalize, adds no space, and encodes a character without a piece (a
newline, a rare character) as its UTF-8 bytes. A byte-level tokenizer.json also
decodes every text exactly.

Shapes: n tokens of a text, V ids.
"""

import codecs
import contextlib
import copy
import datetime
import functools
import io
import itertools
import json
import os
import pathlib
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import sentencepiece
import tokenizers

from train.data.template import ChatTemplate, Piece

# Packing pads rows with zeros, so padding must have the id 0.
PAD_ID = 0
BOS_ID = 1
EOS_ID = 2
UNK_ID = 3

_NUM_RESERVED = 4 + 256

# sentencepiece skips training lines of more than 4,192 bytes.
_MAX_LINE_CHARS = 1000

TEMPLATE = 'chat_template.jinja'
"""Name of a file that holds only a chat template."""

CLOCK = 'chat_clock.json'
"""Name of a run's file with the time that its chat template formats."""

_CONVERTIBLE = (
  'vocab.txt',
  'vocab.json',
  'spiece.model',
  'sentencepiece.bpe.model',
  'tekken.json',
  '*.tiktoken',
)
"""Names of tokenizer files that transformers converts to a tokenizer.json."""

SPACES = 'tokenizer_spaces.json'
"""Name of a run's file with the `_Rule` for its sentencepiece model."""

# Further files of a tokenizer's directory that affect the tokenizer.
_SETTINGS = (
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  TEMPLATE,
  'chat_template.json',
  'generation_config.json',
  CLOCK,
  SPACES,
)

_SPACE = '\u2581'
"""The character that stands for a space in the pieces of sentencepiece
models."""

# Serialized fields of sentencepiece's NormalizerSpec, which is field 3 of a
# model (ModelProto). Appended to a serialized model, they replace the model's
# own fields, because protocol buffers are merged.
_WITH_SPACE = b'\x1a\x02\x18\x01'  # add_dummy_prefix: true
_WITHOUT_SPACE = b'\x1a\x02\x18\x00'
# No precompiled_charsmap; remove_extra_whitespaces: false.
_NO_NORMALIZATION = b'\x1a\x04\x12\x00\x20\x00'

_USER_DEFINED = b'\x18\x04'
"""The serialized type USER_DEFINED of a piece."""


class _Added(NamedTuple):
  """A token that is searched for in a text before the text is encoded."""

  text: str
  """Text of the token."""
  id: int
  """Id of the token."""
  special: bool = False
  """Whether it stands for no text, and is searched for only on request."""
  lstrip: bool = False
  """Whether it absorbs the white space before it."""
  rstrip: bool = False
  """Whether it absorbs the white space after it."""
  single_word: bool = False
  """Whether it must not be next to a letter, a digit or an underscore."""

  @property
  def pattern(self) -> str:
    """A regular expression whose only group is the token's text."""
    found = f'({re.escape(self.text)})'
    if self.single_word:
      found = rf'(?<!\w){found}(?!\w)'
    before = r'\s*' if self.lstrip else ''
    after = r'\s*' if self.rstrip else ''
    return before + found + after


class _Part(NamedTuple):
  """A part of a text: an added token, or the text between two of them."""

  text: str
  """Text of the part."""
  start: int
  """Offset of the part's first character."""
  token: _Added | None
  """The added token, or None for text between tokens."""


class _AddedTokenSplitter:
  """Splits a text at added tokens. Longer tokens take precedence."""

  def __init__(self, tokens: Iterable[_Added]) -> None:
    self._tokens = sorted(tokens, key=lambda token: -len(token.text))
    patterns = [token.pattern for token in self._tokens] or ['(?!)']
    self._pattern = re.compile('|'.join(patterns))

  def __call__(self, text: str) -> Iterator[_Part]:
    """Yields the parts of a text."""
    stop = 0
    for match in self._pattern.finditer(text):
      if match.start() > stop:
        yield _Part(text[stop : match.start()], stop, None)
      group = match.lastindex
      assert group is not None  # The pattern of each token has one group.
      token = self._tokens[group - 1]
      yield _Part(token.text, match.start(group), token)
      stop = match.end()
    if stop < len(text):
      yield _Part(text[stop:], stop, None)


_Spaces: TypeAlias = Literal['never', 'first', 'each', 'always']


class _Rule(NamedTuple):
  """The way in which the text between added tokens is encoded."""

  spaces: _Spaces
  """Which parts get a space in front: none ('never'), the one at the start of
  the text ('first'), or each of them ('each', 'always'). A part that begins
  with a space gets another one only with 'always', as in sentencepiece by
  default."""
  normalizes: bool = True
  """Whether the model's own normalization is applied."""


class Tokenizer:
  """Converts text to ids and back, by a sentencepiece model.

  Added tokens split a text, and sentencepiece encodes the parts between them.
  `legacy` and `tokenizer_class` in tokenizer_config.json decide which parts get
  a space in front, as in transformers 5.

  Attributes:
    model: the serialized model, the content of a .model file.
    files: contents of other files of its directory, by name.
    vocab_size: number of ids.
    num_rows: number of rows of the model's embedding, as in `fitted`; None
      without a limit.
    bos_id: id that starts each document; None without BOS.
    eos_id: id that ends each document; -1 without EOS, which `load` refuses.
    stop_ids: ids that end an answer: eos_id, and the ends of a turn in the chat
      template.
    tokens: texts of the tokens that a template can name, such as eos_token.
    specials: ids of special, added and user-defined tokens, by their texts.
    chat_template: the directory's chat template; None without one.
  """

  def __init__(
    self,
    model: bytes,
    files: Mapping[str, bytes] | None = None,
    *,
    model_type: str | None = None,
  ) -> None:
    """Loads a serialized model, from any trainer of sentencepiece.

    Args:
      model: the content of a .model file.
      files: contents of other files of its directory, by name.
      model_type: field of the checkpoint's config.json, if known.
    """
    self.model = model
    self.files = dict(files or {})
    self.num_rows: int | None = None
    self._processor = _processor(model)
    self._num_pieces = self._processor.vocab_size()
    settings = _Settings(self.files)
    self._rule = settings.rule(_adds_space(self._processor), model_type)
    user_defined = _user_defined(model)
    has_settings = 'tokenizer_config.json' in self.files
    if self._rule.spaces != 'never' or user_defined or has_settings:
      rule = json.dumps(self._rule._asdict(), indent=2)
      self.files[SPACES] = rule.encode()
    plain = b'' if self._rule.normalizes else _NO_NORMALIZATION
    self._spaced = _processor(model + plain + _WITH_SPACE)
    self._bare = _processor(model + plain + _WITHOUT_SPACE)
    added = self._added_tokens(settings, user_defined)
    self._split_at_all_tokens = _AddedTokenSplitter(added)
    self._split_at_text_tokens = _AddedTokenSplitter(
      token for token in added if not token.special
    )
    self._texts = {x.id: x.text for x in added if not x.special}
    self._silent = {x.id for x in added if x.special}
    self.specials = {
      self._processor.id_to_piece(i): i for i in user_defined
    } | {token.text: token.id for token in added}
    self.vocab_size = max(
      self._num_pieces, 1 + max(self.specials.values(), default=0)
    )
    names = (
      ('bos_token', self._processor.bos_id()),
      ('eos_token', self._processor.eos_id()),
    )
    own = {name: self._processor.id_to_piece(i) for name, i in names if i >= 0}
    self.tokens = own | settings.tokens(self._text_of)
    eos_id = self._id('eos_token')
    self.eos_id = -1 if eos_id is None else eos_id
    self._adds_bos = settings.adds_bos is not False
    self.bos_id = self._id('bos_token') if self._adds_bos else None
    self.chat_template = settings.chat_template(self.tokens, self.specials)
    self.stop_ids = _stop_ids(
      self.eos_id, settings, self.chat_template, self.specials
    )

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'Tokenizer':
    """Reads a .model file, and the settings in other files of its directory.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it is not a sentencepiece model, or has no BOS or EOS.
    """
    path = pathlib.Path(path)
    if not path.is_file():
      raise FileNotFoundError(
        f'no tokenizer at {str(path)!r}: give the path of a sentencepiece '
        '.model file, or none to train one on the corpus'
      )
    try:
      with _broken(path.parent):
        tokenizer = cls(
          path.read_bytes(),
          _settings_of(path.parent),
          model_type=_model_config(path.parent).get('model_type'),
        )
    except RuntimeError as error:
      remedy = 'give a .model file, or none to train one on the corpus'
      raise ValueError(
        f'{str(path)!r} is not a sentencepiece model: '
        f'{_pointer(path.read_bytes()) or remedy}'
      ) from error
    bos = -1 if tokenizer.bos_id is None else tokenizer.bos_id
    eos = tokenizer.eos_id
    if eos < 0 or (bos < 0 and tokenizer._adds_bos):
      raise ValueError(
        f'the tokenizer {str(path)!r} has BOS {bos} and EOS '
        f'{eos}, but documents need both (-1: the tokenizer has none): train '
        'it with bos_id and eos_id, or give none to train one on the corpus'
      )
    return tokenizer

  def save(self, directory: str | os.PathLike) -> None:
    """Writes tokenizer.model and the other files into a directory."""
    _write(directory, {'tokenizer.model': self.model} | self.files)

  def encode(self, text: str, *, special: bool = False) -> np.ndarray:
    """Returns the ids of a text, [n] int32, without BOS and EOS.

    Args:
      text: the text.
      special: whether texts of special tokens are encoded as these tokens.

    Raises:
      ValueError: an id has no row, by `num_rows`.
    """
    if special:
      parts = self._split_at_all_tokens(text)
    else:
      parts = self._split_at_text_tokens(text)
    ids: list[int] = []
    for part in parts:
      ids += self._encoded(part)
    return checked(self, np.array(ids, np.int32), text)

  def encode_pieces(
    self, pieces: Iterable[Piece]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids [n] of joined pieces, and which are in the loss [n].

    The ids are those of the whole text, with special tokens. A token that spans
    two pieces counts in the loss if one of them does. A space at the end of a
    piece counts to the next piece.

    Raises:
      ValueError: an id has no row, by `num_rows`.
    """
    text, before = _concatenated(_spaces_moved(pieces))
    ids = []
    starts = []
    stops = []
    for part in self._split_at_all_tokens(text):
      ids += self._encoded(part)
      if part.token is None:
        starts_k, stops_k = _spans(self._processor_of(part), part.text)
      else:
        starts_k = [0]
        stops_k = [len(part.text)]
      starts += [part.start + i for i in starts_k]
      stops += [part.start + i for i in stops_k]
    ids_n = checked(self, np.array(ids, np.int32), text)
    starts_n, stops_n = np.array([starts, stops], np.int64)
    return ids_n, before[stops_n] > before[starts_n]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids, without BOS, EOS and padding."""
    known = [
      i
      for i in map(int, ids)
      if i not in self._silent and (i < self._num_pieces or i in self._texts)
    ]
    texts = []
    processor = self._bare if self._rule.spaces == 'never' else self._spaced
    for text, run in itertools.groupby(known, self._texts.get):
      run = list(run)
      texts.append(processor.decode(run) if text is None else len(run) * text)
      # Decoding removes only the space in front of the whole text.
      processor = self._bare
    return ''.join(texts)

  @functools.cached_property
  def bytes_V(self) -> np.ndarray:
    """Number of UTF-8 bytes that each id stands for, [vocab_size] int32."""
    return np.array([self._num_bytes(i) for i in range(self.vocab_size)], 'i4')

  def with_template(
    self, source: str | None, clock: datetime.datetime | None = None
  ) -> 'Tokenizer':
    """Returns the same tokenizer with another chat template.

    Args:
      source: the Jinja text; None keeps the template.
      clock: the time of a run, which templates can print; None keeps the clock.
    """
    files = self.files | _template_files(source, clock)
    found = Tokenizer(self.model, files)
    found.num_rows = self.num_rows
    return found

  def ordinary(self) -> dict[str, int]:
    """Returns the ids of all tokens that are not special, by their texts."""
    pieces = map(self._processor.id_to_piece, range(self._num_pieces))
    return {piece: i for i, piece in enumerate(pieces) if i not in self._silent}

  def _encoded(self, part: _Part) -> list[int]:
    if part.token is not None:
      return [part.token.id]
    return self._processor_of(part).encode(part.text)

  def _processor_of(self, part: _Part) -> Any:
    """Returns the processor that encodes a part, with or without a space."""
    spaces = self._rule.spaces
    if spaces == 'always':
      return self._spaced
    begun = part.text.startswith((' ', _SPACE))
    missing = spaces == 'each' or (spaces == 'first' and part.start == 0)
    return self._spaced if missing and not begun else self._bare

  def _added_tokens(
    self, settings: '_Settings', user_defined: Sequence[int]
  ) -> list[_Added]:
    """Returns the tokens that split a text, from the model and the settings."""
    pieces = [
      _Added(self._processor.id_to_piece(i), i, special=True)
      for i in range(self._num_pieces)
      if self._processor.is_control(i) or self._processor.is_unknown(i)
    ]
    if not self._rule.normalizes:
      # If the model normalizes, sentencepiece itself finds these tokens, after
      # it has put a space in front.
      pieces += [
        _Added(self._processor.id_to_piece(i), i) for i in user_defined
      ]
    named = settings.named()
    for text in named:
      i = self._processor.piece_to_id(text)
      if self._processor.id_to_piece(i) == text:
        pieces.append(_Added(text, i, special=True))
    found = {token.text: token for token in pieces}
    for token in settings.added():
      special = token.special or token.text in named
      found[token.text] = token._replace(special=special)
    return list(found.values())

  def _text_of(self, i: int) -> str | None:
    """Returns the text of an id; None if the id does not exist."""
    by_id = {id_: text for text, id_ in self.specials.items()}
    if i in by_id:
      return by_id[i]
    known = 0 <= i < self._num_pieces
    return self._processor.id_to_piece(i) if known else None

  def _id(self, name: str) -> int | None:
    """Returns the id of a special token by its name; None if it is not set."""
    text = self.tokens.get(name)
    if text is None:
      return None
    if text in self.specials:
      return self.specials[text]
    i = self._processor.piece_to_id(text)
    if self._processor.id_to_piece(i) != text:
      raise ValueError(
        f'the special token {text!r} is not in the vocabulary of '
        'tokenizer.model: correct tokenizer_config.json'
      )
    return i

  def _num_bytes(self, i: int) -> int:
    if i in self._silent:
      return 0
    if i in self._texts:
      return len(self._texts[i].encode())
    if i >= self._num_pieces:
      return 0
    if self._processor.is_byte(i):
      return 1
    return len(self._processor.id_to_piece(i).replace(_SPACE, ' ').encode())


def _processor(model: bytes) -> Any:
  """Returns sentencepiece's processor of a serialized model."""
  return sentencepiece.SentencePieceProcessor(model_proto=model)


def _adds_space(processor: Any) -> bool:
  """Returns whether a model puts a space in front of a text."""
  first = processor.encode('a')[0]
  return processor.id_to_piece(first).startswith(_SPACE)


def _user_defined(model: bytes) -> list[int]:
  """Returns the ids of the pieces that a trainer was given as whole tokens.

  The library does not return the type of a piece, so it is read from the
  serialized model: it is field 3 of a piece.
  """
  pieces = (value for number, value in _fields(model) if number == 1)
  return [
    i
    for i, piece in enumerate(pieces)
    if _USER_DEFINED in piece and (3, 4) in _fields(piece)
  ]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
  """Yields the number and value of each field in a protocol buffer message."""
  at = 0
  while at < len(message):
    key, at = _varint(message, at)
    if key & 7 == 0:
      value, at = _varint(message, at)
    else:
      sizes = {1: (8, at), 5: (4, at)}
      size, at = sizes.get(key & 7) or _varint(message, at)
      value = message[at : at + size]
      at += size
    yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
  """Parses a protocol buffer integer; returns it and the offset after it.

  >>> _varint(bytes([0b10010110, 0b00000001]), 0)
  (150, 2)
  """
  value = 0
  shift = 0
  while True:
    byte = message[at]
    value |= (byte & 0x7F) << shift
    at += 1
    shift += 7
    if byte < 0x80:
      return value, at


def _spans(processor: Any, text: str) -> tuple[list[int], list[int]]:
  """Returns the offsets in a text where each of its tokens begins and ends.

  A space that is put in front of the text counts to its first character.
  """
  normalized, offsets = processor.normalize(text, with_offsets=True)
  # The size of each token in bytes of the normalized text.
  sizes = [
    1 if processor.is_byte(i) else len(piece.encode())
    for i, piece in zip(
      processor.encode(text), processor.encode(text, out_type=str), strict=True
    )
  ]
  char_of_byte = [
    c for c, char in enumerate(normalized) for _ in range(len(char.encode()))
  ]
  starts = []
  stops = []
  at = 0
  for size in sizes:
    first = char_of_byte[at]
    last = char_of_byte[at + size - 1]
    starts.append(offsets[first])
    stops.append(max(offsets[last + 1], offsets[first] + 1))
    at += size
  return starts, stops


class JsonTokenizer:
  """Converts text to ids and back, by a tokenizer.json of Hugging Face.

  Attributes:
    model: the content of tokenizer.json.
    files: contents of other files of its directory, by name.
    vocab_size: one more than the highest id, added tokens included.
    num_rows: number of rows of the model's embedding, as in `fitted`; None
      without a limit.
    bos_id: id that the tokenizer puts in front of a text; None without BOS.
    eos_id: id that ends each document.
    stop_ids: ids that end an answer: eos_id, those of generation_config.json,
      and the ends of a turn in the chat template.
    tokens: texts of the tokens that a template can name, such as eos_token.
    specials: ids of special and added tokens, by their texts.
    chat_template: the directory's chat template; None without one.
  """

  def __init__(
    self, model: bytes, files: Mapping[str, bytes] | None = None
  ) -> None:
    """Loads the content of a tokenizer.json.

    Args:
      model: that content.
      files: contents of other files of its directory, by name. They define BOS,
        EOS and the chat template.

    Raises:
      ValueError: a file is damaged, or no file defines EOS.
    """
    self.model = model
    self.files = dict(files or {})
    self.num_rows: int | None = None
    self._tokenizer = parsed(model)
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
      raise ValueError(
        'tokenizer.json has an empty vocabulary: save it again from the '
        'library that trained it'
      )
    self.vocab_size = max(vocabulary.values()) + 1
    settings = _Settings(self.files)
    self.tokens = settings.tokens(self._tokenizer.id_to_token)
    self.eos_id = self._eos_id(settings.end())
    self.bos_id = self._bos_id(settings.adds_bos)
    added = self._tokenizer.get_added_tokens_decoder()
    self.specials = {token.content: i for i, token in added.items()}
    self.chat_template = settings.chat_template(self.tokens, self.specials)
    self.stop_ids = _stop_ids(
      self.eos_id, settings, self.chat_template, self.specials
    )
    # This post-processor adds no special tokens, and includes a space in front
    # of a token in the token's offsets.
    self._tokenizer.post_processor = tokenizers.processors.ByteLevel(
      trim_offsets=False
    )

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'JsonTokenizer':
    """Reads a tokenizer.json, and the settings in other files of its directory.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: a file is damaged, or no file defines EOS.
    """
    path = pathlib.Path(path)
    if not path.is_file():
      raise FileNotFoundError(
        f'no tokenizer at {str(path)!r}: give the path of a tokenizer.json'
      )
    with _broken(path.parent):
      model = path.read_bytes().removeprefix(codecs.BOM_UTF8)
      return cls(model, _settings_of(path.parent))

  def save(self, directory: str | os.PathLike) -> None:
    """Writes tokenizer.json and the other files into a directory."""
    _write(directory, {'tokenizer.json': self.model} | self.files)

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
    words = json.loads(self.model)
    num_bytes = _num_bytes_of(words.get('decoder'), words['model'])
    added = self._tokenizer.get_added_tokens_decoder()
    found_V = np.zeros(self.vocab_size, np.int32)
    for token, i in self._tokenizer.get_vocab().items():
      if i not in added:
        found_V[i] = num_bytes(token)
      elif not added[i].special:
        found_V[i] = len(token.encode())
    return found_V

  def with_template(
    self, source: str | None, clock: datetime.datetime | None = None
  ) -> 'JsonTokenizer':
    """Returns the same tokenizer with another chat template.

    Args:
      source: the Jinja text; None keeps the template.
      clock: the time of a run, which templates can print; None keeps the clock.
    """
    files = self.files | _template_files(source, clock)
    found = JsonTokenizer(self.model, files)
    found.num_rows = self.num_rows
    return found

  def ordinary(self) -> dict[str, int]:
    """Returns the ids of all tokens that are not special, by their texts."""
    added = self._tokenizer.get_added_tokens_decoder()
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
    return {text: i for text, i in vocabulary.items() if i not in added}

  @functools.cached_property
  def _plain(self) -> tokenizers.Tokenizer:
    """A copy of the tokenizer that encodes special tokens as ordinary text."""
    plain = parsed(self.model)
    plain.encode_special_tokens = True
    return plain

  def _eos_id(self, end: int | None) -> int:
    """Returns the id of EOS: by its name, else `end`, else the id of SEP."""
    # BERT has no EOS; its documents end with SEP.
    name = (
      self.tokens.get('eos_token')
      or (end is not None and self._tokenizer.id_to_token(end))
      or self.tokens.get('sep_token')
    )
    if not name:
      raise ValueError(
        'nothing says what ends a document: give eos_token in '
        'tokenizer_config.json, or eos_token_id in config.json'
      )
    return self._id(name)

  def _bos_id(self, adds_bos: bool | None) -> int | None:
    """Returns the id of BOS: by the setting, else by encoding an empty text."""
    bos = self.tokens.get('bos_token')
    eos = self.tokens.get('eos_token')
    if adds_bos is not None:
      return self._id(bos) if adds_bos and bos else None
    first = self._tokenizer.encode('', add_special_tokens=True).ids[:1]
    if not first or (first == [self.eos_id] and bos != eos):
      return None
    return first[0]

  def _id(self, token: str) -> int:
    found = self._tokenizer.token_to_id(token)
    if found is None:
      raise ValueError(
        f'the special token {token!r} is not in the vocabulary of '
        'tokenizer.json: correct tokenizer_config.json'
      )
    return found


AnyTokenizer: TypeAlias = Tokenizer | JsonTokenizer
"""A tokenizer of a run. Both classes have the same attributes and methods."""


def load(path: str | os.PathLike) -> AnyTokenizer:
  """Reads a tokenizer from a .model file, a tokenizer.json or a directory.

  A directory is a run, or a checkpoint of transformers. Its tokenizer.json is
  preferred to its tokenizer.model.

  Raises:
    FileNotFoundError: there is no tokenizer at this path.
    ValueError: a file is damaged.
  """
  path = pathlib.Path(path)
  if path.name == 'tokenizer.json':
    return JsonTokenizer.load(path)
  if not path.is_dir():
    return Tokenizer.load(path)
  for name, kind in (
    ('tokenizer.json', JsonTokenizer),
    ('tokenizer.model', Tokenizer),
  ):
    if (path / name).is_file():
      return kind.load(path / name)
  raise FileNotFoundError(
    f'no tokenizer in {str(path)!r}: it has neither tokenizer.json nor '
    f'tokenizer.model; {_conversion(path)}'
  )


def _conversion(directory: pathlib.Path) -> str:
  """Returns the remedy for a directory that has neither kind of tokenizer."""
  found = (
    file.name
    for pattern in _CONVERTIBLE
    for file in sorted(directory.glob(pattern))
  )
  name = next(found, None)
  if name is None:
    return 'copy one of them there, or name a directory that has one'
  return (
    f'to make tokenizer.json of {name}: python -c "from transformers import '
    f"AutoTokenizer as T; T.from_pretrained('{directory}')"
    f".save_pretrained('{directory}')\""
  )


AnyOf = TypeVar('AnyOf', bound=AnyTokenizer)


def fitted(
  tokenizer: AnyOf, num_rows: int, *, origin: str, remedy: str
) -> AnyOf:
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
  tokenizer: AnyTokenizer, texts: Iterable[str], *, special: bool
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


class _Settings:
  """The settings of a tokenizer in the files of its directory."""

  def __init__(self, files: Mapping[str, bytes]) -> None:
    self._files = files
    self._config = self._json('tokenizer_config.json')
    self._generation = self._json('generation_config.json')
    self.adds_bos: bool | None = self._config.get('add_bos_token')

  def _json(self, name: str) -> dict[str, Any]:
    return _object(self._files.get(name, b'{}'), name)

  def tokens(self, token_of_id: Callable[[int], str | None]) -> dict[str, str]:
    """Returns the texts of special tokens by name, if they are set."""
    ids = {
      name.removesuffix('_id'): token_of_id(i)
      for name in ('bos_token_id', 'eos_token_id')
      for i in _ids(self._generation.get(name))[:1]
    }
    named = self._json('special_tokens_map.json') | self._config
    texts = {
      name: token['content'] if isinstance(token, dict) else token
      for name, token in (ids | named).items()
      if name.endswith('_token')
    }
    # The first LLaMA checkpoints have '' for tokens of the model itself.
    return {k: x for k, x in texts.items() if isinstance(x, str) and x}

  def end(self) -> int | None:
    """Returns the first EOS id in generation_config.json; None without one."""
    return next(iter(self.stop_ids()), None)

  def named(self) -> set[str]:
    """Returns the texts of all tokens that the settings call special."""
    named = self._json('special_tokens_map.json') | self._config
    texts = {
      text
      for name, text in self.tokens(lambda i: None).items()
      if name in named
    }
    for name in ('additional_special_tokens', 'extra_special_tokens'):
      others = named.get(name) or []
      others = others.values() if isinstance(others, dict) else others
      texts |= {x['content'] if isinstance(x, dict) else x for x in others}
    return texts - {''}

  def added(self) -> list[_Added]:
    """Returns the tokens that the settings add, or whose text they replace."""
    listed = self._config.get('added_tokens_decoder', {})
    flags = ('special', 'lstrip', 'rstrip', 'single_word')
    found = [
      _Added(text, i) for text, i in self._json('added_tokens.json').items()
    ]
    for i, token in listed.items():
      given = {name: token[name] for name in flags if name in token}
      found.append(_Added(token['content'], int(i), **given))
    # An empty token would match everywhere in a text.
    return [token for token in found if token.text]

  def rule(self, adds_space: bool, model_type: str | None) -> _Rule:
    """Returns the use of a sentencepiece model, as in transformers 5.

    Args:
      adds_space: whether the model by itself puts a space in front of a text.
      model_type: field of the checkpoint's config.json, if known.
    """
    if SPACES in self._files:
      rule = _Rule(**self._json(SPACES))
      if rule.spaces not in typing.get_args(_Spaces):
        raise ValueError(
          f'spaces in {SPACES} must be one of {typing.get_args(_Spaces)}, got '
          f'{rule.spaces!r}: copy the directory again'
        )
      return rule
    name = self._config.get('tokenizer_class') or ''
    # If the checkpoint has another model_type, transformers ignores the class
    # LlamaTokenizer and reads only the sentencepiece model.
    own_class = name.removesuffix('Fast') == 'LlamaTokenizer'
    if own_class and model_type in (None, 'llama'):
      if self._config.get('add_prefix_space') is False:
        return _Rule('never', normalizes=False)
      legacy = self._config.get('legacy', False)
      return _Rule('each' if legacy else 'first', normalizes=False)
    if not adds_space:
      return _Rule('never')
    return _Rule('always' if self._config.get('legacy', True) else 'first')

  def stop_ids(self) -> list[int]:
    """Returns the ids that end an answer, from generation_config.json."""
    return _ids(self._generation.get('eos_token_id'))

  def chat_template(
    self, tokens: Mapping[str, str], specials: Iterable[str]
  ) -> ChatTemplate | None:
    """Returns the template in its own file or in tokenizer_config.json."""
    text = self._files.get(TEMPLATE)
    source = text.decode() if text is not None else None
    for name in ('chat_template.json', 'tokenizer_config.json'):
      if source is None:
        source = self._json(name).get('chat_template')
    if isinstance(source, list):
      named = {entry['name']: entry['template'] for entry in source}
      source = named.get('default')
    if not source:
      return None
    clock = self._json(CLOCK).get('clock')
    if clock is not None:
      clock = datetime.datetime.fromisoformat(clock)
    return ChatTemplate(source, tokens, specials, clock=clock)


@contextlib.contextmanager
def _broken(directory: pathlib.Path) -> Iterator[None]:
  """Names the directory in errors about its files."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'the tokenizer in {str(directory)!r}: {error}') from error
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(
      f'the tokenizer in {str(directory)!r}: a field of {", ".join(_SETTINGS)} '
      f'has another form than transformers writes ({type(error).__name__}: '
      f'{error}): copy the directory again'
    ) from error


def _settings_of(directory: pathlib.Path) -> dict[str, bytes]:
  """Returns the contents of the settings files in a directory, by name.

  The ids of BOS and EOS in a checkpoint's config.json are moved to
  generation_config.json: a run has a config.json of its own, so it could not
  keep the checkpoint's.
  """
  files = {
    name: (directory / name).read_bytes().removeprefix(codecs.BOM_UTF8)
    for name in _SETTINGS
    if (directory / name).is_file()
  }
  model = _model_config(directory)
  name = 'generation_config.json'
  ends = {
    key: model[key]
    for key in ('bos_token_id', 'eos_token_id')
    if model.get(key) is not None
  }
  generation = _object(files.get(name, b'{}'), name)
  if ends.keys() - generation.keys():
    files[name] = json.dumps(ends | generation, indent=2).encode()
  return files


def _model_config(directory: pathlib.Path) -> dict[str, Any]:
  """Returns a checkpoint's config.json.

  Returns an empty dict for a run, whose config.json does not describe a
  tokenizer.
  """
  file = directory / 'config.json'
  if not file.is_file() or (directory / 'checkpoints').is_dir():
    return {}
  return _object(file.read_bytes(), 'config.json')


def _object(content: bytes, name: str) -> dict[str, Any]:
  try:
    found = json.loads(content.decode('utf-8-sig'))
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{name} is no JSON ({error}): copy the directory again'
    ) from error
  if not isinstance(found, dict):
    raise ValueError(
      f'{name} must be a JSON object, got {content[:40]!r}: copy the directory '
      'again'
    )
  return found


def _ids(value: int | list[int] | None) -> list[int]:
  """Returns the ids in a field that has one, several or none.

  >>> _ids(3), _ids([3, 4]), _ids(None)
  ([3], [3, 4], [])
  """
  if value is None:
    return []
  return list(value) if isinstance(value, list) else [value]


def _stop_ids(
  eos_id: int,
  settings: _Settings,
  template: ChatTemplate | None,
  specials: Mapping[str, int],
) -> tuple[int, ...]:
  ends = () if template is None else template.ends
  ids = [eos_id, *settings.stop_ids(), *(specials[end] for end in ends)]
  return tuple(dict.fromkeys(ids))


def _spaces_moved(pieces: Iterable[Piece]) -> Iterator[Piece]:
  """Moves a space at the end of each piece to the start of the next piece."""
  space = ''
  scored = False
  for text, scored in pieces:
    text = space + text
    space = ' ' if text.endswith(' ') else ''
    yield text.removesuffix(' '), scored
  yield space, scored


def _template_files(
  source: str | None, clock: datetime.datetime | None
) -> dict[str, bytes]:
  """Returns the files of a template and a clock, by name.

  These files take precedence over others.
  """
  found = {}
  if source is not None:
    found[TEMPLATE] = source.encode()
  if clock is not None:
    found[CLOCK] = json.dumps({'clock': clock.isoformat()}).encode()
  return found


def _concatenated(pieces: Iterable[Piece]) -> tuple[str, np.ndarray]:
  """Returns the text of pieces, and a count for each offset in it, [n + 1].

  The count is the number of characters before the offset that are in the loss.
  """
  pieces = list(pieces)
  scored = [np.full(len(text), is_scored) for text, is_scored in pieces]
  counts = np.cumsum(np.concatenate([np.zeros(1, np.int64), *scored]))
  return ''.join(text for text, _ in pieces), counts


def checked(
  tokenizer: AnyTokenizer, ids_n: np.ndarray, text: str
) -> np.ndarray:
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


def _write(directory: str | os.PathLike, files: Mapping[str, bytes]) -> None:
  for name, content in files.items():
    (pathlib.Path(directory) / name).write_bytes(content)


def _pointer(content: bytes) -> str | None:
  """Returns the remedy for a file that Git LFS has not fetched; else None."""
  if content.startswith(b'version https://git-lfs'):
    return 'it is a pointer: git lfs pull'
  return None


def parsed(model: bytes) -> tokenizers.Tokenizer:
  """Returns the `tokenizers` object of a tokenizer.json.

  It neither truncates nor pads.
  """
  try:
    found = tokenizers.Tokenizer.from_str(model.decode())
  # `tokenizers` raises no subclass of Exception.
  except Exception as error:
    remedy = 'copy it again, or save it with the library tokenizers'
    raise ValueError(
      f'tokenizer.json cannot be read ({error}): {_pointer(model) or remedy}'
    ) from error
  # A tokenizer that was last used on batches of one length is saved with these
  # settings.
  found.no_truncation()
  found.no_padding()
  return found


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
  """Trains a byte-fallback BPE on the first `sample_chars` of documents.

  Training is deterministic: the same documents in the same order give the same
  model. Pass `corpus.open('train').stream(seed=0, repeat=False)`, a shuffled
  pass, so that the sample is drawn from the whole corpus.

  Args:
    documents: texts.
    vocab_size: number of ids.
    sample_chars: number of characters to train on.

  Raises:
    ValueError: `vocab_size` is larger than the sample supports, or too small
      for its characters. The message has the possible sizes.
  """
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_lines(documents, sample_chars),
      model_writer=model,
      model_type='bpe',
      vocab_size=vocab_size,
      character_coverage=0.9995,
      byte_fallback=True,
      pad_id=PAD_ID,
      bos_id=BOS_ID,
      eos_id=EOS_ID,
      unk_id=UNK_ID,
      normalization_rule_name='identity',
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      minloglevel=2,
    )
  except RuntimeError as error:
    raise _explained(error, vocab_size) from error
  return Tokenizer(model.getvalue())


def _lines(documents: Iterable[str], sample_chars: int) -> Iterator[str]:
  """Yields the lines of the sample without newlines.

  No piece then contains a newline, so newlines are always encoded as bytes.
  """
  for document in documents:
    for line in document[:sample_chars].splitlines():
      for start in range(0, len(line), _MAX_LINE_CHARS):
        yield line[start : start + _MAX_LINE_CHARS]
    sample_chars -= len(document)
    if sample_chars <= 0:
      return


def _explained(error: RuntimeError, vocab_size: int) -> ValueError:
  """Converts an error of sentencepiece's trainer into one with a remedy."""
  if most := re.search(r'too high .* a value <= (\d+)', str(error)):
    return ValueError(
      f'vocab_size must be at most {most[1]} on this corpus, got {vocab_size}: '
      'lower vocab_size, or give more text'
    )
  least = re.search(r'smaller than required_chars. \d+ vs (\d+)', str(error))
  if least or vocab_size < _NUM_RESERVED:
    return ValueError(
      f'vocab_size must be at least {least[1] if least else _NUM_RESERVED} on '
      'this corpus (its characters, 256 bytes and 4 special ids), got '
      f'{vocab_size}: raise vocab_size'
    )
  return ValueError(
    f'no tokenizer with vocab_size {vocab_size} can be trained on this corpus '
    f'({error}): give more text'
  )
