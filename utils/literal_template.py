"""Chat templates that only print what turns say: rendered once for each order of roles, then filled in."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from utils.preprocess import Message

_PLACES = ('first', 'last', 'index', 'index0')  # of a loop; others give whole turns
_SAID = {'role', 'content'}  # all that most turns have


def prints_alone(source: Any) -> bool:
    """Return whether the roles alone decide what a template prints around what turns say, printed as it is.

    Shown by its syntax tree: of the conversation it reads roles, and contents in nothing but what is printed.
    """
    from jinja2 import Environment, TemplateSyntaxError, nodes

    if not isinstance(source, str):
        return False
    try:
        tree = Environment().parse(source)
    except TemplateSyntaxError:
        return False
    chat, joins = nodes.Name('messages', 'load'), (nodes.Add, nodes.Concat)
    plain = (nodes.Template, nodes.TemplateData, nodes.Const, nodes.If, nodes.For, nodes.Compare, nodes.Operand,
             nodes.And, nodes.Or, nodes.Not, nodes.Test, nodes.Assign, nodes.Name, nodes.Output, *joins)  # fmt: skip
    turns = [nodes.Name(loop.target.name, 'load') for loop in tree.find_all(nodes.For)
             if loop.iter == chat and isinstance(loop.target, nodes.Name)]  # fmt: skip
    hidden = {'messages', 'loop', *(turn.name for turn in turns)}

    def holds(node: nodes.Node, *, printed: bool = False) -> bool:
        if isinstance(node, nodes.Getattr | nodes.Getitem):
            of, key = node.node, node.attr if isinstance(node, nodes.Getattr) else node.arg
            key = key.value if isinstance(key, nodes.Const) else key
            if of == nodes.Name('loop', 'load'):
                return key in _PLACES
            is_one = isinstance(of, nodes.Getitem) and of.node == chat and isinstance(of.arg, nodes.Const)
            return (is_one or of in turns) and (key == 'role' or (key == 'content' and printed))
        if isinstance(node, nodes.Call):  # a refusal
            return node.node == nodes.Name('raise_exception', 'load') and all(map(holds, node.args))
        if isinstance(node, nodes.Name):
            return node.name not in hidden
        whole_chat = isinstance(node, nodes.For) and node.iter == chat and isinstance(node.target, nodes.Name)
        children = node.iter_child_nodes(exclude=('iter', 'target') if whole_chat else ())
        printed = isinstance(node, nodes.Output) or (printed and isinstance(node, joins))
        return isinstance(node, plain) and all(holds(child, printed=printed) for child in children)

    return holds(tree)


class Frames:
    """What such a template prints around what turns say, by their roles; `render` gives it for one conversation."""

    def __init__(self, source: Any, render: Callable[..., str]) -> None:
        self._literal, self._render = prints_alone(source), render
        self._known: dict[tuple[Any, ...], tuple[list[str], list[int]]] = {}

    def fit(self, chats: Sequence[tuple[Sequence[Message], Any]]) -> bool:
        """Return whether all of these conversations (messages, tools) can be filled in."""
        return self._literal and all(
            not tools and all(m.keys() == _SAID and type(m['content']) is str for m in chat) for chat, tools in chats
        )

    def fill(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """Return the rendering of a conversation."""
        key = (prompt, *(message['role'] for message in messages))
        if key not in self._known:
            marks = [secrets.token_hex(16) for _ in messages]
            turns = [Message(role=m['role'], content=mark) for m, mark in zip(messages, marks, strict=True)]
            parts = re.split(f'({"|".join(marks)})', self._render(turns, tools=None, prompt=prompt))
            self._known[key] = (parts, [marks.index(mark) for mark in parts[1::2]])
        parts, said = self._known[key]
        filled = parts.copy()
        filled[1::2] = [messages[place]['content'] for place in said]
        return ''.join(filled)
