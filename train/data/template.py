"""Chat templates: they render messages as text, and answers are found in it.

A template is the Jinja text of a checkpoint. It is rendered as transformers
does: in a sandbox, with the same filters and functions. transformers renders
with the current time, while the text of a run must not depend on the time.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, TypeAlias

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from train.data.answers import Answer, Finder
from train.data.marks import BEGIN, END, Marker, Message, Rendered, read_marks

Piece: TypeAlias = tuple[str, bool]
"""A text, and whether it counts in the loss."""

_QUESTION = {'role': 'user', 'content': 'a'}
_ANSWER = {'role': 'assistant', 'content': 'b'}
_CALL = {
  'id': 'call00000',
  'type': 'function',
  'function': {'name': 'c', 'arguments': {'d': 'e'}},
}
_TOOLS = [
  {
    'type': 'function',
    'function': {
      'name': 'c',
      'description': 'f',
      'parameters': {
        'type': 'object',
        'properties': {'d': {'type': 'string', 'description': 'g'}},
        'required': ['d'],
      },
    },
  }
]

# Variables that the program sets in every rendering, so that they need no
# default.
_ARGUMENTS = (
  'messages',
  'add_generation_prompt',
  'tools',
  'documents',
  'strftime_now',
)

# Keys of messages for thoughts that are separate from the content, in the order
# in which transformers prefers them.
_THOUGHTS = ('reasoning_content', 'thinking', 'reasoning')


class ChatTemplate:
  """Renders messages as text, and finds the answers in the text.

  Attributes:
    source: the Jinja text.
    origin: name of the template in errors.
    reads: names of the variables that the template reads.
    thoughts: keys of messages for thoughts that the template names.
    clock: the time that the template's function strftime_now formats.
    is_settled: whether a clock was given, as by a run that saved the template.
    specials: texts of the tokens that can end a turn, longest first.
    special: a pattern that matches one of them.
    end: a pattern that matches one of them after white space.
    end_of_turn: the special token after an answer; None without one.
    ends: special tokens that end an answer with a text, and one with a call.
    has_end: whether there is an `end_of_turn`. It is also true if the template
      refuses the messages that it was tried with.
    added_end: the text that `with_end` has added; None if it has not.
  """

  def __init__(
    self,
    source: str,
    tokens: Mapping[str, str],
    specials: Iterable[str],
    *,
    origin: str = 'the chat template',
    clock: datetime.datetime | None = None,
  ) -> None:
    """Compiles a template.

    Args:
      source: Jinja text.
      tokens: variables for the texts of tokens, such as bos_token and
        eos_token.
      specials: texts of the tokens that can end a turn.
      origin: name of the template in errors.
      clock: the time in all renderings of a run. None is the current time.

    Raises:
      ValueError: the text is not a Jinja template.
    """
    self.source = source
    self.origin = origin
    self.is_settled = clock is not None
    self.clock = datetime.datetime.now() if clock is None else clock
    self._tokens = dict(tokens)
    self.specials = tuple(sorted(specials, key=len, reverse=True))
    special = '|'.join(map(re.escape, self.specials)) or '(?!)'
    self.special = re.compile(special)
    self.end = re.compile(rf'\s*({special})')
    eos = re.escape(self._tokens.get('eos_token', '')) or '(?!)'
    self._eos = re.compile(rf'(?:{special})*?({eos})')
    try:
      environment = _environment()
      self.reads = jinja2.meta.find_undeclared_variables(
        environment.parse(source)
      )
      self._template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
      raise ValueError(
        f'{origin} is no Jinja template (line {error.lineno}: {error}): '
        'correct it, or name another template'
      ) from error
    end = _ADDED_END.search(source)
    self.added_end = None if end is None else json.loads(end[1])
    self.thoughts = tuple(x for x in _THOUGHTS if self.mentions(x))
    self.ends: tuple[str, ...] = ()
    self.end_of_turn, self.has_end = self._try(_ANSWER)
    self.ends = () if self.end_of_turn is None else (self.end_of_turn,)
    end_of_call = self._end_of_call()
    if end_of_call is not None and end_of_call not in self.ends:
      self.ends = (*self.ends, end_of_call)

  def render(
    self,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    context: Mapping[str, Any] | None = None,
  ) -> str:
    """Returns the text of a conversation.

    Args:
      messages: messages with 'role' and 'content'.
      add_generation_prompt: whether to end with the text after which a model
        writes its answer.
      context: further variables, such as 'tools'.

    Raises:
      ValueError: the template refuses these messages, or does not read a
        variable of the context.
    """
    self.check_variables(context or {})
    return self.rendered(
      [self._adapted(message) for message in messages],
      context,
      add_generation_prompt=add_generation_prompt,
    ).text

  def pieces(
    self,
    messages: Sequence[Message],
    scored: Sequence[bool],
    context: Mapping[str, Any] | None = None,
  ) -> list[Piece]:
    """Returns a conversation's text in pieces that are in the loss or not.

    Args:
      messages: as in `render`.
      scored: whether each message counts in the loss.
      context: as in `render`.

    Raises:
      ValueError: as in `answers`.
    """
    text, answers = self.answers(messages, scored, context)
    found: list[Piece] = []
    done = 0
    for answer in answers:
      start = max(done, answer.start)
      found += [(text[done:start], False), (text[start : answer.stop], True)]
      done = answer.stop
    return _merged([*found, (text[done:], False)])

  def answers(
    self,
    messages: Sequence[Message],
    scored: Sequence[bool],
    context: Mapping[str, Any] | None = None,
  ) -> tuple[str, list[Answer]]:
    """Returns the text of a conversation, and the places of the answers in it.

    An answer is the text of a message that counts in the loss. It begins where
    the generation prompt ends, so that a model learns everything that it has to
    write. It consists of the content and the tool calls of the message, and of
    the special token that the template puts after them. If the template marks
    the text that a model writes by {% generation %}, an answer is this text and
    the special token after it.

    Args:
      messages: as in `render`.
      scored: whether each message counts in the loss.
      context: as in `render`.

    Raises:
      ValueError: the template refuses these messages, does not read a variable
        of the context, leaves out a tool call, or rewrites an answer so that it
        cannot be found.
    """
    self.check_variables(context or {})
    adapted = [self._adapted(message) for message in messages]
    finder = Finder(self, adapted, context)
    return finder.text, list(finder.answers(scored))

  def mentions(self, name: str) -> bool:
    """Returns whether a name, such as a key of messages, is in the template."""
    return re.search(rf'\b{re.escape(name)}\b', self.source) is not None

  def uses(self, key: str) -> bool:
    """Returns whether a key of messages can change the text."""
    keys = (key, *_THOUGHTS[:2]) if key in _THOUGHTS else (key,)
    return any(map(self.mentions, keys))

  def check_variables(self, variables: Iterable[str]) -> None:
    """Raises ValueError for a variable that the template does not read."""
    for name in variables:
      if name not in self.reads:
        known = sorted(self.reads - {*_ARGUMENTS} - self._tokens.keys())
        raise ValueError(
          f'{self.origin} does not read {name!r}, which would be lost (it '
          f'reads {", ".join(known) or "no variable"}): remove it, or name '
          'another template'
        )

  def check_defaults(self, variables: Iterable[str]) -> None:
    """Raises ValueError for a variable that the program itself always sets.

    A default in the template would have no effect.
    """
    self.check_variables(variables)
    for name in variables:
      if name in _ARGUMENTS or name in self._tokens:
        raise ValueError(
          f'{name!r} is always set by the program: remove it from the '
          'variables of the template'
        )

  @functools.cached_property
  def generation_prompt(self) -> str:
    """The text after which a model writes an answer; '' without one."""
    try:
      return self.prompt_after([_QUESTION], None)
    except ValueError:
      return ''

  def prompt_after(
    self, messages: Sequence[Message], context: Mapping[str, Any] | None
  ) -> str:
    """Returns the generation prompt after some messages; '' without one.

    Raises:
      ValueError: the template refuses these messages.
    """
    before = self.rendered(messages, context).text
    prompt = self.rendered(messages, context, add_generation_prompt=True).text
    return prompt[len(before) :] if prompt.startswith(before) else ''

  def up_to_eos(self, text: str, stop: int, end: str) -> tuple[int, str]:
    """Extends the end of an answer over further special tokens up to EOS.

    Args:
      text: text of a conversation.
      stop: offset past the special token after an answer.
      end: that token.

    Returns:
      The new offset, and the token before it.
    """
    eos = self._eos.match(text, stop)
    if eos is None or end == self._tokens.get('eos_token'):
      return stop, end
    return eos.end(), eos[1]

  def rendered(
    self,
    messages: Sequence[Message],
    context: Mapping[str, Any] | None,
    *,
    add_generation_prompt: bool = False,
  ) -> Rendered:
    """Returns the text of messages without marks, and the places of the marks.

    Args:
      messages: messages in the form that the template expects.
      context: as in `render`.
      add_generation_prompt: as in `render`.

    Raises:
      ValueError: the template refuses these messages.
    """
    variables = {'tools': None, 'documents': None, **self._tokens}
    try:
      text = self._template.render(
        **variables | dict(context or {}),
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        strftime_now=self.clock.strftime,
      )
    # A template is a program, which can raise any error.
    except Exception as error:
      roles = ', '.join(str(message.get('role')) for message in messages)
      raise ValueError(
        f'{self.origin} refuses messages of the roles {roles} '
        f'({type(error).__name__}: {error}): change them, or name another '
        'template'
      ) from error
    return read_marks(text)

  @functools.cached_property
  def _probes(self) -> tuple[Mapping[str, Any], ...]:
    """Contexts to try the template with; some templates require tools."""
    return ({}, {'tools': _TOOLS}) if 'tools' in self.reads else ({},)

  def _try(self, answer: Message) -> tuple[str | None, bool]:
    """Renders a test conversation and returns the token that ends its answer.

    The second value is false if no token ends the answer. It is true if a token
    does, or if the template refuses the conversation.
    """
    for context in self._probes:
      try:
        _, found = self.answers((_QUESTION, answer), (False, True), context)
        (only,) = found
      except ValueError:
        continue
      return only.end, only.end is not None
    return None, True

  def _end_of_call(self) -> str | None:
    """Returns the token that ends an answer with tool calls, if any."""
    if self._form_of_call is None:
      return None
    # Try two calls first: a token after each of them does not end the answer.
    for calls in ([_CALL, _CALL], [_CALL]):
      answer = {'role': 'assistant', 'content': '', 'tool_calls': calls}
      end, is_known = self._try(answer)
      if end is not None or not is_known:
        return end
    return None

  @functools.cached_property
  def _form_of_call(self) -> Callable[[Message], Message] | None:
    """Converts a message with tool calls to the form that the template expects.

    It is None if the template does not render calls. Templates differ in the
    expected content (a text, null or no key) and in the expected arguments (an
    object, or its JSON).
    """
    message = {'role': 'assistant', 'content': '', 'tool_calls': [_CALL]}
    for content in ({'content': ''}, {'content': None}, {}):
      for dump in (False, True):
        form = functools.partial(_of_form, content=content, dump=dump)
        if any(self._has_call(form, message, x) for x in self._probes):
          return form
    return None

  def _has_call(
    self,
    form: Callable[[Message], Message],
    message: Message,
    context: Mapping[str, Any],
  ) -> bool:
    """Returns whether the template renders a call of this form."""
    marked = Marker(()).message(message, 1)
    try:
      plain = self.rendered([_QUESTION, form(message)], context)
      found = self.rendered([_QUESTION, form(marked)], context)
    except ValueError:
      return False
    # A template that prints the Python repr of an object would escape the marks
    # in it.
    return bool(found.marks) and found.text == plain.text

  def _adapted(self, message: Message) -> Message:
    """Returns a message in the form that the template expects."""
    message = _with_thoughts(message)
    if not message.get('tool_calls') or self._form_of_call is None:
      return message
    return self._form_of_call(message)


def _with_thoughts(message: Message) -> Message:
  """Returns a message with its thoughts at the keys that templates read.

  These are the keys that transformers fills.

  >>> sorted(_with_thoughts({'role': 'assistant', 'reasoning': 'Hm.'}))
  ['reasoning', 'reasoning_content', 'role', 'thinking']
  """
  thoughts = (message.get(name) for name in _THOUGHTS)
  found = next((x for x in thoughts if x is not None), None)
  if found is None:
    return message
  filled = {
    'reasoning_content': found,
    'thinking': message.get('thinking', found),
  }
  return {**message, **filled}


def _of_form(
  message: Message, *, content: Mapping[str, Any], dump: bool
) -> Message:
  """Returns a message with tool calls in a form.

  Args:
    message: a message whose arguments are objects.
    content: entries that replace an empty content.
    dump: whether to write arguments as JSON.
  """
  found = dict(message)
  if not found.get('content'):
    found.pop('content', None)
    found |= content
  if dump:
    found['tool_calls'] = [
      _with_json_arguments(call) for call in message['tool_calls']
    ]
  return found


def _with_json_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a tool call whose arguments are JSON instead of an object."""
  function = call['function']
  arguments = json.dumps(function['arguments'], ensure_ascii=False)
  return {**call, 'function': {**function, 'arguments': arguments}}


