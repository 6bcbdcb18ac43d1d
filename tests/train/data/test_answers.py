"""Tests where answers begin and end in the text of a chat template."""

import datetime
import json

import pytest

from tests.train.data.tiny import (
  CHATML,
  DATED,
  SPECIALS,
  THINK_OR_NOT,
  TOOLS,
  VICUNA,
)
from train.data.template import ChatTemplate, with_defaults, with_end

QUESTION = {'role': 'user', 'content': 'Two and two?'}
ANSWER = {'role': 'assistant', 'content': 'Four.'}
TURNS = (QUESTION, ANSWER, QUESTION, {**ANSWER, 'content': 'Still four.'})
SCORED = (False, True, False, True)
CALL = {
  'role': 'assistant',
  'content': '',
  'tool_calls': [
    {'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 'b c'}}}
  ],
}
RESULT = {'role': 'tool', 'content': '4'}
TOOL = {'type': 'function', 'function': {'name': 'add', 'parameters': {}}}
EMPTY_THOUGHT = '<think>\n\n</think>\n\n'


def template(source, specials=SPECIALS, **options):
  return ChatTemplate(source, {'eos_token': specials[0]}, specials, **options)


def scored_texts(found, messages, scored, context=None):
  """Returns the scored text of each answer.

  Also asserts that each answer starts after its generation prompt, unless
  `answer.prompt` reports a difference.
  """
  text, answers = found.answers(messages, scored, context)
  for answer in answers:
    prompt = found.render(
      messages[: answer.message], add_generation_prompt=True, context=context
    )
    starts = text[: answer.start] == prompt
    assert starts == (answer.prompt is None)
  pieces = found.pieces(messages, scored, context)
  assert ''.join(text for text, _ in pieces) == text
  return [text for text, scored in pieces if scored]


class TestThoughts:
  """Templates like Qwen3's, which add a thought only to the last answer."""

  def test_a_block_behind_the_prompt_is_scored(self):
    found = template(THINK_OR_NOT)
    assert scored_texts(found, TURNS, SCORED) == [
      'Four.<|im_end|>',
      EMPTY_THOUGHT + 'Still four.<|im_end|>',
    ]

  def test_or_it_is_part_of_the_prompt_in_sampling_too(self):
    variables = {'enable_thinking': False}
    found = template(with_defaults(THINK_OR_NOT, variables))
    assert found.generation_prompt.endswith(EMPTY_THOUGHT)
    only_last = (False, False, False, True)
    assert scored_texts(found, TURNS, only_last) == ['Still four.<|im_end|>']

  def test_a_difference_is_reported(self):
    found = template(with_defaults(THINK_OR_NOT, {'enable_thinking': False}))
    # The first answer is in the middle of its chat, so it has no empty thought.
    first, last = found.answers(TURNS, SCORED)[1]
    assert first.prompt == '<|im_start|>assistant\n' + EMPTY_THOUGHT
    assert last.prompt is None
    thought = {**ANSWER, 'content': '<think>\nHm.\n</think>\n\nFour.'}
    text, (only,) = found.answers((QUESTION, thought), (False, True))
    assert only.prompt is not None
    assert text[only.start : only.stop] == 'Hm.\n</think>\n\nFour.<|im_end|>'

  def test_thoughts_beside_the_content(self):
    source = CHATML.replace(
      "message['content']",
      "('<t>' + message.reasoning_content + '</t>' if message.reasoning_content"
      " and loop.last else '') + message['content']",
    )
    found = template(source)
    answer = {**ANSWER, 'reasoning_content': 'Hm.'}
    assert scored_texts(found, (QUESTION, answer), (False, True)) == [
      '<t>Hm.</t>Four.<|im_end|>'
    ]
    # The template leaves out the thoughts of all answers but the last.
    with pytest.raises(ValueError, match='rewrites message 2 of 4'):
      found.answers((QUESTION, answer, *TURNS[2:]), SCORED)

  def test_a_thought_that_is_always_left_out(self):
    source = CHATML.replace(
      "message['content']", "message['content'].split('</think>')[-1]"
    )
    answer = {**ANSWER, 'content': '<think>Hm.</think>Four.'}
    _, (found,) = template(source).answers((QUESTION, answer), (False, True))
    assert not found.is_whole


class TestEnds:
  def test_an_end_is_added_where_there_is_none(self):
    plain = template(VICUNA)
    assert not plain.has_end and plain.ends == ()
    found = template(with_end(VICUNA, SPECIALS[0]))
    assert (found.end_of_turn, found.added_end) == (SPECIALS[0], SPECIALS[0])
    assert scored_texts(found, TURNS, SCORED) == [
      f' Four.{SPECIALS[0]}',
      f' Still four.{SPECIALS[0]}',
    ]

  @pytest.mark.parametrize('end', ['</s>', 'a"b\\', '\u00e9\n'])
  def test_an_end_of_any_characters(self, end):
    found = template(with_end(VICUNA, end), (end,))
    assert found.added_end == end
    assert (
      found.render(TURNS[:2]) == f'USER: Two and two? ASSISTANT: Four.{end} '
    )

  def test_plain_text_before_the_end_is_scored(self):
    source = CHATML.replace(
      "message['content'] + '", "message['content'] + '\\n[/end]"
    )
    assert scored_texts(template(source), TURNS[:2], SCORED[:2]) == [
      'Four.\n[/end]<|im_end|>'
    ]

  def test_a_header_of_the_next_turn_is_no_end(self):
    source = (
      "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
      '{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}'
    )
    specials = ('</s>', '<|user|>', '<|assistant|>')
    assert not template(source, specials).has_end
    found = template(with_end(source, '</s>'), specials)
    assert scored_texts(found, TURNS, SCORED) == [
      'Four.</s>',
      'Still four.</s>',
    ]

  def test_a_token_inside_an_answer_does_not_end_it(self):
    source = CHATML.replace(
      "message['content'] + '<|im_end|>'",
      "('<|a|>think<|z|><|a|>' if message.role == 'assistant' else '') + "
      "message['content'] + '<|z|>reply<|im_end|>'",
    )
    found = template(source, (*SPECIALS, '<|a|>', '<|z|>'))
    assert found.ends == ('<|im_end|>',)
    assert scored_texts(found, TURNS[:2], SCORED[:2]) == [
      '<|a|>think<|z|><|a|>Four.<|z|>reply<|im_end|>'
    ]

  def test_special_tokens_lead_up_to_eos(self):
    source = CHATML.replace("'<|im_end|>'", "'<|z|><|eos|>'")
    found = template(source, ('<|eos|>', '<|z|>', '<|im_start|>'))
    assert found.end_of_turn == '<|eos|>'
    assert scored_texts(found, TURNS[:2], SCORED[:2]) == ['Four.<|z|><|eos|>']

  def test_another_end_in_the_middle_of_a_chat(self):
    """As in gpt-oss, only the last answer ends with the stop token."""
    source = CHATML.replace(
      "'<|im_end|>'", "('<|return|>' if loop.last else '<|im_end|>')"
    )
    found = template(source, (*SPECIALS, '<|return|>'))
    text, answers = found.answers(TURNS, SCORED)
    assert found.ends == ('<|return|>',)
    assert [answer.end for answer in answers] == ['<|im_end|>', '<|return|>']
    assert [text[x.start : x.stop] for x in answers] == [
      'Four.<|im_end|>',
      'Still four.<|return|>',
    ]

  def test_an_end_behind_a_block_of_generation(self):
    source = (
      "{% for m in messages %}{% if m.role == 'assistant' %}"
      '{% generation %}<|im_start|>assistant\n{{ m.content }}'
      '{% endgeneration %}<|im_end|>{% else %}<|im_start|>user\n'
      '{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}'
      '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
    )
    # The block begins inside the generation prompt, and ends before the end
    # token.
    assert scored_texts(template(source), TURNS, SCORED) == [
      'Four.<|im_end|>',
      'Still four.<|im_end|>',
    ]

  def test_a_block_without_special_tokens(self):
    source = (
      "{% for m in messages %}{% if m.role == 'assistant' %}"
      '{% generation %}<a>{{ m.content }}</a>{% endgeneration %}{% else %}'
      '<u>{{ m.content }}</u>{% endif %}{% endfor %}'
      '{% if add_generation_prompt %}<a>{% endif %}'
    )
    found = ChatTemplate(source, {}, ())
    assert scored_texts(found, TURNS, SCORED) == [
      'Four.</a>',
      'Still four.</a>',
    ]


class TestCalls:
  @pytest.mark.parametrize(
    ('content', 'arguments'),
    [
      ('{{ m.content }}', 'c.function.arguments | tojson'),
      ("{{ '' if m.content is none else 1 / 0 }}", 'c.function.arguments["a"]'),
      (
        "{{ '' if m.content is not defined else 1 / 0 }}",
        'c.function | tojson',
      ),
      ("{{ m.content + '' }}", "c.function.arguments + ''"),
      ('', 'c.function.arguments'),
    ],
  )
  def test_forms_of_messages(self, content, arguments):
    """Templates expect content and arguments in different forms."""
    source = (
      "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
      '{% if m.tool_calls %}' + content + '{% for c in m.tool_calls %}'
      '[{{ c.function.name }} {{ ' + arguments + ' }}]{% endfor %}'
      '{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}'
      '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
    )
    turns = (QUESTION, CALL, RESULT, ANSWER)
    call, answer = scored_texts(template(source), turns, SCORED)
    assert call.startswith('[add ') and call.endswith(']<|im_end|>')
    assert 'b c' in call and "'a'" not in call
    assert answer == 'Four.<|im_end|>'

  def test_a_template_that_refuses_to_be_without_tools(self):
    source = TOOLS.replace('{%- if tools %}', '').replace(
      '<|im_end|>\n{% endif %}', '<|im_end|>\n'
    )
    found = template(source)
    with pytest.raises(ValueError, match='refuses messages of the roles user'):
      found.render(TURNS)
    assert found.ends == ('<|im_end|>',)

  def test_calls_and_tools(self):
    found = template(TOOLS)
    context = {'tools': [TOOL]}
    turns = (QUESTION, CALL, RESULT, ANSWER)
    text = found.render(turns, context=context)
    assert f'Tools: {json.dumps(TOOL)}<|im_end|>' in text
    assert scored_texts(found, turns, SCORED, context) == [
      '<tool_call>{"name": "add", "arguments": {"a": "b c"}}</tool_call>'
      '<|im_end|>',
      'Four.<|im_end|>',
    ]

  def test_an_end_of_calls_of_its_own(self):
    source = TOOLS.replace(
      '<|im_end|>\n{% endfor %}',
      "{{ '<|call|>' if m.tool_calls else '<|im_end|>' }}\n{% endfor %}",
    )
    found = template(source, (*SPECIALS, '<|call|>', '</tool_call>'))
    assert found.ends == ('<|im_end|>', '<|call|>')
    call, _ = scored_texts(found, (QUESTION, CALL, RESULT, ANSWER), SCORED)
    assert call.endswith('</tool_call><|call|>')

  def test_a_call_without_an_end(self):
    source = TOOLS.replace('</tool_call>', '}}').replace(
      '<|im_end|>\n{% endfor %}', '\n{% endfor %}'
    )
    found = template(source, SPECIALS)
    _, answers = found.answers((QUESTION, CALL), (False, True))
    assert answers[0].end is None
    (said,) = scored_texts(found, (QUESTION, CALL), (False, True))
    assert said.endswith('"arguments": {"a": "b c"}}}}')

  @pytest.mark.parametrize('scored', [True, False])
  def test_a_template_without_calls_is_an_error(self, scored):
    with pytest.raises(
      ValueError, match=r"leaves out the call of 'add' in message 2: name"
    ):
      template(CHATML).answers((QUESTION, CALL), (False, scored))

  def test_a_template_without_tools_is_an_error(self):
    found, context = template(CHATML), {'tools': [TOOL]}
    with pytest.raises(ValueError, match="does not read 'tools', which would"):
      found.render(TURNS, context=context)
    with pytest.raises(ValueError, match="does not read 'tools', which would"):
      found.answers(TURNS, SCORED, context)

  def test_thoughts_before_a_call_in_the_middle(self):
    """The last turn of a tool's loop is rendered in another way."""
    source = TOOLS.replace(
      '{{ m.content }}',
      "{{ '<think></think>' if loop.last and m.role == 'assistant' else '' }}"
      '{{ m.content }}',
    )
    found = template(source, (*SPECIALS, '<think>', '</think>'))
    turns = (QUESTION, CALL, RESULT, ANSWER)
    assert scored_texts(found, turns, SCORED) == [
      '<tool_call>{"name": "add", "arguments": {"a": "b c"}}</tool_call>'
      '<|im_end|>',
      '<think></think>Four.<|im_end|>',
    ]


class TestVariables:
  def test_defaults_are_part_of_the_template(self):
    values = {
      'a': False,
      'b': None,
      'c': 'x "%} {{ \\ \n\u00e9 \U0001f600',
      'd': [1, {'e': 2.5}],
    }
    source = with_defaults('\n  {{ [a, b, c, d] | tojson }}', values)
    found = template(source)
    expected = json.dumps([*values.values()], ensure_ascii=False)
    assert found.render([]) == f'\n  {expected}'
    given = found.render([], context={'a': True})
    assert given.startswith('\n  [true, null')

  def test_a_variable_that_is_not_read_is_an_error(self):
    found = template(THINK_OR_NOT)
    with pytest.raises(
      ValueError, match=r"'enable_thinkin'.* \(it reads .*enable_thinking"
    ):
      found.check_defaults(['enable_thinkin'])
    with pytest.raises(ValueError, match="'messages' is always set"):
      found.check_defaults(['messages'])
    found.check_defaults(['enable_thinking'])

  def test_a_macro_reads_a_default(self):
    source = '{%- macro f() %}{{ x }}{% endmacro %}{{ f() }}'
    assert template(with_defaults(source, {'x': 3})).render([]) == '3'


class TestClock:
  def test_one_time_in_every_rendering(self):
    found = template(DATED)
    assert found.render(TURNS) == found.render(TURNS)
    assert scored_texts(found, TURNS, SCORED) == [
      'Four.<|im_end|>',
      'Still four.<|im_end|>',
    ]

  def test_a_time_that_is_given(self):
    clock = datetime.datetime(2026, 1, 2, 3, 4, 5)
    found = template(DATED, clock=clock)
    assert 'Today: 02 Jan 2026 03:04:05.000000' in found.render(TURNS)
    assert found.is_settled and not template(DATED).is_settled

  @pytest.mark.parametrize('source', ["{{ ['a'] | random }}", '{{ lipsum() }}'])
  def test_a_template_of_chance_is_an_error(self, source):
    with pytest.raises(ValueError, match=r'the chat template (is no|refuses)'):
      template(source).render(TURNS)
