"""Tokenizers: a sentencepiece model, or a checkpoint's tokenizer.json.

`load` reads either; `train_tokenizer` makes the first, once, on a corpus, and a
run keeps it. Round trips of what is trained here are exact, but for U+2581,
which sentencepiece takes for a space: no normalization, no added space, and
what no piece covers (a newline, a rare character) falls back to its UTF-8
bytes. So are those of a byte-level tokenizer.json.

n tokens of a text, V ids.
"""

import contextlib
import functools
import io
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import sentencepiece
import tokenizers

from train.data.template import ChatTemplate, Piece

# Packing pads with zeros, so that padding is id 0.
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)

_NUM_RESERVED = 4 + 256

# sentencepiece leaves out training lines beyond 4,192 bytes.
_MAX_LINE_CHARS = 1000

TEMPLATE = 'chat_template.jinja'
"""The file of a chat template alone."""

_CONVERTIBLE = (
  *('vocab.txt', 'vocab.json', 'spiece.model', 'sentencepiece.bpe.model'),
  *('tekken.json', '*.tiktoken'),
)
"""Files of tokenizers that transformers converts to a tokenizer.json."""

# What a directory says about its tokenizer, beside the tokenizer itself.
_SETTINGS = (
  *('tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json'),
  *(TEMPLATE, 'chat_template.json', 'generation_config.json'),
)