def with_defaults(source: str, variables: Mapping[str, Any]) -> str:
  """Returns a template with default values for variables.

  The defaults are part of the template, so that every program that renders it
  uses them.

  >>> print(with_defaults('{{ x }}', {'x': False}))
  {%- if x is not defined %}{%- set x = false %}{%- endif %}
  {{ x }}
  """
  lines = [
    f'{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}'
    '{%- endif %}\n'
    for name, value in variables.items()
  ]
  return ''.join([*lines, source])


def with_end(source: str, end: str) -> str:
  """Returns a template that adds a text after the content of each answer."""
  return _WITH_END.format(end=_literal(end)) + source


# Jinja removes a newline after a block.
_WITH_END = """\
{{%- set ended = namespace(messages=[]) %}}
{{%- for message in messages %}}
{{%- if message.role == 'assistant' and message.content is string
    and not message.tool_calls %}}
{{%- set message = dict(message, content=message.content + {end}) %}}
{{%- endif %}}
{{%- set ended.messages = ended.messages + [message] %}}
{{%- endfor %}}
{{%- set messages = ended.messages %}}
"""


_ADDED_END = re.compile(
  re.escape(_WITH_END.format(end='@')).replace('@', r'("(?:[^"\\]|\\.)*")')
)


def _literal(value: Any) -> str:
  """Returns a JSON value in Jinja's notation."""
  if isinstance(value, dict):
    pairs = (f'{_literal(k)}: {_literal(x)}' for k, x in value.items())
    return f'{{{", ".join(pairs)}}}'
  if isinstance(value, list):
    return f'[{", ".join(map(_literal, value))}]'
  if value is None:
    return 'none'
  return json.dumps(value, ensure_ascii=False)


class _Generation(jinja2.ext.Extension):
  """The block {% generation %}, whose content is put between marks."""

  tags: ClassVar[set[str]] = {'generation'}

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    """Parses the block as a call of `_mark` with its content."""
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    call = self.call_method('_mark')
    return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _mark(self, caller: Callable[[], str]) -> str:
    return f'{BEGIN}{caller()}{END}'


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  environment.filters['tojson'] = _tojson
  environment.globals['raise_exception'] = _raise
  # A conversation must have the same text each time that it is rendered.
  del environment.filters['random'], environment.globals['lipsum']
  return environment


def _tojson(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """Returns JSON as transformers does; Jinja's own filter escapes HTML."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _raise(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


def _merged(pieces: Iterable[Piece]) -> list[Piece]:
  """Merges neighbours with the same flag, and drops empty pieces."""
  found: list[Piece] = []
  for text, scored in pieces:
    if found and found[-1][1] == scored:
      text = found.pop()[0] + text
    if text:
      found.append((text, scored))
  return found
