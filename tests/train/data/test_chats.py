import datetime
import gzip
import itertools
import json
import re

import numpy as np
import pytest
from rich.console import Console

from tests.train.data.tiny import (
  CHAT,
  CHATML,
  DATED,
  GENERATION,
  LLAMA3,
  LLAMA3_SPECIALS,
  MISTRAL,
  MISTRAL_SPECIALS,
  QWEN,
  SPECIALS,
  TEXT,
  THINK,
  THINK_OR_NOT,
  TOOLS,
  VICUNA,
  write,
)
from train.data.batches import batches, shown, validation_batches
from train.data.chats import (
  PLAIN,
  Chat,
  Chats,
  ChitchatAnswers,
  Prose,
  Tally,
  parse_line,
  template_of,
)
from train.data.corpus import Chitchat
from train.data.template import ChatTemplate
from train.data.tokenizer import load, train_tokenizer

SCORED = tuple(message['role'] == 'assistant' for message in CHAT)

# Template, special tokens, and the token that ends an answer.
TEMPLATES = {
  'chatml': (CHATML, SPECIALS, '<|im_end|>'),
  'generation': (GENERATION, SPECIALS, '<|im_end|>'),
  'qwen': (QWEN, SPECIALS, '<|im_end|>'),
  'llama3': (LLAMA3, LLAMA3_SPECIALS, '<|eot_id|>'),
  'mistral': (MISTRAL, MISTRAL_SPECIALS, '</s>'),
  'plain': (PLAIN, MISTRAL_SPECIALS, '</s>'),
}


def make(name, tmp_path):
  """Returns a tokenizer with this template and its BOS and EOS."""
  template, specials, _ = TEMPLATES[name]
  settings = {'bos_token': specials[0], 'eos_token': specials[1]}
  return load(write(tmp_path, template, settings, specials))


def messages_of(name):
  return CHAT[1:] if name == 'mistral' else CHAT


