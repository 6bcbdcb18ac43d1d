"""Turns chats into examples: token ids, and which tokens count in the loss.

`train.data.conversation` parses the records of chat files, and
`train.data.template` renders a conversation as text.

Shapes: n tokens of an example.
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
from typing import Any, ClassVar, Protocol

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
  Corpus,
  Documents,
  Example,
  RandomAccess,
  Split,
  check_holdout,
  dialogues,
  in_files,
  in_split,
)
from train.data.records import Entry, parse_json, parse_object, records
from train.data.template import ChatTemplate, Piece, with_defaults, with_end
from train.data.text_files import index
from train.data.tokenizer import Tokenizer, check_texts

PLAIN = (
  '{{ bos_token }}{% for message in messages %}'
  "{% if message['role'] == 'assistant' %}"
  "### Assistant: {{ message['content'] | trim }}{{ eos_token }}"
  "{% elif message['role'] == 'system' %}{{ message['content'] | trim }}"
  "{% else %}### Human: {{ message['content'] | trim }}{% endif %}"
  "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}"
  '{% endfor %}{% if add_generation_prompt %}### Assistant:{% endif %}'
)
"""The template for tokenizers that have none.

It is the format of openassistant-guanaco, with one line per message and EOS
after each answer.
"""

# Keys of messages that only identify them. Not reading them loses no training
# data.
_IDENTITIES = ('id', 'index', 'name', 'tool_call_id')

# Number of characters of a text that a warning quotes, and number of kinds of
# places that it lists.
_SHOWN = 40
_LISTED = 5


class Source(Protocol):
  """A random-access source of chats that can describe where each item is."""

  def __len__(self) -> int: ...  # noqa: D105

  def __getitem__(self, index: int) -> Chat | Prose: ...  # noqa: D105

  def place(self, index: int) -> str:
    """Returns the place of an item in words, for example file and line."""
    ...


@dataclasses.dataclass
class Tally:
  """Counts of places in the data by kind, with the first place of each kind."""

  counts: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )
  """Number of places of each kind."""
  first: dict[str, str] = dataclasses.field(default_factory=dict)
  """The first place of each kind."""

  def add(self, kind: str, place: str) -> None:
    """Counts a place of a kind."""
    self.counts[kind] += 1
    self.first.setdefault(kind, place)

  def __str__(self) -> str:
    """Lists the most common kinds.

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
  """Counts of the lines and keys of a corpus that are not used."""

  num_left_out: int = 0
  """Number of lines, or dialogues, that are left out because they have no
  answer."""
  keys: Tally = dataclasses.field(default_factory=Tally)
  """Keys of lines that are not used."""
  message_keys: Tally = dataclasses.field(default_factory=Tally)
  """Keys of messages that have an effect only if the chat template reads
  them."""

  def see(self, entry: Entry, item: Chat | Prose | None) -> bool:
    """Counts a record's unused keys, and the record if it is left out.

    Returns:
      Whether the record has an answer.
    """
    self.num_left_out += item is None
    for name in unread_keys(entry.record):
      self.keys.add(name, entry.place)
    if isinstance(item, Chat):
      for name in set(keys_of_messages(item)).difference(_IDENTITIES):
        self.message_keys.add(name, entry.place)
    return item is not None


