"""A sentencepiece tokenizer: trained once on the corpus, kept with the run.

Round trips are exact: no normalization, no added space, and what no piece
covers (a newline, a rare character) falls back to its UTF-8 bytes.
"""

import functools
import io
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

# The part of a model that is not its corpus: pad, bos, eos, unk, 256 bytes.
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)

# Longer lines are cut before training: sentencepiece skips lines beyond this.
_MAX_LINE_CHARS = 1000


class Tokenizer:
  """Text to ids and back, by one sentencepiece model.

  Attributes:
    model: the serialized model, the content of a .model file.
    vocab_size: number of ids.
    bos_id: id that starts each document.
    eos_id: id that ends each document.
    bytes_V: [vocab_size] int32, UTF-8 bytes of text that each id stands for.
  """

  def __init__(self, model: bytes):
    """Loads a serialized model, that of any sentencepiece trainer."""
    self.model = model
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    self.vocab_size = self._processor.vocab_size()
    self.bos_id = self._processor.bos_id()
    self.eos_id = self._processor.eos_id()

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'Tokenizer':
    """Reads a .model file; ValueError where it cannot serve."""
    raise NotImplementedError

  def save(self, path: str | os.PathLike) -> None:
    """Writes the model to path (of a run: tokenizer.model)."""
    raise NotImplementedError

  def encode(self, text: str) -> np.ndarray:
    """Ids of text, [n] int32, without BOS and EOS."""
    raise NotImplementedError

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids; control ids (BOS, EOS, padding) stand for nothing."""
    raise NotImplementedError


def train_tokenizer(
  documents: Iterable[str], *, vocab_size: int, sample_chars: int = 5_000_000
) -> Tokenizer:
  """Trains a byte-fallback BPE on the first `sample_chars` of documents.

  Deterministic: the same documents in the same order give the same bytes. Pass
  `corpus.open('train').stream(seed=0, repeat=False)`, a shuffled pass, so that
  the sample is drawn from the whole corpus.

  Raises:
    ValueError: `vocab_size` is larger than the sample supports, or too small
      for its characters; the message says which sizes are possible.
  """
  raise NotImplementedError
