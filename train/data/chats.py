"""Chats to examples: what a model reads, and which tokens of it are scored.

`train.data.conversation` reads the lines, `train.data.template` makes text of
them.

n tokens of an example.
"""

import collections
import dataclasses
import datetime
import functools
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from train.data.conversation import (
  RULE,
  Chat,
  Prose,
  Score,
  keys_of_messages,
  parse_record,
  unread_keys,
)
from train.data.corpus import (
  Indexed,
  Split,
  check_holdout,
  dialogues,
  in_files,
  in_split,
)
from train.data.records import Record, parse_json, parse_object
from train.data.template import ChatTemplate, Piece, with_defaults, with_end
from train.data.text_files import index_records
from train.data.tokenizer import AnyTokenizer

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

# Keys of messages that identify them, and change nothing that is learned.
_IDENTITIES = ('id', 'index', 'name', 'tool_call_id')

# Characters of a text that a warning quotes, and kinds that it lists.
_SHOWN = 40
_LISTED = 5


class Example(NamedTuple):
  """What a model reads."""

  ids_n: np.ndarray  # int32
  scored_n: np.ndarray  # bool; the first one is no target
  bytes_n: np.ndarray  # int32, UTF-8 bytes of text that it stands for


class Source(Protocol):
  """A random-access source that has the place of each item."""

  def __len__(self) -> int: ...  # noqa: D105

  def __getitem__(self, i: int) -> Chat | Prose: ...  # noqa: D105

  def place(self, i: int) -> str:
    """Where item i is, in words."""
    ...


@dataclasses.dataclass
class Tally:
  """Counts of places, with the first of each kind."""

  counts: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )
  first: dict[str, str] = dataclasses.field(default_factory=dict)

  def add(self, kind: str, place: str) -> None:
    """Counts a place."""
    self.counts[kind] += 1
    self.first.setdefault(kind, place)

  def __str__(self) -> str:
    """Lists the kinds.

    >>> tally = Tally()
    >>> tally.add('id', 'a.jsonl, line 2')
    >>> print(tally)
    id (1, the first: a.jsonl, line 2)
    """
    texts = [
      f'{kind} ({count:,}, the first: {self.first[kind]})'
      for kind, count in self.counts.most_common(_LISTED)
    ]
    more = len(self.counts) - len(texts)
    return '; '.join([*texts, f'{more:,} more'] if more else texts)


@dataclasses.dataclass
class Reading:
  """Counts of the lines and keys of a corpus that are not read."""

  num_left_out: int = 0
  """Lines, or dialogues, without an answer."""
  keys: Tally = dataclasses.field(default_factory=Tally)
  """Keys of lines that are not read."""
  message_keys: Tally = dataclasses.field(default_factory=Tally)
  """Keys of messages that only a template may read."""

  def see(self, record: Record, item: Chat | Prose | None, place: str) -> None:
    """Counts the keys of a record that are not read, and a record left out."""
    self.num_left_out += item is None
    for name in unread_keys(record):
      self.keys.add(name, place)
    if isinstance(item, Chat):
      for name in set(keys_of_messages(item)).difference(_IDENTITIES):
        self.message_keys.add(name, place)