@dataclasses.dataclass(frozen=True)
class Dialogues(Documents):
  """The chats of one split.

  A chat does not continue in another row, because its answers depend on their
  questions.
  """

  continues: ClassVar[bool] = False

  source: Source
  """The conversations, by random access."""

  template: str | None = None
  """The chat template, as in `Chats.template`."""

  score: Score = 'answers'
  """Which tokens count in the loss, as in `Chats.score`."""

  template_variables: tuple[str, ...] = ()
  """Variables of the template, as in `Chats.template_variables`."""

  reading: Reading = dataclasses.field(default_factory=Reading)
  """Counts of the lines and keys that are not used."""

  _notes: dict[tuple[str, str], list[str]] = dataclasses.field(
    default_factory=dict, repr=False, compare=False
  )

  def __len__(self) -> int:
    """Number of chats."""
    return len(self.source)

  @property
  def num_left_out(self) -> int:
    """Number of lines, or dialogues, that have no answer."""
    return self.reading.num_left_out

  def stream(self, *, seed: int, repeat: bool) -> grain.IterDataset[str]:
    """Streams the chats as texts of the plain template, without special tokens.

    The arguments are those of `Documents.stream`.
    """
    texts = RandomAccess(self.source, _plain_text)
    return texts.stream(seed=seed, repeat=repeat)

  def examples(
    self, tokenizer: Tokenizer, *, seed: int, repeat: bool
  ) -> grain.IterDataset[Example]:
    """Streams the chats as tokenized examples in an order fixed by a seed.

    The arguments are those of `Documents.examples`.
    """
    chats = RandomAccess(self.source, self.encoder(tokenizer))
    return chats.stream(seed=seed, repeat=repeat)

  def check(self, tokenizer: Tokenizer) -> list[str]:
    """Renders every chat once, and collects warnings. Results are cached.

    Returns:
      Warnings about data that the model would not learn as its author intended.

    Raises:
      ValueError: the template refuses a chat, or rewrites an answer of it. The
        message names file and line.
    """
    texts = self.stream(seed=0, repeat=False)
    check_texts(tokenizer, texts, special=True)
    template = self._template_of(tokenizer)
    reads_clock = 'strftime_now' in template.reads
    key = (template.source, str(template.clock) if reads_clock else '')
    if key not in self._notes:
      self._notes[key] = self._warnings(template)
    return self._notes[key]

  def templated(
    self, tokenizer: Tokenizer, clock: datetime.datetime | None = None
  ) -> Tokenizer:
    """Returns the tokenizer with the chat template of these chats.

    The template is saved with a run, so that training, sampling and an exported
    checkpoint use the same template with the same values of its variables. If
    the template puts no special token after an answer, EOS is added there.

    Args:
      tokenizer: of a checkpoint, or trained on the chats.
      clock: start time of the run, for templates that print the date. None is
        the current time.

    Raises:
      FileNotFoundError: the file `template` does not exist.
      ValueError: it is not a Jinja template, or does not read a variable.
    """
    template = self._build(tokenizer)
    own = tokenizer.chat_template
    is_own = own is not None and own.source == template.source
    if is_own and 'strftime_now' not in template.reads:
      return tokenizer
    clock = datetime.datetime.now() if clock is None else clock
    return tokenizer.with_template(None if is_own else template.source, clock)

  def encoder(self, tokenizer: Tokenizer) -> Callable[[Chat | Prose], Example]:
    """Returns a function from an item of `source` to an example."""
    return functools.partial(
      _encoded,
      tokenizer=tokenizer,
      template=self._template_of(tokenizer),
      score=self.score,
    )

  def _template_of(self, tokenizer: Tokenizer) -> ChatTemplate:
    """Returns the template that a run has saved, or would save."""
    own = tokenizer.chat_template
    if own is not None and own.is_settled:
      return own
    return self._build(tokenizer)

  def _build(self, tokenizer: Tokenizer) -> ChatTemplate:
    """Returns the chosen template, with variables set and an end of turn."""
    template = template_of(tokenizer, self.template)
    variables = variables_of(self.template_variables)
    if variables:
      template.check_defaults(variables)
      template = _replaced(
        template, with_defaults(template.source, variables), tokenizer
      )
    texts = {i: text for text, i in tokenizer.specials.items()}
    eos = texts.get(tokenizer.eos_id)
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
      if not template.uses(name):
        found['message keys'].counts[name] = count
        found['message keys'].first[name] = message_keys.first[name]
    texts = [
      text.format(found[kind])
      for kind, text in _WARNINGS.items()
      if found[kind].counts
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
    '(None: with no special token): {}; set --corpus.score last, or name '
    'another --corpus.template'
  ),
}


