"""Parses records of chat data sets, in their many forms, into conversations.

`parse_record` parses one record. It renames roles and keys to those that chat
templates use. It refuses keys that require another loss, such as preference
data, because training without that loss would not do as the data set intends.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from train.data.marks import RESERVED, Message
from train.data.records import Record, RecordError, parse_json
from train.data.template import Piece

Score: TypeAlias = Literal['answers', 'last', 'all']

RULE = (
  'a line must be a JSON object of "messages" (a list of objects of "role" and '
  '"content"), "conversations" (of "from" and "value"), "prompt" and '
  '"completion", "instruction" and "output", or "text"'
)
"""The accepted forms of a record, for errors about a record that has none of
them."""

_ROLES = {
  'user': 'user',
  'human': 'user',
  'prompter': 'user',
  'assistant': 'assistant',
  'gpt': 'assistant',
  'chatgpt': 'assistant',
  'gpt4': 'assistant',
  'gpt-4': 'assistant',
  'bard': 'assistant',
  'bing': 'assistant',
  'model': 'assistant',
  'bot': 'assistant',
  'chatbot': 'assistant',
  'ai': 'assistant',
  'system': 'system',
  'developer': 'system',
  'tool': 'tool',
  'function': 'tool',
  'observation': 'tool',
  'ipython': 'tool',
  'tool_response': 'tool',
  'tool_result': 'tool',
  'function_response': 'tool',
  # The content of a message with such a role is a tool call.
  'function_call': 'call',
  'tool_call': 'call',
}

# A value of 0 or false at one of these keys excludes the record, or the
# message, from the loss.
_WEIGHTS = ('weight', 'train')
_MESSAGE_WEIGHTS = (*_WEIGHTS, 'training', 'trainable', 'loss')

_PREFERENCE = re.compile(
  r'.*(chosen|reject).*|(non_)?preferred_output|labels?|kto_tag'
)

_OTHER_LOSS = (
  'training_detail',
  'train_detail',
  'mask',
  'loss_mask',
  'loss_scale',
)

_MEDIA = ('image', 'images', 'video', 'videos', 'audio', 'audios')

_SYSTEM = ('system', 'system_prompt')
_TOOLS = ('tools', 'functions')
_CONTEXT = ('documents', 'chat_template_kwargs')

_GUANACO = re.compile(r'### (Human|Assistant):')


class Chat(NamedTuple):
  """A conversation, to be rendered by a chat template."""

  messages: tuple[Message, ...]
  """The messages, in the form of transformers' chat templates."""
  scored: tuple[bool, ...]
  """Whether each message counts in the loss."""
  context: Mapping[str, Any] = {}
  """Further variables of the template, such as 'tools'."""


class Prose(NamedTuple):
  """A text without a chat template, which is put between BOS and EOS."""

  pieces: tuple[Piece, ...]
  """Parts of the text, and whether each part counts in the loss."""


def parse_record(
  record: Record, score: Score = 'answers'
) -> Chat | Prose | None:
  """Returns a record's conversation or text; None if it adds no loss.

  Args:
    record: a record in one of the forms of `RULE`. A field that is null counts
      as absent.
    score: as in `Chats`.

  Raises:
    RecordError: a role or a key is not supported, and ignoring it would change
      the meaning of the data.
    ValueError, KeyError, TypeError: the record has none of the forms.

  >>> parse_record({'prompt': '1 + 1 =', 'completion': ' 2'})
  Prose(pieces=(('1 + 1 =', False), (' 2', True)))
  """
  record = _present(record)
  _check_keys(record)
  for name in _MEDIA:
    if record.get(name):
      raise RecordError(
        f'the key {name!r} is for models of images or sounds: remove it, and '
        'the messages that refer to it'
      )
  turns = _turns(record)
  if turns is None:
    return _prose(record, score)
  chat = _chat(*turns, record, score)
  return chat if any(map(_is_learned, chat.messages, chat.scored)) else None


def unread_keys(record: Record) -> list[str]:
  """Returns the keys of a record that `parse_record` does not use.

  >>> unread_keys({'id': 3, 'text': 'a', 'source': None})
  ['id']
  """
  record = _present(record)
  known = {*_WEIGHTS, *_SYSTEM, *_TOOLS, *_CONTEXT, *_MEDIA}
  for names in _FORMS:
    if set(names) <= set(record):
      known.update(names)
      if 'output' in names:
        known.update(('input', 'history'))
      break
  return [name for name in record if name not in known]


_FORMS = (
  ('messages',),
  ('conversations',),
  ('conversation',),
  ('instruction', 'output'),
  ('text',),
  ('prompt', 'completion'),
)
"""Keys of each form of a record. The first form whose keys are all present is
used."""