@dataclasses.dataclass(frozen=True)
class Dialogues:
  """The chats of one split."""

  source: Source
  """The items."""

  template: str | None = None
  """As in `Chats`."""

  score: Score = 'answers'
  """As in `Chats`."""

  template_variables: tuple[str, ...] = ()
  """As in `Chats`."""

  reading: Reading = dataclasses.field(default_factory=Reading)
  """Counts of the lines and keys that are not read."""

  _notes: dict[tuple[str, str], list[str]] = dataclasses.field(
    default_factory=dict, repr=False, compare=False
  )

  def __len__(self) -> int:
    """Number of chats."""
    return len(self.source)

  def stream(self, **order: Any) -> grain.IterDataset[str]:
    """As in `Documents`: text by the plain template, without special tokens."""
    return Indexed(self.source, _plain_text).stream(**order)

  def examples(
    self, tokenizer: AnyTokenizer, **order: Any
  ) -> grain.IterDataset[Example]:
    """Examples in an order fixed by a seed.

    Args:
      tokenizer: of the run.
      **order: as in `Documents.stream`.
    """
    return Indexed(self.source, self.encoder(tokenizer)).stream(**order)

  def check(self, tokenizer: AnyTokenizer) -> list[str]:
    """Renders every chat, once for each template.

    Returns:
      Warnings about data that the model would not learn as they mean it.

    Raises:
      ValueError: the template refuses a chat, or rewrites an answer of it; the
        message names file and line.
    """
    template = self._template_of(tokenizer)
    reads_clock = 'strftime_now' in template.reads
    key = (template.source, str(template.clock) if reads_clock else '')
    if key not in self._notes:
      self._notes[key] = self._warnings(template)
    return self._notes[key]

  def templated(
    self, tokenizer: AnyTokenizer, clock: datetime.datetime | None = None
  ) -> AnyTokenizer:
    """Returns the tokenizer with the template that these chats have.

    It is saved with a run, so that training, sampling and an export have the
    same template, with the same values of its variables. If it puts no special
    token behind an answer, EOS is added to it.

    Args:
      tokenizer: of a checkpoint, or trained on the chats.
      clock: the time of the run; None is the time of this call.

    Raises:
      FileNotFoundError: `template` is not there.
      ValueError: it is not a Jinja template, or does not read a variable.
    """
    template = self._build(tokenizer)
    own = tokenizer.chat_template
    is_own = own is not None and own.source == template.source
    if is_own and 'strftime_now' not in template.reads:
      return tokenizer
    clock = datetime.datetime.now() if clock is None else clock
    return tokenizer.with_template(None if is_own else template.source, clock)

  def encoder(self, tokenizer: AnyTokenizer) -> Callable[..., Example]:
    """Returns what makes an example of an item of the source."""
    return functools.partial(
      _encoded,
      tokenizer=tokenizer,
      template=self._template_of(tokenizer),
      score=self.score,
    )

  def _template_of(self, tokenizer: AnyTokenizer) -> ChatTemplate:
    """Returns the template of the run, or the one that a run would have."""
    own = tokenizer.chat_template
    if own is not None and own.is_settled:
      return own
    return self._build(tokenizer)

  def _build(self, tokenizer: AnyTokenizer) -> ChatTemplate:
    """Returns the named template, its variables set, with an end of a turn."""
    template = template_of(tokenizer, self.template)
    variables = variables_of(self.template_variables)
    if variables:
      template.check_defaults(variables)
      template = _replaced(
        template, with_defaults(template.source, variables), tokenizer
      )
    eos = {i: x for x, i in tokenizer.specials.items()}.get(tokenizer.eos_id)
    if not template.has_end and eos is not None:
      template = _replaced(template, with_end(template.source, eos), tokenizer)
    return template

  def _warnings(self, template: ChatTemplate) -> list[str]:
    found = {kind: Tally() for kind in _WARNINGS}
    for i in range(len(self.source)):
      item = self.source[i]
      if isinstance(item, Chat):
        place = self.source.place(i)
        try:
          _tally(item, template, place, self.score, found)
        except ValueError as error:
          raise ValueError(f'{place}: {error}') from error
    found['keys'] = self.reading.keys
    message_keys = self.reading.message_keys
    for name, count in message_keys.counts.items():
      if not template.mentions(name):
        found['message keys'].counts[name] = count
        found['message keys'].first[name] = message_keys.first[name]
    texts = [
      text.format(tally)
      for kind, text in _WARNINGS.items()
      for tally in [found[kind]]
      if tally.counts
    ]
    if template.added_end is None:
      return texts
    return [
      'the chat template puts no special token behind an answer, after which '
      f'the model would never stop: {template.added_end!r} is added there and '
      'scored',
      *texts,
    ]


_WARNINGS = {
  'keys': 'keys of lines that are not read: {}',
  'message keys': 'keys of messages that the chat template does not read: {}',
  'messages': 'messages that the chat template leaves out: {}',
  'contents': 'answers of which the chat template leaves out a part: {}',
  'prompts': (
    'answers that begin elsewhere in training than in sampling, where the '
    'model has to continue a prompt that it did not learn: {}; make each '
    'answer the last message of its line, set --corpus.score last, or set the '
    'variables of the template by --corpus.template-variables'
  ),
  'inside': (
    'answers with the text of a token in them that stops the model: {}; remove '
    'it there'
  ),
  'ends': (
    'answers that end with another token than those that stop the model '
    '(None is no token): {}; set --corpus.score last, or name another '
    '--corpus.template'
  ),
}


