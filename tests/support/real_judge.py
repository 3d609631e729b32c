"""A judge of encoded rows that does not use the encoder: it compares with transformers' rendering of the raw messages.

A note of the encoder counts only if the check here finds it true, and a note excuses only its own difference.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from utils.base.errors import ConfigError
from utils.encode.encoded import Encoded, RowRefused
from utils.encode.make import make_encoder
from utils.formats.columns import find_converter
from utils.formats.conversation import BadRow, Row
from utils.formats.row_check import check_row

Raw = dict[str, Any]

# Texts that chat templates print as one token; think and tool tags are ordinary added tokens, as in Qwen3.
MARKER = re.compile(
    r'<[|｜][^<>\s{}\'"]{1,40}[|｜]>|<(?:start|end)_of_(?:turn|utterance|image)>|<\|[a-z_]{2,20}>|<[a-z_]{2,20}\|>'
    r'|\[/?(?:INST|TOOL_CALLS|TOOL_CALL|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CONTENT|SYSTEM_PROMPT|THINK|ARGS|CALL_ID|gMASK)\]'
    r'|<SPECIAL_\d+>|</?(?:assistant|user|system)>|<sop>|<sep>|</?s>|<[be]os>|<extra_id_\d+>|\]~!?b\[?\]|\]!b\[|\[e~\[|\]<\]minimax\[>\['
    r'|\[\|[a-z_]+\|\]|</?seed:(?:bos|eos|pad|tool_call|cot_budget_reflect)>|<(?:begin|beginning|end)_of_(?:document|sentence)>'
)
TAG = re.compile(r'</?(?:(?:\w+:)?think(?::\w+)?|tool_call|tool_response|arg_key|arg_value)>')
THINK = re.compile(r'</?(?:\w+:)?think(?::\w+)?>|\[/?THINK\]')
THINK_TOKEN = re.compile(rf'{THINK.pattern}|<\|(?:START|END)_THINKING\|>')
REASONS = ('reasoning_content', 'reasoning', 'thinking', 'tool_plan')
SWITCHES: tuple[Raw, ...] = (
    {'enable_thinking': True}, {'thinking': True}, {'enable_thinking': False}, {'thinking_mode': 'thinking'},
    {'think': True}, {'reasoning_effort': 'high'}, {'thinking_mode': 'on'}, {'reasoning': True},
)  # fmt: skip
# Replies never contain these: such a word in a trained span comes from another part of the row.
CALLS_AS_TEXT = 'no form for tool calls'
WRITTEN_AS_BLOCK = 'no key for reasoning'
LEFT_OUT = 'prints no reasoning'
FOREIGN = re.compile(r'Zebra\w+')


def parsed(raw: Raw) -> list[Raw]:
    """Return the messages for the judge: arguments given as JSON text become objects."""
    messages = copy.deepcopy(raw['messages'])
    for message in messages:
        for call in message.get('tool_calls') or []:
            if isinstance(call['function']['arguments'], str):
                call['function']['arguments'] = json.loads(call['function']['arguments'])
    return messages


def with_arguments_as_text(messages: list[Raw]) -> list[Raw]:
    """Return the messages with the arguments of calls as JSON text."""
    written = copy.deepcopy(messages)
    for message in written:
        for call in message.get('tool_calls') or []:
            call['function']['arguments'] = json.dumps(call['function']['arguments'], ensure_ascii=False)
    return written


def with_calls_as_text(messages: list[Raw]) -> list[Raw]:
    """Return the messages with calls as JSON text in the content, for templates that print no calls."""
    written = []
    for message in copy.deepcopy(messages):
        calls = [call['function'] for call in message.pop('tool_calls', None) or []]
        text = json.dumps(calls, ensure_ascii=False) if calls else ''
        said = message.get('content') or ''
        written.append({**message, 'content': f'{said}\n{text}' if said and text else said or text})
    return written


def under_key(messages: list[Raw], key: str) -> list[Raw]:
    """Return the messages with their reasoning under another key."""
    moved = []
    for message in messages:
        reasoning = next((message[k] for k in REASONS if k in message), None)
        others = {k: v for k, v in message.items() if k not in REASONS}
        moved.append(others if reasoning is None else {**others, key: reasoning})
    return moved


def city(call: Raw) -> str:
    """Return an argument of a call that occurs nowhere else in a row."""
    arguments = call['function']['arguments']
    return str((json.loads(arguments) if isinstance(arguments, str) else arguments)['city'])


def strings(value: Any) -> Iterator[str]:
    """Return every text in nested data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def bare(text: str) -> str:
    """Return the text without markers, think tags and blanks."""
    return ''.join(THINK.sub('', MARKER.sub('', text)).split())


