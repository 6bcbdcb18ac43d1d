"""Chats to examples: what a model reads, and which tokens of it are scored.

n tokens of an example.
"""

import dataclasses
import functools
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import grain
import numpy as np

from train.data.corpus import (
  Indexed,
  Split,
  check_holdout,
  dialogues,
  in_files,
  in_split,
)
from train.data.records import Record, parse_object
from train.data.template import ChatTemplate, Message, Piece
from train.data.text_files import index_records
from train.data.tokenizer import AnyTokenizer

Score = Literal['answers', 'all']

PLAIN = (
  '{{ bos_token }}{% for message in messages %}'
  "{% if message['role'] == 'assistant' %}"
  "### Assistant: {{ message['content'] | trim }}{{ eos_token }}"
  "{% elif message['role'] == 'system' %}{{ message['content'] | trim }}"
  "{% else %}### Human: {{ message['content'] | trim }}{% endif %}"
  "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}"
  '{% endfor %}{% if add_generation_prompt %}### Assistant:{% endif %}'
)
"""The template where a tokenizer has none: that of openassistant-guanaco.

With a line for each message and EOS behind each answer.
"""

_RULE = (
  'a line must be a JSON object of "messages" (a list of objects of "role" and '
  '"content"), "conversations" (of "from" and "value"), "prompt" and '
  '"completion", or "text"'
)

_ROLES = {'human': 'user', 'gpt': 'assistant', 'chatgpt': 'assistant'}

_GUANACO = re.compile(r'### (Human|Assistant):')


class Chat(NamedTuple):
  """A conversation; a template makes text of it."""

  messages: tuple[Message, ...]
  scored: tuple[bool, ...]  # which of them are answers


class Prose(NamedTuple):
  """Text as it stands, between BOS and EOS."""

  pieces: tuple[Piece, ...]


class Example(NamedTuple):
  """What a model reads."""

  ids_n: np.ndarray  # int32
  scored_n: np.ndarray  # bool; the first one is no target
  bytes_n: np.ndarray  # int32, UTF-8 bytes of text that it stands for


class Source(Protocol):
  """A random-access source that can say where an item is from."""

  def __len__(self) -> int: ...  # noqa: D105

  def __getitem__(self, i: int) -> Chat | Prose: ...  # noqa: D105

  def place(self, i: int) -> str:
    """Where item i is, in words."""
    ...


@dataclasses.dataclass(frozen=True)
class Dialogues:
  """The chats of one split."""

  source: Source
  """What is read."""

  template: str | None = None
  """As in `Chats`."""

  score: Score = 'answers'
  """As in `Chats`."""

  def stream(self, **order) -> grain.IterDataset[str]:
    """As in `Documents`: text by the plain template, without special tokens."""
    return Indexed(self.source, _plain_text).stream(**order)

  def examples(
    self, tokenizer: AnyTokenizer, **order
  ) -> grain.IterDataset[Example]:
    """Examples in an order fixed by a seed.

    Args:
      tokenizer: of the run.
      **order: as in `Documents.stream`.
    """
    return Indexed(self.source, self.encoder(tokenizer)).stream(**order)

  def check(self, tokenizer: AnyTokenizer) -> None:
    """Renders every chat.

    Raises:
      ValueError: the template refuses a chat, or rewrites an answer of it; the
        message names file and line.
    """
    template = template_of(tokenizer, self.template)
    for i in range(len(self.source)):
      item = self.source[i]
      if isinstance(item, Chat):
        try:
          template.pieces(item.messages, item.scored)
        except ValueError as error:
          raise ValueError(f'{self.source.place(i)}: {error}') from error

  def templated(self, tokenizer: AnyTokenizer) -> AnyTokenizer:
    """Returns the tokenizer with the template that these chats have.

    Saved with a run, it is the one that the model is asked by.
    """
    template = template_of(tokenizer, self.template)
    if template is tokenizer.chat_template:
      return tokenizer
    return tokenizer.with_template(template.source)

  def encoder(self, tokenizer: AnyTokenizer) -> Callable[..., Example]:
    """Returns what makes an example of an item of the source."""
    return functools.partial(
      _encoded,
      tokenizer=tokenizer,
      template=template_of(tokenizer, self.template),
      score=self.score,
    )