def _tally(
  item: Chat,
  template: ChatTemplate,
  place: str,
  score: Score,
  found: Mapping[str, Tally],
) -> None:
  """Counts the losses of a chat in a template, by the keys of `_WARNINGS`."""
  flags = item.scored
  if score == 'all':
    flags = [x['role'] == 'assistant' for x in item.messages]
  text, answers = template.answers(item.messages, flags, item.context)
  for message in item.messages:
    is_said = message['content'].strip() in text
    if message['role'] != 'assistant' and not is_said:
      found['messages'].add(f'role {message["role"]}', place)
  for answer in answers:
    content = item.messages[answer.message]['content']
    for end in template.ends:
      if end in content:
        found['inside'].add(end, place)
    if not answer.is_whole:
      found['contents'].add(f'message {answer.message + 1}', place)
    if answer.end not in template.ends:
      found['ends'].add(str(answer.end), place)
    if answer.prompt is not None:
      before = text[max(0, answer.start - _SHOWN) : answer.start]
      kind = f'after {before!r}, not after {answer.prompt[-_SHOWN:]!r}'
      found['prompts'].add(kind, place)


def _replaced(
  template: ChatTemplate, source: str, tokenizer: AnyTokenizer
) -> ChatTemplate:
  """Returns a template with another source."""
  return ChatTemplate(
    source, tokenizer.tokens, tokenizer.specials, clock=template.clock
  )


@dataclasses.dataclass(frozen=True)
class Chats:
  """Chats of one's own, in files of records.

  A record is one of

    {"messages": [{"role": "user", "content": "..."}, ...]}
    {"conversations": [{"from": "human", "value": "..."}, ...]}  as ShareGPT's
    {"prompt": "...", "completion": "..."}  or lists of messages
    {"instruction": "...", "input": "...", "output": "..."}  as Alpaca's
    {"text": "### Human: ...### Assistant: ..."}  as openassistant-guanaco's
    {"text": "..."}

  Files are JSON lines, a JSON list, CSV, TSV, Parquet or Arrow, by their ending
  (.json, .csv, .tsv, .parquet, .arrow; others are JSON lines), each with .gz,
  .bz2 or .xz behind it if it is compressed. Of files that are not plain JSON
  lines there is a copy in the directory for temporary files ($TMPDIR) while the
  program runs.

  Messages are rendered by the checkpoint's chat template. The assistant's
  messages are scored, from the end of the generation prompt to the special
  token that the template puts behind them, so that a model learns to stop; of
  prompt and completion, only those of the completion. Alpaca's instruction and
  input are a user's message, and its output is the answer. A prompt and a
  completion that are texts, and other texts, are taken as they stand, between
  BOS and EOS; of texts all is scored. A line without an answer is left out.

  Names of roles are those of ShareGPT, OpenAI and others, in any case. "system"
  and "tools" may be keys of the record; tool calls of the assistant are scored.
  "weight": 0 or "train": false excludes a message, or a record, from the loss.
  A key of preference data is an error.
  """

  train: str
  """Path or glob ('chats/*.jsonl') of the training files."""

  validation: str | None = None
  """Path or glob of the validation files; None holds out `holdout`."""

  holdout: float = 0.05
  """Share of the training lines kept for validation, chosen by a hash of their
  content, where `validation` is None."""

  score: Score = 'answers'
  """The scored tokens: of all answers, of the last answer of a line, or all."""

  template: str | None = None
  """None is the checkpoint's template, or the plain one ('### Human: ',
  '### Assistant: ') where it has none; 'plain' is that one; or the path of a
  Jinja file."""

  template_variables: tuple[str, ...] = ()
  """Variables of the template, NAME=VALUE each, such as enable_thinking=false.
  A value is JSON, or else a text. They are saved with the run, for sampling and
  an export."""

  def open(self, split: Split) -> Dialogues:
    """Chats of a split.

    Raises:
      FileNotFoundError: no file matches.
      ImportError: Parquet needs the package `datasets`.
      ValueError: a line is none of the above (the message names file and line),
        or no line has an answer.
    """
    variables_of(self.template_variables)
    parse = functools.partial(parse_record, score=self.score)
    reading = Reading()
    texts = in_files(
      split,
      self.train,
      self.validation,
      self.holdout,
      lambda path: index_records(path, parse, RULE, reading.see),
    )
    return Dialogues(
      texts, self.template, self.score, self.template_variables, reading
    )


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

  template_variables: tuple[str, ...] = ()
  """As in `Chats`."""

  def open(self, split: Split) -> Dialogues:
    """Chats of a split; ValueError if the package is not installed."""
    check_holdout(self.holdout)
    if self.turns < 2 or self.turns % 2:
      raise ValueError(
        f'turns must be even and at least 2, got {self.turns}: a chat begins '
        'with a question'
      )
    variables_of(self.template_variables)
    found = [
      (name, _alternating(turns[start : start + self.turns], self.score))
      for name, text in dialogues()
      if in_split(split, zlib.crc32(name.encode()), self.holdout)
      for turns in [text.split('\n')]
      for start in range(0, len(turns), self.turns)
    ]
    kept = [(name, chat) for name, chat in found if isinstance(chat, Chat)]
    return Dialogues(
      _Named(kept),
      self.template,
      self.score,
      self.template_variables,
      Reading(num_left_out=len(found) - len(kept)),
    )