@dataclasses.dataclass
class Judge:
    """A tokenizer that the encoder never sees, with the template under test."""

    tokenizer: Any

    def __post_init__(self) -> None:
        added = self.tokenizer.added_tokens_decoder
        self.special = {i for i, token in added.items() if token.special or MARKER.fullmatch(token.content)}
        self.tags = {i for i, token in added.items() if THINK_TOKEN.fullmatch(token.content)}
        self.active = {i: token.content for i, token in added.items()}
        self.eos = self.tokenizer.eos_token_id
        # Tokenizers with a dummy prefix do not restore the blanks of a text: there only the ids check blanks.
        sample = f'a{self.tokenizer.eos_token}b\n c'
        self.is_exact = self.decode(self.ids(sample)) == sample

    def plain(self, text: str) -> str:
        """Return the text in a form that can be compared with decoded ids."""
        return text if self.is_exact else ''.join(text.split())

    def text(self, messages: list[Raw], tools: Any, *, prompt: bool = False, **switches: Any) -> str:
        """Return transformers' own rendering. Raises what the template raises."""
        return str(
            self.tokenizer.apply_chat_template(
                copy.deepcopy(messages), tools=copy.deepcopy(tools), tokenize=False, add_generation_prompt=prompt,
                **switches,
            )
        )  # fmt: skip

    def ids(self, text: str) -> list[int]:
        """Return the ids of a rendering, as apply_chat_template tokenises it."""
        return list(self.tokenizer(text, add_special_tokens=False)['input_ids'])

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def try_text(self, messages: list[Raw], tools: Any, *, prompt: bool = False, **switches: Any) -> str | None:
        try:
            return self.text(messages, tools, prompt=prompt, **switches)
        except Exception:
            return None


@dataclasses.dataclass
class Verdict:
    """The findings of the judge for one row."""

    kind: str
    status: str = ''
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    earlier: int = 0
    calls: int = 0

    def add(self, what: str, detail: str) -> None:
        self.problems.append(f'{what}: {self.kind}: {detail[:400]}')