class Tokenizer:
  """Text to ids and back, by one sentencepiece model.

  Attributes:
    model: the serialized model, the content of a .model file.
    files: other files of its directory, by name.
    vocab_size: number of ids.
    bos_id: id that starts each document.
    eos_id: id that ends each document.
    stop_ids: ids that end an answer: eos_id, and the template's end of a turn.
    tokens: texts of the tokens that a template can name, such as eos_token.
    specials: ids of special and added tokens, by their texts.
    chat_template: of its directory; None where there is none.
  """

  def __init__(self, model: bytes, files: Mapping[str, bytes] | None = None):
    """Loads a serialized model, of any sentencepiece trainer."""
    self.model, self.files = model, dict(files or {})
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    self._num_pieces = self._processor.vocab_size()
    self.bos_id = self._processor.bos_id()
    self.eos_id = self._processor.eos_id()
    settings = _Settings(self.files)
    self.specials = settings.added() | {
      self._processor.id_to_piece(i): i
      for i in range(self._num_pieces)
      if self._processor.is_control(i)
    }
    self.vocab_size = max(
      self._num_pieces, 1 + max(self.specials.values(), default=0)
    )
    names = (('bos_token', self.bos_id), ('eos_token', self.eos_id))
    self.tokens = {
      name: self._processor.id_to_piece(i) for name, i in names if i >= 0
    }
    self.chat_template = settings.chat_template(self.tokens, self.specials)
    self.stop_ids = _stop_ids(
      self.eos_id, settings, self.chat_template, self.specials
    )

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'Tokenizer':
    """Reads a .model file and what is beside it about the tokenizer.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no sentencepiece model, or one without BOS or EOS.
    """
    path = pathlib.Path(path)
    if not path.is_file():
      raise FileNotFoundError(
        f'no tokenizer at {str(path)!r}: give the path of a sentencepiece '
        '.model file, or none to train one on the corpus'
      )
    try:
      with _broken(path.parent):
        tokenizer = cls(path.read_bytes(), _settings_of(path.parent))
    except RuntimeError as error:
      raise ValueError(
        f'{str(path)!r} is not a sentencepiece model: give a .model file, or '
        'none to train one on the corpus'
      ) from error
    if min(tokenizer.bos_id, tokenizer.eos_id) < 0:
      raise ValueError(
        f'the tokenizer {str(path)!r} has BOS {tokenizer.bos_id} and EOS '
        f'{tokenizer.eos_id}, where documents need both (-1 is none): train it '
        'with bos_id and eos_id, or give none to train one on the corpus'
      )
    return tokenizer

  def save(self, directory: str | os.PathLike) -> None:
    """Writes tokenizer.model, and the other files, into a directory."""
    _write(directory, {'tokenizer.model': self.model} | self.files)

  def encode(self, text: str, *, special: bool = False) -> np.ndarray:
    """Ids of text, [n] int32, without BOS and EOS.

    Args:
      text: any.
      special: whether the texts of special tokens in it become their ids.
    """
    if special:
      return self.encode_pieces([(text, False)])[0]
    return np.asarray(self._processor.encode(text), np.int32)

  def encode_pieces(
    self, pieces: Iterable[Piece]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Ids [n] of texts in a row, special tokens too; which are scored [n].

    Each piece is encoded by itself, so that no token is in two of them; a
    space goes with what follows it.
    """
    ids, scored_n = [], []
    for text, scored in _spaces_moved(pieces):
      for part in self._special.split(text):
        if part in self.specials:
          found = [self.specials[part]]
        else:
          # Where a text follows another, its own space is the one added.
          own = self._adds_space and ids
          found = self._processor.encode(part.removeprefix(' ' if own else ''))
        ids += found
        scored_n += len(found) * [scored]
    return np.array(ids, np.int32), np.array(scored_n, bool)

  def decode(self, ids: Sequence[int]) -> str:
    """Text of ids; BOS, EOS and padding stand for nothing."""
    return self._processor.decode(
      [int(i) for i in ids if int(i) < self._num_pieces]
    )

  @functools.cached_property
  def bytes_V(self) -> np.ndarray:
    """UTF-8 bytes of text that each id stands for, [vocab_size] int32."""
    return np.array([self._num_bytes(i) for i in range(self.vocab_size)], 'i4')

  def with_template(self, source: str) -> 'Tokenizer':
    """Returns the same tokenizer with another chat template, a Jinja text."""
    return Tokenizer(self.model, self.files | _template_file(source))

  @functools.cached_property
  def _special(self) -> re.Pattern[str]:
    texts = sorted(self.specials, key=len, reverse=True)
    return re.compile(f'({"|".join(map(re.escape, texts)) or "(?!)"})')

  @functools.cached_property
  def _adds_space(self) -> bool:
    """Whether the model puts a space in front of a text."""
    first, *_ = self._processor.encode('a')
    return self._processor.id_to_piece(first).startswith('\u2581')

  def _num_bytes(self, i: int) -> int:
    if (
      i >= self._num_pieces
      or self._processor.is_control(i)
      or self._processor.is_unknown(i)
    ):
      return 0
    if self._processor.is_byte(i):
      return 1
    return len(self._processor.id_to_piece(i).replace('\u2581', ' ').encode())


class JsonTokenizer:
  """Text to ids and back, by a tokenizer.json of Hugging Face's `tokenizers`.

  Attributes:
    model: the content of tokenizer.json.
    files: other files of its directory, by name.
    vocab_size: one more than the highest id, added tokens included.
    bos_id: id that the tokenizer puts in front of a text; None where none.
    eos_id: id that ends each document.
    stop_ids: ids that end an answer: eos_id, those of generation_config.json,
      and the template's end of a turn.
    tokens: texts of the tokens that a template can name, such as eos_token.
    specials: ids of special and added tokens, by their texts.
    chat_template: of its directory; None where there is none.
  """

  def __init__(self, model: bytes, files: Mapping[str, bytes] | None = None):
    """Loads the content of a tokenizer.json.

    Args:
      model: that content.
      files: others of its directory, by name: what tells BOS and EOS, and the
        template.

    Raises:
      ValueError: one of them is broken, or nothing says what EOS is.
    """
    self.model, self.files = model, dict(files or {})
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
    self.eos_id = self._eos_id()
    self.bos_id = self._bos_id(settings.adds_bos)
    added = self._tokenizer.get_added_tokens_decoder()
    self.specials = {token.content: i for i, token in added.items()}
    self.chat_template = settings.chat_template(self.tokens, self.specials)
    self.stop_ids = _stop_ids(
      self.eos_id, settings, self.chat_template, self.specials
    )
    # No special tokens come from it any more, and a token's offsets are all of
    # its characters, a space in front too.
    self._tokenizer.post_processor = tokenizers.processors.ByteLevel(
      trim_offsets=False
    )

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'JsonTokenizer':
    """Reads a tokenizer.json and what is beside it about the tokenizer.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is broken, or nothing says what EOS is.
    """
    path = pathlib.Path(path)
    if not path.is_file():
      raise FileNotFoundError(
        f'no tokenizer at {str(path)!r}: give the path of a tokenizer.json'
      )
    with _broken(path.parent):
      return cls(path.read_bytes(), _settings_of(path.parent))

  def save(self, directory: str | os.PathLike) -> None:
    """Writes tokenizer.json, and the other files, into a directory."""
    _write(directory, {'tokenizer.json': self.model} | self.files)

  def encode(self, text: str, *, special: bool = False) -> np.ndarray:
    """Ids of text, [n] int32, without BOS and EOS.

    Args:
      text: any.
      special: whether the texts of special tokens in it become their ids.
    """
    tokenizer = self._tokenizer if special else self._plain
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return np.array(ids, np.int32)

  def encode_pieces(
    self, pieces: Iterable[Piece]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Ids [n] of texts in a row, special tokens too; which are scored [n].

    The ids are those of the whole text; a token in two pieces is scored if one
    of them is.
    """
    pieces = list(pieces)
    stops_p = np.cumsum([len(text) for text, _ in pieces])
    # Number of scored characters in front of each.
    before = np.zeros(1 + (stops_p[-1] if len(pieces) else 0), np.int64)
    for (text, scored), stop in zip(pieces, stops_p, strict=True):
      before[stop - len(text) + 1 : stop + 1] = scored
    before = before.cumsum()
    encoding = self._tokenizer.encode(
      ''.join(text for text, _ in pieces), add_special_tokens=False
    )
    starts_n, stops_n = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    return np.array(encoding.ids, np.int32), before[stops_n] > before[starts_n]

  def decode(self, ids: Sequence[int]) -> str:
    """Text of ids; BOS, EOS and padding stand for nothing."""
    return self._tokenizer.decode(
      [int(i) for i in ids], skip_special_tokens=True
    )

  @functools.cached_property
  def bytes_V(self) -> np.ndarray:
    """UTF-8 bytes of text that each id stands for, [vocab_size] int32."""
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

  def with_template(self, source: str) -> 'JsonTokenizer':
    """Returns the same tokenizer with another chat template, a Jinja text."""
    return JsonTokenizer(self.model, self.files | _template_file(source))

  @functools.cached_property
  def _plain(self) -> tokenizers.Tokenizer:
    """Reads the text of a special token as any other text."""
    plain = parsed(self.model)
    plain.encode_special_tokens = True
    return plain

  def _eos_id(self) -> int:
    # BERT's documents end with SEP.
    name = self.tokens.get('eos_token') or self.tokens.get('sep_token')
    if name is None:
      raise ValueError(
        'nothing says what ends a document: give eos_token in '
        'tokenizer_config.json, or eos_token_id in config.json'
      )
    return self._id(name)

  def _bos_id(self, adds_bos: bool | None) -> int | None:
    """What a text begins with: as it is asked for, or as it is seen."""
    bos, eos = (self.tokens.get(k) for k in ('bos_token', 'eos_token'))
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
"""What a run may have; both have the same attributes and methods."""


def load(path: str | os.PathLike) -> AnyTokenizer:
  """Reads a tokenizer: of a .model file, or of a directory.

  A directory is a run, or a checkpoint of transformers: its tokenizer.json, or
  else its tokenizer.model.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is broken.
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
  """What to do with a directory that has neither kind of tokenizer."""
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


class _Settings:
  """What the files of a directory say about its tokenizer."""

  def __init__(self, files: Mapping[str, bytes]):
    self._files = files
    self._config = self._json('tokenizer_config.json')
    self._generation = self._json('generation_config.json')
    self.adds_bos: bool | None = self._config.get('add_bos_token')

  def _json(self, name: str) -> dict[str, Any]:
    return _object(self._files.get(name, b'{}'), name)

  def tokens(self, token_of_id: Callable[[int], str | None]) -> dict[str, str]:
    """Texts of special tokens by name; those that are set."""
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
    return {k: text for k, text in texts.items() if isinstance(text, str)}

  def added(self) -> dict[str, int]:
    """Ids of the tokens that were added to the model's."""
    listed = self._config.get('added_tokens_decoder', {})
    return self._json('added_tokens.json') | {
      token['content']: int(i) for i, token in listed.items()
    }

  def stop_ids(self) -> list[int]:
    """Ids that end an answer, of generation_config.json."""
    return _ids(self._generation.get('eos_token_id'))

  def chat_template(
    self, tokens: Mapping[str, str], specials: Iterable[str]
  ) -> ChatTemplate | None:
    """The template, of its own file or of tokenizer_config.json."""
    text = self._files.get(TEMPLATE)
    source = text.decode() if text is not None else None
    for name in ('chat_template.json', 'tokenizer_config.json'):
      if source is None:
        source = self._json(name).get('chat_template')
    if isinstance(source, list):
      named = {entry['name']: entry['template'] for entry in source}
      source = named.get('default')
    if source is None:
      return None
    return ChatTemplate(source, tokens, specials)


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
  """Files of settings, by name; what config.json adds is moved into them.

  A run has a config.json of its own, so a checkpoint's cannot be kept there.
  """
  files = {
    name: (directory / name).read_bytes()
    for name in _SETTINGS
    if (directory / name).is_file()
  }
  config, name = directory / 'config.json', 'generation_config.json'
  # That of a run, which may be garbage, says nothing of a tokenizer.
  if config.is_file() and not (directory / 'checkpoints').is_dir():
    model = _object(config.read_bytes(), 'config.json')
    ends = {
      key: model[key]
      for key in ('bos_token_id', 'eos_token_id')
      if model.get(key) is not None
    }
    generation = _object(files.get(name, b'{}'), name)
    if ends.keys() - generation.keys():
      files[name] = json.dumps(ends | generation, indent=2).encode()
  return files


def _object(content: bytes, name: str) -> dict[str, Any]:
  try:
    found = json.loads(content)
  except ValueError as error:
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
  """Of a field that has one, several or none.

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
  end = None if template is None else specials.get(template.end_of_turn)
  ids = [eos_id, *settings.stop_ids(), *([] if end is None else [end])]
  return tuple(dict.fromkeys(ids))


def _spaces_moved(pieces: Iterable[Piece]) -> Iterator[Piece]:
  """A space at the end of a piece begins the next one."""
  space, scored = '', False
  for text, scored in pieces:
    text = space + text
    space = ' ' if text.endswith(' ') else ''
    yield text.removesuffix(' '), scored
  yield space, scored


def _template_file(source: str) -> dict[str, bytes]:
  """Comes before what other files say."""
  return {TEMPLATE: source.encode()}


def _write(directory: str | os.PathLike, files: Mapping[str, bytes]) -> None:
  for name, content in files.items():
    (pathlib.Path(directory) / name).write_bytes(content)


def parsed(model: bytes) -> tokenizers.Tokenizer:
  """Returns the library's tokenizer of a tokenizer.json, which cuts nothing."""
  try:
    found = tokenizers.Tokenizer.from_str(model.decode())
  # `tokenizers` raises nothing more special.
  except Exception as error:
    raise ValueError(
      f'tokenizer.json cannot be read ({error}): copy it again, or save it '
      'with the library tokenizers'
    ) from error
  # Saved with a tokenizer that was last used on batches of one length.
  found.no_truncation()
  found.no_padding()
  return found


def _num_bytes_of(
  decoder: Any, model: Mapping[str, Any]
) -> Callable[[str], int]:
  """How many bytes of text a token stands for, from token to number."""
  if '"ByteLevel"' in json.dumps(decoder):
    return len  # a character a byte
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

  Deterministic: the same documents in the same order give the same model. Pass
  `corpus.open('train').stream(seed=0, repeat=False)`, a shuffled pass, so that
  the sample is drawn from the whole corpus.

  Raises:
    ValueError: `vocab_size` is larger than the sample supports, or too small
      for its characters; the message says which sizes are possible.
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
  """Lines of the sample: newlines are left to the bytes, so none is merged."""
  for document in documents:
    for line in document[:sample_chars].splitlines():
      for start in range(0, len(line), _MAX_LINE_CHARS):
        yield line[start : start + _MAX_LINE_CHARS]
    sample_chars -= len(document)
    if sample_chars <= 0:
      return


def _explained(error: RuntimeError, vocab_size: int) -> ValueError:
  """What a failed training means to the user."""
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
