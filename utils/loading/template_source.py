"""Parses the source of a chat template, and finds the variables that the template reads.

A template is only parsed here, never rendered. jinja2 is imported when a template is parsed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from utils.base.errors import ConfigError, error_text

if TYPE_CHECKING:
    from jinja2 import nodes

# The names that apply_chat_template of transformers fills, and its parameters. They cannot be settings of a template.
SUPPLIED = frozenset((
    'messages', 'tools', 'documents', 'add_generation_prompt', 'continue_final_message', 'conversation',
    'conversations', 'chat_template', 'tokenize', 'sanitize_control_tokens', 'padding', 'truncation', 'max_length',
    'return_tensors', 'return_dict', 'return_assistant_tokens_mask', 'tokenizer_kwargs',
    'bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token',
    'additional_special_tokens', 'extra_special_tokens',
))  # fmt: skip
# Functions that transformers adds to those of Jinja, and names that Jinja defines inside of macros.
_FUNCTIONS = frozenset(('raise_exception', 'strftime_now', 'caller', 'varargs', 'kwargs', 'loop', 'self'))


@functools.cache
def environment() -> Any:
    """Return the sandbox in which templates are parsed. It has the same tags as the sandbox of transformers."""
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """The tag {% generation %}, with which templates mark the text of a reply."""

        tags = {'generation'}  # noqa: RUF012 # Jinja declares a set

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )


def parse_template(source: str, where: str) -> nodes.Template:
    """Return the syntax tree of a template. Raises ConfigError for a syntax error; `where` names the template."""
    from jinja2 import TemplateSyntaxError

    try:
        environment().compile(source)  # finds also filters and tests that Jinja does not have
        tree: nodes.Template = environment().parse(source)
        return tree
    except TemplateSyntaxError as error:
        raise ConfigError(
            f'{where}: line {error.lineno} is not valid Jinja: {str(error.message).rstrip(".")}. Correct this line.'
        ) from None
    except (RecursionError, MemoryError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f'{where} is too large or too deeply nested for Jinja: {error_text(error)}. Simplify the template.'
        ) from None


@functools.lru_cache(maxsize=32)
def read_variables(source: str, where: str = 'the chat template') -> frozenset[str]:
    """Return the variables that a template reads before it sets them. A caller can give values for them.

    Functions of Jinja and of transformers are not included. Raises ConfigError for a syntax error.
    """
    reader = _Reader()
    reader.read_body(parse_template(source, where).body, frozenset())
    return frozenset(reader.found - environment().globals.keys() - _FUNCTIONS)


class _Reader:
    """Finds the variables that come from the caller, by following the statements of a template in their order.

    In each method, `known` are the names that the template has set before a statement. If only some branches of an
    {% if %} have set a name, the name is not in `known`. If the statement reads a name that is not in `known`, the name
    comes from the caller.
    """

    def __init__(self) -> None:
        self.found: set[str] = set()

    def read_body(self, body: Iterable[nodes.Node], known: frozenset[str]) -> frozenset[str]:
        """Read the statements of one scope. Return `known` plus the names that these statements set in every case.

        A name that only one branch of an {% if %} sets is not added.
        """
        from jinja2 import nodes

        macros = []
        for statement in body:
            if isinstance(statement, nodes.Macro):
                known |= {statement.name}
                macros.append(statement)
            else:
                known = self._read_statement(statement, known)
        # A macro sees what its scope has set when it is called, which is after the macro was defined.
        for macro in macros:
            self._read_macro(macro, known)
        return known

    def _read_statement(self, node: nodes.Node, known: frozenset[str]) -> frozenset[str]:
        from jinja2 import nodes

        if isinstance(node, nodes.Assign):
            self._read_names(node.node, known)
            return known | self._targets(node.target, known)
        if isinstance(node, nodes.AssignBlock):
            self.read_body(node.body, known)
            self._read_names(node.filter, known)
            return known | self._targets(node.target, known)
        if isinstance(node, nodes.If):
            return self._read_if(node, known)
        if isinstance(node, nodes.For):
            self._read_for(node, known)
            return known
        self._read_scope(node, known)
        return known

    def _read_scope(self, node: nodes.Node, known: frozenset[str]) -> None:
        """Read a statement that adds no name to `known`, such as {% block %}, {% call %} or {{ output }}."""
        from jinja2 import nodes

        if isinstance(node, nodes.CallBlock):
            self._read_macro(node, known)
            self._read_names(node.call, known)
        elif isinstance(node, nodes.With):
            inner = known
            for target, value in zip(node.targets, node.values, strict=True):
                self._read_names(value, known)
                inner |= self._targets(target, known)
            self.read_body(node.body, inner)
        elif isinstance(node, nodes.FilterBlock):
            self.read_body(node.body, known)
            self._read_names(node.filter, known)
        elif isinstance(node, nodes.Block | nodes.Scope | nodes.ScopedEvalContextModifier):
            self.read_body(node.body, known)
        else:
            self._read_names(node, known)

    def _read_if(self, node: nodes.If, known: frozenset[str]) -> frozenset[str]:
        after = []
        for branch in (node, *node.elif_):
            self._read_names(branch.test, known)
            after.append((branch.body, self.read_body(branch.body, known)))
        after.append((node.else_, self.read_body(node.else_, known)))
        # Nothing is read after a branch that ends in an error.
        going_on = [names for body, names in after if not _raises(body)]
        return frozenset.intersection(*going_on) if going_on else known

    def _read_for(self, node: nodes.For, known: frozenset[str]) -> None:
        self._read_names(node.iter, known)
        inner = known | self._targets(node.target, known)
        self._read_names(node.test, inner)
        self.read_body(node.body, inner)
        self.read_body(node.else_, known)

    def _read_macro(self, node: nodes.Macro | nodes.CallBlock, known: frozenset[str]) -> None:
        for default in node.defaults:
            self._read_names(default, known)
        self.read_body(node.body, known | {argument.name for argument in node.args})

    def _targets(self, target: nodes.Node, known: frozenset[str]) -> set[str]:
        """Return the names that an assignment sets. `{% set ns.x = 1 %}` sets no name, and reads the namespace `ns`."""
        from jinja2 import nodes

        found = {name.name for name in target.find_all(nodes.Name)}
        if isinstance(target, nodes.Name):
            found.add(target.name)
        spaces = [target] if isinstance(target, nodes.NSRef) else list(target.find_all(nodes.NSRef))
        self.found |= {space.name for space in spaces} - known
        return found

    def _read_names(self, node: nodes.Node | None, known: frozenset[str]) -> None:
        from jinja2 import nodes

        if node is None:
            return
        names = [node] if isinstance(node, nodes.Name) else node.find_all(nodes.Name)
        self.found |= {name.name for name in names if name.ctx == 'load'} - known


def _raises(body: Iterable[nodes.Node]) -> bool:
    """Return whether one of the statements calls raise_exception. Nested statements are not searched."""
    from jinja2 import nodes

    calls = (call for node in body if isinstance(node, nodes.Output) for call in node.find_all(nodes.Call))
    return any(isinstance(call.node, nodes.Name) and call.node.name == 'raise_exception' for call in calls)