def _tally(
  item: Chat,
  template: ChatTemplate,
  place: str,
  score: Score,
  found: Mapping[str, Tally],
) -> None:
  """Counts the problems of a chat in a template, by keys of `_WARNINGS`."""
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
  template: ChatTemplate, source: str, tokenizer: Tokenizer
) -> ChatTemplate:
  """Returns a template with the same clock and another source."""
  return ChatTemplate(
    source, tokenizer.tokens, tokenizer.specials, clock=template.clock
  )


@dataclasses.dataclass(frozen=True)
class Chats(Corpus):
  """Chats from your own files of records.

  A record has one of these forms:

    {"messages": [{"role": "user", "content": "..."}, ...]}
    {"conversations": [{"from": "human", "value": "..."}, ...]}  as ShareGPT's
    {"prompt": "...", "completion": "..."}  or lists of messages
    {"instruction": "...", "input": "...", "output": "..."}  as Alpaca's
    {"text": "### Human: ...### Assistant: ..."}  as openassistant-guanaco's
    {"text": "..."}

  Files may have any format that `train.data.records` reads. While the program
  runs, it keeps a copy of files that are not uncompressed JSON lines in the
  directory for temporary files ($TMPDIR).

  Messages are rendered by the checkpoint's chat template. Only the assistant's
  messages count in the loss, from the end of the generation prompt up to and
  including the special token that the template puts after them, so that a model
  learns to stop. Tool calls of the assistant count too. If prompt and
  completion are lists of messages, only the completion counts. In Alpaca's
  form, instruction and input are a user's message, and output is the answer.

  A prompt and a completion that are strings, and other texts, are not rendered
  by the template but put between BOS and EOS. All tokens of "text" count in the
  loss. A line without an answer is left out.

  Names of roles are those of ShareGPT, OpenAI and others, in upper or lower
  case. "system" and "tools" may be keys of the record. "weight": 0 or
  "train": false excludes a message, or a record, from the loss. A key of
  preference data is an error.
  """

  holds: ClassVar[str] = 'chats'
  """What the data are, for `Task.holds`."""

  train: str
  """Path or glob ('chats/*.jsonl') of the training files."""

  validation: str | None = None
  """Path or glob of the validation files; None holds out training lines."""

  holdout: float = 0.05
  """Share of the training lines that is held out for validation if `validation`
  is None. A hash of a line's content decides."""

  score: Score = 'answers'
  """Which tokens count in the loss: those of all answers, those of the last
  answer of each line, or all tokens."""

  template: str | None = None
  """Chat template: None is the checkpoint's own, or 'plain' if it has none;
  'plain' has '### Human: ' and '### Assistant: '; any other value is the path
  of a Jinja file."""

  template_variables: tuple[str, ...] = ()
  """Variables of the template as NAME=VALUE, such as enable_thinking=false. A
  value that is not JSON is a string. They are saved with the run, and used in
  sampling and in an exported checkpoint."""

  def open(self, split: Split) -> Dialogues:
    """Returns the chats of a split.

    Raises:
      FileNotFoundError: no file matches.
      ImportError: Parquet needs the package `datasets`.
      ValueError: a line has none of the forms above (the message names file and
        line), or no line has an answer.
    """
    variables_of(self.template_variables)
    parse = functools.partial(parse_record, score=self.score)
    reading = Reading()
    texts = in_files(
      split,
      self.train,
      self.validation,
      self.holdout,
      lambda pattern: index(records(pattern), parse, RULE, reading.see),
    )
    return Dialogues(
      texts, self.template, self.score, self.template_variables, reading
    )