class Case:
    """One raw row: the judge's rendering, and its comparison with an encoded row."""

    def __init__(self, judge: Judge, raw: Raw) -> None:
        self.judge, self.raw, self.tools = judge, raw, raw.get('tools')
        self.messages = parsed(raw)
        if judge.try_text(self.messages, self.tools) is None:
            # DeepSeek-V3 and R1 concatenate the arguments with text, so they need JSON text.
            as_text = with_arguments_as_text(self.messages)
            self.messages = self.messages if judge.try_text(as_text, self.tools) is None else as_text
        self.last = self.messages[-1]
        self.content = self.last.get('content') or ''
        self.reasoning = next((self.last[key] for key in REASONS if key in self.last), '')
        self.calls = self.last.get('tool_calls') or []
        self.full = judge.try_text(self.messages, self.tools)
        reasons = [m[key] for m in self.messages for key in REASONS if key in m]
        # The reasoning of the last reply decides; most templates omit earlier reasoning.
        self.needs_tags = False
        if self.full is not None and self.reasoning and self.reasoning not in self.full:
            moved = [under_key(self.messages, key) for key in REASONS]
            texts = [(m, judge.try_text(m, self.tools)) for m in moved]
            found = next(((m, text) for m, text in texts if text and self.reasoning in text), None)
            self.needs_tags = found is None
            self.messages, self.full = found or (self.messages, self.full)
        self.reasons = bool(reasons)
        self.prompt = judge.try_text(self.messages[:-1], self.tools, prompt=True)

    @property
    def renders(self) -> bool:
        """Return whether the template prints the whole row, including its reply and its calls."""
        if self.full is None or self.prompt is None:
            return False
        if self.calls:
            return all(city(call) in self.full for call in self.calls)
        return bare(self.content) in bare(self.full)

    @property
    def tail(self) -> str:
        """Return what the judge prints after the reply."""
        full = self.full or ''
        said = self.content.strip()
        return full[full.rindex(said) + len(said) :] if said and said in full else ''

    def prompts(self) -> list[str]:
        """Return the generation prompts that a server may send: without a switch, and with each switch."""
        found = [self.prompt or '']
        for switch in SWITCHES:
            text = self.judge.try_text(self.messages[:-1], self.tools, prompt=True, **switch)
            if text is not None and text not in found:
                found.append(text)
        return found

    def wholes(self) -> list[str]:
        """Return the whole renderings with each switch."""
        texts = [self.judge.try_text(self.messages, self.tools, **switch) for switch in ({}, *SWITCHES)]
        return [text for text in texts if text is not None]

    def is_text_of(self, text: str) -> bool:
        """Return whether a text is the judge's rendering, with or without an added end of sequence."""
        full = self.full or ''
        texts = [full]
        for end in self.ends():
            texts += [full + end, full.rstrip() + end, *self._without_blank_end(full, end)]
        return self.judge.plain(text) in map(self.judge.plain, texts)

    def _without_blank_end(self, full: str, end: str) -> list[str]:
        said = self.content.rstrip()
        return [full[: full.rindex(said) + len(said)] + end] if said and said in full else []

    def opener(self) -> str | None:
        """Return the marker with which the judge begins a chat: no turn ends at it."""
        text = self.judge.try_text([{'role': 'user', 'content': 'q'}], None, prompt=True) or ''
        ends = (self.judge.tokenizer.bos_token, self.judge.tokenizer.eos_token)
        opener = next((m[0] for m in MARKER.finditer(text) if m[0] not in ends), None)
        # Kimi-K3 opens the parts of a turn with it too.
        return None if opener is not None and opener in self.own_lead() + self.lead() else opener

    def trailing(self) -> str:
        """Return what the judge prints after every chat with these tools: from the next turn's opening marker on."""
        chat = [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'Xyloph'}]
        after, opener = (self.judge.try_text(chat, self.tools) or '').rpartition('Xyloph')[2], self.opener()
        return after[after.index(opener) :] if opener is not None and opener in after else ''

    def is_accounted_for(self, text: str, notes: str) -> bool:
        """Return whether a text is one of the judge's prompts, then reasoning, reply and calls, and nothing else."""
        # Reasoning before a call, without a key in the template: the note says that it is written as a block.
        block = bare(self.reasoning) if self.calls and self.needs_tags and WRITTEN_AS_BLOCK in notes else ''
        if re.search(CALLS_AS_TEXT, notes):
            whole = self.judge.try_text(with_calls_as_text(self.messages), None if 'tools' in notes else self.tools)
            return block in bare(text) and bare(text).replace(block, '', 1) == bare(whole or '')
        for prompt in self.prompts():
            head, whole_text = self.judge.plain(prompt), self.judge.plain(text)
            if not whole_text.startswith(head):
                continue
            rest = bare(whole_text[len(head) :])
            left_out = LEFT_OUT in notes and self.needs_tags
            thoughts = [''] if left_out else [bare(self.reasoning)]
            leads = {'', bare(self.lead()), bare(self.own_lead())}
            trailing = bare(self.trailing())
            if self.calls:
                after = rest.removeprefix(block)
                wholes = [bare(whole) for whole in self.wholes()]
                wholes += [whole.removesuffix(trailing) for whole in wholes]
                is_whole = any(whole.endswith(after) for whole in wholes) and self.all_said(after)
                if rest.startswith(block) and is_whole:
                    return True
                continue
            said = {
                text
                for lead in leads
                for thought in thoughts
                for text in (lead + thought + bare(self.content), thought + lead + bare(self.content))
            }
            if self.reasoning:
                said |= set(map(self.from_reasoning, self.wholes()))
            if rest in said or rest.removesuffix(trailing) in said:
                return True
        return False

    def from_reasoning(self, whole: str) -> str:
        """Return what the judge prints from the reasoning of the last reply on, bare."""
        reasoning, text = bare(self.reasoning), bare(whole)
        return text[text.rindex(reasoning) :] if reasoning in text else ''

    def all_said(self, rest: str) -> bool:
        """Return whether a bare text contains the content and the call names of the judge's rendering."""
        full = bare(self.full or '')
        return all(
            bare(part) in rest for part in (self.content, self.reasoning, *map(city, self.calls)) if bare(part) in full
        )

    def next_token(self) -> int | None:
        """Return the marker that begins the turn after a reply or call in the judge's rendering, if there is one."""
        reply: Raw = {'role': 'assistant', 'content': 'Xyloph'}
        after: Raw = {'role': 'user', 'content': 'q'}
        if self.calls:
            reply = {'role': 'assistant', 'content': '', 'tool_calls': self.calls}
            after = {'role': 'tool', 'content': 'q', 'tool_call_id': self.calls[0].get('id')}
        chat = [{'role': 'user', 'content': 'q'}, reply]
        full = (self.judge.try_text(chat, self.tools) or '').rstrip()
        text = self.judge.try_text([*chat, after], self.tools) or ''
        follows = text[len(full) :].lstrip() if full and text.startswith(full) else ''
        tokens = {content: index for index, content in self.judge.active.items()}
        return next((tokens[content] for content in tokens if follows.startswith(content)), None)

    def ends(self) -> list[str]:
        """Return the texts of the tokens that may be added if the template prints no end."""
        following = self.next_token()
        named = [self.judge.tokenizer.eos_token]
        return named if following is None else [*named, self.judge.active[following]]

    def lead(self) -> str:
        """Return what the judge prints between a plain chat's generation prompt and the reply."""
        chat = [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'Xyloph'}]
        prompt, full = self.judge.try_text(chat[:-1], None, prompt=True), self.judge.try_text(chat, None)
        if prompt is None or full is None or not full.startswith(prompt) or 'Xyloph' not in full:
            return ''
        return full[len(prompt) : full.rindex('Xyloph')]

    def own_lead(self) -> str:
        """Return what the judge prints for this row between the shared prompt and the reply."""
        prompt, full, said = self.prompt or '', self.full or '', self.content.strip()
        if not said or said not in full:
            return ''
        common = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(prompt))
        marker = next((m for m in MARKER.finditer(full) if m.start() < common < m.end()), None)
        return full[marker.start() if marker else common : full.rindex(said)]

    def note_is_true(self, note: str, encoded: Encoded, ours: str) -> bool | None:
        """Return whether a note is true for this row; None if no check exists for it."""
        for pattern, check in CHECKS:
            if re.search(pattern, note):
                return check(self, encoded, ours)
        return None


