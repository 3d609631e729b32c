"""A small interpreter of the part of Go's text/template that Modelfiles of this project use."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_ACTION = re.compile(r'\s*\{\{-\s+(.*?)\s*\}\}|\{\{\s*(.*?)\s*\}\}', re.DOTALL)


def render_go(template: str, *, system: str, messages: Sequence[Mapping[str, str]]) -> str:
    """Return the text that Ollama sends to the model: of .System and .Messages, as its server passes them."""
    actions = _actions(template)
    data = {'System': system, 'Messages': [{'Role': m['role'], 'Content': m['content']} for m in messages]}
    variables: dict[str, Any] = {'$': data}
    out: list[str] = []
    end = _run(actions, 0, data, variables, out, active=True)
    assert end == len(actions), 'every block is closed'
    return ''.join(out)


def _actions(template: str) -> list[str]:
    """Return the actions of a template. Text between actions is not allowed, except blanks that `{{-` removes."""
    actions = []
    position = 0
    # Quoted texts may contain braces, so they are replaced while the template is cut into actions.
    texts: list[str] = []

    def keep(match: re.Match[str]) -> str:
        texts.append(match[0])
        return f'"{len(texts) - 1}"'

    hidden = re.sub(r'"(?:[^"\\]|\\.)*"', keep, template)
    for match in _ACTION.finditer(hidden):
        assert match.start() == position, f'text outside of an action: {hidden[position : match.start()]!r}'
        position = match.end()
        action = match[1] or match[2]
        actions.append(re.sub(r'"(\d+)"', lambda m: texts[int(m[1])], action))
    assert position == len(hidden), 'text after the last action'
    return actions


def _value(word: str, dot: Any, variables: Mapping[str, Any]) -> Any:
    if word.startswith('"'):
        return json.loads(word)
    if word in ('true', 'false'):
        return word == 'true'
    if word.startswith('$.'):
        return variables['$'][word[2:]]
    if word.startswith('$'):
        return variables[word]
    assert word.startswith('.'), word
    return dot[word[1:]]


def _condition(text: str, dot: Any, variables: Mapping[str, Any]) -> bool:
    words = re.findall(r'"(?:[^"\\]|\\.)*"|\S+', text)
    if words[0] in ('eq', 'ne'):
        one, other = (_value(word, dot, variables) for word in words[1:])
        return (one == other) == (words[0] == 'eq')
    assert len(words) == 1, text
    return bool(_value(words[0], dot, variables))


def _run(actions: list[str], at: int, dot: Any, variables: dict[str, Any], out: list[str], *, active: bool) -> int:
    """Run the actions from `at` to the next else or end of this block. Returns the position of that action."""
    while at < len(actions):
        action = actions[at]
        if action == 'end' or action.startswith('else'):
            return at
        if action.startswith('if '):
            at = _run_if(actions, at, dot, variables, out, active=active)
        elif action.startswith('range '):
            items = _value(action[6:], dot, variables) if active else []
            end = _run(actions, at + 1, {}, variables, out, active=False)
            for item in items:
                _run(actions, at + 1, item, variables, out, active=True)
            at = end
        elif assigned := re.fullmatch(r'(\$\w+) :?= (.*)', action, re.DOTALL):
            if active:
                variables[assigned[1]] = _value(assigned[2], dot, variables)
        elif active:
            out.append(str(_value(action, dot, variables)))
        at += 1
    return at


def _run_if(actions: list[str], at: int, dot: Any, variables: dict[str, Any], out: list[str], *, active: bool) -> int:
    """Run one of the branches of an if. Returns the position of its end."""
    done = False
    condition = actions[at][3:]
    while True:
        chosen = active and not done and (not condition or _condition(condition, dot, variables))
        done = done or chosen
        at = _run(actions, at + 1, dot, variables, out, active=chosen)
        if actions[at] == 'end':
            return at
        condition = actions[at].removeprefix('else').strip().removeprefix('if ')