@dataclasses.dataclass(frozen=True)
class Chats:
  """Chats of one's own, a JSON object a line.

  A line is one of

    {"messages": [{"role": "user", "content": "..."}, ...]}
    {"conversations": [{"from": "human", "value": "..."}, ...]}  as ShareGPT's
    {"prompt": "...", "completion": "..."}  or lists of messages
    {"text": "### Human: ...### Assistant: ..."}  as openassistant-guanaco's
    {"text": "..."}

  Messages are rendered by the checkpoint's chat template. Scored are the
  content of the assistant's messages and the token that the template puts
  behind it, so that a model learns to stop; of prompt and completion, only
  those of the completion. A prompt and a completion that are texts, and other
  texts, are taken as they stand, between BOS and EOS; of texts all is scored. A
  line without an answer is left out.
  """

  train: str
  """Path or glob ('chats/*.jsonl') of the training files."""

  validation: str | None = None
  """Path or glob of the validation files; None holds out `holdout`."""

  holdout: float = 0.05
  """Share of the training lines kept for validation, chosen by a hash of their
  content, where `validation` is None."""

  score: Score = 'answers'
  """What is learned: the answers, or all that a model reads."""

  template: str | None = None
  """None is the checkpoint's template, or the plain one ('### Human: ',
  '### Assistant: ') where it has none; 'plain' is that one; or the path of a
  Jinja file."""

  def open(self, split: Split) -> Dialogues:
    """Chats of a split.

    Raises:
      FileNotFoundError: no file matches, or `template` is not there.
      ValueError: a line is none of the above (the message names file and line),
        or no line has an answer.
    """
    _source(self.template)
    parse = functools.partial(parse_record, score=self.score)
    texts = in_files(
      split,
      self.train,
      self.validation,
      self.holdout,
      lambda path: index_records(path, parse, _RULE),
    )
    return Dialogues(texts, self.template, self.score)


@dataclasses.dataclass(frozen=True)
class ChitchatAnswers:
  """The dialogues of `Chitchat` as chats: every second turn is an answer."""

  holdout: float = 0.05
  """Share of the dialogues that is kept for validation: the same ones."""

  turns: int = 8
  """Most turns of a chat: a longer dialogue is several. Most of 8 fit 256
  tokens."""

  score: Score = 'answers'
  """As in `Chats`."""

  template: str | None = None
  """As in `Chats`."""

  def open(self, split: Split) -> Dialogues:
    """Chats of a split; ValueError if the package is not installed."""
    check_holdout(self.holdout)
    if self.turns < 2 or self.turns % 2:
      raise ValueError(
        f'turns must be even and at least 2, got {self.turns}: a chat begins '
        'with a question'
      )
    _source(self.template)
    found = [
      (name, _alternating(turns[start : start + self.turns]))
      for name, text in dialogues()
      if in_split(split, zlib.crc32(name.encode()), self.holdout)
      for turns in [text.split('\n')]
      for start in range(0, len(turns), self.turns)
    ]
    named = _Named([pair for pair in found if any(pair[1].scored)])
    return Dialogues(named, self.template, self.score)


class _Named:
  """Chats in memory, each with a name."""

  def __init__(self, chats: Sequence[tuple[str, Chat]]):
    self._chats = chats

  def __len__(self) -> int:
    return len(self._chats)

  def __getitem__(self, i: int) -> Chat:
    return self._chats[i][1]

  def place(self, i: int) -> str:
    return f'dialogue {self._chats[i][0]}'


def template_of(
  tokenizer: AnyTokenizer, template: str | None = None
) -> ChatTemplate:
  """Returns the template of a run.

  Args:
    tokenizer: of the run.
    template: as in `Chats`.

  Raises:
    FileNotFoundError: it is the path of no file.
    ValueError: it is no Jinja template.
  """
  source = _source(template)
  if source is None and tokenizer.chat_template is not None:
    return tokenizer.chat_template
  return ChatTemplate(
    PLAIN if source is None else source,
    tokenizer.tokens,
    tokenizer.specials,
    origin='the chat template' if template is None else repr(template),
  )


def parse_line(line: bytes, score: Score = 'answers') -> Chat | Prose | None:
  """Returns what a line of JSON holds; None where nothing of it is scored.

  Raises:
    ValueError, KeyError, TypeError, AttributeError: it is not as in `Chats`.

  >>> parse_line(b'{"prompt": "1 + 1 =", "completion": " 2"}')
  Prose(pieces=(('1 + 1 =', False), (' 2', True)))
  """
  return parse_record(parse_object(line), score)


