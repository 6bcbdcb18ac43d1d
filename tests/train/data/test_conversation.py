"""Tests how records of public chat data sets become scored messages."""

import json

import pytest

from train.data.conversation import Chat, Prose, parse_record, unread_keys

QUESTION = {'role': 'user', 'content': 'Who?'}
ANSWER = {'role': 'assistant', 'content': 'The fox.'}
ADD = {'name': 'add', 'arguments': {'a': 1}}
CALL = {'type': 'function', 'function': ADD}
TOOL = {'name': 'add', 'parameters': {'type': 'object', 'properties': {}}}


def said(record, score='answers'):
  """Returns (role, content, whether it is scored) of each message."""
  chat = parse_record(record, score)
  return [
    (message['role'], message['content'], scored)
    for message, scored in zip(chat.messages, chat.scored, strict=True)
  ]


EXPECTED = [('user', 'Who?', False), ('assistant', 'The fox.', True)]


@pytest.mark.parametrize('key', ['role', 'from'])
@pytest.mark.parametrize('content', ['content', 'value'])
@pytest.mark.parametrize(
  ('question', 'answer'),
  [
    ('user', 'assistant'),
    ('human', 'gpt'),
    ('User', 'Assistant'),
    ('HUMAN', 'ChatGPT'),
    ('user', 'model'),
    ('prompter', 'bard'),
    ('user', 'bing'),
    ('USER', 'CHATBOT'),
    ('Human ', 'AI'),
  ],
)
def test_roles_have_many_names(key, content, question, answer):
  turns = [{key: question, content: 'Who?'}, {key: answer, content: 'The fox.'}]
  for form in ('messages', 'conversations', 'conversation'):
    assert said({form: turns}) == EXPECTED


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    *(('system', 'system'), ('developer', 'system'), ('tool', 'tool')),
    *(('function', 'tool'), ('observation', 'tool'), ('ipython', 'tool')),
  ],
)
def test_other_roles(name, expected):
  turns = [{'role': name, 'content': 'x'}, QUESTION, ANSWER]
  assert said({'messages': turns})[0] == (expected, 'x', False)


def test_an_unknown_role_is_an_error():
  turns = [{'role': 'narrator', 'content': 'Once.'}, ANSWER]
  with pytest.raises(ValueError, match="the role 'narrator' is unknown, the "):
    parse_record({'messages': turns})


def test_a_system_message_beside_the_others():
  first = ('system', 'Be brief.', False)
  for name in ('system', 'system_prompt'):
    record = {name: 'Be brief.', 'messages': [QUESTION, ANSWER]}
    assert said(record) == [first, *EXPECTED]
  both = [{'role': 'system', 'content': 'Be brief.'}, QUESTION, ANSWER]
  assert said({'system': 'Be brief.', 'messages': both}) == [first, *EXPECTED]
  assert said({'system': '', 'messages': [QUESTION, ANSWER]}) == EXPECTED
  with pytest.raises(ValueError, match=r"'system' .* two different system"):
    parse_record({'system': 'Rhyme.', 'messages': both})
  for form in ({'text': 'a'}, {'prompt': 'a', 'completion': 'b'}):
    with pytest.raises(ValueError, match="'system' is for messages"):
      parse_record({'system': 'Rhyme.', **form})


@pytest.mark.parametrize(
  'tools',
  [
    [{'type': 'function', 'function': TOOL}],
    [TOOL],
    TOOL,
    json.dumps([TOOL]),
    json.dumps(TOOL),
    [json.dumps(TOOL)],
  ],
)
@pytest.mark.parametrize('name', ['tools', 'functions'])
def test_tools_reach_the_template(name, tools):
  chat = parse_record({name: tools, 'messages': [QUESTION, ANSWER]})
  assert chat.context == {'tools': [{'type': 'function', 'function': TOOL}]}


@pytest.mark.parametrize('tools', [None, [], '', '[]'])
def test_no_tools(tools):
  chat = parse_record({'tools': tools, 'messages': [QUESTION, ANSWER]})
  assert chat.context == {}


