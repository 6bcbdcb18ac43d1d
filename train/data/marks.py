"""Marks around the texts of messages, which a chat template moves along.

They are Unicode noncharacters, which no text has.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

Message: TypeAlias = Mapping[str, Any]
"""At least 'role' and 'content'; 'tool_calls' where an answer calls tools."""

# A mark is _START, a number in digits of its own, the marked text, and _STOP.
_START, _STOP = '\ufdd0', '\ufdd1'
_ZERO = 0xFDD2

BEGIN, END = '\ufde0', '\ufde1'
"""The marks of {% generation %}, around those of its content."""

RESERVED = re.compile(f'[{_START}-{END}]')
"""The code points that marks are made of."""

_MARK = re.compile(
  f'(?P<start>{_START})(?P<number>[\ufdd2-\ufddb]+)|(?P<begin>{BEGIN})|'
  f'{_STOP}|(?P<end>{END})'
)


class Mark(NamedTuple):
  """A marked text, by its offsets in the text without marks."""

  number: int
  start: int
  stop: int


class Field(NamedTuple):
  """A marked text of a message."""

  message: int
  is_content: bool
  is_optional: bool


class Marker:
  """Puts marks around the texts of messages."""

  def __init__(self, thoughts: Sequence[str]) -> None:
    """Has marked nothing; `thoughts` are further keys of texts."""
    self.fields: list[Field] = []
    self._thoughts = thoughts

  def message(self, message: Message, i: int) -> Message:
    """Returns message i with marks around its texts and calls."""
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
    """Whether all marks are there, once each and in the order of messages."""
    numbers = [mark.number for mark in marks]
    needed = {i for i, x in enumerate(self.fields) if not x.is_optional}
    owners = [self.fields[number].message for number in numbers]
    return (
      needed <= set(numbers)
      and len(set(numbers)) == len(numbers)
      and owners == sorted(owners)
    )

  def has_content(self, i: int, marks: Sequence[Mark]) -> bool:
    """Whether the content of message i is among the marks, if it has one."""
    numbers = {mark.number for mark in marks}
    return all(
      number in numbers
      for number, field in enumerate(self.fields)
      if field.message == i and field.is_content
    )

  def _text(self, text: str, field: Field) -> str:
    """Inside the white space: a template can strip it and keeps the marks."""
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
  """A text without marks, and where they were."""

  text: str
  marks: Sequence[Mark] | None
  """None if one of a pair is gone."""
  generated: Sequence[Mark]


def read_marks(text: str) -> Rendered:
  """Takes the marks out of a text."""
  if _MARK.search(text) is None:
    return Rendered(text, (), ())
  parts: list[str] = []
  marks: list[Mark] = []
  generated: list[Mark] = []
  begun: list[Mark] = []
  size = done = begin = 0
  is_sound = True
  for match in _MARK.finditer(text):
    parts.append(text[done : match.start()])
    size, done = size + len(parts[-1]), match.end()
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