def parse_record(
  record: Record, score: Score = 'answers'
) -> Chat | Prose | None:
  """As `parse_line`, of a record."""
  if 'messages' in record:
    item = _chat([], record['messages'])
  elif 'conversations' in record:
    item = _chat([], record['conversations'])
  elif 'text' in record:
    item = _of_text(record['text'])
  else:
    item = _of_prompt(record['prompt'], record['completion'])
  if isinstance(item, Prose):
    texts = item.pieces
  else:
    contents = [message['content'] for message in item.messages]
    texts = zip(contents, item.scored, strict=True)
  learned = any(
    text.strip() and (scored or score == 'all') for text, scored in texts
  )
  return item if learned else None


def _of_text(text: str) -> Chat | Prose:
  if not _GUANACO.match(text):
    return Prose(((_string(text, 'text'), True),))
  # The text before the first mark is empty.
  _, *parts = _GUANACO.split(text)
  roles = {'Human': 'user', 'Assistant': 'assistant'}
  return _chat(
    [],
    [
      {'role': roles[name], 'content': content.strip()}
      for name, content in zip(parts[::2], parts[1::2], strict=True)
    ],
  )


def _of_prompt(prompt: Any, completion: Any) -> Chat | Prose:
  if isinstance(prompt, list) and isinstance(completion, list):
    return _chat(prompt, completion)
  return Prose(
    (
      (_string(prompt, 'prompt'), False),
      (_string(completion, 'completion'), True),
    )
  )


def _chat(context: list[Any], messages: list[Any]) -> Chat:
  """Messages of which those of `context` are not scored."""
  if not isinstance(messages, list):
    raise TypeError(f'messages must be a list, got {type(messages).__name__}')
  known = tuple(map(_message, [*context, *messages]))
  return Chat(
    known,
    tuple(
      i >= len(context) and message['role'] == 'assistant'
      for i, message in enumerate(known)
    ),
  )


def _message(message: dict[str, Any]) -> Message:
  """With 'role' and 'content', whichever names it had."""
  if 'from' in message and 'role' not in message:
    role = message['from']
    message = {
      'role': _ROLES.get(role, role),
      'content': message['value'],
    }
  for name in ('role', 'content'):
    _string(message[name], name)
  return message


def _string(value: Any, name: str) -> str:
  if not isinstance(value, str):
    raise TypeError(f'"{name}" must be a string, got {value!r:.40}')
  return value


def _alternating(turns: Sequence[str]) -> Chat:
  roles = ('user', 'assistant')
  return _chat(
    [],
    [{'role': roles[i % 2], 'content': turn} for i, turn in enumerate(turns)],
  )


def _source(template: str | None) -> str | None:
  """The Jinja text that is named; None where that is the tokenizer's."""
  if template is None:
    return None
  if template == 'plain':
    return PLAIN
  path = pathlib.Path(os.path.expanduser(template))
  if not path.is_file():
    raise FileNotFoundError(
      f"no chat template at {template!r}: give 'plain' or the path of a Jinja "
      "file, or leave it out for the checkpoint's own"
    )
  return path.read_text('utf-8')


@functools.cache
def _plain() -> ChatTemplate:
  return ChatTemplate(PLAIN, {}, ())


def _plain_text(item: Chat | Prose) -> str:
  if isinstance(item, Chat):
    return _plain().render(item.messages)
  return ''.join(text for text, _ in item.pieces)


def _encoded(
  item: Chat | Prose,
  *,
  tokenizer: AnyTokenizer,
  template: ChatTemplate,
  score: Score,
) -> Example:
  """Ids of an item, and which of them are scored."""
  if isinstance(item, Chat):
    pieces = template.pieces(item.messages, item.scored)
    ids_n, scored_n = tokenizer.encode_pieces(pieces)
  else:
    ids_n, scored_n = _ended(*tokenizer.encode_pieces(item.pieces), tokenizer)
  if score == 'all':
    scored_n = np.ones_like(scored_n)
  return Example(ids_n, scored_n, tokenizer.bytes_V[ids_n])


def _ended(
  ids_n: np.ndarray, scored_n: np.ndarray, tokenizer: AnyTokenizer
) -> tuple[np.ndarray, np.ndarray]:
  """With BOS and EOS, where the text does not have them already."""
  bos, eos = tokenizer.bos_id, tokenizer.eos_id
  if bos is not None and bos not in ids_n[:1]:
    ids_n, scored_n = np.r_[bos, ids_n], np.r_[False, scored_n]
  if not np.isin(ids_n[-1:], tokenizer.stop_ids).any():
    ids_n, scored_n = np.r_[ids_n, eos], np.r_[scored_n, True]
  return ids_n.astype(np.int32), scored_n.astype(bool)