@pytest.mark.parametrize(
  'call',
  [
    {'role': 'assistant', 'content': '', 'tool_calls': [CALL]},
    {'role': 'assistant', 'content': None, 'tool_calls': [CALL]},
    {'role': 'assistant', 'tool_calls': [ADD]},
    {'role': 'assistant', 'tool_calls': json.dumps([CALL])},
    {
      'role': 'assistant',
      'tool_calls': [{'function': {'name': 'add', 'arguments': '{"a": 1}'}}],
    },
    {'role': 'assistant', 'function_call': ADD},
    {'role': 'assistant', 'content': None, 'function_call': json.dumps(ADD)},
    {'from': 'function_call', 'value': json.dumps(ADD)},
    {'role': 'tool_call', 'content': json.dumps([ADD])},
  ],
)
def test_a_call_is_an_answer(call):
  result = {'role': 'tool', 'content': '2', 'tool_call_id': 'x'}
  chat = parse_record({'messages': [QUESTION, call, result, ANSWER]})
  assert chat.scored == (False, True, False, True)
  assert chat.messages[1] == {
    **{'role': 'assistant', 'content': ''},
    'tool_calls': [CALL],
  }
  assert chat.messages[2] == result
  # A record whose only answer is a tool call is kept.
  assert parse_record({'messages': [QUESTION, call]}) is not None


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    ({'from': 'function_call', 'value': 'add(1)'}, 'a call must be an object'),
    ({'role': 'assistant', 'tool_calls': [{}]}, 'a call must be an object'),
    (
      {'role': 'assistant', 'tool_calls': [{**ADD, 'arguments': '{"a": '}]},
      "the arguments of 'add' must be a JSON object, got '{\"a\": '",
    ),
  ],
)
def test_a_broken_call_is_an_error(call, message):
  with pytest.raises(ValueError, match=message):
    parse_record({'messages': [QUESTION, call]})


def test_further_keys_of_messages_are_the_templates():
  answer = {**ANSWER, 'reasoning_content': 'Hm.', 'name': None}
  chat = parse_record({'messages': [QUESTION, answer]})
  assert chat.messages[1] == {**ANSWER, 'reasoning_content': 'Hm.'}


@pytest.mark.parametrize('key', ['weight', 'train', 'trainable', 'loss'])
@pytest.mark.parametrize('no', [0, False, 0.0])
def test_a_message_of_weight_zero_is_not_scored(key, no):
  bad = {**ANSWER, key: no}
  good = {**ANSWER, key: 1}
  chat = parse_record({'messages': [QUESTION, bad, QUESTION, good]})
  assert chat.scored == (False, False, False, True)
  assert chat.messages[1] == ANSWER
  assert parse_record({'messages': [QUESTION, bad]}) is None
  everything = parse_record({'messages': [QUESTION, bad]}, 'all')
  assert everything.scored == (True, False)


@pytest.mark.parametrize('key', ['weight', 'train'])
def test_a_line_of_weight_zero_is_left_out(key):
  for form in ({'messages': [QUESTION, ANSWER]}, {'text': 'a'}):
    assert parse_record({**form, key: 0}) is None
    assert parse_record({**form, key: True}) is not None
    with pytest.raises(ValueError, match=f'"{key}" must be 0 or 1.*got 0.5'):
      parse_record({**form, key: 0.5})


@pytest.mark.parametrize(
  'key',
  [
    *('label', 'chosen', 'rejected', 'kto_tag', 'rejected_response'),
    *('preferred_output', 'non_preferred_output', 'score_chosen', 'labels'),
  ],
)
@pytest.mark.parametrize('value', [False, True, 'x', [], {}])
def test_a_key_of_preferences_is_an_error(key, value):
  record = {'messages': [QUESTION, ANSWER]}
  assert parse_record({**record, key: None}) is not None
  with pytest.raises(ValueError, match=f'the key {key!r} is of preference'):
    parse_record({**record, key: value})
  with pytest.raises(ValueError, match=f'the key {key!r} is of preference'):
    parse_record({'messages': [QUESTION, {**ANSWER, key: value}]})


