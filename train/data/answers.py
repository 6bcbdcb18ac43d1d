"""Finds the answers in a conversation that a chat template has rendered.

An answer is the text that a model learns to write: it counts in the loss. A
template can strip, move and repeat the texts of messages. `Finder` therefore
renders the messages with marks around their texts (`train.data.marks`) and
looks for the marks in the result.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from train.data.marks import Mark, Marker, Message

if TYPE_CHECKING:
  from train.data.template import ChatTemplate

# Number of characters of a text that an error or a warning quotes.
_SHOWN = 60


class Answer(NamedTuple):
  """The span of a message that counts in the loss, in a conversation's text."""

  message: int
  """Index of the message."""
  start: int
  """Offset of the first character that counts in the loss."""
  stop: int
  """Offset past the last character that counts in the loss."""
  end: str | None
  """The special token at the end of the span, if there is one."""
  prompt: str | None = None
  """End of the generation prompt, if the text before the answer differs from
  it; else None."""
  is_whole: bool = True
  """Whether all texts of the message lie between `start` and `stop`."""


class Finder:
  """Finds the answers of one conversation."""

  def __init__(
    self,
    template: 'ChatTemplate',
    messages: Sequence[Message],
    context: Mapping[str, Any] | None,
  ) -> None:
    """Renders the conversation.

    Args:
      template: the chat template of the run.
      messages: messages of the conversation, in the form that the template
        expects.
      context: further variables of the template.
    """
    self._template = template
    self._messages = messages
    self._context = context
    self._whole = template.rendered(messages, context)
    self.text = self._whole.text

  def answers(self, scored: Sequence[bool]) -> Iterator[Answer]:
    """Yields the answers, in the order of their messages.

    Args:
      scored: whether each message counts in the loss.

    Raises:
      ValueError: the template leaves out a tool call, or rewrites an answer so
        that it cannot be found in the text.
    """
    for i, message in enumerate(self._messages):
      self._check_calls(self.text, message, i)
    if self._whole.generated:
      found = self._generated(scored)
    else:
      found = self._marked(scored)
    for answer in found:
      said = self.text[answer.start : answer.stop]
      self._check_calls(said, self._messages[answer.message], answer.message)
      yield answer

  def _check_calls(self, text: str, message: Message, i: int) -> None:
    for call in message.get('tool_calls', ()):
      name = call['function']['name']
      if name not in text:
        raise ValueError(
          f'{self._template.origin} leaves out the call of {name!r} in message '
          f'{i + 1}: name a template that has tool calls'
        )

  def _generated(self, scored: Sequence[bool]) -> Iterator[Answer]:
    """Finds answers by {% generation %} blocks: one per assistant message."""
    answers = [
      (i, answer)
      for i, (message, answer) in enumerate(
        zip(self._messages, scored, strict=True)
      )
      if message['role'] == 'assistant'
    ]
    marks = self._whole.generated
    if len(marks) != len(answers):
      raise ValueError(
        f'{self._template.origin} has another number of {{% generation %}} '
        f'than the {len(answers)} messages of the assistant: correct it, or '
        'name another template'
      )
    for (i, answer), mark in zip(answers, marks, strict=True):
      if not answer:
        continue
      start, prompt = self._start(mark.start, i)
      if prompt is not None:
        # The block may contain the end of the generation prompt, so search for
        # the prompt up to the end of the block.
        inside, other = self._start(mark.stop, i)
        if other is None and inside > mark.start:
          start = inside
          prompt = None
      stop, end = self._end_of_generation(start, mark.stop, i)
      yield Answer(i, start, stop, end, prompt)

  def _end_of_generation(
    self, start: int, stop: int, i: int
  ) -> tuple[int, str | None]:
    """Does the same as `_end` for a {% generation %} block.

    Such a block may contain the special token at its end.
    """
    added = self._template.added_end
    at = -1 if added is None else self.text.rfind(added, start, stop)
    if added is not None and at >= 0:
      return at + len(added), added
    said = self.text[start:stop].rstrip()
    known = self._template.ends or self._template.specials
    ends = [end for end in known if said.endswith(end)]
    return (stop, ends[0]) if ends else self._end(start, stop, i)

  def _marked(self, scored: Sequence[bool]) -> Iterator[Answer]:
    """Finds answers by marks around the texts of their messages."""
    marker = Marker(self._template.thoughts)
    marked = [
      marker.message(message, i) if answer else message
      for i, (message, answer) in enumerate(
        zip(self._messages, scored, strict=True)
      )
    ]
    marks: Sequence[Mark] | None = None
    try:
      found = self._template.rendered(marked, self._context)
      if found.text == self.text:
        marks = found.marks
    except ValueError:  # A template that compares texts can refuse marked ones.
      pass
    if marks is None or not marker.has_all(marks):
      yield from self._by_turns(scored)
      return
    spans: dict[int, list[Mark]] = {}
    for mark in marks:
      spans.setdefault(marker.fields[mark.number].message, []).append(mark)
    for i, some in spans.items():
      first = min(x.start for x in some)
      last = max(x.stop for x in some)
      start = first
      prompt = None
      if self._messages[i]['role'] == 'assistant':
        start, prompt = self._start(first, i)
      stop, end = self._end(start, last, i)
      yield Answer(i, start, stop, end, prompt, marker.has_content(i, marks))

  def _by_turns(self, scored: Sequence[bool]) -> Iterator[Answer]:
    """Finds answers by rendering the conversation up to each of them.

    An answer is the text that its message adds to the generation prompt. This
    method also works for templates that take the content of a message apart,
    and so lose its marks.
    """
    for i, answer in enumerate(scored):
      if not answer:
        continue
      before = self._turn(i - 1)
      prompt = self._prompt(i)
      turn = self._turn(i)
      if (
        before is None
        or prompt is None
        or turn is None
        or not turn.startswith(before)
        or not self.text.startswith(turn)
      ):
        raise ValueError(
          f'{self._template.origin} rewrites message {i + 1} of '
          f'{len(self._messages)}, so that the answer cannot be found in the '
          'text: make each answer the last message of its line, set '
          'corpus.score to last, or name another template'
        )
      start = self._aligned(_common(prompt, turn))
      message = self._messages[i]
      texts = [message.get(x) for x in ('content', *self._template.thoughts)]
      texts = [x.strip() for x in texts if x and x.strip()]
      stop = max(start, self._behind(i, len(turn)))
      stop, end = self._end(start, stop, i)
      if end is None:
        stop = len(turn.rstrip())
      said = ''.join(turn[start:stop].split())
      yield Answer(
        message=i,
        start=start,
        stop=stop,
        end=end,
        prompt=None if start == len(prompt) else prompt[len(before) :],
        is_whole=all(''.join(x.split()) in said for x in texts),
      )

  def _prompt(self, i: int) -> str | None:
    """Returns the text before message i with a generation prompt.

    Returns None if the template refuses these messages.
    """
    try:
      return self._template.rendered(
        self._messages[:i], self._context, add_generation_prompt=True
      ).text
    except ValueError:
      return None

  def _turn(self, i: int) -> str | None:
    """Returns the text up to and including message i.

    Returns None if the template refuses these messages.
    """
    try:
      return self._template.rendered(
        self._messages[: i + 1], self._context
      ).text
    except ValueError:
      return None

  def _start(self, first: int, i: int) -> tuple[int, str | None]:
    """Returns the offset where answer i begins.

    Args:
      first: offset of the first character of the message's own texts.
      i: index of the message.

    Returns:
      The offset, and the generation prompt if the text before the offset does
      not end with it, else None.
    """
    expected = self._template.generation_prompt
    if expected and self.text.endswith(expected, 0, first):
      return first, None
    whole = self._prompt(i)
    if whole is None:
      return first, None
    if self.text.startswith(whole) and len(whole) <= first:
      return len(whole), None
    before = self._turn(i - 1)
    if before is None or before == whole or not whole.startswith(before):
      return first, whole[-_SHOWN:]
    expected = whole[len(before) :]
    # If a template rewrites older messages, the text does not begin with
    # `whole`. It still contains `expected`, the generation prompt, or at least
    # its beginning up to the first special token.
    header = self._template.special.search(expected)
    least = len(expected) if header is None else header.end()
    earliest = self._behind(i - 1, first)
    for size in range(len(expected), least - 1, -1):
      at = self.text.rfind(expected[:size], earliest, first)
      start = self._aligned(at + size)
      between = self.text[start:first]
      if at >= 0 and not any(end in between for end in self._template.ends):
        return start, None if size == len(expected) else expected
    return first, expected

  def _behind(self, i: int, stop: int) -> int:
    """Returns the offset past the content of message i, before `stop`.

    Only the end of the content's last line is searched for. Returns 0 if it is
    not found.
    """
    last = _last_line(self._messages[i].get('content')) if i >= 0 else ''
    at = self.text.rfind(last, 0, stop) if last else -1
    return at + len(last) if at >= 0 else 0

  def _before(self, i: int, start: int) -> int:
    """Returns the offset where the content of message i begins after `start`.

    Returns the length of the text if the content is not found.
    """
    if i >= len(self._messages):
      return len(self.text)
    content = (self._messages[i].get('content') or '').strip()
    at = self.text.find(content[:_SHOWN], start) if content else -1
    return at if at >= 0 else len(self.text)

  def _aligned(self, start: int) -> int:
    """Moves `start` to the beginning of a special token that contains it."""
    near = max(0, start - _SHOWN)
    for match in self._template.special.finditer(self.text, near):
      if match.end() >= start or match.start() >= start:
        return match.start() if match.start() < start < match.end() else start
    return start

  def _end(self, start: int, stop: int, i: int) -> tuple[int, str | None]:
    """Returns the offset where answer i ends, and the special token before it.

    The tokens in `ChatTemplate.ends` are preferred. Among other special tokens,
    those that also occur inside the answer are skipped: a model that stops at
    such a token would stop too early.

    Args:
      start: offset of the first character of the answer.
      stop: offset past the last character of the message's own texts.
      i: index of the message.
    """
    template = self._template
    behind = template.end.match(self.text, stop)
    if behind is not None and behind[1] in template.ends:
      return behind.end(), behind[1]
    turn = self._turn(i)
    is_prefix = turn is not None and self.text.startswith(turn)
    if is_prefix and turn is not None:
      until = len(turn)
    else:
      until = self._before(i + 1, stop)
    for end in template.ends:
      at = self.text.find(end, stop, until)
      if at >= 0:
        return at + len(end), end
    is_call = bool(self._messages[i].get('tool_calls'))
    if behind is not None and not is_prefix:
      return behind.end(), behind[1]
    said = self.text[start:stop]
    ends = [
      match
      for match in template.special.finditer(self.text, stop, until)
      if match[0] not in said
    ]
    if is_call and is_prefix:
      # The tokens that close a call come before the token that ends the turn,
      # so the last token ends the answer.
      ends = ends[-1:]
      stop = len(self.text[:until].rstrip())
    if not ends or not (is_call or is_prefix):
      return stop, None
    last = ends[0]
    return template.up_to_eos(self.text, last.end(), last[0])


def _last_line(text: str | None) -> str:
  """Returns the end of the last line that is not blank, or '' without one."""
  lines = (text or '').split('\n')
  return next((x.strip()[-_SHOWN:] for x in reversed(lines) if x.strip()), '')


def _common(a: str, b: str) -> int:
  """Returns the length of the longest common prefix of two texts."""
  pairs = zip(a, b, strict=False)
  return sum(1 for _ in itertools.takewhile(lambda x: x[0] == x[1], pairs))
