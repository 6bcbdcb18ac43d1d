"""Chat templates: messages to text, and where in it the answers are.

A template is the Jinja text of a checkpoint, rendered as transformers renders
it: in a sandbox, with the same filters and functions.
"""

import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence

import jinja2
import jinja2.ext
import jinja2.sandbox

Message = Mapping[str, str]
"""At least 'role' and 'content'."""

Piece = tuple[str, bool]
"""A text, and whether it is scored."""

# Two code points that are no characters, so that no text has them.
_START, _STOP = '\ufdd0', '\ufdd1'


class ChatTemplate:
  """Renders messages, and finds the answers in what it rendered."""

  def __init__(
    self,
    source: str,
    tokens: Mapping[str, str],
    specials: Iterable[str],
    *,
    origin: str = 'the chat template',
  ):
    """Compiles a template.

    Args:
      source: Jinja text.
      tokens: what it may name, such as bos_token and eos_token.
      specials: texts of the tokens that can end a turn.
      origin: what an error calls it.

    Raises:
      ValueError: it is no Jinja template.
    """
    self.source = source
    self._tokens, self._origin = dict(tokens), origin
    longest_first = sorted(specials, key=len, reverse=True)
    self._end = re.compile(
      rf'\s*(?:{"|".join(map(re.escape, longest_first)) or "(?!)"})'
    )
    try:
      self._template = _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
      raise ValueError(
        f'{origin} is no Jinja template (line {error.lineno}: {error}): '
        'correct it, or name another template'
      ) from error

  def render(
    self, messages: Sequence[Message], *, add_generation_prompt: bool = False
  ) -> str:
    """Returns the text of a conversation.

    Args:
      messages: 'role' and 'content' of each.
      add_generation_prompt: whether the text ends where an answer begins.

    Raises:
      ValueError: the template refuses these messages.
    """
    return _unmarked(self._rendered(messages, add_generation_prompt))

  def pieces(
    self, messages: Sequence[Message], scored: Sequence[bool]
  ) -> list[Piece]:
    """Returns the text of a conversation in pieces, answers apart.

    An answer is the content of a scored message and the special token that the
    template puts behind it. Where the template itself says what a model
    generates, by {% generation %}, it is exactly that.

    Args:
      messages: as in `render`.
      scored: which of them are answers.

    Raises:
      ValueError: the template refuses these messages, or rewrites an answer so
        that it cannot be found again.
    """
    text = self._rendered(messages)
    if _START in text:
      return self._generated(text, messages, scored)
    marked = [
      _marked(message) if answer else message
      for message, answer in zip(messages, scored, strict=True)
    ]
    found = self._rendered(marked)
    num_marked = sum(_START in message['content'] for message in marked)
    if _unmarked(found) == text and found.count(_START) == num_marked:
      return _joined(self._ended(_split(found)))
    return _joined(self._by_prefixes(text, messages, scored))

  @functools.cached_property
  def end_of_turn(self) -> str | None:
    """The special token behind an answer; None where there is none."""
    question = {'role': 'user', 'content': 'a'}
    answer = {'role': 'assistant', 'content': 'b'}
    try:
      pieces = self.pieces((question, answer), (False, True))
    except ValueError:
      return None
    answers = [text for text, scored in pieces if scored]
    found = answers and list(self._end.finditer(answers[-1]))
    return found[-1][0].strip() if found else None

  def _rendered(
    self, messages: Sequence[Message], add_generation_prompt: bool = False
  ) -> str:
    try:
      return self._template.render(
        messages=messages,
        tools=None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **self._tokens,
      )
    # A template is a program: it can fail as any.
    except Exception as error:
      roles = ', '.join(str(message.get('role')) for message in messages)
      raise ValueError(
        f'{self._origin} refuses messages of the roles {roles} '
        f'({type(error).__name__}: {error}): change them, or name another '
        'template'
      ) from error

  def _generated(
    self, text: str, messages: Sequence[Message], scored: Sequence[bool]
  ) -> list[Piece]:
    """By {% generation %}, of which the assistant's messages have one each."""
    pieces = _split(text)
    answers = [
      answer
      for message, answer in zip(messages, scored, strict=True)
      if message['role'] == 'assistant'
    ]
    if sum(inside for _, inside in pieces) != len(answers):
      raise ValueError(
        f'{self._origin} has another number of {{% generation %}} than the '
        f'{len(answers)} messages of the assistant: correct it, or name '
        'another template'
      )
    left = iter(answers)
    return _joined((part, inside and next(left)) for part, inside in pieces)

  def _ended(self, pieces: list[Piece]) -> list[Piece]:
    """Moves the special token behind an answer into it."""
    found, after = [], False
    for text, scored in pieces:
      end = self._end.match(text) if after and not scored else None
      if end:
        found += [(end[0], True), (text[end.end() :], False)]
      else:
        found.append((text, scored))
      after = scored
    return found

  def _by_prefixes(
    self, text: str, messages: Sequence[Message], scored: Sequence[bool]
  ) -> list[Piece]:
    """For templates that take an answer apart: all that a turn adds is it."""
    found, done = [], 0
    for i, answer in enumerate(scored):
      if not answer:
        continue
      prompt = self._rendered(messages[:i], add_generation_prompt=True)
      turn = self._rendered(messages[: i + 1])
      if not (turn.startswith(prompt) and text.startswith(turn)):
        raise ValueError(
          f'{self._origin} rewrites message {i + 1} of {len(messages)}, so '
          'that the answer cannot be found in the text: make each answer the '
          'last message of its line, or name another template'
        )
      said = turn[len(prompt) :]
      ends = list(self._end.finditer(said))
      stop = len(prompt) + (ends[-1].end() if ends else len(said.rstrip()))
      found += [(text[done : len(prompt)], False)]
      found += [(text[len(prompt) : stop], True)]
      done = stop
    return [*found, (text[done:], False)]


class _Generation(jinja2.ext.Extension):
  """{% generation %}: its content is put between marks."""

  tags = frozenset({'generation'})

  def parse(self, parser):
    """As a block whose content passes through `_mark`."""
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    call = self.call_method('_mark')
    return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _mark(self, caller) -> str:
    return f'{_START}{caller()}{_STOP}'


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  environment.filters['tojson'] = _tojson
  environment.globals['raise_exception'] = _raise
  environment.globals['strftime_now'] = _strftime_now
  return environment


def _tojson(
  value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
) -> str:
  """As transformers has it: Jinja's own escapes HTML."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _raise(message: str):
  raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
  return datetime.datetime.now().strftime(form)


def _marked(message: Message) -> Message:
  """The same with marks around its content, inside the white space.

  So that a template can strip it and still has both.
  """
  content = message['content']
  core = content.strip()
  if not core:
    return message
  before, after = content.split(core, 1)
  return {**message, 'content': f'{before}{_START}{core}{_STOP}{after}'}


def _unmarked(text: str) -> str:
  return text.replace(_START, '').replace(_STOP, '')


def _split(text: str) -> list[Piece]:
  """Marked text in pieces: what is between marks is scored."""
  return [
    (part, i % 2 == 1)
    for i, part in enumerate(re.split(f'[{_START}{_STOP}]', text))
  ]


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
  """No two neighbours alike, none empty."""
  found: list[Piece] = []
  for text, scored in pieces:
    if found and found[-1][1] == scored:
      text = found.pop()[0] + text
    if text:
      found.append((text, scored))
  return found
