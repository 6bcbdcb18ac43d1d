"""Marks around the texts of messages, to find them in a rendered chat.

A chat template moves the marks along with the texts. The marks are Unicode
noncharacters, which do not occur in texts.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

Message: TypeAlias = Mapping[str, Any]
"""A dict with at least 'role' and 'content', and 'tool_calls' if it calls
tools."""

# A marked text is _START, a number, the text, and _STOP. The digits of the
# number are noncharacters too.
_START = '\ufdd0'
_STOP = '\ufdd1'
_ZERO = 0xFDD2

BEGIN = '\ufde0'
"""Mark at the start of a {% generation %} block, around those of its texts."""

END = '\ufde1'
"""Mark at the end of a {% generation %} block."""

RESERVED = re.compile(f'[{_START}-{END}]')
"""A pattern of the characters that marks consist of."""

_MARK = re.compile(
  f'(?P<start>{_START})(?P<number>[\ufdd2-\ufddb]+)|(?P<begin>{BEGIN})|'
  f'{_STOP}|(?P<end>{END})'
)


class Mark(NamedTuple):
  """A marked text, by its offsets in the rendered text without marks."""

  number: int
  """Index of the field in `Marker.fields`."""
  start: int
  """Offset of the first character."""
  stop: int
  """Offset past the last character."""


class Field(NamedTuple):
  """A text of a message that has a mark."""

  message: int
  """Index of the message."""
  is_content: bool
  """Whether the text is the message's content, not a thought or a tool call."""
  is_optional: bool
  """Whether a template may leave the text out, as the content next to a tool
  call."""


class Marker:
  """Puts marks around the texts of messages, and records them in `fields`."""

  def __init__(self, thoughts: Sequence[str]) -> None:
    """Starts without marks; `thoughts` are further text keys of messages."""
    self.fields: list[Field] = []
    self._thoughts = thoughts

  def message(self, message: Message, i: int) -> Message:
    """Returns message i with marks around its texts and tool calls."""
    calls = message.get('tool_calls')
    found = dict(message)
    for name in ('content', *self._thoughts):
      if message.get(name):
        is_content = name == 'content'
        field = Field(i, is_content, is_content and bool(calls))
        found[name] = self._text(message[name], field)
    if calls:
      found['tool_calls'] = [self._call(call, i) for call in calls]
    return found

  def has_all(self, marks: Sequence[Mark]) -> bool:
    """Returns whether all marks occur once and in the order of the messages.

    Marks of optional fields may be absent.
    """
    numbers = [mark.number for mark in marks]
    needed = {i for i, x in enumerate(self.fields) if not x.is_optional}
    owners = [self.fields[number].message for number in numbers]
    return (
      needed <= set(numbers)
      and len(set(numbers)) == len(numbers)
      and owners == sorted(owners)
    )

  def has_content(self, i: int, marks: Sequence[Mark]) -> bool:
    """Returns whether the content of message i is marked, if it has any."""
    numbers = {mark.number for mark in marks}
    return all(
      number in numbers
      for number, field in enumerate(self.fields)
      if field.message == i and field.is_content
    )

  def _text(self, text: str, field: Field) -> str:
    """Puts marks inside the white space of a text.

    A template that strips the text then keeps the marks.
    """
    core = text.strip()
    if not core:
      return text
    number = ''.join(chr(_ZERO + int(x)) for x in str(len(self.fields)))
    self.fields.append(field)
    before, after = text.split(core, 1)
    return f'{before}{_START}{number}{core}{_STOP}{after}'

  def _call(self, call: Mapping[str, Any], i: int) -> dict[str, Any]:
    field = Field(i, False, False)

    def mark(value: Any) -> Any:
      if isinstance(value, dict):
        return {name: mark(x) for name, x in value.items()}
      if isinstance(value, list):
        return [mark(x) for x in value]
      return self._text(value, field) if isinstance(value, str) else value

    return {**call, 'function': mark(call['function'])}


class Rendered(NamedTuple):
  """A rendered text without marks, and the places of the marks."""

  text: str
  """The text from which marks have been removed."""
  marks: Sequence[Mark] | None
  """The marked texts; None if a mark has lost its counterpart or marks are
  nested."""
  generated: Sequence[Mark]
  """The contents of {% generation %} blocks."""


def read_marks(text: str) -> Rendered:
  """Removes the marks from a rendered text, and returns their places."""
  if _MARK.search(text) is None:
    return Rendered(text, (), ())
  parts: list[str] = []
  marks: list[Mark] = []
  generated: list[Mark] = []
  begun: list[Mark] = []
  size = 0
  done = 0
  begin = 0
  is_sound = True
  for match in _MARK.finditer(text):
    parts.append(text[done : match.start()])
    size += len(parts[-1])
    done = match.end()
    if match['begin']:
      begin = size
    elif match['end']:
      generated.append(Mark(len(generated), begin, size))
    elif match['start']:
      digits = ''.join(str(ord(x) - _ZERO) for x in match['number'])
      is_sound = is_sound and not begun
      begun.append(Mark(int(digits), size, size))
    elif begun:
      marks.append(begun.pop()._replace(stop=size))
    else:
      is_sound = False
  parts.append(text[done:])
  is_sound = is_sound and not begun
  return Rendered(''.join(parts), marks if is_sound else None, generated)