Check = Callable[[Case, Encoded, str], bool]


def _merges(case: Case, encoded: Encoded, ours: str) -> bool:
    ids, before = case.judge.ids(ours), encoded.input_ids[: encoded.prompt_length]
    return ids != encoded.input_ids and ids[: len(before)] != before


def _typed_control(case: Case, encoded: Encoded, ours: str) -> bool:
    text = '\n'.join(strings([case.raw['messages'], case.tools]))
    return any(content in text for content in case.judge.active.values())


def _added_end(case: Case, encoded: Encoded, ours: str) -> bool:
    tail = case.tail.removesuffix(case.trailing())
    no_end = MARKER.search(tail) is None or tail.strip().startswith(case.judge.tokenizer.eos_token)
    return (
        encoded.input_ids[-1] in (case.judge.eos, case.next_token())
        and no_end
        and not (case.full or '').removesuffix(case.trailing()).rstrip().endswith(case.judge.tokenizer.eos_token)
    )


def _altered(case: Case, encoded: Encoded, ours: str) -> bool:
    edges = case.content != case.content.strip()
    texts = [case.content, case.reasoning, case.full or '', (case.prompt or '')[-40:], ours]
    return case.judge.ids(case.full or '') != encoded.input_ids and (edges or any(map(THINK.search, texts)))


def _full_differs(case: Case, encoded: Encoded, ours: str) -> bool:
    # The thinking switch renders both otherwise.
    for switch in ({}, *SWITCHES):
        full = case.judge.try_text(case.messages, case.tools, **switch) or ''
        prompt = case.judge.try_text(case.messages[:-1], case.tools, prompt=True, **switch)
        begins = prompt is not None and case.judge.plain(ours).startswith(case.judge.plain(prompt))
        if begins and not full.startswith(prompt or ''):
            return True
    return False