def has_answers(corpus: Any) -> bool:
  """Whether a corpus of a config has chats."""
  return isinstance(corpus, Chats | ChitchatAnswers)


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
  """Returns the template that is named, as it is in its file.

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


def variables_of(assignments: Sequence[str]) -> dict[str, Any]:
  """Returns the variables of a template by their names.

  Raises:
    ValueError: one of them is not NAME=VALUE.

  >>> variables_of(['enable_thinking=false', 'effort=high'])
  {'enable_thinking': False, 'effort': 'high'}
  """
  found = {}
  for text in assignments:
    name, mark, value = text.partition('=')
    if not mark or not re.fullmatch(r'[A-Za-z_]\w*', name):
      raise ValueError(
        'a variable of a template must be NAME=VALUE, such as '
        f'enable_thinking=false, got {text!r}'
      )
    try:
      found[name] = parse_json(value)
    except ValueError:
      found[name] = value
  return found


def parse_line(line: bytes, score: Score = 'answers') -> Chat | Prose | None:
  """Returns the conversation or text of a JSON line; None if none is scored.

  Raises:
    ValueError, KeyError, TypeError, AttributeError: it is not as in `Chats`.

  >>> parse_line(b'{"prompt": "1 + 1 =", "completion": " 2"}')
  Prose(pieces=(('1 + 1 =', False), (' 2', True)))
  """
  return parse_record(parse_object(line), score)


def _alternating(turns: Sequence[str], score: Score) -> Chat | Prose | None:
  roles = ('user', 'assistant')
  messages = [
    {'role': roles[i % 2], 'content': turn} for i, turn in enumerate(turns)
  ]
  return parse_record({'messages': messages}, score)


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
    pieces = _pieces(item, template, score)
    ids_n, scored_n = tokenizer.encode_pieces(pieces)
  else:
    ids_n, scored_n = _ended(*tokenizer.encode_pieces(item.pieces), tokenizer)
    if score == 'all':
      scored_n = np.ones_like(scored_n)
  return Example(ids_n, scored_n, tokenizer.bytes_V[ids_n])


def _pieces(item: Chat, template: ChatTemplate, score: Score) -> list[Piece]:
  """Returns the text of a chat in pieces, and whether each is scored."""
  if score != 'all':
    return template.pieces(item.messages, item.scored, item.context)
  # Some messages may be excluded by their weight.
  excluded = [not x for x in item.scored]
  pieces = template.pieces(item.messages, excluded, item.context)
  return [(text, not is_excluded) for text, is_excluded in pieces]


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