@pytest.mark.parametrize('key', ['training_detail', 'loss_mask'])
def test_a_loss_of_parts_is_an_error(key):
  with pytest.raises(ValueError, match=f'the key {key!r} scores parts'):
    parse_record({'messages': [QUESTION, {**ANSWER, key: [1]}]})


def test_media_are_an_error():
  record = {'messages': [QUESTION, ANSWER]}
  assert parse_record({**record, 'images': []}) is not None
  with pytest.raises(ValueError, match="the key 'images' is for"):
    parse_record({**record, 'images': ['a.png']})
  parts = [{'type': 'image', 'url': 'a.png'}, {'type': 'text', 'text': 'Who?'}]
  with pytest.raises(ValueError, match="has the type 'image', which"):
    parse_record({'messages': [{**QUESTION, 'content': parts}, ANSWER]})


@pytest.mark.parametrize('code', ['\ufdd0', '\ufddb', '\ufde1'])
def test_a_code_point_that_is_not_a_character_is_an_error(code):
  # These characters are marks, by which answers are found in a rendered chat.
  answer = {**ANSWER, 'content': f'a{code}b'}
  with pytest.raises(ValueError, match=rf'has U\+{ord(code):X}, which is not'):
    parse_record({'messages': [QUESTION, answer]})


def test_texts_in_parts_are_joined():
  parts = [{'type': 'text', 'text': 'Wh'}, {'type': 'input_text', 'text': 'o?'}]
  asked = {'role': 'user', 'content': parts}
  assert said({'messages': [asked, ANSWER]}) == EXPECTED


def test_alpaca_is_a_question_and_an_answer():
  record = {'instruction': 'Who?', 'input': '', 'output': 'The fox.'}
  assert said(record) == EXPECTED
  assert said({**record, 'input': None, 'text': 'all of it'}) == EXPECTED
  assert said({**record, 'input': 'A riddle.'})[0][1] == 'Who?\nA riddle.'
  history = [['Hello.', 'Hi.']]
  assert said({**record, 'history': history, 'system': 'Be brief.'}) == [
    ('system', 'Be brief.', False),
    ('user', 'Hello.', False),
    ('assistant', 'Hi.', True),
    *EXPECTED,
  ]


def test_a_null_field_is_an_absent_one():
  turns = [{**QUESTION, 'tool_calls': None}, {**ANSWER, 'tool_calls': None}]
  expected = Chat((QUESTION, ANSWER), (False, True))
  record = {'messages': turns, 'prompt': None, 'text': None, 'label': None}
  assert parse_record(record) == expected
  found = parse_record({'messages': None, 'prompt': 'a', 'completion': ' b'})
  assert found == Prose((('a', False), (' b', True)))


def test_only_the_last_answer_is_scored():
  turns = [QUESTION, ANSWER, QUESTION, ANSWER, QUESTION]
  chat = parse_record({'messages': turns}, 'last')
  assert chat.scored == (False, False, False, True, False)
  turns[3] = {**ANSWER, 'weight': 0}
  chat = parse_record({'messages': turns}, 'last')
  assert chat.scored == (False, True, False, False, False)


def test_messages_may_be_json():
  turns = json.dumps([QUESTION, ANSWER])
  assert said({'messages': turns}) == EXPECTED
  # A prompt that looks like a JSON list of numbers is a text.
  found = parse_record({'prompt': '[3, 1]', 'completion': '[1, 3]'})
  assert found == Prose((('[3, 1]', False), ('[1, 3]', True)))


def test_variables_of_a_line():
  record = {
    'messages': [QUESTION, ANSWER],
    'chat_template_kwargs': {'enable_thinking': False},
    'documents': [{'text': 'a'}],
  }
  assert parse_record(record).context == {
    'enable_thinking': False,
    'documents': [{'text': 'a'}],
  }


def test_keys_that_are_not_read():
  record = {'messages': [], 'prompt': 'a', 'prompt_id': 3, 'source': None}
  assert unread_keys(record) == ['prompt', 'prompt_id']
  record = {'instruction': 'a', 'input': '', 'output': 'b', 'text': 'c'}
  assert unread_keys(record) == ['text']