def _switched(case: Case, encoded: Encoded, ours: str) -> bool:
    reasons = bool(case.reasoning) or THINK.search(case.content) is not None
    return reasons and any(ours.startswith(p) for p in case.prompts()[1:])


def _reasoning_as_text(case: Case, encoded: Encoded, ours: str) -> bool:
    return case.reasons and (not case.reasoning or case.needs_tags)


def _reasoning_left_out(case: Case, encoded: Encoded, ours: str) -> bool:
    return bool(case.reasoning) and case.needs_tags and bare(case.reasoning) not in bare(ours)


def _tools_ignored(case: Case, encoded: Encoded, ours: str) -> bool:
    chat = [{'role': 'user', 'content': 'q'}]
    with_tools = case.judge.try_text(chat, case.tools, prompt=True)
    names = [tool['function']['name'] for tool in case.tools or []]
    return bool(case.tools) and not any(name in (with_tools or '') for name in names)


def _calls_as_text(case: Case, encoded: Encoded, ours: str) -> bool:
    called = [city(call) for m in case.messages for call in m.get('tool_calls') or []]
    return bool(called) and not any(name in (case.full or '') for name in called)


def _beside_calls(case: Case, encoded: Encoded, ours: str) -> bool:
    texts = [m['content'] for m in case.messages if m.get('tool_calls') and (m.get('content') or '').strip()]
    return any(text not in (case.full or '') for text in texts)


# A note, and the condition that must then hold.
CHECKS: tuple[tuple[str, Check], ...] = (
    (r'token would merge', _merges),
    (r'control tokens typed', _typed_control),
    (r'prints no end of turn', _added_end),
    (r'alters (?:or adds to )?the reply', _altered),
    (r'differently in the whole chat', _full_differs),
    (r'closes the think block', _switched),
    (WRITTEN_AS_BLOCK, _reasoning_as_text),
    (LEFT_OUT, _reasoning_left_out),
    (r'no place for tools', _tools_ignored),
    (CALLS_AS_TEXT, _calls_as_text),
    (r'beside', _beside_calls),
)


def row_of(raw: Raw) -> Row:
    """Return a raw row as the programs read it. Raises BadRow."""
    converter = find_converter(set(raw))
    assert converter is not None
    return check_row(converter(copy.deepcopy(raw)))


def encoder_for(tokenizer: Any, scope: Any = 'last_round') -> Any:
    """Return a new encoder of the tokenizer's chat template."""
    return make_encoder(
        tokenizer, template_type='auto', system='', system_typed=False, max_length=-1, loss_scope=scope
    )  # fmt: skip


def judge_rows(tokenizer: Any, judge: Judge, raws: list[tuple[str, Raw]]) -> tuple[list[Verdict], str | None]:
    """Return a verdict on each row, and the reason if no encoder could be made."""
    try:
        encoder = encoder_for(tokenizer)
    except ConfigError as error:
        return [], str(error)
    verdicts, kept = [], []
    for kind, raw in raws:
        verdict, case = Verdict(kind), Case(judge, raw)
        verdicts.append(verdict)
        try:
            row = row_of(raw)
            encoded = encoder.encode([row])[0]
            prompt = encoder.encode_prompts([row])[0]
        except (BadRow, RowRefused) as error:
            verdict.status = 'refused wrongly' if case.renders else 'refused by both'
            verdict.calls = int(bool(case.calls) and case.renders)
            if case.renders:
                verdict.add('refused', str(error))
            continue
        if encoded.input_ids[: len(prompt)] != prompt:
            verdict.add('prefix', f'alone: {judge.decode(prompt)[-60:]!r}')
        kept.append((verdict, case, row, encoded))
        _judge_ids(verdict, case, encoded)
        _judge_prompt(verdict, case, encoded, prompt)
        _judge_trained(verdict, case, encoded)
    _judge_mixed(tokenizer, judge, kept)
    _judge_rounds(tokenizer, judge, kept)
    return verdicts, None