def lines(path, records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return str(path)


def chats_file(tmp_path, number=60):
  """Writes chats of many lengths, each with another answer."""
  return lines(
    tmp_path / 'chats.jsonl',
    [
      {
        'messages': [
          {'role': 'user', 'content': f'Question {i}? ' + i % 7 * 'Why? '},
          {'role': 'assistant', 'content': f'Answer {i}.' + i % 5 * ' So.'},
        ]
      }
      for i in range(number)
    ],
  )


class TestTemplate:
  @pytest.mark.parametrize('name', TEMPLATES)
  def test_scored_are_the_answers_and_their_ends(self, tmp_path, name):
    tokenizer = make(name, tmp_path)
    messages = messages_of(name)
    pieces = tokenizer.chat_template.pieces(messages, SCORED[-len(messages) :])
    assert ''.join(text for text, _ in pieces) == (
      tokenizer.chat_template.render(messages)
    )
    end = TEMPLATES[name][2]
    # The prompt of the plain template ends before the space of an answer.
    before = ' ' if name == 'plain' else ''
    assert [text for text, scored in pieces if scored] == [
      before + message['content'] + end
      for message in messages
      if message['role'] == 'assistant'
    ]
    assert tokenizer.chat_template.end_of_turn == end
    assert tokenizer.specials[end] in tokenizer.stop_ids

  @pytest.mark.parametrize('name', TEMPLATES)
  def test_scored_tokens_say_the_same(self, tmp_path, name):
    tokenizer = make(name, tmp_path)
    messages = messages_of(name)
    template = tokenizer.chat_template
    pieces = template.pieces(messages, SCORED[-len(messages) :])
    ids_n, scored_n = tokenizer.encode_pieces(pieces)
    np.testing.assert_array_equal(
      ids_n, tokenizer.encode(template.render(messages), special=True)
    )
    said = tokenizer.decode(ids_n[scored_n])
    # A token that spans two pieces is scored, so a space in front may be
    # included.
    assert said.replace(' ', '') == ''.join(
      message['content']
      for message in messages
      if message['role'] == 'assistant'
    ).replace(' ', '')
    end = tokenizer.specials[TEMPLATES[name][2]]
    assert list(ids_n[scored_n]).count(end) == 2

  def test_an_answer_that_the_question_repeats(self, tmp_path):
    template = make('chatml', tmp_path).chat_template
    messages = [
      {'role': 'user', 'content': 'assistant\nyes'},
      {'role': 'assistant', 'content': 'yes'},
      {'role': 'user', 'content': 'yes'},
      {'role': 'assistant', 'content': ' yes\n'},
    ]
    pieces = template.pieces(messages, (False, True, False, True))
    assert [text for text, scored in pieces if scored] == [
      'yes<|im_end|>',
      ' yes\n<|im_end|>',
    ]
    only_last = template.pieces(messages, (False, False, False, True))
    assert len([text for text, scored in only_last if scored]) == 1

  def test_white_space_that_a_template_strips(self, tmp_path):
    template = make('llama3', tmp_path).chat_template
    messages = [{'role': 'assistant', 'content': ' \n yes \n'}]
    *_, last = template.pieces(messages, (True,))
    assert last == ('yes<|eot_id|>', True)

  def test_generation_marks_of_some_answers(self, tmp_path):
    template = make('generation', tmp_path).chat_template
    pieces = template.pieces(CHAT, (False, False, False, False, True))
    scored = [text for text, scored in pieces if scored]
    assert scored == [CHAT[-1]['content'] + '<|im_end|>']

  def test_a_template_that_takes_an_answer_apart(self):
    template = ChatTemplate(THINK, {}, SPECIALS)
    answer = '<think>\nhm\n</think>\n\nYes.'
    messages = [CHAT[1], {'role': 'assistant', 'content': answer}]
    pieces = template.pieces(messages, (False, True))
    assert pieces[1:] == [(answer + '<|im_end|>', True), ('\n', False)]
    with pytest.raises(ValueError, match='rewrites message 2 of 4, so that'):
      template.pieces(2 * messages, (False, True, False, True))
    # The last answer can be found.
    *_, last, _ = template.pieces(2 * messages, (False, False, False, True))
    assert last == (answer + '<|im_end|>', True)

  def test_a_template_that_reads_more_than_the_text(self):
    source = CHATML.replace("message['content']", "message['content'][:5]")
    template = ChatTemplate(source, {}, SPECIALS)
    pieces = template.pieces(CHAT[1:3], (False, True))
    assert pieces[1] == ('The q<|im_end|>', True)
    assert ''.join(text for text, _ in pieces) == template.render(CHAT[1:3])

  def test_what_a_template_may_use(self):
    source = (
      '{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}'
      "{{ m | tojson }}{% endfor %}{{ strftime_now('%Y') }}{{ eos_token }}"
    )
    template = ChatTemplate(source, {'eos_token': '</s>'}, ())
    found = template.render([{'role': '<user>', 'content': 'caf\u00e9'}] * 2)
    assert re.fullmatch(
      r'\{"role": "<user>", "content": "caf\u00e9"\}\d{4}</s>', found
    )

  @pytest.mark.parametrize(
    'source',
    [
      "{{ raise_exception('roles must alternate') }}",
      '{{ messages.__class__.__mro__ }}',
      '{{ messages.append(1) }}',
      '{{ nothing.at.all }}',
    ],
  )
  def test_a_template_that_fails_is_one_error(self, source):
    template = ChatTemplate(source, {}, ())
    with pytest.raises(ValueError, match='refuses messages of the roles user'):
      template.render([{'role': 'user', 'content': 'a'}])


class TestLines:
  @pytest.mark.parametrize(
    'record',
    [
      {'messages': list(CHAT)},
      {
        'conversations': [
          {'from': {'user': 'human', 'assistant': 'gpt'}.get(r, r), 'value': c}
          for r, c in (message.values() for message in CHAT)
        ]
      },
      {'conversations': list(CHAT)},
    ],
  )
  def test_conversations(self, record):
    chat = parse_line(json.dumps(record).encode())
    assert chat == Chat(CHAT, SCORED)

  def test_guanaco(self):
    text = '### Human: Who?### Assistant: The fox.\n### Human: And?'
    chat = parse_line(json.dumps({'text': text}).encode())
    assert [tuple(message.values()) for message in chat.messages] == [
      ('user', 'Who?'),
      ('assistant', 'The fox.'),
      ('user', 'And?'),
    ]
    assert chat.scored == (False, True, False)

  def test_prompt_and_completion(self):
    record = {'prompt': list(CHAT[:3]), 'completion': list(CHAT[3:])}
    chat = parse_line(json.dumps(record).encode())
    assert chat == Chat(CHAT, (False, False, False, False, True))
    record = {'prompt': '1 + 1 =', 'completion': ' 2'}
    prose = parse_line(json.dumps(record).encode())
    assert prose == Prose((('1 + 1 =', False), (' 2', True)))

  def test_nothing_to_learn(self):
    for record in (
      {'messages': list(CHAT[:2])},
      {'messages': [CHAT[0], {'role': 'assistant', 'content': ' '}]},
      {'prompt': 'a', 'completion': ''},
      {'text': ' '},
    ):
      assert parse_line(json.dumps(record).encode()) is None
    line = json.dumps({'messages': list(CHAT[:2])}).encode()
    assert parse_line(line, 'all') is not None

  @pytest.mark.parametrize(
    'line',
    [
      '{"body": "a"}',
      '{"prompt": "a"}',
      '{"prompt": "a", "completion": ["b"]}',
      '{"text": 1}',
      '{"messages": {"role": "user"}}',
      '{"messages": ["a"]}',
      '{"messages": [{"role": "user"}]}',
      '{"messages": [{"role": "user", "content": null}]}',
      '{"messages": [{"role": 1, "content": "a"}]}',
      '{"conversations": [{"from": "human"}]}',
    ],
  )
  def test_bad_line_is_named(self, tmp_path, line):
    path = lines(tmp_path / 'a.jsonl', [{'text': 'a'}, {'text': 'b'}])
    with open(path, 'a') as file:
      file.write('\n' + line)
    with pytest.raises(
      ValueError, match=r'a\.jsonl, line 4: a line must be .*correct or remove'
    ):
      Chats(path).open('train')

  @pytest.mark.parametrize(
    'line, reason',
    [
      ('{"messages": ', 'no JSON'),
      ('[1]', r'must be a JSON object, got \[1\]'),
      ('3', 'must be a JSON object, got 3'),
      (
        r'{"messages": [{"role": "assistant", "content": "\ud800"}]}',
        'a string has half a surrogate pair',
      ),
    ],
  )
  def test_a_line_that_is_no_object_is_named(self, tmp_path, line, reason):
    path = lines(tmp_path / 'a.jsonl', [{'text': 'a'}, {'text': 'b'}])
    with open(path, 'a') as file:
      file.write('\n' + line)
    with pytest.raises(
      ValueError, match=rf'a\.jsonl, line 4: {reason}.*: correct or remove it'
    ):
      Chats(path).open('train')


class TestCorpus:
  @pytest.mark.parametrize('name', ['a.json', 'a.jsonl.gz', 'a.csv'])
  def test_chats_in_other_files(self, tmp_path, name):
    path = tmp_path / name
    record = {'instruction': 'Who?', 'input': '', 'output': 'Me.'}
    if name == 'a.json':
      path.write_text(json.dumps([record], indent=1))
    elif name == 'a.csv':
      path.write_text('instruction,input,output\nWho?,,Me.\n')
    else:
      path.write_bytes(gzip.compress(json.dumps(record).encode()))
    (chat,) = Chats(str(path), str(path)).open('train').source
    assert list(chat.messages) == turns('Who?', 'Me.')
    assert chat.scored == (False, True)

  def test_no_line_has_an_answer(self, tmp_path):
    path = lines(tmp_path / 'a.jsonl', [{'messages': list(CHAT[:2])}])
    with pytest.raises(ValueError, match=r'no document .*of chats: with an'):
      Chats(path).open('train')

  def test_splits_are_disjoint_and_complete(self, tmp_path):
    path = chats_file(tmp_path)
    corpus = Chats(path, holdout=0.3)
    answers = [
      {item.messages[1]['content'] for item in corpus.open(split).source}
      for split in ('train', 'validation')
    ]
    assert not answers[0] & answers[1] and len(answers[0] | answers[1]) == 60
    assert len(Chats(path, path).open('validation').source) == 60

  def test_a_template_that_is_named(self, tmp_path):
    tokenizer = make('chatml', tmp_path)
    (tmp_path / 'a.jinja').write_text(MISTRAL)
    own, plain, named = (
      template_of(tokenizer, template).render(CHAT[1:3])
      for template in (None, 'plain', str(tmp_path / 'a.jinja'))
    )
    assert own.startswith('<|im_start|>user\n')
    assert plain.endswith(
      '### Human: Who jumps over the dog?\n'
      '### Assistant: The quick brown fox.<|im_start|>'
    )
    assert '[INST]' in named
    path = chats_file(tmp_path)
    assert Chats(path).open('train').templated(tokenizer) is tokenizer
    chats = Chats(path, template=str(tmp_path / 'a.jinja')).open('train')
    chats.templated(tokenizer).save(tmp_path)
    assert '[INST]' in load(tmp_path).chat_template.render(CHAT[1:3])
    with pytest.raises(FileNotFoundError, match=r"no chat template at 'none'"):
      Chats(path, template='none').open('train').templated(tokenizer)

  def test_texts_are_taken_as_they_stand(self, tmp_path):
    tokenizer = make('mistral', tmp_path)
    records = [
      {'prompt': 'The dog', 'completion': ' jumps'},
      {'text': TEXT},
      {'text': f'<s>{TEXT}</s>'},
    ]
    dialogues = Chats(
      lines(tmp_path / 'a.jsonl', records), str(tmp_path / 'a.jsonl')
    ).open('train')
    bos, eos = tokenizer.specials['<s>'], tokenizer.specials['</s>']
    tokenizer.bos_id = bos
    encode = dialogues.encoder(tokenizer)
    first, second, third = map(encode, dialogues.source)
    assert (first.ids_n[0], first.ids_n[-1]) == (bos, eos)
    assert tokenizer.decode(first.ids_n[first.scored_n]) == ' jumps'
    assert first.scored_n[-1]
    assert (first.bytes_n * first.scored_n).sum() == len(' jumps')
    np.testing.assert_array_equal(second.ids_n, third.ids_n)
    assert second.scored_n[1:].all()

  def test_a_chat_that_the_template_refuses_is_named(self, tmp_path):
    tokenizer = make('mistral', tmp_path)
    records = [{'messages': list(CHAT[1:3])}, {'messages': list(CHAT)}]
    path = lines(tmp_path / 'a.jsonl', records)
    dialogues = Chats(path, path).open('train')
    with pytest.raises(ValueError, match=r'a\.jsonl, line 2: .*alternate'):
      batches(dialogues, tokenizer, batch_size=1, sequence_length=8, seed=0)

  def test_chitchat_answers(self):
    whole = ChitchatAnswers(turns=10_000)
    train, validation = map(whole.open, ('train', 'validation'))
    held = list(Chitchat().open('validation').source)
    contents = [message['content'] for message in validation.source[0].messages]
    assert '\n'.join(contents) in held
    assert validation.source[1].scored[:3] == (False, True, False)
    # 3,150 dialogues have only one turn, so they have no answer.
    assert len(train.source) + len(validation.source) == 7168 - 3150
    assert validation.source.place(0).startswith('dialogue ')
    parts = ChitchatAnswers().open('validation').source
    assert max(len(part.messages) for part in parts) == 8
    # Both count the same answers: a part that is left out is a single question.
    answers = [
      sum(sum(chat.scored) for chat in s) for s in (parts, validation.source)
    ]
    assert answers[0] == answers[1]
    with pytest.raises(ValueError, match=r'turns must be even .* got 3'):
      ChitchatAnswers(turns=3).open('train')


def opened(tmp_path, own, records, **options):
  """Returns the chats of some records, and a run's tokenizer for them."""
  path = lines(tmp_path / 'a.jsonl', records)
  found = Chats(path, path, **options).open('train')
  return found, found.templated(load(write(tmp_path, own)))


def scored_text(found, tokenizer, i=0):
  """Returns the text of a chat that counts in the loss, with special tokens."""
  ids_n, scored_n, _ = found.encoder(tokenizer)(found.source[i])
  special = {i: text for text, i in tokenizer.specials.items()}
  return ''.join(
    special.get(int(x), tokenizer.decode([x])) for x in ids_n[scored_n]
  )


def turns(*contents):
  roles = itertools.cycle(('user', 'assistant'))
  return [
    {'role': role, 'content': content}
    for role, content in zip(roles, contents, strict=False)
  ]


BAD = {'role': 'assistant', 'content': 'never', 'weight': 0}


class TestRun:
  """The template that a run saves, and the warnings about it."""

  def test_variables_are_saved_with_the_template(self, tmp_path):
    messages = turns('one', 'two')
    variables = ('enable_thinking=false',)
    for options, prompt in (
      ({}, 'assistant\n'),
      ({'template_variables': variables}, '<think>\n\n</think>\n\n'),
    ):
      found, tokenizer = opened(
        tmp_path, THINK_OR_NOT, [{'messages': messages}], **options
      )
      tokenizer.save(tmp_path)
      template = load(tmp_path).chat_template
      text = template.render(turns('one'), add_generation_prompt=True)
      assert text.endswith(prompt)
      said = scored_text(found, tokenizer)
      assert text + said == template.render(messages).rstrip()
      assert found.check(tokenizer) == []

  def test_a_line_has_variables_of_its_own(self, tmp_path):
    records = [
      {'messages': turns('one', 'two'), 'chat_template_kwargs': kwargs}
      for kwargs in ({}, {'enable_thinking': False})
    ]
    found, tokenizer = opened(tmp_path, THINK_OR_NOT, records)
    assert scored_text(found, tokenizer) == (
      '<think>\n\n</think>\n\ntwo<|im_end|>'
    )
    assert scored_text(found, tokenizer, 1) == 'two<|im_end|>'

  @pytest.mark.parametrize('text', ['enable_thinking', '=1', '1a=2', ''])
  def test_a_variable_must_have_a_name_and_a_value(self, tmp_path, text):
    path = chats_file(tmp_path)
    with pytest.raises(ValueError, match=r'must be NAME=VALUE, such as .*got'):
      Chats(path, template_variables=(text,)).open('train')

  def test_a_variable_that_the_template_does_not_read(self, tmp_path):
    variables = {'template_variables': ('thinking=1',)}
    with pytest.raises(ValueError, match="does not read 'thinking'"):
      opened(tmp_path, CHATML, [{'text': 'a'}], **variables)

  def test_an_end_is_added_and_warned_of(self, tmp_path):
    records = [{'messages': turns('one', 'two', 'three', 'four')}]
    found, tokenizer = opened(tmp_path, VICUNA, records)
    assert scored_text(found, tokenizer) == (
      ' two<|endoftext|> four<|endoftext|>'
    )
    (warning,) = found.check(tokenizer)
    assert "would never stop: '<|endoftext|>' is added there and" in warning
    # When sampling, the end is also added to earlier answers of the chat.
    text = tokenizer.chat_template.render(
      turns('one', 'two', 'three'), add_generation_prompt=True
    )
    assert text.startswith('USER: one ASSISTANT: two<|endoftext|> USER: three ')

  def test_the_clock_is_saved(self, tmp_path):
    path = lines(tmp_path / 'a.jsonl', [{'messages': turns('one', 'two')}])
    found = Chats(path, path).open('train')
    clock = datetime.datetime(2026, 1, 2, 3, 4, 5)
    tokenizer = found.templated(load(write(tmp_path, DATED)), clock)
    tokenizer.save(tmp_path)
    again = load(tmp_path)
    text = again.chat_template.render(turns('one'))
    assert 'Today: 02 Jan 2026 03:04:05' in text
    ours, theirs = (
      found.encoder(x)(found.source[0]) for x in (tokenizer, again)
    )
    np.testing.assert_array_equal(ours.ids_n, theirs.ids_n)
    # A new run with that tokenizer stores its own start time as the clock.
    assert found.templated(again).chat_template.clock > clock
    # A template without a date needs no time.
    (tmp_path / 'chat_clock.json').unlink()
    other = load(write(tmp_path, CHATML))
    assert found.templated(other) is other

  def test_a_run_does_not_read_its_template_again(self, tmp_path):
    template = tmp_path / 'a.jinja'
    template.write_text(DATED)
    records = [{'messages': turns('one', 'two')}]
    found, tokenizer = opened(tmp_path, CHATML, records, template=str(template))
    expected = found.encoder(tokenizer)(found.source[0]).ids_n
    template.unlink()
    tokenizer.save(tmp_path)
    path = str(tmp_path / 'a.jsonl')
    later = Chats(path, path, template=str(template)).open('train')
    ids_n = later.encoder(load(tmp_path))(later.source[0]).ids_n
    np.testing.assert_array_equal(ids_n, expected)

  def test_left_out_lines_are_counted(self, tmp_path):
    records = [
      {'messages': turns('one', 'two')},
      {'messages': turns('one')},
      {'messages': [*turns('one'), BAD]},
    ]
    found, tokenizer = opened(tmp_path, CHATML, records)
    assert len(found.source) == 1
    caption = shown(found, tokenizer, sequence_length=90).caption
    assert 'are left out, as 2 lines without an answer are' in caption

  def test_what_is_not_learned_is_warned_of(self, tmp_path):
    answer = {
      **{'role': 'assistant', 'content': 'two'},
      **{'reasoning_content': 'hm', 'name': 'x'},
    }
    records = [
      {'messages': turns('one', 'two'), 'id': 3},
      {'messages': [*turns('one'), answer], 'id': 4, 'source': 'x'},
      {'messages': [{'role': 'system', 'content': 'lost'}, *turns('a', 'b')]},
    ]
    found, tokenizer = opened(tmp_path, VICUNA, records)
    path = tmp_path / 'a.jsonl'
    assert found.check(tokenizer)[1:] == [
      f'keys of lines that are not read: id (2, the first: {path}, line 1); '
      f'source (1, the first: {path}, line 2)',
      'keys of messages that the chat template does not read: '
      f'reasoning_content (1, the first: {path}, line 2)',
      'messages that the chat template leaves out: role system (1, the first: '
      f'{path}, line 3)',
    ]

  def test_a_prompt_that_differs_is_warned_of(self, tmp_path):
    records = [{'messages': turns('one', 'two', 'three', 'four')}]
    options = {'template_variables': ('enable_thinking=false',)}
    found, tokenizer = opened(tmp_path, THINK_OR_NOT, records, **options)
    (warning,) = found.check(tokenizer)
    assert warning.startswith('answers that begin elsewhere in training than')
    assert 'a.jsonl, line 1); make each answer the last' in warning
    options['score'] = 'last'
    found, tokenizer = opened(tmp_path, THINK_OR_NOT, records, **options)
    assert found.check(tokenizer) == []
    assert scored_text(found, tokenizer) == 'four<|im_end|>'

  def test_an_end_that_stops_nothing_is_warned_of(self, tmp_path):
    source = CHATML.replace(
      "'<|im_end|>'", "('<|endoftext|>' if loop.last else '<|im_end|>')"
    )
    records = [{'messages': turns('one', 'two', 'three', 'four')}]
    found, tokenizer = opened(tmp_path, source, records)
    (warning,) = found.check(tokenizer)
    assert 'answers that end with another token than those that' in warning
    assert '<|im_end|> (1, the first: ' in warning

  def test_an_end_inside_an_answer_is_warned_of(self, tmp_path):
    records = [{'messages': turns('one <|im_end|>', 'say <|im_end|> to stop')}]
    found, tokenizer = opened(tmp_path, CHATML, records)
    (warning,) = found.check(tokenizer)
    assert warning.startswith('answers with the text of a token in them that')
    assert ': <|im_end|> (1, the first: ' in warning

  def test_a_warning_lists_the_most_common(self):
    tally = Tally()
    for i in range(9):
      for _ in range(i):
        tally.add(str(i), f'a, line {i}')
    assert str(tally).startswith('8 (8, the first: a, line 8); 7 (7, ')
    assert str(tally).endswith('; 4 (4, the first: a, line 4); 3 more')

  def test_a_chat_is_rendered_once_to_check_it(self, tmp_path, monkeypatch):
    records = [{'messages': turns('one', 'two')}]
    found, tokenizer = opened(tmp_path, CHATML, records)
    first = found.check(tokenizer)
    monkeypatch.setattr(ChatTemplate, 'answers', None)
    assert found.check(tokenizer) is first

  def test_excluded_messages_of_a_text_that_is_scored(self, tmp_path):
    records = [{'messages': [*turns('one'), BAD, *turns('x')]}]
    found, tokenizer = opened(tmp_path, CHATML, records, score='all')
    assert scored_text(found, tokenizer) == (
      '<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n\n'
      '<|im_start|>user\nx<|im_end|>\n'
    )

  def test_tools_and_calls(self, tmp_path):
    call = {'from': 'function_call', 'value': '{"name": "f", "arguments": {}}'}
    records = [
      {
        'system': 'Be brief.',
        'tools': '[{"name": "f"}]',
        'conversations': [{'from': 'human', 'value': 'go'}, call],
      }
    ]
    found, tokenizer = opened(tmp_path, TOOLS, records)
    assert scored_text(found, tokenizer) == (
      '<tool_call>{"name": "f", "arguments": {}}</tool_call><|im_end|>'
    )
    text = tokenizer.decode(found.encoder(tokenizer)(found.source[0]).ids_n)
    assert 'Tools: {"type": "function", "function": {"name": "f"}}' in text
    assert 'Be brief.' in text
    found, tokenizer = opened(tmp_path, CHATML, records)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: .*'tools', which"):
      found.check(tokenizer)

  def test_a_role_is_named_with_its_line(self, tmp_path):
    records = [{'text': 'a'}, {'messages': [{'role': 'x', 'content': 'y'}]}]
    with pytest.raises(
      ValueError, match=r"a\.jsonl, line 2: the role 'x' is unknown"
    ):
      opened(tmp_path, CHATML, records)


class TestBatches:
  @pytest.fixture
  def tokenizer(self, tmp_path):
    return make('chatml', tmp_path)

  @pytest.fixture
  def dialogues(self, tmp_path):
    path = chats_file(tmp_path)
    return Chats(path, path).open('train')

  def training(self, dialogues, tokenizer, **kwargs):
    shape = {'batch_size': 4, 'sequence_length': 90, 'seed': 3} | kwargs
    return batches(dialogues, tokenizer, **shape)

  def test_whole_chats_alone_in_their_segments(self, dialogues, tokenizer):
    found = validation_batches(
      dialogues, tokenizer, batch_size=4, sequence_length=90
    )
    encode = dialogues.encoder(tokenizer)
    expected = {
      (tuple(ids_n[:-1]), tuple(ids_n[1:]), tuple(scored_n[1:]))
      for ids_n, scored_n, _ in map(encode, dialogues.source)
    }
    segments = []
    for batch in found:
      np.testing.assert_array_equal(
        batch['weights'] * batch['segments'] == 0, batch['weights'] == 0
      )
      for row in range(4):
        ids_T = batch['segments'][row]
        for i in range(1, ids_T.max() + 1):
          inside = ids_T == i
          positions = batch['positions'][row][inside]
          np.testing.assert_array_equal(positions, np.arange(inside.sum()))
          segments.append(
            tuple(
              tuple(batch[key][row][inside])
              for key in ('inputs', 'targets', 'weights')
            )
          )
    assert len(segments) == 60 and set(segments) == expected
    num_bytes = sum((b['weights'] * b['bytes']).sum() for b in found)
    assert num_bytes == sum(
      len(item.messages[1]['content'].encode()) for item in dialogues.source
    )

  def test_every_row_has_an_answer_and_an_epoch_has_all(
    self, dialogues, tokenizer
  ):
    found = list(itertools.islice(self.training(dialogues, tokenizer), 30))
    assert found[0]['weights'].dtype == np.float32
    for batch in found:
      assert np.asarray(batch['weights']).sum(axis=1).min() > 0
      assert batch['weights'].shape == (4, 90)
    said = tokenizer.decode(
      np.concatenate([np.asarray(b['targets']).ravel() for b in found])
    )
    assert {int(i) for i in re.findall(r'Answer (\d+)\.', said)} == set(
      range(60)
    )

  @pytest.mark.slow
  def test_state_resumes_bit_equal(self, dialogues, tokenizer):
    iterator = self.training(dialogues, tokenizer)
    for taken in range(40):
      if taken in (0, 1, 7, 16, 33):  # some are where packing shuffles new rows
        state = json.loads(json.dumps(iterator.get_state()))
        resumed = self.training(dialogues, tokenizer)
        resumed.set_state(state)
        following = self.training(dialogues, tokenizer)
        for _ in range(taken):
          next(following)
        for _ in range(20):
          ours, theirs = next(resumed), next(following)
          for key, x_BT in ours.items():
            np.testing.assert_array_equal(x_BT, theirs[key])
      next(iterator)

  def test_a_chat_longer_than_a_row_is_cut(self, tokenizer, tmp_path):
    answer = {'role': 'assistant', 'content': 60 * 'long '}
    long = {'messages': [CHAT[1], answer]}
    late = {'messages': [{'role': 'user', 'content': 60 * 'long '}, answer]}
    path = lines(tmp_path / 'a.jsonl', [long, late])
    dialogues = Chats(path, path).open('train')
    encode = dialogues.encoder(tokenizer)
    example = encode(dialogues.source[0])
    iterator = self.training(dialogues, tokenizer, batch_size=1)
    for _ in range(5):
      batch = next(iterator)
      np.testing.assert_array_equal(batch['inputs'][0], example.ids_n[:90])
      np.testing.assert_array_equal(batch['targets'][0], example.ids_n[1:91])
    table = shown(dialogues, tokenizer, sequence_length=90)
    assert '2 are longer than 90 tokens; 1 have no answer' in table.caption
    with pytest.raises(ValueError, match='sequence_length 10 ends each of'):
      self.training(dialogues, tokenizer, sequence_length=10)

  def test_all_can_be_scored(self, tokenizer, tmp_path):
    path = chats_file(tmp_path)
    dialogues = Chats(path, path, score='all').open('train')
    batch = next(self.training(dialogues, tokenizer))
    np.testing.assert_array_equal(batch['weights'], batch['segments'] > 0)

  def test_a_tokenizer_trained_on_chats(self, dialogues):
    stream = dialogues.stream(seed=0, repeat=False)
    tokenizer = train_tokenizer(stream, vocab_size=300)
    iterator = self.training(dialogues, tokenizer)
    batch = {key: np.asarray(x) for key, x in next(iterator).items()}
    first = batch['segments'][0] == 1
    said = tokenizer.decode(batch['inputs'][0][first])
    assert re.match(r'### Human: Question \d+\?', said)
    scored = tokenizer.decode(
      batch['targets'][0][first & (batch['weights'][0] > 0)]
    )
    assert re.fullmatch(r' Answer \d+\.( So\.)*', scored)
    assert batch['targets'][0][first][-1] == tokenizer.eos_id
    template = dialogues.templated(tokenizer).chat_template
    asked = template.render(CHAT[1:2], add_generation_prompt=True)
    assert asked == f'<s>### Human: {CHAT[1]["content"]}\n### Assistant:'

  def test_shown_colours_what_is_scored(self, dialogues, tokenizer):
    table = shown(dialogues, tokenizer, sequence_length=90)
    text = table.columns[0]._cells[0]
    assert text.plain.startswith('<|im_start|>user\nQuestion ')
    green = [
      text.plain[span.start : span.end]
      for span in text.spans
      if span.style == 'bold green'
    ]
    assert re.fullmatch(r'Answer \d+\.( So\.)*<\|im_end\|>', ''.join(green))
    console = Console(record=True, width=80)
    console.print(table)
    said = ' '.join(console.export_text().split())
    assert 'of 60 examples are scored; 0 are longer than 90' in said