def _present(record: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a record without its null fields."""
  return {name: x for name, x in record.items() if x is not None}


def _check_keys(record: Mapping[str, Any]) -> None:
  """Raises RecordError for a key that requires another loss."""
  for name in record:
    if _PREFERENCE.fullmatch(name):
      raise RecordError(
        f'the key {name!r} is of preference data, which has no loss here yet: '
        'remove the key, and the answers that must not be learned'
      )
    if name in _OTHER_LOSS:
      raise RecordError(
        f'the key {name!r} scores parts of an answer, which is not supported: '
        'remove it, or give "weight": 0 to the messages not to be learned'
      )


def _weight(record: Mapping[str, Any], names: Sequence[str]) -> bool:
  """Returns whether a record or message may count in the loss, by its keys."""
  for name in names:
    value = record.get(name, 1)
    if value not in (0, 1):
      raise RecordError(
        f'"{name}" must be 0 or 1, false or true, got {value!r}'
      )
    if not value:
      return False
  return True


def _is_learned(message: Message, scored: bool) -> bool:
  """Returns whether a message in the loss has text or a tool call."""
  return scored and bool(
    message['content'].strip() or message.get('tool_calls')
  )


def _turns(record: Record) -> tuple[list[Any], list[Any]] | None:
  """Returns context messages, and messages that may count in the loss.

  Returns None if the record is a text without messages.
  """
  for name in ('messages', 'conversations', 'conversation'):
    if name in record:
      return [], _list(record[name], name)
  if {'instruction', 'output'} <= set(record):
    return [], _instruction(record)
  if 'text' in record:
    return _guanaco(record['text'])
  prompt = record['prompt']
  completion = record['completion']
  if isinstance(prompt, list) and isinstance(completion, list):
    return prompt, completion
  return None


def _guanaco(text: Any) -> tuple[list[Any], list[Any]] | None:
  """Returns the messages of a text in openassistant-guanaco's form.

  Returns None if the text does not have this form.
  """
  if not _GUANACO.match(_string(text, 'text')):
    return None
  # The text before the first mark is empty.
  parts = _GUANACO.split(text)[1:]
  pairs = zip(parts[::2], parts[1::2], strict=True)
  return [], [
    {'role': name, 'content': content.strip()} for name, content in pairs
  ]


def _instruction(record: Record) -> list[Any]:
  """Returns the messages of a record in Alpaca's form."""
  question = _string(record['instruction'], 'instruction')
  more = _string(record.get('input', ''), 'input')
  pairs = [*_list(record.get('history', []), 'history')]
  pairs.append([f'{question}\n{more}' if more.strip() else question])
  pairs[-1].append(_string(record['output'], 'output'))
  return [
    {'role': role, 'content': content}
    for pair in pairs
    for role, content in zip(('user', 'assistant'), pair, strict=True)
  ]


def _prose(record: Record, score: Score) -> Prose | None:
  for name in (*_SYSTEM, *_TOOLS):
    if record.get(name):
      raise RecordError(
        f'the key {name!r} is for messages, and the line has a text: write it '
        'as "messages", or remove the key'
      )
  if 'text' in record:
    pieces: tuple[Piece, ...] = ((_string(record['text'], 'text'), True),)
  else:
    pieces = (
      (_string(record['prompt'], 'prompt'), False),
      (_string(record['completion'], 'completion'), True),
    )
  text = ''.join(x for x, scored in pieces if scored or score == 'all')
  return Prose(pieces) if text.strip() and _weight(record, _WEIGHTS) else None


def _chat(
  context: Sequence[Any],
  messages: Sequence[Any],
  record: Record,
  score: Score,
) -> Chat:
  """Returns a chat in which the messages of `context` are not in the loss."""
  pairs = [_message(message) for message in (*context, *messages)]
  pairs = [*_system(record, pairs[:1]), *pairs]
  first = len(pairs) - len(messages)
  is_learned = _weight(record, _WEIGHTS)
  scored = [
    is_learned
    and may_be
    and (score == 'all' or (i >= first and message['role'] == 'assistant'))
    for i, (message, may_be) in enumerate(pairs)
  ]
  known = tuple(message for message, _ in pairs)
  if score == 'last':
    last = max(
      (i for i, x in enumerate(known) if _is_learned(x, scored[i])), default=-1
    )
    scored = [i == last for i in range(len(scored))]
  return Chat(known, tuple(scored), _variables(record))


def _system(
  record: Record, first: Sequence[tuple[Message, bool]]
) -> list[tuple[Message, bool]]:
  """Returns the system message of the record's own key, if there is such a key.

  It comes with a flag that it may count in the loss. The result is empty if the
  first message is the same system message.
  """
  found = {name: record[name] for name in _SYSTEM if record.get(name)}
  for name, text in found.items():
    message = {'role': 'system', 'content': _string(text, name)}
    if not first or first[0][0]['role'] != 'system':
      return [(message, True)]
    if first[0][0]['content'] != text:
      raise RecordError(
        f'the key {name!r} and the first message are two different system '
        'messages: remove one of them'
      )
  return []


def _variables(record: Record) -> dict[str, Any]:
  """Returns a record's further variables for the template, such as tools."""
  found = dict(_decoded(record.get('chat_template_kwargs', {})))
  if record.get('documents'):
    found['documents'] = _list(record['documents'], 'documents')
  for name in _TOOLS:
    tools = _decoded(record.get(name) or [])
    tools = [tools] if isinstance(tools, dict) else _list(tools, name)
    if tools:
      found['tools'] = [_tool(_decoded(tool), name) for tool in tools]
  return found


def _tool(tool: Any, name: str) -> dict[str, Any]:
  """Returns a tool's description in the form of transformers' templates."""
  if not isinstance(tool, dict):
    raise RecordError(f'"{name}" must hold objects, got {tool!r:.40}')
  if 'function' in tool or 'name' not in tool:
    return tool
  return {'type': 'function', 'function': tool}


def _message(message: Any) -> tuple[Message, bool]:
  """Returns a message in transformers' form, and whether it may be in the loss.

  The message has 'role' and 'content'. Further keys are kept for the template.
  """
  if not isinstance(message, dict):
    raise TypeError(f'a message must be an object, got {message!r:.40}')
  message = _present(message)
  _check_keys(message)
  is_learned = _weight(message, _MESSAGE_WEIGHTS)
  given = _string(message['role' if 'role' in message else 'from'], 'role')
  role = _ROLES.get(given.strip().lower())
  if role is None:
    raise RecordError(
      f'the role {given!r} is unknown, the known ones are '
      f'{", ".join(_ROLES)}: rename it'
    )
  calls = _calls(message)
  content = message.get('content', message.get('value'))
  if role == 'call':
    role = 'assistant'
    calls = _called(content)
    content = ''
  if content is None and not calls:
    raise KeyError('content')
  rest = {'from', 'value', 'function_call', 'tool_calls', *_MESSAGE_WEIGHTS}
  kept = {name: x for name, x in message.items() if name not in rest}
  kept |= {'role': role, 'content': _content(content or '')}
  return (kept | {'tool_calls': calls} if calls else kept), is_learned


def _calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns a message's tool calls in the form of transformers' templates."""
  found = message.get('tool_calls') or message.get('function_call') or []
  return _called(found) if found else []


def _called(value: Any) -> list[dict[str, Any]]:
  """Returns tool calls that are given as objects or as JSON, as a list."""
  found = _decoded(value)
  found = found if isinstance(found, list) else [found]
  return [_call(_decoded(call)) for call in found]


def _call(call: Any) -> dict[str, Any]:
  """Returns a tool call whose arguments are an object, not JSON."""
  function = call.get('function', call) if isinstance(call, dict) else call
  if not isinstance(function, dict) or 'name' not in function:
    raise RecordError(
      'a call must be an object of "name" and "arguments", got '
      f'{call!r:.60}: correct it'
    )
  arguments = _decoded(function.get('arguments') or {})
  if not isinstance(arguments, dict):
    raise RecordError(
      f'the arguments of {function["name"]!r} must be a JSON object, got '
      f'{arguments!r:.60}: correct them'
    )
  known = {'name': function['name'], 'arguments': arguments}
  rest = {name: call[name] for name in ('id',) if call.get(name)}
  return {**rest, 'type': 'function', 'function': known}


def _content(content: Any) -> str:
  """Returns the text of a message. It may be given as a list of parts."""
  if not isinstance(content, list):
    return _string(content, 'content')
  texts = []
  for part in content:
    part = {'type': 'text', 'text': part} if isinstance(part, str) else part
    kind = part.get('type')
    if kind not in ('text', 'input_text', 'output_text'):
      raise RecordError(
        f'a part of the content has the type {kind!r}, which a language model '
        'does not read: remove it'
      )
    texts.append(_string(part['text'], 'text'))
  return ''.join(texts)


def _decoded(value: Any) -> Any:
  """Parses a string that is a JSON list or object; returns others unchanged."""
  if isinstance(value, str) and value.lstrip()[:1] in ('[', '{'):
    try:
      return parse_json(value)
    except ValueError:
      return value
  return value


def _list(value: Any, name: str) -> list[Any]:
  found = _decoded(value)
  if not isinstance(found, list):
    raise TypeError(f'{name} must be a list, got {type(value).__name__}')
  return found


def _string(value: Any, name: str) -> str:
  if not isinstance(value, str):
    raise TypeError(f'"{name}" must be a string, got {value!r:.40}')
  found = RESERVED.search(value)
  if found:
    raise RecordError(
      f'"{name}" has U+{ord(found[0]):04X}, which is not a character: remove it'
    )
  return value


def keys_of_messages(chat: Chat) -> Iterable[str]:
  """Yields the keys of messages that have an effect only in a template."""
  for message in chat.messages:
    yield from message.keys() - {'role', 'content', 'tool_calls'}