def _difference(judge: Judge, ours: list[int], theirs: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return (
        f'after {judge.decode(ours[max(at - 6, 0) : at])!r} ours {judge.decode(ours[at : at + 12])!r}, '
        f'judge {judge.decode(theirs[at : at + 12])!r}'
    )


def _judge_ids(verdict: Verdict, case: Case, encoded: Encoded) -> None:
    judge = case.judge
    verdict.notes = list(encoded.notes)
    if case.full is None:
        verdict.status = 'ours alone'
        return
    ours, theirs = judge.decode(encoded.input_ids), judge.ids(case.full)
    truths = {note: case.note_is_true(note, encoded, ours) for note in encoded.notes}
    for note, truth in truths.items():
        if not truth:
            verdict.add('note', f'{"false" if truth is False else "unknown"}: {note}: {ours[-200:]!r}')
    control = [sum(token in judge.active for token in ids) for ids in (encoded.input_ids, theirs)]
    typed = _typed_control(case, encoded, ours)
    if encoded.input_ids == theirs and not (typed and _spells_marker(case)):
        verdict.status = 'equal'
    elif not encoded.notes:
        verdict.status = 'unexplained'
        verdict.add('ids', _difference(judge, encoded.input_ids, theirs))
    elif case.is_text_of(ours) or case.is_accounted_for(ours, ' '.join(encoded.notes)):
        verdict.status = 'explained'
    else:
        verdict.status = 'unexplained'
        verdict.add('ids', f'{encoded.notes}: {_difference(judge, encoded.input_ids, theirs)}')
    if typed and _spells_marker(case):
        _judge_leaks(verdict, case, encoded, control[0])


def _judge_prompt(verdict: Verdict, case: Case, encoded: Encoded, prompt: list[int]) -> None:
    """The inference prompt is the generation prompt, plus at most what the template prints before a reply."""
    if case.prompt is None or re.search(CALLS_AS_TEXT, ' '.join(encoded.notes)):
        return
    plain, ours = case.judge.plain, case.judge.plain(case.judge.decode(prompt))
    heads = [plain(text) for text in case.prompts() if ours.startswith(plain(text))]
    lead = bare(case.lead())
    if not any(bare(ours[len(head) :]) in ('', lead) for head in heads):
        verdict.add('prompt', f'{ours[-120:]!r}, add_generation_prompt gives {case.prompt[-120:]!r}')


def _spells_marker(case: Case) -> bool:
    return any(MARKER.search(text) for text in strings(case.raw['messages']))


def _judge_leaks(verdict: Verdict, case: Case, encoded: Encoded, count: int) -> None:
    """A typed marker must stay text: there are as many control ids as with another text in its place."""
    raw = json.loads(MARKER.sub('QQ', json.dumps(case.raw, ensure_ascii=False)))
    clean = Case(case.judge, raw)
    # The generation prompt may have markers that the whole chat is printed without.
    after_prompt = [
        f'{prompt}{lead}{clean.content}{clean.tail}'
        for prompt in clean.prompts()
        for lead in {'', clean.lead(), clean.own_lead()}
    ]
    texts = (clean.full or '', *clean.wholes(), *after_prompt)
    # Think tags are counted in the prompt: a reply may bring its own, and an open block is closed.
    control = case.judge.special - case.judge.tags
    wanted = [sum(i in control for i in case.judge.ids(text)) for text in texts]
    found = sum(i in control for i in encoded.input_ids)
    # One more where the end of sequence is added.
    is_added = encoded.input_ids[-1] in (case.judge.eos, clean.next_token())
    if found not in wanted and not (is_added and found - 1 in wanted):
        verdict.add('leak', f'{found} control ids, the template prints {wanted[0]}')
    tags = sum(i in case.judge.tags for i in encoded.input_ids[: encoded.prompt_length])
    printed = [sum(i in case.judge.tags for i in case.judge.ids(prompt)) for prompt in clean.prompts()]
    if tags not in printed:
        verdict.add('leak', f'{tags} think tags in the prompt, the template prints {printed[0]}')


def _judge_trained(verdict: Verdict, case: Case, encoded: Encoded) -> None:
    judge = case.judge
    start, stop = encoded.trained
    trained = judge.decode(encoded.input_ids[start:stop])
    if found := FOREIGN.search(trained):
        verdict.add('trained', f'text of another turn: {found[0]}: {trained!r}')
    if not case.calls and bare(case.content) not in bare(trained):
        verdict.add('trained', f'the reply is not all trained: {trained!r}')
    # The end of turn may have text between its markers.
    end = bare(case.tail.partition(judge.tokenizer.eos_token)[0]) if judge.tokenizer.eos_token in case.tail else ''
    leads = ('', case.lead(), case.own_lead())
    said = {bare(lead) + bare(case.content) + after for lead in leads for after in ('', end)}
    if not case.calls and not case.reasoning and not _spells_marker(case) and bare(trained) not in said:
        verdict.add('trained', f'more than the reply: {trained!r}')
    last = encoded.input_ids[stop - 1]
    opener = case.opener()
    said = city(case.calls[-1]) if case.calls else case.content.strip()
    if opener is not None and opener in trained[trained.rfind(said) :] and not _spells_marker(case):
        is_added = judge.active.get(last) == opener and last == case.next_token()
        if not (is_added and trained.count(opener) == 1):
            verdict.add('end', f'it goes on into another turn: {trained[-80:]!r}')
    if last not in judge.special and last != judge.eos:
        verdict.add('end', f'the last trained token is no stop: {trained[-60:]!r}')
    if case.calls and case.renders:
        verdict.calls = 1
        for call in case.calls:
            if city(call) not in trained:
                verdict.add('call', f'{city(call)} is not trained: {trained!r}')
        full = case.full or ''
        after = full[full.rindex(city(case.calls[-1])) :]
        if opener is not None and opener in after and opener != judge.tokenizer.eos_token:
            after = after[: after.index(opener)]
        after = after.rstrip()
        ends = [m for m in MARKER.finditer(after) if m.end() == len(after)]
        if ends and judge.active.get(last) != ends[0][0] and last != judge.eos:
            verdict.add('call', f'its stop {ends[0][0]} is not the last trained token: {trained[-80:]!r}')


def _judge_mixed(tokenizer: Any, judge: Judge, kept: list[tuple[Verdict, Case, Row, Encoded]]) -> None:
    """Encode rows of all kinds with one encoder in both orders: each keeps its ids, and its prompt is their prefix."""
    for name, part in (('in order', kept), ('in reverse', kept[::-1])):
        encoder = encoder_for(tokenizer)
        encoded = encoder.encode([row for _, _, row, _ in part])
        prompts = encoder.encode_prompts([row for _, _, row, _ in part])
        for (verdict, _, _, alone), found, prompt in zip(part, encoded, prompts, strict=True):
            if found.input_ids[: len(prompt)] != prompt:
                verdict.add('prefix', f'{name}: {judge.decode(prompt)[-60:]!r}')
            if found.input_ids != alone.input_ids:
                verdict.add('prefix', f'{name}: ids depend on the rows beside it')


def _judge_rounds(tokenizer: Any, judge: Judge, kept: list[tuple[Verdict, Case, Row, Encoded]]) -> None:
    part = [item for item in kept if sum(m['role'] == 'assistant' for m in item[1].messages) > 1]
    encoder = encoder_for(tokenizer, 'all_rounds')
    encoded = encoder.encode([row for _, _, row, _ in part]) if part else []
    for (verdict, case, _, alone), found in zip(part, encoded, strict=True):
        if found.input_ids != alone.input_ids:
            verdict.add('rounds', 'the ids change with the loss scope')
        ids = found.input_ids
        spans = [judge.decode(ids[a:b]) for a, b in found.earlier]
        if any(map(FOREIGN.search, spans)):
            verdict.add('trained', f'an earlier span holds text of another turn: {spans!r}')
        for message in case.messages[:-1]:
            if message['role'] != 'assistant':
                continue
            said = [(message.get('content') or '').strip()]
            said += [city(call) for call in message.get('tool_calls') or []]
            full = case.full or ''
            said = [text for text in said if text and text in full]
            if not said:
                continue
            verdict.earlier += 1
            # Text next to a call may be printed after the call's result, in a separate span.
            span = next((s for s in spans if said[-1] in s), None)
            if span is None or not all(any(text in s for s in spans) for text in said):
                verdict.add('rounds', f'no loss on {said!r}')
                continue
            after = full[full.index(said[-1]) + len(said[-1]) :]
            stop = MARKER.search(after)
            if stop and not after[: stop.start()].strip() and stop[0] not in span:
                verdict.add('rounds', f'its stop {stop[0]} carries no loss: {span[-60:]!r}')
