"""A sentencepiece tokenizer: trained once on the corpus, kept with the run.

Round trips are exact, but for U+2581, which sentencepiece takes for a space:
no normalization, no added space, and what no piece covers (a newline, a rare
character) falls back to its UTF-8 bytes.
"""

import functools
import io
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece

# Packing pads with zeros, so that padding is id 0.
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)

_NUM_RESERVED = 4 + 256

# sentencepiece leaves out training lines beyond 4,192 bytes.
_MAX_LINE_CHARS = 1000


class Tokenizer:
  """Text to ids and back, by one sentencepiece model.

  Attributes:
    model: the serialized model, the content of a .model file.
    vocab_size: number of ids.
    bos_id: id that starts each document.
    eos_id: id that ends each document.
  """

  def __init__(self, model: bytes):
    """Loads a serialized model, of any sentencepiece trainer."""
    self.model = model
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    self.vocab_size = self._processor.vocab_size()
    self.bos_id = self._processor.bos_id()
    self.eos_id = self._processor.eos_id()

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'Tokenizer':
    """Reads a .model file.

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
      tokenizer = cls(path.read_bytes())
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

  def save(self, path: str | os.PathLike) -> None:
    """Writes the model to path (of a run: tokenizer.model)."""
    pathlib.Path(path).write_bytes(self.model)

  def encode(self, text: str) -> np.ndarray:
    """Ids of text, [n] int32, without BOS and EOS."""
    return np.asarray(self._processor.encode(text), np.int32)

  def decode(self, ids: Sequence[int]) -> str:
    """Text of ids; BOS, EOS and padding stand for nothing."""
    return self._processor.decode([int(i) for i in ids])

  @functools.cached_property
  def bytes_V(self) -> np.ndarray:
    """UTF-8 bytes of text that each id stands for, [vocab_size] int32."""
    return np.array([self._num_bytes(i) for i in range(self.vocab_size)], 'i4')

  def _num_bytes(self, i: int) -> int:
    if self._processor.is_control(i) or self._processor.is_unknown(i):
      return 0
    if self._processor.is_byte(i):
      return 1
    return len(self._processor.id_to_piece(i).replace('\u2581', ' ').encode())


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