@dataclasses.dataclass(frozen=True)
class ChitchatAnswers(Corpus):
  """The dialogues of `Chitchat` as chats: every second turn is an answer."""

  holds: ClassVar[str] = 'chats'
  """What the data are, for `Task.holds`."""

  holdout: float = 0.05
  """Share of the dialogues that is held out for validation. They are the same
  dialogues as in `Chitchat`."""

  turns: int = 8
  """Largest number of turns in a chat. A longer dialogue becomes several chats.
  Most chats of 8 turns fit in 256 tokens."""

  score: Score = 'answers'
  """Which tokens count in the loss: those of all answers, those of the last
  answer of each chat, or all tokens."""

  template: str | None = None
  """Chat template: None is the checkpoint's own, or 'plain' if it has none; any
  other value is as in `Chats`."""

  template_variables: tuple[str, ...] = ()
  """Variables of the template as NAME=VALUE, as in `Chats`."""

  def open(self, split: Split) -> Dialogues:
    """Returns the chats of a split.

    Raises:
      ValueError: an option is wrong, or chitchat-dataset is not installed.
    """
    check_holdout(self.holdout)
    if self.turns < 2 or self.turns % 2:
      raise ValueError(
        f'turns must be even and at least 2, got {self.turns}: a chat begins '
        'with a question'
      )
    variables_of(self.template_variables)
    kept: list[tuple[str, Chat]] = []
    num_left_out = 0
    for name, text in dialogues():
      if not in_split(split, zlib.crc32(name.encode()), self.holdout):
        continue
      turns = text.split('\n')
      for start in range(0, len(turns), self.turns):
        chat = _alternating(turns[start : start + self.turns], self.score)
        if isinstance(chat, Chat):
          kept.append((name, chat))
        else:
          num_left_out += 1
    return Dialogues(
      _Named(kept),
      self.template,
      self.score,
      self.template_variables,
      Reading(num_left_out=num_left_out),
    )


class _Named:
  """Chats in memory, each with the name of its dialogue."""

  def __init__(self, chats: Sequence[tuple[str, Chat]]) -> None:
    self._chats = chats

  def __len__(self) -> int:
    return len(self._chats)

  def __getitem__(self, index: int) -> Chat:
    return self._chats[index][1]

  def place(self, index: int) -> str:
    return f'dialogue {self._chats[index][0]}'


def template_of(
  tokenizer: Tokenizer, template: str | None = None
) -> ChatTemplate:
  """Returns the chosen template, without variables or an added end of turn.

  Args:
    tokenizer: the tokenizer of the run.
    template: as in `Chats`.

  Raises:
    FileNotFoundError: the file `template` does not exist.
    ValueError: it is not a Jinja template.
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
  """Parses the variables of a template.

  Returns:
    The value of each variable, by its name.

  Raises:
    ValueError: an assignment does not have the form NAME=VALUE.

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
  """Returns a JSON line's conversation or text; None if it adds no loss.

  Raises:
    ValueError, KeyError, TypeError, AttributeError: it has none of the forms in
      `Chats`.

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
  """Returns the Jinja text of a template; None for the tokenizer's own."""
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
  tokenizer: Tokenizer,
  template: ChatTemplate,
  score: Score,
) -> Example:
  """Returns the token ids of an item, and which of them count in the loss."""
  if isinstance(item, Chat):
    pieces = _pieces(item, template, score)
    ids_n, scored_n = tokenizer.encode_pieces(pieces)
  else:
    ids_n, scored_n = _ended(*tokenizer.encode_pieces(item.pieces), tokenizer)
    if score == 'all':
      scored_n = np.ones_like(scored_n)
  return Example(ids_n, scored_n, tokenizer.bytes_V[ids_n])


def _pieces(item: Chat, template: ChatTemplate, score: Score) -> list[Piece]:
  """Returns the text of a chat in pieces, and whether each is in the loss."""
  if score != 'all':
    return template.pieces(item.messages, item.scored, item.context)
  # All text counts in the loss, except messages that the data exclude by a
  # weight.
  excluded = [not x for x in item.scored]
  pieces = template.pieces(item.messages, excluded, item.context)
  return [(text, not is_excluded) for text, is_excluded in pieces]


def _ended(
  ids_n: np.ndarray, scored_n: np.ndarray, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
  """Adds BOS and EOS to token ids, unless the text already has them."""
  bos = tokenizer.bos_id
  eos = tokenizer.eos_id
  if bos is not None and bos not in ids_n[:1]:
    ids_n = np.r_[bos, ids_n]
    scored_n = np.r_[False, scored_n]
  if not np.isin(ids_n[-1:], tokenizer.stop_ids).any():
    ids_n = np.r_[ids_n, eos]
    scored_n = np.r_[scored_n, True]
  return ids_n.astype(np.int32), scored_n.astype(bool)
